// Rotary position tables of Wan: head dim split into time, height and width, as engine/model/rope.py.
#pragma once

#include <cstdint>
#include <vector>

namespace greedy::core {

struct RopeTable {
    std::vector<float> cos, sin;  // [frames * high * wide, head_dim / 2]
};

// For `frames` latent frames from a temporal position on, high x wide tokens each. Any position works: angles are
// doubles.
RopeTable rope_table(std::int64_t position, std::int64_t frames, std::int64_t high, std::int64_t wide,
                     std::int64_t head_dim);

}  // namespace greedy::core
