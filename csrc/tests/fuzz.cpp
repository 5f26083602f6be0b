// Feeds damaged input to every reader of a bundle. The first byte names the kind of the rest: m a manifest,
// s safetensors, t a tokenizer.json, c a map of characters and a text, p a prompt. A libFuzzer target with clang; with other
// compilers fuzz_driver.cpp calls it.
#include <cstdint>
#include <string>

#include "base/error.h"
#include "base/utf8.h"
#include "core/session.h"
#include "formats/manifest.h"
#include "formats/safetensors.h"
#include "text/charsmap.h"
#include "text/cleaning.h"
#include "text/tokenizer.h"

namespace {

using namespace greedy::core;

// Reads every byte of every tensor, so that a sanitizer sees one that lies outside.
std::uint64_t sum_of(const std::string& rest) {
    std::uint64_t sum = 0;
    const auto* data = reinterpret_cast<const unsigned char*>(rest.data());
    for (const auto& [key, tensor] : read_safetensors(data, rest.size(), "fuzz"))
        for (std::size_t i = 0; i < tensor.spec.bytes(); ++i) sum += tensor.data[i];
    return sum;
}

void read(char kind, const std::string& rest) {
    if (kind == 'm') check_preset(Manifest::parse(rest, "fuzz").preset, "fuzz");
    if (kind == 's') sum_of(rest);
    if (kind == 't') {
        const Tokenizer tokenizer(rest, R"({"pad_token": "<pad>", "model_max_length": 16})", "fuzz");
        std::vector<std::int64_t> ids, mask;
        tokenizer.encode("a red circle &amp; </s> caf\xC3\xA9  \xE2\x96\x81", ids, mask);
        if (ids.size() != 16 || mask.size() != 16) __builtin_trap();
    }
    if (kind == 'c') {
        const std::size_t split = rest.find('\n');
        if (split == std::string::npos || !utf8_valid(rest.substr(split + 1))) return;
        Charsmap(rest.substr(0, split), "fuzz").normalize(rest.substr(split + 1));
    }
    if (kind == 'p' && utf8_valid(rest) && !utf8_valid(clean_prompt(rest))) __builtin_trap();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    if (size == 0) return 0;
    try {
        // A copy of exact size, so that a sanitizer sees a read past the end.
        read(static_cast<char>(data[0]), std::string(reinterpret_cast<const char*>(data) + 1, size - 1));
    } catch (const Error& error) {
        if (error.status != GREEDY_BAD_BUNDLE) __builtin_trap();
    }
    return 0;
}
