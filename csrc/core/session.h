// The loop: noise -> denoising steps -> VAE decode -> commit, chunk after chunk, as engine/stream.py.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "core/blending.h"
#include "core/families.h"
#include "core/schedule.h"
#include "runtime/bundle.h"

namespace greedy::core {

// The pictures of a chunk, RGB, one after another.
struct Pictures {
    std::vector<std::uint8_t> rgb;
    std::uint64_t chunk;
    std::uint64_t prompt;  // its number, from 0 in the order in which prompts were set
    std::uint32_t count;
};

// A preset must name a family and a solver that exist, and keep the family's limits. Throws Error(GREEDY_BAD_BUNDLE).
void check_preset(const Preset& preset, const std::string& where);

// A bundle whose preset is checked. Throws Error; see greedy_bundle_open.
std::shared_ptr<Bundle> open_bundle(const std::string& folder, const greedy_settings& settings);

class Session {
  public:
    Session(std::shared_ptr<Bundle> bundle, std::uint64_t seed);

    // The prompt from the next chunk on, reached in `transition` chunks; from any thread.
    struct Text {
        std::string text;
        double weight = 1;
    };
    void set_texts(const std::vector<Text>& texts, int transition, bool recommit);
    void set_tokens(const std::int64_t* ids, std::size_t count, bool recommit);
    void set_embedding(const float* embedding, std::size_t rows, int transition, bool recommit);
    // Seed and denoising steps from the next chunk on, all or none; null and no rows leave them. From any thread.
    void change(const std::uint64_t* seed, std::vector<std::vector<double>> steps);
    void cancel() { cancel_ = true; }
    void check_cancel() { stages_.check_cancel(); }

    void push_frames(const std::uint8_t* rgb, std::size_t count);
    void push_latent(const float* latent, std::size_t frames);  // [channels, frames, height, width]
    std::shared_ptr<const Pictures> next_chunk();
    void flush();

    const Manifest& manifest() const { return bundle_->manifest(); }

  private:
    Words words_of(const Text& text);
    void set_prompt(Prompt prompt);
    // Of a prompt, or of a chunk on the way to it; encodes a text the first time.
    const Embedding& embedding_of(Prompt& prompt);
    Embedding embedding_of(const Course& course);
    Course after(const Course& course, std::shared_ptr<Prompt> prompt);
    void apply_prompt();
    std::shared_ptr<const Latent> make();
    Latent noise(std::uint64_t chunk, std::uint64_t draw) const;
    // Latent frame `frame` of a chunk, [channels, 1, height, width].
    Latent frame_of(const Latent& chunk, std::int64_t frame) const;
    void check_unstarted() const;

    const std::shared_ptr<Bundle> bundle_;
    const Family& family_;
    std::atomic<bool> cancel_{false};
    Stages stages_;
    struct Settings {
        std::uint64_t seed;
        Schedule schedule;
    };
    std::shared_ptr<const Settings> using_;  // of the chunk that is being made
    std::unique_ptr<Generator> generator_;
    std::deque<std::shared_ptr<const Latent>> supplied_;  // chunks pushed and not shown yet
    std::shared_ptr<const Latent> uncommitted_;           // the chunk shown last
    bool uncommitted_supplied_ = false;
    Stages::VaeCache vae_cache_;
    std::uint64_t shown_ = 0;  // chunks
    bool recommit_due_ = false;  // a prompt of the chunk that is being made asked for it

    Course next_;       // of the chunk that is being made
    std::mutex mutex_;  // guards what follows
    std::shared_ptr<const Settings> settings_;  // of the next chunk
    std::shared_ptr<Prompt> prompt_;            // set last
    Course course_;              // of the chunk made last; before it, the prompt that was set first
    std::uint64_t prompts_ = 0;  // set so far
    std::optional<std::pair<std::uint64_t, int>> applied_;  // key of the generator's embedding
};

}  // namespace greedy::core
