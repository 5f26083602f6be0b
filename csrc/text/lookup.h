// Rows of the generated tables, in ascending order, and how to find one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <string_view>

namespace greedy::core {

// Characters first to last have this kind.
struct Run {
    std::uint32_t first, last, kind;
};
// A character and the text that stands for it.
struct Text {
    std::uint32_t code;
    const char* text;
};
// An HTML entity: its name, with its semicolon if it has one, and its text.
struct Entity {
    const char *name, *text;
};

// The kind of a character; 0 outside all runs.
template <std::size_t N>
std::uint32_t kind_of(const Run (&runs)[N], std::uint32_t code) {
    const Run* found = std::upper_bound(std::begin(runs), std::end(runs), code,
                                        [](std::uint32_t value, const Run& run) { return value < run.first; });
    return found != std::begin(runs) && code <= found[-1].last ? found[-1].kind : 0;
}

// The text of a character, or null.
template <std::size_t N>
const char* text_of(const Text (&texts)[N], std::uint32_t code) {
    const Text* found = std::lower_bound(std::begin(texts), std::end(texts), code,
                                         [](const Text& text, std::uint32_t value) { return text.code < value; });
    return found != std::end(texts) && found->code == code ? found->text : nullptr;
}

// The text of an entity, or null.
template <std::size_t N>
const char* text_of(const Entity (&entities)[N], std::string_view name) {
    const Entity* found =
        std::lower_bound(std::begin(entities), std::end(entities), name,
                         [](const Entity& entity, std::string_view value) { return entity.name < value; });
    return found != std::end(entities) && found->name == name ? found->text : nullptr;
}

}  // namespace greedy::core
