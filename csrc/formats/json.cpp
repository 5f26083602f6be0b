#include "formats/json.h"

#include <algorithm>
#include <charconv>
#include <limits>
#include <unordered_set>

#include "base/error.h"
#include "base/number.h"
#include "base/utf8.h"

namespace greedy::core {
namespace {

constexpr int kDepth = 64;

bool digit(char c) { return c >= '0' && c <= '9'; }

}  // namespace

class JsonParser {
  public:
    JsonParser(std::string_view text, const std::string& where) : text_(text), where_(where) {}

    Json whole() {
        Json value = parse_value(0);
        skip_space();
        if (at_ != text_.size()) refuse("the end");
        return value;
    }

  private:
    [[noreturn]] void refuse(const std::string& expected) const {
        fail(GREEDY_BAD_BUNDLE, where_, "no JSON at byte " + std::to_string(at_), expected);
    }

    char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

    void skip_space() {
        while (at_ < text_.size() && (peek() == ' ' || peek() == '\t' || peek() == '\n' || peek() == '\r')) ++at_;
    }

    bool take(char c) {
        skip_space();
        if (peek() != c || at_ >= text_.size()) return false;
        ++at_;
        return true;
    }

    Json word(std::string_view expected, Json value) {
        if (text_.substr(at_, expected.size()) != expected) refuse("a value");
        at_ += expected.size();
        return value;
    }

    Json parse_value(int depth) {
        if (depth > kDepth) refuse("at most " + std::to_string(kDepth) + " levels");
        skip_space();
        Json value;
        switch (peek()) {
            case '{':
                value.value_ = parse_object(depth);
                return value;
            case '[':
                value.value_ = parse_array(depth);
                return value;
            case '"':
                value.value_ = parse_string();
                return value;
            case 't':
                value.value_ = true;
                return word("true", std::move(value));
            case 'f':
                value.value_ = false;
                return word("false", std::move(value));
            case 'n':
                return word("null", std::move(value));
            default:
                value.value_ = parse_number();
                return value;
        }
    }

    Json::Object parse_object(int depth) {
        Json::Object members;
        ++at_;
        if (take('}')) return members;
        do {
            skip_space();
            if (peek() != '"') refuse("a key");
            std::string key = parse_string();
            if (!take(':')) refuse("a colon");
            members.emplace_back(std::move(key), parse_value(depth + 1));
        } while (take(','));
        if (!take('}')) refuse("a comma or }");
        std::unordered_set<std::string_view> seen;
        for (const auto& member : members)
            if (!seen.insert(member.first).second) refuse("every key once (" + member.first.substr(0, 60) + ")");
        return members;
    }

    Json::Array parse_array(int depth) {
        Json::Array items;
        ++at_;
        if (take(']')) return items;
        do items.push_back(parse_value(depth + 1));
        while (take(','));
        if (!take(']')) refuse("a comma or ]");
        return items;
    }

    std::uint32_t parse_hex() {
        std::uint32_t unit = 0;
        const char* first = text_.data() + at_;
        if (text_.size() - at_ < 4) refuse("four hexadecimal digits");
        const auto [end, error] = std::from_chars(first, first + 4, unit, 16);
        if (error != std::errc() || end != first + 4) refuse("four hexadecimal digits");
        at_ += 4;
        return unit;
    }

    void parse_escape(std::string& out) {
        constexpr std::string_view kNames = "\"\\/bfnrt", kValues = "\"\\/\b\f\n\r\t";
        const char name = peek();
        ++at_;
        if (name != 'u') {
            const std::size_t index = kNames.find(name);
            if (index == std::string_view::npos) refuse("an escape");
            out += kValues[index];
            return;
        }
        std::uint32_t code = parse_hex();
        if (code >= 0xD800 && code < 0xDC00 && text_.substr(at_, 2) == "\\u") {
            at_ += 2;
            const std::uint32_t low = parse_hex();
            if (low < 0xDC00 || low > 0xDFFF) refuse("a pair of surrogates");
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
        }
        if (code >= 0xD800 && code < 0xE000) refuse("a pair of surrogates");
        append_utf8(code, out);
    }

    std::string parse_string() {
        std::string out;
        for (++at_; peek() != '"';) {
            if (at_ >= text_.size()) refuse("a closing quote");
            const unsigned char c = static_cast<unsigned char>(text_[at_]);
            if (c < 0x20) refuse("no control character in a string");
            if (c == '\\') {
                ++at_;
                parse_escape(out);
            } else {
                const std::size_t length = utf8_length(text_.substr(at_));
                if (length == 0) refuse("UTF-8");
                out.append(text_.substr(at_, length));
                at_ += length;
            }
        }
        ++at_;
        return out;
    }

