// Follows ftfy's fix_encoding_and_explain step by step; see there for the reasons.
#include "text/mojibake.h"

#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "base/utf8.h"
#include "text/lookup.h"

namespace greedy::core {
namespace {

#include "text/mojibake_tables.inc"

static_assert(kStates < 256, "states are bytes");

enum Clue : std::uint8_t { kFirstOf2 = 1, kFirstOf3 = 2, kFirstOf4 = 4, kContinuation = 8, kStrict = 16 };
constexpr char32_t kUnknown = 0xFFFD;  // the sloppy encodings hold it as byte 1A

// A small number for every character, by pages of 256; 0 where none was set.
class Pages {
  public:
    void set(std::uint32_t code, std::uint8_t value) {
        std::uint16_t& page = page_of_[code >> 8];
        if (page == 0) {
            page = static_cast<std::uint16_t>(pages_.size());
            pages_.emplace_back();
        }
        pages_[page][code & 0xFF] = value;
    }
    template <std::size_t N>
    void set(const Run (&runs)[N]) {
        for (const Run& run : runs)
            for (std::uint32_t code = run.first; code <= run.last; ++code)
                set(code, static_cast<std::uint8_t>(run.kind));
    }
    std::uint8_t operator[](char32_t code) const { return pages_[page_of_[code >> 8]][code & 0xFF]; }

  private:
    std::array<std::uint16_t, 0x1100> page_of_{};
    std::vector<std::array<std::uint8_t, 256>> pages_{1};  // page 0 stays empty
};

struct Tables {
    Pages classes, clues, bytes[kEncodings];

