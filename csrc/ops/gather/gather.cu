// gather: rows of a table by ids in memory
// layout   table row-major f32 or bf16; out f32
// mapping  one block per row; 16 bytes per thread and turn where the row allows it
// moves    each row once each way
// tried    -
#include "ops/gather/gather.h"

#include "base/dtype.h"
#include "base/ptx.cuh"

namespace engine::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) gather_kernel(GatherParams p) {
  release_next();
  wait_for_previous();
  const int64_t t = blockIdx.x;
  const int64_t m = p.rows ? min(int64_t(*p.rows), p.m) : p.m;
  if (t >= m) return;
  const int64_t id = p.ids[t];
  const bool known = id >= 0 && id < p.vocab;
  float* out = p.out + t * p.ldo;
  if (p.table_dtype == kF32) {
    const float* row = static_cast<const float*>(p.table) + (known ? id : 0) * p.d;
    const bool wide = ((reinterpret_cast<uintptr_t>(row) | reinterpret_cast<uintptr_t>(out)) & 15) == 0;
    const int64_t fours = wide ? p.d / 4 : 0;
    for (int64_t i = threadIdx.x; i < fours; i += kThreads) {
      const float4 v = known ? reinterpret_cast<const float4*>(row)[i] : make_float4(0, 0, 0, 0);
      reinterpret_cast<float4*>(out)[i] = v;
    }
    for (int64_t i = fours * 4 + threadIdx.x; i < p.d; i += kThreads) out[i] = known ? row[i] : 0.f;
    return;
  }
  const uint16_t* row = static_cast<const uint16_t*>(p.table) + (known ? id : 0) * p.d;
  const bool wide = ((reinterpret_cast<uintptr_t>(row) | reinterpret_cast<uintptr_t>(out)) & 15) == 0;
  const int64_t eights = wide ? p.d / 8 : 0;
  for (int64_t i = threadIdx.x; i < eights; i += kThreads) {
    const uint4 v = known ? reinterpret_cast<const uint4*>(row)[i] : make_uint4(0, 0, 0, 0);
    float4* to = reinterpret_cast<float4*>(out) + 2 * i;
    to[0] = make_float4(__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xffff0000u), __uint_as_float(v.y << 16),
                        __uint_as_float(v.y & 0xffff0000u));
    to[1] = make_float4(__uint_as_float(v.z << 16), __uint_as_float(v.z & 0xffff0000u), __uint_as_float(v.w << 16),
                        __uint_as_float(v.w & 0xffff0000u));
  }
  for (int64_t i = eights * 8 + threadIdx.x; i < p.d; i += kThreads) out[i] = known ? bf16_to_f32(row[i]) : 0.f;
}

// gather_mean: mean of each run of n rows
// layout   x [B*n, D], out [B, D] f32
// mapping  a block per run and 256 channels, a thread per channel
// moves    x once, out once
// tried    -
__global__ void __launch_bounds__(kThreads) gather_mean_kernel(GatherMeanParams p) {
  release_next();
  wait_for_previous();
  const int64_t b = blockIdx.x, i = int64_t(blockIdx.y) * kThreads + threadIdx.x;
  if (i >= p.d) return;
  float sum = 0.f;
  for (int64_t t = 0; t < p.n; ++t) sum += p.x[(b * p.n + t) * p.ldx + i];
  p.out[b * p.ldo + i] = sum / float(p.n);
}

// gather_sum: weighted sums of rows, a sparse matrix times a dense one
// layout   x, out row-major, entries of an output row side by side
// mapping  a block per output row and 256 channels, a thread per channel
// moves    x once per entry that names it, from L2; out once
// tried    -
__global__ void __launch_bounds__(kThreads) gather_sum_kernel(GatherSumParams p) {
  release_next();
  wait_for_previous();
  const int64_t task = blockIdx.x, b = task / p.n, i = task % p.n, c = int64_t(blockIdx.y) * kThreads + threadIdx.x;
  if (c >= p.d) return;
  const float* x = p.x + b * p.r * p.ldx + c;
  float sum = 0.f;
  for (int32_t j = p.offsets[i]; j < p.offsets[i + 1]; ++j) sum = fmaf(p.weights[j], x[p.rows[j] * p.ldx], sum);
  if (p.out_dtype == kBF16)
    static_cast<uint16_t*>(p.out)[task * p.ldo + c] = f32_to_bf16(sum);
  else
    static_cast<float*>(p.out)[task * p.ldo + c] = sum;
}

}  // namespace

void gather_sum(const GatherSumParams& p, void* stream) {
  const Launch l = {{unsigned(p.batch * p.n), unsigned((p.d + kThreads - 1) / kThreads)}, kThreads, 0, stream, true};
  launch("gather_sum", gather_sum_kernel, l, p);
}

void gather_mean(const GatherMeanParams& p, void* stream) {
  const Launch l = {{unsigned(p.batch), unsigned((p.d + kThreads - 1) / kThreads)}, kThreads, 0, stream, true};
  launch("gather_mean", gather_mean_kernel, l, p);
}

void gather(const GatherParams& p, void* stream) {
  const Launch l = {unsigned(p.m), kThreads, 0, stream, true};
  launch("gather", gather_kernel, l, p);
}

}  // namespace engine::cuda
