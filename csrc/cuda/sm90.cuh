// Short functions for Hopper's asynchronous units: barriers in shared memory, tile copies, warpgroup products.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace greedy::sm90 {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers known to the copy engine.
__device__ inline void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives once and announces `bytes` that copies will bring.
__device__ inline void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits until the phase of this parity is over: parity 0 for the first phase, 1 for the second, 0 for the third.
__device__ inline void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Copies the map's box at (column, row) to shared memory, zeros outside the matrix; its bytes arrive at the barrier.
__device__ inline void copy_tile(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

// A tile whose rows are 128 bytes, swizzled by 128 bytes as CU_TENSOR_MAP_SWIZZLE_128B leaves it, for a product along
// the rows: start address, 1024 bytes from one 8 rows to the next, swizzle mode 1. The tile starts at a multiple of 1024.
__device__ inline uint64_t tile_descriptor(uint32_t address) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// Registers per thread from here on, for the whole warpgroup: it releases some, or takes those that others released.
template <int count>
__device__ inline void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ inline void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all committed products of this warp. `sums` keeps the compiler from reading results before the wait.
template <int count>
__device__ inline void products_wait(float (&sums)[count]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (float& sum : sums) asm volatile("" : "+f"(sum)::"memory");
}

// sums = a b^T (or += where add is not 0): a 64 x 32 e4m3 and b 160 x 32 e4m3 by descriptor, over one warpgroup.
// Thread t has, for 8 columns j: sums[4 j + {0, 1}] at row 16 (t / 32) + t % 32 / 4, columns 8 j + 2 (t % 4) + {0, 1},
// and sums[4 j + {2, 3}] 8 rows below.
__device__ inline void multiply_64x160x32(float (&s)[80], uint64_t a, uint64_t b, int add) {
#define GREEDY_8(i) \
  "+f"(s[i]), "+f"(s[i + 1]), "+f"(s[i + 2]), "+f"(s[i + 3]), "+f"(s[i + 4]), "+f"(s[i + 5]), "+f"(s[i + 6]), "+f"(s[i + 7])
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %82, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n160k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79}, "
      "%80, %81, p, 1, 1;\n"
      "}\n"
      : GREEDY_8(0), GREEDY_8(8), GREEDY_8(16), GREEDY_8(24), GREEDY_8(32), GREEDY_8(40), GREEDY_8(48), GREEDY_8(56),
        GREEDY_8(64), GREEDY_8(72)
      : "l"(a), "l"(b), "r"(add));
#undef GREEDY_8
}

}  // namespace greedy::sm90
