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

// The tensors of a file of `size` bytes, which must outlive them. Checks every length, offset and overlap; throws
// Error(GREEDY_BAD_BUNDLE) with `where` in its text. Leaves out types that no graph takes (F64, other integers).
std::map<std::string, StoredTensor> read_safetensors(const unsigned char* data, std::size_t size,
                                                     const std::string& where);

}  // namespace greedy::core
