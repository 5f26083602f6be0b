// The tensorrt plugin, plans of TensorRT 11 on an NVIDIA GPU, and with GREEDY_TENSORRT_RTX the tensorrt_rtx plugin,
// plans of TensorRT for RTX 1.7. The first is built where NvInfer.h is found; it was written against the published
// headers and never executed on TensorRT. The second is linked with the real library in tests, which open it and hand
// it plans as far as a machine without a GPU goes; it never ran one. The tests of both run this file over a stand-in.
#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/file.h"
#include "greedy/plugin.h"
#include "guard.h"
#ifdef GREEDY_TENSORRT_RTX
#include "kernel_cache.h"
#endif

namespace {

#ifdef GREEDY_TENSORRT_RTX
constexpr const char *kName = "tensorrt_rtx", *kLibrary = "TensorRT for RTX";
#else
constexpr const char *kName = "tensorrt", *kLibrary = "TensorRT";
#endif

using greedy::core::FileBytes;
using greedy::plugin::Failure;
using greedy::plugin::guarded;

void check(cudaError_t code, const char* what) {
    if (code == cudaErrorMemoryAllocation) throw Failure(GREEDY_NO_MEMORY, "got no memory on the device, expected it");
    if (code != cudaSuccess)
        throw Failure(GREEDY_FAILED, std::string(what) + ": got " + cudaGetErrorString(code) + ", expected success");
}

nvinfer1::DataType type_of(int32_t dtype) {
    static constexpr nvinfer1::DataType kTypes[] = {nvinfer1::DataType::kFLOAT, nvinfer1::DataType::kHALF,
                                                    nvinfer1::DataType::kBF16, nvinfer1::DataType::kFP8,
                                                    nvinfer1::DataType::kINT64};
    return kTypes[dtype];
}

size_t count_of(const greedy_tensor& tensor) {
    size_t count = 1;
    for (int32_t i = 0; i < tensor.rank; ++i) count *= static_cast<size_t>(tensor.shape[i]);
    return count;
}

size_t count_of(const nvinfer1::Dims& dims) {
    size_t count = 1;
    for (int32_t i = 0; i < dims.nbDims; ++i) count *= static_cast<size_t>(dims.d[i]);
    return count;
}

size_t bytes_of(const greedy_tensor& tensor) {
    static constexpr size_t kBytes[] = {4, 2, 2, 1, 8};
    return count_of(tensor) * kBytes[tensor.dtype];
}

class Logger : public nvinfer1::ILogger {
  public:
    Logger(greedy_log_callback log, void* cookie) : log_(log), cookie_(cookie) {}
    void log(Severity severity, const char* text) noexcept override {
        if (log_ && severity <= Severity::kWARNING) log_(cookie_, GREEDY_LOG_INFO, text);
    }

  private:
    const greedy_log_callback log_;
    void* const cookie_;
};

struct TrtDevice {
    explicit TrtDevice(const greedy_device_settings& settings)
        : logger(settings.log, settings.log_cookie), parallel(settings.parallel) {
        check_gpu(settings.target);
        check_version(settings.version);
        runtime.reset(nvinfer1::createInferRuntime(logger));
        if (!runtime) throw Failure(GREEDY_NO_BACKEND, std::string("got no runtime of ") + kLibrary + ", expected one");
    }

    Logger logger;
    const int parallel;
    std::unique_ptr<nvinfer1::IRuntime> runtime;

