// codebook: the nearest code of each vector, and a convolution over codes as sums of table rows
// layout   all row-major f32
// mapping  search: four rows per task, so that a code is read once for them. conv: one task per position
// moves    search: codes once per four rows, from L2 after the first. conv: taps rows of the table, out once
// tried    -
#include "ops/codebook/codebook.h"

#include <cmath>

#include "base/simd.h"

namespace engine::cpu::ENGINE_NS {
namespace { constexpr int64_t kRows = 4; }  // namespace

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
    for (int64_t k = 0; k < p.k; ++k) {
      const float* code = p.codes + k * p.d;
      F16 sum[kRows] = {zero(), zero(), zero(), zero()};
      for (int64_t i = 0; i < p.d; i += 16) {
        const F16 c = loadn(code + i, p.d - i);
        for (int64_t r = 0; r < kRows; ++r) sum[r] = fma(loadn(x[r] + i, p.d - i), c, sum[r]);
      }
      for (int64_t r = 0; r < kRows; ++r) {
        const float distance = p.norms[k] - 2.f * reduce_add(sum[r]);
        if (distance < best[r]) best[r] = distance, at[r] = k;
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
