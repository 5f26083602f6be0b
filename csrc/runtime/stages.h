// The stage functions of a bundle for one session, as engine/bundles/stages.py: what a graph gets and gives back.
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

// A prompt's cross-attention keys and values, by role (etm and sdd, or dit): [layers, 1, rows, heads, head_dim].
struct TextKV {
    struct Sides {
        Buffer k, v;
    };
    std::map<std::string, Sides> roles;
};

class Stages {
  public:
    // `cancel` is looked at, and taken back, before every graph.
    Stages(Bundle& bundle, std::atomic<bool>& cancel);

    // A pass of a transformer over one chunk.
    struct Pass {
        const char* graph;  // etm, sdd_context, sdd or dit
        const char* role;   // whose text: etm, sdd or dit
        const Latent& latent;
        double t;           // where the graph has that input
        const Buffer* c_f;  // the same; null is zero
        std::int64_t position, slot, valid;
    };
    // Its first output: hidden or flow. Keys and values go to the ring.
    Buffer transform(const Pass& pass, const Ring& ring, const TextKV& text);
    // That, as floats; `count` values of the stream's type.
    Latent download(const Buffer& from, std::size_t count) const;

    // ids and mask [text_rows] -> embedding [text_rows, text_dim]
    std::vector<float> encode_text(const std::vector<std::int64_t>& ids, const std::vector<std::int64_t>& mask);
    TextKV prepare_text(const std::vector<float>& embedding);

    // Caches of a video so far; empty before the first frame.
    struct Cached {
        Buffer buffer;
        TensorSpec spec;
    };
    using VaeCache = std::vector<Cached>;
    // One latent frame [channels, 1, height, width] -> 1 (cache empty) or `temporal` frames, RGB, appended to `rgb`.
    VaeCache decode(const Latent& latent, const VaeCache& cache, std::vector<std::uint8_t>& rgb);
    // 1 (cache empty) or `temporal` frames, RGB -> a latent frame, appended to `latent` as [1, channels, height,
    // width].
    VaeCache encode(const std::uint8_t* rgb, const VaeCache& cache, Latent& latent);

    // Throws Error(GREEDY_CANCELLED) once for a cancel.
    void check_cancel();

    Ring make_ring(std::int64_t slots, std::int64_t pinned) const;
    DType dtype() const { return dtype_; }
    const Manifest& manifest() const { return bundle_.manifest(); }
    std::size_t frame_size() const;  // values of a latent frame

  private:
    // What an input of a transformer's graph is fed with, found out once.
    enum class Feed { latent, t, c_f, cos, sin, write_idx, kv_len, text_k, text_v, k, v };
    struct Slot {
        Feed feed;
        std::int64_t layer;
    };
    struct Transformer {
        const Graph* graph;
        std::vector<Slot> slots;
    };
    struct Rope {
        std::int64_t position;
        Buffer cos, sin;
    };

    Transformer resolve(const std::string& name) const;
    const Rope& rope(std::int64_t position);
    std::vector<Buffer> run(const Graph& graph, const std::vector<void*>& inputs);
    VaeCache run_vae(const Graph& graph, const char* what, const Buffer& given, const VaeCache& cache, Buffer& result);

    Bundle& bundle_;
    const Device& device_;
    std::atomic<bool>& cancel_;
    DType dtype_;
    std::map<std::string, Transformer> transformers_;
    Buffer latent_, t_, write_idx_, kv_len_, zero_;  // on the device, refilled before every pass
    std::vector<Rope> ropes_;                        // the newest last
};

}  // namespace greedy::core
