// A plugin whose graphs are short formulas instead of compiled code. tests/support/fake_stages.py has the same
// formulas, so tests can compare the inputs and caches of both. It is built as libgreedy_aoti.so in a directory of its
// own.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "greedy/plugin.h"

namespace {

std::atomic<long> runs_left{-1};  // until a graph fails; negative: none fails
std::atomic<long> finite_left{-1};  // until a graph's result has a NaN; negative: none has

struct Spec {
    std::vector<int64_t> shape;
    int32_t dtype = 0;
    std::string name;

    size_t count() const {
        size_t product = 1;
        for (int64_t size : shape) product *= static_cast<size_t>(size);
        return product;
    }
};

struct Graph {
    std::string name;
    std::vector<Spec> inputs, outputs;
};

// The inputs and outputs of one run by name.
struct Call {
    std::map<std::string, std::pair<const Spec*, float*>> values;

    const Spec& spec(const std::string& name) const { return *values.at(name).first; }
    float* at(const std::string& name) const { return values.at(name).second; }
    int64_t index(const std::string& name) const {
        int64_t value;
        std::memcpy(&value, at(name), sizeof value);
        return value;
    }
    bool has(const std::string& name) const { return values.count(name) > 0; }
};

double mean(const float* values, size_t count) {
    double sum = 0;
    for (size_t i = 0; i < count; ++i) sum += values[i];
    return sum / static_cast<double>(count);
}

void encode_text(const Call& call) {
    const auto* ids = reinterpret_cast<const int64_t*>(call.at("ids"));
    const auto* mask = reinterpret_cast<const int64_t*>(call.at("mask"));
    const int64_t rows = call.spec("text_emb").shape[1], dim = call.spec("text_emb").shape[2];
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t d = 0; d < dim; ++d)
            call.at("text_emb")[r * dim + d] = mask[r] ? static_cast<float>((ids[r] * 31 + d * 7) % 97) / 97 - 0.5f : 0;
}

void prepare_text(const Call& call) {
    const Spec& out = call.spec("text_k");  // [layers, 1, rows, heads, head_dim]
    const int64_t rows = out.shape[2], dim = call.spec("text_emb").shape[2], width = out.shape[3] * out.shape[4];
    for (int64_t l = 0; l < out.shape[0]; ++l)
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t i = 0; i < width; ++i) {
                call.at("text_k")[(l * rows + r) * width + i] = call.at("text_emb")[r * dim + (l + i) % dim];
                call.at("text_v")[(l * rows + r) * width + i] = call.at("text_emb")[r * dim + (2 * l + 3 * i) % dim];
            }
}

