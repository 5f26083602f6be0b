// What the tensorrt_rtx plugin calls of TensorRT for RTX 1.7. It is our own declaration, because the pip packages hold
// no headers; NVIDIA's, from the SDK, work as well (GREEDY_TENSORRT_RTX_INCLUDE).
//
// An object of the library is a pointer to a vtable with its destructors, and a pointer to an implementation. A call is
// made through the implementation's vtable. The number in each call is the function's slot there, which is the
// library's binary interface. tests/csrc/test_tensorrt_rtx.py compares slots and arguments with those of the calls that
// NVIDIA's own Python package makes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_runtime_api.h"

// The version whose slots stand here. The library of another version may have others, and checks nothing.
#define NV_TENSORRT_MAJOR 1
#define NV_TENSORRT_MINOR 7
#define NV_TENSORRT_PATCH 1

extern "C" {
std::int32_t getInferLibVersion() noexcept;  // 10701 is 1.7.1
void* createInferRuntime_INTERNAL(void* logger, std::int32_t version) noexcept;
void* createInferRefitter_INTERNAL(void* engine, void* logger, std::int32_t version) noexcept;
}

namespace nvinfer1 {

constexpr std::int32_t kVersion = NV_TENSORRT_MAJOR * 10000 + NV_TENSORRT_MINOR * 100 + NV_TENSORRT_PATCH;

enum class DataType : std::int32_t { kFLOAT = 0, kHALF = 1, kINT32 = 3, kFP8 = 6, kBF16 = 7, kINT64 = 8 };
enum class TensorIOMode : std::int32_t { kNONE = 0, kINPUT = 1, kOUTPUT = 2 };
enum class ExecutionContextAllocationStrategy : std::int32_t { kSTATIC = 0 };

struct Dims {
    std::int32_t nbDims;
    std::int64_t d[8];
};
struct Weights {
    DataType type;
    const void* values;
    std::int64_t count;
};

enum class APILanguage : std::int32_t { kCPP = 0 };

struct InterfaceInfo {
    const char* kind;
    std::int32_t major, minor;
};

// The order of these functions is the library's binary interface too.
class ILogger {
  public:
    enum class Severity : std::int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3, kVERBOSE = 4 };
    virtual APILanguage getAPILanguage() const noexcept { return APILanguage::kCPP; }
    virtual InterfaceInfo getInterfaceInfo() const noexcept { return {"ILogger", 1, 0}; }
    virtual ~ILogger() = default;
    virtual void log(Severity severity, const char* text) noexcept = 0;
};

// Made by the library, deleted by the caller.
class Object {
  public:
    virtual ~Object() = default;
    Object(const Object&) = delete;
    Object& operator=(const Object&) = delete;

  protected:
    Object() = default;

    template <std::size_t slot, typename Result, typename... Arguments>
    Result call(Arguments... arguments) const noexcept {
        using Function = Result (*)(void*, Arguments...);
        return reinterpret_cast<Function>((*static_cast<void***>(implementation_))[slot])(implementation_,
                                                                                          arguments...);
    }

  private:
    void* implementation_ = nullptr;
};

class IHostMemory : public Object {
  public:
    void* data() const noexcept { return call<2, void*>(); }
    std::size_t size() const noexcept { return call<3, std::size_t>(); }
};

// Kernels that were compiled for this GPU.
class IRuntimeCache : public Object {
  public:
    IHostMemory* serialize() const noexcept { return call<2, IHostMemory*>(); }
    // False, and the cache stays as it is, for content that is damaged or made elsewhere.
    bool deserialize(const void* blob, std::size_t size) noexcept { return call<3, bool>(blob, size); }
};

class IRuntimeConfig : public Object {
  public:
    IRuntimeCache* createRuntimeCache() const noexcept { return call<5, IRuntimeCache*>(); }
    bool setRuntimeCache(const IRuntimeCache& cache) noexcept { return call<6, bool>(&cache); }
};

class IExecutionContext : public Object {
  public:
    bool setTensorAddress(const char* name, void* data) noexcept { return call<23, bool>(name, data); }
    bool enqueueV3(cudaStream_t stream) noexcept { return call<36, bool>(stream); }
};

class ICudaEngine : public Object {
  public:
    IExecutionContext* createExecutionContext() noexcept {
        return call<5, IExecutionContext*>(ExecutionContextAllocationStrategy::kSTATIC);
    }
    IExecutionContext* createExecutionContext(IRuntimeConfig* config) noexcept {
        return call<47, IExecutionContext*>(config);
    }
    IRuntimeConfig* createRuntimeConfig() noexcept { return call<48, IRuntimeConfig*>(); }
    Dims getTensorShape(const char* name) const noexcept { return call<15, Dims>(name); }
    DataType getTensorDataType(const char* name) const noexcept { return call<16, DataType>(name); }
    TensorIOMode getTensorIOMode(const char* name) const noexcept { return call<19, TensorIOMode>(name); }
    std::int32_t getNbIOTensors() const noexcept { return call<26, std::int32_t>(); }
    const char* getIOTensorName(std::int32_t index) const noexcept { return call<27, const char*>(index); }
    const char* getAliasedInputTensor(const char* name) const noexcept { return call<50, const char*>(name); }
};

class IRefitter : public Object {
  public:
    bool refitCudaEngine() noexcept { return call<4, bool>(); }
    bool setNamedWeights(const char* name, Weights weights) noexcept { return call<9, bool>(name, weights); }
    std::int32_t getMissingWeights(std::int32_t size, const char** names) noexcept {
        return call<10, std::int32_t>(size, names);
    }
};

class IRuntime : public Object {
  public:
    ICudaEngine* deserializeCudaEngine(const void* blob, std::size_t size) noexcept {
        return call<3, ICudaEngine*>(blob, size);
    }
};

inline IRuntime* createInferRuntime(ILogger& logger) noexcept {
    return static_cast<IRuntime*>(createInferRuntime_INTERNAL(&logger, kVersion));
}
inline IRefitter* createInferRefitter(ICudaEngine& engine, ILogger& logger) noexcept {
    return static_cast<IRefitter*>(createInferRefitter_INTERNAL(&engine, &logger, kVersion));
}

}  // namespace nvinfer1
