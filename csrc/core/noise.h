// Noise that depends only on (seed, chunk, draw), as in Python; earlier draws do not matter.
//
// The functions are pure: no state, no allocation, no exception. They write exactly `count` elements to `out`, which
// may be null when `count` is 0. A shorter count gives a prefix of a longer one.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace greedy::core {

using PhiloxCounter = std::array<std::uint64_t, 4>;
using PhiloxKey = std::array<std::uint64_t, 2>;

// Philox4x64-10 (Salmon et al., 2011): four random words for a counter and a key.
PhiloxCounter philox4x64(PhiloxCounter counter, PhiloxKey key) noexcept;

// The raw words of a draw: block b, of four words, is philox4x64({b + 1, draw, chunk, 0}, {seed, 0}).
void philox_words(std::uint64_t seed, std::uint64_t chunk, std::uint64_t draw, std::uint64_t* out,
                  std::size_t count) noexcept;

// Standard normal values of a draw, always finite. Words 2i and 2i + 1 become values 2i and 2i + 1 (Box-Muller):
// u = ((word >> 11) + 1) * 2^-53, radius = sqrt(-2 ln u0), angle = 2 pi u1, (radius cos, radius sin), in double, then
// cast to float. Words are equal on every machine; values can differ in the last bit where log, cos or sin do.
void philox_normal(std::uint64_t seed, std::uint64_t chunk, std::uint64_t draw, float* out, std::size_t count) noexcept;

}  // namespace greedy::core
