// A linear layer on e4m3 operands in tiles of 128 x 160: 1560 x 1536 is 130 of them, one round on 132 multiprocessors.
//
// Tiles of powers of two do it in two rounds, the second nearly empty; that is why this one is not left to Triton. A
// block has two warpgroups that multiply, 64 rows each, and a third, of which one thread keeps `stages` copies under way
// and which leaves its registers to the others. Products over 128 of the depth are summed by the tensor cores (to 14
// bits or so) and then added up in float32.

#include "greedy_cuda.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "sm90.cuh"

namespace {

using namespace greedy::sm90;

constexpr int tile_m = 128, tile_n = 160, tile_k = 128;  // tile_k bytes are one row of a swizzled tile
constexpr int stages = 6;
constexpr int x_bytes = tile_m * tile_k, w_bytes = tile_n * tile_k, stage_bytes = x_bytes + w_bytes;
constexpr int shared_bytes = 1024 + stages * stage_bytes;  // 1024 to align the first tile
constexpr int groups = 2, warps = 4 * groups, threads = 128 * (groups + 1);

static_assert(x_bytes % 1024 == 0 && w_bytes % 1024 == 0, "swizzled tiles start at multiples of 1024 bytes");

// Block (i, j): rows from 128 j, columns from 160 i.
__global__ void __launch_bounds__(threads, 1)
    fp8_linear(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
               const float* __restrict__ x_scale, const float* __restrict__ w_scale,
               const __nv_bfloat16* __restrict__ bias, __nv_bfloat16* __restrict__ out, int rows, int columns,
               int depth) {
  extern __shared__ uint8_t memory[];
  __shared__ alignas(8) uint64_t full[stages], empty[stages];
  const uint32_t tiles = (shared_address(memory) + 1023) / 1024 * 1024;
  const int group = threadIdx.x / 128, lane = threadIdx.x % 32;
  const int top = blockIdx.y * tile_m, left = blockIdx.x * tile_n;
  const int steps = (depth + tile_k - 1) / tile_k;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < stages; ++stage) {
      barrier_init(shared_address(&full[stage]), 1);
      barrier_init(shared_address(&empty[stage]), warps);
    }
    barrier_init_fence();
  }
  __syncthreads();

  if (group == groups) {
    registers_down<24>();
    if (threadIdx.x % 128 == 0) {
      for (int step = 0; step < steps; ++step) {
        const int stage = step % stages, round = step / stages;
        // Round r overwrites what round r - 1 left; that was used up in phase r - 1 of the barrier.
        if (round > 0) barrier_wait(shared_address(&empty[stage]), (round - 1) % 2);
        const uint32_t x_tile = tiles + stage * stage_bytes, arrived = shared_address(&full[stage]);
        barrier_expect(arrived, stage_bytes);
        copy_tile(x_tile, &x_map, arrived, step * tile_k, top);
        copy_tile(x_tile + x_bytes, &w_map, arrived, step * tile_k, left);
      }
    }
  } else {
    registers_up<240>();
    float sums[80] = {}, part[80];
    for (int step = 0; step < steps; ++step) {
      const int stage = step % stages;
      const uint32_t x_tile = tiles + stage * stage_bytes;
      const uint64_t a = tile_descriptor(x_tile + group * 64 * tile_k), b = tile_descriptor(x_tile + x_bytes);
      barrier_wait(shared_address(&full[stage]), step / stages % 2);
      products_begin();
#pragma unroll
      for (int k = 0; k < tile_k; k += 32) multiply_64x160x32(part, a + k / 16, b + k / 16, k);
      products_commit();
      products_wait(part);
      if (lane == 0) barrier_arrive(shared_address(&empty[stage]));  // every warp: it knows of its own products alone
#pragma unroll
      for (int i = 0; i < 80; ++i) sums[i] += part[i];
    }

    const int row = top + 64 * group + 16 * (threadIdx.x / 32 % 4) + lane / 4;
#pragma unroll
    for (int j = 0; j < tile_n / 8; ++j) {
      const int column = left + 8 * j + 2 * (lane % 4);
      if (column >= columns) break;
      const float2 scale = *reinterpret_cast<const float2*>(w_scale + column);
      const float2 add = bias ? __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(bias + column)) : float2{};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = row + 8 * half;
        if (at >= rows) continue;
        const float by = x_scale[at];
        const float2 value = {sums[4 * j + 2 * half] * by * scale.x + add.x,
                              sums[4 * j + 2 * half + 1] * by * scale.y + add.y};
        *reinterpret_cast<__nv_bfloat162*>(out + int64_t(at) * columns + column) = __float22bfloat162_rn(value);
      }
    }
  }
}

enum Status { ok = 0, bad_argument = -1, no_driver = -2, no_map = -3, no_launch = -4 };

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function, asked for at run time: the library also loads where there is no driver.
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
  if (cudaFuncSetAttribute(fp8_linear, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes) != cudaSuccess)
    return no_launch;
  const dim3 grid((columns + tile_n - 1) / tile_n, (rows + tile_m - 1) / tile_m);
  fp8_linear<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      x_map, w_map, x_scale, weight_scale, static_cast<const __nv_bfloat16*>(bias), static_cast<__nv_bfloat16*>(out),
      rows, columns, depth);
  return cudaGetLastError() == cudaSuccess ? ok : no_launch;
}

int greedy_cuda_fp8_linear_shared_bytes(void) { return shared_bytes + int(sizeof(uint64_t)) * 2 * stages; }

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
