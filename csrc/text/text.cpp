#include "text/text.h"

#include <algorithm>

#include "base/utf8.h"
#include "text/lookup.h"

namespace greedy::core {
namespace {

#include "text/text_tables.inc"

enum Class : std::uint32_t { kWord = 1, kSpace = 2, kPythonSpace = 4 };

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
bool is_python_space(std::uint32_t code) { return kind_of(kClasses, code) & kPythonSpace; }

std::string lower_case(std::string_view text) {
    std::string out;
    for (const Character& c : characters(text)) {
        if (const char* lower = text_of(kLower, c.code))
            out += lower;
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

}  // namespace greedy::core
