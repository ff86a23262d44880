// fuse: two streams of tokens blended by a gate, and attention to two keys as a gate per head.
//
// gated_fuse: of every row of s and g [M, D] (f32 or bf16)
//   a = layer_norm(s) * w1 + b1, h = layer_norm(g) * w2 + b2; gate = sigmoid(gw . [a, h] + gb), or `force` where >= 0
//   normed    o = gate * a + (1 - gate) * h
//   raw       o = gate * s + (1 - gate) * g
//   residual  o = s + rho * (1 - gate) * (g - s)
//   o += [px[v0], py[v1], pz[v2], 0..] where voxels [M, 3] is given: rows of tables [*, D / 3] (f32 or bf16), trusted
// Row r of a sequence goes to row order[r] of out and normed (r without order). With a newline [D] one row of it follows
// every `period` rows: r counts those too. normed = o * rsqrt(mean(o^2) + norm_eps) * norm_w, gates[m] = gate: where given.
// The gate comes as u1 = gw1 * w1, u2 = gw2 * w2 and c = gw1 . b1 + gw2 . b2 + gb: gate logits are
// r1 * (s - m1) . u1 + r2 * (g - m2) . u2 + c with the means m and reciprocal deviations r of both norms.
//
// gate_heads: out[m,:] = x[m,:] + base + sum_h p_h * u[h,:]; p_h = sigmoid(r * q[m, head h] . dk[head h] - bias), r =
//   rsqrt(mean(q[m,:]^2) + eps). That is attention over two keys, one seen e^bias times as often, behind an RMS norm of
//   the whole query: dk is the difference of the keys times norm weight and scale, u[h,:] that of the values through the
//   output matrix, base what the second key alone gives. q [M, D], dk [D], u [H, D], base [D], x, out [M, D] f32.
#pragma once
#include "base/params.h"

namespace engine {

enum FuseBlend : int32_t { kFuseNormed = 0, kFuseRaw = 1, kFuseResidual = 2 };

#define ENGINE_GATED_FUSE_PARAMS(F)                                                                               \
  F(const void*, s) F(const void*, g) F(int32_t, in_dtype) F(int64_t, lds) F(int64_t, ldg) F(const float*, w1)    \
  F(const float*, b1) F(const float*, w2) F(const float*, b2) F(const float*, u1) F(const float*, u2) F(float, c) \
  F(float, eps) F(int32_t, blend) F(float, rho) F(float, force) F(const int32_t*, voxels) F(const void*, px)      \
  F(const void*, py) F(const void*, pz) F(int32_t, table_dtype) F(const float*, newline) F(int64_t, period)       \
  F(const int32_t*, order) F(void*, out) F(int32_t, out_dtype) F(int64_t, ldo) F(void*, normed)                   \
  F(int64_t, ldn) F(const float*, norm_w) F(float, norm_eps) F(float*, gates)            \
  F(int64_t, m) F(int64_t, d)
ENGINE_PARAMS(GatedFuseParams, ENGINE_GATED_FUSE_PARAMS)

#define ENGINE_GATE_HEADS_PARAMS(F)                                                                            \
  F(const float*, q) F(int64_t, ldq) F(const float*, dk) F(const float*, u) F(const float*, base)              \
  F(const float*, x) F(int64_t, ldx) F(float*, out) F(int64_t, ldo) F(float, bias) F(float, eps)               \
  F(int64_t, m) F(int64_t, d) F(int64_t, heads)
ENGINE_PARAMS(GateHeadsParams, ENGINE_GATE_HEADS_PARAMS)

}  // namespace engine
