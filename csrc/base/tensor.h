// Shapes and element types.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "greedy/plugin.h"

namespace greedy::core {

struct Shape {
    static constexpr int kMaxRank = 8;
    int rank = 0;
    std::array<std::int64_t, kMaxRank> sizes{};

    Shape() = default;
    Shape(std::initializer_list<std::int64_t> list) {
        for (std::int64_t size : list) sizes[rank++] = size;
    }
    std::int64_t operator[](int i) const { return sizes[i]; }
    bool operator==(const Shape& other) const { return rank == other.rank && sizes == other.sizes; }
    bool operator!=(const Shape& other) const { return !(*this == other); }
    std::int64_t count() const {
        std::int64_t product = 1;
        for (int i = 0; i < rank; ++i) product *= sizes[i];
        return product;
    }
    std::string text() const {
        std::string out = "[";
        for (int i = 0; i < rank; ++i) out += (i ? ", " : "") + std::to_string(sizes[i]);
        return out + "]";
    }
};

enum class DType : std::int32_t {
    float32 = GREEDY_FLOAT32,
    float16 = GREEDY_FLOAT16,
    bfloat16 = GREEDY_BFLOAT16,
    float8 = GREEDY_FLOAT8_E4M3FN,
    int64 = GREEDY_INT64,
};

inline std::size_t bytes_of(DType dtype) {
    return dtype == DType::float32 ? 4 : dtype == DType::int64 ? 8 : dtype == DType::float8 ? 1 : 2;
}

inline const char* name_of(DType dtype) {
    static constexpr const char* kNames[] = {"float32", "float16", "bfloat16", "float8_e4m3fn", "int64"};
    return kNames[static_cast<int>(dtype)];
}

struct TensorSpec {
    std::string name;
    Shape shape;
    DType dtype = DType::float32;

    std::size_t bytes() const { return static_cast<std::size_t>(shape.count()) * bytes_of(dtype); }
    std::string text() const { return std::string(name_of(dtype)) + " " + shape.text(); }
};

}  // namespace greedy::core
