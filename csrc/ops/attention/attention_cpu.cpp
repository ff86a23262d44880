// attention: online-softmax over packed K and V panels, both products by the gemm tiles
// layout   K panel = 16 positions, V panel = 16 channels: the cache is a pair of packed weight matrices that grows
// mapping  rows (token, head of one kv group) in tiles of <= 14, four tiles share each block of 128 positions;
//          few tokens: also split over context in fixed pieces, combined in order after a barrier
// moves    K and V once per 4 tiles of rows (once per step in decode); q, out once
// tried    README.md
#include "ops/attention/attention.h"

#include "ops/gemm/microkernel.h"

namespace engine::cpu::ENGINE_NS {
namespace {

constexpr int64_t kBlock = 128;
constexpr int64_t kTilesPerTask = 4;
constexpr float kNegInf = -INFINITY;

struct Geometry {
  int64_t m, pos, group, k_panel, v_panel, k_head, v_head;
};

void append(const AttentionParams& p, const Geometry& g, int64_t t, int64_t h) {
  const int64_t at = g.pos + t;
  const float* k = p.k + t * p.ldkv + h * p.d;
  const float* v = p.v + t * p.ldkv + h * p.d;
  uint8_t* kp = p.k_cache + h * g.k_head + (at / 16) * g.k_panel;
  uint8_t* vh = p.v_cache + h * g.v_head;
  const int64_t lane = at % 16;
  const bool last = t == g.m - 1;
  for (int64_t i = 0; i < p.d; ++i) {
    uint8_t* vp = vh + (i / 16) * g.v_panel;
    if (p.format == kW_F32) {
      reinterpret_cast<float*>(kp)[i * 16 + lane] = k[i];
      reinterpret_cast<float*>(vp)[at * 16 + i % 16] = v[i];
    } else {
      reinterpret_cast<uint16_t*>(kp)[(i / 2) * 32 + lane * 2 + (i & 1)] = f32_to_bf16(k[i]);
      uint16_t* pair = reinterpret_cast<uint16_t*>(vp) + (at / 2) * 32 + (i % 16) * 2;
      pair[at & 1] = f32_to_bf16(v[i]);
      if (last && !(at & 1)) pair[1] = 0;  // the other half of the pair is multiplied by a zero probability
    }
  }
  if (p.format != kW_F32 && (p.d & 1)) reinterpret_cast<uint16_t*>(kp)[(p.d / 2) * 32 + lane * 2 + 1] = 0;
}

// Rows [r0, r1) of kv head h against positions [s0, s1). Writes out directly, or (m, l, o) per row to `partial`.
void attend(const AttentionParams& p, const Geometry& g, int64_t h, int64_t r0, int64_t r1, int64_t s0, int64_t s1,
            char* scratch, float* partial) {
  const Tiles tiles = split_rows(r1 - r0, max_rows(p.format));
  const int64_t nu = units_per_row(p.format, p.d), dp = round_up(p.d, 16), rows = r1 - r0;
  float* o = reinterpret_cast<float*>(scratch);                          // [rows][dp]
  float* mx = o + rows * dp;                                             // [rows]
  float* sum = mx + round_up(rows, 16);                                  // [rows]
  float* corr = sum + round_up(rows, 16);                                // [kMaxRows]
  float* s = corr + round_up(kMaxRows, 16);                              // [kMaxRows][kBlock]
  uint32_t* units = reinterpret_cast<uint32_t*>(s + kMaxRows * kBlock);  // [kMaxRows][max(nu, kBlock)]
  uint8_t* ptile = reinterpret_cast<uint8_t*>(units + kMaxRows * imax(nu, kBlock));
  const int64_t q_bytes = a_tile_bytes(p.format, tiles.rows(0), p.d, 0);
  uint8_t* qt = ptile + a_tile_bytes(p.format, kMaxRows, kBlock, 0);
  for (int64_t i = 0; i < tiles.count; ++i) {
    const int64_t f = r0 + tiles.first(i), mr = tiles.rows(i);
    for (int64_t r = 0; r < mr; ++r) {
      const int64_t t = (f + r) / g.group, head = h * g.group + (f + r) % g.group;
      to_units(p.format, p.q + t * p.ldq + head * p.d, p.d, 0, {units + r * nu, nullptr, nullptr});
    }
    weave(p.format, p.d, 0, mr, {units, nullptr, nullptr}, nu, 0, qt + i * q_bytes);
  }
  for (int64_t r = 0; r < rows; ++r) {
    mx[r] = kNegInf;
    sum[r] = 0.f;
    for (int64_t i = 0; i < dp; i += 16) store(o + r * dp + i, zero());
  }
  const int64_t end = imin(s1, g.pos + (r1 - 1) / g.group + 1);
  const int64_t unit_bytes = p.format == kW_F32 ? 64 : 32;  // of a V panel, per position
  for (int64_t b0 = s0; b0 < end; b0 += kBlock) {
    const int64_t nb = imin(kBlock, end - b0), nk = p.format == kW_F32 ? nb : nb + (nb & 1);
    for (int64_t i = 0; i < tiles.count; ++i) {
      const int64_t f = tiles.first(i), mr = tiles.rows(i);
      if (g.pos + (r0 + f + mr - 1) / g.group < b0) continue;  // every row of the tile lies before this block
      run_panels(p.format, mr, qt + i * q_bytes, p.k_cache + h * g.k_head + (b0 / 16) * g.k_panel, g.k_panel, 0,
                 ceil_div(nb, 16), p.d, 0, [&](int64_t panel, int np, const float* c) {
                   for (int64_t r = 0; r < mr; ++r)
                     for (int q = 0; q < np; ++q)
                       store(s + r * kBlock + (panel + q) * 16, mul(load(c + (r * np + q) * 16), set1(p.scale)));
                 });
      const int64_t pu = units_per_row(p.format, nk);
      for (int64_t r = 0; r < mr; ++r) {
        float* sr = s + r * kBlock;
        const int64_t row = f + r;
        const int64_t visible = imin(nb, g.pos + (r0 + row) / g.group + 1 - b0);
        const int64_t padded = round_up(nb, 16);
        for (int64_t j = imax(visible, 0); j < padded; ++j) sr[j] = kNegInf;
        corr[r] = 1.f;
        if (visible > 0) {
          F16 best = set1(mx[row]);
          for (int64_t j = 0; j < padded; j += 16) best = max(load(sr + j), best);
          const float m_new = reduce_max(best);
          corr[r] = expf(mx[row] - m_new);
          mx[row] = m_new;
          F16 total = zero();
          for (int64_t j = 0; j < padded; j += 16) {
            // exp() clamps its argument, so masked lanes are zeroed by count.
            const int64_t n = visible - j;
            F16 e = exp(sub(load(sr + j), set1(m_new)));
            if (n < 16) {
              float t[16];
              store(t, e);
              e = n > 0 ? loadn(t, n) : zero();
            }
            total = add(total, e);
            store(sr + j, e);
          }
          sum[row] = sum[row] * corr[r] + reduce_add(total);
        } else {
          for (int64_t j = 0; j < padded; j += 16) store(sr + j, zero());
        }
        to_units(p.format, sr, nk, 0, {units + r * pu, nullptr, nullptr});
      }
      weave(p.format, nk, 0, mr, {units, nullptr, nullptr}, pu, 0, ptile);
      run_panels(p.format, mr, ptile, p.v_cache + h * g.v_head + b0 * unit_bytes, g.v_panel, 0, dp / 16, nk, 0,
                 [&](int64_t panel, int np, const float* c) {
                   for (int64_t r = 0; r < mr; ++r)
                     for (int q = 0; q < np; ++q) {
                       float* d = o + (f + r) * dp + (panel + q) * 16;
                       store(d, fma(load(d), set1(corr[r]), load(c + (r * np + q) * 16)));
                     }
                 });
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    if (partial) {
      float* d = partial + r * (p.d + 2);
      d[0] = mx[r];
      d[1] = sum[r];
      memcpy(d + 2, o + r * dp, size_t(p.d) * 4);
    } else {
      const int64_t t = (r0 + r) / g.group, head = h * g.group + (r0 + r) % g.group;
      const F16 inv = set1(1.f / sum[r]);
      for (int64_t i = 0; i < p.d; i += 16)
        storen(p.out + t * p.ldo + head * p.d + i, mul(load(o + r * dp + i), inv), p.d - i);
    }
  }
}

}  // namespace

void attention(const AttentionParams& p, Ctx& ctx) {
  const int64_t m = p.rows ? imin(*p.rows, p.m) : p.m;
  const int64_t pos = *p.pos;
  if (m <= 0 || pos < 0 || pos + m > p.ctx) return;  // the caller bounds the context; never write outside the cache
  Geometry g{m, pos, p.heads / p.kv_heads, gemm_panel_bytes(p.format, p.d, 1), gemm_panel_bytes(p.format, p.ctx, 1),
             0, 0};
  g.k_head = (p.ctx / 16) * g.k_panel;
  g.v_head = ceil_div(p.d, 16) * g.v_panel;
  const int64_t chunks = ceil_div(m, 16);
  for (int64_t task; (task = claim(ctx)) < chunks * p.kv_heads;) {
    const int64_t t0 = (task % chunks) * 16;
    for (int64_t t = t0; t < imin(t0 + 16, m); ++t) append(p, g, t, task / chunks);
  }
  barrier(ctx);
  const int64_t rows = m * g.group;
  const int64_t per_task = kTilesPerTask * max_rows(p.format);
  const int64_t groups = ceil_div(rows, per_task);
  const bool split = m <= kAttentionSplitRows;
  const int64_t length = pos + m;
  const int64_t splits = split ? ceil_div(length, kAttentionSplit) : 1;
  float* partial = splits > 1 ? reinterpret_cast<float*>(p.ws) : nullptr;
  const int64_t row_floats = p.d + 2;
  const int64_t tasks = p.kv_heads * groups * splits;
  for (int64_t task; (task = claim(ctx)) < tasks;) {
    // Late rows see the longest context: hand them out first.
    const int64_t s = task % splits, h = (task / splits) % p.kv_heads, gi = groups - 1 - task / splits / p.kv_heads;
    const int64_t r0 = gi * per_task, r1 = imin(r0 + per_task, rows);
    attend(p, g, h, r0, r1, s * kAttentionSplit, splits > 1 ? imin((s + 1) * kAttentionSplit, length) : length,
           ctx.scratch, partial ? partial + ((s * p.kv_heads + h) * rows + r0) * row_floats : nullptr);
  }
  if (splits <= 1) return;
  barrier(ctx);
  for (int64_t task; (task = claim(ctx)) < p.kv_heads * rows;) {
    const int64_t h = task / rows, r = task % rows;
    float best = kNegInf, total = 0.f;
    for (int64_t s = 0; s < splits; ++s) {
      const float v = partial[((s * p.kv_heads + h) * rows + r) * row_floats];
      best = v > best ? v : best;
    }
    float* o = reinterpret_cast<float*>(ctx.scratch);
    for (int64_t i = 0; i < p.d; ++i) o[i] = 0.f;
    for (int64_t s = 0; s < splits; ++s) {
      const float* q = partial + ((s * p.kv_heads + h) * rows + r) * row_floats;
      if (q[0] == kNegInf) continue;
      const float w = expf(q[0] - best);
      total += w * q[1];
      for (int64_t i = 0; i < p.d; ++i) o[i] += w * q[2 + i];
    }
    const int64_t t = r / g.group, head = h * g.group + r % g.group;
    for (int64_t i = 0; i < p.d; ++i) p.out[t * p.ldo + head * p.d + i] = o[i] / total;
  }
}

}  // namespace engine::cpu::ENGINE_NS
