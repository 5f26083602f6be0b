// state_test BUNDLE PLUGIN_DIR: a failed, cancelled or refused call changes nothing; files that change under an open
// bundle. Over graphs of formulas.
#include <dlfcn.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/file.h"
#include "base/sha256.h"
#include "check.h"
#include "greedy/greedy.hpp"

namespace {

namespace fs = std::filesystem;

std::string bundle_path, plugin_dir;

greedy::Bundle open_bundle(const std::string& path) {
    greedy_settings settings;
    greedy_settings_init(&settings);
    settings.plugin_dir = plugin_dir.c_str();
    return greedy::Bundle(path, &settings);
}

// What opening or streaming a bundle says; empty for success.
std::string said(const std::string& path, int* status = nullptr) {
    try {
        greedy::Session session(open_bundle(path), 1);
        session.set_prompt("a red circle");
        session.next_frame();
        return "";
    } catch (const greedy::StatusError& error) {
        if (status) *status = error.status;
        return error.what();
    }
}

std::string content_of(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

void write(const fs::path& path, const std::string& text) { std::ofstream(path, std::ios::binary) << text; }

void replace(std::string& text, const std::string& old, const std::string& by) {
    const std::size_t at = text.find(old);
    check(at != std::string::npos, "the test's own: no " + old);
    if (at != std::string::npos) text.replace(at, old.size(), by);
}

// A copy of the bundle, deleted afterwards.
struct Copy {
    Copy() : folder(fs::temp_directory_path() / ("greedy_state." + std::to_string(getpid()))) {
        fs::remove_all(folder);
        fs::copy(bundle_path, folder, fs::copy_options::recursive);
    }
    ~Copy() { fs::remove_all(folder); }

    // Writes a file and its new hash.
    void rewrite(const std::string& name, const std::string& text) {
        std::string manifest = content_of(folder / "manifest.json");
        const auto hash = [](const std::string& of) {
            greedy::core::Sha256 made;
            made.add(reinterpret_cast<const unsigned char*>(of.data()), of.size());
            return made.hex();
        };
        const std::string old = content_of(folder / name);
        const std::size_t entry = manifest.find("\"" + name + "\": {");
        const std::string bytes = "\"bytes\": " + std::to_string(old.size());
        check(entry != std::string::npos && manifest.find(bytes, entry) != std::string::npos, "the test's own: " + name);
        manifest.replace(manifest.find(bytes, entry), bytes.size(), "\"bytes\": " + std::to_string(text.size()));
        replace(manifest, hash(old), hash(text));
        write(folder / "manifest.json", manifest);
        write(folder / name, text);
    }

    const fs::path folder;
};

std::vector<std::uint8_t> pixels(greedy::Session& session, int frames) {
    std::vector<std::uint8_t> out;
    for (int i = 0; i < frames; ++i) {
        const greedy::Frame frame = session.next_frame();
        out.insert(out.end(), frame->data, frame->data + frame->stride * static_cast<std::size_t>(frame->height));
    }
    return out;
}

void fail_after(long runs) {
    void* plugin = dlopen((plugin_dir + "/libgreedy_aoti.so").c_str(), RTLD_NOW);
    const auto set = reinterpret_cast<void (*)(long)>(plugin ? dlsym(plugin, "fake_fail_after") : nullptr);
    check(set, "no fake_fail_after");
    if (set) set(runs);
}

// greedy_push_frames runs graphs, and leaves a cancel to the next frame.
void test_a_cancel_waits_for_the_next_frame(const greedy::Bundle& bundle) {
    const std::vector<std::uint8_t> clip(static_cast<std::size_t>(5 * 3 * 16 * 8), 90);
    greedy::Session session(bundle, 1), plain(bundle, 1);
    for (greedy::Session* one : {&session, &plain}) one->set_prompt("teal");
    session.cancel();
    check(greedy_push_frames(session.get(), clip.data(), 5) == GREEDY_OK, "cancel: a push took it");
    plain.push_frames(clip.data(), 5);
    greedy_frame* frame = nullptr;
    check(greedy_next_frame(session.get(), nullptr) == GREEDY_INVALID, "cancel: a refused call took it");
    check(greedy_next_frame(session.get(), &frame) == GREEDY_CANCELLED && !frame, "cancel: not the next frame");
    check(pixels(session, 9) == pixels(plain, 9), "cancel: another video");
}

// Whatever graph fails under the first prompt, its recommit stays due for the second one.
void test_a_recommit_outlives_a_failure(const greedy::Bundle& bundle) {
    greedy::Session plain(bundle, 2);
    plain.set_prompt("a red circle");
    pixels(plain, 13);
    plain.set_prompt("teal", true);
    plain.set_prompt("a blue square", false);
    const std::vector<std::uint8_t> expected = pixels(plain, 12);
    int failed = 0;
    for (long runs = 0; runs < 16; ++runs) {
        greedy::Session session(bundle, 2);
        session.set_prompt("a red circle");
        pixels(session, 13);
        session.set_prompt("teal", true);
        fail_after(runs);
        greedy_frame* frame = nullptr;
        failed += greedy_next_frame(session.get(), &frame) == GREEDY_FAILED;
        fail_after(-1);
        if (frame) {
            greedy_frame_unref(&frame);
            break;
        }
        session.set_prompt("a blue square", false);
        check(pixels(session, 12) == expected, "recommit: another video after a failure at graph " + std::to_string(runs));
    }
    check(failed > 5, "recommit: few failures");
}

void test_refused_calls_change_nothing(const greedy::Bundle& bundle) {
    const std::string longest(16'384, 'a'), longer(16'385, 'a');
    const std::int64_t outside[] = {3, 2'000'000};
    const float nothing[] = {0};
    greedy::Session session(bundle, 3), plain(bundle, 3);
    for (greedy::Session* one : {&session, &plain}) one->set_prompt("teal");
    for (const char* text : {"", "\xFF", "a\xC3", "\xED\xA0\x80", "\xF4\x90\x80\x80", "\xC0\x80", longer.c_str()})
        check(greedy_set_prompt(session.get(), text, 1) == GREEDY_INVALID, "refused: a text");
    char why[100];
    greedy_error(session.get(), why, sizeof why);
    check(!std::strcmp(why, "prompt: got 16385 characters, expected at most 16384"), why);
    try {
        session.set_prompt(std::string("red\0blue", 8));
        check(false, "refused: a NUL character");
    } catch (const greedy::StatusError& error) {
        check(error.status == GREEDY_INVALID && std::strstr(error.what(), "got a NUL character, expected text"), error.what());
    }
    check(greedy_set_prompt_tokens(session.get(), outside, 2, 1) == GREEDY_INVALID, "refused: tokens");
    check(greedy_push_latent(session.get(), nothing, 0) == GREEDY_INVALID, "refused: latents");
    check(greedy_next_frame(session.get(), nullptr) == GREEDY_INVALID, "refused: a frame to nowhere");
    check(pixels(session, 9) == pixels(plain, 9), "refused: another video");
    session.set_prompt(longest);
}

// Seed and steps change together or not at all; a failure in between repeats with them.
void test_changes(const greedy::Bundle& bundle) {
    const std::uint64_t seed = 9;
    const std::vector<std::vector<double>> few = {{1000, 400}};
    greedy::Session other(bundle, seed), changed(bundle, 1), plain(bundle, 1);
    for (greedy::Session* one : {&other, &changed, &plain}) one->set_prompt("teal");
    changed.change(&seed);
    check(pixels(changed, 9) == pixels(other, 9), "change: a seed before the first frame");
    for (greedy::Session* one : {&other, &changed}) one->change(nullptr, few);
    const std::vector<std::uint8_t> short_steps = pixels(other, 8);
    fail_after(1);
    greedy_frame* frame = nullptr;
    check(greedy_next_frame(changed.get(), &frame) == GREEDY_FAILED && !frame, "change: no failure");
    fail_after(-1);
    check(pixels(changed, 8) == short_steps, "change: another chunk after a failure");
    changed.flush();
    greedy::Session fresh(bundle, seed);
    fresh.set_prompt("teal");
    fresh.change(nullptr, few);
    check(pixels(changed, 9) == pixels(fresh, 9), "change: a flush forgot it");
    pixels(plain, 9);
    const std::vector<std::vector<std::vector<double>>> wrong = {{{}}, {{50}}, {{500, 700}}, {{1000, 0}}, {{1000.5}}, {{1000}, {}}, {{NAN}}};
    for (const auto& steps : wrong) {
        try {
            plain.change(&seed, steps);
            check(false, "change: took steps");
        } catch (const greedy::StatusError& error) {
            check(error.status == GREEDY_INVALID && !std::strncmp(error.what(), "steps: got ", 11), error.what());
        }
    }
    const greedy_changes nothing = {}, no_rows = {&seed, nullptr, nullptr, 1};
    check(greedy_change(plain.get(), &nothing) == GREEDY_INVALID, "change: nothing");
    check(greedy_change(plain.get(), &no_rows) == GREEDY_INVALID, "change: rows of nothing");
    check(greedy_change(plain.get(), nullptr) == GREEDY_INVALID && greedy_change(nullptr, &nothing) == GREEDY_INVALID, "change: null");
    greedy::Session untouched(bundle, 1);
    untouched.set_prompt("teal");
    pixels(untouched, 9);
    check(pixels(plain, 8) == pixels(untouched, 8), "change: a refused one acted");
}

// A transition ends in the target, whatever failed or was refused on the way.
void test_transitions(const greedy::Bundle& bundle) {
    using Texts = greedy::Session::Texts;
    const auto made = [&](bool stumbles) {
        greedy::Session session(bundle, 4);
        session.set_prompt("teal");
        std::vector<std::uint8_t> out = pixels(session, 5);
        session.set_prompt(Texts{{"a red circle", 2}, {"a blue square", 0.5}}, true, 3);
        for (long runs = 0; runs < 5; ++runs) {
            greedy_frame* frame = nullptr;
            if (stumbles) {
                fail_after(runs);
                check(greedy_next_frame(session.get(), &frame) == GREEDY_FAILED, "transition: no failure");
                fail_after(-1);
                check(greedy_set_prompt_blend(session.get(), nullptr, nullptr, 0, 2, 1) == GREEDY_INVALID, "transition: null");
            }
            const std::vector<std::uint8_t> chunk = pixels(session, 4);
            out.insert(out.end(), chunk.begin(), chunk.end());
        }
        return out;
    };
    check(made(true) == made(false), "transition: another video after failures");
    greedy::Session session(bundle, 4);
    const char* const texts[] = {"teal", "a red circle"};
    for (const double weight : {0.0, -1.0, HUGE_VAL, static_cast<double>(NAN)}) {
        const double weights[] = {1, weight};
        check(greedy_set_prompt_blend(session.get(), texts, weights, 2, 0, 1) == GREEDY_INVALID, "blend: a weight");
    }
    const double weights[] = {1, 1};
    for (const int chunks : {-1, (1 << 20) + 1})
        check(greedy_set_prompt_blend(session.get(), texts, weights, 2, chunks, 1) == GREEDY_INVALID, "blend: chunks");
    check(greedy_set_prompt_blend(session.get(), texts, weights, 0, 0, 1) == GREEDY_INVALID, "blend: no text");
    greedy_frame* frame = nullptr;
    check(greedy_next_frame(session.get(), &frame) == GREEDY_INVALID && !frame, "blend: a refused prompt was set");
}

// Weights of one table of zeros, [rows, 1].
void write_weights(Copy& copy, std::size_t rows) {
    const std::string header = R"({"shared.weight":{"dtype":"F32","shape":[)" + std::to_string(rows) +
                               R"(,1],"data_offsets":[0,)" + std::to_string(4 * rows) + "]}}";
    std::string bytes(8, '\0');
    bytes[0] = static_cast<char>(header.size());
    copy.rewrite("weights.safetensors", bytes + header + std::string(4 * rows, '\0'));
}

// A graph aborts at a token outside its table, so such a tokenizer is refused, wherever it names the token.
void test_tokens_outside_the_table() {
    const std::string tokenizer = content_of(fs::path(bundle_path) / "tokenizer" / "tokenizer.json");
    const auto table = [](Copy& copy, std::size_t rows) {
        write_weights(copy, rows);
        std::string manifest = content_of(copy.folder / "manifest.json");
        const std::size_t graph = manifest.find("\"encode_text\": {"), at = manifest.find("\"weights\": {}", graph);
        check(graph != std::string::npos && at != std::string::npos, "the test's own: encode_text");
        manifest.replace(at, 13, R"("weights": {"table": "shared.weight"})");
        write(copy.folder / "manifest.json", manifest);
    };
    {
        Copy copy;
        table(copy, 29);
        check(said(copy.folder.string()).empty(), "tokens: refused a table that fits: " + said(copy.folder.string()));
    }
    const std::pair<const char*, const char*> kChanges[] = {{"\"teal\": 25", "\"teal\": 29"},
                                                            {"\"teal\": 25", "\"teal\": 2000000"},
                                                            {"\"teal\": 25", "\"teal\": 2147483647"},
                                                            {"\"id\": 2,", "\"id\": 29,"},
                                                            {"\"ids\": [\n          1\n        ]", "\"ids\": [29]"}};
    for (const auto& [old, by] : kChanges) {
        Copy copy;
        table(copy, 29);
        std::string changed = tokenizer;
        replace(changed, old, by);
        copy.rewrite("tokenizer/tokenizer.json", changed);
        int status = 0;
        const std::string text = said(copy.folder.string(), &status);
        check(status == GREEDY_BAD_BUNDLE && text.find("expected 0 to 28, the rows of") != std::string::npos,
              std::string("tokens: ") + by + " said '" + text + "'");
    }
}

// Everything that is used is hashed: each of these files, changed by one bit.
void test_hashes() {
    for (const char* name : {"weights.safetensors", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json",
                             "graphs/aoti-cpu/sdd.so", "graphs/aoti-cpu/vae_encode_first.so"}) {
        Copy copy;
        std::string text = content_of(copy.folder / name);
        text.back() = static_cast<char>(text.back() ^ 1);
        write(copy.folder / name, text);
        int status = 0;
        const std::string why = said(copy.folder.string(), &status);
        check(status == GREEDY_BAD_BUNDLE && why.find("got sha256") != std::string::npos, std::string(name) + ": " + why);
    }
}

// Small files are copied: whatever happens to them, an open bundle goes on.
void test_files_that_vanish() {
    Copy copy;
    const greedy::Bundle bundle = open_bundle(copy.folder.string());
    for (const auto& entry : fs::recursive_directory_iterator(copy.folder))
        if (entry.is_regular_file() && entry.path().string().find("vae_encode") == std::string::npos)
            fs::resize_file(entry.path(), 0);
    greedy::Session session(bundle, 1);
    session.set_prompt("a red circle");
    pixels(session, 9);
    // Graphs that encode are opened late, and hashed then.
    write(copy.folder / "graphs/aoti-cpu/vae_encode_first.so", "other");
    const std::vector<std::uint8_t> clip(static_cast<std::size_t>(3 * 16 * 8), 90);
    greedy::Session other(bundle, 1);
    check(greedy_push_frames(other.get(), clip.data(), 1) == GREEDY_BAD_BUNDLE, "vanished: a graph that changed");
}

// A mapped file that was written to, or cut, is said. An empty hole makes it large.
void test_large_files_are_watched() {
    const fs::path path = fs::temp_directory_path() / ("greedy_large." + std::to_string(getpid()));
    const auto large = static_cast<std::uintmax_t>(greedy::core::FileBytes::kMostCopied) + 1;
    const auto changed = [](const greedy::core::FileBytes& file, bool in_place) {
        try {
            in_place ? file.check_in_place() : file.check_unchanged();
            return false;
        } catch (const greedy::core::Error& error) {
            check(error.status == GREEDY_BAD_BUNDLE && std::strstr(error.what(), "got a file that changed"), error.what());
            return true;
        }
    };
    for (const std::uintmax_t size : {large, large - 1}) {
        const bool mapped = size == large;
        write(path, "");
        fs::resize_file(path, size);
        const greedy::core::FileBytes file(path.string());
        check(file.size() == size && !changed(file, false) && !changed(file, true), "large: a change where none is");
        fs::resize_file(path, 10);
        check(changed(file, false) == mapped, "large: cut");
        check(changed(file, true), "large: cut, in place");
        check(mapped || file.data()[size - 1] == 0, "large: a copy that is gone");
        fs::remove(path);
        check(changed(file, true), "large: removed");
    }
    write(path, "a");
    const greedy::core::FileBytes file(path.string());
    write(path.string() + ".new", "a");
    fs::rename(path.string() + ".new", path);
    check(!changed(file, false) && changed(file, true), "large: another file in its place");
    fs::remove(path);
}

// Weights that were cut are not read any more, by the first call of a session as by later ones.
void test_mapped_weights_that_are_cut() {
    const std::vector<std::uint8_t> clip(static_cast<std::size_t>(3 * 16 * 8), 90);
    for (const int frames : {0, 1}) {
        Copy copy;
        write_weights(copy, greedy::core::FileBytes::kMostCopied / 4);
        greedy::Session session(open_bundle(copy.folder.string()), 1), other(open_bundle(copy.folder.string()), 1);
        session.set_prompt("teal");
        pixels(session, frames);
        fs::resize_file(copy.folder / "weights.safetensors", 10);
        greedy_frame* frame = nullptr;
        check(greedy_next_frame(session.get(), &frame) == GREEDY_BAD_BUNDLE, "cut: a frame");
        check(greedy_push_frames(other.get(), clip.data(), 1) == GREEDY_BAD_BUNDLE, "cut: a push");
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) return std::fprintf(stderr, "usage: state_test BUNDLE PLUGIN_DIR\n"), 2;
    bundle_path = argv[1], plugin_dir = argv[2];
    try {
        const greedy::Bundle bundle = open_bundle(bundle_path);
        test_a_cancel_waits_for_the_next_frame(bundle);
        test_a_recommit_outlives_a_failure(bundle);
        test_refused_calls_change_nothing(bundle);
        test_changes(bundle);
        test_transitions(bundle);
        test_tokens_outside_the_table();
        test_hashes();
        test_files_that_vanish();
        test_large_files_are_watched();
        test_mapped_weights_that_are_cut();
    } catch (const std::exception& error) {
        std::fprintf(stderr, "FAILED: %s\n", error.what());
        return 1;
    }
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
