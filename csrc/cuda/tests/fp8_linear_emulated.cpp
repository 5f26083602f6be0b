// The kernel of fp8_linear.cuh on a processor: one thread for every thread of a block, and sm90.cuh replaced by the
// instructions as the PTX manual describes them. It tests that indices, swizzles, edges and barriers fit together. It
// does not test our reading of the manual, nor speed.
//
// Shared memory is a buffer that holds every tile as the copy engine swizzles it: bits 4 to 6 of an address are
// exclusive-ored with bits 7 to 9. Products happen at once; a GPU may still compute them until products_wait. A tile
// that is overwritten too early still gives a wrong result, because the copy waits only for barriers.

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <barrier>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#undef __global__
#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#undef __restrict__
#define __global__
#define __shared__
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__

struct Index {
  int x, y;
};
static thread_local Index threadIdx, blockIdx;

// A dense matrix of bytes and the height of its boxes.
struct CUtensorMap {
  const uint8_t* bytes;
  int rows, depth, height;
};

namespace greedy::fp8_linear {
uint8_t memory[232448];  // the limit of a block
}

static std::barrier<>* block;
static std::vector<std::unique_ptr<std::barrier<>>>* warps_of_block;
static void __syncthreads() { block->arrive_and_wait(); }
// .aligned instructions wait for their warp.
static void together() { (*warps_of_block)[threadIdx.x / 32]->arrive_and_wait(); }

namespace greedy::sm90 {

struct Barrier {
  int arrivals, pending;
  long bytes = 0;
  int phase = 0;
};

std::mutex lock;
std::condition_variable changed;
std::map<uint32_t, Barrier> barriers;

uint32_t shared_address(const void* pointer) {
  return 48 + uint32_t(static_cast<const uint8_t*>(pointer) - greedy::fp8_linear::memory);  // not aligned to 1024
}

uint8_t& byte_at(uint32_t address) { return greedy::fp8_linear::memory[address - 48]; }
uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

void change(uint32_t address, int arrivals, long bytes) {
  const std::lock_guard<std::mutex> guard(lock);
  Barrier& barrier = barriers.at(address);
  barrier.pending -= arrivals;
  barrier.bytes += bytes;
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.pending = barrier.arrivals;
    ++barrier.phase;
    changed.notify_all();
  }
}

void barrier_init(uint32_t address, int arrivals) { barriers[address] = {arrivals, arrivals}; }
void barrier_init_fence() {}
void barrier_arrive(uint32_t address) { change(address, 1, 0); }
void barrier_expect(uint32_t address, int bytes) { change(address, 1, bytes); }
void barrier_wait(uint32_t address, int parity) {
  std::unique_lock<std::mutex> guard(lock);
  changed.wait(guard, [&] { return barriers.at(address).phase % 2 != parity; });
}

void copy_tile(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column, int row) {
  for (int r = 0; r < map->height; ++r)
    for (int c = 0; c < 128; ++c) {
      const bool inside = row + r < map->rows && column + c < map->depth;
      byte_at(swizzled(to + 128 * r + c)) = inside ? map->bytes[int64_t(row + r) * map->depth + column + c] : 0;
    }
  change(barrier, 0, -128L * map->height);
}

template <int count>
void registers_down() {}
template <int count>
void registers_up() {}
void products_begin() { together(); }
void products_commit() { together(); }
template <int count>
void products_wait(float (&)[count]) {
  together();
}

// As sm90.cuh makes it.
uint64_t tile_descriptor(uint32_t address) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// Number k of row r of the operand that a descriptor names.
float operand(uint64_t descriptor, int r, int k) {
  const uint32_t start = (descriptor & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
  if (descriptor >> 62 != 1) throw "not swizzled by 128 bytes";
  __nv_fp8_e4m3 value;
  value.__x = byte_at(swizzled(start + r / 8 * stride + r % 8 * 128 + k));
  return float(value);
}

void multiply_64x160x32(float (&s)[80], uint64_t a, uint64_t b, int add) {
  const int t = threadIdx.x % 128;
  float x[2][32];
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < 32; ++k) x[half][k] = operand(a, 16 * (t / 32) + t % 32 / 4 + 8 * half, k);
  for (int j = 0; j < 20; ++j)
    for (int odd = 0; odd < 2; ++odd) {
      float sum[2] = {};
      for (int k = 0; k < 32; ++k) {
        const float w = operand(b, 8 * j + 2 * (t % 4) + odd, k);
        sum[0] += x[0][k] * w;
        sum[1] += x[1][k] * w;
      }
      for (int half = 0; half < 2; ++half) {
        float& to = s[4 * j + 2 * half + odd];
        to = sum[half] + (add ? to : 0.0f);
      }
    }
}

}  // namespace greedy::sm90

