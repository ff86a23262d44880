// rng: counter-based random numbers, seed and offset read from device memory so that a replayed graph draws new ones
// layout   out [n] u32 | f32, element i = lane i % 4 of counter i / 4; out is 16-byte aligned
// mapping  one counter (four elements, one 16-byte store) per thread and turn, grid-stride
// moves    4 n bytes
// tried    -
#include "ops/rng/rng.h"

#include "base/launch.h"
#include "base/philox.h"
#include "base/ptx.cuh"

namespace engine::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxBlocks = 1024;

// fp64: the specification rounds a double to fp32, and a sampler's noise is a few thousand values.
__device__ __forceinline__ void normal_pair(uint32_t a, uint32_t b, uint32_t* out) {
  const double u = (double(a) + 0.5) * 2.3283064365386963e-10;
  const double radius = sqrt(-2.0 * log(u));
  double s, c;
  sincospi(double(b) * 4.656612873077393e-10, &s, &c);
  out[0] = __float_as_uint(float(radius * c));
  out[1] = __float_as_uint(float(radius * s));
}

__global__ void __launch_bounds__(kThreads) rng_kernel(RngParams p) {
  release_next();
  wait_for_previous();  // seed and offset may come from the node before
  const uint64_t seed = *p.seed, offset = *p.offset;
  uint32_t* out = static_cast<uint32_t*>(p.out);
  const int64_t counters = (p.n + 3) / 4, step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; c < counters; c += step) {
    const Philox r = philox(seed, uint32_t(c), offset, uint32_t(p.stream));
    uint32_t v[4];
    if (p.kind == 2) {
      normal_pair(r.v[0], r.v[1], v);
      normal_pair(r.v[2], r.v[3], v + 2);
    } else {
      for (int j = 0; j < 4; ++j) v[j] = p.kind == 1 ? __float_as_uint(philox_uniform(r.v[j])) : r.v[j];
    }
    if (4 * c + 4 <= p.n) {
      *reinterpret_cast<uint4*>(out + 4 * c) = make_uint4(v[0], v[1], v[2], v[3]);
    } else {
      for (int j = 0; j < 4; ++j)
        if (4 * c + j < p.n) out[4 * c + j] = v[j];
    }
  }
}

}  // namespace

void rng(const RngParams& p, void* stream) {
  const Launch l = {blocks_for((p.n + 3) / 4, kThreads, kMaxBlocks), kThreads, 0, stream, true};
  launch("rng", rng_kernel, l, p);
}

}  // namespace engine::cuda
