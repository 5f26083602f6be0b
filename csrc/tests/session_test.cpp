// session_test BUNDLE PLUGIN_DIR [DIVISOR] stresses sessions through the C interface, over graphs of formulas.
// DIVISOR divides the number of repetitions, for runs under valgrind and sanitizers; 1 is the whole test.
#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <new>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "greedy/greedy.hpp"

namespace {

thread_local bool starved = false;  // new fails

}  // namespace

void* operator new(std::size_t size) {
    void* made = starved ? nullptr : std::malloc(size ? size : 1);
    if (!made) throw std::bad_alloc();
    return made;
}
// All forms are replaced, or a sanitizer's own new would meet this delete.
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
    return starved ? nullptr : std::malloc(size ? size : 1);
}
void* operator new[](std::size_t size) { return ::operator new(size); }
void* operator new[](std::size_t size, const std::nothrow_t& quiet) noexcept { return ::operator new(size, quiet); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace {

std::string bundle_path, plugin_dir;
int divisor = 1;

int times(int count) { return std::max(1, count / divisor); }

greedy_settings settings() {
    greedy_settings out;
    greedy_settings_init(&out);
    out.plugin_dir = plugin_dir.c_str();
    return out;
}

greedy::Bundle open_bundle() {
    const greedy_settings chosen = settings();
    return greedy::Bundle(bundle_path, &chosen);
}

constexpr const char* kPrompt = "a red circle moving right";

// A call that finds no memory still reports it.
void test_no_memory(const greedy::Bundle& bundle) {
    const std::string path = bundle_path;
    const std::int64_t ids[] = {3, 8, 1};
    char why[64] = "", said[64] = "";
    greedy_bundle* opened = nullptr;
    greedy::Session session(bundle, 0);
    starved = true;
    const int open = greedy_bundle_open(&opened, path.c_str(), nullptr, why, sizeof why);
    const int prompt = greedy_set_prompt_tokens(session.get(), ids, 3, 1);
    const std::size_t length = greedy_error(session.get(), said, sizeof said);
    starved = false;
    check(open == GREEDY_NO_MEMORY && !std::strcmp(why, "GREEDY_NO_MEMORY"), "memory: none to open a bundle");
    check(prompt == GREEDY_NO_MEMORY && length == std::strlen(said) && !std::strcmp(said, "GREEDY_NO_MEMORY"),
          "memory: none for a prompt");
}

// A hash (FNV-1a) of the pixels of the next frames.
std::uint64_t digest_of(greedy::Session& session, int frames) {
    std::uint64_t hash = 14695981039346656037u;
    for (int i = 0; i < frames; ++i) {
        const greedy::Frame frame = session.next_frame();
        const std::size_t size = frame->stride * static_cast<std::size_t>(frame->height);
        for (std::size_t at = 0; at < size; ++at) hash = (hash ^ frame->data[at]) * 1099511628211u;
    }
    return hash;
}

std::uint64_t clean_digest(const greedy::Bundle& bundle, std::uint64_t seed, int frames) {
    greedy::Session session(bundle, seed);
    session.set_prompt(kPrompt);
    return digest_of(session, frames);
}

long resident_kb() {
    std::ifstream file("/proc/self/statm");
    long whole = 0, resident = 0;
    file >> whole >> resident;
    return resident * 4;
}

void test_arguments() {
    char why[64];
    greedy_bundle* bundle = reinterpret_cast<greedy_bundle*>(1);
    const greedy_settings chosen = settings();
    check(greedy_bundle_open(nullptr, "x", nullptr, why, sizeof why) == GREEDY_INVALID,
          "open: no place for the result");
    check(greedy_bundle_open(&bundle, nullptr, nullptr, why, sizeof why) == GREEDY_INVALID && !bundle, "open: no path");
    check(greedy_bundle_open(&bundle, "/nowhere", nullptr, why, sizeof why) == GREEDY_NOT_FOUND, "open: nowhere");
    check(std::strncmp(why, "bundle: got /nowhere", 20) == 0, "open: the message");
    check(greedy_bundle_open(&bundle, "/nowhere", nullptr, nullptr, 0) == GREEDY_NOT_FOUND, "open: no buffer");
    check(greedy_bundle_open(&bundle, "/nowhere", nullptr, why, 5) == GREEDY_NOT_FOUND && !std::strcmp(why, "bund"),
          "open: a short buffer");
    greedy_settings odd = chosen;
    odd.parallel = 0;
    check(greedy_bundle_open(&bundle, bundle_path.c_str(), &odd, why, sizeof why) == GREEDY_INVALID,
          "open: parallel 0");
    odd = chosen;
    for (const char* absent : {"tensorrt", "tensorrt_rtx"}) {
        odd.backend = absent;
        check(greedy_bundle_open(&bundle, bundle_path.c_str(), &odd, why, sizeof why) == GREEDY_NO_BACKEND,
              std::string("open: ") + absent);
    }
    odd.backend = nullptr, odd.plugin_dir = "/nowhere";
    check(greedy_bundle_open(&bundle, bundle_path.c_str(), &odd, why, sizeof why) == GREEDY_NO_BACKEND,
          "open: no plugin");
    check(greedy_bundle_open(&bundle, bundle_path.c_str(), &chosen, why, sizeof why) == GREEDY_OK && !why[0],
          "open: a bundle");

    greedy_info info;
    check(greedy_bundle_info(bundle, &info) == GREEDY_OK && info.width == 16 && info.height == 8, "info: the size");
    check(greedy_bundle_info(nullptr, &info) == GREEDY_INVALID, "info: no bundle");
    greedy_session* session = nullptr;
    greedy_frame* frame = nullptr;
    check(greedy_open(&session, nullptr, 0, why, sizeof why) == GREEDY_INVALID, "session: no bundle");
    check(greedy_open(&session, bundle, 0, why, sizeof why) == GREEDY_OK, "session: one");
    greedy_bundle_close(&bundle);
    check(bundle == nullptr, "close: the bundle");
    check(greedy_next_frame(session, &frame) == GREEDY_INVALID && !frame, "frame: before a prompt");
    check(greedy_error(session, why, sizeof why) > 0 && std::strncmp(why, "prompt: got none", 16) == 0,
          "error: the text");
    check(greedy_next_frame(session, nullptr) == GREEDY_INVALID, "frame: no place for it");
    check(greedy_next_frame(nullptr, &frame) == GREEDY_INVALID, "frame: no session");
    check(greedy_set_prompt(session, nullptr, 1) == GREEDY_INVALID, "prompt: none");
    check(greedy_set_prompt(session, "\xff", 1) == GREEDY_INVALID, "prompt: no UTF-8");
    const std::int64_t ids[] = {3, 8, 1};
    check(greedy_set_prompt_tokens(session, ids, 0, 1) == GREEDY_INVALID, "tokens: none");
    check(greedy_set_prompt_tokens(session, ids, 17, 1) == GREEDY_INVALID, "tokens: too many");
    const std::int64_t below[] = {-1}, above[] = {std::int64_t{1} << 40};
    check(greedy_set_prompt_tokens(session, below, 1, 1) == GREEDY_INVALID, "tokens: a negative one");
    check(greedy_set_prompt_tokens(session, above, 1, 1) == GREEDY_INVALID, "tokens: one outside the vocabulary");
    const std::vector<float> values(static_cast<std::size_t>(16 * 6), 0.1f);
    check(greedy_set_prompt_embedding(session, values.data(), 15, 1) == GREEDY_INVALID, "embedding: too few rows");
    check(greedy_push_latent(session, values.data(), 0) == GREEDY_INVALID, "latent: none");
    check(greedy_push_frames(session, nullptr, 1) == GREEDY_INVALID, "frames: none");
    check(greedy_set_prompt_tokens(session, ids, 3, 1) == GREEDY_OK, "tokens: three");
    check(greedy_next_frame(session, &frame) == GREEDY_OK && frame->index == 0 && frame->left == 0 && frame->prompt == 0,
          "frame: the first");
    greedy_frame* again = greedy_frame_ref(frame);
    greedy_frame_unref(&frame);
    check(!frame && again->width == 16 && again->stride == 48, "frame: a second reference");
    check(greedy_push_latent(session, values.data(), 1) == GREEDY_INVALID, "latent: too late");
    check(greedy_set_prompt_embedding(session, values.data(), 16, 1) == GREEDY_OK, "embedding: a second prompt");
    check(greedy_next_frame(session, &frame) == GREEDY_OK && frame->index == 1 && frame->left == 3 && frame->chunk == 1,
          "frame: the second");
    check(frame->prompt == 1, "frame: the number of its prompt");
    greedy_close(&session);
    const volatile std::uint8_t pixel = frame->data[3 * 16 * 8 - 1];  // a sanitizer would see a freed frame
    check(!session && pixel > 0, "frame: outlives its session");
    greedy_frame_unref(&again);
    greedy_frame_unref(&frame);
    greedy_close(&session);
    greedy_bundle_close(&bundle);
    check(std::strcmp(greedy_status_name(-3), "GREEDY_BAD_BUNDLE") == 0, "names: one");
    check(std::strcmp(greedy_status_name(-99), "unknown status") == 0, "names: none");
}

std::string text_of(const std::filesystem::path& path) {
    std::ifstream file(path);
    return {std::istreambuf_iterator<char>(file), {}};
}

void replace_all(std::string& text, const std::string& old, const std::string& by) {
    check(text.find(old) != std::string::npos, "version 2: no " + old);
    for (std::size_t at = 0; (at = text.find(old, at)) != std::string::npos; at += by.size())
        text.replace(at, old.size(), by);
}

// Version 2 of the manifest has other names for two inputs, and counts the window in latent frames.
void test_version_2(const greedy::Bundle& bundle) {
    const std::filesystem::path copy =
        std::filesystem::temp_directory_path() / ("greedy_version_2." + std::to_string(getpid()));
    std::filesystem::remove_all(copy);
    std::filesystem::copy(bundle_path, copy, std::filesystem::copy_options::recursive);
    std::string manifest = text_of(copy / "manifest.json");
    for (const auto& [old, by] :
         {std::pair("\"version\": 1", "\"version\": 2"), std::pair("\"window\": 3", "\"window\": 4"),
          std::pair("\"write_idx\"", "\"start_row\""), std::pair("\"kv_len\"", "\"valid_rows\"")})
        replace_all(manifest, old, by);
    std::ofstream(copy / "manifest.json") << manifest;
    const greedy_settings chosen = settings();
    check(clean_digest(greedy::Bundle(copy.string(), &chosen), 8, 41) == clean_digest(bundle, 8, 41),
          "version 2: another video");
    // Version 1 does not take the new names.
    replace_all(manifest, "\"version\": 2", "\"version\": 1");
    std::ofstream(copy / "manifest.json") << manifest;
    try {
        greedy::Session(greedy::Bundle(copy.string(), &chosen), 8);
        check(false, "version 2: its names accepted in version 1");
    } catch (const greedy::StatusError& error) {
        check(std::strstr(error.what(), "got no write_idx"), std::string("version 2: said ") + error.what());
    }
    std::filesystem::remove_all(copy);
}

void test_tokens_are_the_text(const greedy::Bundle& bundle) {
    greedy::Session a(bundle, 1), b(bundle, 1);
    a.set_prompt("a red circle");
    const std::int64_t ids[] = {3, 8, 13, 1};
    b.set_prompt_tokens(ids, 4);
    check(digest_of(a, 13) == digest_of(b, 13), "tokens: another video than the text's");
}

void test_flush(const greedy::Bundle& bundle) {
    greedy::Session session(bundle, 9);
    session.set_prompt(kPrompt);
    const std::uint64_t first = digest_of(session, 11);
    session.cancel();
    session.flush();
    check(digest_of(session, 11) == first, "flush: another video");
}

// A result with a NaN is an error, wherever it arises; after it the next call makes the same frames.
void test_not_finite(const greedy::Bundle& bundle) {
    void* plugin = dlopen((plugin_dir + "/libgreedy_aoti.so").c_str(), RTLD_NOW);
    const auto nan_after = reinterpret_cast<void (*)(long)>(plugin ? dlsym(plugin, "fake_nan_after") : nullptr);
    check(nan_after, "not finite: no fake_nan_after");
    if (!nan_after) return;
    const std::uint64_t clean = clean_digest(bundle, 4, 17);
    int failed = 0;
    for (long run = 0; run < 40; ++run) {
        greedy::Session session(bundle, 4);
        session.set_prompt(kPrompt);
        nan_after(run);
        std::uint64_t hash = 14695981039346656037u;
        for (int frame = 0; frame < 17;) {
            try {
                const greedy::Frame shown = session.next_frame();
                const std::size_t size = shown->stride * static_cast<std::size_t>(shown->height);
                for (std::size_t at = 0; at < size; ++at) hash = (hash ^ shown->data[at]) * 1099511628211u;
                ++frame;
            } catch (const greedy::StatusError& error) {
                check(error.status == GREEDY_NOT_FINITE, "not finite: the status");
                check(std::strstr(error.what(), "got nan though all weights are finite, expected finite numbers"),
                      error.what());
                ++failed;
                break;  // a NaN that a cache holds stays there, so not every run can go on
            }
        }
        nan_after(-1);
        bool decoding = true;
        try {
            session.flush();
            decoding = digest_of(session, 17) == clean;
        } catch (const greedy::StatusError&) {
            decoding = false;
        }
        check(decoding, "not finite: afterwards the stream starts over");
    }
    check(failed > 20, "not finite: results that became pixels");
    greedy::Session session(bundle, 4);
    std::vector<float> numbers(static_cast<std::size_t>(bundle.info().text_rows * bundle.info().text_dim));
    numbers[3] = std::nanf("");
    check(greedy_set_prompt_embedding(session.get(), numbers.data(), static_cast<std::size_t>(bundle.info().text_rows),
                                      1) == GREEDY_INVALID,
          "not finite: an embedding");
    const greedy_info info = bundle.info();
    std::vector<float> latent(static_cast<std::size_t>(info.latent_channels * info.latent_frames * info.latent_height *
                                                       info.latent_width));
    latent.back() = HUGE_VALF;
    check(greedy_push_latent(session.get(), latent.data(), static_cast<std::size_t>(info.latent_frames)) ==
              GREEDY_INVALID,
          "not finite: latents");
}

// After a failure of any graph the next call makes the same frames.
void test_failures(const greedy::Bundle& bundle) {
    void* plugin = dlopen((plugin_dir + "/libgreedy_aoti.so").c_str(), RTLD_NOW);
    const auto fail_after = reinterpret_cast<void (*)(long)>(plugin ? dlsym(plugin, "fake_fail_after") : nullptr);
    check(fail_after, "failures: no fake_fail_after");
    if (!fail_after) return;
    const auto stream = [&](long first) {
        greedy::Session session(bundle, 2);
        session.set_prompt(kPrompt);
        std::uint64_t hash = 0;
        long failed = 0;
        for (int frame = 0; frame < 33;) {
            if (frame == 13) session.set_prompt("teal");
            if (first >= 0) fail_after((first + frame * 7) % 20);
            try {
                hash = hash * 31 + digest_of(session, 1);
                ++frame;
            } catch (const greedy::StatusError& error) {
                check(error.status == GREEDY_FAILED, "failures: another status");
                ++failed;
                fail_after(-1);
                hash = hash * 31 + digest_of(session, 1);
                ++frame;
            }
        }
        fail_after(-1);
        check(first < 0 || failed > 0, "failures: none happened");
        return hash;
    };
    const std::uint64_t clean = stream(-1);
    for (long first = 0; first < 20; ++first)
        check(stream(first) == clean, "failures: another video after one at graph " + std::to_string(first));
}

void test_cancel_under_load(const greedy::Bundle& bundle) {
    const int frames = 401;
    const std::uint64_t clean = clean_digest(bundle, 3, frames);
    greedy::Session session(bundle, 3);
    session.set_prompt(kPrompt);
    std::atomic<bool> done{false};
    std::atomic<long> made{0};
    int asked = 0;
    // One cancel per frame, at changing moments: with a cancel at every moment no frame would be made.
    std::thread other([&] {
        while (!done) {
            const long before = made;
            for (int wait = asked % 61; wait > 0; --wait) std::this_thread::yield();
            session.cancel();
            ++asked;
            while (!done && made == before) std::this_thread::yield();
        }
    });
    int cancelled = 0;
    for (int round = 0; cancelled < times(1000) || round < 2; ++round) {
        session.flush();
        std::uint64_t hash = 14695981039346656037u;
        for (int frame = 0; frame < frames;) {
            greedy_frame* next = nullptr;
            const int status = greedy_next_frame(session.get(), &next);
            if (status == GREEDY_CANCELLED) {
                ++cancelled;
                continue;
            }
            check(status == GREEDY_OK, "cancel: another status");
            if (status != GREEDY_OK) break;
            const greedy::Frame held(next);
            const std::size_t size = held->stride * static_cast<std::size_t>(held->height);
            for (std::size_t at = 0; at < size; ++at) hash = (hash ^ held->data[at]) * 1099511628211u;
            ++frame, ++made;
        }
        check(hash == clean, "cancel: another video");
    }
    done = true;
    other.join();
    std::printf("cancelled %d times, asked %d times\n", cancelled, asked);
}

void test_two_threads(const greedy::Bundle& bundle) {
    const int frames = 1 + 4 * times(200);
    const std::uint64_t expected[] = {clean_digest(bundle, 10, frames), clean_digest(bundle, 11, frames)};
    std::uint64_t got[2] = {0, 0};
    std::vector<std::thread> threads;
    for (int i = 0; i < 2; ++i)
        threads.emplace_back([&, i] {
            greedy::Session session(bundle, static_cast<std::uint64_t>(10 + i));
            session.set_prompt(kPrompt);
            got[i] = digest_of(session, frames);
        });
    for (std::thread& thread : threads) thread.join();
    check(got[0] == expected[0] && got[1] == expected[1], "threads: another video than alone");
}

void test_prompts_from_another_thread(const greedy::Bundle& bundle) {
    greedy::Session session(bundle, 4);
    session.set_prompt(kPrompt);
    std::atomic<bool> done{false};
    std::thread other([&] {
        for (int i = 0; !done; ++i) {
            session.set_prompt(i % 2 ? "teal" : kPrompt, i % 3 == 0);
            char text[8];
            greedy_error(session.get(), text, sizeof text);
            std::this_thread::yield();
        }
    });
    digest_of(session, 4 * times(100));
    done = true;
    other.join();
}

void test_reopening() {
    for (int i = 0; i < times(100); ++i) {
        const greedy::Bundle bundle = open_bundle();
        greedy::Session session(bundle, 5);
        session.set_prompt(kPrompt);
        digest_of(session, 6);
    }
}

void test_memory(const greedy::Bundle& bundle) {
    greedy::Session session(bundle, 6);
    session.set_prompt(kPrompt);
    digest_of(session, 4 * times(500));
    const long before = resident_kb();
    for (int i = 0; i < times(2000); i += 10) {
        session.set_prompt(i % 20 ? "teal" : kPrompt);
        digest_of(session, 40);
    }
    const long grown = resident_kb() - before;
    std::printf("%d chunks: resident memory grew by %ld kB\n", times(2000), grown);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    check(divisor > 1 || grown < 512, "memory: grew");
#endif
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 3) return std::fprintf(stderr, "usage: session_test BUNDLE PLUGIN_DIR [DIVISOR]\n"), 2;
    bundle_path = argv[1], plugin_dir = argv[2];
    divisor = argc > 3 ? std::max(1, std::atoi(argv[3])) : 1;
    try {
        test_arguments();
        const greedy::Bundle bundle = open_bundle();
        test_no_memory(bundle);
        test_tokens_are_the_text(bundle);
        test_version_2(bundle);
        test_flush(bundle);
        test_failures(bundle);
        test_not_finite(bundle);
        test_cancel_under_load(bundle);
        test_two_threads(bundle);
        test_prompts_from_another_thread(bundle);
        test_reopening();
        test_memory(bundle);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "FAILED: %s\n", error.what());
        return 1;
    }
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
