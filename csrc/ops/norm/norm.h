// norm: out[m,:] = act(normalised(x[m,:] + add[m,:]) * w + b, then * (1 + scale) + shift of a modulation).
// kind: kProRmsNorm | kProLayerNorm | kProNone (as it is). add is a row per row of x, or one for all where ldadd is 0.
// For norms whose result is more than one product's input; a norm in front of one product is a prologue of gemm.
// x, add f32, out f32 or bf16 (out may be x; add may be null); w, b [K] or null; modulation as in csrc/ops/gemm/gemm.h.
// group > 0: each run of that many values of a row, of which a row holds a whole number, is normalised for itself.
// width > 0: the rows are the cells of a grid, width in a line; out is that grid in a border of one cell of zeros.
#pragma once
#include "base/params.h"

namespace engine {
#define ENGINE_NORM_PARAMS(F)                                                                              \
  F(const float*, x) F(int64_t, ldx) F(void*, out) F(int64_t, ldo) F(const float*, w) F(const float*, b)   \
  F(const void*, mod) F(int64_t, ldmod) F(int32_t, mod_dtype) F(const int32_t*, mod_rows)                  \
  F(int64_t, mod_scale) F(int64_t, mod_shift) F(const int32_t*, rows) F(int64_t, m) F(int64_t, k)          \
  F(int32_t, kind) F(float, eps) F(const float*, add) F(int64_t, ldadd) F(int32_t, act)       \
  F(int32_t, out_dtype) F(int64_t, width) F(int64_t, group)
ENGINE_PARAMS(NormParams, ENGINE_NORM_PARAMS)

// Row of x of output row t of a bordered grid, or -1 on the border.
ENGINE_HD constexpr int64_t norm_cell(int64_t t, int64_t width, int64_t m) {
  const int64_t line = width + 2, y = t / line - 1, x = t % line - 1;
  return y < 0 || y >= m / width || x < 0 || x >= width ? -1 : y * width + x;
}
ENGINE_HD constexpr int64_t norm_rows(int64_t width, int64_t m) { return width ? (m / width + 2) * (width + 2) : m; }
}  // namespace engine