  private:
    // A target names one GPU or several: cuda-sm90, cuda-sm89_sm120.
    static void check_gpu(const std::string& target) {
        int number = 0, major = 0, minor = 0;
        cudaError_t code = cudaGetDevice(&number);
        if (code == cudaSuccess) code = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, number);
        if (code == cudaSuccess) code = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, number);
        if (code != cudaSuccess)
            throw Failure(GREEDY_NO_BACKEND,
                          std::string("got no GPU (") + cudaGetErrorString(code) + "), expected one");
        const std::string kind = "cuda-", here = "sm" + std::to_string(major) + std::to_string(minor);
        const bool named = target.compare(0, kind.size(), kind) == 0 &&
                           ("_" + target.substr(kind.size()) + "_").find("_" + here + "_") != std::string::npos;
        if (!named) throw Failure(GREEDY_NO_BACKEND, "got plans for " + target + ", expected " + kind + here);
    }

    static void check_version(const char* plans) {
        const int version = getInferLibVersion();  // 110300 is 11.3.0
        const std::string found = std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + ".";
#ifdef GREEDY_TENSORRT_RTX
        constexpr int kBuilt = NV_TENSORRT_MAJOR * 100 + NV_TENSORRT_MINOR;
        if (version / 100 != kBuilt)
            throw Failure(GREEDY_NO_BACKEND, std::string("got ") + kLibrary + " " + found + ", expected " +
                                                 std::to_string(kBuilt / 100) + "." + std::to_string(kBuilt % 100) +
                                                 ". as this plugin was built for");
#endif
        if (!plans || std::strncmp(plans, found.c_str(), found.size()) != 0)
            throw Failure(GREEDY_NO_BACKEND, std::string("got plans of ") + kLibrary + " " +
                                                 (plans ? plans : "an unknown version") + ", expected " + found);
    }
};

class TrtGraph {
  public:
    TrtGraph(TrtDevice& device, const greedy_graph_spec& spec)
        : aliases_(spec.aliases, spec.aliases + spec.output_count) {
        const FileBytes plan(spec.file);
        engine_.reset(device.runtime->deserializeCudaEngine(plan.data(), plan.size()));
        if (!engine_) throw Failure(GREEDY_NO_BACKEND, "got a plan that does not load, expected one for this GPU");
        for (size_t i = 0; i < spec.input_count; ++i)
            inputs_.push_back(checked(spec.inputs[i], nvinfer1::TensorIOMode::kINPUT));
        for (size_t i = 0; i < spec.output_count; ++i) {
            outputs_.push_back(checked(spec.outputs[i], nvinfer1::TensorIOMode::kOUTPUT));
            bytes_.push_back(bytes_of(spec.outputs[i]));
            const char* shared = engine_->getAliasedInputTensor(spec.outputs[i].name);
            const char* told = aliases_[i] < 0 ? nullptr : spec.inputs[aliases_[i]].name;
            if (told && !in_place(spec.name, told))
                throw Failure(GREEDY_BAD_BUNDLE, std::string("got an alias of ") + told +
                                                     ", expected one of a transformer's keys or values");
            if ((shared == nullptr) != (told == nullptr) || (told && std::strcmp(shared, told) != 0))
                throw Failure(GREEDY_BAD_BUNDLE, "got another alias of " + outputs_.back() + ", expected the plan's");
        }
        find_unread();
        const size_t known = spec.input_count + spec.output_count + unread_.size();
        if (static_cast<size_t>(engine_->getNbIOTensors()) != known)
            throw Failure(GREEDY_BAD_BUNDLE, "got other tensors in the manifest than in the plan, expected the same");
        if (spec.constant_count) refit(device, spec);
#ifdef GREEDY_TENSORRT_RTX
        kernels_ = std::make_unique<greedy::plugin::KernelCache>(*engine_, plan.text(), device.logger);
#endif
        for (int i = 0; i < device.parallel; ++i) {
            idle_.emplace_back();
            idle_.back().context.reset(new_context());
            if (!idle_.back().context) throw Failure(GREEDY_NO_MEMORY, "got no execution context, expected one");
            for (const std::string& name : unread_) bind(idle_.back(), name, garbage_.get());
            check(cudaStreamCreate(&idle_.back().stream), "stream");
        }
#ifdef GREEDY_TENSORRT_RTX
        kernels_->save();
#endif
    }

