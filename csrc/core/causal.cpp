// Self-Forcing, CausVid, LongLive, First-Frame Enhancement, Diagonal Distillation: one causal transformer.
// As engine/generators/causal.py.
#include <deque>

#include "base/error.h"
#include "core/families.h"

namespace greedy::core {
namespace {

constexpr PassKind kDit = {"dit", "dit", true, false, false};

class CausalGenerator : public Generator {
  public:
    explicit CausalGenerator(Stages& stages)
        : stages_(stages), preset_(stages.manifest().preset), cache_(stages.make_cache("dit")) {}

    Latent denoise(const Latent& x, double t) override {
        refresh();
        const Buffer flow = run(x, t, position_);
        staged_ = true;
        return stages_.download(flow, x.size());
    }

    void commit(std::shared_ptr<const Latent> x, bool supplied) override {
        refresh();
        // After a prompt switch the keys of the last denoising call are the old prompt's, or overwritten.
        const bool lost = preset_.commit == CommitPolicy::noisy && !staged_;
        // Supplied latents are clean, whatever noise level the preset pretends for its own chunks.
        if (supplied || lost || preset_.commit == CommitPolicy::clean)
            run(*x, supplied ? 0.0 : preset_.context_timestep, position_);
        if (supplied || preset_.commit != CommitPolicy::none) {
            cache_.commit(preset_.chunk);
            const auto chunks = [&](std::int64_t frames) { return static_cast<std::size_t>(frames / preset_.chunk); };
            const bool pin = sink_.size() < chunks(preset_.attn_sink);
            if (!pin && window_.size() == chunks(preset_.window - preset_.attn_sink)) window_.pop_front();
            (pin ? sink_ : window_).push_back({position_, std::move(x)});
        }
        staged_ = false;
        position_ += preset_.chunk;
        ++index_;
    }

    void set_text(TextKV text, bool recommit) override {
        text_ = std::move(text);
        if (!recommit) return;  // an earlier recommit that is still due stays due
        stale_ = index_ > 0;
        staged_ = false;
    }

  private:
    Buffer run(const Latent& x, double t, std::int64_t position) {
        return stages_.run({kDit, x, position, cache_.next_slot(), cache_.valid(preset_.chunk), t}, cache_, text_);
    }

    // After a prompt switch: one clean pass over the latents that are still cached, at their own positions.
    // `stale_` is cleared only after success, so that a failure retries.
    void refresh() {
        if (!stale_) return;
        cache_.reset();
        for (const std::deque<Finished>* chunks : {&sink_, &window_})
            for (const Finished& chunk : *chunks) {
                run(*chunk.latent, preset_.context_timestep, chunk.position);
                cache_.commit(preset_.chunk);
            }
        stale_ = false;
    }

    Stages& stages_;
    const Preset& preset_;
    Ring cache_;
    TextKV text_;
    std::deque<Finished> sink_, window_;  // the attention sink and the rest
    std::int64_t position_ = 0;
    bool stale_ = false;   // the cache was written for another prompt
    bool staged_ = false;  // the last denoising call's keys and values are in place for the next commit
};

void check(const Preset& preset, const std::string& where) {
    if (preset.window < preset.attn_sink + preset.chunk)
        fail(GREEDY_BAD_BUNDLE, where + ".window", std::to_string(preset.window), "attn_sink + chunk or more");
    const LocalHeads& heads = preset.heads;
    if (heads.layers.empty()) return;
    if (heads.window < heads.attn_sink + preset.chunk)
        fail(GREEDY_BAD_BUNDLE, where + ".heads.window", std::to_string(heads.window), "attn_sink + chunk or more");
    if (heads.attn_sink > preset.attn_sink)
        fail(GREEDY_BAD_BUNDLE, where + ".heads.attn_sink", std::to_string(heads.attn_sink), "at most attn_sink");
    // A window that is written again has the sink and the newest frames, and no others between them.
    if (std::min(heads.window, preset.window) > preset.window - preset.attn_sink + preset.chunk + heads.attn_sink)
        fail(GREEDY_BAD_BUNDLE, where + ".heads.window", std::to_string(heads.window),
             "window - attn_sink + chunk + its attn_sink or less");
}

Layout layout(const Preset& preset) {
    LocalHeads local = preset.heads;  // they keep no more frames than the others
    local.window = std::min(local.window, preset.window);
    return {{{"dit", preset.window, preset.attn_sink, std::move(local)}}, {kDit}};
}

std::unique_ptr<Generator> make(Stages& stages) { return std::make_unique<CausalGenerator>(stages); }

}  // namespace

extern const Family causal_family = {check, layout, make};

}  // namespace greedy::core
