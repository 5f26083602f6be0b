#include "host/options.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <locale>
#include <sstream>

#include "base/utf8.h"
#include "greedy/greedy.hpp"

namespace greedy::host {

const char* const kUsage =
    "usage: greedy-host BUNDLE --prompt TEXT [options]\n"
    "A bundle's graphs are code, which runs as this process: take BUNDLE only from where you would take a program.\n"
    "  --prompt TEXT          text to show\n"
    "  --prompt-file FILE     the same from a file, or - for stdin: UTF-8 or UTF-16. A line that begins with [3.0s] or\n"
    "                         [48f] switches the prompt there, as --prompt-at\n"
    "  --blend TEXT WEIGHT    mix another text into --prompt, whose own weight is 1; may be repeated\n"
    "  --prompt-at TIME TEXT  switch the prompt at frame 48 or 48f, or at 3.0s, where the next chunk begins; may be\n"
    "                         repeated\n"
    "  --transition N         reach every later prompt in N chunks, in equal steps; 0: at once\n"
    "  --no-recommit          keep the old prompt's keys and values when the prompt switches\n"
    "  --image FILE.ppm       start from a picture of the bundle's size\n"
    "  --frames N             stop after N frames; default: until Ctrl-C\n"
    "  --seconds S            stop after S seconds of the bundle's frame rate\n"
    "  --seed S               the same seed gives the same video (0)\n"
    "  --out TARGET           FILE.y4m, .rgb, .mp4, .mkv, .webm, .mov (with ffmpeg in PATH), - (stdout), null, checksum\n"
    "                         (-)\n"
    "  --format y4m|rgb       format of --out - (y4m)\n"
    "  --backend NAME         aoti, tensorrt, tensorrt_rtx; default: the first of the bundle that opens\n"
    "  --plugin-dir DIR       directory of the plugins; default: beside the library\n"
    "  --library-dir DIR      directory of libtorch_cpu.so; default: $GREEDY_LIBRARY_DIR, or the installed torch\n"
    "  --threads N            CPU threads; default: OMP_NUM_THREADS, else by the model's size\n"
    "  --no-verify            compare the hashes of graphs only\n"
    "  --json                 print times as the last line of stderr\n"
    "  --quiet                no log\n"
    "The output, the prompts and the picture are checked before the bundle's graphs and weights are read.\n"
    "Exit status: 0 done or stopped by a signal, or the reader of stdout has left; 128 + its number after a signal\n"
    "before the first frame; 2 bad input; 1 a failure.\n";

namespace {

constexpr std::uint64_t kMostThreads = 1024, kMostTransition = 1 << 20;

[[noreturn]] void out_of_range(const std::string& option, const std::string& got, const std::string& expected) {
    throw StatusError(GREEDY_INVALID, option + ": got " + got + ", expected " + expected);
}

bool is_whole(const std::string& text) {
    const std::size_t sign = !text.empty() && (text[0] == '+' || text[0] == '-');
    return text.size() > sign &&
           std::all_of(text.begin() + static_cast<std::ptrdiff_t>(sign), text.end(), [](char c) { return c >= '0' && c <= '9'; });
}

std::uint64_t whole(const std::string& option, const std::string& text, std::uint64_t least, std::uint64_t most,
                    const std::string& shown_as, const std::string& expected) {
    if (!is_whole(text))
        throw Usage("argument " + option + ": got " + quoted(text) + ", expected a valid integer");
    std::uint64_t value = 0;
    if (read_whole(text, most, value) && value >= least) return value;
    const std::string digits = text.substr(std::min(text.find_first_not_of("+-0"), text.size() - 1));
    out_of_range(shown_as, (text[0] == '-' && digits != "0" ? "-" : "") + digits, expected);
}

// As Python's repr shows a number.
std::string shown(double value) {
    const double size = std::fabs(value);
    const bool plain = size == 0 || (size >= 1e-4 && size < 1e16);
    char text[400];
    const auto format = plain ? std::chars_format::fixed : std::chars_format::scientific;
    const std::string out(text, std::to_chars(text, text + sizeof text, value, format).ptr);
    return out + (plain && out.find('.') == out.npos ? ".0" : "");
}

// As printf's %g shows a number in the C locale.
std::string brief(double value) {
    char text[32];
    return {text, std::to_chars(text, text + sizeof text, value, std::chars_format::general, 6).ptr};
}

double seconds_from(const std::string& option, const char* text) {
    double value = 0;
    if (!read_real(text, value)) throw Usage("argument " + option + ": got " + quoted(text) + ", expected a valid number");
    if (value <= 0) out_of_range(option, shown(value), "a positive number");
    return value;
}

// As a command line's text that is no UTF-8 is refused.
const char* in_utf8(const std::string& option, const char* text) {
    std::string shown;
    bool good = true;
    for (std::string_view rest = text; !rest.empty();) {
        const std::size_t length = core::utf8_length(rest);
        char escaped[8];
        std::snprintf(escaped, sizeof escaped, "\\udc%02x", static_cast<unsigned char>(rest[0]));
        shown += length ? std::string(rest.substr(0, length)) : escaped;
        good = good && length;
        rest.remove_prefix(length ? length : 1);
    }
    if (!good) throw Usage("argument " + option + ": got '" + shown + "', expected text in UTF-8");
    return text;
}

}  // namespace

std::string quoted(const std::string& text) {
    const char mark = text.find('\'') != std::string::npos && text.find('"') == std::string::npos ? '"' : '\'';
    std::string out(1, mark);
    for (const char c : text) {
        char escaped[8];
        std::snprintf(escaped, sizeof escaped, "\\x%02x", static_cast<unsigned char>(c));
        const bool control = (c >= 0 && c < 32) || c == 127;
        out += c == '\n' ? "\\n" : c == '\t' ? "\\t" : c == '\r' ? "\\r" : control ? escaped
               : c == mark || c == '\\'      ? std::string("\\") + c : std::string(1, c);
    }
    return out + mark;
}

bool read_whole(const std::string& text, std::uint64_t most, std::uint64_t& value) {
    if (!is_whole(text)) return false;
    value = 0;
    for (const char c : text) {
        if (c == '+' || c == '-') continue;
        const std::uint64_t digit = static_cast<std::uint64_t>(c - '0');
        if (value > (most - digit) / 10 || digit > most) return false;
        value = 10 * value + digit;
    }
    return text[0] != '-' || value == 0;
}

bool read_real(const std::string& text, double& value) {
    const std::string digits = "0123456789";
    const auto skip = [&](std::size_t at) { return std::min(text.find_first_not_of(digits, at), text.size()); };
    const std::size_t begin = !text.empty() && (text[0] == '+' || text[0] == '-');
    std::size_t at = skip(begin), count = at - begin;
    if (at < text.size() && text[at] == '.') {
        count += skip(at + 1) - (at + 1);
        at = skip(at + 1);
    }
    if (count == 0) return false;
    if (at < text.size() && (text[at] == 'e' || text[at] == 'E')) {
        at += 1 + (at + 1 < text.size() && (text[at + 1] == '+' || text[at + 1] == '-'));
        if (skip(at) == at) return false;
        at = skip(at);
    }
    std::istringstream number(text);
    number.imbue(std::locale::classic());  // strtod follows the locale
    return at == text.size() && number >> value && std::isfinite(value);
}

std::uint64_t frames_of(const Options& options, double fps) {
    if (options.seconds == 0) return options.frames;
    const double frames = std::max(1.0, std::nearbyint(options.seconds * fps));  // to even from half-way, as Python
    if (options.seconds * fps > static_cast<double>(kMostFrames + 1))
        out_of_range("--seconds", brief(options.seconds) + " at " + brief(fps) + " fps", "fewer than 2^53 frames");
    return static_cast<std::uint64_t>(frames);
}

Options parse(int count, char** words) {
    Options out;
    greedy_settings_init(&out.settings);
    for (int i = 1; i < count; ++i) {
        std::string word = words[i];
        const char* joined = nullptr;  // the value of --NAME=VALUE
        if (const std::size_t equals = word.find('='); word.rfind("--", 0) == 0 && equals != std::string::npos) {
            joined = words[i] + equals + 1;
            word.resize(equals);
        }
        const auto next = [&] {
            if (joined) return std::exchange(joined, nullptr);
            if (i + 1 >= count) throw Usage(word + ": got nothing, expected a value");
            return static_cast<const char*>(words[++i]);
        };
        const auto alone = [&](bool taken, const char* other) {
            if (taken) throw Usage("argument " + word + ": not allowed with argument " + other);
        };
        if (word == "--prompt") {
            alone(out.has_file, "--prompt-file");
            out.prompt = in_utf8(word, next());
            out.has_prompt = true;
        } else if (word == "--prompt-file") {
            alone(out.has_prompt, "--prompt");
            out.prompt_file = in_utf8(word, next());
            out.has_file = true;
        } else if (word == "--prompt-at") {
            const std::string when = in_utf8(word, next());
            out.later.push_back({when, in_utf8(word, next()), word + " " + when});
        } else if (word == "--blend") {
            const std::string text = in_utf8(word, next());
            out.blend.push_back({text, in_utf8(word, next())});
        } else if (word == "--transition")
            out.transition = static_cast<int>(whole(word, next(), 0, kMostTransition, word, "0 to 1048576"));
        else if (word == "--no-recommit")
            out.recommit = false;
        else if (word == "--image")
            out.image = next();
        else if (word == "--frames") {
            alone(out.seconds > 0, "--seconds");
            out.frames = whole(word, next(), 1, kMostFrames, word, "1 to 2^53 - 1");
        } else if (word == "--seconds") {
            alone(out.frames != UINT64_MAX, "--frames");
            out.seconds = seconds_from(word, next());
        } else if (word == "--seed")
            out.seed = whole(word, next(), 0, UINT64_MAX, word, "0 to 2^64 - 1");
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
        else if (word == "--threads") {
            const char* text = next();
            const bool below = *text == '-' || std::string_view(text).find_first_not_of("+0") == std::string_view::npos;
            const std::string expected = below ? "at least 1" : "at most " + std::to_string(kMostThreads);
            out.threads = std::to_string(whole(word, text, 1, kMostThreads, "threads", expected));
        } else if (word == "--no-verify")
            out.settings.verify = 0;
        else if (word == "--json")
            out.json = true;
        else if (word == "--quiet")
            out.quiet = true;
        else if (word == "--help" || word == "-h")
            throw Usage("");
        else if (word.rfind("-", 0) == 0 || !out.bundle.empty())
            throw Usage("got " + word + ", expected no such argument");
        else
            out.bundle = word;
        if (joined) throw Usage(word + ": got a value, expected none");
    }
    if (out.bundle.empty()) throw Usage("BUNDLE: got none, expected a directory");
    if (!out.has_prompt && !out.has_file)
        out_of_range("--prompt", "none", "a text, or --prompt-file with one");
    if (!out.blend.empty() && !out.has_prompt) out_of_range("--blend", "no --prompt to mix it with", "one");
    return out;
}

}  // namespace greedy::host