    ~TrtGraph() {
        for (Worker& worker : idle_)
            if (worker.stream) cudaStreamDestroy(worker.stream);
    }
    TrtGraph(const TrtGraph&) = delete;
    TrtGraph& operator=(const TrtGraph&) = delete;

    void run(void* const* inputs, greedy_buffer* outputs) {
        Worker worker = take();
        std::vector<greedy_buffer> made(outputs_.size(), {nullptr, nullptr});
        try {
            for (size_t i = 0; i < inputs_.size(); ++i) bind(worker, inputs_[i], inputs[i]);
            for (size_t i = 0; i < outputs_.size(); ++i) {
                if (aliases_[i] >= 0) {
                    made[i].data = inputs[aliases_[i]];
                } else {
                    check(cudaMalloc(&made[i].data, bytes_[i]), "memory");
                    made[i].owner = made[i].data;
                }
                bind(worker, outputs_[i], made[i].data);
            }
            if (!worker.context->enqueueV3(worker.stream))
                throw Failure(GREEDY_FAILED, "got a plan that did not start, expected it to");
            check(cudaStreamSynchronize(worker.stream), "plan");
        } catch (...) {
            for (const greedy_buffer& buffer : made) cudaFree(buffer.owner);
            give_back(std::move(worker));
            throw;
        }
        give_back(std::move(worker));
        std::copy(made.begin(), made.end(), outputs);
    }

  private:
    struct Freed {
        void operator()(void* memory) const { cudaFree(memory); }
    };
    struct Worker {
        std::unique_ptr<nvinfer1::IExecutionContext> context;
        cudaStream_t stream = nullptr;
    };

    nvinfer1::IExecutionContext* new_context() {
#ifdef GREEDY_TENSORRT_RTX
        return kernels_->new_context();
#else
        return engine_->createExecutionContext();
#endif
    }

    // An alias lives as long as its input, and only the keys and values of a transformer are kept in place.
    static bool in_place(const std::string& graph, const std::string& input) {
        const auto begins = [](const std::string& name, const char* with) { return name.rfind(with, 0) == 0; };
        const bool other = begins(graph, "vae_") || begins(graph, "prepare_text_") || graph == "encode_text";
        return !other && (begins(input, "k_") || begins(input, "v_"));
    }

    // A plan checks no sizes when it runs, so a wrong manifest would let it read or write past a buffer.
    std::string checked(const greedy_tensor& told, nvinfer1::TensorIOMode mode) const {
        const bool known = engine_->getTensorIOMode(told.name) == mode;
        const nvinfer1::Dims dims = known ? engine_->getTensorShape(told.name) : nvinfer1::Dims{};
        // Counts, because the plan's caches have other axes.
        if (!known || count_of(dims) != count_of(told) || engine_->getTensorDataType(told.name) != type_of(told.dtype))
            throw Failure(GREEDY_BAD_BUNDLE,
                          std::string("got another ") + told.name + " in the manifest, expected the plan's");
        return told.name;
    }

    // Outputs that only the plan has lead the builder to a better plan (export/tensorrt/attention.py). They share memory,
    // because no program reads them.
    void find_unread() {
        size_t bytes = 0;
        for (int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
            const std::string name = engine_->getIOTensorName(i);
            const bool output = engine_->getTensorIOMode(name.c_str()) == nvinfer1::TensorIOMode::kOUTPUT;
            if (!output || name.rfind("unread_", 0) != 0) continue;
            unread_.push_back(name);
            bytes = std::max(bytes, 8 * count_of(engine_->getTensorShape(name.c_str())));  // no type is wider
        }
        void* made = nullptr;
        if (bytes) check(cudaMalloc(&made, bytes), "memory");
        garbage_.reset(made);
    }

