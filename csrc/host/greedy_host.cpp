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

#include <unistd.h>

#include "base/error.h"
#include "base/number.h"
#include "formats/manifest.h"
#include "greedy/greedy.hpp"
#include "host/ffmpeg.h"
#include "host/options.h"
#include "host/output.h"
#include "host/part.h"
#include "host/prompts.h"
#include "host/sinks.h"

namespace {

using greedy::host::Options;
using greedy::host::Prompt;
using greedy::host::Usage;

// A binary PPM (P6) of exactly this size.
std::vector<std::uint8_t> read_ppm(const std::string& path, int width, int height) {
    std::FILE* file = std::fopen(path.c_str(), "rb");
    if (!file) throw greedy::StatusError(GREEDY_NOT_FOUND, "--image: got " + path + ", expected a file that can be read");
    int w = 0, h = 0, most = 0;
    const bool header = std::fscanf(file, "P6 %d %d %d", &w, &h, &most) == 3 && std::fgetc(file) != EOF;
    std::vector<std::uint8_t> rgb(3 * static_cast<std::size_t>(width) * static_cast<std::size_t>(height));
    const bool good =
        header && w == width && h == height && most == 255 && std::fread(rgb.data(), rgb.size(), 1, file) == 1;
    std::fclose(file);
    if (!good)
        throw greedy::StatusError(GREEDY_INVALID, "--image: got " + path + ", expected a binary PPM of " + std::to_string(width) + "x" +
                    std::to_string(height) + " pixels");
    return rgb;
}

// libtorch's OpenMP library reads these once, when a plugin loads it. Without the first one an idle thread spins for
// some milliseconds before it sleeps, and takes a core from the process beside this one.
void set_threads(const Options& options) {
    setenv("OMP_WAIT_POLICY", "passive", 0);  // the user's own stays
    if (!options.threads.empty()) setenv("OMP_NUM_THREADS", options.threads.c_str(), 1);
}

volatile std::sig_atomic_t stopped = 0;    // the first signal
volatile std::sig_atomic_t losable = true;  // no file holds a frame: there is nothing to end well

// The first signal asks to end. A second one ends the process at once, or an ffmpeg that takes too long.
void on_signal(int number) {
    if (!stopped)
        stopped = number;
    else if (losable)
        _exit(128 + stopped);
    else
        greedy::host::urge_ffmpeg(number);
}

struct Shape {
    int width, height;
    double fps;
};

// Of a bundle's pictures, from its manifest alone.
Shape shape_of(const std::string& folder) {
    try {
        const greedy::core::Manifest manifest = greedy::core::read_manifest(folder);
        return {static_cast<int>(manifest.width), static_cast<int>(manifest.height), manifest.fps};
    } catch (const greedy::core::Error& error) {
        throw greedy::StatusError(error.status, error.what());
    }
}

double since(std::chrono::steady_clock::time_point begun) {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begun).count();
}

// What stderr says behind an error after which frames were kept.
std::string kept;

// What a stream came to.
struct Made {
    std::string backend, target;
    std::uint64_t frames = 0;
    std::size_t prompts = 0;  // that were due
    double load_ms = 0, first_ms = 0, spent_ms = 0;
    std::vector<double> chunk_ms;
};

void note(const Options& options, const Prompt& late, const std::string& why) {
    if (!options.quiet)
        std::fprintf(stderr, "note: %s has no effect: %s\n", greedy::host::shown(late.where).c_str(), why.c_str());
}

// Loads the bundle and writes its frames; the output has its name then.
Made stream(const Options& options, const std::vector<Prompt>& prompts, const std::vector<std::uint8_t>& picture,
            greedy::host::FrameSink& sink) {
    const auto begun = std::chrono::steady_clock::now();
    const greedy::Bundle bundle(options.bundle, &options.settings);
    Made made;
    made.load_ms = since(begun);
    made.backend = bundle.info().backend, made.target = bundle.info().target;
    greedy::Session session(bundle, options.seed);
    if (!picture.empty()) session.push_frames(picture.data(), 1);
    // Refuses a prompt that the tokenizer does not take. The first one is set last, so it counts.
    for (auto one = prompts.rbegin(); one != prompts.rend(); ++one) session.set_prompt(one->asked());
    const auto streaming = std::chrono::steady_clock::now();
    while (made.frames < options.frames && !stopped) {
        // A prompt applies from the next chunk on, so frames that are already made are shown first.
        std::size_t due = made.prompts;
        for (; due < prompts.size() && prompts[due].frame <= made.frames; ++due)
            if (due > made.prompts) {
                const std::string later = prompts[due].where == prompts[due - 1].where ? "a later " : "";
                note(options, prompts[due - 1], later + prompts[due].where + " replaces it before a chunk begins");
            }
        if (due > made.prompts)
            session.set_prompt(prompts[due - 1].asked(), options.recommit, made.frames ? options.transition : 0);
        made.prompts = due;
        const auto asked = std::chrono::steady_clock::now();
        greedy::Frame frame = session.next_frame();
        made.chunk_ms.push_back(since(asked));
        if (made.frames == 0) made.first_ms = since(begun);
        for (;;) {
            sink.write(frame->data);
            losable = options.out == "-";
            if (++made.frames == options.frames || frame->left == 0 || stopped) break;
            frame = session.next_frame();
        }
    }
    made.spent_ms = since(streaming);
    sink.close();
    return made;
}

