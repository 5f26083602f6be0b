// The part of TensorRT 11 that csrc/plugins/tensorrt.cpp uses: the published declarations over an engine that is a list
// of tensors. A plan is text, one line per tensor: "in|out NAME TYPE COUNT [ALIASED INPUT]", or "weight NAME". A run
// adds 1 to the first float of every output. With GREEDY_TENSORRT_RTX it is TensorRT for RTX: a context compiles one
// kernel for each output, unless a cache has it. It tests the plugin's own code, nothing of TensorRT.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "cuda_runtime_api.h"

#ifdef GREEDY_TENSORRT_RTX
#define NV_TENSORRT_MAJOR 1
#define NV_TENSORRT_MINOR 7
inline int32_t stand_in_library = 10701;
#else
inline int32_t stand_in_library = 110000;
#endif
inline int stand_in_compiled = 0;  // kernels so far

inline int32_t getInferLibVersion() noexcept { return stand_in_library; }

namespace nvinfer1 {

enum class DataType : int32_t { kFLOAT = 0, kHALF = 1, kINT32 = 3, kBF16 = 7, kFP8 = 6, kINT64 = 8 };
enum class TensorIOMode : int32_t { kNONE = 0, kINPUT = 1, kOUTPUT = 2 };

struct Dims {
    int32_t nbDims = 0;
    int64_t d[8] = {};
};
struct Weights {
    DataType type;
    const void* values;
    int64_t count;
};

class ILogger {
  public:
    enum class Severity : int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3, kVERBOSE = 4 };
    virtual void log(Severity severity, const char* msg) noexcept = 0;
    virtual ~ILogger() = default;
};

struct StandInTensor {
    std::string name, aliased;
    TensorIOMode mode;
    DataType type;
    int64_t count;
};

class IExecutionContext {
  public:
    explicit IExecutionContext(const std::vector<StandInTensor>& tensors) : tensors_(tensors) {}
    bool setTensorAddress(char const* tensorName, void* data) noexcept { return addresses_[tensorName] = data, data; }
    bool enqueueV3(cudaStream_t) noexcept {
        for (const StandInTensor& tensor : tensors_) {
            if (!addresses_.count(tensor.name)) return false;
            if (tensor.mode == TensorIOMode::kOUTPUT) static_cast<float*>(addresses_[tensor.name])[0] += 1;
        }
        return true;
    }

  private:
    const std::vector<StandInTensor>& tensors_;
    std::map<std::string, void*> addresses_;
};

class IHostMemory {
  public:
    explicit IHostMemory(std::string content) : content_(std::move(content)) {}
    void* data() noexcept { return content_.data(); }
    std::size_t size() const noexcept { return content_.size(); }

  private:
    std::string content_;
};

class IRuntimeCache {
  public:
    std::set<std::string> kernels;

    IHostMemory* serialize() const noexcept {
        std::string content = "kernels";
        for (const std::string& kernel : kernels) content += " " + kernel;
        return new IHostMemory(content);
    }
    bool deserialize(void const* blob, std::size_t size) noexcept {
        std::istringstream words(std::string(static_cast<const char*>(blob), size));
        std::string word;
        if (!(words >> word) || word != "kernels") return false;
        while (words >> word) kernels.insert(word);
        return true;
    }
};

class IRuntimeConfig {
  public:
    IRuntimeCache* cache = nullptr;

    IRuntimeCache* createRuntimeCache() const noexcept { return new IRuntimeCache; }
    bool setRuntimeCache(IRuntimeCache const& used) noexcept { return cache = const_cast<IRuntimeCache*>(&used), true; }
};

class ICudaEngine {
  public:
    std::vector<StandInTensor> tensors;
    std::vector<std::string> missing;

    int32_t getNbIOTensors() const noexcept { return static_cast<int32_t>(tensors.size()); }
    char const* getIOTensorName(int32_t index) const noexcept {
        return tensors[static_cast<std::size_t>(index)].name.c_str();
    }
    TensorIOMode getTensorIOMode(char const* name) const noexcept {
        return find(name) ? find(name)->mode : TensorIOMode::kNONE;
    }
    Dims getTensorShape(char const* name) const noexcept {
        Dims dims;
        dims.nbDims = 1, dims.d[0] = find(name)->count;
        return dims;
    }
    DataType getTensorDataType(char const* name) const noexcept { return find(name)->type; }
    char const* getAliasedInputTensor(char const* name) const noexcept {
        return find(name)->aliased.empty() ? nullptr : find(name)->aliased.c_str();
    }
    IRuntimeConfig* createRuntimeConfig() noexcept { return new IRuntimeConfig; }
    IExecutionContext* createExecutionContext(IRuntimeConfig* config = nullptr) noexcept {
        IRuntimeCache* cache = config ? config->cache : nullptr;
        for (const StandInTensor& tensor : tensors)
            if (tensor.mode == TensorIOMode::kOUTPUT && (!cache || cache->kernels.insert(tensor.name).second))
                ++stand_in_compiled;
        return new IExecutionContext(tensors);
    }

  private:
    const StandInTensor* find(const std::string& name) const {
        for (const StandInTensor& tensor : tensors)
            if (tensor.name == name) return &tensor;
        return nullptr;
    }
};

class IRefitter {
  public:
    explicit IRefitter(ICudaEngine& engine) : engine_(engine) {}
    int32_t getMissingWeights(int32_t size, char const** names) noexcept {
        for (int32_t i = 0; i < size; ++i) names[i] = engine_.missing[static_cast<std::size_t>(i)].c_str();
        return static_cast<int32_t>(engine_.missing.size());
    }
    bool setNamedWeights(char const*, Weights weights) noexcept { return ++set_, weights.values != nullptr; }
    bool refitCudaEngine() noexcept { return set_ == engine_.missing.size(); }

  private:
    ICudaEngine& engine_;
    std::size_t set_ = 0;
};

class IRuntime {
  public:
    ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept {
        std::istringstream plan(std::string(static_cast<const char*>(blob), size));
        auto* engine = new ICudaEngine;
        for (std::string line, kind; std::getline(plan, line);) {
            std::istringstream words(line);
            StandInTensor tensor{};
            int32_t type = 0;
            words >> kind >> tensor.name >> type >> tensor.count >> tensor.aliased;
            tensor.mode = kind == "in" ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
            tensor.type = static_cast<DataType>(type);
            if (kind == "weight")
                engine->missing.push_back(tensor.name);
            else
                engine->tensors.push_back(tensor);
        }
        return engine;
    }
};

inline IRuntime* createInferRuntime(ILogger&) noexcept { return new IRuntime; }
inline IRefitter* createInferRefitter(ICudaEngine& engine, ILogger&) noexcept { return new IRefitter(engine); }

}  // namespace nvinfer1
