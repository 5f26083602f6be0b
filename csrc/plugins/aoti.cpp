// The aoti plugin: graphs compiled by AOTInductor, on a CPU or a CUDA device, through its C interface alone.
//
// The build needs no header and no library of torch. Opening a device loads libtorch_cpu.so (for CUDA libtorch_cuda.so
// as well), loading a graph loads its shared object, and the C functions of both are looked up by name
// (torch/csrc/inductor/aoti_torch/c/shim.h and aoti_runtime/interface.h; present since torch 2.11).
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "base/error.h"
#include "formats/json.h"
#include "greedy/plugin.h"
#include "guard.h"
#include "threads.h"
#include "torch_c.h"

namespace {

using namespace greedy::plugin;
using greedy::core::Json;

using Container = void*;  // AOTInductorModelContainerHandle
struct Pair {             // AOTInductorConstantMapEntry
    const char* name;
    Tensor value;
};

// Graphs run on the processor they were compiled for, with the torch that compiled them.
void check_target(const char* target) {
    if (std::strncmp(target, "cuda", 4) == 0) return;
#if defined(__x86_64__)
    // x86-64-v3
    const bool here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    if (here && std::strcmp(target, "cpu-x86_64-avx2") == 0) return;
#endif
    throw Failure(GREEDY_NO_BACKEND,
                  std::string("got graphs for ") + target + ", expected ones that this machine runs");
}

void check_version(const char* compiled, uint64_t loaded) {
    unsigned major = 0, minor = 0;
    if (!compiled || std::sscanf(compiled, "%u.%u", &major, &minor) != 2)
        throw Failure(GREEDY_BAD_BUNDLE, "got no version of torch in the manifest, expected that of the compiler");
    const unsigned here = static_cast<unsigned>(loaded >> 56), here_minor = static_cast<unsigned>(loaded >> 48 & 0xFF);
    if (major != here || minor != here_minor)
        throw Failure(GREEDY_NO_BACKEND, std::string("got graphs of torch ") + compiled + ", expected " +
                                             std::to_string(here) + "." + std::to_string(here_minor) +
                                             ", which is installed");
}

class AotiDevice {
  public:
    explicit AotiDevice(const greedy_device_settings& settings)
        : library_(load_library(settings.library_dir, "libtorch_cpu.so")),
          torch_(library_),
          threads_(library_),
          parallel_(static_cast<size_t>(settings.parallel)),
          cuda_(std::strncmp(settings.target, "cuda", 4) == 0) {
        check_version(settings.version, torch_.abi_version());
        if (cuda_) load_library(settings.library_dir, "libtorch_cuda.so");
        place_ = cuda_ ? torch_.cuda() : torch_.cpu();
    }

    ~AotiDevice() {
        for (const auto& weight : weights_) torch_.remove(weight.second);
    }

    const Torch& torch() const { return torch_; }
    Threads& threads() { return threads_; }
    bool cuda() const { return cuda_; }
    size_t parallel() const { return parallel_; }
    int32_t dtype(int32_t kind) const { return torch_.dtypes[kind](); }

    Owned empty(const int64_t* sizes, int64_t rank, int32_t dtype) const {
        Owned made(torch_);
        check(torch_.empty(rank, sizes, packed(sizes, rank).data(), dtype, place_, 0, made.out()), "memory");
        return made;
    }

    // A tensor over memory that it does not own.
    Owned view(void* data, const int64_t* sizes, int64_t rank, int32_t dtype, int32_t place) const {
        Owned made(torch_);
        check(torch_.from_blob(data, rank, sizes, packed(sizes, rank).data(), 0, dtype, place, 0, made.out()),
              "tensor");
        return made;
    }
    Owned view(void* data, const greedy_tensor& spec) const {
        return view(data, spec.shape, spec.rank, dtype(spec.dtype), place_);
    }

    greedy_buffer buffer(Owned tensor) const {
        greedy_buffer out{nullptr, nullptr};
        check(torch_.data(tensor.get(), &out.data), "memory");
        out.owner = tensor.release();
        return out;
    }

    void copy_bytes(void* to, int32_t to_place, const void* from, int32_t from_place, size_t bytes) const {
        if (!cuda_) {
            std::memcpy(to, from, bytes);
            return;
        }
        // Any one-byte type works. A copy between host and device returns when it is done.
        const int64_t size = static_cast<int64_t>(bytes);
        const Owned target = view(to, &size, 1, dtype(GREEDY_FLOAT8_E4M3FN), to_place);
        const Owned source = view(const_cast<void*>(from), &size, 1, dtype(GREEDY_FLOAT8_E4M3FN), from_place);
        check(torch_.copy(target.get(), source.get(), 0), "copy");
    }
    int32_t here() const { return place_; }
    int32_t host() const { return torch_.cpu(); }

