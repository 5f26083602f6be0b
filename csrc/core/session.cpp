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
    check_graphs(manifest, find_family(manifest.preset.family, path).layout(manifest.preset), path);
    return std::make_shared<Bundle>(folder, std::move(manifest), settings);
}

Session::Session(std::shared_ptr<Bundle> bundle, std::uint64_t seed)
    : bundle_(std::move(bundle)),
      seed_(seed),
      family_(find_family(manifest().preset.family, "family")),
      stages_(*bundle_, family_.layout(manifest().preset), cancel_),
      schedule_(manifest().preset),
      generator_(family_.make(stages_)) {}

void Session::set_prompt(Prompt prompt, bool recommit) {
    Prompt copy = prompt;  // before anything changes: there may be no memory
    const std::lock_guard<std::mutex> lock(mutex_);
    prompt_ = std::move(copy);
    const bool due = pending_ && pending_->recommit;  // an earlier recommit that is still due stays due
    pending_ = Request{std::move(prompt), recommit || due, prompts_++};
}

void Session::set_text(const std::string& text, bool recommit) {
    const std::string cleaned = clean_prompt(text);
    if (is_blank(cleaned)) fail(GREEDY_INVALID, "prompt", "a text that shows nothing", "words");
    Prompt prompt;
    const std::size_t tokens = bundle_->tokenizer().encode(cleaned, prompt.ids, prompt.mask);
    if (tokens > prompt.ids.size())
        bundle_->log(GREEDY_LOG_INFO, "note: the prompt has " + std::to_string(tokens) + " tokens, the model reads " +
                                          std::to_string(prompt.ids.size()) + ": the rest is ignored");
    set_prompt(std::move(prompt), recommit);
}

void Session::set_tokens(const std::int64_t* ids, std::size_t count, bool recommit) {
    const std::size_t rows = static_cast<std::size_t>(manifest().text_rows);
    if (count == 0 || count > rows)
        fail(GREEDY_INVALID, "prompt", std::to_string(count) + " tokens", "1 to " + std::to_string(rows));
    const std::int64_t vocabulary = bundle_->vocabulary();
    for (std::size_t i = 0; i < count; ++i)  // a graph may abort at a token outside
        if (ids[i] < 0 || ids[i] >= vocabulary)
            fail(GREEDY_INVALID, "prompt", "token " + std::to_string(ids[i]), "0 to " + std::to_string(vocabulary - 1));
    Prompt prompt{{ids, ids + count}, std::vector<std::int64_t>(count, 1), {}};
    prompt.ids.resize(rows, 0);  // any token: it is masked
    prompt.mask.resize(rows, 0);
    set_prompt(std::move(prompt), recommit);
}

// A prompt that fails to encode stays pending, unless a newer one was set meanwhile.
void Session::apply_prompt() {
    std::optional<Request> request;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!prompt_) fail(GREEDY_INVALID, "prompt", "none", "one set before the first frame");
        request.swap(pending_);
    }
    if (!request) return;
    try {
        const Prompt& prompt = request->prompt;
        const std::vector<float> embedding =
            prompt.ids.empty() ? prompt.embedding : stages_.encode_text(prompt.ids, prompt.mask);
        TextKV text_kv = stages_.prepare_text(embedding);
        // A call that failed after its prompt was applied leaves its recommit due.
        generator_->set_text(std::move(text_kv), request->recommit || recommit_due_);
        recommit_due_ |= request->recommit;
        applied_ = request->number;
    } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!pending_)
            pending_ = std::move(request);
        else
            pending_->recommit |= request->recommit;
        throw;
    }
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
    philox_normal(seed_, chunk, draw, values.data(), values.size());
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
    apply_prompt();
    // Commits lazily, so that cache passes do not delay the frames of the chunk before.
    if (uncommitted_) {
        generator_->commit(uncommitted_, uncommitted_supplied_);
        uncommitted_ = nullptr;
    }
    if (!supplied_.empty()) return supplied_.front();
    const std::uint64_t index = generator_->index();
    const std::unique_ptr<Solver> solver = make_solver(manifest().preset.solver, schedule_, stages_.dtype());
    auto x = std::make_shared<Latent>(noise(index, 0));
    std::uint64_t draw = 0;
    std::size_t number = 0;
    for (const Schedule::Step& step : schedule_.steps(index)) {
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
    pictures->prompt = applied_;
    pictures->count = static_cast<std::uint32_t>(pictures->rgb.size() / (3 * manifest().height * manifest().width));
    recommit_due_ = false;
    vae_cache_ = std::move(cache);
    uncommitted_ = std::move(x);
    uncommitted_supplied_ = !supplied_.empty();
    if (!supplied_.empty()) supplied_.pop_front();
    return pictures;
}

void Session::flush() {
    std::unique_ptr<Generator> fresh = family_.make(stages_);
    const std::lock_guard<std::mutex> lock(mutex_);
    std::optional<Request> again;
    if (prompt_) again = Request{*prompt_, true, prompts_ - 1};
    // Nothing fails from here on.
    generator_ = std::move(fresh);
    pending_ = std::move(again);
    recommit_due_ = false;
    supplied_.clear();
    uncommitted_ = nullptr;
    vae_cache_.clear();
    shown_ = 0;
    cancel_ = false;
}

}  // namespace greedy::core
