#include "text/text.h"

#include <algorithm>
#include <cstring>
#include <iterator>

#include "base/utf8.h"

namespace greedy::core {
namespace {

struct Run {
    std::uint32_t first, last, kind;
};
struct Lower {
    std::uint32_t code;
    const char* text;
};
struct Entity {
    const char *name, *text;  // the name, with its semicolon if it has one
};
#include "text/text_tables.inc"

enum Class : std::uint32_t { kWord = 1, kSpace = 2, kPythonSpace = 4 };

template <std::size_t N>
std::uint32_t kind_of(const Run (&runs)[N], std::uint32_t code) {
    const Run* found = std::upper_bound(std::begin(runs), std::end(runs), code,
                                        [](std::uint32_t value, const Run& run) { return value < run.first; });
    return found != std::begin(runs) && code <= found[-1].last ? found[-1].kind : 0;
}

enum Break : std::uint32_t {
    kOther,
    kCR,
    kLF,
    kControl,
    kExtend,
    kZWJ,
    kRegional,
    kPrepend,
    kMark,
    kL,
    kV,
    kT,
    kLV,
    kLVT
};
enum Conjunct : std::uint32_t { kNoConjunct, kConsonant, kConjunctExtend, kLinker };

// The text before a possible boundary, apart from the last character.
struct Before {
    Break last = kOther;
    bool pictogram = false;  // Extended_Pictographic Extend* ZWJ?
    bool consonant = false;  // Consonant [Extend Linker]*
    bool linker = false;     // one of these is a linker
    int regional = 0;        // regional indicators in a row
};

bool breaks(const Before& before, std::uint32_t kind) {
    const Break a = before.last, b = static_cast<Break>(kind & 31);
    if (a == kCR && b == kLF) return false;                                                           // GB3
    if (a == kCR || a == kLF || a == kControl || b == kCR || b == kLF || b == kControl) return true;  // GB4, GB5
    if (a == kL && (b == kL || b == kV || b == kLV || b == kLVT)) return false;                       // GB6
    if ((a == kLV || a == kV) && (b == kV || b == kT)) return false;                                  // GB7
    if ((a == kLVT || a == kT) && b == kT) return false;                                              // GB8
    if (b == kExtend || b == kZWJ || b == kMark || a == kPrepend) return false;                       // GB9, 9a, 9b
    if (before.consonant && before.linker && kind >> 6 == kConsonant) return false;                   // GB9c
    if (before.pictogram && a == kZWJ && (kind & 32)) return false;                                   // GB11
    return !(a == kRegional && b == kRegional && before.regional % 2 == 1);                           // GB12, 13
}

void advance(Before& before, std::uint32_t kind) {
    const Break b = static_cast<Break>(kind & 31);
    const std::uint32_t conjunct = kind >> 6;
    before.pictogram = (kind & 32) || (before.pictogram && before.last != kZWJ && (b == kExtend || b == kZWJ));
    if (conjunct == kConsonant)
        before.consonant = true, before.linker = false;
    else if (conjunct == kLinker)
        before.linker = before.consonant;
    else if (conjunct != kConjunctExtend)
        before.consonant = before.linker = false;
    before.regional = b == kRegional ? before.regional + 1 : 0;
    before.last = b;
}

const Entity* find_entity(std::string_view name) {
    const Entity* found = std::lower_bound(std::begin(kEntities), std::end(kEntities), name,
                                           [](const Entity& entity, std::string_view n) { return entity.name < n; });
    return found != std::end(kEntities) && found->name == name ? found : nullptr;
}

// Windows-1252 in place of C1 controls, as browsers do and html.unescape after them.
constexpr std::uint16_t kWindows[32] = {0x20AC, 0x81,   0x201A, 0x0192, 0x201E, 0x2026, 0x2020, 0x2021,
                                        0x02C6, 0x2030, 0x0160, 0x2039, 0x0152, 0x8D,   0x017D, 0x8F,
                                        0x90,   0x2018, 0x2019, 0x201C, 0x201D, 0x2022, 0x2013, 0x2014,
                                        0x02DC, 0x2122, 0x0161, 0x203A, 0x0153, 0x9D,   0x017E, 0x0178};

// The character of &#...; empty if there is no such character.
void append_numbered(std::uint64_t code, std::string& out) {
    if (code == 0 || (code >= 0xD800 && code <= 0xDFFF) || code > 0x10FFFF) return append_utf8(0xFFFD, out);
    if (code == 0x0D) return append_utf8(code, out);
    if (code >= 0x80 && code < 0xA0) return append_utf8(kWindows[code - 0x80], out);
    const bool control = code < 9 || code == 0x0B || (code >= 0x0E && code < 0x20) || code == 0x7F;
    const bool none = control || (code >= 0xFDD0 && code < 0xFDF0) || (code & 0xFFFE) == 0xFFFE;
    if (!none) append_utf8(static_cast<std::uint32_t>(code), out);
}

// Appends the text of the entity at the ampersand `at` and returns the end of the entity. Without one returns `at`.
std::size_t numbered(const std::string& text, std::size_t at, std::string& out) {
    std::size_t i = at + 2;
    const bool hex = i < text.size() && (text[i] == 'x' || text[i] == 'X');
    i += hex;
    std::uint64_t code = 0;
    const std::size_t begin = i;
    for (; i < text.size(); ++i) {
        const char c = text[i];
        const int lower = c | 32;
        const int digit = c >= '0' && c <= '9' ? c - '0' : hex && lower >= 'a' && lower <= 'f' ? lower - 'a' + 10 : -1;
        if (digit < 0) break;
        code = std::min<std::uint64_t>(code * (hex ? 16 : 10) + digit, 0x110000);
    }
    if (i == begin) return at;
    append_numbered(code, out);
    return i + (i < text.size() && text[i] == ';');
}

std::size_t named(const std::string& text, std::size_t at, std::string& out) {
    const std::vector<Character> rest = characters(std::string_view(text).substr(at + 1));
    std::size_t size = 0;
    for (std::size_t count = 0; count < rest.size() && count < 32; ++count) {
        if (std::strchr("\t\n\f <&#;", static_cast<char>(rest[count].code)) && rest[count].code < 128) break;
        size += rest[count].bytes.size();
    }
    if (size == 0) return at;
    const std::size_t semicolon = text[at + 1 + size] == ';';  // a string ends with a zero
    const std::string_view whole = std::string_view(text).substr(at + 1, size + semicolon);
    for (std::size_t length = whole.size(); length > 1; --length)
        if (const Entity* entity = find_entity(whole.substr(0, length))) {
            out += entity->text;
            return at + 1 + length;
        }
    return at;
}

// html.unescape
std::string unescape(const std::string& text) {
    std::string out;
    for (std::size_t i = 0; i < text.size();) {
        std::size_t end = i;
        if (text[i] == '&' && i + 1 < text.size())
            end = text[i + 1] == '#' ? numbered(text, i, out) : named(text, i, out);
        if (end == i) out += text[end++];
        i = end;
    }
    return out;
}

}  // namespace

std::vector<Character> characters(std::string_view text) {
    std::vector<Character> out;
    while (!text.empty()) {
        const std::size_t length = std::max<std::size_t>(utf8_length(text), 1);
        out.push_back({utf8_code(text, length), text.substr(0, length)});
        text.remove_prefix(length);
    }
    return out;
}

bool is_word(std::uint32_t code) { return kind_of(kClasses, code) & kWord; }
bool is_space(std::uint32_t code) { return kind_of(kClasses, code) & kSpace; }

std::string lower_case(std::string_view text) {
    std::string out;
    for (const Character& c : characters(text)) {
        const Lower* found = std::lower_bound(std::begin(kLower), std::end(kLower), c.code,
                                              [](const Lower& lower, std::uint32_t code) { return lower.code < code; });
        if (found != std::end(kLower) && found->code == c.code)
            out += found->text;
        else
            out += c.bytes;
    }
    return out;
}

std::vector<std::string_view> graphemes(std::string_view text) {
    std::vector<std::string_view> out;
    Before before;
    for (const Character& c : characters(text)) {
        const std::uint32_t kind = kind_of(kGraphemes, c.code);
        if (out.empty() || breaks(before, kind))
            out.push_back(c.bytes);
        else
            out.back() = {out.back().data(), out.back().size() + c.bytes.size()};
        advance(before, kind);
    }
    return out;
}

std::string clean_prompt(const std::string& prompt) {
    const std::string plain = unescape(unescape(prompt));
    std::string out;
    bool gap = false;
    for (const Character& c : characters(plain)) {
        const bool space = kind_of(kClasses, c.code) & kPythonSpace;
        if (!space) {
            if (gap && !out.empty()) out += ' ';
            out += c.bytes;
        }
        gap = space;
    }
    return out;
}

}  // namespace greedy::core
