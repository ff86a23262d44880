// Barriers, shuffles, atomics and cp.async: each pattern right, and with the faults that the emulator must find.
#include "base/ptx.cuh"
#include "probe.h"

namespace engine::cuda {
namespace {

enum Fault { kRight, kNoBarrier, kDivergent, kExit, kOtherLine, kOverrun, kUninitialised, kNoFence };

template <Fault F> __global__ void block_sum(const float* in, float* out, int) {
  __shared__ float part[256];
  const unsigned t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  if (F != kUninitialised || t != 7) part[t] = in[i];
  for (unsigned half = 128; half; half /= 2) {
    if (F == kDivergent) {
      if (t < half) __syncthreads();
    } else if (F == kOtherLine) {
      if (t < half) {
        __syncthreads();
      } else {
        __syncthreads();
      }
    } else if (F != kNoBarrier) {
      __syncthreads();
    }
    if (F == kExit && t == 200) return;
    if (t < half) part[t] += part[t + half];
  }
  if (t == 0) out[blockIdx.x] = part[0];
}
PROBE(block_sum, block_sum<kRight>, 3, 256)
PROBE(block_sum_no_barrier, block_sum<kNoBarrier>, 3, 256)
PROBE(block_sum_divergent, block_sum<kDivergent>, 3, 256)
PROBE(block_sum_exit, block_sum<kExit>, 3, 256)
PROBE(block_sum_other_line, block_sum<kOtherLine>, 3, 256)
PROBE(block_sum_uninitialised, block_sum<kUninitialised>, 3, 256)

template <Fault F> __global__ void warp_sum(const float* in, float* out, int n) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  float v = int(i) < n ? in[i] : 0.0f;
  if (F == kDivergent && threadIdx.x % 32 == 5) {
    __syncwarp();
  } else {
    for (int d = 16; d; d /= 2) v += __shfl_xor_sync(~0u, v, d);
  }
  if (threadIdx.x % 32 == 0) out[i / 32] = v;
}
PROBE(warp_sum, warp_sum<kRight>, 2, 64)
PROBE(warp_sum_divergent, warp_sum<kDivergent>, 2, 64)

// Every collective of a warp, one word of out per lane and collective.
__global__ void collectives(const int* in, int* out, int) {
  const int t = int(threadIdx.x), v = in[t];
  int* o = out + t;
  o[0] = __shfl_sync(~0u, v, t ^ 3);
  o[32] = __shfl_up_sync(~0u, v, 5);
  o[64] = __shfl_down_sync(~0u, v, 5);
  o[96] = __shfl_xor_sync(~0u, v, 4, 8);
  o[128] = __shfl_down_sync(~0u, v, 3, 8);
  o[160] = int(__ballot_sync(~0u, v > 0));
  o[192] = __any_sync(~0u, v > 1000000) + 2 * __all_sync(~0u, v > -1000000);
  o[224] = __reduce_max_sync(~0u, v);
  o[256] = __reduce_add_sync(~0u, v);
  // Two halves of a warp on their own.
  const unsigned mask = t < 16 ? 0xFFFFu : 0xFFFF0000u;
  o[288] = __reduce_min_sync(mask, v);
  o[320] = int(__shfl_xor_sync(~0u, (long long)v << 20, 1) >> 20);
  o[352] = __syncthreads_count(v > 0) + 1000 * __syncthreads_or(v == in[0]) + 10000 * __syncthreads_and(v > 0);
}
PROBE(collectives, collectives, 1, 32)

// The block that takes the last ticket adds what all have written.
template <Fault F> __global__ void last_block(const float* in, float* out, int n) {
  __shared__ bool last;
  float* partial = out + 2;
  unsigned* ticket = reinterpret_cast<unsigned*>(out + 1);
  float v = 0;
  for (int i = int(blockIdx.x * blockDim.x + threadIdx.x); i < n; i += int(gridDim.x * blockDim.x)) v += in[i];
  for (int d = 16; d; d /= 2) v += __shfl_down_sync(~0u, v, unsigned(d));
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = v;
    if (F != kNoFence) __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  v = threadIdx.x < gridDim.x ? partial[threadIdx.x] : 0.0f;
  for (int d = 16; d; d /= 2) v += __shfl_down_sync(~0u, v, unsigned(d));
  if (threadIdx.x == 0) {
    out[0] = v;
    *ticket = 0;
  }
}
PROBE(last_block, last_block<kRight>, 9, 32)
PROBE(last_block_no_fence, last_block<kNoFence>, 9, 32)

// Blocks that add to the same word without an atomic.
__global__ void block_race(const float* in, float* out, int) {
  if (threadIdx.x == 0) out[0] += in[blockIdx.x];
}
PROBE(block_race, block_race, 4, 32)

template <Fault F> __global__ void twice(const float* in, float* out, int n) {
  float* tile = reinterpret_cast<float*>(shared_memory());
  const int t = int(threadIdx.x);
  tile[F == kOverrun ? t + 1 : t] = in[t];
  __syncthreads();
  out[t] = tile[n - 1 - t] + tile[n - 1 - t];
}
PROBE(twice, twice<kRight>, 1, 64, 256)
PROBE(twice_overrun, twice<kOverrun>, 1, 64, 256)
PROBE(too_much_shared, twice<kRight>, 1, 64, 100 * 1024 + 1)
PROBE(too_many_threads, twice<kRight>, 1, 1025)
PROBE(no_blocks, twice<kRight>, 0, 32)

template <Fault F> __global__ void static_overrun(const float* in, float* out, int n) {
  __shared__ float tile[64];
  tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  const float* at = tile;  // not an array any more: its bound is for AddressSanitizer to know
  out[threadIdx.x] = at[n - 1 - int(threadIdx.x) + (F == kOverrun)];
}
PROBE(static_overrun, static_overrun<kOverrun>, 1, 64)

// Sums rows of 128 floats; the next row arrives while this one is added.
template <bool Wait> __global__ void double_buffer(const float* in, float* out, int rows) {
  float (*tile)[128] = reinterpret_cast<float (*)[128]>(shared_memory());
  const int t = int(threadIdx.x);
  cp_async16(&tile[0][4 * t], in + 4 * t);
  cp_async_commit();
  for (int r = 0; r < rows; ++r) {
    if (r + 1 < rows) cp_async16(&tile[(r + 1) % 2][4 * t], in + 128 * (r + 1) + 4 * t);
    cp_async_commit();
    if (Wait) cp_async_wait<1>();
    __syncthreads();
    float v = 0;
    for (int i = t; i < 128; i += 32) v += tile[r % 2][127 - i];
    for (int d = 16; d; d /= 2) v += __shfl_xor_sync(~0u, v, d);
    if (t == 0) out[r] = v;
    __syncthreads();
  }
}
PROBE(double_buffer, double_buffer<true>, 1, 32, 1024)
PROBE(double_buffer_no_wait, double_buffer<false>, 1, 32, 1024)

// Patterns whose cost is known: n is the stride in floats.
__global__ void strided(const float* in, float* out, int n) { out[threadIdx.x] = in[int(threadIdx.x) * n]; }
PROBE(strided, strided, 1, 32)
__global__ void banks(const float*, float* out, int n) {
  __shared__ float tile[32 * 33];
  for (int i = int(threadIdx.x); i < 32 * 33; i += 32) tile[i] = float(i);
  __syncthreads();
  out[threadIdx.x] = tile[int(threadIdx.x) * n];
}
PROBE(banks, banks, 1, 32)

template <bool Wait> __global__ void early(const float* in, float* out, int n) {
  if (Wait) wait_for_previous();
  if (int(threadIdx.x) < n) out[threadIdx.x] = in[threadIdx.x] + 1;
}
PROBE(waits, early<true>, 1, 32, 0, nullptr, true)
PROBE(does_not_wait, early<false>, 1, 32, 0, nullptr, true)

// For timing: 100 collectives of 256 threads.
__global__ void many_collectives(const float* in, float* out, int n) {
  __shared__ float tile[256];
  float v = in[threadIdx.x];
  for (int i = 0; i < n; ++i) {
    tile[threadIdx.x] = v;
    __syncthreads();
    v = tile[255 - threadIdx.x];
    __syncthreads();
  }
  out[blockIdx.x * 256 + threadIdx.x] = v;
}
PROBE(many_collectives, many_collectives, 10, 256)
__global__ void independent(const float* in, float* out, int n) {
  for (int i = int(blockIdx.x * blockDim.x + threadIdx.x); i < n; i += int(gridDim.x * blockDim.x)) out[i] = in[i] * 2;
}
PROBE(independent, independent, 100, 256)

}  // namespace
}  // namespace engine::cuda