    Tables() {
        classes.set(kClassOf);
        clues.set(kClues);
        for (std::size_t e = 0; e < kEncodings; ++e)
            for (int i = 0; i < 128; ++i) bytes[e].set(kUpperHalf[e][i], static_cast<std::uint8_t>(0x80 + i));
    }
};

const Tables& tables() {
    static const Tables made;
    return made;
}

bool is_ascii(std::u32string_view text) {
    return std::all_of(text.begin(), text.end(), [](char32_t code) { return code < 0x80; });
}

// Whether all of the text has bytes in this encoding, and these.
bool encode(std::size_t encoding, const std::u32string& text, std::string& out) {
    const Pages& bytes = tables().bytes[encoding];
    const bool sloppy = kSloppy[encoding];
    out.clear();
    for (char32_t code : text) {
        if (code < 0x80 && !(sloppy && code == 0x1A)) {
            out += static_cast<char>(code);
        } else if (sloppy && code == kUnknown) {
            out += '\x1A';
        } else {
            const std::uint8_t byte = code < 0x80 ? 0 : bytes[code];
            if (byte == 0) return false;
            out += static_cast<char>(byte);
        }
    }
    return true;
}

// The byte at an offset, or -1 behind the end.
struct Bytes {
    std::string_view text;
    int operator()(std::size_t at) const { return at < text.size() ? static_cast<unsigned char>(text[at]) : -1; }
};
bool between(int byte, int first, int last) { return byte >= first && byte <= last; }
bool among(int byte, std::string_view bytes) {
    return byte >= 0 && bytes.find(static_cast<char>(byte)) != std::string_view::npos;
}

// Length of a UTF-8 sequence at `at` whose byte A0 became a space; 0 if there is none (ALTERED_UTF8_RE).
std::size_t altered(const Bytes& byte, std::size_t at) {
    const int a = byte(at), b = byte(at + 1), c = byte(at + 2), d = byte(at + 3);
    const auto other = [](int one) { return between(one, 0x80, 0xBF) && one != 0x85 && one != 0xA0; };
    const auto any = [](int one) { return between(one, 0x80, 0xBF); };
    if (among(a, "\xC2\xC3\xC5\xCE\xD0\xD9") && b == ' ') return 2;
    if (between(a, 0xE2, 0xE3) && b == ' ' && other(c)) return 3;
    if (between(a, 0xE0, 0xE3) && other(b) && c == ' ') return 3;
    const bool four = (b == ' ' && any(c) && any(d)) || (any(b) && c == ' ' && any(d)) || (any(b) && any(c) && d == ' ');
    return a == 0xF0 && four ? 4 : 0;
}

std::string restore_byte_a0(const std::string& text) {
    std::string out;
    // A lone a-grave is mostly a word, so it keeps the space behind it (A_GRAVE_WORD_RE).
    for (std::size_t i = 0; i < text.size();) {
        bool word = text.compare(i, 2, "\xC3 ") == 0;
        for (const char* next : {" ", "quele", "quela", "quilo", "s "})
            word = word && text.compare(i + 2, std::strlen(next), next) != 0;
        if (word)
            out += "\xC3\xA0 ";
        else
            out += text[i];
        i += word ? 2 : 1;
    }
    const Bytes byte{out};
    for (std::size_t i = 0; i < out.size();) {
        const std::size_t length = altered(byte, i);
        std::replace(out.begin() + i, out.begin() + i + length, ' ', '\xA0');
        i += std::max<std::size_t>(length, 1);
    }
    return out;
}

// Length of a UTF-8 or CESU-8 sequence at `at` that lost bytes; 0 if there is none (LOSSY_UTF8_RE).
std::size_t lossy(const Bytes& byte, std::size_t at) {
    const int a = byte(at), b = byte(at + 1), c = byte(at + 2), d = byte(at + 3), e = byte(at + 4), f = byte(at + 5);
    const auto lost = [](int one) { return one == 0x1A || one == '?'; };
    const auto kept = [](int one) { return between(one, 0x80, 0xBF); };
    const auto either = [](int one) { return one == 0x1A || between(one, 0x80, 0xBF); };
    if (between(a, 0xC2, 0xDF) && b == 0x1A) return 2;
    if (between(a, 0xC2, 0xC3) && b == '?') return 2;
    if (a == 0xED && between(b, 0xA0, 0xAF) && d == 0xED && between(e, 0xB0, 0xBF))
        if ((lost(c) && (lost(f) || kept(f))) || ((lost(c) || kept(c)) && lost(f))) return 6;
    if (between(a, 0xE0, 0xEF) && ((lost(b) && either(c)) || (either(b) && lost(c)))) return 3;
    if (between(a, 0xF0, 0xF4) && ((lost(b) && either(c) && either(d)) || (either(b) && lost(c) && either(d)) ||
                                   (either(b) && either(c) && lost(d))))
        return 4;
    return a == 0x1A ? 1 : 0;
}

std::string replace_lossy(const std::string& text) {
    std::string out;
    const Bytes byte{text};
    for (std::size_t i = 0; i < text.size();) {
        const std::size_t length = lossy(byte, i);
        if (length)
            out += "\xEF\xBF\xBD";
        else
            out += text[i];
        i += std::max<std::size_t>(length, 1);
    }
    return out;
}

// The text of UTF-8 bytes, CESU-8 and Java's zero included; none if they are malformed. As in ftfy, whose patterns end
// in $, a line feed at the end of the text stands in for the last byte of such a sequence.
std::optional<std::u32string> decode(std::string_view text) {
    const bool variants = text.find_first_of("\xED\xC0") != std::string_view::npos;
    std::u32string out;
    const Bytes byte{text};
    for (std::size_t i = 0; i < text.size();) {
        if (const std::size_t length = utf8_length(text.substr(i))) {
            out += utf8_code(text.substr(i), length);
            i += length;
            continue;
        }
        const auto last = [&](std::size_t at) {
            return between(byte(at), 0x80, 0xBF) || (byte(at) == '\n' && at + 1 == text.size());
        };
        const int b = byte(i + 1), c = byte(i + 2), d = byte(i + 3), e = byte(i + 4), f = byte(i + 5);
        if (variants && byte(i) == 0xC0 && (b == 0x80 || (b == '\n' && i + 2 == text.size()))) {
            out += U'\0';
            i += 2;
        } else if (variants && byte(i) == 0xED && between(b, 0xA0, 0xAF) && between(c, 0x80, 0xBF) && d == 0xED &&
                   between(e, 0xB0, 0xBF) && last(i + 5)) {
            out += static_cast<char32_t>(((b & 0x0F) << 16) + ((c & 0x3F) << 10) + ((e & 0x0F) << 6) + (f & 0x3F)) +
                   0x10000;
            i += 6;
        } else {
            return std::nullopt;
        }
    }
    return out;
}

// End of the run of UTF-8 sequences, each decoded as single bytes, that begins at `at`; `at` if there is none
// (UTF8_DETECTOR_RE).
std::size_t end_of_run(const std::u32string& text, std::size_t at) {
    const Pages& clues = tables().clues;
    if (at > 0 && (clues[text[at - 1]] & kStrict)) return at;
    for (;;) {
        const auto fits = [&](Clue first, std::size_t length) {
            if (at + length > text.size() || !(clues[text[at]] & first)) return false;
            for (std::size_t i = 1; i < length; ++i)
                if (!(clues[text[at + i]] & kContinuation)) return false;
            return true;
        };
        if (fits(kFirstOf2, 2))
            at += 2;
        else if (fits(kFirstOf3, 3))
            at += 3;
        else if (fits(kFirstOf4, 4))
            at += 4;
        else
            return at;
    }
}

std::u32string decode_inconsistent(const std::u32string& text) {
    std::u32string out;
    for (std::size_t i = 0; i < text.size();) {
        const std::size_t end = end_of_run(text, i);
        if (end == i) {
            out += text[i++];
            continue;
        }
        std::u32string run = text.substr(i, end - i);
        // Only a shorter text, or this would not end.
        const bool bad = run.size() < text.size() && is_garbled(run);
        out += bad ? fix_encoding(std::move(run)) : run;
        i = end;
    }
    return out;
}

// Latin-1 read as Windows-1252. The sloppy kind keeps what Windows-1252 lacks, the strict one returns none there.
std::optional<std::u32string> as_windows(const std::u32string& text, bool sloppy) {
    std::u32string out = text;
    for (char32_t& code : out) {
        if (code < 0x80 || code >= 0xA0) continue;
        const char32_t windows = kWindows1252[code - 0x80];
        if (!windows && !sloppy) return std::nullopt;
        code = windows ? windows : code;
    }
    return out;
}

std::u32string one_step(const std::u32string& text) {
    if (is_ascii(text) || !is_garbled(text)) return text;
    std::string bytes;
    for (std::size_t encoding = 0; encoding < kEncodings; ++encoding) {
        if (!encode(encoding, text, bytes)) continue;
        if (encoding != kMacRoman) bytes = restore_byte_a0(bytes);
        if (kSloppy[encoding]) bytes = replace_lossy(bytes);
        if (std::optional<std::u32string> fixed = decode(bytes)) return *fixed;
    }
    if (std::u32string fixed = decode_inconsistent(text); fixed != text) return fixed;
    if (std::all_of(text.begin(), text.end(), [](char32_t code) { return code < 0x100; }))
        if (const auto fixed = as_windows(text, false); fixed && *fixed != text) return *fixed;
    return *as_windows(text, true);
}

}  // namespace

bool is_garbled(std::u32string_view text) {
    const Pages& classes = tables().classes;
    std::size_t state = 0;
    for (char32_t code : text)
        if ((state = kNext[state][classes[code]]) == kStates) return true;
    return false;
}

std::u32string fix_encoding(std::u32string text) {
    for (;;) {
        std::u32string next = one_step(text);
        if (next == text) return text;
        text = std::move(next);
    }
}

}  // namespace greedy::core
