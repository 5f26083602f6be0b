// The functions that a bundle's graphs compute, for one session, as engine/bundles/stages.py.
#pragma once

#include <atomic>
#include <map>
#include <string>
#include <vector>

#include "runtime/bundle.h"
#include "runtime/ring.h"

namespace greedy::core {

// Values of a latent chunk on the host, [channels, frames, height, width], exactly representable in the bundle's type.
using Latent = std::vector<float>;

// A transformer's kind of pass; each kind is one graph of a bundle.
struct PassKind {
    const char* graph;  // etm, sdd_context, sdd or dit
    const char* role;   // whose prompt and cache it uses: etm, sdd or dit
    bool timed;         // the timestep t is an input
    bool conditioned;   // the ETM's feature c_f is an input
    bool hidden;        // the result is the last hidden state; else it is the flow
};

// One run of a transformer over one chunk. slot and valid are those of all heads but the local ones.
struct Pass {
    const PassKind& kind;
    const Latent& latent;
    std::int64_t position, slot, valid;
    double t = 0;                 // for a graph with that input
    const Buffer* c_f = nullptr;  // where the kind is conditioned; null is zero
};

// Size of one role's cache, in slots (latent frames); the first `attn_sink` are never evicted. Local heads have a cache
// of their own.
struct RoleRing {
    const char* role;
    std::int64_t slots, attn_sink;
    LocalHeads local;

    // The groups of heads that have caches: all but the local heads, then these.
    std::vector<HeadGroup> groups(const TransformerConfig& config) const;
};

// What a family of generators runs.
struct Layout {
    std::vector<RoleRing> rings;
    std::vector<PassKind> passes;
};

// A prompt's cross-attention keys and values by role, [layers, 1, rows, heads, head_dim].
struct TextKV {
    struct Sides {
        Buffer k, v;
    };
    std::map<std::string, Sides> roles;
};

class Stages {
  public:
    // Every call but `encode` checks and clears `cancel` before it runs a graph.
    Stages(Bundle& bundle, Layout layout, std::atomic<bool>& cancel);

    // Writes the pass's keys and values to the cache; returns its result.
    Buffer run(const Pass& pass, const Ring& cache, const TextKV& text);
    // `count` values of the stream's type as floats.
    Latent download(const Buffer& from, std::size_t count) const;

    // ids and mask [text_rows] -> embedding [text_rows, text_dim]
    std::vector<float> encode_text(const std::vector<std::int64_t>& ids, const std::vector<std::int64_t>& mask);
    TextKV prepare_text(const std::vector<float>& embedding);

    // Caches of a video so far; empty before the first frame.
    using VaeCache = std::vector<Buffer>;
    // One latent frame [channels, 1, height, width] -> 1 (cache empty) or `temporal` frames, RGB, appended to `rgb`.
    VaeCache decode(const Latent& latent, const VaeCache& cache, std::vector<std::uint8_t>& rgb);
    // 1 (cache empty) or `temporal` frames, RGB -> a latent frame, appended to `latent` as [1, channels, height,
    // width].
    VaeCache encode(const std::uint8_t* rgb, const VaeCache& cache, Latent& latent);

    // Throws Error(GREEDY_CANCELLED) once for a cancel.
    void check_cancel();

    // Throws Error(GREEDY_NOT_FINITE) for `where` unless the values are finite.
    void need_finite(const std::vector<float>& values, const std::string& where) const;

    Ring make_cache(const std::string& role) const;
    DType dtype() const { return dtype_; }
    const Manifest& manifest() const { return bundle_.manifest(); }
    std::size_t frame_size() const;  // values of a latent frame

  private:
    // What an input of a transformer's graph is fed with, decided once.
    enum class Feed { latent, t, c_f, cos, sin, start_row, valid_rows, text_k, text_v, k, v };
    struct Input {
        Feed feed;
        std::int64_t layer;
        std::size_t group;  // of heads
    };
    struct Transformer {
        const Graph* graph;
        std::vector<Input> inputs;
    };
    struct Rope {
        std::int64_t position;
        Buffer cos, sin;
    };

    const RoleRing& ring(const std::string& role) const;
    Transformer resolve(const PassKind& kind) const;
    const Rope& rope(std::int64_t position);
    std::vector<Buffer> call(const Graph& graph, const std::vector<void*>& inputs);
    VaeCache call_vae(const Graph& graph, const Buffer& input, const VaeCache& cache, Buffer& result);

    Bundle& bundle_;
    const Device& device_;
    const Layout layout_;
    std::atomic<bool>& cancel_;
    DType dtype_;
    std::map<std::string, Transformer> transformers_;
    Buffer latent_, t_;                           // on the device, refilled before every pass
    std::vector<Buffer> start_rows_, valid_rows_;  // the same, of every group of heads
    Buffer zero_;                                 // c_f of chunk 0
    std::vector<Rope> ropes_;                     // the newest last
};

}  // namespace greedy::core
