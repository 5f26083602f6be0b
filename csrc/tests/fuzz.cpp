// Feeds damaged input to every reader of a bundle, and odd calls to sessions. The first byte names the kind of the rest:
// m a manifest, s safetensors, t a tokenizer.json, c a map of characters and a text, p a prompt, a calls of the C
// interface (calls.cpp). A libFuzzer target with clang; with other compilers fuzz_driver.cpp calls it.
//
// A reader must also be fast: twice the text may take 2.5 times as long, and kSlack more.
#include <cstdint>
#include <cstdlib>
#include <ctime>
#include <string>

#include "base/error.h"
#include "base/utf8.h"
#include "calls.h"
#include "core/session.h"
#include "formats/manifest.h"
#include "formats/safetensors.h"
#include "text/charsmap.h"
#include "text/cleaning.h"
#include "text/tokenizer.h"

namespace {

using namespace greedy::core;

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr double kSlack = 4;
#else
constexpr double kSlack = 0.5;  // seconds: what the longest garbled prompt takes, of quadratic cost below its limit
#endif

template <typename Work>
double seconds_of(Work&& work) {
    const std::clock_t begun = std::clock();  // of the process: others on the machine do not count
    try {
        work();
    } catch (const Error&) {
    }
    return static_cast<double>(std::clock() - begun) / CLOCKS_PER_SEC;
}

// `read` takes a text.
template <typename Read>
void need_linear(const char* what, const std::string& once, const std::string& twice, Read&& read) {
    double one = 0, two = 0;
    for (int tries = 0; tries < 3; ++tries) {
        two = seconds_of([&] { read(twice); });
        if (two <= kSlack) return;
        one = seconds_of([&] { read(once); });
        if (two <= 2.5 * one + kSlack) return;
    }
    std::fprintf(stderr, "%s: got %.2f s for %zu bytes and %.2f s for %zu, expected no more than 2.5 times as much\n",
                 what, one, once.size(), two, twice.size());
    std::abort();
}

// The text repeated to at most so many characters.
std::string repeated(const std::string& text, std::size_t characters) {
    const std::size_t length = std::max<std::size_t>(to_utf32(text).size(), 1);
    std::string out;
    for (std::size_t count = 0; count + length <= characters; count += length) out += text;
    return out;
}

template <typename Read>
void need_linear_prompts(const char* what, const std::string& text, Read&& read) {
    for (const std::size_t most : {kMostGarbled, kMostCharacters})
        need_linear(what, repeated(text, most / 2), repeated(text, most), read);
}

// Reads every byte of every tensor, so that a sanitizer sees one that lies outside.
std::uint64_t sum_of(const std::string& rest) {
    std::uint64_t sum = 0;
    const auto* data = reinterpret_cast<const unsigned char*>(rest.data());
    for (const auto& [key, tensor] : read_safetensors(data, rest.size(), "fuzz"))
        for (std::size_t i = 0; i < tensor.spec.bytes(); ++i) sum += tensor.data[i];
    return sum;
}

void read_json(const std::string& text) { Json::parse(text, "fuzz", Json::kMostInLists); }

void need_linear_json(const std::string& text) {
    std::string once = "[" + text;
    while (once.size() < 20'000) once += "," + text;
    need_linear("json", once + "]", once + "," + once.substr(1) + "]", read_json);
}

void read_prompt(const std::string& text) {
    if (!utf8_valid(text)) return;
    need_linear_prompts("prompt", text, [](const std::string& one) { clean_prompt(one); });
    try {
        if (!utf8_valid(clean_prompt(text))) std::abort();
    } catch (const Error& error) {
        if (error.status != GREEDY_INVALID) throw;
    }
}

void read_tokenizer(const std::string& text) {
    const Tokenizer tokenizer(text, R"({"pad_token": "<pad>", "model_max_length": 16})", "fuzz");
    const std::string prompt = "a red circle &amp; </s> caf\xC3\xA9  \xE2\x96\x81 ";
    const auto encode = [&](const std::string& one) {
        std::vector<std::int64_t> ids, mask;
        try {
            tokenizer.encode(one, ids, mask);
        } catch (const Error& error) {
            if (error.status != GREEDY_INVALID) throw;
            return;
        }
        if (ids.size() != 16 || mask.size() != 16) std::abort();
        for (std::int64_t id : ids)
            if (id < 0 || id > tokenizer.largest_id()) std::abort();
    };
    encode(prompt);
    need_linear_prompts("tokenizer", prompt, encode);
}

void read(char kind, const std::string& rest) {
    if (kind == 'm' || kind == 't') need_linear_json(rest);
    if (kind == 'm') check_preset(Manifest::parse(rest, "fuzz").preset, "fuzz");
    if (kind == 's') sum_of(rest);
    if (kind == 't') read_tokenizer(rest);
    if (kind == 'c') {
        const std::size_t split = rest.find('\n');
        if (split == std::string::npos || !utf8_valid(rest.substr(split + 1))) return;
        Charsmap(rest.substr(0, split), "fuzz").normalize(rest.substr(split + 1));
    }
    if (kind == 'p') read_prompt(rest);
    if (kind == 'a') play_calls(rest);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    if (size == 0) return 0;
    try {
        // A copy of exact size, so that a sanitizer sees a read past the end.
        read(static_cast<char>(data[0]), std::string(reinterpret_cast<const char*>(data) + 1, size - 1));
    } catch (const Error& error) {
        if (error.status != GREEDY_BAD_BUNDLE) std::abort();
    }
    return 0;
}
