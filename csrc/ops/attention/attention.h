// attention: append K and V of 1..m tokens to a cache, then grouped-query attention over all of it.
//   out[t, h*d:] = softmax(scale * q[t,h] . K[0..end)) V,  G = heads / kv_heads; end = pos + t + 1 when causal, else pos + m
// q, k, v f32 [T, heads*d] (row stride ldq) and [T, kv_heads*d] (row stride ldkv); pos: tokens already cached.
// Caches are packed as gemm operands (csrc/ops/gemm), format f32 or bf16, ctx % 16 == 0:
//   k_cache [batch][kv_heads][ctx/16 panels, K = d];  v_cache [batch][kv_heads][ceil(d/16) panels, K = ctx]
// batch sequences, each with a cache and a pos[b] of its own. Sequence b holds the m rows from b * m, or the rows
// [offsets[b], offsets[b+1]) (at most m); row r lies at order[r] of q, k, v and out where order is given.
// What offsets and order hold is the caller's business: it is not checked.
// rope [ctx, d]: cosines of d/2 angles, then sines; q and k turn by the row of their position, channels (i, i + d/2).
// pad_k, pad_v [kv_heads*d]: one more key and value that sequence b sees pads[b] times.
// queries > 0: only the first that many rows of a sequence have a query; of the others out keeps what it held.
// q null: nothing but the append. k null: nothing is appended, and every row sees the pos positions of the cache, of
// which there is one at least (causal 0, no rope).
// ws: attention_workspace() bytes, for the partial results of split contexts (batch 1, causal or not, no pads).
#pragma once
#include "base/params.h"

namespace engine {
#define ENGINE_ATTENTION_PARAMS(F)                                                                            \
  F(const float*, q) F(const float*, k) F(const float*, v) F(int64_t, ldq) F(int64_t, ldkv)                   \
  F(uint8_t*, k_cache) F(uint8_t*, v_cache) F(int32_t, format) F(int64_t, ctx) F(const int32_t*, pos)         \
  F(float*, out) F(int64_t, ldo) F(uint8_t*, ws) F(const int32_t*, rows) F(int64_t, m) F(int64_t, heads)      \
  F(int64_t, kv_heads) F(int64_t, d) F(float, scale) F(int32_t, causal) F(const float*, rope)                  \
  F(int64_t, batch) F(const int32_t*, offsets) F(const int32_t*, order) F(const float*, pad_k)                \
  F(const float*, pad_v) F(const int32_t*, pads) F(int64_t, queries)
ENGINE_PARAMS(AttentionParams, ENGINE_ATTENTION_PARAMS)

constexpr int64_t kAttentionSplit = 256;    // positions per task in decode: fixed, so results do not depend on threads
constexpr int64_t kAttentionSplitRows = 4;  // up to this many tokens the context is split

// CUDA, few rows: positions per block, so that a full cache makes at most 128 blocks per kv head.
constexpr int64_t kAttentionCudaRows = 8;
constexpr int64_t attention_cuda_split(int64_t ctx) { return ctx <= 128 * 128 ? 128 : (ctx + 16383) / 16384 * 128; }

constexpr int64_t attention_workspace(int64_t m, int64_t heads, int64_t d, int64_t ctx) {
  const int64_t t = m < kAttentionSplitRows ? m : kAttentionSplitRows,
                u = m < kAttentionCudaRows ? m : kAttentionCudaRows;
  const int64_t cpu = ((ctx + kAttentionSplit - 1) / kAttentionSplit) * t;
  const int64_t cuda = ((ctx + attention_cuda_split(ctx) - 1) / attention_cuda_split(ctx)) * u;
  return (cpu > cuda ? cpu : cuda) * heads * (d + 2) * 4 + 64;
}
}  // namespace engine
