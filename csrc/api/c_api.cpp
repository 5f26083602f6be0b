// greedy/greedy.h: the C boundary. Every function turns any exception into a status.
#include <cstring>
#include <new>

#include "base/error.h"
#include "base/finite.h"
#include "base/utf8.h"
#include "core/session.h"
#include "greedy/greedy.h"

struct greedy_bundle {
    std::shared_ptr<greedy::core::Bundle> bundle;
};

struct greedy_session {
    greedy_session(std::shared_ptr<greedy::core::Bundle> bundle, std::uint64_t seed)
        : session(std::move(bundle), seed) {}

    greedy::core::Session session;
    std::shared_ptr<const greedy::core::Pictures> pictures;  // the chunk that frames are taken from
    std::uint32_t taken = 0;
    std::uint64_t frames = 0;
    mutable std::mutex mutex;  // guards the last failure
    int status = GREEDY_OK;
    std::string error;
};

namespace {

struct Frame : greedy_frame {
    std::shared_ptr<const greedy::core::Pictures> pictures;
    std::atomic<int> references{1};
};

struct Failure {
    int status;
    std::string text;
};

// Runs `work` and returns an exception as a status and a line. Allocates nothing when memory has run out.
template <typename Work>
Failure guarded(Work&& work) noexcept {
    try {
        try {
            work();
            return {GREEDY_OK, {}};
        } catch (const greedy::core::Error& error) {
            return {error.status, error.what()};
        } catch (const std::bad_alloc&) {
            return {GREEDY_NO_MEMORY, {}};
        } catch (const std::exception& error) {
            return {GREEDY_FAILED, error.what()};
        }
    } catch (...) {
        return {GREEDY_FAILED, {}};
    }
}

// Copies a failure's line, or the name of its status if there was no memory for a line. A success has an empty line.
std::size_t copy_text(int status, const std::string& text, char* out, std::size_t size) noexcept {
    const char* line = status == GREEDY_OK ? "" : text.empty() ? greedy_status_name(status) : text.c_str();
    const std::size_t length = std::strlen(line);
    if (out && size) {
        const std::size_t count = std::min(length, size - 1);
        std::memcpy(out, line, count);
        out[count] = '\0';
    }
    return length;
}

int report(const Failure& failure, char* error, std::size_t size) noexcept {
    copy_text(failure.status, failure.text, error, size);
    return failure.status;
}

// The same for a session, which keeps the line.
template <typename Work>
int session_call(greedy_session* session, Work&& work) noexcept {
    if (!session) return GREEDY_INVALID;
    Failure failure = guarded(work);
    if (failure.status == GREEDY_OK) return GREEDY_OK;
    const std::lock_guard<std::mutex> lock(session->mutex);
    session->status = failure.status;
    session->error = std::move(failure.text);
    return failure.status;
}

void need(bool good, const char* what) {
    if (!good) greedy::core::fail(GREEDY_INVALID, what, "a null pointer", "a value");
}

}  // namespace

const char* greedy_version(void) { return GREEDY_VERSION; }

const char* greedy_status_name(int status) {
    static constexpr const char* kNames[] = {"GREEDY_OK",         "GREEDY_INVALID",    "GREEDY_NOT_FOUND",
                                             "GREEDY_BAD_BUNDLE", "GREEDY_NO_BACKEND", "GREEDY_NO_MEMORY",
                                             "GREEDY_CANCELLED",  "GREEDY_FAILED",     "GREEDY_NOT_FINITE"};
    return status <= GREEDY_OK && status >= GREEDY_NOT_FINITE ? kNames[-status] : "unknown status";
}

void greedy_settings_init(greedy_settings* settings) {
    if (!settings) return;
    *settings = greedy_settings{};
    settings->verify = 1;
    settings->parallel = 1;
}

int greedy_bundle_open(greedy_bundle** bundle, const char* path, const greedy_settings* settings, char* error,
                       size_t error_size) {
    const Failure failure = guarded([&] {
        need(bundle, "bundle");
        *bundle = nullptr;
        need(path, "path");
        greedy_settings chosen;
        greedy_settings_init(&chosen);
        if (settings) chosen = *settings;
        if (chosen.parallel < 1 || chosen.parallel > 64)
            greedy::core::fail(GREEDY_INVALID, "parallel", std::to_string(chosen.parallel), "1 to 64");
        *bundle = new greedy_bundle{greedy::core::open_bundle(path, chosen)};
    });
    return report(failure, error, error_size);
}

void greedy_bundle_close(greedy_bundle** bundle) {
    if (!bundle) return;
    delete *bundle;
    *bundle = nullptr;
}

int greedy_bundle_info(const greedy_bundle* bundle, greedy_info* info) {
    if (!bundle || !info) return GREEDY_INVALID;
    const greedy::core::Manifest& m = bundle->bundle->manifest();
    const auto number = [](std::int64_t value) { return static_cast<std::int32_t>(value); };
    *info = greedy_info{};
    info->preset = m.preset_name.c_str();
    info->backend = bundle->bundle->backend().c_str();
    info->target = bundle->bundle->target().c_str();
    info->precision = m.precision.c_str();
    info->width = number(m.width), info->height = number(m.height);
    info->fps = m.fps;
    info->chunk_frames = number(m.preset.chunk * m.temporal);
    info->first_frames = number(1 + (m.preset.chunk - 1) * m.temporal);
    info->text_rows = number(m.text_rows), info->text_dim = number(m.transformer.text_dim);
    info->latent_channels = number(m.transformer.in_channels);
    info->latent_height = number(m.latent_height()), info->latent_width = number(m.latent_width());
    info->latent_frames = number(m.preset.chunk);
    return GREEDY_OK;
}

