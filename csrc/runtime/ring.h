// Preallocated keys and values of a stream, as engine/model/cache.py; a slot is a latent frame.
#pragma once

#include "runtime/device.h"

namespace greedy::core {

// Valid slots are always a prefix: the attention sink fills first and stays, then writing goes round the rest. Graphs
// write the slots that the next commit publishes. A chunk never runs past the last slot, because windows and attention
// sinks are whole chunks.
class Ring {
  public:
    struct Sizes {
        std::int64_t layers, slots, attn_sink, slot_bytes;  // slot_bytes: one layer's keys (or values) of one frame
    };

    Ring(const Device& device, const Sizes& sizes)
        : sizes_(sizes), k_(device.allocate(bytes())), v_(device.allocate(bytes())) {}

    void reset() { committed_ = 0; }
    void commit(std::int64_t frames) { committed_ += frames; }

    // Slot that the next frame goes to.
    std::int64_t next_slot() const {
        const std::int64_t sink = sizes_.attn_sink;
        return committed_ < sizes_.slots ? committed_ : sink + (committed_ - sink) % (sizes_.slots - sink);
    }
    // Valid slots once `frames` more frames are written.
    std::int64_t valid(std::int64_t frames) const { return std::min(committed_ + frames, sizes_.slots); }

    // One layer's rows, [1, slots * tokens, dim].
    void* k(std::int64_t layer) const { return k_.at(at(layer, 0)); }
    void* v(std::int64_t layer) const { return v_.at(at(layer, 0)); }

  private:
    std::size_t at(std::int64_t layer, std::int64_t slot) const {
        return static_cast<std::size_t>((layer * sizes_.slots + slot) * sizes_.slot_bytes);
    }
    std::size_t bytes() const { return at(sizes_.layers, 0); }

    const Sizes sizes_;
    Buffer k_, v_;
    std::int64_t committed_ = 0;  // latent frames published since the last reset
};

}  // namespace greedy::core
