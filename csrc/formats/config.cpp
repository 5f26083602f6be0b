#include "formats/config.h"

#include <cmath>
#include <string_view>

#include "base/error.h"

namespace greedy::core {
namespace {

constexpr std::int64_t kMost = 1 << 20;

void check(bool good, const std::string& where, const std::string& got, const std::string& expected) {
    if (!good) fail(GREEDY_BAD_BUNDLE, where, got, expected);
}

// The index of a name in a list; the enumerations have the same order.
template <typename Enum, std::size_t N>
Enum choice(const Json& value, const std::string& where, const std::string_view (&names)[N]) {
    const std::string& given = value.string(where);
    std::string all;
    for (std::size_t i = 0; i < N; ++i) {
        if (given == names[i]) return static_cast<Enum>(i);
        all += (i ? ", " : "") + std::string(names[i]);
    }
    fail(GREEDY_BAD_BUNDLE, where, "'" + given.substr(0, 60) + "'", "one of " + all);
}

double number_from(const Json& value, const std::string& where, double least, double most) {
    const double given = value.number(where);
    check(given >= least && given <= most, where, std::to_string(given),
          "a number from " + std::to_string(least) + " to " + std::to_string(most));
    return given;
}

std::vector<std::vector<double>> steps_from(const Json& value, const std::string& where, bool warped) {
    const Json::Array& given = value.array(where);
    const bool nested = !given.empty() && given[0].is_array();
    std::vector<std::vector<double>> steps;
    for (std::size_t i = 0; i < (nested ? given.size() : 1); ++i) {
        steps.emplace_back();
        for (const Json& item : (nested ? given[i] : value).array(where)) {
            const double step = item.number(where);
            const double before = steps.back().empty() ? std::nextafter(1000.0, 1001.0) : steps.back().back();
            check(step > 0 && step < before, where, std::to_string(step), "falling numbers in (0, 1000]");
            check(!warped || step == std::floor(step), where, std::to_string(step), "whole numbers where warped");
            steps.back().push_back(step);
        }
        check(!steps.back().empty(), where, "no timestep", "at least one for every chunk");
    }
    return steps;
}

}  // namespace

TransformerConfig TransformerConfig::from(const Json& given, const std::string& where) {
    TransformerConfig out;
    for (const auto& [key, value] : given.object(where)) {
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
            value.integer(at, 1, kMost);  // matters to whoever compiles the graphs
        } else if (key == "eps") {
            value.number(at);
        } else if (key == "cross_attn_norm") {
            value.boolean(at);
        } else if (key == "qk_norm") {
            value.string(at);
        } else {
            check(false, where, "unknown key " + key.substr(0, 60), "one of a transformer's");
        }
    }
    check(out.in_channels == out.out_channels, where, "in and out channels that differ", "as many of both");
    return out;
}

Preset Preset::from(const Json& given, const std::string& where) {
    Preset out;
    const Json* steps = nullptr;
    std::int64_t first_chunk = 0;
    out.family = choice<Family>(given.at("family", where), where + ".family", {"greedy", "causal"});
    if (out.family == Family::causal) out.window = 1;
    for (const auto& [key, value] : given.object(where)) {
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
        else if (key == "warped")
            out.warped = value.boolean(at);
        else if (key == "shift")
            out.shift = number_from(value, at, 1e-9, 1e9);
        else if (key == "context_timestep")
            out.context_timestep = number_from(value, at, 0, 1000);
        else if (key == "solver")
            out.solver = choice<SolverKind>(value, at, {"renoise", "euler", "unipc"});
        else if (key == "commit")
            out.commit = choice<CommitPolicy>(value, at, {"clean", "noisy", "none"});
        else
            check(key == "family", where, "unknown key " + key.substr(0, 60), "one of a preset's");
    }
    if (steps) out.steps = steps_from(*steps, where + ".steps", out.warped);
    const auto text = [](std::int64_t value) { return std::to_string(value); };
    check(first_chunk == 0 || first_chunk == out.chunk, where + ".first_chunk", text(first_chunk), "0 or chunk");
    if (out.family == Family::greedy) {
        check(out.max_position >= 2 * out.chunk, where + ".max_position", text(out.max_position), "two chunks or more");
        check(out.commit == CommitPolicy::clean, where + ".commit", "another", "clean for the greedy family");
        return out;
    }
    check(out.window >= out.attn_sink + out.chunk, where + ".window", text(out.window), "attn_sink + chunk or more");
    check(out.attn_sink % out.chunk == 0, where + ".attn_sink", text(out.attn_sink), "whole chunks");
    check(out.window % out.chunk == 0, where + ".window", text(out.window), "whole chunks");
    return out;
}

}  // namespace greedy::core
