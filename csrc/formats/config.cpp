#include "formats/config.h"

#include <cmath>

#include "base/error.h"
#include "base/number.h"
#include "base/table.h"

namespace greedy::core {
namespace {

constexpr std::int64_t kMost = 1 << 20;
constexpr double kLeastFirst = 100;

void check(bool good, const std::string& where, const std::string& got, const std::string& expected) {
    if (!good) fail(GREEDY_BAD_BUNDLE, where, got, expected);
}

const struct {
    const char* name;
    CommitPolicy policy;
} kCommits[] = {{"clean", CommitPolicy::clean}, {"noisy", CommitPolicy::noisy}, {"none", CommitPolicy::none}};

double number_from(const Json& value, const std::string& where, double least, double most) {
    const double number = value.number(where);
    check(number >= least && number <= most, where, fixed(number),
          "a number from " + fixed(least) + " to " + fixed(most));
    return number;
}

std::vector<std::vector<double>> steps_from(const Json& value, const std::string& where, bool warped) {
    const Json::Array& rows = value.array(where);
    const bool nested = !rows.empty() && rows[0].is_array();
    std::vector<std::vector<double>> steps;
    for (std::size_t i = 0; i < (nested ? rows.size() : 1); ++i) {
        steps.emplace_back();
        for (const Json& item : (nested ? rows[i] : value).array(where)) steps.back().push_back(item.number(where));
    }
    check_steps(steps, where, warped, GREEDY_BAD_BUNDLE);
    return steps;
}

LocalHeads heads_from(const Json& value, const std::string& where) {
    LocalHeads out;
    for (const auto& item : value.object(where)) {
        const std::string& key = item.first;
        check(key == "window" || key == "attn_sink" || key == "layers", where, "unknown key " + key.substr(0, 60),
              "one of a head table's");
    }
    out.window = value.at("window", where).integer(where + ".window", 1, kMost);
    out.attn_sink = value.at("attn_sink", where).integer(where + ".attn_sink", 0, out.window - 1);
    const std::string at = where + ".layers";
    for (const Json& row : value.at("layers", where).array(at)) {
        out.layers.emplace_back();
        for (const Json& head : row.array(at)) {
            const std::int64_t least = out.layers.back().empty() ? 0 : out.layers.back().back() + 1;
            out.layers.back().push_back(head.integer(at, least, kMost));
        }
    }
    check(!out.layers.empty(), at, "none", "a row for every layer");
    return out;
}

}  // namespace

void LocalHeads::fit(const TransformerConfig& config, const std::string& where) const {
    if (layers.empty()) return;
    const auto count = static_cast<std::int64_t>(layers.size());
    check(count == config.layers, where, "a table of " + std::to_string(count) + " layers",
          "one of " + std::to_string(config.layers) + " layers");
    bool alone = true;
    for (const std::vector<std::int64_t>& heads : layers) {
        if (!heads.empty())
            check(heads.back() < config.heads, where, "head " + std::to_string(heads.back()),
                  "numbers below " + std::to_string(config.heads));
        alone &= static_cast<std::int64_t>(heads.size()) == config.heads;
    }
    check(!alone, where, "local heads alone", "others too");
}

TransformerConfig TransformerConfig::from(const Json& values, const std::string& where) {
    TransformerConfig out;
    for (const auto& [key, value] : values.object(where)) {
        const std::string at = where + "." + key.substr(0, 60);
        if (key == "patch_size") {
            const Json::Array& sizes = value.array(at);
            check(sizes.size() == 3 && sizes[0].integer(at, 1, 1) == 1, at, "another length", "1, height, width");
            out.patch_height = sizes[1].integer(at, 1, kMost), out.patch_width = sizes[2].integer(at, 1, kMost);
        } else if (key == "num_attention_heads") {
            out.heads = value.integer(at, 1, kMost);
        } else if (key == "attention_head_dim") {
            out.head_dim = value.integer(at, 8, kMost);
            check(out.head_dim % 2 == 0, at, std::to_string(out.head_dim), "an even number");
        } else if (key == "in_channels") {
            out.in_channels = value.integer(at, 1, kMost);
        } else if (key == "out_channels") {
            out.out_channels = value.integer(at, 1, kMost);
        } else if (key == "text_dim") {
            out.text_dim = value.integer(at, 1, kMost);
        } else if (key == "num_layers") {
            out.layers = value.integer(at, 1, 1024);
        } else if (key == "freq_dim" || key == "ffn_dim") {
            value.integer(at, 1, kMost);  // only compiling the graphs needs it
        } else if (key == "eps") {
            const double eps = value.number(at);
            check(eps > 0 && eps < 1, at, fixed(eps), "a number between 0 and 1");
        } else if (key == "cross_attn_norm") {
            value.boolean(at);
        } else if (key == "qk_norm") {
            const std::string& norm = value.string(at);
            check(norm == "rms_norm_across_heads", at, "'" + norm.substr(0, 60) + "'", "'rms_norm_across_heads'");
        } else {
            check(false, where, "unknown key " + key.substr(0, 60), "one of a transformer's");
        }
    }
    check(out.in_channels == out.out_channels, where + ".out_channels", std::to_string(out.out_channels),
          "as many as in_channels");
    return out;
}

void check_steps(const std::vector<std::vector<double>>& rows, const std::string& where, bool warped, int status) {
    const auto check = [&](bool good, const std::string& got, const std::string& expected) {
        if (!good) fail(status, where, got, expected);
    };
    check(!rows.empty(), "no timestep", "at least one for every chunk");
    for (const std::vector<double>& row : rows) {
        check(!row.empty(), "no timestep", "at least one for every chunk");
        // A chunk begins as noise. A small first timestep is a count of steps, taken for a timestep.
        check(row[0] >= kLeastFirst, fixed(row[0]), "timesteps that begin near 1000");
        double before = std::nextafter(1000.0, 1001.0);
        for (const double step : row) {
            check(step > 0 && step < before, fixed(step), "falling numbers in (0, 1000]");
            check(!warped || step == std::floor(step), fixed(step), "whole numbers where warped");
            before = step;
        }
    }
}

Preset Preset::from(const Json& values, const std::string& where, std::int64_t version) {
    Preset out;
    const Json *steps = nullptr, *heads = nullptr;
    std::int64_t first_chunk = 0;
    out.family = values.at("family", where).string(where + ".family");
    // Version 1 counts the window of a greedy preset in chunks before the current one.
    const bool chunks_before = version == 1 && out.family == "greedy";
    out.window = chunks_before ? 3 : 4;
    for (const auto& [key, value] : values.object(where)) {
        const std::string at = where + "." + key.substr(0, 60);
        if (key == "chunk")
            out.chunk = value.integer(at, 1, kMost);
        else if (key == "first_chunk")
            first_chunk = value.integer(at, 0, kMost);
        else if (key == "window")
            out.window = value.integer(at, 0, kMost);
        else if (key == "attn_sink")
            out.attn_sink = value.integer(at, 0, kMost);
        else if (key == "max_position")
            out.max_position = value.integer(at, 0, kMost);
        else if (key == "stop_after")
            out.stop_after = value.integer(at, 0, kMost);
        else if (key == "steps")
            steps = &value;
        else if (key == "heads")
            heads = &value;
        else if (key == "warped")
            out.warped = value.boolean(at);
        else if (key == "shift")
            out.shift = number_from(value, at, 1e-3, 1e3);
        else if (key == "context_timestep")
            out.context_timestep = number_from(value, at, 0, 1000);
        else if (key == "solver")
            out.solver = value.string(at);
        else if (key == "commit")
            out.commit = find_row(kCommits, value.string(at), at).policy;
        else
            check(key == "family", where, "unknown key " + key.substr(0, 60), "one of a preset's");
    }
    if (steps) out.steps = steps_from(*steps, where + ".steps", out.warped);
    if (chunks_before) out.window = (out.window + 1) * out.chunk;
    if (heads && !heads->is_null()) out.heads = heads_from(*heads, where + ".heads");
    const auto text = [](std::int64_t value) { return std::to_string(value); };
    check(first_chunk == 0 || first_chunk == out.chunk, where + ".first_chunk", text(first_chunk), "0 or chunk");
    check(out.window >= out.chunk && out.window <= kMost, where + ".window", text(out.window) + " latent frames",
          "chunk to " + text(kMost));
    check(out.window % out.chunk == 0, where + ".window", text(out.window), "whole chunks");
    check(out.attn_sink % out.chunk == 0, where + ".attn_sink", text(out.attn_sink), "whole chunks");
    check(out.heads.window % out.chunk == 0, where + ".heads.window", text(out.heads.window), "whole chunks");
    check(out.heads.attn_sink % out.chunk == 0, where + ".heads.attn_sink", text(out.heads.attn_sink), "whole chunks");
    return out;
}

}  // namespace greedy::core
