// greedy.h for C++: objects that close themselves; a negative status becomes an exception.
//
//     greedy::Bundle bundle("sprites.bundle");
//     greedy::Session session(bundle, 1);
//     session.set_prompt("a red circle moving right slowly on a gray background");
//     for (int i = 0; i < 240; ++i) show(session.next_frame());
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "greedy/greedy.h"

namespace greedy {

class StatusError : public std::runtime_error {
  public:
    StatusError(int status, const std::string& text) : std::runtime_error(text), status(status) {}
    const int status;  // a negative greedy_status
};

class Bundle {
  public:
    explicit Bundle(const std::string& path, const greedy_settings* settings = nullptr) {
        char error[1024] = "";
        const int status = greedy_bundle_open(&bundle_, path.c_str(), settings, error, sizeof error);
        if (status < 0) throw StatusError(status, error);
    }
    Bundle(Bundle&& other) noexcept : bundle_(std::exchange(other.bundle_, nullptr)) {}
    Bundle& operator=(Bundle&& other) noexcept {
        std::swap(bundle_, other.bundle_);
        return *this;
    }
    ~Bundle() { greedy_bundle_close(&bundle_); }

    greedy_info info() const {
        greedy_info info;
        greedy_bundle_info(bundle_, &info);
        return info;
    }
    greedy_bundle* get() const { return bundle_; }

  private:
    greedy_bundle* bundle_ = nullptr;
};

// A reference to a picture; copies share it.
class Frame {
  public:
    explicit Frame(greedy_frame* taken) : frame_(taken) {}
    Frame(const Frame& other) : frame_(greedy_frame_ref(other.frame_)) {}
    Frame(Frame&& other) noexcept : frame_(std::exchange(other.frame_, nullptr)) {}
    Frame& operator=(Frame other) noexcept {
        std::swap(frame_, other.frame_);
        return *this;
    }
    ~Frame() { greedy_frame_unref(&frame_); }

    const greedy_frame* operator->() const { return frame_; }
    const greedy_frame& operator*() const { return *frame_; }

  private:
    greedy_frame* frame_;
};

class Session {
  public:
    Session(const Bundle& bundle, std::uint64_t seed) {
        char error[1024] = "";
        const int status = greedy_open(&session_, bundle.get(), seed, error, sizeof error);
        if (status < 0) throw StatusError(status, error);
    }
    Session(Session&& other) noexcept : session_(std::exchange(other.session_, nullptr)) {}
    Session& operator=(Session&& other) noexcept {
        std::swap(session_, other.session_);
        return *this;
    }
    ~Session() { greedy_close(&session_); }

    using Texts = std::vector<std::pair<std::string, double>>;  // with their weights

    void set_prompt(const std::string& text, bool recommit = true, int transition = 0) {
        set_prompt(Texts{{text, 1}}, recommit, transition);
    }
    void set_prompt(const Texts& texts, bool recommit = true, int transition = 0) {
        std::vector<const char*> words;
        std::vector<double> weights;
        for (const auto& [text, weight] : texts) {
            // A C string ends at the first NUL, so the rest would be lost.
            if (text.find('\0') != std::string::npos)
                throw StatusError(GREEDY_INVALID, "prompt: got a NUL character, expected text");
            words.push_back(text.c_str());
            weights.push_back(weight);
        }
        check(greedy_set_prompt_blend(session_, words.data(), weights.data(), words.size(), transition, recommit));
    }
    void set_prompt_tokens(const std::int64_t* ids, std::size_t count, bool recommit = true) {
        check(greedy_set_prompt_tokens(session_, ids, count, recommit));
    }
    void set_prompt_embedding(const float* embedding, std::size_t rows, bool recommit = true, int transition = 0) {
        check(greedy_set_prompt_embedding_blend(session_, embedding, rows, transition, recommit));
    }
    // `seed` null and no rows of steps leave what they name.
    void change(const std::uint64_t* seed, const std::vector<std::vector<double>>& steps = {}) {
        std::vector<double> all;
        std::vector<std::size_t> sizes;
        for (const std::vector<double>& row : steps) {
            all.insert(all.end(), row.begin(), row.end());
            sizes.push_back(row.size());
        }
        const greedy_changes changes = {seed, all.data(), sizes.data(), sizes.size()};
        check(greedy_change(session_, &changes));
    }
    void push_frames(const std::uint8_t* rgb, std::size_t count) { check(greedy_push_frames(session_, rgb, count)); }
    void push_latent(const float* latent, std::size_t frames) { check(greedy_push_latent(session_, latent, frames)); }
    Frame next_frame() {
        greedy_frame* frame = nullptr;
        check(greedy_next_frame(session_, &frame));
        return Frame(frame);
    }
    void cancel() { greedy_cancel(session_); }
    void flush() { check(greedy_flush(session_)); }
    greedy_session* get() const { return session_; }

  private:
    void check(int status) const {
        if (status >= 0) return;
        char error[1024] = "";
        greedy_error(session_, error, sizeof error);
        throw StatusError(status, error);
    }

    greedy_session* session_ = nullptr;
};

}  // namespace greedy
