// Host stand-in for the CUDA runtime: the unmodified .cu text compiled by the host compiler, one CUDA thread after the
// other. Covers kernels whose threads do not talk to each other; __syncthreads and shuffles are not declared, so a
// kernel that needs them does not compile here instead of computing something else.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline thread_local dim3 gridDim, blockDim, blockIdx, threadIdx;

inline float __uint_as_float(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
inline uint32_t __float_as_uint(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}
inline void sincospi(double x, double* s, double* c) {
  *s = std::sin(x * 3.141592653589793);
  *c = std::cos(x * 3.141592653589793);
}

namespace engine::emu {

// Every thread of every block, in an order that changes from launch to launch: results must not depend on it.
template <class Body> void run(dim3 grid, dim3 block, size_t, Body body) {
  static thread_local std::mt19937 shuffle(1);
  const unsigned per_block = block.x * block.y * block.z, blocks = grid.x * grid.y * grid.z;
  std::vector<uint64_t> order(size_t(per_block) * blocks);
  std::iota(order.begin(), order.end(), uint64_t(0));
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[shuffle() % i]);
  gridDim = grid;
  blockDim = block;
  for (const uint64_t id : order) {
    const unsigned b = unsigned(id / per_block), t = unsigned(id % per_block);
    blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y));
    threadIdx = dim3(t % block.x, t / block.x % block.y, t / (block.x * block.y));
    body();
  }
}

}  // namespace engine::emu
