// Rounding to and from the 16-bit types, to nearest even, as torch does.
#pragma once

#include <cstdint>
#include <cstring>

#include "base/tensor.h"

namespace greedy::core {

inline std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline std::uint16_t to_bfloat16(float value) {
    const std::uint32_t bits = bits_of(value);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FC0;  // not a number
    return static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline float from_bfloat16(std::uint16_t half) { return float_of(std::uint32_t{half} << 16); }

inline std::uint16_t to_float16(float value) {
    const std::uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
    if (magnitude >= 0x47800000)  // 2^16: infinite, or not a number
        return static_cast<std::uint16_t>(sign | (magnitude > 0x7F800000 ? 0x7E00 : 0x7C00));
    if (magnitude <
        0x38800000)  // below 2^-14: the addition shifts the bits of the subnormal into place and rounds them
        return static_cast<std::uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3F000000));
    return static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13));
}

inline float from_float16(std::uint16_t half) {
    const std::uint32_t sign = std::uint32_t{half & 0x8000u} << 16, exponent = half >> 10 & 31,
                        mantissa = half & 0x3FFu;
    if (exponent == 31) return float_of(sign | 0x7F800000 | mantissa << 13);
    if (exponent == 0) return float_of(sign | bits_of(static_cast<float>(mantissa) * 0x1p-24f));
    return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}

// The nearest value that `dtype` can hold; float32 is left as it is.
inline float rounded(float value, DType dtype) {
    if (dtype == DType::bfloat16) return from_bfloat16(to_bfloat16(value));
    if (dtype == DType::float16) return from_float16(to_float16(value));
    return value;
}

// These convert arrays of `dtype` (float32, float16 or bfloat16) from and to floats.
inline void pack(const float* from, std::size_t count, DType dtype, void* to) {
    if (dtype == DType::float32) {
        if (count) std::memcpy(to, from, count * sizeof(float));
        return;
    }
    auto* out = static_cast<std::uint16_t*>(to);
    for (std::size_t i = 0; i < count; ++i)
        out[i] = dtype == DType::bfloat16 ? to_bfloat16(from[i]) : to_float16(from[i]);
}

inline void unpack(const void* from, std::size_t count, DType dtype, float* to) {
    if (dtype == DType::float32) {
        if (count) std::memcpy(to, from, count * sizeof(float));
        return;
    }
    const auto* in = static_cast<const std::uint16_t*>(from);
    for (std::size_t i = 0; i < count; ++i)
        to[i] = dtype == DType::bfloat16 ? from_bfloat16(in[i]) : from_float16(in[i]);
}

}  // namespace greedy::core
