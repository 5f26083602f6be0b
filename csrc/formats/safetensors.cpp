#include "formats/safetensors.h"

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "base/error.h"
#include "formats/json.h"

namespace greedy::core {
namespace {

constexpr std::uint64_t kHeaderLimit = 100'000'000;  // as in the format's own reader
constexpr std::int64_t kSizeLimit = std::int64_t{1} << 40;

struct Kind {
    const char* name;
    std::size_t bytes;
    std::optional<DType> dtype;
};
constexpr Kind kKinds[] = {
    {"F32", 4, DType::float32},
    {"F16", 2, DType::float16},
    {"BF16", 2, DType::bfloat16},
    {"F8_E4M3", 1, DType::float8},
    {"I64", 8, DType::int64},
    {"F64", 8, {}},
    {"I32", 4, {}},
    {"I16", 2, {}},
    {"I8", 1, {}},
    {"U8", 1, {}},
    {"U16", 2, {}},
    {"U32", 4, {}},
    {"U64", 8, {}},
    {"BOOL", 1, {}},
    {"F8_E5M2", 1, {}},
};

}  // namespace

std::map<std::string, StoredTensor> read_safetensors(const unsigned char* data, std::size_t size,
                                                     const std::string& where) {
    const auto refuse = [&](const std::string& got, const std::string& expected) {
        fail(GREEDY_BAD_BUNDLE, where, got, expected);
    };
    if (size < 8) refuse(std::to_string(size) + " bytes", "a safetensors file");
    std::uint64_t length = 0;
    for (int i = 7; i >= 0; --i) length = length << 8 | data[i];
    if (length > kHeaderLimit || length > size - 8)
        refuse("a header of " + std::to_string(length) + " bytes in a file of " + std::to_string(size), "less");
    const Json header = Json::parse({reinterpret_cast<const char*>(data) + 8, static_cast<std::size_t>(length)}, where,
                                    Json::kMostInLists);
    const std::uint64_t room = size - 8 - length;

    std::map<std::string, StoredTensor> tensors;
    std::vector<std::pair<std::uint64_t, std::uint64_t>> ranges;
    for (const auto& [key, entry] : header.object(where)) {
        if (key == "__metadata__") continue;
        const std::string at = where + ": " + key.substr(0, 120);
        const std::string& name = entry.at("dtype", at).string(at);
        const auto kind =
            std::find_if(std::begin(kKinds), std::end(kKinds), [&](const Kind& k) { return name == k.name; });
        if (kind == std::end(kKinds)) refuse("dtype " + name.substr(0, 20), "one of safetensors");
        const Json::Array& sizes = entry.at("shape", at).array(at);
        if (sizes.size() > Shape::kMaxRank) refuse(std::to_string(sizes.size()) + " dimensions", "at most 8");
        TensorSpec spec{key, {}, kind->dtype.value_or(DType::float32)};
        std::uint64_t bytes = kind->bytes;
        for (const Json& item : sizes) {
            const std::int64_t one = item.integer(at, 0, kSizeLimit);
            spec.shape.sizes[spec.shape.rank++] = one;
            if (__builtin_mul_overflow(bytes, static_cast<std::uint64_t>(one), &bytes))
                refuse("a shape that overflows", "one that fits the file");
        }
        const Json::Array& offsets = entry.at("data_offsets", at).array(at);
        if (offsets.size() != 2) refuse(std::to_string(offsets.size()) + " offsets", "two");
        const std::uint64_t begin = offsets[0].unsigned_integer(at), end = offsets[1].unsigned_integer(at);
        if (begin > end || end > room || end - begin != bytes)
            refuse("offsets " + std::to_string(begin) + " to " + std::to_string(end),
                   std::to_string(bytes) + " bytes within " + std::to_string(room));
        ranges.emplace_back(begin, end);
        if (kind->dtype) tensors.emplace(key, StoredTensor{spec, data + 8 + length + begin});
    }
    std::sort(ranges.begin(), ranges.end());
    std::uint64_t done = 0;
    for (const auto& [begin, end] : ranges) {
        if (begin != done) refuse("tensors with a gap or an overlap at byte " + std::to_string(begin), "none");
        done = end;
    }
    if (done != room) refuse(std::to_string(room - done) + " bytes after the last tensor", "none");
    return tensors;
}

}  // namespace greedy::core
