#include "formats/manifest.h"

#include <algorithm>
#include <filesystem>
#include <initializer_list>
#include <iterator>
#include <map>
#include <set>
#include <string_view>

#include "base/error.h"
#include "base/file.h"
#include "base/number.h"

namespace greedy::core {
namespace fs = std::filesystem;
namespace {

constexpr std::size_t kManifestLimit = std::size_t{1} << 26;

constexpr std::int64_t kMostSize = 1 << 16;
constexpr std::int64_t kMostDim = std::int64_t{1} << 32;
// As engine/bundles/registry.py has them: the package whose version a bundle must name, and how graphs write caches.
struct KnownBackend {
    std::string_view name, made_with;
    bool aliases, mutates;
};
constexpr KnownBackend kBackends[] = {{"onnx", "", true, false},
                                      {"aoti", "torch", false, true},
                                      {"tensorrt", "", true, true},
                                      {"tensorrt_rtx", "", true, true}};
// By version: 1, 2.
constexpr RowNames kRowNames[] = {{"write_idx", "kv_len"}, {"start_row", "valid_rows"}};
constexpr std::int64_t kNewest = std::size(kRowNames);
constexpr std::int64_t kMostPrompt = 10'000;  // characters
constexpr std::int64_t kMostBytes = std::int64_t{1} << 44;

void expect(bool good, const std::string& where, const std::string& got, const std::string& expected) {
    if (!good) fail(GREEDY_BAD_BUNDLE, where, got, expected);
}

std::int64_t characters(const std::string& utf8) {
    return std::count_if(utf8.begin(), utf8.end(), [](char c) { return (c & 0xC0) != 0x80; });
}

// An object with these keys and no others. Keys that start with ? may be missing.
class Fields {
  public:
    Fields(const Json& values, const std::string& where, std::initializer_list<std::string_view> keys)
        : values_(values), where_(where) {
        for (const auto& member : values.object(where)) {
            const auto known = [&](std::string_view key) { return member.first == key.substr(key[0] == '?'); };
            expect(std::any_of(keys.begin(), keys.end(), known), where, "unknown key " + member.first.substr(0, 60),
                   "only known ones");
        }
        for (std::string_view key : keys)
            if (key[0] != '?') values.at(key, where);
    }

    const Json& operator[](std::string_view key) const { return values_.at(key, where_); }
    std::string at(std::string_view key) const { return where_ + "." + std::string(key); }
    std::string name(std::string_view key) const { return checked_name((*this)[key], at(key)); }
    std::int64_t size(std::string_view key) const { return (*this)[key].integer(at(key), 1, kMostSize); }

    static std::string checked_name(const Json& value, const std::string& where) {
        return checked_name(value.string(where), where);
    }
    static std::string checked_name(const std::string& name, const std::string& where) {
        const std::int64_t length = characters(name);
        expect(length >= 1 && length <= 200, where, std::to_string(length) + " characters", "1 to 200");
        expect(name.find('\0') == std::string::npos, where, "a zero byte", "none");
        return name;
    }

