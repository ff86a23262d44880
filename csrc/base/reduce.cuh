// Sums over a warp and over a block, the same in every thread and in a fixed order.
#pragma once
#include "base/ptx.cuh"

namespace engine::cuda {

// Of one value per lane of a whole warp.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
  return v;
}

// Of one value per thread of a block of kWarps warps. `sums` [kWarps] is free again behind the second barrier.
template <int kWarps> __device__ __forceinline__ float block_sum(float v, float* sums) {
  v = warp_sum(v);
  if ((threadIdx.x & 31) == 0) sums[threadIdx.x >> 5] = v;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += sums[w];
  __syncthreads();
  return total;
}

// Of two values per thread at once. `sums` [2 * kWarps] is free again behind the second barrier.
template <int kWarps> __device__ __forceinline__ float2 block_sum(float2 v, float* sums) {
  v = make_float2(warp_sum(v.x), warp_sum(v.y));
  if ((threadIdx.x & 31) == 0) {
    sums[threadIdx.x >> 5] = v.x;
    sums[kWarps + (threadIdx.x >> 5)] = v.y;
  }
  __syncthreads();
  float2 total = make_float2(0.f, 0.f);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total.x += sums[w], total.y += sums[kWarps + w];
  __syncthreads();
  return total;
}

}  // namespace engine::cuda
