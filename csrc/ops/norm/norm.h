// norm: out[m,:] = act(normalised(x[m,:] + add[m,:]) * w + b, then * (1 + scale) + shift of a modulation).
// kind: kProRmsNorm | kProLayerNorm | kProNone (as it is). add is a row per row of x, or one for all where ldadd is 0.
// For norms whose result is more than one product's input; a norm in front of one product is a prologue of gemm.
// x, add, out f32 (out may be x; add may be null); w, b [K] or null; modulation as in csrc/ops/gemm/gemm.h.
#pragma once
#include "base/params.h"

namespace engine {
#define ENGINE_NORM_PARAMS(F)                                                                              \
  F(const float*, x) F(int64_t, ldx) F(float*, out) F(int64_t, ldo) F(const float*, w) F(const float*, b)  \
  F(const void*, mod) F(int64_t, ldmod) F(int32_t, mod_dtype) F(const int32_t*, mod_rows)                  \
  F(int64_t, mod_scale) F(int64_t, mod_shift) F(const int32_t*, rows) F(int64_t, m) F(int64_t, k)          \
  F(int32_t, kind) F(float, eps) F(const float*, add) F(int64_t, ldadd) F(int32_t, act)
ENGINE_PARAMS(NormParams, ENGINE_NORM_PARAMS)
}  // namespace engine
