// core_test VECTORS MANIFEST checks schedules, solvers and position tables against vectors that tests/csrc/test_csrc_core.py
// wrote with the engine. A line is a JSON object; floats are their bits, as integers. Tests without vectors come first.
#include <cmath>
#include <cstring>
#include <ctime>
#include <fstream>
#include <iterator>
#include <set>

#include "base/error.h"
#include "base/file.h"
#include "base/finite.h"
#include "base/half.h"
#include "base/sha256.h"
#include "check.h"
#include "core/schedule.h"
#include "core/session.h"
#include "formats/json.h"
#include "formats/manifest.h"
#include "formats/safetensors.h"
#include "runtime/rope.h"
#include "text/cleaning.h"
#include "text/text.h"
#include "text/tokenizer.h"

namespace {

using namespace greedy::core;

std::vector<float> floats(const Json& list) {
    std::vector<float> out;
    for (const Json& item : list.array("vector"))
        out.push_back(float_of(static_cast<std::uint32_t>(item.unsigned_integer("bits"))));
    return out;
}

double double_of(const Json& item) {
    const std::uint64_t bits = item.unsigned_integer("bits");
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

std::string text_of(const char* path) {
    std::ifstream file(path);
    return {std::istreambuf_iterator<char>(file), {}};
}

template <typename Values>
void same_bits(const Values& got, const std::vector<float>& expected, const std::string& what) {
    std::size_t differing = got.size() == expected.size() ? 0 : 1;
    for (std::size_t i = 0; !differing && i < got.size(); ++i) differing += bits_of(got[i]) != bits_of(expected[i]);
    check(differing == 0, what + ": bits differ");
}

void test_schedule(const Json& json) {
    const Preset preset = Preset::from(json.at("preset", "vector"), "vector", 2);
    const Schedule schedule(preset);
    same_bits(schedule.sigmas(), floats(json.at("sigmas", "vector")), "sigmas");
    same_bits(schedule.timesteps(), floats(json.at("timesteps", "vector")), "timesteps");
    std::uint64_t chunk = 0;
    for (const Json& row : json.at("steps", "vector").array("vector")) {
        const std::vector<Schedule::Step> steps = schedule.steps(chunk++);
        const Json::Array& expected = row.array("vector");
        check(steps.size() == expected.size(), "steps: another number");
        for (std::size_t i = 0; i < std::min(steps.size(), expected.size()); ++i) {
            check(steps[i].t == double_of(expected[i].array("step")[0]), "steps: another timestep");
            check(schedule.sigma(steps[i].t) == double_of(expected[i].array("step")[1]), "steps: another sigma");
            check(steps[i].next.has_value() == (i + 1 < steps.size()), "steps: another end");
        }
    }
}

void test_solver(const Json& json) {
    const Preset preset = Preset::from(json.at("preset", "vector"), "vector", 2);
    const Schedule schedule(preset);
    const std::string& name = json.at("dtype", "vector").string("vector");
    const DType dtype = name == "bfloat16" ? DType::bfloat16 : name == "float16" ? DType::float16 : DType::float32;
    const auto solver = make_solver(preset.solver, schedule, dtype);
    std::vector<float> x = floats(json.at("x", "vector"));
    const Json::Array& flows = json.at("flows", "vector").array("vector");
    const Json::Array& fresh = json.at("fresh", "vector").array("vector");
    const Json::Array& expected = json.at("results", "vector").array("vector");
    const std::vector<Schedule::Step> steps = schedule.steps(0);
    check(steps.size() == flows.size(), "solver: another number of steps");
    for (std::size_t i = 0; i < std::min(steps.size(), flows.size()); ++i) {
        solver->step(x, floats(flows[i]).data(), steps[i], floats(fresh[i]).data());
        same_bits(x, floats(expected[i]), "solver " + name + ", step " + std::to_string(i));
    }
}

void test_blend(const Json& json) {
    const std::string& name = json.at("dtype", "vector").string("vector");
    const DType dtype = name == "bfloat16" ? DType::bfloat16 : name == "float16" ? DType::float16 : DType::float32;
    const std::int64_t steps = json.at("steps", "vector").integer("steps", 2, 100);
    std::vector<Embedding> parts;
    for (const Json& part : json.at("parts", "vector").array("vector")) parts.push_back(floats(part));
    std::vector<double> weights;
    for (const Json& weight : json.at("weights", "vector").array("vector")) weights.push_back(double_of(weight));
    same_bits(mean_of(parts, weights, dtype), floats(json.at("mean", "vector")), "mean " + name);
    const Json::Array& blends = json.at("blends", "vector").array("vector");
    for (std::size_t i = 0; i < blends.size(); ++i) {
        const double share = static_cast<double>(i + 1) / static_cast<double>(steps);
        same_bits(between(parts[0], parts[1], share, dtype), floats(blends[i]), "blend " + name);
    }
}

void test_rope(const Json& json) {
    const auto number = [&](const char* key) { return json.at(key, "vector").integer(key, 0, std::int64_t{1} << 60); };
    const RopeTable table =
        rope_table(number("position"), number("frames"), number("high"), number("wide"), number("head_dim"));
    same_bits(table.cos, floats(json.at("cos", "vector")), "cos");
    same_bits(table.sin, floats(json.at("sin", "vector")), "sin");
}

bool refused(std::string_view text) {
    try {
        Json::parse(text, "json");
        return false;
    } catch (const Error& error) {
        return error.status == GREEDY_BAD_BUNDLE;
    }
}

void test_json() {
    const Json json = Json::parse(
        "{\"a\": [1, -2.5e3, true, null, \"\\u00e9\\ud83d\\ude00\\n\"], \"b\": 18446744073709551615}", "json");
    check(json.at("a", "json").array("a")[1].number("a") == -2500, "json: a number");
    check(json.at("a", "json").array("a")[4].string("a") == "\xC3\xA9\xF0\x9F\x98\x80\n", "json: a string");
    check(json.at("b", "json").unsigned_integer("b") == ~std::uint64_t{0}, "json: 2^64 - 1");
    for (const char* text :
         {"",        "{",      "[1,]",        "{\"a\":1,}",   "{\"a\":1,\"a\":2}", "01",  "1.", "+1",  "nul",
          "\"\\x\"", "\"\t\"", "\"\\ud800\"", "\"\xC0\x80\"", "\"\xED\xA0\x80\"",  "1 2", "[1", "\"a", "1e999",
          "{1:2}",   "'a'"})
        check(refused(text), std::string("json: accepted ") + text);
    check(refused(std::string(100, '[') + std::string(100, ']')), "json: accepted 100 levels");
    check(!refused(std::string(60, '[') + std::string(60, ']')), "json: refused 60 levels");
}

void test_sha256() {  // FIPS 180-4 examples
    const auto of = [](const std::string& text) {
        Sha256 hash;  // in uneven parts, so that `add` takes every branch
        for (std::size_t at = 0, size = 1; at < text.size(); at += size, size = size % 97 + 13)
            hash.add(reinterpret_cast<const unsigned char*>(text.data()) + at, std::min(size, text.size() - at));
        return hash.hex();
    };
    check(of("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "sha256: nothing");
    check(of("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", "sha256: abc");
    check(of(std::string(1000000, 'a')) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0",
          "sha256: a million a");
}

void test_half() {
    for (std::uint32_t i = 0; i < 0x10000; ++i) {
        const std::uint16_t half = static_cast<std::uint16_t>(i);
        const float f = from_float16(half), b = from_bfloat16(half);
        check(f != f || to_float16(f) == half, "half: float16 " + std::to_string(i));
        check(b != b || to_bfloat16(b) == half, "half: bfloat16 " + std::to_string(i));
    }
    check(to_float16(65519.99f) == 0x7BFF && to_float16(65520.0f) == 0x7C00, "half: the largest");
    check(to_float16(0x1p-25f) == 0 && to_float16(0x1.8p-25f) == 1, "half: the smallest");
}

void test_safetensors() {
    const auto status = [](const std::string& header, std::size_t room) {
        std::string file;
        for (int i = 0; i < 8; ++i) file += static_cast<char>(header.size() >> 8 * i);
        file += header + std::string(room, '\0');
        try {
            read_safetensors(reinterpret_cast<const unsigned char*>(file.data()), file.size(), "file");
            return 0;
        } catch (const Error& error) {
            return error.status;
        }
    };
    const auto one = [](const char* dtype, const char* shape, const char* offsets) {
        return std::string("{\"a\":{\"dtype\":\"") + dtype + "\",\"shape\":" + shape + ",\"data_offsets\":" + offsets +
               "}}";
    };
    check(status(one("F32", "[2,3]", "[0,24]"), 24) == 0, "safetensors: refused a good file");
    check(status(one("F32", "[]", "[0,4]"), 4) == 0, "safetensors: refused a scalar");
    check(status(one("I8", "[3]", "[0,3]"), 3) == 0, "safetensors: refused a type it skips");
    const std::pair<std::string, std::size_t> bad[] = {{one("F32", "[2,3]", "[0,24]"), 23},
                                                       {one("F32", "[2,3]", "[0,20]"), 20},
                                                       {one("F32", "[2,3]", "[4,28]"), 28},
                                                       {one("F32", "[2,3]", "[24,0]"), 24},
                                                       {one("F99", "[2,3]", "[0,24]"), 24},
                                                       {one("F32", "[-2,-3]", "[0,24]"), 24},
                                                       {one("F32", "[4294967296,4294967296,4]", "[0,0]"), 0},
                                                       {one("F32", "[2,3]", "[0,24]"), 25},
                                                       {"[]", 0},
                                                       {"{\"a\":1}", 0},
                                                       {one("F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]"), 4}};
    for (const auto& [header, room] : bad)
        check(status(header, room) == GREEDY_BAD_BUNDLE, "safetensors: accepted " + header);
}

void test_text() {
    check(clean_prompt(" a&amp;lt;b\t\n c&#x41;&nbsp;&notit; ") == "a<b cA \xC2\xACit;", "text: clean_prompt");
    check(clean_prompt("\xE2\x80\x9C\xEF\xAC\x81ne\xE2\x80\x9D caf\xC3\x83\xC2\xA9 \xEF\xBC\xA1") == "\"fine\" caf\xC3\xA9 A",
          "text: curly quotes, a ligature, garbled and full-width letters");
    check(is_blank(clean_prompt("\xE2\x80\x8B\x1B[0m \xEF\xBB\xBF")) && !is_blank("a"), "text: blank prompts");
    check(lower_case("\xC3\x89\xC4\xB0") == "\xC3\xA9i\xCC\x87", "text: lower case");
    check(graphemes("e\xCC\x81\r\n\xF0\x9F\x87\xA9\xF0\x9F\x87\xAA\xF0\x9F\x87\xA9").size() == 4, "text: graphemes");
}

// The window has one unit and the same limits in both versions.
void test_presets() {
    const auto window = [](const std::string& fields, std::int64_t version) -> std::int64_t {
        try {
            const Preset preset = Preset::from(Json::parse("{" + fields + "}", "preset"), "preset", version);
            check_preset(preset, "preset");
            return preset.window;
        } catch (const Error& error) {
            return error.status;
        }
    };
    const std::string greedy = R"("family": "greedy", "max_position": 9)", causal = R"("family": "causal")";
    check(window(greedy + R"(, "chunk": 2, "window": 3)", 1) == 8, "preset: greedy, version 1");
    check(window(greedy + R"(, "chunk": 2, "window": 0)", 1) == 2, "preset: greedy without chunks before");
    check(window(greedy + R"(, "chunk": 2, "window": 8)", 2) == 8, "preset: greedy, version 2");
    check(window(greedy + R"(, "chunk": 2)", 1) == 8 && window(greedy, 2) == 4, "preset: greedy without a window");
    check(window(causal + R"(, "chunk": 3, "window": 6)", 1) == 6, "preset: causal, version 1");
    check(window(causal + R"(, "chunk": 3, "window": 6, "attn_sink": 3)", 2) == 6, "preset: causal, version 2");
    for (const std::string& bad :
         {greedy + R"(, "chunk": 2, "window": 0)", greedy + R"(, "chunk": 2, "window": 7)",
          greedy + R"(, "chunk": 5, "window": 5)", greedy + R"(, "window": 4, "commit": "none")",
          greedy + R"(, "window": 4, "solver": "heun")", causal + R"(, "chunk": 3, "window": 7)",
          causal + R"(, "chunk": 3, "window": 3, "attn_sink": 3)", causal + R"(, "window": 4, "attn_sink": -1)",
          causal + R"(, "chunk": 2, "window": 6, "attn_sink": 3)", std::string(R"("family": "other", "window": 4)")})
        check(window(bad, 2) == GREEDY_BAD_BUNDLE, "preset: accepted " + bad);
    check(window(greedy + R"(, "chunk": 1024, "window": 1048576)", 1) == GREEDY_BAD_BUNDLE, "preset: accepted 2^30");
}

// What a call says of a bundle's file; empty for success.
template <typename Work>
std::string refused(Work&& work) {
    try {
        work();
        return "";
    } catch (const Error& error) {
        return error.status == GREEDY_BAD_BUNDLE ? error.what() : "another status";
    }
}

// JSON is counted before it is read: its values take far more memory than its text.
void test_limits_of_json() {
    const auto list = [](std::size_t commas, const char* item) {
        std::string text = "[";
        for (std::size_t i = 0; i < commas; ++i) text += std::string(item) + ",";
        return text + item + "]";
    };
    const auto parsed = [](const std::string& text, std::size_t most) {
        return refused([&] { Json::parse(text, "file", most); });
    };
    check(parsed(list(Json::kMostMarks - 1, "0"), Json::kMostMarks).empty(), "limits: as many as may be");
    const std::string expected = "file: got JSON with 524289 commas and brackets, expected at most 524288";
    check(parsed(list(Json::kMostMarks, "0"), Json::kMostMarks) == expected, "limits: one more");
    for (const char* item : {"[]", "{}", "\",\"", "0"})
        check(!parsed(list(Json::kMostMarks, item), Json::kMostMarks).empty(), std::string("limits: many ") + item);
    check(!refused([&] { Manifest::parse(list(Json::kMostMarks, "0"), "file"); }).empty(), "limits: a manifest");
    const std::string many = list(Json::kMostInLists, "0");
    check(refused([&] { Tokenizer(many, "{}", "file"); }).find("2097153 commas") != std::string::npos, "limits: a tokenizer");
    const std::string big(Json::kMostBytes + 1, ' ');
    check(refused([&] { Tokenizer(big, "{}", "file"); }).find("67108865 bytes") != std::string::npos, "limits: its bytes");
    std::string file(8, '\0');
    for (int i = 0; i < 8; ++i) file[i] = static_cast<char>(many.size() >> 8 * i);
    file += many;
    check(refused([&] { read_safetensors(reinterpret_cast<const unsigned char*>(file.data()), file.size(), "file"); })
                  .find("2097153 commas") != std::string::npos,
          "limits: safetensors");
    const std::string deep = std::string(100'000, '[') + std::string(100'000, ']');
    check(parsed(deep, Json::kMostMarks).find("at most 64 levels") != std::string::npos, "limits: depth");
}

// Rules of a tokenizer that would make a prompt huge, or its pieces slow to find.
void test_limits_of_tokenizers() {
    const auto tokenizer = [](const std::string& fields, const std::string& vocabulary = R"(["<unk>", 0])") {
        const std::string text = R"({"added_tokens": [{"id": 0, "content": "<pad>"}], "model": {"type": "Unigram", "unk_id": 0,
            "vocab": [)" + vocabulary + "]}" + fields + "}";
        return refused([&] { Tokenizer(text, R"({"pad_token": "<pad>", "model_max_length": 4})", "file"); });
    };
    const auto replace = [](std::size_t size) {
        return R"({"type": "Replace", "pattern": {"String": "a"}, "content": ")" + std::string(size, 'b') + "\"}";
    };
    const auto steps = [&](std::size_t count) {
        std::string list = replace(1);
        for (std::size_t i = 1; i < count; ++i) list += "," + replace(1);
        return R"(, "normalizer": {"type": "Sequence", "normalizers": [)" + list + "]}";
    };
    const auto mark = [](std::size_t size) {
        return R"(, "pre_tokenizer": {"type": "Metaspace", "replacement": ")" + std::string(size, '_') + "\"}";
    };
    const auto piece = [](std::size_t size) { return "[\"<unk>\", 0], [\"" + std::string(size, 'a') + "\", -1]"; };
    const auto shape = [](std::size_t count) {
        std::string list = R"({"Sequence": {}})";
        for (std::size_t i = 0; i < count; ++i) list += R"(, {"SpecialToken": {"id": "x"}})";
        return R"(, "post_processor": {"type": "TemplateProcessing", "single": [)" + list +
               R"(], "special_tokens": {"x": {"ids": [0]}}})";
    };
    check(tokenizer("").empty() && tokenizer(mark(64)).empty() && tokenizer(steps(16)).empty() &&
              tokenizer("", piece(256)).empty() && tokenizer(R"(, "normalizer": )" + replace(64)).empty() &&
              tokenizer(shape(3)).empty(),
          "tokenizers: refused one within the limits");
    check(!tokenizer(mark(65)).empty(), "tokenizers: a long mark");
    check(!tokenizer(steps(17)).empty(), "tokenizers: many steps");
    check(!tokenizer("", piece(257)).empty(), "tokenizers: a long piece");
    check(!tokenizer(R"(, "normalizer": )" + replace(65)).empty(), "tokenizers: a long replacement");
    check(!tokenizer(shape(600)).empty(), "tokenizers: a long template");
}

// Aliases and changed inputs are looked up: going through all names for each would take minutes here.
void test_a_graph_of_many_tensors(const std::string& manifest) {
    const std::size_t count = 4096;
    std::string tensors[2], aliases, mutates;
    for (std::size_t i = 0; i < count; ++i) {
        const std::string comma = i ? "," : "", number = std::to_string(i);
        for (int side = 0; side < 2; ++side)
            tensors[side] += comma + R"({"name": ")" + "io"[side] + number + R"(", "shape": [1], "dtype": "int64"})";
        aliases += comma + "\"o" + number + "\": \"i" + number + "\"";
    }
    for (std::size_t i = 0; i < 200'000; ++i) mutates += (i ? ",\"i" : "\"i") + std::to_string(count - 1) + "\"";
    const auto parsed = [&](const std::string& aliased, const std::string& mutated, const std::string& backend) {
        std::string text = manifest;
        const auto swap = [&](const std::string& old, const std::string& by) {
            for (std::size_t at = 0; (at = text.find(old, at)) != std::string::npos; at += by.size()) text.replace(at, old.size(), by);
        };
        const std::size_t at = text.find("\"graphs\": {") + 11;
        text.insert(at, R"("many": {"file": "graphs/aoti-cpu/etm.so", "inputs": [)" + tensors[0] + R"(], "outputs": [)" + tensors[1] +
                            R"(], "weights": {}, "aliases": {)" + aliased + R"(}, "mutates": [)" + mutated + "]},");
        if (backend != "aoti") swap("\"aoti", "\"" + backend);
        return refused([&] { Manifest::parse(text, "file"); });
    };
    const std::clock_t begun = std::clock();
    check(parsed("", mutates, "aoti").empty(), "many tensors: mutates");
    check(parsed("", mutates + ",\"x\"", "aoti").find("mutates: got 'x'") != std::string::npos, "many tensors: no input");
    const std::string other = parsed(aliases, "", "onnx");
    check(other.find("aliases: got") == std::string::npos, "many tensors: aliases: " + other);
    check(parsed(aliases + ",\"o1x\": \"i1\"", "", "onnx").find("aliases: got o1x for i1") != std::string::npos, "many tensors: no output");
    check(std::clock() - begun < 20 * CLOCKS_PER_SEC, "many tensors: slow");
}

// An empty mark would never let the split end.
void test_tokenizer() {
    const auto status = [](const std::string& mark) {
        const std::string text =
            R"({"added_tokens": [{"id": 0, "content": "<pad>"}], "pre_tokenizer": {"type": "Metaspace", "replacement": ")" +
            mark + R"("}, "model": {"type": "WordLevel", "vocab": {"<unk>": 1}, "unk_token": "<unk>"}})";
        try {
            std::vector<std::int64_t> ids, mask;
            Tokenizer(text, R"({"pad_token": "<pad>", "model_max_length": 4})", "file").encode("a b", ids, mask);
            return 0;
        } catch (const Error& error) {
            return error.status;
        }
    };
    check(status("_") == 0, "tokenizer: refused a mark");
    check(status("") == GREEDY_BAD_BUNDLE, "tokenizer: accepted an empty mark");
}

