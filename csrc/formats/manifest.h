// manifest.json lists a bundle's files and graphs. The schema is that of engine/bundles/manifest.py.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "base/tensor.h"
#include "formats/config.h"

namespace greedy::core {

struct GraphSpec {
    std::string file;
    std::vector<TensorSpec> inputs, outputs;
    std::map<std::string, std::string> weights;  // the graph's constant -> key of weights.safetensors
    std::map<std::string, std::string> aliases;  // output -> input in whose memory it is written
    std::vector<std::string> mutates;            // inputs that the graph writes and does not return
};

struct BackendSpec {
    std::string backend, target;
    std::map<std::string, std::string> versions;
    std::map<std::string, GraphSpec> graphs;
};

struct FileSpec {
    std::uint64_t bytes;
    std::string sha256;
};

// Names of two integer inputs of a transformer's graph: the first row to write, and the number of rows to attend to.
struct RowNames {
    const char* start_row;
    const char* valid_rows;
};

struct Manifest {
    RowNames names;  // by version
    std::string preset_name, precision, weights, tokenizer;
    Preset preset;
    TransformerConfig transformer;
    std::int64_t height, width, spatial, temporal, text_rows;
    double fps;
    std::map<std::string, FileSpec> files;
    std::vector<std::pair<std::string, BackendSpec>> backends;  // in the order of the file

    std::int64_t latent_height() const { return height / spatial; }
    std::int64_t latent_width() const { return width / spatial; }
    std::int64_t tokens_high() const { return latent_height() / transformer.patch_height; }
    std::int64_t tokens_wide() const { return latent_width() / transformer.patch_width; }
    std::int64_t tokens() const { return tokens_high() * tokens_wide(); }  // of a latent frame

    // From the text of manifest.json. Throws Error(GREEDY_BAD_BUNDLE).
    static Manifest parse(std::string_view text, const std::string& where);
};

// <folder>/manifest.json.
std::string manifest_path(const std::string& folder);
// Of a bundle. Throws Error(GREEDY_NOT_FOUND or GREEDY_BAD_BUNDLE).
Manifest read_manifest(const std::string& folder);

}  // namespace greedy::core