// Returns the number of frames.
std::uint64_t run(Options options) {
    // All that can be refused is, before graphs and weights are read.
    const Shape shape = shape_of(options.bundle);
    options.frames = greedy::host::frames_of(options, shape.fps);
    const std::vector<Prompt> prompts = greedy::host::prompts_of(options, shape.fps, stopped);
    const auto sink = greedy::host::open_sink(options.out, options.format, shape.width, shape.height, shape.fps);
    Made made;
    try {
        std::vector<std::uint8_t> picture;
        if (!options.image.empty()) picture = read_ppm(options.image, shape.width, shape.height);
        made = stream(options, prompts, picture, *sink);
    } catch (...) {
        const std::string name = sink->abort();
        if (!name.empty()) kept = "; kept what was made in " + greedy::host::shown(name);
        throw;
    }
    for (std::size_t late = made.prompts; late < prompts.size() && !stopped; ++late)
        note(options, prompts[late], "prompts switch where a chunk begins, and the last one began before frame " +
                                         std::to_string(prompts[late].frame));
    if (!options.quiet)
        for (const std::string& note : sink->notes()) std::fprintf(stderr, "note: %s\n", note.c_str());
    if (!sink->digest().empty() && (std::printf("%s\n", sink->digest().c_str()) < 0 || std::fflush(stdout) != 0))
        throw std::runtime_error("checksum: got no stdout that takes it, expected one");
    const std::vector<double>& chunks = made.chunk_ms;
    double steady = 0;
    for (std::size_t i = 1; i < chunks.size(); ++i) steady += chunks[i] / static_cast<double>(chunks.size() - 1);
    using greedy::core::fixed;
    if (options.json)
        std::fprintf(stderr,
                     "{\"frames\": %llu, \"chunks\": %zu, \"load_ms\": %s, \"ttff_ms\": %s, \"ms_per_chunk\": %s, "
                     "\"fps\": %s, \"backend\": \"%s\", \"target\": \"%s\"}\n",
                     static_cast<unsigned long long>(made.frames), chunks.size(), fixed(made.load_ms, 3).c_str(),
                     fixed(made.first_ms, 3).c_str(), fixed(steady, 4).c_str(),
                     fixed(1e3 * static_cast<double>(made.frames) / made.spent_ms, 3).c_str(), made.backend.c_str(),
                     made.target.c_str());
    return made.frames;
}

}  // namespace

// Exit status: 0 done or stopped by a signal, 128 + its number before the first frame, 2 bad input, 1 a failure.
int main(int count, char** words) {
    greedy::host::hold_standard_streams();
    const auto stop = [] {
        std::fputs("stopped before the first frame\n", stderr);
        return 128 + stopped;
    };
    std::signal(SIGALRM, greedy::host::urge_ffmpeg);
    for (int number : {SIGPIPE, SIGXFSZ}) std::signal(number, SIG_IGN);  // the write fails then, and is an error
    for (int number : {SIGINT, SIGTERM, SIGHUP}) {
        const auto before = std::signal(number, on_signal);
        if (number == SIGHUP && before == SIG_IGN) std::signal(number, SIG_IGN);  // as nohup wants it
    }
    try {
        Options options = greedy::host::parse(count, words);
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
        return stop();
    } catch (const greedy::host::Stopped&) {
        return stop();
    } catch (const Usage& error) {
        if (!*error.what()) return std::fputs(greedy::host::kUsage, stdout) < 0 || std::fflush(stdout) != 0;
        std::fprintf(stderr, "error: %s (see --help)\n", error.what());
        return 2;
    } catch (const greedy::host::OutputClosed&) {
        return 0;  // the reader has ended the stream
    } catch (const greedy::StatusError& error) {
        const std::string bare = greedy_status_name(GREEDY_NO_MEMORY);  // without memory there is no line either
        const std::string line = error.what() == bare ? "memory: got none left, expected more" : error.what();
        std::fprintf(stderr, "error: %s%s\n", line.c_str(), kept.c_str());
        return error.status <= GREEDY_NO_MEMORY || !kept.empty() ? 1 : 2;
    } catch (const std::bad_alloc&) {
        std::fprintf(stderr, "error: memory: got none left, expected more%s\n", kept.c_str());
        return 1;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: %s%s\n", error.what(), kept.c_str());
        return 1;
    }
}
