// The two ways to make the next chunk, as engine/generators: ETM + SDD (Greedy Distill), or one causal transformer.
#pragma once

#include <cstdint>
#include <memory>

#include "runtime/stages.h"

namespace greedy::core {

// One stream's state between chunks. `denoise` only stages keys and values in slots that no finished chunk is read
// from; `commit` alone publishes. So a call that throws can be repeated and gives what it would have given.
class Generator {
  public:
    virtual ~Generator() = default;

    // Flow of a noisy chunk at timestep t; publishes nothing.
    virtual Latent denoise(const Latent& x, double t) = 0;
    // Publishes a finished chunk; `given` latents (a picture, a clip) were encoded, not denoised.
    virtual void commit(std::shared_ptr<const Latent> x, bool given) = 0;
    // Switches the prompt; `recommit` rewrites the window's keys and values under the new one.
    virtual void set_text(TextKV text, bool recommit) = 0;

    std::uint64_t index() const { return index_; }  // chunks committed

  protected:
    std::uint64_t index_ = 0;
};

// `stages` must outlive it; set_text comes before anything else.
std::unique_ptr<Generator> make_generator(Stages& stages);

}  // namespace greedy::core