    void skip_digits() {
        if (!digit(peek())) refuse("a value");
        while (digit(peek())) ++at_;
    }

    Json::Number parse_number() {
        const std::size_t begin = at_;
        Json::Number number{0, 0, peek() == '-', false};
        if (number.negative) ++at_;
        const std::size_t integer = at_;
        if (peek() == '0' && at_ + 1 < text_.size() && digit(text_[at_ + 1])) refuse("no leading zero");
        skip_digits();
        const std::size_t integer_end = at_;
        if (peek() == '.') {
            ++at_;
            skip_digits();
        }
        if (peek() == 'e' || peek() == 'E') {
            ++at_;
            if (peek() == '+' || peek() == '-') ++at_;
            skip_digits();
        }
        const char* data = text_.data();
        if (at_ == integer_end)
            number.whole = std::from_chars(data + integer, data + integer_end, number.magnitude).ec == std::errc();
        if (std::from_chars(data + begin, data + at_, number.value).ec != std::errc()) refuse("a number in range");
        return number;
    }

    std::string_view text_;
    const std::string& where_;
    std::size_t at_ = 0;
};

Json Json::parse(std::string_view text, const std::string& where, std::size_t most_marks) {
    const auto marks = static_cast<std::size_t>(
        std::count_if(text.begin(), text.end(), [](char c) { return c == ',' || c == '[' || c == '{'; }));
    if (marks > most_marks)
        fail(GREEDY_BAD_BUNDLE, where, "JSON with " + std::to_string(marks) + " commas and brackets",
             "at most " + std::to_string(most_marks));
    return JsonParser(text, where).whole();
}

void Json::refuse(const std::string& where, const std::string& expected) const {
    static constexpr const char* kNames[] = {"null", "a boolean", "a number", "a string", "a list", "an object"};
    std::string got = kNames[value_.index()];
    if (const auto* text = std::get_if<std::string>(&value_)) got = "'" + text->substr(0, 60) + "'";
    if (const auto* found = std::get_if<Number>(&value_))
        got = found->whole ? (found->negative ? "-" : "") + std::to_string(found->magnitude)
                           : fixed(found->value);
    fail(GREEDY_BAD_BUNDLE, where, got, expected);
}

bool Json::boolean(const std::string& where) const {
    if (!is_bool()) refuse(where, "true or false");
    return std::get<bool>(value_);
}

std::int64_t Json::integer(const std::string& where, std::int64_t least, std::int64_t most) const {
    const Number* found = std::get_if<Number>(&value_);
    const std::string expected = "an integer from " + std::to_string(least) + " to " + std::to_string(most);
    if (!found || !found->whole || found->magnitude > std::uint64_t{std::numeric_limits<std::int64_t>::max()})
        refuse(where, expected);
    const std::int64_t value =
        found->negative ? -static_cast<std::int64_t>(found->magnitude) : static_cast<std::int64_t>(found->magnitude);
    if (value < least || value > most) refuse(where, expected);
    return value;
}

std::uint64_t Json::unsigned_integer(const std::string& where) const {
    const Number* found = std::get_if<Number>(&value_);
    if (!found || !found->whole || (found->negative && found->magnitude))
        refuse(where, "an integer from 0 to 2^64 - 1");
    return found->magnitude;
}

double Json::number(const std::string& where) const {
    if (!is_number()) refuse(where, "a number");
    return std::get<Number>(value_).value;
}

const std::string& Json::string(const std::string& where) const {
    if (!is_string()) refuse(where, "a string");
    return std::get<std::string>(value_);
}

const Json::Array& Json::array(const std::string& where) const {
    if (!is_array()) refuse(where, "a list");
    return std::get<Array>(value_);
}

const Json::Object& Json::object(const std::string& where) const {
    if (!is_object()) refuse(where, "an object");
    return std::get<Object>(value_);
}

const Json* Json::find(std::string_view key) const {
    const auto* members = std::get_if<Object>(&value_);
    if (!members) return nullptr;
    const auto found = std::find_if(members->begin(), members->end(), [&](const auto& m) { return m.first == key; });
    return found == members->end() ? nullptr : &found->second;
}

const Json& Json::at(std::string_view key, const std::string& where) const {
    object(where);
    const Json* found = find(key);
    if (!found) fail(GREEDY_BAD_BUNDLE, where, "no " + std::string(key), "it");
    return *found;
}

}  // namespace greedy::core