void test_finite() {
    const float values[] = {1, -3.4e38f, 0, -0.0f}, infinite[] = {1, -HUGE_VALF}, wrong[] = {HUGE_VALF, std::nanf("")};
    check(not_finite(values, 4, DType::float32).empty(), "finite: float32");
    check(not_finite(infinite, 2, DType::float32) == "inf", "finite: -inf");
    check(not_finite(wrong, 2, DType::float32) == "nan", "finite: nan");
    check(not_finite(wrong, 0, DType::float32).empty(), "finite: nothing");
    for (const DType dtype : {DType::float16, DType::bfloat16}) {
        const bool half = dtype == DType::float16;
        const std::uint16_t good[] = {0x3C00, 0x8000, half ? std::uint16_t{0xFBFF} : std::uint16_t{0xFF7F}};
        check(not_finite(good, 3, dtype).empty(), "finite: 16 bits");
        const std::uint16_t inf[] = {0, half ? std::uint16_t{0xFC00} : std::uint16_t{0xFF80}};
        check(not_finite(inf, 2, dtype) == "inf", "finite: inf in 16 bits");
        const std::uint16_t nan[] = {half ? std::uint16_t{0x7E00} : std::uint16_t{0x7FC0}, 0};
        check(not_finite(nan, 2, dtype) == "nan", "finite: nan in 16 bits");
    }
    const std::uint8_t e4m3[] = {0xFE, 0x7E, 0}, spoiled[] = {0, 0xFF};
    check(not_finite(e4m3, 3, DType::float8).empty(), "finite: e4m3");
    check(not_finite(spoiled, 2, DType::float8) == "nan", "finite: nan in e4m3");
    const std::int64_t whole = -1;
    check(not_finite(&whole, 1, DType::int64).empty(), "finite: integers");
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) return std::fprintf(stderr, "usage: core_test VECTORS MANIFEST\n"), 2;
    test_json();
    test_sha256();
    test_half();
    test_finite();
    test_safetensors();
    test_text();
    test_tokenizer();
    test_limits_of_json();
    test_limits_of_tokenizers();
    test_a_graph_of_many_tensors(text_of(argv[2]));
    test_presets();
    std::ifstream file(argv[1]);
    std::set<std::string> kinds;
    std::size_t cases = 0;
    try {
        for (std::string line; std::getline(file, line); ++cases) {
            const Json json = Json::parse(line, "vector");
            const std::string& kind = json.at("kind", "vector").string("vector");
            kinds.insert(kind);
            kind == "schedule" ? test_schedule(json)
            : kind == "solver" ? test_solver(json)
            : kind == "blend"  ? test_blend(json)
                               : test_rope(json);
        }
    } catch (const Error& error) {
        return std::fprintf(stderr, "%s: %s\n", argv[1], error.what()), 2;
    }
    if (kinds != std::set<std::string>{"blend", "rope", "schedule", "solver"})
        return std::fprintf(stderr, "%s: missing or without some kind\n", argv[1]), 2;
    std::printf("%zu cases, %d failures\n", cases, failures);
    return failures == 0 ? 0 : 1;
}
