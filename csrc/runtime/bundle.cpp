#include "runtime/bundle.h"

#include <algorithm>
#include <filesystem>
#include <limits>

#include "base/error.h"
#include "base/finite.h"
#include "base/sha256.h"

namespace greedy::core {
namespace fs = std::filesystem;

Bundle::Bundle(const std::string& folder, Manifest manifest, const greedy_settings& settings)
    : folder_(folder), log_(settings.log), log_cookie_(settings.log_cookie), manifest_(std::move(manifest)) {
    for (const auto& entry : manifest_.files) check_file(entry.first);
    check_tokenizer_folder();
    open_device(settings);
    weights_file_ = open(manifest_.weights, settings.verify);
    weights_ = read_safetensors(weights_file_->data(), weights_file_->size(), manifest_.weights);
    load_tokenizer(settings.verify);
    for (const auto& entry : backend_->graphs)
        if (entry.first.rfind("vae_encode", 0) != 0)
            graph(entry.first);
        else  // loaded, and hashed again, when pictures are pushed
            constants(entry.first), open(entry.second.file, true);
    log(GREEDY_LOG_INFO, "opened " + folder + " with " + backend() + " for " + target());
}

void Bundle::check_file(const std::string& name) const {
    const FileSpec& spec = manifest_.files.at(name);
    const fs::path path = fs::path(folder_) / name;
    std::error_code error;
    const bool plain = fs::is_regular_file(fs::symlink_status(path, error));
    const fs::path root = fs::canonical(folder_, error);
    const bool inside = plain && fs::canonical(path, error) == (root / name) && !error;
    if (!inside) fail(GREEDY_BAD_BUNDLE, path.string(), "no plain file inside the bundle", "one");
    const std::uintmax_t bytes = fs::file_size(path, error);
    if (error || bytes != spec.bytes)
        fail(GREEDY_BAD_BUNDLE, path.string(), std::to_string(bytes) + " bytes", std::to_string(spec.bytes));
}

std::unique_ptr<FileBytes> Bundle::open(const std::string& name, bool hash) const {
    check_file(name);
    const std::string path = (fs::path(folder_) / name).string();
    auto file = std::make_unique<FileBytes>(path);
    if (!hash) return file;
    const std::string& expected = manifest_.files.at(name).sha256;
    Sha256 hash_of;
    hash_of.add(file->data(), file->size());
    const std::string got = hash_of.hex();
    if (got != expected) fail(GREEDY_BAD_BUNDLE, path, "sha256 " + got.substr(0, 12), expected.substr(0, 12));
    return file;
}

// What lies there and is not listed has no hash, and a library that reads the folder might take it.
void Bundle::check_tokenizer_folder() const {
    std::error_code error;
    const fs::path folder = fs::path(folder_) / manifest_.tokenizer;
    for (const auto& entry : fs::directory_iterator(folder, error))
        if (manifest_.files.count(manifest_.tokenizer + "/" + entry.path().filename().string()) == 0)
            fail(GREEDY_BAD_BUNDLE, entry.path().string(), "a file that the manifest does not list", "none");
}

void Bundle::open_device(const greedy_settings& settings) {
    std::string names;
    std::string reasons;  // of the backends that do not open
    for (const auto& [name, spec] : manifest_.backends) {
        names += (names.empty() ? "" : ", ") + name;
        if (settings.backend && settings.backend != spec.backend) continue;
        const auto version = spec.versions.find(spec.backend == "aoti" ? "torch" : spec.backend);
        const greedy_device_settings device{
            spec.target.c_str(),  version == spec.versions.end() ? nullptr : version->second.c_str(),
            settings.library_dir, settings.parallel,
            settings.log,         settings.log_cookie};
        try {
            device_ = std::make_unique<Device>(spec.backend, settings.plugin_dir, device);
            backend_ = &spec;
            return;
        } catch (const Error& error) {
            if (error.status != GREEDY_NO_BACKEND) throw;
            // A plugin that was never installed is no news, unless no other one opens.
            const int level = has_plugin(spec.backend, settings.plugin_dir) ? GREEDY_LOG_INFO : GREEDY_LOG_DEBUG;
            log(level, name + " does not open here: " + error.what());
            if (reasons.find(error.what()) == std::string::npos)
                reasons += (reasons.empty() ? "" : "; ") + std::string(error.what());
        }
    }
    if (!reasons.empty()) throw Error(GREEDY_NO_BACKEND, reasons);
    fail(GREEDY_NO_BACKEND, "bundle", std::string("no backend ") + settings.backend, "one of " + names);
}

void Bundle::load_tokenizer(bool hash) {
    std::vector<std::unique_ptr<FileBytes>> files;
    std::string missing;
    for (const char* name : {"tokenizer_config.json", "tokenizer.json"}) {
        const std::string path = manifest_.tokenizer + "/" + name;
        if (manifest_.files.count(path))
            files.push_back(open(path, hash));
        else
            missing = path;
    }
    try {
        if (!missing.empty()) fail(GREEDY_BAD_BUNDLE, "tokenizer", "no entry in files for " + missing, "one");
        tokenizer_ = std::make_unique<Tokenizer>(files[1]->text(), files[0]->text(), manifest_.tokenizer);
    } catch (const Error& error) {  // token ids and embeddings still work
        tokenizer_problem_ = error.what();
        log(GREEDY_LOG_INFO, tokenizer_problem_);
        return;
    }
    if (tokenizer_->rows() != manifest_.text_rows)
        fail(GREEDY_BAD_BUNDLE, "bundle", "a tokenizer of " + std::to_string(tokenizer_->rows()) + " rows",
             std::to_string(manifest_.text_rows));
    // A graph may abort at a token outside the table.
    const std::optional<std::int64_t> rows = table_rows();
    if (rows && tokenizer_->largest_id() >= *rows)
        fail(GREEDY_BAD_BUNDLE, manifest_.tokenizer, "token " + std::to_string(tokenizer_->largest_id()),
             "0 to " + std::to_string(*rows - 1) + ", the rows of the text encoder's table");
}

const Tokenizer& Bundle::tokenizer() const {
    if (!tokenizer_) throw Error(GREEDY_INVALID, tokenizer_problem_);
    return *tokenizer_;
}

std::optional<std::int64_t> Bundle::table_rows() const {
    const auto encoder = backend_->graphs.find("encode_text");
    const auto ends = [](std::string key, const std::string& end) {
        std::replace(key.begin(), key.end(), '.', '_');  // compilers may write it so
        return key.size() >= end.size() && key.compare(key.size() - end.size(), end.size(), end) == 0;
    };
    if (encoder != backend_->graphs.end())
        for (const auto& entry : encoder->second.weights) {
            const auto weight = weights_.find(entry.second);
            const bool table = ends(entry.second, "embed_tokens_weight") || ends(entry.second, "shared_weight");
            if (table && weight != weights_.end() && weight->second.spec.shape.rank == 2)
                return weight->second.spec.shape[0];
        }
    return std::nullopt;
}

std::int64_t Bundle::vocabulary() const {
    if (const std::optional<std::int64_t> rows = table_rows()) return *rows;
    return tokenizer_ ? tokenizer_->largest_id() + 1 : std::numeric_limits<std::int64_t>::max();
}

const Graph& Bundle::graph(const std::string& name) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = graphs_.find(name);
    if (found != graphs_.end()) return *found->second;
    const auto spec = backend_->graphs.find(name);
    if (spec == backend_->graphs.end()) fail(GREEDY_BAD_BUNDLE, "bundle", "no graph " + name, "it");
    // Graphs are code: one that differs from the manifest is never run.
    const std::unique_ptr<FileBytes> hashed = open(spec->second.file, true);
    const std::string file = (fs::path(folder_) / spec->second.file).string();
    auto loaded = std::make_unique<Graph>(*device_, name, file, spec->second, constants(name));
    hashed->check_in_place();  // the plugin opened the path again
    log(GREEDY_LOG_DEBUG, "loaded " + name);
    return *graphs_.emplace(name, std::move(loaded)).first->second;
}

std::vector<Constant> Bundle::constants(const std::string& name) const {
    std::vector<Constant> found;
    for (const auto& [constant, key] : backend_->graphs.at(name).weights) {
        const auto weight = weights_.find(key);
        if (weight == weights_.end()) fail(GREEDY_BAD_BUNDLE, name, "no weight " + key + " in the bundle", "it");
        found.push_back({weight->second.spec, weight->second.data});
        found.back().spec.name = constant;
    }
    return found;
}

void Bundle::check_weights() {
    if (weights_checked_) return;
    for (const auto& [name, stored] : weights_) {
        const auto count = static_cast<std::size_t>(stored.spec.shape.count());
        const std::string got = not_finite(stored.data, count, stored.spec.dtype);
        if (!got.empty()) fail(GREEDY_BAD_BUNDLE, manifest_.weights + ": " + name, got, "finite numbers");
    }
    weights_checked_ = true;
}

void Bundle::log(int level, const std::string& text) const {
    if (log_) log_(log_cookie_, level, text.c_str());
}

}  // namespace greedy::core
