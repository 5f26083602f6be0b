#include "text/normal.h"

#include <tuple>
#include <utility>
#include <vector>

#include "base/utf8.h"
#include "text/lookup.h"

namespace greedy::core {
namespace {

// Two characters that are composed to one.
struct Pair {
    std::uint32_t first, second, whole;
};
#include "text/normal_tables.inc"

// Hangul syllables are composed by arithmetic (Unicode 3.12).
constexpr char32_t kSyllables = 0xAC00, kL = 0x1100, kV = 0x1161, kT = 0x11A7;
constexpr char32_t kCountL = 19, kCountV = 21, kCountT = 28, kCount = kCountL * kCountV * kCountT;

constexpr char32_t kEscape = 0x1B;

// The end of /\x1b\[(\d|;)*[a-zA-Z]/ at `at`, or `at`.
std::size_t end_of_escape(const std::u32string& text, std::size_t at) {
    if (text[at] != kEscape || at + 1 >= text.size() || text[at + 1] != '[') return at;
    std::size_t i = at + 2;
    while (i < text.size() && (text[i] == ';' || kind_of(kDigits, text[i]))) ++i;
    const bool letter = i < text.size() && text[i] < 0x80 && (text[i] | 32) >= 'a' && (text[i] | 32) <= 'z';
    return letter ? i + 1 : at;
}

void decompose(char32_t code, std::u32string& out) {
    if (code >= kSyllables && code < kSyllables + kCount) {
        const char32_t index = code - kSyllables;
        out += kL + index / (kCountV * kCountT);
        out += kV + index % (kCountV * kCountT) / kCountT;
        if (index % kCountT) out += kT + index % kCountT;
    } else if (const char* parts = code < 0xC0 ? nullptr : text_of(kParts, code)) {
        out += to_utf32(parts);
    } else {
        out += code;
    }
}

// The character that two others are composed to; 0 if none is.
char32_t composed(char32_t first, char32_t second) {
    if (first >= kL && first < kL + kCountL && second >= kV && second < kV + kCountV)
        return kSyllables + ((first - kL) * kCountV + (second - kV)) * kCountT;
    const bool open = first >= kSyllables && first < kSyllables + kCount && (first - kSyllables) % kCountT == 0;
    if (open && second > kT && second < kT + kCountT) return first + (second - kT);
    const auto found = std::lower_bound(std::begin(kPairs), std::end(kPairs), std::make_pair(first, second),
                                        [](const Pair& pair, const std::pair<char32_t, char32_t>& both) {
                                            return std::tie(pair.first, pair.second) < std::tie(both.first, both.second);
                                        });
    const bool same = found != std::end(kPairs) && found->first == first && found->second == second;
    return same ? found->whole : 0;
}

}  // namespace

bool is_combining(char32_t code) { return code >= 0x300 && kind_of(kCombining, code) != 0; }

bool is_invisible(char32_t code) { return kind_of(kBlank, code) != 0; }

std::u32string fix_characters(const std::u32string& text) {
    std::u32string plain;
    for (char32_t code : text) {
        if (const char* other = code < 0x80 ? nullptr : text_of(kReplaced, code))
            plain += to_utf32(other);
        else
            plain += code == 0x2028 || code == 0x2029 ? U'\n' : code;
    }
    // Escapes are looked for between single line feeds, and control characters removed after them.
    std::u32string lines;
    for (std::size_t i = 0; i < plain.size(); ++i) {
        if (plain[i] == '\r' && i + 1 < plain.size() && plain[i + 1] == '\n') continue;
        lines += plain[i] == '\r' ? U'\n' : plain[i];
    }
    std::u32string out;
    for (std::size_t i = 0; i < lines.size();) {
        const std::size_t end = end_of_escape(lines, i);
        if (end == i && !kind_of(kRemoved, lines[i])) out += lines[i];
        i = std::max(end, i + 1);
    }
    return out;
}

std::u32string normal_form_c(const std::u32string& text) {
    if (std::all_of(text.begin(), text.end(), [](char32_t code) { return code < 0x300; })) return text;
    std::u32string parts;
    for (char32_t code : text) decompose(code, parts);
    std::vector<std::pair<std::uint32_t, char32_t>> marks;  // combining class and character
    marks.reserve(parts.size());
    for (char32_t code : parts) marks.emplace_back(code < 0x300 ? 0 : kind_of(kCombining, code), code);
    for (auto begin = marks.begin(); begin != marks.end();) {
        const auto end = std::find_if(begin, marks.end(), [](const auto& mark) { return mark.first == 0; });
        std::stable_sort(begin, end, [](const auto& a, const auto& b) { return a.first < b.first; });
        begin = end == marks.end() ? end : end + 1;
    }
    std::u32string out;
    std::size_t starter = std::u32string::npos;
    std::uint32_t last = 0;  // combining class of the last character kept since the starter
    for (const auto& [kind, code] : marks) {
        const bool adjacent = starter + 1 == out.size() && starter != std::u32string::npos;
        if (starter != std::u32string::npos && (adjacent || (last < kind && last != 0)))
            if (const char32_t whole = composed(out[starter], code)) {
                out[starter] = whole;
                continue;
            }
        out += code;
        last = kind;
        if (kind == 0) starter = out.size() - 1;
    }
    return out;
}

}  // namespace greedy::core
