#include "runtime/rope.h"

#include <cmath>

namespace greedy::core {
namespace {

constexpr double kTheta = 10000.0;

// cos and sin of the pairs in a part of `dim` values, for `count` positions: [count, dim / 2].
RopeTable part(std::int64_t first, std::int64_t count, std::int64_t dim) {
    RopeTable out;
    for (std::int64_t position = first; position < first + count; ++position)
        for (std::int64_t i = 0; i < dim; i += 2) {
            const double exponent = -static_cast<double>(i) / static_cast<double>(dim);
            const double angle = static_cast<double>(position) * std::pow(kTheta, exponent);
            out.cos.push_back(static_cast<float>(std::cos(angle)));
            out.sin.push_back(static_cast<float>(std::sin(angle)));
        }
    return out;
}

}  // namespace

RopeTable rope_table(std::int64_t position, std::int64_t frames, std::int64_t high, std::int64_t wide,
                     std::int64_t head_dim) {
    const std::int64_t spatial = 2 * (head_dim / 6), temporal = head_dim - 2 * spatial;
    const RopeTable time = part(position, frames, temporal), rows = part(0, high, spatial),
                    columns = part(0, wide, spatial);
    const auto join = [&](std::vector<float> RopeTable::*side) {
        std::vector<float> out;
        out.reserve(static_cast<std::size_t>(frames * high * wide * head_dim / 2));
        const auto append = [&](const RopeTable& from, std::int64_t index, std::int64_t pairs) {
            const auto begin = (from.*side).begin() + index * pairs;
            out.insert(out.end(), begin, begin + pairs);
        };
        for (std::int64_t f = 0; f < frames; ++f)
            for (std::int64_t y = 0; y < high; ++y)
                for (std::int64_t x = 0; x < wide; ++x) {
                    append(time, f, temporal / 2);
                    append(rows, y, spatial / 2);
                    append(columns, x, spatial / 2);
                }
        return out;
    };
    return {join(&RopeTable::cos), join(&RopeTable::sin)};
}

}  // namespace greedy::core