    // One tensor per weight, shared by all graphs: in place on a CPU, copied once to a GPU. Graphs get a view, because
    // torch 2.13 never frees its handle of a user-managed constant; a leaked view costs only a few bytes.
    Tensor weight(const greedy_constant& constant) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const greedy_tensor& spec = constant.tensor;
        // An empty weight has the address of the next one, so the key also holds type and shape.
        const Place at{constant.data, spec.dtype, {spec.shape, spec.shape + spec.rank}};
        const auto found = weights_.find(at);
        if (found != weights_.end()) return found->second;
        void* data = const_cast<void*>(constant.data);
        if (cuda_) {
            const Owned source = view(data, spec.shape, spec.rank, dtype(spec.dtype), host());
            Owned copied = empty(spec.shape, spec.rank, dtype(spec.dtype));
            check(torch_.copy(copied.get(), source.get(), 0), "copy");
            check(torch_.data(copied.get(), &data), "memory");
            copies_.push_back(std::move(copied));
        }
        return weights_[at] = view(data, spec).release();
    }

  private:
    using Place = std::tuple<const void*, int32_t, std::vector<int64_t>>;  // address, type and shape

    void* const library_;  // libtorch_cpu.so
    const Torch torch_;
    Threads threads_;
    const size_t parallel_;
    const bool cuda_;
    int32_t place_;
    std::mutex mutex_;
    std::map<Place, Tensor> weights_;
    std::vector<Owned> copies_;  // of the weights on a GPU
};

// Multiply-adds of a transformer's largest product over one chunk; 0 for other graphs.
int64_t work_of(const greedy_graph_spec& spec) {
    int64_t tokens = 0, largest = 0;
    for (size_t i = 0; i < spec.input_count; ++i)
        if (std::strcmp(spec.inputs[i].name, "rope_cos") == 0) tokens = spec.inputs[i].shape[0];
    for (size_t i = 0; i < spec.constant_count; ++i) {
        const greedy_tensor& weight = spec.constants[i].tensor;
        if (weight.rank == 2) largest = std::max(largest, weight.shape[0] * weight.shape[1]);
    }
    return tokens * largest;
}

class AotiGraph {
  public:
    AotiGraph(AotiDevice& device, const greedy_graph_spec& spec) : device_(device), name_(spec.name) {
        for (size_t i = 0; i < spec.input_count; ++i) inputs_.emplace_back(spec.inputs[i]);
        for (size_t i = 0; i < spec.output_count; ++i) outputs_.emplace_back(spec.outputs[i]);
        library_ = dlopen(spec.file, RTLD_NOW | RTLD_LOCAL);
        if (!library_) throw Failure(GREEDY_BAD_BUNDLE, std::string("got a graph that does not load, ") + dlerror());
        try {
            open(spec);
            if (!device.cuda()) device.threads().add(work_of(spec));
        } catch (...) {
            close();
            throw;
        }
    }
    ~AotiGraph() { close(); }
    AotiGraph(const AotiGraph&) = delete;
    AotiGraph& operator=(const AotiGraph&) = delete;

    void run(void* const* inputs, greedy_buffer* outputs) const {
        std::vector<Owned> views;
        for (size_t i = 0; i < inputs_.size(); ++i) views.push_back(device_.view(inputs[i], inputs_[i].view()));
        std::vector<Tensor> in, out(outputs_.size(), nullptr);
        for (Owned& tensor : views) in.push_back(tensor.release());  // the graph owns them from here on
        const Threads::Lowered lowered(device_.threads());
        const int32_t code = run_(container_, in.data(), in.size(), out.data(), out.size(), nullptr, nullptr);
        std::vector<Owned> made;
        for (Tensor tensor : out) {
            made.emplace_back(device_.torch());
            *made.back().out() = code ? nullptr : tensor;
        }
        if (code) throw Failure(GREEDY_FAILED, "got an error from the graph" + last_error() + ", expected a result");
        std::vector<greedy_buffer> buffers;
        try {
            for (size_t i = 0; i < made.size(); ++i) buffers.push_back(checked(std::move(made[i]), outputs_[i]));
        } catch (...) {
            for (const greedy_buffer& buffer : buffers) device_.torch().remove(buffer.owner);
            throw;
        }
        for (size_t i = 0; i < buffers.size(); ++i) outputs[i] = buffers[i];
    }

  private:
    struct Spec {
        std::string name;
        int32_t dtype;
        std::vector<int64_t> shape;

        explicit Spec(const greedy_tensor& tensor)
            : name(tensor.name), dtype(tensor.dtype), shape(tensor.shape, tensor.shape + tensor.rank) {}

        greedy_tensor view() const { return {name.c_str(), dtype, static_cast<int32_t>(shape.size()), shape.data()}; }