    // Weights lie outside the plan; loading puts them into it once.
    void refit(TrtDevice& device, const greedy_graph_spec& spec) {
        const std::unique_ptr<nvinfer1::IRefitter> refitter(nvinfer1::createInferRefitter(*engine_, device.logger));
        if (!refitter) throw Failure(GREEDY_FAILED, "got no refitter, expected one");
        std::vector<const char*> missing(static_cast<size_t>(refitter->getMissingWeights(0, nullptr)));
        refitter->getMissingWeights(static_cast<int32_t>(missing.size()), missing.data());
        for (const char* name : missing) {
            const auto named = [&](const greedy_constant& constant) {
                return std::strcmp(constant.tensor.name, name) == 0;
            };
            const greedy_constant* end = spec.constants + spec.constant_count;
            const greedy_constant* found = std::find_if(spec.constants, end, named);
            if (found == end)
                throw Failure(GREEDY_BAD_BUNDLE, std::string("got no weight for ") + name + ", expected one");
            const nvinfer1::Weights weights{type_of(found->tensor.dtype), found->data,
                                            static_cast<int64_t>(count_of(found->tensor))};
            if (!refitter->setNamedWeights(name, weights))
                throw Failure(GREEDY_BAD_BUNDLE, std::string("got another weight ") + name + ", expected the plan's");
        }
        if (!refitter->refitCudaEngine())
            throw Failure(GREEDY_BAD_BUNDLE,
                          "got weights that do not complete the plan, expected those it was built with");
    }

    static void bind(const Worker& worker, const std::string& name, void* data) {
        if (!worker.context->setTensorAddress(name.c_str(), data))
            throw Failure(GREEDY_FAILED, "got an address of " + name + " that the plan refuses, expected another");
    }

    Worker take() {
        std::unique_lock<std::mutex> lock(mutex_);
        returned_.wait(lock, [this] { return !idle_.empty(); });
        Worker worker = std::move(idle_.back());
        idle_.pop_back();
        return worker;
    }

    void give_back(Worker worker) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            idle_.push_back(std::move(worker));
        }
        returned_.notify_one();
    }

    const std::vector<int32_t> aliases_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
#ifdef GREEDY_TENSORRT_RTX
    std::unique_ptr<greedy::plugin::KernelCache> kernels_;  // outlives the contexts
#endif
    std::vector<std::string> inputs_, outputs_, unread_;
    std::unique_ptr<void, Freed> garbage_;  // what `unread_` holds
    std::vector<size_t> bytes_;  // of the outputs
    std::mutex mutex_;
    std::condition_variable returned_;
    std::vector<Worker> idle_;
};

int open_device(const greedy_device_settings* settings, void** device, char* error, size_t size) {
    return guarded(error, size, [&] { *device = new TrtDevice(*settings); });
}
void close_device(void* device) { delete static_cast<TrtDevice*>(device); }

int load(void* device, const greedy_graph_spec* spec, void** graph, char* error, size_t size) {
    return guarded(error, size, [&] { *graph = new TrtGraph(*static_cast<TrtDevice*>(device), *spec); });
}
void unload(void*, void* graph) { delete static_cast<TrtGraph*>(graph); }

int allocate(void*, size_t bytes, greedy_buffer* buffer, char* error, size_t size) {
    return guarded(error, size, [&] {
        check(cudaMalloc(&buffer->data, std::max<size_t>(bytes, 1)), "memory");
        buffer->owner = buffer->data;
        check(cudaMemset(buffer->data, 0, bytes), "memory");
    });
}
void release(void*, greedy_buffer buffer) { cudaFree(buffer.owner); }

int upload(void*, void* to, const void* from, size_t bytes, char* error, size_t size) {
    return guarded(error, size, [&] { check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "copy"); });
}
int download(void*, void* to, const void* from, size_t bytes, char* error, size_t size) {
    return guarded(error, size, [&] { check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "copy"); });
}

int run(void*, void* graph, void* const* inputs, greedy_buffer* outputs, char* error, size_t size) {
    return guarded(error, size, [&] { static_cast<TrtGraph*>(graph)->run(inputs, outputs); });
}

const greedy_plugin kPlugin = {GREEDY_PLUGIN_VERSION,
                               kName,
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
