// A bundle's manifest fixes the transformer's shape and the streaming preset. engine/config.py documents the fields.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "formats/json.h"

namespace greedy::core {

struct TransformerConfig {
    std::int64_t patch_height = 2, patch_width = 2;
    std::int64_t heads = 12, head_dim = 128;
    std::int64_t in_channels = 16, out_channels = 16;
    std::int64_t text_dim = 4096, layers = 30;

    std::int64_t dim() const { return heads * head_dim; }
    static TransformerConfig from(const Json& values, const std::string& where);
};

enum class CommitPolicy { clean, noisy, none };

// Throws Error(status) unless rows of timesteps are those of a preset.
void check_steps(const std::vector<std::vector<double>>& rows, const std::string& where, bool warped, int status);

// Heads of self-attention that keep the keys of few frames. None where `layers` is empty.
struct LocalHeads {
    std::int64_t window = 0, attn_sink = 0;         // latent frames
    std::vector<std::vector<std::int64_t>> layers;  // numbers of the local heads of every layer

    // Throws Error(GREEDY_BAD_BUNDLE) unless the transformer has these layers and heads.
    void fit(const TransformerConfig& config, const std::string& where) const;
};

struct Preset {
    std::string family;       // a row of core/families.cpp
    std::int64_t chunk = 1;   // latent frames
    std::int64_t window = 0;  // latent frames, the current chunk included
    std::int64_t attn_sink = 0, max_position = 20, stop_after = 0;
    std::vector<std::vector<double>> steps = {{1000, 750, 500, 250}};
    bool warped = true;
    double shift = 5.0, context_timestep = 0.0;
    std::string solver = "renoise";  // a row of core/schedule.cpp
    CommitPolicy commit = CommitPolicy::clean;
    LocalHeads heads;

    // From a manifest of `version` 1 or 2. Throws Error(GREEDY_BAD_BUNDLE) where graphs of fixed shapes cannot run it:
    // a first chunk of another size, or a window that is not whole chunks. Family and solver are only looked up later.
    static Preset from(const Json& values, const std::string& where, std::int64_t version);
};

}  // namespace greedy::core