void transform(const Call& call) {
    const Spec& latent = call.spec("latent");  // [1, C, F, h, w]; a token is one latent pixel
    const int64_t channels = latent.shape[1], tokens = latent.shape[2] * latent.shape[3] * latent.shape[4];
    const Spec& text = call.spec("text_k_0");  // [1, rows, heads, head_dim]
    const int64_t dim = text.shape[2] * text.shape[3], pairs = call.spec("rope_cos").shape[1];
    const bool old = call.has("write_idx");  // version 1 of a manifest
    std::vector<double> level(static_cast<size_t>(tokens)), seen(static_cast<size_t>(dim));
    for (int64_t n = 0; n < tokens; ++n)
        for (int64_t c = 0; c < channels; ++c)
            level[static_cast<size_t>(n)] += call.at("latent")[c * tokens + n] / static_cast<double>(channels);
    for (int64_t l = 0; call.has("text_k_" + std::to_string(l)); ++l) {
        const std::string layer = std::to_string(l);
        const double text_k = mean(call.at("text_k_" + layer), call.spec("text_k_" + layer).count());
        const double text_v = mean(call.at("text_v_" + layer), call.spec("text_v_" + layer).count());
        int64_t begin = 0;
        for (const std::string prefix : {"", "local_"}) {  // groups of heads, each with its rows
            if (!call.has(prefix + "k_" + layer)) continue;
            const int64_t first = call.index(prefix + (old ? "write_idx" : "start_row"));
            const int64_t length = call.index(prefix + (old ? "kv_len" : "valid_rows"));
            const int64_t width = call.spec(prefix + "k_" + layer).shape[2];
            float *k = call.at(prefix + "k_" + layer), *v = call.at(prefix + "v_" + layer);
            for (int64_t n = 0; n < tokens; ++n)
                for (int64_t own = 0; own < width; ++own) {
                    const int64_t d = begin + own, at = (first + n) * width + own, pair = n * pairs + d % pairs;
                    double key = 0.5 * level[static_cast<size_t>(n)] + 0.25 * call.at("rope_cos")[pair] + 4 * text_k;
                    double value = 0.25 * level[static_cast<size_t>(n)] + 0.25 * call.at("rope_sin")[pair] + 4 * text_v;
                    if (call.has("c_f")) value += 0.1 * call.at("c_f")[n * dim + d];
                    if (call.has("t")) value += 1e-4 * call.at("t")[0];
                    k[at] = static_cast<float>(key + 0.01 * static_cast<double>(l));
                    v[at] = static_cast<float>(value);
                }
            for (int64_t row = 0; row < length; ++row)
                for (int64_t own = 0; own < width; ++own)
                    seen[static_cast<size_t>(begin + own)] +=
                        (k[row * width + own] + v[row * width + own]) / static_cast<double>(length);
            begin += width;
        }
    }
    if (call.has("hidden"))
        for (int64_t n = 0; n < tokens; ++n)
            for (int64_t d = 0; d < dim; ++d)
                call.at("hidden")[n * dim + d] =
                    static_cast<float>(0.5 * level[static_cast<size_t>(n)] + 0.5 * seen[static_cast<size_t>(d)]);
    else
        for (int64_t c = 0; c < channels; ++c)
            for (int64_t n = 0; n < tokens; ++n)
                call.at("flow")[c * tokens + n] = static_cast<float>(0.7 * call.at("latent")[c * tokens + n] +
                                                                     0.3 * seen[static_cast<size_t>(c % dim)]);
}

void decode(const Call& call) {
    const Spec &latent = call.spec("latent"), &out = call.spec("frames");
    const int64_t frames = out.shape[2], height = out.shape[3], width = out.shape[4];
    const int64_t high = latent.shape[3], wide = latent.shape[4], scale = height / high;
    const bool steady = call.has("cache_0");
    for (int64_t c = 0; c < 3; ++c)
        for (int64_t t = 0; t < frames; ++t)
            for (int64_t y = 0; y < height; ++y)
                for (int64_t x = 0; x < width; ++x) {
                    const int64_t at = ((c % latent.shape[1]) * high + y / scale) * wide + x / scale;
                    const double share = steady ? static_cast<double>(t + 1) / static_cast<double>(frames) : 1;
                    const double before = steady ? call.at("cache_0")[at] : 0;
                    call.at("frames")[((c * frames + t) * height + y) * width + x] =
                        static_cast<float>(0.3 * (share * call.at("latent")[at] + (1 - share) * before));
                }
    std::copy_n(call.at("latent"), latent.count(), call.at("cache_0_out"));
}

void encode(const Call& call) {
    const Spec &in = call.spec("frames"), &out = call.spec("latent");
    const int64_t frames = in.shape[2], height = in.shape[3], width = in.shape[4];
    const int64_t high = out.shape[3], wide = out.shape[4], scale = height / high;
    for (int64_t c = 0; c < out.shape[1]; ++c)
        for (int64_t y = 0; y < high; ++y)
            for (int64_t x = 0; x < wide; ++x) {
                double sum = 0;
                for (int64_t t = 0; t < frames; ++t)
                    sum += call.at("frames")[((c % 3 * frames + t) * height + y * scale) * width + x * scale];
                const int64_t at = (c * high + y) * wide + x;
                const double before = call.has("cache_0") ? 0.5 * call.at("cache_0")[at] : 0;
                call.at("latent")[at] = static_cast<float>(2 * sum / static_cast<double>(frames) + before);
            }
    std::copy_n(call.at("latent"), out.count(), call.at("cache_0_out"));
}

