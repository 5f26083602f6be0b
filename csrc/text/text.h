// Properties of characters for the tokenizer; the tables are in text_tables.inc. Strings are valid UTF-8.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace greedy::core {

// One character and its bytes.
struct Character {
    std::uint32_t code;
    std::string_view bytes;
};
std::vector<Character> characters(std::string_view text);

bool is_word(std::uint32_t code);   // \w of the tokenizers library
bool is_space(std::uint32_t code);  // white space of the tokenizers library, which is Unicode's
bool is_python_space(std::uint32_t code);
std::string lower_case(std::string_view text);

// Extended grapheme clusters (Unicode Standard Annex 29).
std::vector<std::string_view> graphemes(std::string_view text);

}  // namespace greedy::core
