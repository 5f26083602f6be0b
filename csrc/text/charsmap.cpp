#include "text/charsmap.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "text/text.h"

namespace greedy::core {
namespace {

constexpr std::size_t kMostReplaced = 64;  // bytes; a character of (U)MT5 becomes 33 at most

std::string from_base64(const std::string& text, const std::string& where) {
    constexpr std::string_view kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    std::string out;
    std::uint32_t bits = 0;
    int count = 0;
    for (char c : std::string_view(text).substr(0, text.find('='))) {
        const std::size_t digit = kDigits.find(c);
        if (digit == std::string_view::npos) fail(GREEDY_BAD_BUNDLE, where, "no base64", "it");
        bits = bits << 6 | static_cast<std::uint32_t>(digit);
        if ((count += 6) >= 8) out += static_cast<char>(bits >> (count -= 8) & 0xFF);
    }
    return out;
}

}  // namespace

Charsmap::Charsmap(const std::string& base64, const std::string& where) {
    const std::string bytes = from_base64(base64, where);
    const auto word = [&](std::size_t at) {
        std::uint32_t value = 0;
        for (int i = 3; i >= 0; --i) value = value << 8 | static_cast<unsigned char>(bytes[at + i]);
        return value;
    };
    if (bytes.size() < 8)
        fail(GREEDY_BAD_BUNDLE, where, std::to_string(bytes.size()) + " bytes", "a map of characters");
    const std::uint32_t size = word(0);
    if (size % 4 || size == 0 || size > bytes.size() - 4)
        fail(GREEDY_BAD_BUNDLE, where, "a trie of " + std::to_string(size) + " bytes", "one that fits");
    for (std::size_t at = 4; at < 4 + std::size_t{size}; at += 4) trie_.push_back(word(at));
    values_ = bytes.substr(4 + std::size_t{size});
    for (std::size_t at = 0; at < values_.size(); ++at) {
        const std::size_t end = std::min(values_.find('\0', at), values_.size());
        if (end - at > kMostReplaced)
            fail(GREEDY_BAD_BUNDLE, where, "a character that becomes " + std::to_string(end - at) + " bytes",
                 "at most " + std::to_string(kMostReplaced));
        at = end;
    }
}

const char* Charsmap::find(std::string_view text) const {
    const auto offset = [](std::uint32_t unit) { return (unit >> 10) << ((unit & 0x200) >> 6); };
    std::uint32_t node = offset(trie_[0]);
    for (char c : text) {
        const std::uint32_t label = static_cast<unsigned char>(c);
        node ^= label;
        if (label == 0 || node >= trie_.size() || (trie_[node] & 0x800000FF) != label) return nullptr;
        const std::uint32_t unit = trie_[node];
        node ^= offset(unit);
        if (!(unit >> 8 & 1)) continue;
        const std::uint32_t value = node < trie_.size() ? trie_[node] & 0x7FFFFFFF : 0xFFFFFFFF;
        return value < values_.size() ? values_.c_str() + value : nullptr;
    }
    return nullptr;
}

std::string Charsmap::normalize(const std::string& text) const {
    std::string out;
    for (std::string_view grapheme : graphemes(text)) {
        const char* whole = grapheme.size() < 6 ? find(grapheme) : nullptr;
        if (whole) {
            out += whole;
            continue;
        }
        for (const Character& c : characters(grapheme)) {
            if (const char* one = find(c.bytes))
                out += one;
            else
                out += c.bytes;
        }
    }
    return out;
}

}  // namespace greedy::core
