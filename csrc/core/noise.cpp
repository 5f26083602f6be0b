#include "core/noise.h"

#include <algorithm>
#include <cmath>

namespace greedy::core {
namespace {

constexpr std::uint64_t kMultiplier0 = 0xD2E7470EE14C6C93;
constexpr std::uint64_t kMultiplier1 = 0xCA5A826395121157;
constexpr std::uint64_t kWeyl0 = 0x9E3779B97F4A7C15;  // golden ratio
constexpr std::uint64_t kWeyl1 = 0xBB67AE8584CAA73B;  // sqrt(3) - 1
constexpr int kRounds = 10;
constexpr double kTwoPi = 6.283185307179586476925286766559;

// The upper 64 bits of a * b, from 32-bit halves: standard C++ has no 128-bit integer.
std::uint64_t multiply_high(std::uint64_t a, std::uint64_t b) noexcept {
    const std::uint64_t a0 = a & 0xFFFFFFFF, a1 = a >> 32;
    const std::uint64_t b0 = b & 0xFFFFFFFF, b1 = b >> 32;
    const std::uint64_t low = a0 * b1 + (a0 * b0 >> 32);  // cannot overflow: at most 2^64 - 2^32
    const std::uint64_t mid = a1 * b0 + (low & 0xFFFFFFFF);
    return a1 * b1 + (low >> 32) + (mid >> 32);
}

PhiloxCounter block(std::uint64_t seed, std::uint64_t chunk, std::uint64_t draw, std::size_t index) noexcept {
    return philox4x64({std::uint64_t{index} + 1, draw, chunk, 0}, {seed, 0});
}

// In (0, 1], so its logarithm is finite; 53 bits, so the conversion is exact.
double uniform(std::uint64_t word) noexcept { return static_cast<double>((word >> 11) + 1) * 0x1p-53; }

}  // namespace

PhiloxCounter philox4x64(PhiloxCounter counter, PhiloxKey key) noexcept {
    for (int round = 0; round < kRounds; ++round) {
        counter = {multiply_high(kMultiplier1, counter[2]) ^ counter[1] ^ key[0], kMultiplier1 * counter[2],
                   multiply_high(kMultiplier0, counter[0]) ^ counter[3] ^ key[1], kMultiplier0 * counter[0]};
        key = {key[0] + kWeyl0, key[1] + kWeyl1};
    }
    return counter;
}

void philox_words(std::uint64_t seed, std::uint64_t chunk, std::uint64_t draw, std::uint64_t* out,
                  std::size_t count) noexcept {
    for (std::size_t done = 0; done < count; done += 4) {
        const PhiloxCounter words = block(seed, chunk, draw, done / 4);
        std::copy_n(words.begin(), std::min<std::size_t>(4, count - done), out + done);
    }
}

void philox_normal(std::uint64_t seed, std::uint64_t chunk, std::uint64_t draw, float* out,
                   std::size_t count) noexcept {
    for (std::size_t done = 0; done < count; done += 4) {
        const PhiloxCounter words = block(seed, chunk, draw, done / 4);
        std::array<float, 4> values;
        for (std::size_t i = 0; i < 4; i += 2) {
            const double radius = std::sqrt(-2.0 * std::log(uniform(words[i])));
            const double angle = kTwoPi * uniform(words[i + 1]);
            values[i] = static_cast<float>(radius * std::cos(angle));
            values[i + 1] = static_cast<float>(radius * std::sin(angle));
        }
        std::copy_n(values.begin(), std::min<std::size_t>(4, count - done), out + done);
    }
}

}  // namespace greedy::core