        // Whether a [name, dtype, [sizes]] has this type and shape.
        bool like(const Json::Array& said) const {
            const Json::Array& sizes = said[2].array("signature");
            bool same = said[1].string("signature") == kDtypes[dtype] && sizes.size() == shape.size();
            for (size_t i = 0; same && i < sizes.size(); ++i)
                same = sizes[i].integer("signature", 0, INT64_MAX) == shape[i];
            return same;
        }
    };

    template <typename Function>
    void find(const char* name, Function& out) {
        look_up(library_, (std::string("AOTInductorModelContainer") + name).c_str(), out, GREEDY_BAD_BUNDLE);
    }

    void open(const greedy_graph_spec& spec) {
        int32_t (*create)(Container*, size_t, const char*, const char*);
        int32_t (*count_in)(Container, size_t*), (*count_out)(Container, size_t*),
            (*count_constants)(Container, size_t*);
        find("CreateWithDevice", create);
        find("Delete", delete_);
        find("GetNumInputs", count_in);
        find("GetNumOutputs", count_out);
        find("GetNumConstants", count_constants);
        find("Run", run_);
        last_error_ =
            reinterpret_cast<int32_t (*)(const char**)>(dlsym(library_, "AOTInductorGetLastError"));  // since 2.13
        if (create(&container_, device_.parallel(), device_.cuda() ? "cuda" : "cpu", nullptr))
            throw Failure(GREEDY_BAD_BUNDLE, "got a graph that does not open" + last_error() + ", expected one");
        size_t in = 0, out = 0, constants = 0;
        count_in(container_, &in);
        count_out(container_, &out);
        count_constants(container_, &constants);
        const Json signature = check_signature();
        if (in != inputs_.size() || out != outputs_.size())
            throw Failure(GREEDY_BAD_BUNDLE, "got " + std::to_string(in) + " inputs and " + std::to_string(out) +
                                                 " outputs in the graph, expected " + std::to_string(inputs_.size()) +
                                                 " and " + std::to_string(outputs_.size()));
        // A manifest without weights would leave the constants that the graph reads unset.
        if (spec.constant_count || (constants && !signature.at("constants", "signature").array("signature").empty()))
            bind(spec, constants, signature);
    }

    // A graph checks no shapes when it runs, so a wrong manifest would let it read or write past a buffer. Its own
    // signature must therefore equal the manifest.
    Json check_signature() {
        int32_t (*call_spec)(Container, const char**, const char**);
        find("GetCallSpec", call_spec);
        const char *text = "", *unused = "";
        if (call_spec(container_, &text, &unused)) throw Failure(GREEDY_BAD_BUNDLE, "got a graph without a signature");
        Json json = Json::parse(text, "signature");
        for (const auto& [side, specs] : {std::pair("inputs", &inputs_), std::pair("outputs", &outputs_)}) {
            const Json::Array& said = json.at(side, "signature").array("signature");
            bool same = said.size() == specs->size();
            for (size_t i = 0; same && i < said.size(); ++i) {
                const Json::Array& entry = said[i].array("signature");
                same = entry.size() == 3 && entry[0].string("signature") == (*specs)[i].name && (*specs)[i].like(entry);
            }
            if (!same)
                throw Failure(GREEDY_BAD_BUNDLE, std::string("got other ") + side +
                                                     " in the manifest than in the graph, expected the same");
        }
        return json;
    }

    // Weights stay outside the graph. The graph must need exactly the weights in the manifest.
    void bind(const greedy_graph_spec& spec, size_t wanted, const Json& signature) {
        int32_t (*name_of)(Container, size_t, const char**), (*original_of)(Container, size_t, const char**);
        int32_t (*update)(Container, const Pair*, size_t, bool, bool);
        find("GetConstantName", name_of);
        find("GetConstantOriginalFQN", original_of);
        find("UpdateUserManagedConstantBufferPairs", update);
        std::map<std::string, const greedy_constant*> supplied;
        for (size_t i = 0; i < spec.constant_count; ++i) supplied[spec.constants[i].tensor.name] = &spec.constants[i];
        std::map<std::string, const Json::Array*> said;
        for (const Json& entry : signature.at("constants", "signature").array("signature"))
            if (entry.array("signature").size() == 3)
                said[entry.array("signature")[0].string("signature")] = &entry.array("signature");
        std::vector<Pair> pairs;
        for (size_t i = 0; i < wanted; ++i) {
            const char *name = "", *original = "";
            name_of(container_, i, &name);
            original_of(container_, i, &original);
            const auto found = supplied.find(name);
            if (found == supplied.end())
                throw Failure(GREEDY_BAD_BUNDLE, std::string("got no weight for constant ") + name + ", expected one");
            const auto expected = said.find(original);
            if (expected == said.end() || !Spec(found->second->tensor).like(*expected->second))
                throw Failure(GREEDY_BAD_BUNDLE, std::string("got a weight of another shape or type for ") + original +
                                                     ", expected the graph's");
            pairs.push_back({name, device_.weight(*found->second)});
        }
        if (pairs.size() != spec.constant_count)
            throw Failure(GREEDY_BAD_BUNDLE, "got " + std::to_string(spec.constant_count) + " weights, expected " +
                                                 std::to_string(pairs.size()));
        if (update(container_, pairs.data(), pairs.size(), false, true))
            throw Failure(GREEDY_BAD_BUNDLE, "got weights that the graph refuses" + last_error() + ", expected others");
    }

