// norm: RMS or layer norm of rows, or none, with a sum in front, weight, bias, modulation and activation
// layout   x, add row-major f32, out f32 or bf16
// mapping  a block per row of out, a warp per group of one; mean and square sum in a fixed order, deviations from the mean
// moves    x and add once (again from L1 or L2 for the second and third pass), out once
// tried    README.md
#include "ops/norm/norm.h"

#include "base/dtype.h"
#include "base/launch.h"
#include "base/ptx.cuh"
#include "base/reduce.cuh"
#include "ops/gemm/gemv.cuh"

namespace engine::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

__device__ __forceinline__ float modulation(const NormParams& p, int64_t at) {
  return p.mod_dtype == kBF16 ? bf16_to_f32(static_cast<const uint16_t*>(p.mod)[at])
                              : static_cast<const float*>(p.mod)[at];
}

// Lanes: threads that normalise k values together, a row's or a group's.
template <int Lanes> __global__ void __launch_bounds__(kThreads) norm_kernel(NormParams p) {
  release_next();
  wait_for_previous();
  int64_t k = p.k, row = blockIdx.x, from = 0;
  if constexpr (Lanes == 32) {
    const unsigned parts = unsigned(p.k) / unsigned(p.group), unit = blockIdx.x * kWarps + threadIdx.x / 32;
    k = p.group;
    row = unit / parts;
    from = unit % parts * k;
  }
  const int64_t m = p.rows ? min(int64_t(*p.rows), p.m) : p.m;
  if (row >= norm_rows(p.width, m)) return;
  const int lane = threadIdx.x % Lanes;
  const int64_t t = p.width ? norm_cell(row, p.width, m) : row;
  const auto put = [&](int64_t i, float v) {
    if (p.out_dtype == kBF16)
      static_cast<uint16_t*>(p.out)[row * p.ldo + i] = f32_to_bf16(v);
    else
      static_cast<float*>(p.out)[row * p.ldo + i] = v;
  };
  if (t < 0) {
    for (int64_t i = from + lane; i < from + k; i += Lanes) put(i, 0.f);
    return;
  }
  float* sums = reinterpret_cast<float*>(shared_memory());
  const float* x = p.x + t * p.ldx;
  const float* more = p.add ? p.add + t * p.ldadd : nullptr;
  const auto value = [&](int64_t i) { return more ? x[i] + more[i] : x[i]; };
  const auto summed = [&](float v) {
    if constexpr (Lanes == 32)
      return warp_sum(v);
    else
      return block_sum<kWarps>(v, sums);
  };
  float mean = 0.f;
  if (p.kind == kProLayerNorm) {
    float s = 0.f;
    for (int64_t i = from + lane; i < from + k; i += Lanes) s += value(i);
    mean = summed(s) / float(k);
  }
  float r = 1.f;
  if (p.kind != kProNone) {
    float s = 0.f;
    for (int64_t i = from + lane; i < from + k; i += Lanes) {
      const float v = value(i) - mean;
      s = fmaf(v, v, s);
    }
    r = 1.f / sqrtf(summed(s) / float(k) + p.eps);
  }
  const int64_t mod = (p.mod_rows ? p.mod_rows[t] : 0) * p.ldmod;
  for (int64_t i = from + lane; i < from + k; i += Lanes) {
    float v = (value(i) - mean) * r;
    if (p.w) v *= p.w[i];
    if (p.b) v += p.b[i];
    if (p.mod && p.mod_scale >= 0) v *= 1.f + modulation(p, mod + p.mod_scale + i);
    if (p.mod && p.mod_shift >= 0) v += modulation(p, mod + p.mod_shift + i);
    put(i, activate(v, p.act));
  }
}

}  // namespace

void norm(const NormParams& p, void* stream) {
  const int64_t rows = norm_rows(p.width, p.m), units = p.group ? rows * (p.k / p.group) : rows;
  const bool small = p.group != 0;
  const Launch l = {unsigned(small ? (units + kWarps - 1) / kWarps : units), kThreads,
                    small ? 0 : kWarps * sizeof(float), stream, true};
  if (small)
    launch("norm.groups", norm_kernel<32>, l, p);
  else
    launch("norm", norm_kernel<kThreads>, l, p);
}

}  // namespace engine::cuda
