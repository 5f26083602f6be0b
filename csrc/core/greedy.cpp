// Greedy Distill: the ETM reads each finished chunk once, the SDD denoises the next one (Eq. 2-5, Alg. 1).
// As engine/generators/greedy.py.
#include <algorithm>
#include <deque>

#include "base/error.h"
#include "core/families.h"

namespace greedy::core {
namespace {

constexpr PassKind kEtm = {"etm", "etm", false, false, true};
constexpr PassKind kSddContext = {"sdd_context", "sdd", false, false, true};
constexpr PassKind kSdd = {"sdd", "sdd", true, true, false};

class GreedyGenerator : public Generator {
  public:
    explicit GreedyGenerator(Stages& stages)
        : stages_(stages),
          preset_(stages.manifest().preset),
          etm_(stages.make_cache("etm")),
          sdd_(stages.make_cache("sdd")) {}

    Latent denoise(const Latent& x, double t) override {
        refresh();
        const std::int64_t position = std::min(position_, preset_.max_position);
        const std::int64_t slot = static_cast<std::int64_t>(std::min<std::uint64_t>(index_, 2)) * preset_.chunk;
        const Buffer* c_f = c_f_ ? &c_f_ : nullptr;
        const Buffer flow = stages_.run({kSdd, x, position, slot, slot + preset_.chunk, t, c_f}, sdd_, text_);
        return stages_.download(flow, x.size());
    }

    void commit(std::shared_ptr<const Latent> x, bool) override {
        refresh();
        Buffer c_f = temporal(*x, position_);
        context(*x, position_);
        etm_.commit(preset_.chunk);
        c_f_ = std::move(c_f);
        if (index_ == 0) first_ = x;
        if (recent_.size() == static_cast<std::size_t>(preset_.window / preset_.chunk)) recent_.pop_front();
        recent_.push_back({position_, std::move(x)});
        position_ += preset_.chunk;
        ++index_;
    }

    void set_text(TextKV text, bool recommit) override {
        text_ = std::move(text);
        if (recommit && index_ > 0) stale_ = true;  // an earlier recommit that is still due stays due
    }

  private:
    // c_f from a finished chunk: its own keys and those of the chunks before it in the window (Eq. 1, 2).
    Buffer temporal(const Latent& x, std::int64_t position) {
        return stages_.run({kEtm, x, position, etm_.next_slot(), etm_.valid(preset_.chunk)}, etm_, text_);
    }

    // Clean keys and values of a finished chunk for the SDD; chunk 0 sees itself, later ones also chunk 0.
    void context(const Latent& x, std::int64_t position) {
        const std::int64_t slot = position == 0 ? 0 : preset_.chunk;
        const std::int64_t at = std::min(position, preset_.max_position - preset_.chunk);
        stages_.run({kSddContext, x, at, slot, slot + preset_.chunk}, sdd_, text_);
    }

    // After a prompt switch: passes the ETM's window, chunk 0 and the last chunk again, under the new prompt.
    // `stale_` is cleared only after success, so that a failure retries.
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
    Ring etm_;  // the window, the current chunk included
    Ring sdd_;  // [chunk 0 | last | current], the current chunk right after those that exist
    TextKV text_;
    Buffer c_f_;  // temporal feature for the next chunk; none is zero
    std::shared_ptr<const Latent> first_;
    std::deque<Finished> recent_;  // the window's chunks
    std::int64_t position_ = 0;
    bool stale_ = false;  // the caches were written for another prompt
};

void check(const Preset& preset, const std::string& where) {
    if (preset.max_position < 2 * preset.chunk)
        fail(GREEDY_BAD_BUNDLE, where + ".max_position", std::to_string(preset.max_position), "two chunks or more");
    if (preset.commit != CommitPolicy::clean)
        fail(GREEDY_BAD_BUNDLE, where + ".commit", "another", "clean for the greedy family");
    if (!preset.heads.layers.empty())
        fail(GREEDY_BAD_BUNDLE, where + ".heads", "a table", "none for the greedy family");
}

Layout layout(const Preset& preset) {
    return {{{"etm", preset.window, 0, {}}, {"sdd", 3 * preset.chunk, 0, {}}}, {kEtm, kSddContext, kSdd}};
}

std::unique_ptr<Generator> make(Stages& stages) { return std::make_unique<GreedyGenerator>(stages); }

}  // namespace

extern const Family greedy_family = {check, layout, make};

}  // namespace greedy::core
