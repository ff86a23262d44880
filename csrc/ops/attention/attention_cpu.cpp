// attention: append and online softmax over packed K and V panels, both products by the gemm tiles
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

struct Geometry {                // of one sequence
  int64_t m, pos, group, first;  // tokens, cached tokens, heads per kv head, first row
  uint8_t *k_cache, *v_cache;
  int64_t k_panel, v_panel, k_head, v_head;
  int64_t pads;  // how often the extra key is seen
};

Geometry geometry(const AttentionParams& p, int64_t b) {
  Geometry g = {};
  g.k_panel = gemm_panel_bytes(p.format, p.d, 1);
  g.v_panel = gemm_panel_bytes(p.format, p.ctx, 1);
  g.k_head = (p.ctx / 16) * g.k_panel;
  g.v_head = ceil_div(p.d, 16) * g.v_panel;
  g.group = p.heads / p.kv_heads;
  g.k_cache = p.k_cache + b * p.kv_heads * g.k_head;
  g.v_cache = p.v_cache + b * p.kv_heads * g.v_head;
  g.first = p.offsets ? p.offsets[b] : b * p.m;
  g.m = p.offsets ? imin(p.offsets[b + 1] - g.first, p.m) : p.rows ? imin(*p.rows, p.m) : p.m;
  g.pos = p.pos[b];
  g.pads = p.pads ? p.pads[b] : 0;
  if (g.pos < 0 || g.pos + (p.k ? g.m : 0) > p.ctx)
    g.m = 0;  // the caller bounds the context; never write outside the cache
  return g;
}

int64_t row_of(const AttentionParams& p, const Geometry& g, int64_t t) {
  return p.order ? p.order[g.first + t] : g.first + t;
}

// Turns the d channels of one head by the angles of a position; dst may not be src.
void rotate(const float* rope, int64_t d, const float* src, float* dst) {
  const int64_t half = d / 2;
  for (int64_t i = 0; i < half; i += 16) {
    const int64_t n = half - i;
    const F16 a = loadn(src + i, n), b = loadn(src + half + i, n), c = loadn(rope + i, n),
              s = loadn(rope + half + i, n);
    storen(dst + i, sub(mul(a, c), mul(b, s)), n);
    storen(dst + half + i, add(mul(b, c), mul(a, s)), n);
  }
}

// One head of q or k as the products see it.
const float* turned(const AttentionParams& p, int64_t position, const float* src, float* tmp) {
  if (!p.rope) return src;
  rotate(p.rope + position * p.d, p.d, src, tmp);
  return tmp;
}

