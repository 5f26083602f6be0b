// Every expression has the order of evaluation of engine/runtime/blending.py, and the compiler may not fuse operations in
// this file. So both give the same bits.
#include "core/blending.h"

#include <cmath>

#include "base/half.h"

namespace greedy::core {

Embedding mean_of(const std::vector<Embedding>& parts, const std::vector<double>& weights, DType dtype) {
    double total = 0;
    for (const double weight : weights) total += weight;
    Embedding mean(parts[0].size());
    for (std::size_t part = 0; part < parts.size(); ++part) {
        const float share = static_cast<float>(weights[part] / total);
        for (std::size_t i = 0; i < mean.size(); ++i)
            mean[i] = part == 0 ? parts[part][i] * share : mean[i] + parts[part][i] * share;
    }
    for (float& value : mean) value = rounded(value, dtype);
    return mean;
}

// torch.lerp: it multiplies and adds in one rounding, from the nearer end.
Embedding between(const Embedding& start, const Embedding& target, double share, DType dtype) {
    const float weight = static_cast<float>(share);
    const bool near = weight < 0.5f;
    Embedding blend(start.size());
    for (std::size_t i = 0; i < blend.size(); ++i) {
        const float way = target[i] - start[i];
        blend[i] = rounded(std::fma(near ? weight : weight - 1.0f, way, near ? start[i] : target[i]), dtype);
    }
    return blend;
}

}  // namespace greedy::core