size_t bytes_of(const Spec& spec) { return spec.count() * (spec.dtype == GREEDY_INT64 ? 8 : 4); }

int open_device(const greedy_device_settings*, void** device, char*, size_t) {
    *device = new int(0);
    return GREEDY_OK;
}
void close_device(void* device) { delete static_cast<int*>(device); }

int load(void*, const greedy_graph_spec* spec, void** graph, char*, size_t) {
    auto* made = new Graph{spec->name, {}, {}};
    for (size_t i = 0; i < spec->input_count; ++i)
        made->inputs.push_back({{spec->inputs[i].shape, spec->inputs[i].shape + spec->inputs[i].rank},
                                spec->inputs[i].dtype,
                                spec->inputs[i].name});
    for (size_t i = 0; i < spec->output_count; ++i)
        made->outputs.push_back({{spec->outputs[i].shape, spec->outputs[i].shape + spec->outputs[i].rank},
                                 spec->outputs[i].dtype,
                                 spec->outputs[i].name});
    *graph = made;
    return GREEDY_OK;
}
void unload(void*, void* graph) { delete static_cast<Graph*>(graph); }

int allocate(void*, size_t bytes, greedy_buffer* buffer, char*, size_t) {
    buffer->data = buffer->owner = std::calloc(std::max<size_t>(bytes, 1), 1);
    return buffer->data ? GREEDY_OK : GREEDY_NO_MEMORY;
}
void release(void*, greedy_buffer buffer) { std::free(buffer.owner); }

int copy(void*, void* to, const void* from, size_t bytes, char*, size_t) {
    std::memcpy(to, from, bytes);
    return GREEDY_OK;
}

int run(void* device, void* graph, void* const* inputs, greedy_buffer* outputs, char* error, size_t size) {
    if (runs_left >= 0 && runs_left-- == 0) {
        std::snprintf(error, size, "got a failure that the test asked for, expected it");
        return GREEDY_FAILED;
    }
    const Graph& made = *static_cast<const Graph*>(graph);
    Call call;
    for (size_t i = 0; i < made.inputs.size(); ++i)
        call.values[made.inputs[i].name] = {&made.inputs[i], static_cast<float*>(inputs[i])};
    for (size_t i = 0; i < made.outputs.size(); ++i) {
        allocate(device, bytes_of(made.outputs[i]), &outputs[i], error, size);
        call.values[made.outputs[i].name] = {&made.outputs[i], static_cast<float*>(outputs[i].data)};
    }
    if (made.name == "encode_text")
        encode_text(call);
    else if (made.name.rfind("prepare_text", 0) == 0)
        prepare_text(call);
    else if (made.name.rfind("vae_encode", 0) == 0)
        encode(call);
    else if (made.name.rfind("vae", 0) == 0)
        decode(call);
    else
        transform(call);
    if (finite_left >= 0 && finite_left-- == 0) static_cast<float*>(outputs[0].data)[0] = std::nanf("");
    return GREEDY_OK;
}

const greedy_plugin kPlugin = {
    GREEDY_PLUGIN_VERSION, "aoti", open_device, close_device, load, unload, allocate, release, copy, copy, run};

}  // namespace

const greedy_plugin* greedy_plugin_get(void) { return &kPlugin; }

// One graph fails after `runs` others; negative: none fails.
extern "C" GREEDY_API void fake_fail_after(long runs) { runs_left = runs; }
// The same for a result with a NaN.
extern "C" GREEDY_API void fake_nan_after(long runs) { finite_left = runs; }
