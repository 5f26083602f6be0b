// Noise schedules and solvers, number for number those of engine/sampling/schedule.py.
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/tensor.h"
#include "formats/config.h"

namespace greedy::core {

// The flow-matching grid: sigma = shift s / (1 + (shift - 1) s), t = 1000 sigma, s from 1 to 1/1000, in float.
class Schedule {
  public:
    static constexpr int kGrid = 1000;  // training timesteps

    explicit Schedule(const Preset& preset);

    struct Step {
        double t;
        std::optional<double> next;  // none at the end of the chunk
    };
    // Denoising steps of a chunk.
    std::vector<Step> steps(std::uint64_t chunk) const;

    // Noise level at t: that of the nearest grid point. Without t it is the end of the chunk, exactly 0.
    double sigma(std::optional<double> t) const;

    const std::array<float, kGrid>& sigmas() const { return sigmas_; }
    const std::array<float, kGrid>& timesteps() const { return timesteps_; }

  private:
    std::array<float, kGrid> sigmas_, timesteps_;
    std::vector<std::vector<double>> chunks_;
};

// One chunk's integration from noise to a clean latent. Every step rounds its values to the bundle's type.
class Solver {
  public:
    virtual ~Solver() = default;
    // Moves x from t to next, in place. `flow` and `fresh` have as many values; `fresh` is null unless renoises().
    virtual void step(std::vector<float>& x, const float* flow, const Schedule::Step& at, const float* fresh) = 0;
    // Whether every step but the last needs fresh noise.
    virtual bool renoises() const { return false; }
};

// A new solver for one chunk; the schedule must outlive it. To add one, write its class and a row in schedule.cpp.
std::unique_ptr<Solver> make_solver(const std::string& name, const Schedule& schedule, DType dtype);

// Throws Error(GREEDY_BAD_BUNDLE) where there is no such solver.
void check_solver(const std::string& name, const std::string& where);

}  // namespace greedy::core
