#include "runtime/device.h"

#include <dlfcn.h>

#include <filesystem>

#include "base/error.h"

namespace greedy::core {
namespace {

constexpr std::size_t kMessage = 512;

// Calls a plugin function that ends in (char *error, size_t size); throws the error that it reports.
template <typename Function, typename... Arguments>
void call(const std::string& what, Function function, Arguments... arguments) {
    char message[kMessage] = "";
    const int status = function(arguments..., message, sizeof message);
    if (status < 0) throw Error(status, what + ": " + (message[0] ? message : "failed"));
}

greedy_tensor describe(const TensorSpec& spec) {
    return {spec.name.c_str(), static_cast<std::int32_t>(spec.dtype), spec.shape.rank, spec.shape.sizes.data()};
}

// The directory that holds this library, or the program that it is linked into.
std::string own_folder() {
    Dl_info info;
    if (!dladdr(reinterpret_cast<const void*>(&greedy_version), &info) || !info.dli_fname) return ".";
    std::error_code error;
    const std::filesystem::path path = std::filesystem::canonical(info.dli_fname, error);
    // A program that was found through PATH names itself without a directory.
    return (error ? std::filesystem::read_symlink("/proc/self/exe", error) : path).parent_path().string();
}

// A plugin lies in `folder`. Without one it lies beside this library, or where a program in bin, into which this
// library is linked, was installed with its plugins in lib.
std::filesystem::path plugin_path(const std::string& backend, const char* folder) {
    const std::string name = "libgreedy_" + backend + ".so";
    if (folder) return std::filesystem::path(folder) / name;
    const std::filesystem::path own = own_folder(), beside = own / name, installed = own / ".." / GREEDY_LIBDIR / name;
    std::error_code error;
    return !std::filesystem::exists(beside, error) && std::filesystem::exists(installed, error) ? installed : beside;
}

}  // namespace

bool has_plugin(const std::string& backend, const char* folder) {
    std::error_code error;
    return std::filesystem::exists(plugin_path(backend, folder), error);
}

Buffer::~Buffer() {
    if (device_) device_->plugin_->release(device_->device_, raw_);
}

Graph::Graph(const Device& device, const std::string& name, const std::string& file, const GraphSpec& graph,
             const std::vector<Constant>& constants)
    : device_(device), name_(name), inputs_(graph.inputs), outputs_(graph.outputs) {
    std::vector<std::int32_t> aliases(outputs_.size(), -1);
    for (std::size_t i = 0; i < outputs_.size(); ++i)
        for (std::size_t j = 0; j < inputs_.size(); ++j) {
            const auto alias = graph.aliases.find(outputs_[i].name);
            if (alias != graph.aliases.end() && alias->second == inputs_[j].name)
                aliases[i] = static_cast<std::int32_t>(j);
        }
    std::vector<greedy_tensor> in, out;
    std::vector<greedy_constant> weights;
    for (const TensorSpec& spec : inputs_) in.push_back(describe(spec));
    for (const TensorSpec& spec : outputs_) out.push_back(describe(spec));
    for (const Constant& constant : constants) weights.push_back({describe(constant.spec), constant.data});
    const greedy_graph_spec spec{name_.c_str(), file.c_str(),   in.data(),      out.data(),    in.size(),
                                 out.size(),    weights.data(), weights.size(), aliases.data()};
    call(name, device.plugin_->load, device.device_, &spec, &graph_);
}

Graph::~Graph() { device_.plugin_->unload(device_.device_, graph_); }

std::vector<Buffer> Graph::run(const std::vector<void*>& inputs) const {
    if (inputs.size() != inputs_.size())
        fail(GREEDY_FAILED, name_, std::to_string(inputs.size()) + " inputs", std::to_string(inputs_.size()));
    std::vector<greedy_buffer> raw(outputs_.size());
    call(name_, device_.plugin_->run, device_.device_, graph_, inputs.data(), raw.data());
    std::vector<Buffer> outputs;
    outputs.reserve(raw.size());
    for (const greedy_buffer& buffer : raw) outputs.emplace_back(device_, buffer);
    return outputs;
}

std::size_t Graph::output_index(const std::string& name) const {
    for (std::size_t i = 0; i < outputs_.size(); ++i)
        if (outputs_[i].name == name) return i;
    fail(GREEDY_BAD_BUNDLE, name_, "no output " + name, "it");
}

Device::Device(const std::string& backend, const char* folder, const greedy_device_settings& settings) {
    const std::filesystem::path path = plugin_path(backend, folder);
    if (!has_plugin(backend, folder)) fail(GREEDY_NO_BACKEND, backend, "no plugin " + path.string(), "it");
    library_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library_) throw Error(GREEDY_NO_BACKEND, backend + ": got a plugin that does not load, " + dlerror());
    // The library is never closed: its threads and thread-local data outlive any handle.
    const auto get = reinterpret_cast<const greedy_plugin* (*)()>(dlsym(library_, "greedy_plugin_get"));
    plugin_ = get ? get() : nullptr;
    if (!plugin_ || plugin_->version != GREEDY_PLUGIN_VERSION)
        fail(GREEDY_NO_BACKEND, path.string(), plugin_ ? "version " + std::to_string(plugin_->version) : "no plugin",
             "version " + std::to_string(GREEDY_PLUGIN_VERSION));
    call(backend, plugin_->open, &settings, &device_);
}

Device::~Device() { plugin_->close(device_); }

Buffer Device::allocate(std::size_t bytes) const {
    greedy_buffer raw{nullptr, nullptr};
    call("memory", plugin_->allocate, device_, bytes, &raw);
    return Buffer(*this, raw);
}

void Device::upload(void* to, const void* from, std::size_t bytes) const {
    call("upload", plugin_->upload, device_, to, from, bytes);
}

void Device::download(void* to, const void* from, std::size_t bytes) const {
    call("download", plugin_->download, device_, to, from, bytes);
}

}  // namespace greedy::core