    // Checks an output against the manifest and makes it contiguous.
    greedy_buffer checked(Owned tensor, const Spec& spec) const {
        const Torch& torch = device_.torch();
        int64_t rank = 0, *sizes = nullptr, *strides = nullptr;
        int32_t dtype = 0;
        check(torch.rank(tensor.get(), &rank), "output");
        check(torch.sizes(tensor.get(), &sizes), "output");
        check(torch.strides(tensor.get(), &strides), "output");
        check(torch.dtype(tensor.get(), &dtype), "output");
        const std::vector<int64_t> shape(sizes, sizes + rank);
        if (shape != spec.shape || dtype != device_.dtype(spec.dtype))
            throw Failure(GREEDY_FAILED,
                          "got output " + spec.name + " of another shape or type, expected the manifest's");
        const std::vector<int64_t> expected = packed(sizes, rank);
        bool contiguous = true;
        for (int64_t i = 0; i < rank; ++i)
            contiguous &= sizes[i] == 1 || strides[i] == expected[static_cast<size_t>(i)];
        if (contiguous) return device_.buffer(std::move(tensor));
        Owned copied = device_.empty(shape.data(), rank, dtype);
        check(torch.copy(copied.get(), tensor.get(), 0), "copy");
        return device_.buffer(std::move(copied));
    }

    std::string last_error() const {
        const char* text = nullptr;
        if (!last_error_ || last_error_(&text) || !text || !text[0]) return "";
        return " (" + std::string(text).substr(0, 200) + ")";
    }

    void close() {
        if (container_) delete_(container_);
        if (library_) dlclose(library_);
    }

    AotiDevice& device_;
    const std::string name_;
    std::vector<Spec> inputs_, outputs_;
    void* library_ = nullptr;
    Container container_ = nullptr;
    int32_t (*delete_)(Container) = nullptr;
    int32_t (*run_)(Container, Tensor*, size_t, Tensor*, size_t, void*, void*) = nullptr;
    int32_t (*last_error_)(const char**) = nullptr;
};

AotiDevice& of(void* device) { return *static_cast<AotiDevice*>(device); }

int open_device(const greedy_device_settings* settings, void** device, char* error, size_t size) {
    return guarded(error, size, [&] {
        check_target(settings->target);
        *device = new AotiDevice(*settings);
    });
}

void close_device(void* device) { delete static_cast<AotiDevice*>(device); }

int load(void* device, const greedy_graph_spec* spec, void** graph, char* error, size_t size) {
    return guarded(error, size, [&] { *graph = new AotiGraph(of(device), *spec); });
}

void unload(void*, void* graph) { delete static_cast<AotiGraph*>(graph); }

int allocate(void* device, size_t bytes, greedy_buffer* buffer, char* error, size_t size) {
    return guarded(error, size, [&] {
        const int64_t count = static_cast<int64_t>((bytes + 7) / 8);
        Owned made = of(device).empty(&count, 1, of(device).dtype(GREEDY_INT64));
        check(of(device).torch().zero(made.get()), "memory");
        *buffer = of(device).buffer(std::move(made));
    });
}

void release(void* device, greedy_buffer buffer) { of(device).torch().remove(buffer.owner); }

int upload(void* device, void* to, const void* from, size_t bytes, char* error, size_t size) {
    return guarded(error, size, [&] { of(device).copy_bytes(to, of(device).here(), from, of(device).host(), bytes); });
}

int download(void* device, void* to, const void* from, size_t bytes, char* error, size_t size) {
    return guarded(error, size, [&] { of(device).copy_bytes(to, of(device).host(), from, of(device).here(), bytes); });
}

int run(void*, void* graph, void* const* inputs, greedy_buffer* outputs, char* error, size_t size) {
    return guarded(error, size, [&] { static_cast<const AotiGraph*>(graph)->run(inputs, outputs); });
}

const greedy_plugin kPlugin = {GREEDY_PLUGIN_VERSION,
                               "aoti",
                               open_device,
                               close_device,
                               load,
                               unload,
                               allocate,
                               release,
                               upload,
                               download,
                               run};

}  // namespace

const greedy_plugin* greedy_plugin_get(void) { return &kPlugin; }
