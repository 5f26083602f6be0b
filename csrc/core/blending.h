// Prompts that blend: the weighted mean of texts, and the way from one prompt to the next. As engine/runtime/blending.py,
// number for number.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "base/tensor.h"

namespace greedy::core {

constexpr int kMostTransition = 1 << 20;  // chunks

using Embedding = std::vector<float>;  // [text_rows, text_dim], values that the bundle's type holds

// The weighted mean of embeddings.
Embedding mean_of(const std::vector<Embedding>& parts, const std::vector<double>& weights, DType dtype);

// The embedding at a share (0 to 1) of the way from `start` to `target`.
Embedding between(const Embedding& start, const Embedding& target, double share, DType dtype);

// The token ids and the mask of a text, [text_rows], and its weight.
struct Words {
    std::vector<std::int64_t> ids, mask;
    double weight = 1;
};

// A prompt that was set. Some chunks later the stream has reached it.
struct Prompt {
    std::vector<Words> words;
    Embedding embedding;  // of the words, from the first time on that it is needed; or given without words
    bool recommit;        // for every chunk on the way
    int transition;       // chunks in which it is reached; 0 and 1: at once
    bool due = false;     // an earlier prompt, which no chunk took over, asked for a recommit
    std::uint64_t number = 0;
};

// Where a chunk stands between two prompts.
struct Course {
    std::shared_ptr<Prompt> to;
    std::shared_ptr<const Embedding> start;  // where the transition began; none once `to` is reached
    int step = 1;

    // Differs between any two embeddings of a stream.
    std::pair<std::uint64_t, int> key() const { return {to->number, start ? step : 0}; }
    // Whether the window is rewritten where the chunk's embedding is a new one.
    bool recommit() const { return to->recommit || (to->due && step == 1); }
};

}  // namespace greedy::core
