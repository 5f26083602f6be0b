// The part of the CUDA runtime that csrc/plugins/tensorrt.cpp uses, on the host: the plugin then runs without a GPU.
#pragma once

#include <cstdlib>
#include <cstring>

enum cudaError_t { cudaSuccess = 0, cudaErrorMemoryAllocation = 2, cudaErrorInsufficientDriver = 35 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76 };
using cudaStream_t = struct CUstream_st*;

inline int stand_in_gpu = 90;  // its compute capability, times 10; 0: there is none

inline const char* cudaGetErrorString(cudaError_t) { return "an error of the stand-in"; }
inline cudaError_t cudaGetDevice(int* device) {
    return *device = 0, stand_in_gpu ? cudaSuccess : cudaErrorInsufficientDriver;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
    return *value = what == cudaDevAttrComputeCapabilityMajor ? stand_in_gpu / 10 : stand_in_gpu % 10, cudaSuccess;
}
inline cudaError_t cudaMalloc(void** data, std::size_t bytes) {
    *data = std::calloc(bytes, 1);
    return *data ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFree(void* data) { return std::free(data), cudaSuccess; }
inline cudaError_t cudaMemset(void* data, int value, std::size_t bytes) {
    return std::memset(data, value, bytes), cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
    return std::memmove(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaStreamCreate(cudaStream_t* stream) { return *stream = nullptr, cudaSuccess; }
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