#include "../fp8_linear.cuh"

namespace {

using namespace greedy::fp8_linear;

// Largest error of a product of random numbers, as a part of the rounding error of bfloat16.
double error(int rows, int columns, int depth, bool with_bias) {
  std::mt19937 random(rows + columns + depth);
  std::normal_distribution<float> normal;
  const auto bytes = [&](size_t count) {
    std::vector<uint8_t> made(count);
    for (uint8_t& value : made) value = __nv_fp8_e4m3(8 * normal(random)).__x;
    return made;
  };
  const auto number = [](uint8_t bits) {
    __nv_fp8_e4m3 value;
    value.__x = bits;
    return double(float(value));
  };
  const std::vector<uint8_t> x = bytes(size_t(rows) * depth), w = bytes(size_t(columns) * depth);
  std::vector<float> x_scale(rows), w_scale(columns);
  for (float& scale : x_scale) scale = std::exp(normal(random));
  for (float& scale : w_scale) scale = std::exp(normal(random));
  std::vector<__nv_bfloat16> bias(columns), out(size_t(rows) * columns, __nv_bfloat16(NAN));
  for (__nv_bfloat16& value : bias) value = __nv_bfloat16(100 * normal(random));

  for (int j = 0; j * tile_m < rows; ++j)
    for (int i = 0; i * tile_n < columns; ++i) {
      std::memset(memory, 0x7F, sizeof memory);  // NaN
      std::barrier<> all(threads);
      block = &all;
      std::vector<std::unique_ptr<std::barrier<>>> each;
      for (int warp = 0; warp < threads / 32; ++warp) each.push_back(std::make_unique<std::barrier<>>(32));
      warps_of_block = &each;
      std::vector<std::thread> running;
      for (int t = 0; t < threads; ++t)
        running.emplace_back([&, t] {
          threadIdx = {t, 0};
          blockIdx = {i, j};
          multiply({x.data(), rows, depth, tile_m}, {w.data(), columns, depth, tile_n}, x_scale.data(), w_scale.data(),
                   with_bias ? bias.data() : nullptr, out.data(), rows, columns, depth);
        });
      for (std::thread& thread : running) thread.join();
    }

  double worst = 0;
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c) {
      double sum = 0, size = 0;
      for (int k = 0; k < depth; ++k) {
        const double term = number(x[size_t(r) * depth + k]) * number(w[size_t(c) * depth + k]);
        sum += term;
        size += std::abs(term);
      }
      const double scale = double(x_scale[r]) * w_scale[c], add = with_bias ? double(float(bias[c])) : 0;
      const double truth = sum * scale + add, found = float(out[size_t(r) * columns + c]);
      const double allowed = std::abs(truth) / 256 + 1e-6 * size * scale;
      worst = std::max(worst, std::isnan(found) ? INFINITY : std::abs(found - truth) / allowed);
    }
  return worst;
}

}  // namespace

int main() {
  // One number; edges in every direction; more steps than stages, twice round; whole tiles.
  const int shapes[][3] = {{1, 16, 16}, {130, 176, 144}, {37, 48, 1808}, {128, 160, 256}};
  bool right = true;
  for (const auto& [rows, columns, depth] : shapes)
    for (const bool with_bias : {false, true}) {
      const double found = error(rows, columns, depth, with_bias);
      std::printf("%d x %d x %d%s: %.3f of what rounding may cost\n", rows, columns, depth, with_bias ? " + bias" : "",
                  found);
      right = right && found <= 1;
    }
  return right ? 0 : 1;
}
