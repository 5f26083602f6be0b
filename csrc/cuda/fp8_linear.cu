// The C interface of the linear layer in fp8_linear.cuh.

#include "greedy_cuda.h"

#include <cuda_runtime.h>

#include "sm90.cuh"

#include "fp8_linear.cuh"

namespace {

using namespace greedy::fp8_linear;

enum Status { ok = 0, bad_argument = -1, no_driver = -2, no_map = -3, no_launch = -4 };

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function is looked up at run time, so that the library also loads without a driver.
Encode encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
  return status == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
}

// Boxes of height x tile_k bytes of a dense [rows, depth] matrix of bytes.
bool encode(Encode encoder, CUtensorMap* map, const void* matrix, int rows, int depth, int height) {
  const cuuint64_t sizes[] = {cuuint64_t(depth), cuuint64_t(rows)}, strides[] = {cuuint64_t(depth)};
  const cuuint32_t box[] = {tile_k, cuuint32_t(height)}, steps[] = {1, 1};
  return encoder(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(matrix), sizes, strides, box, steps,
                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

int greedy_cuda_fp8_linear(const void* x, const float* x_scale, const void* weight, const float* weight_scale,
                           const void* bias, void* out, int rows, int columns, int depth, void* stream) {
  if (!x || !x_scale || !weight || !weight_scale || !out || rows < 1 || columns < 16 || depth < 16 || columns % 16 ||
      depth % 16 || !aligned(x) || !aligned(weight) || !aligned(weight_scale) || !aligned(bias) || !aligned(out))
    return bad_argument;
  const Encode driver = encoder();
  if (!driver) return no_driver;
  CUtensorMap x_map, w_map;
  if (!encode(driver, &x_map, x, rows, depth, tile_m) || !encode(driver, &w_map, weight, columns, depth, tile_n))
    return no_map;
  if (cudaFuncSetAttribute(multiply, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes) != cudaSuccess)
    return no_launch;
  const dim3 grid((columns + tile_n - 1) / tile_n, (rows + tile_m - 1) / tile_m);
  multiply<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      x_map, w_map, x_scale, weight_scale, static_cast<const __nv_bfloat16*>(bias), static_cast<__nv_bfloat16*>(out),
      rows, columns, depth);
  return cudaGetLastError() == cudaSuccess ? ok : no_launch;
}

int greedy_cuda_fp8_linear_shared_bytes(void) { return shared_bytes; }

const char* greedy_cuda_message(int status) {
  switch (status) {
    case ok: return "done";
    case bad_argument: return "a null or unaligned pointer, or columns or depth that 16 does not divide";
    case no_driver: return "no CUDA driver that knows tensor maps";
    case no_map: return "the driver refused a tensor map";
    case no_launch: return "the launch failed: no sm_90 device, or an earlier error on it";
    default: return "unknown status";
  }
}
