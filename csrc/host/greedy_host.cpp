// greedy-host streams a bundle from the command line, without Python. It is an example of the whole interface.
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "greedy/greedy.hpp"
#include "host/part.h"
#include "host/sinks.h"

namespace {

constexpr const char* kUsage =
    "usage: greedy-host BUNDLE --prompt TEXT [options]\n"
    "  --prompt TEXT          text to show\n"
    "  --prompt-at FRAME TEXT switch the prompt at a frame, where the next chunk begins; may be repeated\n"
    "  --no-recommit          keep the old prompt's keys and values when the prompt switches\n"
    "  --image FILE.ppm       start from a picture of the bundle's size\n"
    "  --frames N             stop after N frames; default: until Ctrl-C\n"
    "  --seed S               the same seed gives the same video (0)\n"
    "  --out TARGET           FILE.y4m, .rgb, .mp4 (with ffmpeg), - (stdout), null, checksum (-)\n"
    "  --format y4m|rgb       format of --out - (y4m)\n"
    "  --backend NAME         aoti, tensorrt, tensorrt_rtx, ...; default: the first of the bundle that opens\n"
    "  --plugin-dir DIR       directory of the plugins; default: beside the library\n"
    "  --library-dir DIR      directory of libtorch_cpu.so; default: $GREEDY_LIBRARY_DIR, or the installed torch\n"
    "  --threads N            CPU threads; default: OMP_NUM_THREADS, else by the model's size\n"
    "  --no-verify            compare the hashes of graphs only\n"
    "  --json                 print times as the last line of stderr\n"
    "  --quiet                no log\n";

struct Options {
    std::string bundle, image, out = "-", format;
    std::vector<std::pair<std::uint64_t, std::string>> prompts;  // first frame, text
    std::uint64_t frames = UINT64_MAX, seed = 0;
    const char* threads = nullptr;
    bool recommit = true, json = false, quiet = false;
    greedy_settings settings;
};

struct Usage : std::runtime_error {
    using std::runtime_error::runtime_error;
};

std::uint64_t number(const std::string& option, const char* text) {
    char* end = nullptr;
    errno = 0;
    const std::uint64_t value = std::strtoull(text, &end, 10);
    if (errno || end == text || *end || *text == '-')
        throw Usage(option + ": got '" + text + "', expected a number of 0 or more");
    return value;
}

Options parse(int count, char** words) {
    Options out;
    greedy_settings_init(&out.settings);
    const char* first = nullptr;
    for (int i = 1; i < count; ++i) {
        const std::string word = words[i];
        const auto next = [&] {
            if (i + 1 >= count) throw Usage(word + ": got nothing, expected a value");
            return words[++i];
        };
        if (word == "--prompt")
            first = next();
        else if (word == "--prompt-at") {
            const std::uint64_t frame = number(word, next());
            out.prompts.emplace_back(frame, next());
        } else if (word == "--no-recommit")
            out.recommit = false;
        else if (word == "--image")
            out.image = next();
        else if (word == "--frames")
            out.frames = number(word, next());
        else if (word == "--seed")
            out.seed = number(word, next());
        else if (word == "--out")
            out.out = next();
        else if (word == "--format")
            out.format = next();
        else if (word == "--backend")
            out.settings.backend = next();
        else if (word == "--plugin-dir")
            out.settings.plugin_dir = next();
        else if (word == "--library-dir")
            out.settings.library_dir = next();
        else if (word == "--threads")
            out.threads = next();
        else if (word == "--no-verify")
            out.settings.verify = 0;
        else if (word == "--json")
            out.json = true;
        else if (word == "--quiet")
            out.quiet = true;
        else if (word == "--help")
            throw Usage("");
        else if (word.rfind("-", 0) == 0 || !out.bundle.empty())
            throw Usage("got " + word + ", expected no such argument");
        else
            out.bundle = word;
    }
    if (out.bundle.empty()) throw Usage("BUNDLE: got none, expected a directory");
    if (!first) throw Usage("--prompt: got none, expected words");
    for (const auto& [frame, text] : out.prompts)
        if (frame >= out.frames)
            throw Usage("--prompt-at: got frame " + std::to_string(frame) + ", expected one before the end at " +
                        std::to_string(out.frames));
    out.prompts.insert(out.prompts.begin(), {0, first});
    // Stable: of several at one frame the last one given wins.
    std::stable_sort(out.prompts.begin(), out.prompts.end(),
                     [](const auto& a, const auto& b) { return a.first < b.first; });
    if (out.threads && number("--threads", out.threads) == 0) throw Usage("--threads: got 0, expected at least 1");
    if (out.frames == 0) throw Usage("--frames: got 0, expected at least 1");
    return out;
}

// A binary PPM (P6) of exactly this size.
std::vector<std::uint8_t> read_ppm(const std::string& path, int width, int height) {
    std::FILE* file = std::fopen(path.c_str(), "rb");
    if (!file) throw Usage("--image: got " + path + ", expected a file that can be read");
    int w = 0, h = 0, most = 0;
    const bool header = std::fscanf(file, "P6 %d %d %d", &w, &h, &most) == 3 && std::fgetc(file) != EOF;
    std::vector<std::uint8_t> rgb(3 * static_cast<std::size_t>(width) * static_cast<std::size_t>(height));
    const bool good =
        header && w == width && h == height && most == 255 && std::fread(rgb.data(), rgb.size(), 1, file) == 1;
    std::fclose(file);
    if (!good)
        throw Usage("--image: got " + path + ", expected a binary PPM of " + std::to_string(width) + "x" +
                    std::to_string(height) + " pixels");
    return rgb;
}

// libtorch's OpenMP library reads these once, when a plugin loads it. Without the first one an idle thread spins for
// some milliseconds before it sleeps, and takes a core from the process beside this one.
void set_threads(const Options& options) {
    setenv("OMP_WAIT_POLICY", "passive", 0);  // the user's own stays
    if (options.threads) setenv("OMP_NUM_THREADS", options.threads, 1);
}

volatile std::sig_atomic_t stopped = 0;

double since(std::chrono::steady_clock::time_point begun) {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begun).count();
}

