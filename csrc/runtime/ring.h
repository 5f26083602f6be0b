// Preallocated keys and values of a stream, as engine/model/cache.py; a slot is a latent frame.
#pragma once

#include <string>
#include <vector>

#include "runtime/device.h"

namespace greedy::core {

// Heads whose keys and values lie in one cache of so many slots; the first `attn_sink` are never evicted.
struct HeadGroup {
    std::string prefix;               // of its tensors in a graph: k_0, local_k_0, local_start_row, ...
    std::vector<std::int64_t> heads;  // how many of every layer
    std::int64_t slots, attn_sink;
};

// Valid slots are always a prefix: the attention sink fills first and stays, then writing goes round the rest. Graphs
// write the slots that the next commit publishes. A chunk never runs past the last slot, because windows and attention
// sinks are whole chunks.
class Ring {
  public:
    // slot_bytes: the keys (or values) of one head of one frame.
    Ring(const Device& device, const std::vector<HeadGroup>& groups, std::int64_t slot_bytes) {
        for (const HeadGroup& group : groups) {
            std::vector<std::size_t> begins = {0};
            for (const std::int64_t heads : group.heads)
                begins.push_back(begins.back() + static_cast<std::size_t>(heads * group.slots * slot_bytes));
            const std::size_t bytes = begins.back();
            parts_.push_back({group.slots, group.attn_sink, std::move(begins), device.allocate(bytes),
                              device.allocate(bytes)});
        }
    }

    std::size_t groups() const { return parts_.size(); }
    void reset() { committed_ = 0; }
    void commit(std::int64_t frames) { committed_ += frames; }

    // Slot that the next frame goes to.
    std::int64_t next_slot(std::size_t group = 0) const {
        const Part& part = parts_[group];
        if (committed_ < part.slots) return committed_;
        return part.attn_sink + (committed_ - part.attn_sink) % (part.slots - part.attn_sink);
    }
    // Valid slots once `frames` more frames are written.
    std::int64_t valid(std::int64_t frames, std::size_t group = 0) const {
        return std::min(committed_ + frames, parts_[group].slots);
    }

    // One layer's rows, [1, slots * tokens, heads * head_dim].
    void* k(std::int64_t layer, std::size_t group = 0) const { return at(parts_[group].k, layer, group); }
    void* v(std::int64_t layer, std::size_t group = 0) const { return at(parts_[group].v, layer, group); }

  private:
    struct Part {
        std::int64_t slots, attn_sink;
        std::vector<std::size_t> begins;  // of every layer, in bytes
        Buffer k, v;
    };

    void* at(const Buffer& side, std::int64_t layer, std::size_t group) const {
        return side.at(parts_[group].begins[static_cast<std::size_t>(layer)]);
    }

    std::vector<Part> parts_;
    std::int64_t committed_ = 0;  // latent frames published since the last reset
};

}  // namespace greedy::core
