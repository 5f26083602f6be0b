// Every expression has the order of evaluation of torch in engine/sampling/schedule.py, and the compiler may not fuse
// operations in this file. So both give the same bits.
#include "core/schedule.h"

#include <algorithm>
#include <cmath>

#include "base/half.h"
#include "base/table.h"

namespace greedy::core {

Schedule::Schedule(const Preset& preset) {
    const float shift = static_cast<float>(preset.shift), rest = static_cast<float>(preset.shift - 1);
    const float spacing = -1.0f / static_cast<float>(kGrid);
    for (int i = 0; i < kGrid; ++i) {
        // torch.linspace: forward with a fused multiply-add (exact in double, rounded once), backward past the middle
        const float s = i <= kGrid / 2 - 1 ? static_cast<float>(1.0 + static_cast<double>(spacing) * i)
                                           : 0.0f - spacing * static_cast<float>(kGrid - i);
        sigmas_[i] = shift * s / (1.0f + rest * s);
        timesteps_[i] = sigmas_[i] * static_cast<float>(kGrid);
    }
    for (const std::vector<double>& listed : preset.steps) {
        const std::size_t count =
            preset.stop_after ? std::min<std::size_t>(listed.size(), preset.stop_after) : listed.size();
        std::vector<double> used;
        for (std::size_t i = 0; i < count; ++i)
            used.push_back(preset.warped ? timesteps_[kGrid - static_cast<int>(listed[i])]
                                         : static_cast<float>(listed[i]));
        chunks_.push_back(std::move(used));
    }
}

std::vector<Schedule::Step> Schedule::steps(std::uint64_t chunk) const {
    const std::vector<double>& ts = chunks_[std::min<std::uint64_t>(chunk, chunks_.size() - 1)];
    std::vector<Step> out;
    for (std::size_t i = 0; i < ts.size(); ++i)
        out.push_back({ts[i], i + 1 < ts.size() ? std::optional<double>(ts[i + 1]) : std::nullopt});
    return out;
}

double Schedule::sigma(std::optional<double> t) const {
    if (!t) return 0.0;
    const auto distance = [&](float level) { return std::abs(static_cast<double>(level) - *t); };
    const auto nearest = std::min_element(timesteps_.begin(), timesteps_.end(),
                                          [&](float a, float b) { return distance(a) < distance(b); });
    return sigmas_[nearest - timesteps_.begin()];
}

namespace {

class Renoise : public Solver {
  public:
    Renoise(const Schedule& schedule, DType dtype) : schedule_(schedule), dtype_(dtype) {}
    bool renoises() const override { return true; }

    void step(std::vector<float>& x, const float* flow, const Schedule::Step& at, const float* fresh) override {
        const double sigma = schedule_.sigma(at.t);
        const float level = static_cast<float>(schedule_.sigma(at.next)), kept = 1.0f - level;
        for (std::size_t i = 0; i < x.size(); ++i) {
            const float x0 = rounded(static_cast<float>(double{x[i]} - sigma * double{flow[i]}), dtype_);
            x[i] = at.next ? rounded(kept * x0 + level * fresh[i], dtype_) : x0;
        }
    }

  private:
    const Schedule& schedule_;
    const DType dtype_;
};

class Euler : public Solver {
  public:
    Euler(const Schedule& schedule, DType dtype) : schedule_(schedule), dtype_(dtype) {}

    void step(std::vector<float>& x, const float* flow, const Schedule::Step& at, const float*) override {
        const double delta = schedule_.sigma(at.next) - schedule_.sigma(at.t);
        for (std::size_t i = 0; i < x.size(); ++i)
            x[i] = rounded(static_cast<float>(double{x[i]} + delta * double{flow[i]}), dtype_);
    }

  private:
    const Schedule& schedule_;
    const DType dtype_;
};

// UniPC of order 2, B(h) = e^h - 1, in x0 prediction (Zhao et al., 2023), for flow matching.
class UniPC : public Solver {
  public:
    UniPC(const Schedule& schedule, DType dtype) : schedule_(schedule), dtype_(dtype) {}

