// channel_attention: d x d attention between the channels of a group, summed over all tokens
// layout   tokens row-major; a group's d channels are contiguous
// mapping  one task per (grid, group); eight rows of logits at a time in registers, tokens inside
// moves    q once, k d/8 times (from L2), v and out once
// tried    -
#include "ops/channel_attention/channel_attention.h"

#include "base/simd.h"

namespace engine::cpu::ENGINE_NS {
namespace {

constexpr int kRows = 8;
constexpr int kVectors = kChannelAttentionMaxD / 16;

// Rows [i0, i0+8) of the logits, V vectors of columns.
template <int V> void logits(const ChannelAttentionParams& p, const float* q, int64_t i0, float* out) {
  const float* k = q + p.groups * p.d;
  const int64_t rows = imin(kRows, p.d - i0);
  F16 acc[kRows][V];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = zero();
  for (int64_t n = 0; n < p.tokens; ++n) {
    F16 kv[V];
    for (int v = 0; v < V; ++v) kv[v] = loadn(k + n * p.ldq + v * 16, p.d - v * 16);
    for (int r = 0; r < kRows; ++r) {
      const F16 qv = set1(r < rows ? q[n * p.ldq + i0 + r] : 0.f);
      for (int v = 0; v < V; ++v) acc[r][v] = fma(qv, kv[v], acc[r][v]);
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int v = 0; v < V; ++v) store(out + (i0 + r) * kChannelAttentionMaxD + v * 16, acc[r][v]);
}

template <int V> void attend_group(const ChannelAttentionParams& p, const float* q, float* out, float* s) {
  const float* vs = q + 2 * p.groups * p.d;
  for (int64_t i0 = 0; i0 < p.d; i0 += kRows) logits<V>(p, q, i0, s);
  float* weights = s + kChannelAttentionMaxD * kChannelAttentionMaxD;  // transposed: [j][i]
  for (int64_t i = 0; i < p.d; ++i) {
    float* row = s + i * kChannelAttentionMaxD;
    float best = -INFINITY, total = 0.f;
    for (int64_t j = 0; j < p.d; ++j) best = row[j] * p.scale > best ? row[j] * p.scale : best;
    for (int64_t j = 0; j < p.d; ++j) {
      row[j] = expf(row[j] * p.scale - best);
      total += row[j];
    }
    for (int64_t j = 0; j < p.d; ++j) weights[j * kChannelAttentionMaxD + i] = row[j] / total;
  }
  for (int64_t n = 0; n < p.tokens; ++n) {
    F16 acc[V];
    for (int v = 0; v < V; ++v) acc[v] = zero();
    for (int64_t j = 0; j < p.d; ++j) {
      const F16 value = set1(vs[n * p.ldq + j]);
      for (int v = 0; v < V; ++v)
        acc[v] = fma(value, loadn(weights + j * kChannelAttentionMaxD + v * 16, p.d - v * 16), acc[v]);
    }
    for (int v = 0; v < V; ++v) storen(out + n * p.ldo + v * 16, acc[v], p.d - v * 16);
  }
}

}  // namespace

void channel_attention(const ChannelAttentionParams& p, Ctx& ctx) {
  static_assert(kVectors == 4, "the switch below");
  float* s = reinterpret_cast<float*>(ctx.scratch);
  for (int64_t task; (task = claim(ctx)) < p.batch * p.groups;) {
    const int64_t b = task / p.groups, g = task % p.groups;
    const float* q = p.qkv + b * p.tokens * p.ldq + g * p.d;
    float* out = p.out + b * p.tokens * p.ldo + g * p.d;
    switch (ceil_div(p.d, 16)) {
      case 1: attend_group<1>(p, q, out, s); break;
      case 2: attend_group<2>(p, q, out, s); break;
      case 3: attend_group<3>(p, q, out, s); break;
      case 4: attend_group<4>(p, q, out, s); break;
    }
  }
}

}  // namespace engine::cpu::ENGINE_NS
