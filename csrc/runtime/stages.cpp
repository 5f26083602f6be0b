#include "runtime/stages.h"

#include <algorithm>

#include "base/error.h"
#include "base/finite.h"
#include "base/half.h"
#include "runtime/rope.h"

namespace greedy::core {
namespace {

constexpr std::size_t kRopes = 4;  // tables kept; a chunk's steps and clamped positions use few

// [-1, 1] -> 0 to 255, to nearest even. The caller has checked that it is finite.
std::uint8_t pixel(float value) {
    constexpr float kRounder = 0x1.8p23f;  // adding and subtracting it rounds to an integer
    const float scaled = (value + 1.0f) * 127.5f, clamped = scaled > 0 ? std::min(scaled, 255.0f) : 0.0f;
    return static_cast<std::uint8_t>(clamped + kRounder - kRounder);
}

// Copies floats to device memory, in the type of a graph's input.
Buffer upload(const Device& device, const float* values, const TensorSpec& spec) {
    std::vector<char> bytes(spec.bytes());
    pack(values, static_cast<std::size_t>(spec.shape.count()), spec.dtype, bytes.data());
    Buffer buffer = device.allocate(bytes.size());
    device.upload(buffer.data(), bytes.data(), bytes.size());
    return buffer;
}

std::vector<float> floats(const Device& device, const Buffer& from, const TensorSpec& spec) {
    std::vector<char> bytes(spec.bytes());
    device.download(bytes.data(), from.data(), bytes.size());
    std::vector<float> values(static_cast<std::size_t>(spec.shape.count()));
    unpack(bytes.data(), values.size(), spec.dtype, values.data());
    return values;
}

}  // namespace

Stages::Stages(Bundle& bundle, Layout layout, std::atomic<bool>& cancel)
    : bundle_(bundle), device_(bundle.device()), layout_(std::move(layout)), cancel_(cancel), dtype_(DType::float32) {
    const char* first = layout_.passes.front().graph;
    for (const TensorSpec& spec : bundle.graph(first).inputs())
        if (spec.name == "latent") dtype_ = spec.dtype;
    bool conditioned = false;
    for (const PassKind& kind : layout_.passes) {
        transformers_.emplace(kind.graph, resolve(kind));
        conditioned |= kind.conditioned;
    }
    const TransformerConfig& config = manifest().transformer;
    latent_ = device_.allocate(frame_size() * manifest().preset.chunk * bytes_of(dtype_));
    t_ = device_.allocate(sizeof(float));
    std::size_t groups = 0;
    for (const RoleRing& ring : layout_.rings) groups = std::max(groups, ring.groups(config).size());
    for (std::size_t i = 0; i < groups; ++i) {
        start_rows_.push_back(device_.allocate(sizeof(std::int64_t)));
        valid_rows_.push_back(device_.allocate(sizeof(std::int64_t)));
    }
    if (conditioned)
        zero_ = device_.allocate(manifest().preset.chunk * manifest().tokens() * config.dim() * bytes_of(dtype_));
}

std::size_t Stages::frame_size() const {
    return static_cast<std::size_t>(manifest().transformer.in_channels * manifest().latent_height() *
                                    manifest().latent_width());
}

const RoleRing& Stages::ring(const std::string& role) const {
    for (const RoleRing& ring : layout_.rings)
        if (role == ring.role) return ring;
    fail(GREEDY_FAILED, "stages", "role " + role, "one of the family's");
}

// core/contract.cpp has compared names and shapes.
Stages::Transformer Stages::resolve(const PassKind& kind) const {
    struct Known {
        std::string name;
        Feed feed;
        std::size_t group;
    };
    std::vector<Known> single = {{"latent", Feed::latent, 0}, {"t", Feed::t, 0}, {"c_f", Feed::c_f, 0},
                                 {"rope_cos", Feed::cos, 0}, {"rope_sin", Feed::sin, 0}};
    std::vector<Known> layered = {{"text_k_", Feed::text_k, 0}, {"text_v_", Feed::text_v, 0}};
    const std::vector<HeadGroup> groups = ring(kind.role).groups(manifest().transformer);
    for (std::size_t i = 0; i < groups.size(); ++i) {
        const std::string& prefix = groups[i].prefix;
        single.push_back({prefix + manifest().names.start_row, Feed::start_row, i});
        single.push_back({prefix + manifest().names.valid_rows, Feed::valid_rows, i});
        layered.push_back({prefix + "k_", Feed::k, i});
        layered.push_back({prefix + "v_", Feed::v, i});
    }

    const Graph& graph = bundle_.graph(kind.graph);
    Transformer out{&graph, {}};
    for (const TensorSpec& spec : graph.inputs()) {
        if (spec.dtype == DType::float8)
            fail(GREEDY_BAD_BUNDLE, graph.name() + ": " + spec.name, "a cache in FP8", "one in " + std::string(name_of(dtype_)));
        const auto one =
            std::find_if(single.begin(), single.end(), [&](const Known& k) { return spec.name == k.name; });
        if (one != single.end()) {
            out.inputs.push_back({one->feed, 0, one->group});
            continue;
        }
        const std::size_t split = spec.name.rfind('_') + 1;
        const auto many = std::find_if(layered.begin(), layered.end(),
                                       [&](const Known& k) { return spec.name.substr(0, split) == k.name; });
        out.inputs.push_back({many->feed, std::stoll(spec.name.substr(split)), many->group});
    }
    return out;
}

void Stages::check_cancel() {
    if (cancel_.exchange(false)) throw Error(GREEDY_CANCELLED, "stream: cancelled");
}

std::vector<Buffer> Stages::call(const Graph& graph, const std::vector<void*>& inputs) {
    check_cancel();
    return graph.run(inputs);
}

const Stages::Rope& Stages::rope(std::int64_t position) {
    const auto found =
        std::find_if(ropes_.begin(), ropes_.end(), [&](const Rope& r) { return r.position == position; });
    if (found != ropes_.end()) {
        std::rotate(found, found + 1, ropes_.end());
        return ropes_.back();
    }
    const Manifest& m = manifest();
    const RopeTable table =
        rope_table(position, m.preset.chunk, m.tokens_high(), m.tokens_wide(), m.transformer.head_dim);
    const std::size_t bytes = table.cos.size() * sizeof(float);
    Rope made{position, device_.allocate(bytes), device_.allocate(bytes)};
    device_.upload(made.cos.data(), table.cos.data(), bytes);
    device_.upload(made.sin.data(), table.sin.data(), bytes);
    if (ropes_.size() == kRopes) ropes_.erase(ropes_.begin());
    ropes_.push_back(std::move(made));
    return ropes_.back();
}

Buffer Stages::run(const Pass& pass, const Ring& cache, const TextKV& text) {
    const Transformer& transformer = transformers_.at(pass.kind.graph);
    const TextKV::Sides& sides = text.roles.at(pass.kind.role);
    const Rope& table = rope(pass.position);
    const float t = static_cast<float>(pass.t);
    std::vector<char> latent(pass.latent.size() * bytes_of(dtype_));
    pack(pass.latent.data(), pass.latent.size(), dtype_, latent.data());
    device_.upload(latent_.data(), latent.data(), latent.size());
    device_.upload(t_.data(), &t, sizeof t);
    for (std::size_t group = 0; group < cache.groups(); ++group) {
        const bool local = group > 0;
        const std::int64_t tokens = manifest().tokens();
        const std::int64_t start = (local ? cache.next_slot(group) : pass.slot) * tokens;
        const std::int64_t valid = (local ? cache.valid(manifest().preset.chunk, group) : pass.valid) * tokens;
        device_.upload(start_rows_[group].data(), &start, sizeof start);
        device_.upload(valid_rows_[group].data(), &valid, sizeof valid);
    }
    std::vector<void*> inputs;
    inputs.reserve(transformer.inputs.size());
    for (std::size_t i = 0; i < transformer.inputs.size(); ++i) {
        const std::int64_t layer = transformer.inputs[i].layer;
        const std::size_t group = transformer.inputs[i].group;
        const std::size_t offset = static_cast<std::size_t>(layer) * transformer.graph->inputs()[i].bytes();
        switch (transformer.inputs[i].feed) {
            case Feed::latent:
                inputs.push_back(latent_.data());
                break;
            case Feed::t:
                inputs.push_back(t_.data());
                break;
            case Feed::c_f:
                inputs.push_back(pass.c_f ? pass.c_f->data() : zero_.data());
                break;
            case Feed::cos:
                inputs.push_back(table.cos.data());
                break;
            case Feed::sin:
                inputs.push_back(table.sin.data());
                break;
            case Feed::start_row:
                inputs.push_back(start_rows_[group].data());
                break;
            case Feed::valid_rows:
                inputs.push_back(valid_rows_[group].data());
                break;
            case Feed::text_k:
                inputs.push_back(sides.k.at(offset));
                break;
            case Feed::text_v:
                inputs.push_back(sides.v.at(offset));
                break;
            case Feed::k:
                inputs.push_back(cache.k(layer, group));
                break;
            case Feed::v:
                inputs.push_back(cache.v(layer, group));
                break;
        }
    }
    return std::move(call(*transformer.graph, inputs)[0]);
}

Latent Stages::download(const Buffer& from, std::size_t count) const {
    return floats(device_, from, {"", {static_cast<std::int64_t>(count)}, dtype_});
}

std::vector<float> Stages::encode_text(const std::vector<std::int64_t>& ids, const std::vector<std::int64_t>& mask) {
    const Graph& graph = bundle_.graph("encode_text");
    std::vector<Buffer> buffers;
    std::vector<void*> inputs;
    for (const TensorSpec& spec : graph.inputs()) {
        buffers.push_back(device_.allocate(spec.bytes()));
        device_.upload(buffers.back().data(), (spec.name == "ids" ? ids : mask).data(), spec.bytes());
        inputs.push_back(buffers.back().data());
    }
    const std::size_t index = graph.output_index("text_emb");
    const TensorSpec& spec = graph.outputs()[index];
    const std::vector<float> embedding = floats(device_, call(graph, inputs)[index], spec);
    need_finite(embedding, graph.name());
    return embedding;
}

TextKV Stages::prepare_text(const std::vector<float>& embedding) {
    TextKV out;
    for (const RoleRing& ring : layout_.rings) {
        const Graph& graph = bundle_.graph(std::string("prepare_text_") + ring.role);
        const TensorSpec& input = graph.inputs()[0];
        const std::size_t k = graph.output_index("text_k"), v = graph.output_index("text_v");
        const Buffer uploaded = upload(device_, embedding.data(), input);
        std::vector<Buffer> results = call(graph, {uploaded.data()});
        out.roles.emplace(ring.role, TextKV::Sides{std::move(results[k]), std::move(results[v])});
    }
    return out;
}

// Inputs: a latent or frames, then cache_0, ...; outputs: the result, then the caches of the next call. It takes no
// cancel: pictures that are pushed leave it to the next frame.
Stages::VaeCache Stages::call_vae(const Graph& graph, const Buffer& input, const VaeCache& cache, Buffer& result) {
    std::vector<void*> inputs = {input.data()};
    for (const Buffer& held : cache) inputs.push_back(held.data());
    std::vector<Buffer> outputs = graph.run(inputs);
    result = std::move(outputs[0]);
    VaeCache next;
    for (std::size_t i = 1; i < outputs.size(); ++i) next.push_back(std::move(outputs[i]));
    return next;
}

Stages::VaeCache Stages::decode(const Latent& latent, const VaeCache& cache, std::vector<std::uint8_t>& rgb) {
    const Manifest& m = manifest();
    const Graph& graph = bundle_.graph(cache.empty() ? "vae_first" : "vae_steady");
    const std::int64_t frames = cache.empty() ? 1 : m.temporal;
    const TensorSpec& in = graph.inputs().at(0);
    const TensorSpec& out = graph.outputs().at(0);
    check_cancel();
    Buffer shown;
    VaeCache next = call_vae(graph, upload(device_, latent.data(), in), cache, shown);
    const std::vector<float> values = floats(device_, shown, out);
    need_finite(values, graph.name());
    const std::size_t area = static_cast<std::size_t>(m.height * m.width), plane = area * frames, begin = rgb.size();
    rgb.resize(begin + 3 * plane);
    std::uint8_t* to = rgb.data() + begin;
    for (std::size_t i = 0; i < plane; ++i)
        for (std::size_t channel = 0; channel < 3; ++channel) *to++ = pixel(values[channel * plane + i]);
    return next;
}

Stages::VaeCache Stages::encode(const std::uint8_t* rgb, const VaeCache& cache, Latent& latent) {
    const Manifest& m = manifest();
    const Graph& graph = bundle_.graph(cache.empty() ? "vae_encode_first" : "vae_encode_steady");
    const std::int64_t frames = cache.empty() ? 1 : m.temporal;
    const TensorSpec& in = graph.inputs().at(0);
    const TensorSpec& out = graph.outputs().at(0);
    const std::size_t plane = static_cast<std::size_t>(frames * m.height * m.width);
    std::vector<float> values(3 * plane);
    for (std::size_t i = 0; i < plane; ++i)
        for (std::size_t channel = 0; channel < 3; ++channel)
            values[channel * plane + i] = static_cast<float>(rgb[3 * i + channel]) / 127.5f - 1.0f;
    Buffer made;
    VaeCache next = call_vae(graph, upload(device_, values.data(), in), cache, made);
    const std::vector<float> encoded = floats(device_, made, out);
    need_finite(encoded, graph.name());
    for (float value : encoded) latent.push_back(rounded(value, dtype_));
    return next;
}

void Stages::need_finite(const std::vector<float>& values, const std::string& where) const {
    const std::string got = not_finite(values.data(), values.size(), DType::float32);
    if (got.empty()) return;
    fail(GREEDY_NOT_FINITE, where, got + " though all weights are finite", "finite numbers");
}

Ring Stages::make_cache(const std::string& role) const {
    const TransformerConfig& config = manifest().transformer;
    const std::int64_t bytes = manifest().tokens() * config.head_dim * static_cast<std::int64_t>(bytes_of(dtype_));
    return Ring(device_, ring(role).groups(config), bytes);
}

std::vector<HeadGroup> RoleRing::groups(const TransformerConfig& config) const {
    const auto layers = static_cast<std::size_t>(config.layers);
    std::vector<HeadGroup> out = {{"", std::vector<std::int64_t>(layers, config.heads), slots, attn_sink}};
    HeadGroup few = {"local_", std::vector<std::int64_t>(layers, 0), local.window, local.attn_sink};
    bool any = false;
    for (std::size_t layer = 0; layer < local.layers.size(); ++layer) {
        few.heads[layer] = static_cast<std::int64_t>(local.layers[layer].size());
        out[0].heads[layer] -= few.heads[layer];
        any |= few.heads[layer] > 0;
    }
    if (any) out.push_back(std::move(few));
    return out;
}

}  // namespace greedy::core
