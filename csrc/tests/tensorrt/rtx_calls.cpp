// The calls that plugins/rtx/NvInfer.h declares, for tests/csrc/test_tensorrt_rtx.py. It makes each one on an object
// that notes the slot and the arguments, and NVIDIA's Python package makes the same call.
#include <NvInfer.h>

#include <cstring>
#include <utility>

using namespace nvinfer1;

namespace {

struct Quiet : ILogger {
    void log(Severity, const char*) noexcept override {}
} quiet;

}  // namespace

#define CALL extern "C" __attribute__((visibility("default")))

CALL std::int32_t num_io_tensors(const ICudaEngine* engine) { return engine->getNbIOTensors(); }
CALL const char* get_tensor_name(const ICudaEngine* engine, std::int32_t index) {
    return engine->getIOTensorName(index);
}
CALL std::int32_t get_tensor_mode(const ICudaEngine* engine, const char* name) {
    return static_cast<std::int32_t>(engine->getTensorIOMode(name));
}
CALL std::int32_t get_tensor_dtype(const ICudaEngine* engine, const char* name) {
    return static_cast<std::int32_t>(engine->getTensorDataType(name));
}
CALL void get_tensor_shape(const ICudaEngine* engine, const char* name, std::int64_t* sizes) {
    const Dims dims = engine->getTensorShape(name);
    sizes[0] = dims.nbDims;
    for (int i = 0; i < dims.nbDims; ++i) sizes[i + 1] = dims.d[i];
}
CALL const char* get_aliased_input_tensor(const ICudaEngine* engine, const char* name) {
    return engine->getAliasedInputTensor(name);
}
CALL void* create_execution_context(ICudaEngine* engine) { return engine->createExecutionContext(); }
CALL void* create_configured_context(ICudaEngine* engine, IRuntimeConfig* config) {
    return engine->createExecutionContext(config);
}
CALL void* create_runtime_config(ICudaEngine* engine) { return engine->createRuntimeConfig(); }
CALL void* create_runtime_cache(const IRuntimeConfig* config) { return config->createRuntimeCache(); }
CALL bool set_runtime_cache(IRuntimeConfig* config, const IRuntimeCache* cache) {
    return config->setRuntimeCache(*cache);
}
CALL void* serialize(const IRuntimeCache* cache) { return cache->serialize(); }
CALL bool deserialize(IRuntimeCache* cache, const void* blob, std::size_t size) {
    return cache->deserialize(blob, size);
}
CALL void* memory_data(const IHostMemory* memory) { return memory->data(); }
CALL std::size_t memory_size(const IHostMemory* memory) { return memory->size(); }
CALL bool set_tensor_address(IExecutionContext* context, const char* name, void* data) {
    return context->setTensorAddress(name, data);
}
CALL bool execute_async_v3(IExecutionContext* context, cudaStream_t stream) { return context->enqueueV3(stream); }
CALL std::int32_t get_missing_weights(IRefitter* refitter) { return refitter->getMissingWeights(0, nullptr); }
CALL bool set_named_weights(IRefitter* refitter, const char* name, std::int32_t type, const void* values,
                            std::int64_t count) {
    return refitter->setNamedWeights(name, {static_cast<DataType>(type), values, count});
}
CALL bool refit_cuda_engine(IRefitter* refitter) { return refitter->refitCudaEngine(); }
CALL void* deserialize_cuda_engine(IRuntime* runtime, const void* blob, std::size_t size) {
    return runtime->deserializeCudaEngine(blob, size);
}

CALL ILogger* logger() { return &quiet; }
CALL std::int32_t version() { return kVersion; }
CALL std::int32_t constant(const char* name) {
    static constexpr std::pair<const char*, std::int32_t> kConstants[] = {
        {"DataType.FLOAT", static_cast<std::int32_t>(DataType::kFLOAT)},
        {"DataType.HALF", static_cast<std::int32_t>(DataType::kHALF)},
        {"DataType.INT32", static_cast<std::int32_t>(DataType::kINT32)},
        {"DataType.FP8", static_cast<std::int32_t>(DataType::kFP8)},
        {"DataType.BF16", static_cast<std::int32_t>(DataType::kBF16)},
        {"DataType.INT64", static_cast<std::int32_t>(DataType::kINT64)},
        {"TensorIOMode.NONE", static_cast<std::int32_t>(TensorIOMode::kNONE)},
        {"TensorIOMode.INPUT", static_cast<std::int32_t>(TensorIOMode::kINPUT)},
        {"TensorIOMode.OUTPUT", static_cast<std::int32_t>(TensorIOMode::kOUTPUT)},
        {"ExecutionContextAllocationStrategy.STATIC",
         static_cast<std::int32_t>(ExecutionContextAllocationStrategy::kSTATIC)},
        {"Logger.INTERNAL_ERROR", static_cast<std::int32_t>(ILogger::Severity::kINTERNAL_ERROR)},
        {"Logger.ERROR", static_cast<std::int32_t>(ILogger::Severity::kERROR)},
        {"Logger.WARNING", static_cast<std::int32_t>(ILogger::Severity::kWARNING)},
        {"Logger.INFO", static_cast<std::int32_t>(ILogger::Severity::kINFO)},
        {"Logger.VERBOSE", static_cast<std::int32_t>(ILogger::Severity::kVERBOSE)}};
    for (const auto& [known, value] : kConstants)
        if (!std::strcmp(name, known)) return value;
    return -1;
}
