// A linear layer on e4m3 operands in tiles of 128 x 160: 1560 x 1536 is 130 of them, one round on 132 multiprocessors.
//
// Triton's tiles, powers of two, need two rounds, the second nearly empty. A block has two warpgroups that multiply, 64
// rows each. One thread of a third keeps `stages` copies under way; its warpgroup leaves its registers to the others.
// Tensor cores sum products over 128 of the depth (to 14 bits or so), and float32 adds up these sums.
//
// Uses the functions of sm90.cuh, which a file must include before this one, or replace by its own.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace greedy::fp8_linear {

using namespace greedy::sm90;

constexpr int tile_m = 128, tile_n = 160, tile_k = 128;  // tile_k bytes are one row of a swizzled tile
constexpr int stages = 6;
constexpr int x_bytes = tile_m * tile_k, w_bytes = tile_n * tile_k, stage_bytes = x_bytes + w_bytes;
// 1024 bytes to align the first tile, and two barriers per stage.
constexpr int shared_bytes = 1024 + stages * (stage_bytes + 2 * int(sizeof(uint64_t)));
constexpr int groups = 2, warps = 4 * groups, threads = 128 * (groups + 1);

static_assert(x_bytes % 1024 == 0 && w_bytes % 1024 == 0, "swizzled tiles start at multiples of 1024 bytes");

// Block (i, j): rows from 128 j, columns from 160 i.
__global__ void __launch_bounds__(threads, 1)
    multiply(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
             const float* __restrict__ x_scale, const float* __restrict__ w_scale,
             const __nv_bfloat16* __restrict__ bias, __nv_bfloat16* __restrict__ out, int rows, int columns,
             int depth) {
  extern __shared__ uint8_t memory[];
  // Shared addresses: per stage the tiles of x and weight, a barrier for full tiles, and one for used tiles.
  const uint32_t tiles = (shared_address(memory) + 1023) / 1024 * 1024;
  const uint32_t full = tiles + stages * stage_bytes, empty = full + stages * sizeof(uint64_t);
  const int group = threadIdx.x / 128, lane = threadIdx.x % 32;
  const int top = blockIdx.y * tile_m, left = blockIdx.x * tile_n;
  const int steps = (depth + tile_k - 1) / tile_k;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < stages; ++stage) {
      barrier_init(full + stage * sizeof(uint64_t), 1);
      barrier_init(empty + stage * sizeof(uint64_t), warps);
    }
    barrier_init_fence();
  }
  __syncthreads();

  if (group == groups) {
    registers_down<24>();
    if (threadIdx.x % 128 == 0) {
      for (int step = 0; step < steps; ++step) {
        const int stage = step % stages, round = step / stages;
        // Round r overwrites the tiles of round r - 1, which were used up in phase r - 1 of the barrier.
        if (round > 0) barrier_wait(empty + stage * sizeof(uint64_t), (round - 1) % 2);
        const uint32_t x_tile = tiles + stage * stage_bytes, arrived = full + stage * sizeof(uint64_t);
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
      barrier_wait(full + stage * sizeof(uint64_t), step / stages % 2);
      products_begin();
#pragma unroll
      for (int k = 0; k < tile_k; k += 32) multiply_64x160x32(part, a + k / 16, b + k / 16, k);
      products_commit();
      products_wait(part);
      // Every warp arrives, because it waits only for its own products.
      if (lane == 0) barrier_arrive(empty + stage * sizeof(uint64_t));
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

}  // namespace greedy::fp8_linear
