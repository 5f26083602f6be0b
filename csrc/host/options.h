// The command line of greedy-host. Numbers and messages are those of `python -m engine.run`.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "greedy/greedy.h"

namespace greedy::host {

extern const char* const kUsage;
constexpr std::uint64_t kMostFrames = (std::uint64_t{1} << 53) - 1;

// A command line that cannot be read. Empty where --help asks for the usage.
struct Usage : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A text, the time or frame from which it is asked for, and the option that gave it.
struct Asked {
    std::string when, text, where;
};

// A text that is mixed into the first prompt, and its weight as it was given.
struct Mixed {
    std::string text, weight;
};

struct Options {
    std::string bundle, image, out = "-", format, prompt, prompt_file;
    bool has_prompt = false, has_file = false;
    std::vector<Asked> later;   // of --prompt-at
    std::vector<Mixed> blend;
    int transition = 0;  // chunks in which a later prompt is reached
    std::uint64_t frames = UINT64_MAX, seed = 0;
    double seconds = 0;  // 0: `frames` says when to stop
    std::string threads;  // empty: as the environment says
    bool recommit = true, json = false, quiet = false;
    greedy_settings settings;
};

// How many frames a command line asks for at a rate. Throws StatusError for more than a counter holds.
std::uint64_t frames_of(const Options& options, double fps);

// Throws Usage, and StatusError for a number out of range.
Options parse(int count, char** words);

// A text as Python's repr shows it.
std::string quoted(const std::string& text);

// A sign and ASCII digits, nothing else. False for another text and for a number below 0 or above `most`.
bool read_whole(const std::string& text, std::uint64_t most, std::uint64_t& value);
// A finite decimal number in ASCII, such as -1, .5 or 1e3.
bool read_real(const std::string& text, double& value);

}  // namespace greedy::host
