// The safetensors format: names, shapes and types over one mapped file.
#pragma once

#include <map>
#include <string>

#include "base/tensor.h"

namespace greedy::core {

struct StoredTensor {
    TensorSpec spec;  // its name is the key
    const unsigned char* data;
};

// The tensors of a file of `size` bytes, which must outlive them. Every length, offset and overlap is checked; throws
// Error(GREEDY_BAD_BUNDLE) with `where` in its text. A type that no graph here takes (integers of other widths, F64)
// is left out.
std::map<std::string, StoredTensor> read_safetensors(const unsigned char* data, std::size_t size,
                                                     const std::string& where);

}  // namespace greedy::core
