// noise_test VECTORS checks the noise against vectors that tests/csrc/test_csrc.py wrote with the engine.
// Three lines per draw: "draw SEED CHUNK DRAW COUNT" in decimal; "words", in hexadecimal, as many as the values need
// (COUNT rounded up to even); "values", the float32 bits in hexadecimal. A line that starts with # is a comment.
#include "core/noise.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

namespace {

struct Draw {
    std::uint64_t seed, chunk, draw;
    std::size_t count;
    std::vector<std::uint64_t> words;
    std::vector<std::uint32_t> values;
};

int failures = 0;
std::size_t compared = 0, differing = 0;

void check(bool good, const std::string& what) {
    if (good) return;
    ++failures;
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

template <typename T>
bool read_hex(std::istream& lines, const std::string& name, std::size_t count, std::vector<T>& out) {
    std::string text, word;
    if (!std::getline(lines, text)) return false;
    std::istringstream line(text);
    if (!(line >> word) || word != name) return false;
    T value;
    for (line >> std::hex; line >> value;) out.push_back(value);
    return line.eof() && out.size() == count;
}

bool read_draws(std::istream& lines, std::vector<Draw>& out) {
    for (std::string text; std::getline(lines, text);) {
        if (text.empty() || text[0] == '#') continue;
        Draw draw{};
        std::string word;
        std::istringstream line(text);
        if (!(line >> word >> draw.seed >> draw.chunk >> draw.draw >> draw.count) || word != "draw") return false;
        if (!read_hex(lines, "words", draw.count + draw.count % 2, draw.words)) return false;
        if (!read_hex(lines, "values", draw.count, draw.values)) return false;
        out.push_back(draw);
    }
    return !out.empty();
}

std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// Maps floats to integers in order: neighbours are one apart, and both zeros are 0.
std::int64_t rank(std::uint32_t bits) {
    const std::int64_t magnitude = bits & 0x7FFFFFFF;
    return bits >> 31 ? -magnitude : magnitude;
}

bool finite(std::uint32_t bits) { return (bits & 0x7F800000) != 0x7F800000; }

void test_draw(const Draw& draw) {
    const std::string name = "draw " + std::to_string(draw.seed) + " " + std::to_string(draw.chunk) + " " +
                             std::to_string(draw.draw) + " " + std::to_string(draw.count);

    std::vector<std::uint64_t> words(draw.words.size());
    greedy::core::philox_words(draw.seed, draw.chunk, draw.draw, words.data(), words.size());
    check(words == draw.words, name + ": words differ");

    const std::uint32_t guard = bits_of(std::numeric_limits<float>::quiet_NaN());
    std::vector<float> values(draw.count + 4, std::numeric_limits<float>::quiet_NaN());
    greedy::core::philox_normal(draw.seed, draw.chunk, draw.draw, values.data(), draw.count);
    for (std::size_t i = 0; i < draw.count; ++i) {
        const std::uint32_t got = bits_of(values[i]), expected = draw.values[i];
        const bool close = finite(got) && finite(expected) && std::llabs(rank(got) - rank(expected)) <= 1;
        check(close, name + ": value " + std::to_string(i) + " is more than 1 ulp away");
        ++compared;
        differing += got != expected;
    }
    for (std::size_t i = draw.count; i < values.size(); ++i)
        check(bits_of(values[i]) == guard, name + ": wrote past the end");
}

// The three answers that the authors of Philox publish for philox4x64 with 10 rounds (Random123, kat_vectors).
void test_known_answers() {
    constexpr std::uint64_t ones = ~std::uint64_t{0};
    check(
        greedy::core::philox4x64({0, 0, 0, 0}, {0, 0}) ==
            greedy::core::PhiloxCounter{0x16554d9eca36314c, 0xdb20fe9d672d0fdc, 0xd7e772cee186176b, 0x7e68b68aec7ba23b},
        "known answer: zeros");
    check(
        greedy::core::philox4x64({ones, ones, ones, ones}, {ones, ones}) ==
            greedy::core::PhiloxCounter{0x87b092c3013fe90b, 0x438c3c67be8d0224, 0x9cc7d7c69cd777b6, 0xa09caebf594f0ba0},
        "known answer: ones");
    check(
        greedy::core::philox4x64({0x243f6a8885a308d3, 0x13198a2e03707344, 0xa4093822299f31d0, 0x082efa98ec4e6c89},
                                 {0x452821e638d01377, 0xbe5466cf34e90c6c}) ==
            greedy::core::PhiloxCounter{0xa528f45403e61d95, 0x38c72dbd566e9788, 0xa5a1610e72fd18b5, 0x57bd43b5e52b7fe6},
        "known answer: digits of pi");
}

void test_counts() {
    greedy::core::philox_words(1, 2, 3, nullptr, 0);
    greedy::core::philox_normal(1, 2, 3, nullptr, 0);
    constexpr std::uint64_t guard = 0x0123456789ABCDEF;
    std::vector<std::uint64_t> whole(12);
    greedy::core::philox_words(1, 2, 3, whole.data(), whole.size());
    for (std::size_t count = 0; count < whole.size(); ++count) {
        std::vector<std::uint64_t> part(whole.size(), guard);
        greedy::core::philox_words(1, 2, 3, part.data(), count);
        for (std::size_t i = 0; i < part.size(); ++i)
            check(part[i] == (i < count ? whole[i] : guard), "words: a count of " + std::to_string(count));
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: noise_test VECTORS\n");
        return 2;
    }
    std::ifstream file(argv[1]);
    std::vector<Draw> draws;
    if (!read_draws(file, draws)) {
        std::fprintf(stderr, "%s: missing, empty or malformed after %zu draws\n", argv[1], draws.size());
        return 2;
    }
    test_known_answers();
    test_counts();
    for (const Draw& draw : draws) test_draw(draw);
    // Mathematical libraries may differ in a last bit. Float arithmetic instead of double would differ often.
    check(differing <= compared / 1000, "values: more than 1 in 1000 differ in the last bit");
    std::printf("%zu draws, %zu values, %zu differ in the last bit, %d failures\n", draws.size(), compared, differing,
                failures);
    return failures == 0 ? 0 : 1;
}
