#include "core/generator.h"

#include <algorithm>
#include <deque>

namespace greedy::core {
namespace {

// A finished chunk that the window still holds.
struct Finished {
    std::int64_t position;
    std::shared_ptr<const Latent> latent;
};

class GreedyGenerator : public Generator {
  public:
    explicit GreedyGenerator(Stages& stages)
        : stages_(stages),
          preset_(stages.manifest().preset),
          etm_(stages.make_ring((preset_.window + 1) * preset_.chunk, 0)),
          sdd_(stages.make_ring(3 * preset_.chunk, 0)) {}

    Latent denoise(const Latent& x, double t) override {
        refresh();
        const std::int64_t position = std::min(position_, preset_.max_position);
        const std::int64_t valid = static_cast<std::int64_t>(1 + std::min<std::uint64_t>(index_, 2)) * preset_.chunk;
        const Buffer* c_f = c_f_ ? &c_f_ : nullptr;
        const Buffer flow = stages_.transform({"sdd", "sdd", x, t, c_f, position, 0, valid}, sdd_, text_);
        return stages_.download(flow, x.size());
    }

    void commit(std::shared_ptr<const Latent> x, bool) override {
        refresh();
        Buffer c_f = temporal(*x, position_);
        context(*x, position_);
        etm_.commit(preset_.chunk);
        c_f_ = std::move(c_f);
        if (index_ == 0) first_ = x;
        if (recent_.size() == static_cast<std::size_t>(preset_.window) + 1) recent_.pop_front();
        recent_.push_back({position_, std::move(x)});
        position_ += preset_.chunk;
        ++index_;
    }

    void set_text(TextKV text, bool recommit) override {
        text_ = std::move(text);
        if (recommit && index_ > 0) stale_ = true;  // one that is still due stays due
    }

  private:
    // c_f of a finished chunk, from the keys of the w chunks before it and its own (Eq. 1, 2).
    Buffer temporal(const Latent& x, std::int64_t position) {
        return stages_.transform({"etm", "etm", x, 0.0, nullptr, position, etm_.next_slot(), etm_.valid(preset_.chunk)},
                                 etm_, text_);
    }

    // Clean keys and values of a finished chunk for the SDD; chunk 0 sees itself, later ones also chunk 0. The pass
    // runs in the current chunk's slot and is copied to its place when it is whole.
    void context(const Latent& x, std::int64_t position) {
        const std::int64_t slots = (position == 0 ? 1 : 2) * preset_.chunk;
        const std::int64_t at = std::min(position, preset_.max_position - preset_.chunk);
        stages_.transform({"sdd_context", "sdd", x, 0.0, nullptr, at, 0, slots}, sdd_, text_);
        sdd_.copy(0, slots, preset_.chunk);
    }

    // After a prompt switch: the ETM's window, chunk 0 and the last chunk again, under the new prompt. `stale_` falls
    // last, so a failure on the way only means that the next call starts over.
    void refresh() {
        if (!stale_) return;
        etm_.reset();
        for (const Finished& chunk : recent_) {
            c_f_ = temporal(*chunk.latent, chunk.position);
            etm_.commit(preset_.chunk);
        }
        context(*first_, 0);
        if (recent_.back().position) context(*recent_.back().latent, recent_.back().position);
        stale_ = false;
    }

    Stages& stages_;
    const Preset& preset_;
    Ring etm_, sdd_;
    TextKV text_;
    Buffer c_f_;
    std::shared_ptr<const Latent> first_;
    std::deque<Finished> recent_;  // window + 1 of them
    std::int64_t position_ = 0;
    bool stale_ = false;
};

// Self-Forcing, CausVid, LongLive, First-Frame Enhancement, Diagonal Distillation.
class CausalGenerator : public Generator {
  public:
    explicit CausalGenerator(Stages& stages)
        : stages_(stages),
          preset_(stages.manifest().preset),
          ring_(stages.make_ring(preset_.window, preset_.attn_sink)) {}

    Latent denoise(const Latent& x, double t) override {
        refresh();
        const Buffer flow = run(x, t, position_);
        staged_ = true;
        return stages_.download(flow, x.size());
    }

    void commit(std::shared_ptr<const Latent> x, bool given) override {
        refresh();
        // After a prompt switch the keys of the last denoising call are the old prompt's, or overwritten.
        const bool lost = preset_.commit == CommitPolicy::noisy && !staged_;
        // What was given is clean whatever noise level the preset pretends for its own chunks.
        if (given || lost || preset_.commit == CommitPolicy::clean)
            run(*x, given ? 0.0 : preset_.context_timestep, position_);
        if (given || preset_.commit != CommitPolicy::none) {
            ring_.commit(preset_.chunk);
            const auto chunks = [&](std::int64_t frames) { return static_cast<std::size_t>(frames / preset_.chunk); };
            const bool pin = pinned_.size() < chunks(preset_.attn_sink);
            if (!pin && window_.size() == chunks(preset_.window - preset_.attn_sink)) window_.pop_front();
            (pin ? pinned_ : window_).push_back({position_, std::move(x)});
        }
        staged_ = false;
        position_ += preset_.chunk;
        ++index_;
    }

    void set_text(TextKV text, bool recommit) override {
        text_ = std::move(text);
        if (!recommit) return;  // one that is still due stays due
        stale_ = index_ > 0;
        staged_ = false;
    }

  private:
    Buffer run(const Latent& x, double t, std::int64_t position) {
        return stages_.transform({"dit", "dit", x, t, nullptr, position, ring_.next_slot(), ring_.valid(preset_.chunk)},
                                 ring_, text_);
    }

    // After a prompt switch: one clean pass over the latents still cached, at their own positions.
    void refresh() {
        if (!stale_) return;
        ring_.reset();
        for (const std::deque<Finished>* chunks : {&pinned_, &window_})
            for (const Finished& chunk : *chunks) {
                run(*chunk.latent, preset_.context_timestep, chunk.position);
                ring_.commit(preset_.chunk);
            }
        stale_ = false;
    }

    Stages& stages_;
    const Preset& preset_;
    Ring ring_;
    TextKV text_;
    std::deque<Finished> pinned_, window_;  // still cached
    std::int64_t position_ = 0;
    bool stale_ = false;
    bool staged_ = false;  // the last denoising call's keys and values are in place for the next commit
};

}  // namespace

std::unique_ptr<Generator> make_generator(Stages& stages) {
    if (stages.manifest().preset.family == Family::greedy) return std::make_unique<GreedyGenerator>(stages);
    return std::make_unique<CausalGenerator>(stages);
}

}  // namespace greedy::core
