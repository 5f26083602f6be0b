#include "text/cleaning.h"

#include <algorithm>

#include "base/error.h"
#include "base/utf8.h"
#include "text/html.h"
#include "text/mojibake.h"
#include "text/normal.h"
#include "text/text.h"

namespace greedy::core {
namespace {

// Printable ASCII without ampersands, which nothing but folding changes.
bool is_plain(const std::string& text) {
    return std::all_of(text.begin(), text.end(), [](char c) { return c >= ' ' && c <= '~' && c != '&'; });
}

// A line until nothing changes, as ftfy.fix_and_explain.
std::u32string fix_line(std::u32string text, bool entities, bool encoding) {
    for (;;) {
        std::u32string next = entities ? unescape_strictly(text) : text;
        if (encoding) next = fix_encoding(std::move(next));
        next = normal_form_c(fix_characters(next));
        if (next == text) return text;
        text = std::move(next);
    }
}

// ftfy.fix_text, or only its steps for single characters.
std::u32string fix_text(const std::u32string& text, bool whole) {
    std::u32string out;
    bool entities = whole;
    for (std::size_t at = 0; at < text.size();) {
        const std::size_t found = text.find(U'\n', at);
        const std::size_t end = found == std::u32string::npos ? text.size() : found + 1;
        std::u32string line = text.substr(at, end - at);
        // Text with tags has its entities on purpose: from here on they stay for html.unescape.
        entities = entities && line.find(U'<') == std::u32string::npos;
        out += fix_line(std::move(line), entities, whole);
        at = end;
    }
    return out;
}

// Counts before anything is copied.
void check_length(const std::string& text) {
    const auto count = static_cast<std::size_t>(
        std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }));
    if (count > kMostCharacters || text.size() > 4 * kMostCharacters)
        fail(GREEDY_INVALID, "prompt", std::to_string(count) + " characters",
             "at most " + std::to_string(kMostCharacters));
}

void check_garbled(const std::u32string& text) {
    if (text.size() <= kMostGarbled) return;
    const auto marks = static_cast<std::size_t>(std::count_if(text.begin(), text.end(), is_combining));
    const auto slow = [](const std::u32string& one) { return has_entity(one) || is_garbled(one); };
    if (marks > kMostGarbled || slow(text) || slow(fix_text(text, false)))
        fail(GREEDY_INVALID, "prompt",
             std::to_string(text.size()) + " characters with HTML entities, garbled text or combining marks",
             "at most " + std::to_string(kMostGarbled));
}

}  // namespace

std::string clean_prompt(const std::string& prompt) {
    check_length(prompt);
    std::string text = prompt;
    if (!is_plain(prompt)) {
        const std::u32string codes = to_utf32(prompt);
        check_garbled(codes);
        text = unescape(unescape(to_utf8(fix_text(codes, true))));
    }
    std::string out;
    bool gap = false;
    for (const Character& c : characters(text)) {
        const bool space = is_python_space(c.code);
        if (!space) {
            if (gap && !out.empty()) out += ' ';
            out += c.bytes;
        }
        gap = space;
    }
    return out;
}

bool is_blank(const std::string& prompt) {
    const std::vector<Character> all = characters(prompt);
    return std::all_of(all.begin(), all.end(), [](const Character& c) { return is_invisible(c.code); });
}

}  // namespace greedy::core