// What stderr says behind an error after which frames were kept.
std::string kept;

// Returns the number of frames.
std::uint64_t run(const Options& options) {
    const auto begun = std::chrono::steady_clock::now();
    greedy::host::check_target(options.out, options.format);
    const greedy::Bundle bundle(options.bundle, &options.settings);
    const double load_ms = since(begun);
    const greedy_info info = bundle.info();
    greedy::Session session(bundle, options.seed);
    if (!options.image.empty()) session.push_frames(read_ppm(options.image, info.width, info.height).data(), 1);
    // Refuses a bad prompt before the first frame. The first one is set last, so it counts.
    for (auto prompt = options.prompts.rbegin(); prompt != options.prompts.rend(); ++prompt)
        session.set_prompt(prompt->second);
    const auto sink = greedy::host::open_sink(options.out, options.format, info.width, info.height, info.fps);
    const auto note = [&](std::uint64_t frame, const char* why) {
        if (!options.quiet)
            std::fprintf(stderr, "note: the prompt at frame %llu has no effect: %s\n",
                         static_cast<unsigned long long>(frame), why);
    };
    std::size_t prompt = 0;
    std::uint64_t frames = 0;
    double first_ms = 0, chunk_ms = 0, spent = 0;
    std::vector<double> chunks;
    const auto streaming = std::chrono::steady_clock::now();
    try {
        while (frames < options.frames && !stopped) {
            // A prompt applies from the next chunk on, so frames that are already made are shown first.
            std::size_t due = prompt;
            for (; due < options.prompts.size() && options.prompts[due].first <= frames; ++due)
                if (due > prompt) note(options.prompts[due - 1].first, "another one replaces it before a chunk begins");
            if (due > prompt) session.set_prompt(options.prompts[due - 1].second, options.recommit);
            prompt = due;
            const auto asked = std::chrono::steady_clock::now();
            greedy::Frame frame = session.next_frame();
            chunk_ms = since(asked);
            if (frames == 0) first_ms = since(begun);
            chunks.push_back(chunk_ms);
            for (;;) {
                sink->write(frame->data);
                if (++frames == options.frames || frame->left == 0 || stopped) break;
                frame = session.next_frame();
            }
        }
        spent = since(streaming);
        sink->close();
    } catch (...) {
        const std::string name = sink->abort();
        if (!name.empty()) kept = "; kept what was made in " + greedy::host::shown(name);
        throw;
    }
    for (; prompt < options.prompts.size() && !stopped; ++prompt)
        note(options.prompts[prompt].first, "the last chunk began before it");
    if (!options.quiet)
        for (const std::string& note : sink->notes()) std::fprintf(stderr, "note: %s\n", note.c_str());
    if (!sink->digest().empty() && (std::printf("%s\n", sink->digest().c_str()) < 0 || std::fflush(stdout) != 0))
        throw std::runtime_error("checksum: got no stdout that takes it, expected one");
    double steady = 0;
    for (std::size_t i = 1; i < chunks.size(); ++i) steady += chunks[i] / static_cast<double>(chunks.size() - 1);
    if (options.json)
        std::fprintf(
            stderr,
            "{\"frames\": %llu, \"chunks\": %zu, \"load_ms\": %.3f, \"ttff_ms\": %.3f, \"ms_per_chunk\": %.4f, "
            "\"fps\": %.3f, \"backend\": \"%s\", \"target\": \"%s\"}\n",
            static_cast<unsigned long long>(frames), chunks.size(), load_ms, first_ms, steady,
            1e3 * static_cast<double>(frames) / spent, info.backend, info.target);
    return frames;
}

}  // namespace

// Exit status: 0 done or stopped, 130 stopped before the first frame, 2 bad input, 1 a failure.
int main(int count, char** words) {
    for (int number : {SIGPIPE, SIGXFSZ}) std::signal(number, SIG_IGN);  // the write fails then, and is an error
    for (int number : {SIGINT, SIGTERM, SIGHUP}) {
        const auto before = std::signal(number, [](int) { stopped = 1; });
        if (number == SIGHUP && before == SIG_IGN) std::signal(number, SIG_IGN);  // as nohup wants it
    }
    try {
        Options options = parse(count, words);
        set_threads(options);
        if (!options.quiet)
            options.settings.log = [](void* said, int level, const char* text) {
                // Each line once: a prompt is checked, and set again when it is due.
                if (level <= GREEDY_LOG_INFO && static_cast<std::set<std::string>*>(said)->insert(text).second)
                    std::fprintf(stderr, "%s\n", text);
            };
        std::set<std::string> said;
        options.settings.log_cookie = &said;
        if (run(options) > 0 || !stopped) return 0;
        std::fputs("stopped before the first frame\n", stderr);
        return 130;
    } catch (const Usage& error) {
        if (!*error.what()) return std::fputs(kUsage, stdout) < 0;
        std::fprintf(stderr, "error: %s (see --help)\n", error.what());
        return 2;
    } catch (const greedy::host::OutputClosed&) {
        return 0;  // the reader has ended the stream
    } catch (const greedy::StatusError& error) {
        std::fprintf(stderr, "error: %s%s\n", error.what(), kept.c_str());
        return error.status <= GREEDY_NO_MEMORY || !kept.empty() ? 1 : 2;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: %s%s\n", error.what(), kept.c_str());
        return 1;
    }
}