// Position `at` of kv head h, value by value.
void append(const AttentionParams& p, const Geometry& g, int64_t at, int64_t h, float* tmp) {
  const int64_t row = row_of(p, g, at - g.pos);
  const float* k = turned(p, at, p.k + row * p.ldkv + h * p.d, tmp);
  const float* v = p.v + row * p.ldkv + h * p.d;
  uint8_t* kp = g.k_cache + h * g.k_head + (at / 16) * g.k_panel;
  uint8_t* vh = g.v_cache + h * g.v_head;
  const int64_t lane = at % 16;
  const bool last = at == g.pos + g.m - 1;
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

// Positions [at, at + 16), a whole K panel, which is what a woven tile of 16 rows looks like.
void append_panel(const AttentionParams& p, const Geometry& g, int64_t at, int64_t h, char* scratch) {
  const int64_t nu = units_per_row(p.format, p.d);
  uint32_t* units = reinterpret_cast<uint32_t*>(scratch);
  float* tmp = reinterpret_cast<float*>(units + 16 * round_up(nu, 16));
  for (int64_t r = 0; r < 16; ++r) {
    const int64_t row = row_of(p, g, at + r - g.pos);
    const float* k = turned(p, at + r, p.k + row * p.ldkv + h * p.d, tmp);
    to_units(p.format, k, p.d, 0, {units + r * nu, nullptr, nullptr});
  }
  weave(p.format, p.d, 0, 16, {units, nullptr, nullptr}, nu, 0, g.k_cache + h * g.k_head + (at / 16) * g.k_panel);
  const int per = p.format == kW_F32 ? 1 : 2;
  for (int64_t r = 0; r < 16; r += per) {
    const float* v0 = p.v + row_of(p, g, at + r - g.pos) * p.ldkv + h * p.d;
    const float* v1 = p.v + row_of(p, g, at + r + per - 1 - g.pos) * p.ldkv + h * p.d;
    for (int64_t i = 0; i < p.d; i += 16) {
      uint8_t* to = g.v_cache + h * g.v_head + (i / 16) * g.v_panel + (at + r) / per * 64;
      if (per == 1)
        store(reinterpret_cast<float*>(to), loadn(v0 + i, p.d - i));
      else
        store_bf16_pairs(to, loadn(v0 + i, p.d - i), loadn(v1 + i, p.d - i));
    }
  }
}

// Rows of a sequence of m that have a query.
int64_t asking(const AttentionParams& p, int64_t m) { return p.queries ? imin(m, p.queries) : m; }

// The last position that row t sees, plus one.
int64_t end_of(const AttentionParams& p, const Geometry& g, int64_t t) {
  return g.pos + (!p.k ? 0 : p.causal ? t + 1 : g.m);
}

// The softmax state after pads[b] equal keys.
void start_with_pads(const AttentionParams& p, const Geometry& g, int64_t h, int64_t r, float* o, float* mx,
                     float* sum) {
  const float* q = p.q + row_of(p, g, r / g.group) * p.ldq + (h * g.group + r % g.group) * p.d;
  F16 dot = zero();
  for (int64_t i = 0; i < p.d; i += 16) dot = fma(loadn(q + i, p.d - i), loadn(p.pad_k + h * p.d + i, p.d - i), dot);
  *mx = reduce_add(dot) * p.scale;
  *sum = float(g.pads);
  for (int64_t i = 0; i < p.d; i += 16) store(o + i, mul(loadn(p.pad_v + h * p.d + i, p.d - i), set1(*sum)));
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
  float* tmp = reinterpret_cast<float*>(qt + tiles.count * q_bytes);  // one head
  for (int64_t i = 0; i < tiles.count; ++i) {
    const int64_t f = r0 + tiles.first(i), mr = tiles.rows(i);
    for (int64_t r = 0; r < mr; ++r) {
      const int64_t t = (f + r) / g.group, head = h * g.group + (f + r) % g.group;
      const float* q = turned(p, g.pos + t, p.q + row_of(p, g, t) * p.ldq + head * p.d, tmp);
      to_units(p.format, q, p.d, 0, {units + r * nu, nullptr, nullptr});
    }
    weave(p.format, p.d, 0, mr, {units, nullptr, nullptr}, nu, 0, qt + i * q_bytes);
  }
  for (int64_t r = 0; r < rows; ++r) {
    mx[r] = kNegInf;
    sum[r] = 0.f;
    for (int64_t i = 0; i < dp; i += 16) store(o + r * dp + i, zero());
    if (g.pads > 0) start_with_pads(p, g, h, r0 + r, o + r * dp, mx + r, sum + r);
  }
  const int64_t end = imin(s1, end_of(p, g, (r1 - 1) / g.group));
  const int64_t unit_bytes = p.format == kW_F32 ? 64 : 32;  // of a V panel, per position
  for (int64_t b0 = s0; b0 < end; b0 += kBlock) {
    const int64_t nb = imin(kBlock, end - b0), nk = p.format == kW_F32 ? nb : nb + (nb & 1);
    for (int64_t i = 0; i < tiles.count; ++i) {
      const int64_t f = tiles.first(i), mr = tiles.rows(i);
      if (end_of(p, g, (r0 + f + mr - 1) / g.group) <= b0) continue;  // every row of the tile lies before this block
      run_panels(p.format, mr, qt + i * q_bytes, g.k_cache + h * g.k_head + (b0 / 16) * g.k_panel, g.k_panel, 0,
                 ceil_div(nb, 16), p.d, 0, [&](int64_t panel, int np, const float* c) {
                   for (int64_t r = 0; r < mr; ++r)
                     for (int q = 0; q < np; ++q)
                       store(s + r * kBlock + (panel + q) * 16, mul(load(c + (r * np + q) * 16), set1(p.scale)));
                 });
      const int64_t pu = units_per_row(p.format, nk);
      const int64_t padded = round_up(nb, 16);
      const auto visible_of = [&](int64_t r) { return imin(nb, end_of(p, g, (r0 + f + r) / g.group) - b0); };
      for (int64_t r = 0; r < mr; ++r) {
        float* sr = s + r * kBlock;
        const int64_t visible = imax(visible_of(r), 0);
        for (int64_t j = visible; j < padded; ++j) sr[j] = kNegInf;
        F16 best = set1(mx[f + r]);
        for (int64_t j = 0; j < padded; j += 16) best = max(load(sr + j), best);
        corr[r] = mx[f + r];
        mx[f + r] = reduce_max(best);
      }
      // How much what was summed so far shrinks; of nothing so far it does not matter.
      storen(corr, exp(sub(loadn(corr, mr), loadn(mx + f, mr))), mr);
      for (int64_t r = 0; r < mr; ++r) {
        float* sr = s + r * kBlock;
        const int64_t visible = visible_of(r);
        if (visible <= 0) corr[r] = 1.f;  // -inf less -inf, where nothing has been seen yet
        F16 total = zero();
        const F16 top = set1(mx[f + r]);
        for (int64_t j = 0; j < padded; j += 16) {
          // exp() clamps its argument, so masked lanes are zeroed by count.
          const int64_t n = visible - j;
          const F16 e = n >= 16 ? exp(sub(load(sr + j), top))
                        : n > 0 ? first_lanes(exp(sub(load(sr + j), top)), n)
                                : zero();
          total = add(total, e);
          store(sr + j, e);
        }
        sum[f + r] = sum[f + r] * corr[r] + reduce_add(total);
        to_units(p.format, sr, nk, 0, {units + r * pu, nullptr, nullptr});
      }
      weave(p.format, nk, 0, mr, {units, nullptr, nullptr}, pu, 0, ptile);
      run_panels(p.format, mr, ptile, g.v_cache + h * g.v_head + b0 * unit_bytes, g.v_panel, 0, dp / 16, nk, 0,
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
        storen(p.out + row_of(p, g, t) * p.ldo + head * p.d + i, mul(load(o + r * dp + i), inv), p.d - i);
    }
  }
}

}  // namespace

void attention(const AttentionParams& p, Ctx& ctx) {
  const int64_t chunks = ceil_div(p.m, 16) + 1;  // by panels of positions, the first and last of which may be shared
  for (int64_t task; p.k && (task = claim(ctx)) < p.batch * chunks * p.kv_heads;) {
    const Geometry g = geometry(p, task / (chunks * p.kv_heads));
    const int64_t panel = g.pos / 16 + task % chunks, h = task / chunks % p.kv_heads;
    const int64_t first = imax(panel * 16, g.pos), end = imin(panel * 16 + 16, g.pos + g.m);
    if (end - first == 16 && (p.format == kW_F32 || kNativeBf16)) {
      append_panel(p, g, first, h, ctx.scratch);
      continue;
    }
    for (int64_t at = first; at < end; ++at) append(p, g, at, h, reinterpret_cast<float*>(ctx.scratch));
  }
  if (!p.q) return;
  barrier(ctx);
  const int64_t share = p.heads / p.kv_heads;
  const int64_t per_task = kTilesPerTask * max_rows(p.format);
  const int64_t groups = ceil_div(asking(p, p.m) * share, per_task);
  const Geometry one = geometry(p, 0);
  const int64_t length = end_of(p, one, one.m - 1);
  const bool split = p.batch == 1 && one.m <= kAttentionSplitRows && !one.pads;
  const int64_t splits = split ? ceil_div(length, kAttentionSplit) : 1;
  float* partial = splits > 1 ? reinterpret_cast<float*>(p.ws) : nullptr;
  const int64_t row_floats = p.d + 2, rows = asking(p, one.m) * share;
  for (int64_t task; (task = claim(ctx)) < p.batch * p.kv_heads * groups * splits;) {
    const int64_t s = task % splits, h = task / splits % p.kv_heads;
    const Geometry g = geometry(p, task / splits / p.kv_heads / groups);
    // Late rows see the longest context: hand them out first.
    const int64_t gi = groups - 1 - task / splits / p.kv_heads % groups;
    const int64_t r0 = gi * per_task, r1 = imin(r0 + per_task, asking(p, g.m) * share);
    if (r0 >= r1) continue;
    attend(p, g, h, r0, r1, s * kAttentionSplit,
           splits > 1 ? imin((s + 1) * kAttentionSplit, length) : end_of(p, g, g.m - 1), ctx.scratch,
           partial ? partial + ((s * p.kv_heads + h) * rows + r0) * row_floats : nullptr);
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
    const int64_t t = r / share, head = h * share + r % share;
    for (int64_t i = 0; i < p.d; ++i) p.out[row_of(p, one, t) * p.ldo + head * p.d + i] = o[i] / total;
  }
}

}  // namespace engine::cpu::ENGINE_NS