    void step(std::vector<float>& x, const float* flow, const Schedule::Step& at, const float*) override {
        const std::size_t count = x.size();
        // At sigma = 1 the signal is zero and its logarithm infinite.
        const double sigma = std::min(schedule_.sigma(at.t), 1 - 1e-6);
        std::vector<double> x0(count), sample(x.begin(), x.end());
        for (std::size_t i = 0; i < count; ++i) x0[i] = double{x[i]} - sigma * double{flow[i]};
        if (known_ > 0) sample = update(last_, sigma, order_, &x0);
        older_ = std::move(newer_);
        newer_ = {std::move(x0), sigma};
        known_ = std::min(2, known_ + 1);
        last_ = std::move(sample);
        order_ = known_;
        const std::vector<double> result =
            at.next ? update(last_, schedule_.sigma(at.next), order_, nullptr) : newer_.x0;
        for (std::size_t i = 0; i < count; ++i) x[i] = rounded(static_cast<float>(result[i]), dtype_);
    }

  private:
    struct Prediction {
        std::vector<double> x0;
        double sigma = 0;
    };

    static double log_snr(double sigma) { return std::log1p(-sigma) - std::log(sigma); }

    // Predictor (newest null) or corrector from the last step's x to noise level sigma.
    std::vector<double> update(const std::vector<double>& x, double sigma, int order,
                               const std::vector<double>* newest) const {
        const double h = log_snr(newer_.sigma) - log_snr(sigma);  // negative step in log-SNR
        const double phi1 = std::expm1(h), kept = sigma / newer_.sigma, fresh = (1 - sigma) * phi1;
        const double ratio = order == 2 ? (log_snr(older_.sigma) - log_snr(newer_.sigma)) / -h : 1.0;
        std::array<double, 2> weights = {0.5, 0.5};
        if (newest && order == 2) {
            const double phi2 = phi1 / h - 1;
            weights = solve(ratio, phi2 / phi1, 2 * (phi2 / h - 0.5) / phi1);
        }
        std::vector<double> out(x.size());
        for (std::size_t i = 0; i < x.size(); ++i) {
            const double x0 = newer_.x0[i], base = kept * x[i] - fresh * x0;
            const double slope = order == 2 ? (older_.x0[i] - x0) / ratio : 0.0;
            double correction = 0.5 * slope;
            if (newest && order == 1) correction = 0.5 * ((*newest)[i] - x0);
            if (newest && order == 2) correction = weights[0] * slope + weights[1] * ((*newest)[i] - x0);
            out[i] = base - fresh * correction;
        }
        return out;
    }

    // [[1, 1], [ratio, 1]] w = (a, b), by elimination with the larger pivot, as LAPACK does.
    static std::array<double, 2> solve(double ratio, double a, double b) {
        if (std::abs(ratio) > 1) {
            const double factor = 1 / ratio, second = (a - factor * b) / (1 - factor * 1);
            return {(b - second) / ratio, second};
        }
        const double second = (b - ratio * a) / (1 - ratio * 1);
        return {a - second, second};
    }

    const Schedule& schedule_;
    const DType dtype_;
    Prediction newer_, older_;
    int known_ = 0;             // predictions in newer_ and older_
    int order_ = 0;             // of the last predictor
    std::vector<double> last_;  // sample that it started from
};

template <typename Kind>
std::unique_ptr<Solver> make(const Schedule& schedule, DType dtype) {
    return std::make_unique<Kind>(schedule, dtype);
}

const struct {
    const char* name;
    std::unique_ptr<Solver> (*make)(const Schedule& schedule, DType dtype);
} kSolvers[] = {
    {"renoise", make<Renoise>},
    {"euler", make<Euler>},
    {"unipc", make<UniPC>},
};

}  // namespace

std::unique_ptr<Solver> make_solver(const std::string& name, const Schedule& schedule, DType dtype) {
    return find_row(kSolvers, name, "solver").make(schedule, dtype);
}

void check_solver(const std::string& name, const std::string& where) { find_row(kSolvers, name, where); }

}  // namespace greedy::core
