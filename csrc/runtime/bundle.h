// An opened bundle: manifest, weights, tokenizer and graphs, shared by all sessions. Safe to use from several threads.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "base/file.h"
#include "formats/manifest.h"
#include "formats/safetensors.h"
#include "runtime/device.h"
#include "text/tokenizer.h"

namespace greedy::core {

class Bundle {
  public:
    // Throws Error; see greedy_bundle_open.
    Bundle(const std::string& folder, Manifest manifest, const greedy_settings& settings);

    const Manifest& manifest() const { return manifest_; }
    const std::string& backend() const { return backend_->backend; }
    const std::string& target() const { return backend_->target; }
    const Device& device() const { return *device_; }

    // A graph; the first call loads it. Throws Error(GREEDY_BAD_BUNDLE) where there is none.
    const Graph& graph(const std::string& name);

    // Throws Error(GREEDY_INVALID) if the bundle's tokenizer is of an unsupported kind.
    const Tokenizer& tokenizer() const;

    // Token ids lie below this: the rows of the text encoder's table. Without such a table the tokenizer's ids count.
    std::int64_t vocabulary() const;

    // Throws Error(GREEDY_BAD_BUNDLE) if another process wrote to the file of mapped weights. Costs a system call.
    void check_unchanged() const { weights_file_->check_unchanged(); }

    // Throws Error(GREEDY_BAD_BUNDLE) that names the first weight which is not finite. Reads all weights, once; results
    // alone do not tell, because attention on a processor turns NaN scores into zeros.
    void check_weights();

    void log(int level, const std::string& text) const;

  private:
    void check_file(const std::string& name) const;
    // The bytes of a checked file, compared with its sha256 if `hash`.
    std::unique_ptr<FileBytes> open(const std::string& name, bool hash) const;
    void open_device(const greedy_settings& settings);
    void load_tokenizer(bool hash);
    void check_tokenizer_folder() const;
    // Rows of the text encoder's table; nothing if the bundle names none.
    std::optional<std::int64_t> table_rows() const;
    std::vector<Constant> constants(const std::string& graph) const;

    const std::string folder_;
    const greedy_log_callback log_;
    void* const log_cookie_;
    const Manifest manifest_;
    std::unique_ptr<FileBytes> weights_file_;  // the weights lie in it
    std::map<std::string, StoredTensor> weights_;
    std::unique_ptr<Tokenizer> tokenizer_;
    std::string tokenizer_problem_;
    const BackendSpec* backend_ = nullptr;
    std::unique_ptr<Device> device_;  // declared before the graphs, which it must outlive
    std::map<std::string, std::unique_ptr<Graph>> graphs_;
    std::mutex mutex_;
    std::atomic<bool> weights_checked_{false};
};

}  // namespace greedy::core
