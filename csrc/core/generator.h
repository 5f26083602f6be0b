// What makes the next chunk of a stream, as engine/generators. families.h lists the kinds.
#pragma once

#include <cstdint>
#include <memory>

#include "runtime/stages.h"

namespace greedy::core {

// One stream's state between chunks. `denoise` writes keys and values only to slots that no finished chunk is read
// from, and only `commit` publishes them. So a call that throws can be repeated, with the same result.
class Generator {
  public:
    virtual ~Generator() = default;

    // Flow of a noisy chunk at timestep t; publishes nothing.
    virtual Latent denoise(const Latent& x, double t) = 0;
    // Publishes a finished chunk. `supplied` latents (a picture, a clip) were encoded, not denoised.
    virtual void commit(std::shared_ptr<const Latent> x, bool supplied) = 0;
    // Switches the prompt; `recommit` rewrites the window's keys and values under the new one.
    virtual void set_text(TextKV text, bool recommit) = 0;

    std::uint64_t index() const { return index_; }  // chunks committed

  protected:
    // A finished chunk whose keys and values are still cached.
    struct Finished {
        std::int64_t position;
        std::shared_ptr<const Latent> latent;
    };

    std::uint64_t index_ = 0;
};

}  // namespace greedy::core
