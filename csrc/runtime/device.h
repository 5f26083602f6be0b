// RAII over the C interface of greedy/plugin.h.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/tensor.h"
#include "formats/manifest.h"
#include "greedy/plugin.h"

namespace greedy::core {

class Device;

// Whether a backend's plugin lies where it is looked for.
bool has_plugin(const std::string& backend, const char* folder);

// Device memory, released by the destructor. The device must outlive it.
class Buffer {
  public:
    Buffer() = default;
    Buffer(const Device& device, greedy_buffer raw) : device_(&device), raw_(raw) {}
    Buffer(Buffer&& other) noexcept { swap(other); }
    Buffer& operator=(Buffer&& other) noexcept {
        Buffer(std::move(other)).swap(*this);
        return *this;
    }
    ~Buffer();

    void* data() const { return raw_.data; }
    void* at(std::size_t bytes) const { return static_cast<char*>(raw_.data) + bytes; }
    explicit operator bool() const { return raw_.data != nullptr; }

  private:
    void swap(Buffer& other) noexcept {
        std::swap(device_, other.device_);
        std::swap(raw_, other.raw_);
    }
    const Device* device_ = nullptr;
    greedy_buffer raw_{nullptr, nullptr};
};

// A weight under the graph's own name, with its value in host memory.
struct Constant {
    TensorSpec spec;
    const void* data;
};

// A loaded graph. Calls may come from several threads.
class Graph {
  public:
    Graph(const Device& device, const std::string& name, const std::string& file, const GraphSpec& spec,
          const std::vector<Constant>& constants);
    ~Graph();
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;

    // Takes device pointers in the order of inputs(), each to as many bytes as its spec says. Returns a buffer for each
    // output. An aliased output is the input's memory and must not outlive it.
    std::vector<Buffer> run(const std::vector<void*>& inputs) const;

    const std::string& name() const { return name_; }
    const std::vector<TensorSpec>& inputs() const { return inputs_; }
    const std::vector<TensorSpec>& outputs() const { return outputs_; }
    // Throws Error(GREEDY_BAD_BUNDLE) where there is none.
    std::size_t output_index(const std::string& name) const;

  private:
    const Device& device_;
    const std::string name_;
    const std::vector<TensorSpec> inputs_, outputs_;
    void* graph_ = nullptr;
};

class Device {
  public:
    // Loads libgreedy_<backend>.so and opens its device. `folder` holds it, or is null: see greedy_settings.plugin_dir.
    // Throws Error(GREEDY_NO_BACKEND) where the plugin, or a library that it needs, is missing.
    Device(const std::string& backend, const char* folder, const greedy_device_settings& settings);
    ~Device();
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;

    Buffer allocate(std::size_t bytes) const;  // zeroed
    void upload(void* to, const void* from, std::size_t bytes) const;
    void download(void* to, const void* from, std::size_t bytes) const;

  private:
    friend class Buffer;
    friend class Graph;
    const greedy_plugin* plugin_ = nullptr;
    void* library_ = nullptr;
    void* device_ = nullptr;
};

}  // namespace greedy::core
