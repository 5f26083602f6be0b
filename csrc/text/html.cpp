#include "text/html.h"

#include <cstring>

#include "base/error.h"
#include "base/utf8.h"
#include "text/lookup.h"

namespace greedy::core {
namespace {

#include "text/html_tables.inc"

constexpr std::size_t kMostDigits = 4300;  // int() of Python refuses more
constexpr std::size_t kLongestName = 24;   // that ftfy reads

// Windows-1252 in place of C1 controls, as browsers do and html.unescape after them.
constexpr std::uint16_t kWindows[32] = {0x20AC, 0x81,   0x201A, 0x0192, 0x201E, 0x2026, 0x2020, 0x2021,
                                        0x02C6, 0x2030, 0x0160, 0x2039, 0x0152, 0x8D,   0x017D, 0x8F,
                                        0x90,   0x2018, 0x2019, 0x201C, 0x201D, 0x2022, 0x2013, 0x2014,
                                        0x02DC, 0x2122, 0x0161, 0x203A, 0x0153, 0x9D,   0x017E, 0x0178};

// The character of &#...; nothing if there is no such character.
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
    if (!hex && i - begin > kMostDigits)
        fail(GREEDY_INVALID, "prompt", "a character's number of more than " + std::to_string(kMostDigits) + " digits",
             "a shorter one");
    append_numbered(code, out);
    return i + (i < text.size() && text[i] == ';');
}

std::size_t named(const std::string& text, std::size_t at, std::string& out) {
    const std::string_view rest = std::string_view(text).substr(at + 1);
    std::size_t size = 0;
    for (std::size_t count = 0; count < 32 && size < rest.size(); ++count) {
        if (std::memchr("\t\n\f <&#;", rest[size], 8)) break;
        size += std::max<std::size_t>(utf8_length(rest.substr(size)), 1);
    }
    if (size == 0) return at;
    const std::string_view whole = rest.substr(0, size + (size < rest.size() && rest[size] == ';'));
    for (std::size_t length = whole.size(); length > 1; --length)
        if (const char* found = text_of(kEntities, whole.substr(0, length))) {
            out += found;
            return at + 1 + length;
        }
    return at;
}

bool is_alphanumeric(char32_t code) {
    return (code >= '0' && code <= '9') || ((code | 32) >= 'a' && (code | 32) <= 'z' && code < 0x80);
}

// The end of /&#?[0-9A-Za-z]{1,24};/ at `at`, or `at`.
std::size_t end_of_entity(const std::u32string& text, std::size_t at) {
    if (text[at] != '&') return at;
    std::size_t i = at + 1;
    if (i < text.size() && text[i] == '#') ++i;
    const std::size_t begin = i;
    while (i < text.size() && i - begin <= kLongestName && is_alphanumeric(text[i])) ++i;
    return i > begin && i - begin <= kLongestName && i < text.size() && text[i] == ';' ? i + 1 : at;
}

}  // namespace

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

std::u32string unescape_strictly(const std::u32string& text) {
    std::u32string out;
    for (std::size_t i = 0; i < text.size();) {
        const std::size_t end = end_of_entity(text, i);
        if (end == i) {
            out += text[i++];
            continue;
        }
        const std::u32string whole = text.substr(i, end - i);
        i = end;
        if (whole[1] == '#') {
            // Left alone where html.unescape would leave the semicolon, or make one.
            const std::string made = unescape(to_utf8(whole));
            out += made.find(';') == std::string::npos ? to_utf32(made) : whole;
            continue;
        }
        const std::string name = to_utf8(whole).substr(1);
        const char* found = text_of(kEntities, name);
        if (!found) found = text_of(kShouted, name);
        out += found ? to_utf32(found) : whole;
    }
    return out;
}

bool has_entity(const std::u32string& text) {
    for (std::size_t i = 0; i < text.size(); ++i)
        if (end_of_entity(text, i) != i) return true;
    return false;
}

}  // namespace greedy::core