  private:
    const Json& values_;
    const std::string where_;
};

std::map<std::string, std::string> names_from(const Json& values, const std::string& where) {
    std::map<std::string, std::string> out;
    for (const auto& [key, value] : values.object(where)) {
        const std::string at = where + "." + key.substr(0, 60);
        out.emplace(Fields::checked_name(key, at), Fields::checked_name(value, at));
    }
    return out;
}

// A path must be relative, stay inside the bundle and have one spelling.
std::string safe_path(const std::string& path, const std::string& where) {
    Fields::checked_name(path, where);
    bool good = !path.empty() && path.front() != '/' && path.back() != '/' && path.find('\\') == std::string::npos;
    for (std::size_t begin = 0; good && begin <= path.size();) {
        const std::size_t end = std::min(path.find('/', begin), path.size());
        const std::string part = path.substr(begin, end - begin);
        good = !part.empty() && part != "." && part != "..";
        begin = end + 1;
    }
    expect(good, where, "path '" + path.substr(0, 80) + "'", "one inside the bundle");
    return path;
}

std::string checked_hash(const Json& value, const std::string& where) {
    const std::string& hash = value.string(where);
    const bool hex = hash.find_first_not_of("0123456789abcdef") == std::string::npos && hash.size() == 64;
    expect(hex, where, "sha256 '" + hash.substr(0, 64) + "'", "64 hexadecimal digits");
    return hash;
}

TensorSpec tensor_from(const Json& values, const std::string& where) {
    const Fields fields(values, where, {"name", "shape", "dtype"});
    TensorSpec spec;
    spec.name = fields.name("name");
    const Json::Array& sizes = fields["shape"].array(fields.at("shape"));
    const std::string at = fields.at("shape");
    expect(sizes.size() <= Shape::kMaxRank, at, std::to_string(sizes.size()) + " dimensions", "at most 8");
    std::int64_t bytes = 8;  // of the widest type
    for (const Json& item : sizes) {
        const std::int64_t one = item.integer(at, 1, kMostDim);
        const bool overflows = __builtin_mul_overflow(bytes, one, &bytes) || bytes > kMostBytes;
        expect(!overflows, at, "a shape of more than 2^44 bytes", "less");
        spec.shape.sizes[spec.shape.rank++] = one;
    }
    const std::string& dtype = fields["dtype"].string(fields.at("dtype"));
    for (DType kind : {DType::float32, DType::float16, DType::bfloat16, DType::float8, DType::int64}) {
        spec.dtype = kind;
        if (dtype == name_of(kind)) return spec;
    }
    fail(GREEDY_BAD_BUNDLE, fields.at("dtype"), "'" + dtype.substr(0, 60) + "'", "a type that graphs take");
}

std::vector<TensorSpec> tensors_from(const Json& values, const std::string& where) {
    std::vector<TensorSpec> out;
    const Json::Array& items = values.array(where);
    expect(items.size() <= 4096, where, std::to_string(items.size()) + " tensors", "at most 4096");
    for (const Json& item : items) out.push_back(tensor_from(item, where + "." + std::to_string(out.size())));
    return out;
}

GraphSpec graph_from(const Json& values, const std::string& where) {
    const Fields fields(values, where, {"file", "inputs", "outputs", "weights", "aliases", "?mutates", "?source"});
    GraphSpec spec;
    spec.file = safe_path(fields.name("file"), fields.at("file"));
    spec.inputs = tensors_from(fields["inputs"], fields.at("inputs"));
    spec.outputs = tensors_from(fields["outputs"], fields.at("outputs"));
    spec.weights = names_from(fields["weights"], fields.at("weights"));
    spec.aliases = names_from(fields["aliases"], fields.at("aliases"));
    if (const Json* mutates = values.find("mutates"))
        for (const Json& item : mutates->array(fields.at("mutates")))
            spec.mutates.push_back(Fields::checked_name(item, fields.at("mutates")));
    using Named = std::map<std::string_view, const TensorSpec*>;
    const auto by_name = [&](const char* side, const std::vector<TensorSpec>& tensors) {
        Named named;
        for (const TensorSpec& tensor : tensors)
            expect(named.emplace(tensor.name, &tensor).second, fields.at(side), "two tensors " + tensor.name,
                   "different names");
        return named;
    };
    const Named inputs = by_name("inputs", spec.inputs), outputs = by_name("outputs", spec.outputs);
    std::set<std::string_view> replaced;
    for (const auto& [output, name] : spec.aliases) {
        const auto made = outputs.find(output), input = inputs.find(name);
        const bool same = made != outputs.end() && input != inputs.end() &&
                          made->second->shape == input->second->shape && made->second->dtype == input->second->dtype;
        expect(same, fields.at("aliases"), output + " for " + name, "an output and an input of its shape");
        replaced.insert(name);
    }
    for (const std::string& name : spec.mutates)
        expect(inputs.count(name) > 0 && replaced.count(name) == 0, fields.at("mutates"), "'" + name + "'",
               "an input that no output replaces");
    if (const Json* source = values.find("source"); source && !source->is_null())
        checked_hash(*source, fields.at("source"));
    return spec;
}

// cpu or cuda, and up to three parts of at most 40 characters behind it: cpu-x86_64-avx2, cuda-sm89_sm120.
bool is_target(std::string_view target) {
    const std::size_t kind = std::min(target.find('-'), target.size());
    if (target.substr(0, kind) != "cpu" && target.substr(0, kind) != "cuda") return false;
    std::size_t parts = 0;
    for (std::size_t begin = kind; begin < target.size(); ++parts) {
        const std::size_t end = std::min(target.find('-', begin + 1), target.size());
        const std::string_view part = target.substr(begin + 1, end - begin - 1);
        const auto plain = [](char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_'; };
        if (part.empty() || part.size() > 40 || !std::all_of(part.begin(), part.end(), plain)) return false;
        begin = end;
    }
    return parts <= 3;
}

BackendSpec backend_from(const Json& values, const std::string& name, const std::string& where) {
    const Fields fields(values, where, {"backend", "target", "versions", "graphs"});
    BackendSpec spec;
    spec.backend = fields.name("backend");
    spec.target = fields.name("target");
    const auto known = std::find_if(std::begin(kBackends), std::end(kBackends),
                                    [&](const KnownBackend& one) { return one.name == spec.backend; });
    expect(known != std::end(kBackends), fields.at("backend"), "'" + spec.backend.substr(0, 60) + "'",
           "onnx, aoti, tensorrt or tensorrt_rtx");
    expect(is_target(spec.target), fields.at("target"), "'" + spec.target.substr(0, 60) + "'",
           "one such as cpu, cuda-sm90 or cuda-sm89_sm120");
    expect(name == spec.backend + "-" + spec.target, where, "this name", "'" + spec.backend + "-" + spec.target + "'");
    spec.versions = names_from(fields["versions"], fields.at("versions"));
    expect(known->made_with.empty() || spec.versions.count(std::string(known->made_with)) > 0, fields.at("versions"),
           "no version of " + std::string(known->made_with), "the one it was compiled with");
    for (const auto& [graph_name, graph] : fields["graphs"].object(fields.at("graphs"))) {
        const std::string at = where + ".graphs." + graph_name.substr(0, 60);
        const GraphSpec& made = spec.graphs.emplace(Fields::checked_name(graph_name, at), graph_from(graph, at)).first->second;
        expect(known->aliases || made.aliases.empty(), at + ".aliases", "aliases", "mutates, as " + spec.backend + " writes caches");
        expect(known->mutates || made.mutates.empty(), at + ".mutates", "mutates", "aliases, as " + spec.backend + " writes caches");
    }
    return spec;
}

std::map<std::string, FileSpec> files_from(const Json& values, const std::string& where) {
    std::map<std::string, FileSpec> out;
    for (const auto& [path, entry] : values.object(where)) {
        const std::string at = where + "." + path.substr(0, 80);
        const Fields fields(entry, at, {"bytes", "sha256"});
        const std::string hash = checked_hash(fields["sha256"], fields.at("sha256"));
        const auto bytes = static_cast<std::uint64_t>(fields["bytes"].integer(fields.at("bytes"), 0, kMostBytes));
        out.emplace(safe_path(path, at), FileSpec{bytes, hash});
    }
    expect(out.size() <= 100'000, where, std::to_string(out.size()) + " files", "at most 100000");
    return out;
}

}  // namespace

Manifest Manifest::parse(std::string_view text, const std::string& where) {
    const Json json = Json::parse(text, where);
    const Json* version = json.find("version");
    if (version && version->is_number()) version->integer(where + ".version", 1, kNewest);
    const Fields fields(
        json, where,
        {"format", "version", "preset_name", "preset", "transformer", "precision", "height", "width", "fps", "spatial",
         "temporal", "text_rows", "weights", "tokenizer", "?prompt_cleaning", "?decoder", "golden", "files", "backends"});
    const std::int64_t number = fields["version"].integer(fields.at("version"), 1, kNewest);
    const std::string format = fields.name("format");
    expect(format == "greedy-bundle", fields.at("format"), "'" + format.substr(0, 60) + "'", "greedy-bundle");
    Manifest out;
    out.preset_name = fields.name("preset_name");
    out.names = kRowNames[number - 1];
    out.preset = Preset::from(fields["preset"], fields.at("preset"), number);
    out.transformer = TransformerConfig::from(fields["transformer"], fields.at("transformer"));
    out.precision = fields.name("precision");
    const bool known = out.precision == "fp32" || out.precision == "fp16" || out.precision == "bf16";
    expect(known || out.precision == "fp8" || out.precision == "int8", fields.at("precision"), "'" + out.precision.substr(0, 60) + "'",
           "fp32, fp16, bf16, fp8 or int8");
    out.height = fields.size("height"), out.width = fields.size("width");
    out.spatial = fields.size("spatial"), out.temporal = fields.size("temporal");
    out.text_rows = fields.size("text_rows");
    out.fps = fields["fps"].number(fields.at("fps"));
    expect(out.fps > 0 && out.fps <= 1000, fields.at("fps"), fixed(out.fps), "more than 0, at most 1000");
    const std::int64_t high = out.spatial * out.transformer.patch_height;
    const std::int64_t wide = out.spatial * out.transformer.patch_width;
    expect(out.height % high == 0, fields.at("height"), std::to_string(out.height),
           "a multiple of " + std::to_string(high));
    expect(out.width % wide == 0, fields.at("width"), std::to_string(out.width),
           "a multiple of " + std::to_string(wide));
    out.weights = safe_path(fields.name("weights"), fields.at("weights"));
    out.tokenizer = safe_path(fields.name("tokenizer"), fields.at("tokenizer"));
    if (json.find("prompt_cleaning")) {  // of the golden prompt; text is always cleaned by today's rules
        const std::string cleaning = fields.name("prompt_cleaning");
        expect(cleaning == "html" || cleaning == "ftfy", fields.at("prompt_cleaning"),
               "'" + cleaning.substr(0, 60) + "'", "html or ftfy");
    }
    if (json.find("decoder")) {  // the graphs are called alike
        const std::string decoder = fields.name("decoder");
        expect(decoder == "full" || decoder == "tiny", fields.at("decoder"), "'" + decoder.substr(0, 60) + "'",
               "full or tiny");
    }
    out.files = files_from(fields["files"], fields.at("files"));
    const Fields golden(fields["golden"], fields.at("golden"), {"file", "prompt", "seed"});
    const std::int64_t length = characters(golden["prompt"].string(golden.at("prompt")));
    expect(length <= kMostPrompt, golden.at("prompt"), std::to_string(length) + " characters",
           "at most " + std::to_string(kMostPrompt));
    golden["seed"].unsigned_integer(golden.at("seed"));
    std::vector<std::string> named = {out.weights, safe_path(golden.name("file"), golden.at("file"))};
    for (const auto& [name, backend] : fields["backends"].object(fields.at("backends"))) {
        const std::string at = fields.at("backends") + "." + name.substr(0, 60);
        out.backends.emplace_back(Fields::checked_name(name, at), backend_from(backend, name, at));
        for (const auto& graph : out.backends.back().second.graphs) named.push_back(graph.second.file);
    }
    expect(!out.backends.empty(), fields.at("backends"), "none", "at least one");
    for (const std::string& name : named)
        expect(out.files.count(name) > 0, where, "no entry in files for " + name, "one");
    return out;
}

std::string manifest_path(const std::string& folder) { return (fs::path(folder) / "manifest.json").string(); }

Manifest read_manifest(const std::string& folder) {
    const std::string path = manifest_path(folder);
    std::error_code error;
    if (!fs::is_directory(folder, error) || !fs::exists(path, error))
        fail(GREEDY_NOT_FOUND, "bundle", folder + " without manifest.json", "a bundle");
    const FileBytes file(path);
    if (file.size() > kManifestLimit)
        fail(GREEDY_BAD_BUNDLE, path, std::to_string(file.size()) + " bytes",
             "at most " + std::to_string(kManifestLimit));
    return Manifest::parse(file.text(), path);
}

}  // namespace greedy::core
