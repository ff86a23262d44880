// gather: rows of a table by ids that live in memory (token embedding, last row of a chunk)
// layout   table [V,D] row-major f32 | bf16, out [T,D] f32
// mapping  one task per row
// moves    T*D*(table element + 4) bytes
// tried    -
#include "ops/gather/gather.h"

#include "base/simd.h"

namespace engine::cpu::ENGINE_NS {

void gather(const GatherParams& p, Ctx& ctx) {
  const int64_t m = p.rows ? imin(*p.rows, p.m) : p.m;
  for (int64_t t; (t = claim(ctx)) < m;) {
    const int64_t id = p.ids[t];
    const bool ok = id >= 0 && id < p.vocab;
    float* out = p.out + t * p.ldo;
    for (int64_t i = 0; i < p.d; i += 16) {
      const int64_t n = p.d - i;
      F16 v = zero();
      if (ok)
        v = p.table_dtype == kBF16 ? loadn_bf16(static_cast<const uint16_t*>(p.table) + id * p.d + i, n)
                                   : loadn(static_cast<const float*>(p.table) + id * p.d + i, n);
      storen(out + i, v, n);
    }
  }
}

// gather_mean: mean of each run of n rows
// layout   x [B*n, D], out [B, D] f32
// mapping  one task per run
// moves    x once, out once
// tried    -
void gather_mean(const GatherMeanParams& p, Ctx& ctx) {
  for (int64_t b; (b = claim(ctx)) < p.batch;)
    for (int64_t i = 0; i < p.d; i += 16) {
      F16 sum = zero();
      for (int64_t t = 0; t < p.n; ++t) sum = add(sum, loadn(p.x + (b * p.n + t) * p.ldx + i, p.d - i));
      storen(p.out + b * p.ldo + i, mul(sum, set1(1.f / float(p.n))), p.d - i);
    }
}

// gather_sum: weighted sums of rows, a sparse matrix times a dense one (pooling and resampling of grids)
// layout   x, out row-major, entries of an output row side by side
// mapping  one task per output row, four vectors of channels at once in registers
// moves    x once per entry that names it (from L2), out once
// tried    -
void gather_sum(const GatherSumParams& p, Ctx& ctx) {
  for (int64_t task; (task = claim(ctx)) < p.batch * p.n;) {
    const int64_t b = task / p.n, i = task % p.n;
    const float* x = p.x + b * p.r * p.ldx;
    const int32_t first = p.offsets[i], end = p.offsets[i + 1];
    for (int64_t c = 0; c < p.d; c += 64) {
      F16 sum[4] = {zero(), zero(), zero(), zero()};
      for (int32_t j = first; j < end; ++j) {
        const F16 w = set1(p.weights[j]);
        const float* row = x + p.rows[j] * p.ldx + c;
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v)
          if (c + 16 * v < p.d) sum[v] = fma(w, loadn(row + 16 * v, p.d - c - 16 * v), sum[v]);
      }
      for (int v = 0; v < 4; ++v) {
        const int64_t at = task * p.ldo + c + 16 * v, left = p.d - c - 16 * v;
        if (left <= 0) break;
        if (p.out_dtype == kBF16)
          storen_bf16(static_cast<uint16_t*>(p.out) + at, sum[v], left);
        else
          storen(static_cast<float*>(p.out) + at, sum[v], left);
      }
    }
  }
}

}  // namespace engine::cpu::ENGINE_NS
