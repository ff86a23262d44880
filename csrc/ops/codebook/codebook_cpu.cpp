// codebook: the nearest code of each vector, and a convolution over codes as sums of table rows
// layout   all row-major f32
// mapping  search: four rows per task, four codes at a time in registers. conv: one task per position
// moves    search: codes once per four rows, from L2 after the first. conv: taps rows of the table, out once
// tried    -
#include "ops/codebook/codebook.h"

#include <cmath>

#include "base/simd.h"

namespace engine::cpu::ENGINE_NS {
// Sixteen sums in registers.
constexpr int64_t kRows = 4;
constexpr int64_t kCodes = 4;

void codebook_search(const CodebookSearchParams& p, Ctx& ctx) {
  for (int64_t task; (task = claim(ctx)) < ceil_div(p.m, kRows);) {
    const int64_t first = task * kRows, rows = imin(kRows, p.m - first);
    const float* x[kRows];
    float best[kRows];
    int64_t at[kRows];
    for (int64_t r = 0; r < kRows; ++r) {
      x[r] = p.x + (first + imin(r, rows - 1)) * p.ldx;
      best[r] = INFINITY;
      at[r] = 0;
    }
    for (int64_t k0 = 0; k0 < p.k; k0 += kCodes) {
      const int64_t codes = imin(kCodes, p.k - k0);
      const float* code[kCodes];
      for (int64_t j = 0; j < kCodes; ++j) code[j] = p.codes + (k0 + imin(j, codes - 1)) * p.d;
      F16 sum[kRows][kCodes];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < kCodes; ++j) sum[r][j] = zero();
      for (int64_t i = 0; i < p.d; i += 16) {
        F16 c[kCodes];
#pragma GCC unroll 4
        for (int j = 0; j < kCodes; ++j) c[j] = loadn(code[j] + i, p.d - i);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const F16 v = loadn(x[r] + i, p.d - i);
#pragma GCC unroll 4
          for (int j = 0; j < kCodes; ++j) sum[r][j] = fma(v, c[j], sum[r][j]);
        }
      }
#pragma GCC unroll 4
      for (int j = 0; j < kCodes; ++j)
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          if (j >= codes) continue;
          const float distance = p.norms[k0 + j] - 2.f * reduce_add(sum[r][j]);
          if (distance < best[r]) best[r] = distance, at[r] = k0 + j;
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
      p.ids[first + r] = int32_t(at[r]);
      if (p.out) memcpy(p.out + (first + r) * p.ldo, p.codes + at[r] * p.d, size_t(p.d) * 4);
    }
  }
}

void codebook_conv(const CodebookConvParams& p, Ctx& ctx) {
  for (int64_t row; (row = claim(ctx)) < p.batch * p.n;) {
    const int64_t n = row % p.n, begin = row - n;
    float* out = p.out + row * p.ldo;
    for (int64_t i = 0; i < p.c; i += 16) {
      F16 sum = loadn(p.bias + i, p.c - i);
      for (int64_t j = 0; j < p.taps; ++j) {
        const int64_t from = n + j - p.taps / 2;
        if (from < 0 || from >= p.n) continue;
        const int64_t id = p.ids[begin + from];
        if (id < 0 || id >= p.k) continue;
        sum = add(sum, loadn(p.table + (id * p.taps + j) * p.c + i, p.c - i));
      }
      storen(out + i, p.relu ? max(sum, zero()) : sum, p.c - i);
    }
  }
}

}  // namespace engine::cpu::ENGINE_NS