int greedy_open(greedy_session** session, greedy_bundle* bundle, uint64_t seed, char* error, size_t error_size) {
    const Failure failure = guarded([&] {
        need(session, "session");
        *session = nullptr;
        need(bundle, "bundle");
        *session = new greedy_session(bundle->bundle, seed);
    });
    return report(failure, error, error_size);
}

int greedy_set_prompt(greedy_session* session, const char* text, int recommit) {
    const double weight = 1;
    return greedy_set_prompt_blend(session, &text, &weight, 1, 0, recommit);
}

int greedy_set_prompt_blend(greedy_session* session, const char* const* texts, const double* weights, size_t count,
                            int transition, int recommit) {
    return session_call(session, [&] {
        need(texts, "prompt");
        need(weights, "prompt");
        std::vector<greedy::core::Session::Text> copies;
        for (std::size_t i = 0; i < count; ++i) {
            need(texts[i], "prompt");
            if (!greedy::core::utf8_valid(texts[i]))
                greedy::core::fail(GREEDY_INVALID, "prompt", "malformed bytes", "UTF-8");
            copies.push_back({texts[i], weights[i]});
        }
        session->session.set_texts(copies, transition, recommit != 0);
    });
}

int greedy_set_prompt_tokens(greedy_session* session, const int64_t* ids, size_t count, int recommit) {
    return session_call(session, [&] {
        need(ids, "prompt");
        session->session.set_tokens(ids, count, recommit != 0);
    });
}

int greedy_set_prompt_embedding(greedy_session* session, const float* embedding, size_t rows, int recommit) {
    return greedy_set_prompt_embedding_blend(session, embedding, rows, 0, recommit);
}

int greedy_set_prompt_embedding_blend(greedy_session* session, const float* embedding, size_t rows, int transition,
                                      int recommit) {
    return session_call(session, [&] {
        need(embedding, "prompt");
        session->session.set_embedding(embedding, rows, transition, recommit != 0);
    });
}

int greedy_change(greedy_session* session, const greedy_changes* changes) {
    return session_call(session, [&] {
        need(changes, "change");
        std::vector<std::vector<double>> rows;
        if (changes->rows) {
            need(changes->steps, "steps");
            need(changes->row_sizes, "steps");
        }
        const double* step = changes->steps;
        for (std::size_t row = 0; row < changes->rows; step += changes->row_sizes[row++])
            rows.emplace_back(step, step + changes->row_sizes[row]);
        session->session.change(changes->seed, std::move(rows));
    });
}

int greedy_push_frames(greedy_session* session, const uint8_t* rgb, size_t count) {
    return session_call(session, [&] {
        need(rgb, "push");
        session->session.push_frames(rgb, count);
    });
}

int greedy_push_latent(greedy_session* session, const float* latent, size_t frames) {
    return session_call(session, [&] {
        need(latent, "push");
        session->session.push_latent(latent, frames);
    });
}

int greedy_next_frame(greedy_session* session, greedy_frame** frame) {
    if (frame) *frame = nullptr;
    return session_call(session, [&] {
        need(frame, "frame");
        session->session.check_cancel();
        auto made = std::make_unique<Frame>();
        if (!session->pictures || session->taken == session->pictures->count) {
            session->pictures = session->session.next_chunk();
            session->taken = 0;
        }
        const greedy::core::Pictures& pictures = *session->pictures;
        const greedy::core::Manifest& m = session->session.manifest();
        made->width = static_cast<std::int32_t>(m.width);
        made->height = static_cast<std::int32_t>(m.height);
        made->stride = 3 * static_cast<std::size_t>(m.width);
        made->data = pictures.rgb.data() + session->taken * made->stride * static_cast<std::size_t>(m.height);
        made->index = session->frames++;
        made->chunk = pictures.chunk;
        made->left = pictures.count - ++session->taken;
        made->prompt = pictures.prompt;
        made->pictures = session->pictures;
        if (made->left == 0) session->pictures = nullptr;
        *frame = made.release();
    });
}

greedy_frame* greedy_frame_ref(greedy_frame* frame) {
    if (frame) static_cast<Frame*>(frame)->references.fetch_add(1, std::memory_order_relaxed);
    return frame;
}

void greedy_frame_unref(greedy_frame** frame) {
    if (!frame || !*frame) return;
    Frame* held = static_cast<Frame*>(*frame);
    *frame = nullptr;
    if (held->references.fetch_sub(1, std::memory_order_acq_rel) == 1) delete held;
}

void greedy_cancel(greedy_session* session) {
    if (session) session->session.cancel();
}

int greedy_flush(greedy_session* session) {
    return session_call(session, [&] {
        session->session.flush();
        session->pictures = nullptr;
        session->taken = 0;
        session->frames = 0;
    });
}

size_t greedy_error(const greedy_session* session, char* out, size_t size) {
    if (out && size) out[0] = '\0';
    if (!session) return 0;
    const std::lock_guard<std::mutex> lock(session->mutex);
    return copy_text(session->status, session->error, out, size);
}

void greedy_close(greedy_session** session) {
    if (!session) return;
    delete *session;
    *session = nullptr;
}
