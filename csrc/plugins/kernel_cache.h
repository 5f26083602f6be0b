// The kernels that TensorRT for RTX compiles for this GPU, kept in a file. A plan holds none: they are compiled when an
// execution context is made, which takes long. Later starts read them.
#pragma once

#include <NvInfer.h>

#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace greedy::plugin {

// Where programs keep what they can make again: $GREEDY_CACHE, else greedy-stream in $XDG_CACHE_HOME or ~/.cache. Empty
// if there is no such place or GREEDY_CACHE is empty.
std::string cache_folder();

// Kernels of one engine. The file is a help only: one that is damaged, or made on another GPU or by another version, is
// ignored, and a place that cannot be written is no error. Both are said in the log. The engine must outlive this.
class KernelCache {
  public:
    KernelCache(nvinfer1::ICudaEngine& engine, std::string_view plan, nvinfer1::ILogger& log);
    ~KernelCache();  // keeps what was compiled since, without a word: the log may be gone
    KernelCache(const KernelCache&) = delete;
    KernelCache& operator=(const KernelCache&) = delete;

    // Compiles what the file lacks. Null if that fails. This object must outlive the context.
    nvinfer1::IExecutionContext* new_context();
    // Writes the file if there is something new.
    void save();

  private:
    void read();
    bool keep();  // false, with errno, if the file cannot be written
    void say(const std::string& text) { log_.log(nvinfer1::ILogger::Severity::kWARNING, text.c_str()); }

    nvinfer1::ICudaEngine& engine_;
    nvinfer1::ILogger& log_;
    std::string path_;     // empty: nothing is kept
    std::string content_;  // sha256 of what the file holds
    std::unique_ptr<nvinfer1::IRuntimeCache> cache_;
    std::vector<std::unique_ptr<nvinfer1::IRuntimeConfig>> configs_;  // one for each context
};

}  // namespace greedy::plugin
