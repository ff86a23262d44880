// codebook: the nearest code of each vector, and a convolution over codes as sums of table rows
// layout   all row-major f32
// mapping  search: a block per four rows, which lie in shared memory; a warp per code in turns. conv: a block per position
// moves    search: codes once per four rows, from L2. conv: taps rows of the table, out once
// tried    -
#include "ops/codebook/codebook.h"

#include "base/launch.h"
#include "base/ptx.cuh"

namespace engine::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 4;

__global__ void __launch_bounds__(kThreads, 1) codebook_search_kernel(CodebookSearchParams p) {
  release_next();
  wait_for_previous();
  __shared__ float least[kWarps][kRows];
  __shared__ int found[kWarps][kRows];
  __shared__ int chosen[kRows];
  float* x = reinterpret_cast<float*>(shared_memory());  // [kRows][D]
  const int64_t first = int64_t(blockIdx.x) * kRows;
  const int rows = int(min(int64_t(kRows), p.m - first)), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t i = threadIdx.x; i < kRows * p.d; i += kThreads) {
    const int64_t r = i / p.d;
    x[i] = r < rows ? p.x[(first + r) * p.ldx + i % p.d] : 0.f;
  }
  __syncthreads();
  float best[kRows];
  int at[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) best[r] = INFINITY, at[r] = 0;
  for (int64_t k = warp; k < p.k; k += kWarps) {
    float sum[kRows] = {};
    for (int64_t i = lane; i < p.d; i += 32) {
      const float c = p.codes[k * p.d + i];
#pragma unroll
      for (int r = 0; r < kRows; ++r) sum[r] = fmaf(x[r * p.d + i], c, sum[r]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      for (int d = 16; d; d /= 2) sum[r] += __shfl_xor_sync(~0u, sum[r], d);
      const float distance = p.norms[k] - 2.f * sum[r];
      if (distance < best[r]) best[r] = distance, at[r] = int(k);
    }
  }
  if (lane == 0) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) least[warp][r] = best[r], found[warp][r] = at[r];
  }
  __syncthreads();
  if (int(threadIdx.x) < rows) {
    const int r = threadIdx.x;
    float lowest = least[0][r];
    int id = found[0][r];
    for (int w = 1; w < kWarps; ++w) {
      const bool closer = least[w][r] < lowest || (least[w][r] == lowest && found[w][r] < id);
      if (closer) lowest = least[w][r], id = found[w][r];
    }
    chosen[r] = id;
    p.ids[first + r] = id;
  }
  if (!p.out) return;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < rows * p.d; i += kThreads)
    p.out[(first + i / p.d) * p.ldo + i % p.d] = p.codes[chosen[i / p.d] * p.d + i % p.d];
}

__global__ void __launch_bounds__(kThreads) codebook_conv_kernel(CodebookConvParams p) {
  release_next();
  wait_for_previous();
  const int64_t row = blockIdx.x, n = row % p.n, begin = row - n;
  for (int64_t i = threadIdx.x; i < p.c; i += kThreads) {
    float sum = p.bias[i];
    for (int64_t j = 0; j < p.taps; ++j) {
      const int64_t from = n + j - p.taps / 2;
      if (from < 0 || from >= p.n) continue;
      const int64_t id = p.ids[begin + from];
      if (id >= 0 && id < p.k) sum += p.table[(id * p.taps + j) * p.c + i];
    }
    p.out[row * p.ldo + i] = p.relu ? fmaxf(sum, 0.f) : sum;
  }
}

}  // namespace

void codebook_search(const CodebookSearchParams& p, void* stream) {
  const Launch l = {unsigned((p.m + kRows - 1) / kRows), kThreads, size_t(kRows * p.d) * sizeof(float), stream, true};
  launch("codebook_search", codebook_search_kernel, l, p);
}

void codebook_conv(const CodebookConvParams& p, void* stream) {
  const Launch l = {unsigned(p.batch * p.n), kThreads, 0, stream, true};
  launch("codebook_conv", codebook_conv_kernel, l, p);
}

}  // namespace engine::cuda
