// moe: top-k routed experts of two matrices each, plus one optional dense (shared) expert, as three nodes.
//
// moe_route: logits = rms_norm(x) @ gate.T in fp32; s = sigmoid(logits); choice = s + bias; of n_group groups the
//   topk_group with the largest sum of their two best choices stay; top_k of choice, ties to the lowest index;
//   weights = s / (sum s + 1e-20) * scale (renormalised only if norm_topk). For m > 1 also sorts the pairs by expert:
//   pair = t*top_k + j;  offsets [E+1], order [T*top_k] (pairs by expert, then by token).
// moe_up:    h[row,:] = act(rms_norm(x_t) @ up_e.T), row = position of the pair in `order` (pair itself if T = 1);
//            hs[t,:] = act(rms_norm(x_t) @ shared_up.T)
// moe_down:  out[t,:] = residual[t,:] + sum_j w[t,j] * (h_j @ down_e.T) + hs[t,:] @ shared_down.T,
//            experts in ascending order (T > 1) or in the order of the router (T = 1), shared last.
// x, out, residual [T,D] f32; gate packed f32 [E,D]; up packed [I,D] and down packed [D,I], one after another, E times;
// ticket [1]: zero before and after every launch (CUDA: the last block to finish chooses).
// h [T*top_k, I], hs [T, S] f32. Formats as in csrc/ops/gemm. up_bias etc. [E,I], [E,D], [S], [D] f32 or null.
#pragma once
#include "base/params.h"

namespace engine {
#define ENGINE_MOE_ROUTE_PARAMS(F)                                                                              \
  F(const float*, x) F(int64_t, ldx) F(const float*, norm) F(float, eps) F(const uint8_t*, gate)                \
  F(const float*, bias) F(float*, logits) F(int32_t*, ids) F(float*, weights) F(int32_t*, offsets)              \
  F(int32_t*, order) F(uint8_t*, ws) F(const int32_t*, rows) F(int64_t, m) F(int64_t, d) F(int64_t, experts)    \
  F(int64_t, top_k) F(int64_t, n_group) F(int64_t, topk_group) F(int32_t, norm_topk) F(float, scale)            \
  F(uint32_t*, ticket)
ENGINE_PARAMS(MoeRouteParams, ENGINE_MOE_ROUTE_PARAMS)

#define ENGINE_MOE_UP_PARAMS(F)                                                                                 \
  F(const float*, x) F(int64_t, ldx) F(const float*, norm) F(float, eps) F(const uint8_t*, up)                  \
  F(const uint8_t*, shared_up) F(const float*, up_bias) F(const float*, shared_bias) F(const int32_t*, ids)     \
  F(const int32_t*, offsets) F(const int32_t*, order) F(float*, h) F(float*, hs) F(uint8_t*, ws)                \
  F(const int32_t*, rows) F(int64_t, m) F(int64_t, d) F(int64_t, inner) F(int64_t, shared)                      \
  F(int64_t, experts) F(int64_t, top_k) F(int32_t, act) F(int32_t, format) F(int32_t, group)                    \
  F(int32_t, shared_format) F(int32_t, shared_group)
ENGINE_PARAMS(MoeUpParams, ENGINE_MOE_UP_PARAMS)

#define ENGINE_MOE_DOWN_PARAMS(F)                                                                               \
  F(const float*, h) F(const float*, hs) F(const float*, residual) F(int64_t, ldr) F(const uint8_t*, down)      \
  F(const uint8_t*, shared_down) F(const float*, down_bias) F(const float*, shared_bias)                        \
  F(const int32_t*, ids) F(const float*, weights) F(const int32_t*, offsets) F(const int32_t*, order)           \
  F(float*, out) F(int64_t, ldo) F(uint8_t*, ws) F(const int32_t*, rows) F(int64_t, m) F(int64_t, d)            \
  F(int64_t, inner) F(int64_t, shared) F(int64_t, experts) F(int64_t, top_k) F(int32_t, format)                 \
  F(int32_t, group) F(int32_t, shared_format) F(int32_t, shared_group)
ENGINE_PARAMS(MoeDownParams, ENGINE_MOE_DOWN_PARAMS)

// Bytes of one row of packed activations, whatever the ISA (fp32 units are the widest).
constexpr int64_t moe_row_bytes(int32_t format, int64_t k, int64_t group) {
  const int64_t units = format >= 2 ? k : 4 * (k + (k & 1));
  const int64_t extra = format >= 2 ? (k / group) * 8 : 0;
  return (units + extra + 63) / 64 * 64;
}
// ws of moe_up: rows in unit form (T of each format) and tiles (T*top_k routed, T shared).
constexpr int64_t moe_up_workspace(int64_t m, int64_t top_k, int64_t d, int32_t format, int64_t group,
                                   int32_t shared_format, int64_t shared_group) {
  return m * (1 + top_k) * moe_row_bytes(format, d, group) + 2 * m * moe_row_bytes(shared_format, d, shared_group) +
         m * ((d + 15) / 16 * 16) * 4 + 64;
}
constexpr int64_t moe_down_workspace(int64_t m, int64_t top_k, int64_t inner, int64_t shared, int32_t format,
                                     int64_t group, int32_t shared_format, int64_t shared_group) {
  return m * top_k * moe_row_bytes(format, inner, group) +
         m * (shared ? moe_row_bytes(shared_format, shared, shared_group) : 0) + 64;
}
}  // namespace engine
