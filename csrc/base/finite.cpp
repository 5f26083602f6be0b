#include "base/finite.h"

#include <cstdint>
#include <cstring>

namespace greedy::core {

std::string not_finite(const void* from, std::size_t count, DType dtype) {
    // An exponent of ones is infinite, or NaN with a mantissa. Of e4m3 only NaN exists, with all bits set.
    std::uint32_t largest = 0;  // magnitude, as bits
    const auto scan = [&](auto type, std::uint32_t mask) {
        using Bits = decltype(type);
        for (std::size_t i = 0; i < count; ++i) {
            Bits bits;
            std::memcpy(&bits, static_cast<const char*>(from) + i * sizeof bits, sizeof bits);
            const std::uint32_t magnitude = bits & mask;
            largest = magnitude > largest ? magnitude : largest;
        }
    };
    std::uint32_t infinite = 0;
    switch (dtype) {
        case DType::float32:
            scan(std::uint32_t{}, 0x7FFFFFFF), infinite = 0x7F800000;
            break;
        case DType::float16:
            scan(std::uint16_t{}, 0x7FFF), infinite = 0x7C00;
            break;
        case DType::bfloat16:
            scan(std::uint16_t{}, 0x7FFF), infinite = 0x7F80;
            break;
        case DType::float8:
            scan(std::uint8_t{}, 0x7F), infinite = 0x7E;  // the largest number; one more is NaN
            return largest > infinite ? "nan" : "";
        default:
            return "";
    }
    return largest > infinite ? "nan" : largest == infinite ? "inf" : "";
}

}  // namespace greedy::core
