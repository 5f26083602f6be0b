#include "core/session.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "base/finite.h"
#include "base/half.h"
#include "core/contract.h"
#include "core/noise.h"
#include "text/cleaning.h"

namespace greedy::core {

void check_preset(const Preset& preset, const std::string& where) {
    find_family(preset.family, where + ".family").check(preset, where);
    check_solver(preset.solver, where + ".solver");
}

std::shared_ptr<Bundle> open_bundle(const std::string& folder, const greedy_settings& settings) {
    Manifest manifest = read_manifest(folder);
    const std::string path = manifest_path(folder);
    check_preset(manifest.preset, path + ".preset");
    manifest.preset.heads.fit(manifest.transformer, path + ".preset.heads.layers");
    check_graphs(manifest, find_family(manifest.preset.family, path).layout(manifest.preset), path);
    return std::make_shared<Bundle>(folder, std::move(manifest), settings);
}

Session::Session(std::shared_ptr<Bundle> bundle, std::uint64_t seed)
    : bundle_(std::move(bundle)),
      family_(find_family(manifest().preset.family, "family")),
      stages_(*bundle_, family_.layout(manifest().preset), cancel_),
      generator_(family_.make(stages_)),
      settings_(std::make_shared<const Settings>(Settings{seed, Schedule(manifest().preset)})) {}

void Session::change(const std::uint64_t* seed, std::vector<std::vector<double>> steps) {
    if (!seed && steps.empty()) fail(GREEDY_INVALID, "change", "nothing", "seed or steps");
    std::optional<Schedule> schedule;
    if (!steps.empty()) {
        Preset preset = manifest().preset;
        check_steps(steps, "steps", preset.warped, GREEDY_INVALID);
        preset.steps = std::move(steps);
        schedule.emplace(preset);
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    const Settings& now = *settings_;
    settings_ = std::make_shared<const Settings>(Settings{seed ? *seed : now.seed, schedule ? *schedule : now.schedule});
}

void Session::set_prompt(Prompt prompt) {
    if (prompt.transition < 0 || prompt.transition > kMostTransition)
        fail(GREEDY_INVALID, "transition", std::to_string(prompt.transition),
             "0 to " + std::to_string(kMostTransition) + " chunks");
    const auto made = std::make_shared<Prompt>(std::move(prompt));  // before anything changes: there may be no memory
    const std::lock_guard<std::mutex> lock(mutex_);
    if (prompt_) {
        const bool taken = applied_ && applied_->first >= prompt_->number;
        made->due = !taken && (prompt_->recommit || prompt_->due);  // it stays due
    } else {
        course_.to = made;
    }
    made->number = prompts_++;
    prompt_ = made;
}

Words Session::words_of(const Text& text) {
    const std::string cleaned = clean_prompt(text.text);
    if (is_blank(cleaned)) fail(GREEDY_INVALID, "prompt", "a text that shows nothing", "words");
    Words words;
    words.weight = text.weight;
    const std::size_t tokens = bundle_->tokenizer().encode(cleaned, words.ids, words.mask);
    if (tokens > words.ids.size())
        bundle_->log(GREEDY_LOG_INFO, "note: the prompt has " + std::to_string(tokens) + " tokens, the model reads " +
                                          std::to_string(words.ids.size()) + ": the rest is ignored");
    return words;
}

void Session::set_texts(const std::vector<Text>& texts, int transition, bool recommit) {
    if (texts.empty()) fail(GREEDY_INVALID, "prompt", "0 texts", "at least one");
    Prompt prompt{{}, {}, recommit, transition};
    double total = 0;
    for (const Text& text : texts) {
        total += text.weight;
        if (!(text.weight > 0) || !std::isfinite(total))
            fail(GREEDY_INVALID, "prompt", "weight " + std::to_string(text.weight), "weights above 0, and a finite sum");
        prompt.words.push_back(words_of(text));
    }
    set_prompt(std::move(prompt));
}

void Session::set_tokens(const std::int64_t* ids, std::size_t count, bool recommit) {
    const std::size_t rows = static_cast<std::size_t>(manifest().text_rows);
    if (count == 0 || count > rows)
        fail(GREEDY_INVALID, "prompt", std::to_string(count) + " tokens", "1 to " + std::to_string(rows));
    const std::int64_t vocabulary = bundle_->vocabulary();
    for (std::size_t i = 0; i < count; ++i)  // a graph may abort at a token outside
        if (ids[i] < 0 || ids[i] >= vocabulary)
            fail(GREEDY_INVALID, "prompt", "token " + std::to_string(ids[i]), "0 to " + std::to_string(vocabulary - 1));
    Words words{{ids, ids + count}, std::vector<std::int64_t>(count, 1)};
    words.ids.resize(rows, 0);  // any token: it is masked
    words.mask.resize(rows, 0);
    set_prompt({{std::move(words)}, {}, recommit, 0});
}

void Session::set_embedding(const float* embedding, std::size_t rows, int transition, bool recommit) {
    if (rows != static_cast<std::size_t>(manifest().text_rows))
        fail(GREEDY_INVALID, "prompt", "an embedding of " + std::to_string(rows) + " rows",
             std::to_string(manifest().text_rows));
    const std::size_t count = rows * static_cast<std::size_t>(manifest().transformer.text_dim);
    need_finite(embedding, count, "prompt");
    Embedding values(embedding, embedding + count);
    for (float& value : values) value = rounded(value, stages_.dtype());
    set_prompt({{}, std::move(values), recommit, transition});
}

const Embedding& Session::embedding_of(Prompt& prompt) {
    if (!prompt.embedding.empty()) return prompt.embedding;
    std::vector<Embedding> parts;
    std::vector<double> weights;
    for (const Words& words : prompt.words) {
        parts.push_back(stages_.encode_text(words.ids, words.mask));
        weights.push_back(words.weight);
    }
    prompt.embedding = parts.size() == 1 ? std::move(parts[0]) : mean_of(parts, weights, stages_.dtype());
    return prompt.embedding;
}

Embedding Session::embedding_of(const Course& course) {
    const Embedding& target = embedding_of(*course.to);
    if (!course.start) return target;
    return between(*course.start, target, double(course.step) / course.to->transition, stages_.dtype());
}

// The course of the next chunk, where `prompt` was set last.
Course Session::after(const Course& course, std::shared_ptr<Prompt> prompt) {
    if (prompt != course.to) {
        const bool blends = prompt->transition > 1;
        return {std::move(prompt), blends ? std::make_shared<const Embedding>(embedding_of(course)) : nullptr};
    }
    if (!course.start) return course;
    const bool last = course.step + 1 >= prompt->transition;
    return {std::move(prompt), last ? nullptr : course.start, course.step + 1};
}

// Makes the next chunk's prompt act. Repeating it changes nothing, unless a newer one was set meanwhile.
void Session::apply_prompt() {
    std::unique_lock<std::mutex> lock(mutex_);
    if (!prompt_) fail(GREEDY_INVALID, "prompt", "none", "one set before the first frame");
    const Course now = course_;
    const std::shared_ptr<Prompt> prompt = prompt_;
    lock.unlock();
    next_ = after(now, prompt);
    if (applied_ == next_.key()) return;
    TextKV text_kv = stages_.prepare_text(embedding_of(next_));
    // A call that failed after its prompt was applied leaves its recommit due.
    generator_->set_text(std::move(text_kv), next_.recommit() || recommit_due_);
    recommit_due_ |= next_.recommit();
    lock.lock();
    applied_ = next_.key();
}

void Session::check_unstarted() const {
    if (shown_ > 0) fail(GREEDY_INVALID, "push", "a stream that has started", "one before its first frame");
}

void Session::push_frames(const std::uint8_t* rgb, std::size_t count) {
    check_unstarted();
    if (count == 0) fail(GREEDY_INVALID, "push", "no frames", "at least one");
    bundle_->check_unchanged();
    const Manifest& m = manifest();
    const std::size_t temporal = static_cast<std::size_t>(m.temporal), chunk = static_cast<std::size_t>(m.preset.chunk);
    const std::size_t size = static_cast<std::size_t>(3 * m.height * m.width);
    // As many latents as fill whole chunks. A longer clip loses its beginning; a shorter one repeats its last frame.
    const std::size_t latents = std::max<std::size_t>((1 + (count - 1) / temporal) / chunk, 1) * chunk;
    const std::size_t frames = 1 + temporal * (latents - 1);
    const std::size_t skipped = count > frames ? count - frames : 0;
    std::vector<std::uint8_t> clip(rgb + skipped * size, rgb + count * size);
    clip.reserve(frames * size);
    for (std::size_t held = count; held < frames; ++held) clip.insert(clip.end(), clip.end() - size, clip.end());
    Latent by_frame;  // [frames, channels, height, width]
    Stages::VaeCache cache;
    for (std::size_t i = 0; i < latents; ++i)
        cache = stages_.encode(clip.data() + (i == 0 ? 0 : 1 + temporal * (i - 1)) * size, cache, by_frame);
    const std::size_t channels = static_cast<std::size_t>(m.transformer.in_channels);
    const std::size_t area = stages_.frame_size() / channels;
    Latent latent(by_frame.size());
    for (std::size_t f = 0; f < latents; ++f)
        for (std::size_t c = 0; c < channels; ++c)
            std::copy_n(by_frame.begin() + (f * channels + c) * area, area, latent.begin() + (c * latents + f) * area);
    push_latent(latent.data(), latents);
}

void Session::push_latent(const float* latent, std::size_t frames) {
    check_unstarted();
    const std::size_t chunk = static_cast<std::size_t>(manifest().preset.chunk);
    if (frames == 0 || frames % chunk)
        fail(GREEDY_INVALID, "push", std::to_string(frames) + " latent frames",
             "a multiple of " + std::to_string(chunk));
    need_finite(latent, frames * stages_.frame_size(), "push");
    const std::size_t channels = static_cast<std::size_t>(manifest().transformer.in_channels);
    const std::size_t area = stages_.frame_size() / channels;
    std::deque<std::shared_ptr<const Latent>> parts;
    for (std::size_t first = 0; first < frames; first += chunk) {
        Latent part;
        part.reserve(chunk * stages_.frame_size());
        for (std::size_t c = 0; c < channels; ++c)
            for (std::size_t i = 0; i < chunk * area; ++i)
                part.push_back(rounded(latent[(c * frames + first) * area + i], stages_.dtype()));
        parts.push_back(std::make_shared<const Latent>(std::move(part)));
    }
    supplied_ = std::move(parts);
}

Latent Session::noise(std::uint64_t chunk, std::uint64_t draw) const {
    Latent values(stages_.frame_size() * manifest().preset.chunk);
    philox_normal(using_->seed, chunk, draw, values.data(), values.size());
    for (float& value : values) value = rounded(value, stages_.dtype());
    return values;
}

Latent Session::frame_of(const Latent& chunk, std::int64_t frame) const {
    const std::size_t frames = static_cast<std::size_t>(manifest().preset.chunk);
    const std::size_t channels = static_cast<std::size_t>(manifest().transformer.in_channels);
    const std::size_t area = stages_.frame_size() / channels;
    Latent out;
    out.reserve(stages_.frame_size());
    for (std::size_t c = 0; c < channels; ++c) {
        const auto begin = chunk.begin() + (c * frames + frame) * area;
        out.insert(out.end(), begin, begin + area);
    }
    return out;
}

// Makes one chunk; publishes the chunk before it, and nothing of its own.
std::shared_ptr<const Latent> Session::make() {
    bundle_->check_unchanged();  // ahead of everything that reads the weights
    bundle_->check_weights();
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        using_ = settings_;
    }
    apply_prompt();
    // Commits lazily, so that cache passes do not delay the frames of the chunk before.
    if (uncommitted_) {
        generator_->commit(uncommitted_, uncommitted_supplied_);
        uncommitted_ = nullptr;
    }
    if (!supplied_.empty()) return supplied_.front();
    const std::uint64_t index = generator_->index();
    const std::unique_ptr<Solver> solver = make_solver(manifest().preset.solver, using_->schedule, stages_.dtype());
    auto x = std::make_shared<Latent>(noise(index, 0));
    std::uint64_t draw = 0;
    std::size_t number = 0;
    for (const Schedule::Step& step : using_->schedule.steps(index)) {
        const Latent flow = generator_->denoise(*x, step.t);
        stages_.need_finite(flow, "chunk " + std::to_string(index) + ", step " + std::to_string(++number) + " (t = " +
                                      std::to_string(std::lround(step.t)) + ")");
        const Latent fresh = solver->renoises() && step.next ? noise(index, ++draw) : Latent();
        solver->step(*x, flow.data(), step, fresh.data());
    }
    return x;
}

std::shared_ptr<const Pictures> Session::next_chunk() {
    std::shared_ptr<const Latent> x = make();
    auto pictures = std::make_shared<Pictures>();
    Stages::VaeCache cache;
    const Stages::VaeCache* past = &vae_cache_;
    for (std::int64_t frame = 0; frame < manifest().preset.chunk; ++frame) {
        cache = stages_.decode(frame_of(*x, frame), *past, pictures->rgb);
        past = &cache;
    }
    pictures->chunk = shown_++;
    pictures->prompt = next_.to->number;
    pictures->count = static_cast<std::uint32_t>(pictures->rgb.size() / (3 * manifest().height * manifest().width));
    recommit_due_ = false;
    vae_cache_ = std::move(cache);
    uncommitted_ = std::move(x);
    uncommitted_supplied_ = !supplied_.empty();
    if (!supplied_.empty()) supplied_.pop_front();
    const std::lock_guard<std::mutex> lock(mutex_);
    course_ = std::move(next_);
    return pictures;
}

void Session::flush() {
    std::unique_ptr<Generator> fresh = family_.make(stages_);
    const std::lock_guard<std::mutex> lock(mutex_);
    // Nothing fails from here on.
    generator_ = std::move(fresh);
    applied_ = std::nullopt;
    course_ = {prompt_, nullptr};  // the prompt that was set last acts at once
    recommit_due_ = false;
    supplied_.clear();
    uncommitted_ = nullptr;
    vae_cache_.clear();
    shown_ = 0;
    cancel_ = false;
}

}  // namespace greedy::core
