#include "calls.h"

#include <dlfcn.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "greedy/greedy.h"

namespace {

constexpr std::size_t kMostCalls = 100, kMostFrames = 33;  // of one input; frames of one session

[[noreturn]] void die(const std::string& what) {
    std::fprintf(stderr, "calls: %s\n", what.c_str());
    std::abort();
}

void need(bool good, const std::string& what) {
    if (!good) die(what);
}

const char* bundle_path() {
    const char* named = std::getenv("GREEDY_FAKE_BUNDLE");
    return named ? named : GREEDY_FAKE_BUNDLE;
}

greedy_bundle* open_bundle() {
    greedy_settings settings;
    greedy_settings_init(&settings);
    settings.plugin_dir = GREEDY_FAKE_PLUGIN_DIR;
    greedy_bundle* bundle = nullptr;
    char why[512];
    need(greedy_bundle_open(&bundle, bundle_path(), &settings, why, sizeof why) == GREEDY_OK, why);
    return bundle;
}

// The fake plugin's switch: a graph fails after so many others.
void fail_after(long runs) {
    static void* const plugin = dlopen(GREEDY_FAKE_PLUGIN_DIR "/libgreedy_aoti.so", RTLD_NOW);
    static const auto set = reinterpret_cast<void (*)(long)>(plugin ? dlsym(plugin, "fake_fail_after") : nullptr);
    need(set, "no fake_fail_after");
    set(runs);
}

// A call that may succeed, with its arguments.
struct Call {
    enum Kind { text, tokens, embedding, frames, latent, next, flush } kind;
    int which = 0;         // of the arguments of this kind
    bool recommit = false;
    int transition = 0;  // of a text, which is mixed with another one then, or of an embedding
};

// What a frame showed.
struct Seen {
    std::uint64_t hash, index, chunk;
    std::uint32_t left;
    bool operator==(const Seen& other) const {
        return hash == other.hash && index == other.index && chunk == other.chunk && left == other.left;
    }
};

Seen seen(const greedy_frame& frame) {
    std::uint64_t hash = 14695981039346656037u;
    for (std::size_t i = 0; i < frame.stride * static_cast<std::size_t>(frame.height); ++i)
        hash = (hash ^ frame.data[i]) * 1099511628211u;
    return {hash, frame.index, frame.chunk, frame.left};
}

const std::string kLong(20'000, 'a');
const char* const kTexts[] = {"a red circle", "teal", "a blue square moving up", "caf\xC3\x83\xC2\xA9 &amp; </s>",
                              // Refused:
                              "", " \xE2\x80\x8B ", "\xFF", "a\xED\xA0\x80", kLong.c_str(), nullptr};
constexpr int kGoodTexts = 4, kWrong = -1;  // a transition that is refused, as its weights are
const std::vector<std::int64_t> kTokens[] = {
    {3, 8, 1}, {1}, {5, 4, 3, 2, 1, 5, 4, 3, 2, 1, 5, 4, 3, 2, 1, 0},
    // Refused:
    {}, std::vector<std::int64_t>(17, 1), {-1}, {2'000'000}, {INT64_MIN}, {INT64_MAX}};
constexpr int kGoodTokens = 3;

class Driver {
  public:
    explicit Driver(greedy_bundle* bundle, std::uint64_t seed) : seed(seed) {
        greedy_bundle_info(bundle, &info_);
        char why[256];
        need(greedy_open(&session, bundle, seed, why, sizeof why) == GREEDY_OK, why);
    }
    ~Driver() { greedy_close(&session); }
    Driver(const Driver&) = delete;
    Driver& operator=(const Driver&) = delete;

    // Makes a call and returns its status; a frame goes to `shown`.
    int make(const Call& call, Seen* shown = nullptr) {
        const int which = call.which;
        switch (call.kind) {
            case Call::text:
                return call.transition ? blend(call) : greedy_set_prompt(session, kTexts[which], call.recommit);
            case Call::tokens:
                return greedy_set_prompt_tokens(session, kTokens[which].data(), kTokens[which].size(), call.recommit);
            case Call::embedding:
                return embed(call);
            case Call::frames:
                return push_frames(which);
            case Call::latent:
                return push_latent(which);
            case Call::flush:
                return greedy_flush(session);
            case Call::next:
                break;
        }
        greedy_frame* frame = reinterpret_cast<greedy_frame*>(1);
        const int status = greedy_next_frame(session, &frame);
        need((status == GREEDY_OK) == (frame != nullptr), "a frame and its status differ");
        if (frame && shown) *shown = seen(*frame);
        greedy_frame_unref(&frame);
        return status;
    }

    // Whether the arguments are right.
    static bool good(const Call& call) {
        const int which = call.which;
        if (call.transition == kWrong && (call.kind == Call::text || call.kind == Call::embedding)) return false;
        return call.kind == Call::text        ? which < kGoodTexts
               : call.kind == Call::tokens    ? which < kGoodTokens
               : call.kind == Call::embedding ? which < 2
               : call.kind == Call::frames    ? which < 4
               : call.kind == Call::latent    ? which < 3
                                              : true;
    }
    static int kinds(Call::Kind kind) {
        return kind == Call::text ? 10 : kind == Call::tokens ? 9 : kind == Call::embedding ? 5 : kind == Call::frames ? 6 : 6;
    }

    greedy_session* session = nullptr;
    const std::uint64_t seed;

  private:
    int blend(const Call& call) {
        const char* const texts[] = {kTexts[call.which], kTexts[call.transition % kGoodTexts]};
        const double weights[] = {1, call.transition == kWrong ? -1.0 : 0.7 * call.transition};
        return greedy_set_prompt_blend(session, texts, weights, 2, call.transition, call.recommit);
    }
    int embed(const Call& call) {
        const int which = call.which;
        const auto rows = static_cast<std::size_t>(info_.text_rows);
        std::vector<float> values(rows * static_cast<std::size_t>(info_.text_dim));
        for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>((i * (which + 3)) % 7) / 7;
        if (which == 2) values.back() = std::nanf("");
        return greedy_set_prompt_embedding_blend(session, which == 4 ? nullptr : values.data(), rows - (which == 3),
                                                 call.transition, call.recommit);
    }
    int push_frames(int which) {
        static constexpr std::size_t kCounts[] = {1, 5, 6, 14, 0, 3};
        const std::size_t count = kCounts[which];
        std::vector<std::uint8_t> rgb(count * static_cast<std::size_t>(3 * info_.width * info_.height) + 1);
        for (std::size_t i = 0; i < rgb.size(); ++i) rgb[i] = static_cast<std::uint8_t>(i * (which + 5) % 251);
        return greedy_push_frames(session, which == 5 ? nullptr : rgb.data(), count);
    }
    int push_latent(int which) {
        const auto chunk = static_cast<std::size_t>(info_.latent_frames);
        const std::size_t frames = which == 3 ? 0 : which == 0 ? chunk : which == 1 ? 2 * chunk : 3 * chunk;
        std::vector<float> values(frames * static_cast<std::size_t>(info_.latent_channels * info_.latent_height *
                                                                    info_.latent_width) + 1);
        for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>((i * (which + 2)) % 9) / 9 - 0.5f;
        if (which == 4) values[0] = HUGE_VALF;
        return greedy_push_latent(session, which == 5 ? nullptr : values.data(), frames);
    }

    greedy_info info_;
};

// A session under test: what it was told with success, and what it showed.
class Tested {
  public:
    Tested(greedy_bundle* bundle, std::uint64_t seed) : driver_(bundle, seed) {}

    greedy_session* session() { return driver_.session; }
    void cancel() {
        greedy_cancel(session());
        cancelled_ = true;
    }

    // Makes a call, in which a graph may fail after `runs` others (negative: none), and checks its status.
    void make(Call call, long runs) {
        if (call.kind == Call::next && shown_.size() >= kMostFrames) return;
        // greedy.h: with recommit 0 a new prompt finds the keys that the failed call has written.
        if (call.kind <= Call::embedding && interrupted_) call.recommit = true;
        const bool computes = call.kind == Call::frames || call.kind == Call::next;
        if (computes) fail_after(runs);
        Seen frame{};
        const int status = driver_.make(call, &frame);
        fail_after(-1);
        const int expected = expect(call);
        const bool failed = computes && runs >= 0 && status == GREEDY_FAILED && expected == GREEDY_OK;
        need(status == expected || failed, "call " + std::to_string(call.kind) + "." + std::to_string(call.which) + ": got " +
                                               greedy_status_name(status) + ", expected " + greedy_status_name(expected));
        char said[200];
        if (status != GREEDY_OK)
            need(greedy_error(session(), said, sizeof said) > 0 && !std::strchr(said, '\n'), "no line for a failure");
        if (call.kind == Call::next && failed) interrupted_ = true;
        if (status == GREEDY_OK) note(call, frame);
    }

    // A fresh session that gets the calls that succeeded shows the same.
    void replay(greedy_bundle* bundle) const {
        Driver fresh(bundle, driver_.seed);
        std::size_t at = 0;
        for (const Call& call : done_) {
            Seen frame{};
            const int status = fresh.make(call, &frame);
            need(status == GREEDY_OK, std::string("the replay failed with ") + greedy_status_name(status));
            if (call.kind == Call::next && !(frame == shown_[at++]))
                die("frame " + std::to_string(at - 1) + " differs from that of a fresh session");
        }
    }

  private:
    int expect(const Call& call) {
        if (call.kind == Call::next) {
            const bool cancelled = cancelled_;
            cancelled_ = false;
            return cancelled ? GREEDY_CANCELLED : prompted_ ? GREEDY_OK : GREEDY_INVALID;
        }
        const bool pushes = call.kind == Call::frames || call.kind == Call::latent;
        return Driver::good(call) && !(pushes && started_) ? GREEDY_OK : GREEDY_INVALID;
    }
    void note(const Call& call, const Seen& frame) {
        done_.push_back(call);
        if (call.kind <= Call::embedding) prompted_ = true;
        if (call.kind == Call::next) {
            shown_.push_back(frame);
            started_ = true;
            interrupted_ = false;
        }
        if (call.kind == Call::flush) started_ = cancelled_ = interrupted_ = false;
    }

    Driver driver_;
    std::vector<Call> done_;
    std::vector<Seen> shown_;
    bool prompted_ = false, started_ = false, cancelled_ = false;
    bool interrupted_ = false;  // a call for the next chunk failed
};

// A frame that a caller keeps, whatever happens to its session.
struct Kept {
    greedy_frame* frame;
    Seen shown;
};

// Calls with null pointers; nothing happens.
void misuse(greedy_bundle* bundle, greedy_session* session, int which) {
    char why[8];
    greedy_session* none = nullptr;
    greedy_frame* frame = nullptr;
    greedy_info info;
    greedy_close(nullptr), greedy_close(&none), greedy_bundle_close(nullptr), greedy_cancel(nullptr);
    greedy_frame_unref(nullptr), greedy_frame_unref(&frame), greedy_settings_init(nullptr);
    need(!greedy_frame_ref(nullptr), "a reference to nothing");
    need(greedy_flush(nullptr) == GREEDY_INVALID, "flush of nothing");
    need(greedy_bundle_info(which % 2 ? bundle : nullptr, which % 2 ? nullptr : &info) == GREEDY_INVALID, "info of nothing");
    need(greedy_open(which % 2 ? nullptr : &none, which % 2 ? bundle : nullptr, 0, which % 3 ? why : nullptr, 8) == GREEDY_INVALID,
         "open of nothing");
    need(greedy_next_frame(session, nullptr) == GREEDY_INVALID, "next frame to nowhere");
    need(greedy_next_frame(nullptr, &frame) == GREEDY_INVALID && !frame, "next frame of nothing");
    need(greedy_set_prompt(nullptr, "a", 1) == GREEDY_INVALID && greedy_error(nullptr, why, 8) == 0 && !why[0], "no session");
    need(greedy_error(session, nullptr, 0) == greedy_error(session, why, 1) && !why[0], "the length of a failure");
    need(greedy_status_name(which - 20) != nullptr, "no name");
}

}  // namespace

void play_calls(const std::string& bytes) {
    static greedy_bundle* reference = open_bundle();  // for replays
    greedy_bundle* bundle = open_bundle();
    std::unique_ptr<Tested> sessions[3];
    std::vector<Kept> kept;
    const auto end = [&](std::unique_ptr<Tested>& session) {
        if (session) session->replay(reference);
        session = nullptr;
    };
    for (std::size_t at = 0; at + 1 < std::min(bytes.size(), 2 * kMostCalls); at += 2) {
        const auto what = static_cast<unsigned char>(bytes[at]), how = static_cast<unsigned char>(bytes[at + 1]);
        std::unique_ptr<Tested>& session = sessions[what / 16 % 3];
        if (!session) session = std::make_unique<Tested>(bundle, how % 5);
        const auto kind = static_cast<Call::Kind>(what % 16);
        if (kind <= Call::latent)
            session->make({kind, how / 2 % Driver::kinds(kind), how % 2 != 0, how / 16 % 6 - 1}, how % 3 ? -1 : how / 12);
        else if (what % 16 < 11)
            for (int i = 0; i <= how % 6; ++i) session->make({Call::next}, what % 16 < 9 ? -1 : how / 6);
        else if (what % 16 == 11)
            session->cancel();
        else if (what % 16 == 12)
            how % 4 ? session->make({Call::flush}, -1) : end(session);
        else if (what % 16 == 13)
            misuse(bundle, session->session(), how % 40);
        else if (what % 16 == 14) {  // sessions and frames outlive their bundle
            greedy_bundle_close(&bundle);
            bundle = open_bundle();
        } else if (kept.size() < 8) {
            Tested other(bundle, how);
            other.make({Call::text}, -1);
            greedy_frame* frame = nullptr;
            need(greedy_next_frame(other.session(), &frame) == GREEDY_OK, "a frame to keep");
            greedy_frame* again = greedy_frame_ref(frame);
            kept.push_back({again, seen(*again)});
            greedy_frame_unref(&frame);
        }
    }
    for (std::unique_ptr<Tested>& session : sessions) end(session);
    greedy_bundle_close(&bundle);
    for (Kept& one : kept) {
        need(seen(*one.frame) == one.shown, "a kept frame changed");
        greedy_frame_unref(&one.frame);
    }
}
