#include "host/prompts.h"

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "base/error.h"
#include "base/utf8.h"
#include "greedy/greedy.hpp"
#include "host/output.h"
#include "text/cleaning.h"
#include "text/text.h"

namespace greedy::host {
namespace {

constexpr std::size_t kMostBytes = std::size_t{16} << 20;  // of a file
constexpr std::size_t kExcerpt = 40;                       // characters of a prompt that a message quotes

[[noreturn]] void fail(const std::string& where, const std::string& got, const std::string& expected,
                       int status = GREEDY_INVALID) {
    throw StatusError(status, where + ": got " + got + ", expected " + expected);
}

// Python's str.isspace.
bool is_space(std::string_view text) {
    for (const core::Character& one : core::characters(text))
        if (!core::is_python_space(one.code)) return false;
    return true;
}

// The first characters as Python's ascii shows them.
std::string excerpt(const std::string& text) {
    std::u32string start = core::to_utf32(text);
    start.resize(std::min(start.size(), kExcerpt));
    const char mark = start.find(U'\'') != start.npos && start.find(U'"') == start.npos ? '"' : '\'';
    std::string out(1, mark);
    for (const char32_t c : start) {
        char escaped[16];
        std::snprintf(escaped, sizeof escaped, c < 0x100 ? "\\x%02x" : c < 0x10000 ? "\\u%04x" : "\\U%08x",
                      static_cast<unsigned>(c));
        const std::string one(1, static_cast<char>(c));
        out += c == U'\n' ? "\\n" : c == U'\t' ? "\\t" : c == U'\r' ? "\\r" : c < 32 || c > 126 ? escaped
               : one[0] == mark || c == U'\\' ? "\\" + one : one;
    }
    return out + mark;
}

void check_text(const std::string& text, const std::string& where) {
    std::string cleaned;
    try {
        cleaned = core::clean_prompt(text);
    } catch (const core::Error& error) {
        const std::string said = error.what(), start = "prompt: ";
        throw StatusError(error.status, where + ": " + (said.rfind(start, 0) == 0 ? said.substr(start.size()) : said));
    }
    if (core::is_blank(cleaned))
        fail(where, is_space(text) ? "an empty text" : excerpt(text) + ", which shows nothing", "words");
}

void check(const Prompt& prompt, std::uint64_t limit) {
    check_text(prompt.text, prompt.where);
    for (const auto& mixed : prompt.blend) check_text(mixed.first, "--blend");
    if (prompt.frame >= limit)
        fail(prompt.where, "frame " + std::to_string(prompt.frame), "one before the end at " + std::to_string(limit));
}

// 3.0s in seconds, 48f in frames; a number alone is a frame here.
std::uint64_t frame_of(const std::string& when, double fps, const std::string& where) {
    const std::string number = when.substr(0, when.size() - 1);
    std::uint64_t frame = 0;
    double seconds = 0;
    if (!when.empty() && when.back() == 's') {
        // To even from half-way, as Python rounds.
        if (read_real(number, seconds) && (seconds = std::nearbyint(seconds * fps)) >= 0 &&
            seconds <= static_cast<double>(kMostFrames))
            return static_cast<std::uint64_t>(seconds);
    } else if (read_whole(!when.empty() && when.back() == 'f' ? number : when, kMostFrames, frame)) {
        return frame;
    }
    fail(where, quoted(when), "a time such as 3.0s or a frame such as 48f");
}

std::string read_all(const std::string& name, const std::string& where, const volatile std::sig_atomic_t& stopped) {
    const auto failed = [&] {
        const int status = errno == ENOENT ? GREEDY_NOT_FOUND : GREEDY_INVALID;
        fail(where, std::strerror(errno), "a text file", status);
    };
    if (name.empty()) fail(where, "an empty name", "a text file");
    if (name == "-" && !was_open(STDIN_FILENO)) fail(where, "stdin closed", "a text file");
    // Without O_NONBLOCK a FIFO waits in open, where a signal restarts the call; poll below waits for its writer too.
    const int file = name == "-" ? dup(STDIN_FILENO) : open(name.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (file < 0) failed();
    std::string data(kMostBytes + 1, '\0');
    std::size_t size = 0;
    while (size < data.size()) {
        pollfd one{file, POLLIN, 0};
        const int ready = poll(&one, 1, 1000);  // unlike read, a signal ends it; one just before it is seen a second later
        if (stopped) throw Stopped();
        if (ready < 0 && errno != EINTR) failed();
        if (ready <= 0) continue;
        const ssize_t count = read(file, data.data() + size, data.size() - size);
        if (count < 0 && (errno == EINTR || errno == EAGAIN)) continue;
        if (count < 0) failed();
        if (count == 0) break;
        size += static_cast<std::size_t>(count);
    }
    close(file);
    if (size > kMostBytes) fail(where, "more than " + std::to_string(kMostBytes >> 20) + " MB", "a text file");
    data.resize(size);
    return data;
}

// Units of UTF-16 or UTF-32 behind a mark, as UTF-8. `bad` is the offset of the first malformed one, or the size.
std::string from_wide(const std::string& data, std::size_t mark, std::size_t unit, bool big, std::size_t& bad) {
    const auto at = [&](std::size_t i) {
        std::uint32_t value = 0;
        for (std::size_t k = 0; k < unit; ++k)
            value = value << 8 | static_cast<unsigned char>(data[i + (big ? k : unit - 1 - k)]);
        return value;
    };
    std::string text;
    for (bad = mark; bad < data.size();) {
        if (bad + unit > data.size()) return text;
        std::uint32_t code = at(bad);
        std::size_t length = unit;
        if (unit == 2 && code >= 0xD800 && code < 0xDC00) {
            const std::uint32_t low = bad + 4 <= data.size() ? at(bad + 2) : 0;
            if (low < 0xDC00 || low > 0xDFFF) return text;
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
            length = 4;
        } else if ((code >= 0xD800 && code < 0xE000) || code > 0x10FFFF) {
            return text;
        }
        core::append_utf8(code, text);
        bad += length;
    }
    return text;
}

// The text of UTF-8, or of UTF-16 or UTF-32 with its mark, as UTF-8.
std::string decoded(const std::string& data, const std::string& where) {
    const auto marked = [&](std::string_view mark) { return data.compare(0, mark.size(), mark) == 0; };
    using namespace std::string_view_literals;
    std::string text;
    std::size_t bad = 0;
    const char* kind = "UTF-8";
    if (marked("\xFF\xFE\0\0"sv) || marked("\0\0\xFE\xFF"sv)) {
        kind = "UTF-32";
        text = from_wide(data, 4, 4, data[0] == '\0', bad);
    } else if (marked("\xFF\xFE"sv) || marked("\xFE\xFF"sv)) {
        kind = "UTF-16";
        text = from_wide(data, 2, 2, data[0] == '\xFE', bad);
    } else {
        const std::size_t begin = marked("\xEF\xBB\xBF"sv) ? 3 : 0;
        for (bad = begin; bad < data.size();) {
            const std::size_t length = core::utf8_length(std::string_view(data).substr(bad));
            if (length == 0) break;
            bad += length;
        }
        text = data.substr(begin, bad - begin);
    }
    if (bad < data.size()) {
        char got[64];
        std::snprintf(got, sizeof got, "byte 0x%02x at %zu, which is no %s", static_cast<unsigned char>(data[bad]), bad,
                      kind);
        fail(where, got, "text in UTF-8");
    }
    if (text.find('\0') != std::string::npos) fail(where, "a NUL character", "a text file in UTF-8");
    return text;
}

// Python's str.splitlines.
std::vector<std::string> lines_of(const std::string& text) {
    std::vector<std::string> lines;
    std::string line;
    const std::vector<core::Character> all = core::characters(text);
    for (std::size_t i = 0; i < all.size(); ++i) {
        const std::uint32_t code = all[i].code;
        if ((code >= 0x0A && code <= 0x0D) || (code >= 0x1C && code <= 0x1E) || code == 0x85 || code == 0x2028 ||
            code == 0x2029) {
            if (code == '\r' && i + 1 < all.size() && all[i + 1].code == '\n') ++i;
            lines.push_back(std::exchange(line, {}));
        } else {
            line += all[i].bytes;
        }
    }
    if (!line.empty()) lines.push_back(line);
    return lines;
}

// The time at the beginning of a line such as "[3.0s] a circle", which then loses it; empty if there is none.
std::string take_time(std::string& line) {
    std::size_t begin = 0;
    for (const core::Character& one : core::characters(line)) {
        if (!core::is_python_space(one.code)) break;
        begin += one.bytes.size();
    }
    if (begin >= line.size() || line[begin] != '[') return {};
    std::size_t at = begin + 1;
    if (at < line.size() && (line[at] == '+' || line[at] == '-')) ++at;
    const std::size_t end = line.find_first_not_of("0123456789.", at);
    if (end == line.npos || end == at || (line[end] != 's' && line[end] != 'f') || line[end + 1] != ']') return {};
    const std::string time = line.substr(begin + 1, end - begin);
    line.erase(0, end + 2);
    return time;
}

std::vector<Prompt> in_file(const std::string& name, double fps, const volatile std::sig_atomic_t& stopped) {
    const std::string where = "--prompt-file " + name;
    const std::string text = decoded(read_all(name, where, stopped), where);
    std::vector<Prompt> found = {{0, "", where}};
    std::size_t number = 0;
    bool first = true;
    for (std::string& line : lines_of(text)) {
        ++number;
        if (const std::string time = take_time(line); !time.empty()) {
            const std::string at = where + " line " + std::to_string(number);
            found.push_back({frame_of(time, fps, at), "", at});
            first = true;
        }
        found.back().text += (first ? "" : "\n") + line;
        first = false;
    }
    if (found.size() > 1 && is_space(found[0].text)) found.erase(found.begin());  // the first line has a time
    if (std::all_of(found.begin(), found.end(), [](const Prompt& prompt) { return prompt.frame > 0; }))
        fail(found[0].where, "a first prompt at frame " + std::to_string(found[0].frame), "one at [0f]");
    return found;
}

Session::Texts blend_of(const std::vector<Mixed>& given) {
    Session::Texts found;
    double sum = 0;
    for (const Mixed& one : given) {
        double weight = 0;
        if (!read_real(one.weight, weight) || !(weight > 0))
            fail("--blend", "weight " + quoted(one.weight), "a number above 0");
        sum += weight;
        found.emplace_back(one.text, weight);
    }
    if (!std::isfinite(sum)) fail("--blend", "weights without a finite sum", "smaller ones");
    return found;
}

}  // namespace

Session::Texts Prompt::asked() const {
    Session::Texts texts = {{text, 1}};
    texts.insert(texts.end(), blend.begin(), blend.end());
    return texts;
}

std::vector<Prompt> prompts_of(const Options& options, double fps, const volatile std::sig_atomic_t& stopped) {
    std::vector<Prompt> prompts = {{0, options.prompt, "--prompt", blend_of(options.blend)}};
    if (options.has_file) prompts = in_file(options.prompt_file, fps, stopped);
    for (const Asked& one : options.later)
        prompts.push_back({frame_of(one.when, fps, "--prompt-at"), one.text, one.where});
    for (const Prompt& prompt : prompts) check(prompt, options.frames);
    std::stable_sort(prompts.begin(), prompts.end(),
                     [](const Prompt& a, const Prompt& b) { return a.frame < b.frame; });
    return prompts;
}

}  // namespace greedy::host
