// A strict JSON reader (RFC 8259) for manifests and tokenizers: UTF-8 only, no duplicate keys, limited depth.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace greedy::core {

class Json {
  public:
    using Array = std::vector<Json>;
    using Object = std::vector<std::pair<std::string, Json>>;  // in the order of the text

    // Commas and opening brackets of a text, those in strings too: about as many as it has values, of up to 150 bytes
    // of memory each. The same numbers stand in engine/files.py.
    static constexpr std::size_t kMostMarks = std::size_t{1} << 19;      // of a manifest: a 14B model has 50,000
    static constexpr std::size_t kMostInLists = std::size_t{1} << 21;    // of a vocabulary or a list of tensors
    static constexpr std::size_t kMostBytes = std::size_t{1} << 26;      // of a file

    // Throws Error(GREEDY_BAD_BUNDLE); `where` names the file in messages. Counts before it reads.
    static Json parse(std::string_view text, const std::string& where, std::size_t most_marks = kMostMarks);

    bool is_null() const { return std::holds_alternative<std::nullptr_t>(value_); }
    bool is_string() const { return std::holds_alternative<std::string>(value_); }
    bool is_array() const { return std::holds_alternative<Array>(value_); }
    bool is_object() const { return std::holds_alternative<Object>(value_); }
    bool is_bool() const { return std::holds_alternative<bool>(value_); }
    bool is_number() const { return std::holds_alternative<Number>(value_); }

    // Typed access; a value of another type or outside the limits throws Error with `where` in its text.
    bool boolean(const std::string& where) const;
    std::int64_t integer(const std::string& where, std::int64_t least, std::int64_t most) const;
    std::uint64_t unsigned_integer(const std::string& where) const;
    double number(const std::string& where) const;  // integers too
    const std::string& string(const std::string& where) const;
    const Array& array(const std::string& where) const;
    const Object& object(const std::string& where) const;

    // A key's value in an object. Without the key, find returns null and at throws.
    const Json* find(std::string_view key) const;
    const Json& at(std::string_view key, const std::string& where) const;

  private:
    struct Number {
        double value;
        std::uint64_t magnitude;
        bool negative, whole;  // whole: the text is an integer, and |value| is `magnitude`
    };
    friend class JsonParser;
    [[noreturn]] void refuse(const std::string& where, const std::string& expected) const;

    std::variant<std::nullptr_t, bool, Number, std::string, Array, Object> value_;
};

}  // namespace greedy::core
