// Whether numbers are finite.
#pragma once

#include <cstddef>
#include <string>

#include "base/error.h"
#include "base/tensor.h"

namespace greedy::core {

// "nan" or "inf" if `count` values of `dtype` at `from` have such a number; else "". Other types than floats have none.
std::string not_finite(const void* from, std::size_t count, DType dtype);

// An argument must be finite.
inline void need_finite(const float* values, std::size_t count, const char* what) {
    const std::string got = not_finite(values, count, DType::float32);
    if (!got.empty()) fail(GREEDY_INVALID, what, got, "finite numbers");
}

}  // namespace greedy::core
