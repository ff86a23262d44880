// moe: routing on fp32 logits, then two grouped products over the chosen experts and the shared one
// layout   moe.h; packed activations per sorted row, tiles never cross an expert
// mapping  T = 1: activations packed by every thread, tasks = panel chunks of the chosen experts (no sort, no barrier);
//          T > 1: rows packed once, tasks = (expert, panel chunk); moe_down owns columns, so sums need no atomics
// moves    T = 1: top_k of E experts once; T > 1: every touched expert once, activations top_k times
// tried    README.md
#include "ops/moe/moe.h"

#include "ops/gemm/microkernel.h"

namespace engine::cpu::ENGINE_NS {

void gemm(const GemmParams& p, Ctx& ctx);

namespace {

// One set of packed weights: `count` matrices [n, k], `stride` bytes apart.
struct Weights {
  const uint8_t* base;
  int32_t format;
  int64_t n, k, group, panel, stride;
  const float* bias;
};
ENGINE_INLINE Weights weights(const uint8_t* base, int32_t format, int64_t n, int64_t k, int64_t group,
                              const float* bias) {
  const int64_t panel = gemm_panel_bytes(format, k, group);
  return {base, format, n, k, group, panel, panel * ceil_div(n, 16), bias};
}
ENGINE_INLINE int64_t groups_of(int32_t format, int64_t k, int64_t group) { return is_int(format) ? k / group : 0; }

// Packs one f32 row as a one-row tile.
void pack_row(const Weights& w, const float* row, uint8_t* tile) {
  uint32_t* u = reinterpret_cast<uint32_t*>(tile);
  float* sc = reinterpret_cast<float*>(u + units_per_row(w.format, w.k));
  to_units(w.format, row, w.k, w.group, {u, sc, reinterpret_cast<int32_t*>(sc + groups_of(w.format, w.k, w.group))});
}

// Packs `mr` rows of f32, row r at src(r), as one tile.
template <class Src> void pack_rows(const Weights& w, int64_t mr, char* scratch, uint8_t* tile, Src&& src) {
  const int64_t nu = units_per_row(w.format, w.k), ng = groups_of(w.format, w.k, w.group);
  float* scale = reinterpret_cast<float*>(scratch);
  int32_t* corr = reinterpret_cast<int32_t*>(scale + ng * kMaxRows);
  uint32_t* units = reinterpret_cast<uint32_t*>(corr + ng * kMaxRows);
  for (int64_t r = 0; r < mr; ++r)
    to_units(w.format, src(r), w.k, w.group, {units + r * nu, scale + r * ng, corr + r * ng});
  weave(w.format, w.k, w.group, mr, {units, scale, corr}, nu, ng, tile);
}

// Rows [first, first+count) of one weight matrix against its tiles; emit(row, panel, np, c_row).
template <class Emit> void product(const Weights& w, int64_t expert, int64_t first, int64_t count, const uint8_t* tiles,
                                   int64_t row_bytes, int64_t p0, int64_t p1, Emit&& emit) {
  const Tiles split = split_rows(count, max_rows(w.format));
  for (int64_t i = 0; i < split.count; ++i) {
    const int64_t r0 = first + split.first(i), mr = split.rows(i);
    run_panels(w.format, mr, tiles + r0 * row_bytes, w.base + expert * w.stride, w.panel, p0, p1, w.k, w.group,
               [&](int64_t panel, int np, const float* c) {
                 for (int64_t r = 0; r < mr; ++r)
                   for (int q = 0; q < np; ++q) emit(r0 + r, panel + q, c + (r * np + q) * 16);
               });
  }
}

void choose(const MoeRouteParams& p, int64_t t, float* s, float* choice) {
  const float* logits = p.logits + t * p.experts;
  for (int64_t e = 0; e < p.experts; ++e) {
    s[e] = 1.f / (1.f + expf(-logits[e]));
    choice[e] = s[e] + (p.bias ? p.bias[e] : 0.f);
  }
  if (p.n_group > 1 && p.topk_group < p.n_group) {
    const int64_t size = p.experts / p.n_group;
    float* score = choice + p.experts;  // [n_group]
    for (int64_t g = 0; g < p.n_group; ++g) {
      float a = -INFINITY, b = -INFINITY;
      for (int64_t e = g * size; e < (g + 1) * size; ++e) {
        if (choice[e] > a) {
          b = a;
          a = choice[e];
        } else if (choice[e] > b) {
          b = choice[e];
        }
      }
      score[g] = size > 1 ? a + b : a;
    }
    for (int64_t keep = 0; keep < p.topk_group; ++keep) {
      int64_t best = -1;
      for (int64_t g = 0; g < p.n_group; ++g)
        if (score[g] != INFINITY && (best < 0 || score[g] > score[best])) best = g;
      if (best >= 0) score[best] = INFINITY;  // kept
    }
    for (int64_t g = 0; g < p.n_group; ++g)
      if (score[g] != INFINITY)
        for (int64_t e = g * size; e < (g + 1) * size; ++e) choice[e] = -INFINITY;
  }
  float total = 0.f;
  for (int64_t j = 0; j < p.top_k; ++j) {
    int64_t best = -1;
    for (int64_t e = 0; e < p.experts; ++e) {
      bool taken = false;
      for (int64_t i = 0; i < j; ++i) taken |= p.ids[t * p.top_k + i] == int32_t(e);
      if (!taken && (best < 0 || choice[e] > choice[best])) best = e;
    }
    p.ids[t * p.top_k + j] = int32_t(best);
    p.weights[t * p.top_k + j] = s[best];
    total += s[best];
  }
  const float norm = p.norm_topk ? p.scale / (total + 1e-20f) : p.scale;
  for (int64_t j = 0; j < p.top_k; ++j) p.weights[t * p.top_k + j] *= norm;
}

}  // namespace

void moe_route(const MoeRouteParams& p, Ctx& ctx) {
  const int64_t m = p.rows ? imin(*p.rows, p.m) : p.m;
  if (m <= 0) return;
  GemmParams g = {};
  g.x = p.x;
  g.ldx = p.ldx;
  g.w = p.gate;
  g.out = p.logits;
  g.ldo = p.experts;
  g.pro_w = p.norm;
  g.prologue = p.norm ? kProRmsNorm : kProNone;
  g.eps = p.eps;
  g.ws = p.ws;
  g.m = m;
  g.n = p.experts;
  g.k = p.d;
  g.format = kW_F32;
  g.group = 1;
  g.scale = 1.f;
  gemm(g, ctx);
  barrier(ctx);
  float* s = reinterpret_cast<float*>(ctx.scratch);
  for (int64_t t; (t = claim(ctx)) < m;) choose(p, t, s, s + p.experts);
  if (p.m == 1) return;
  barrier(ctx);
  if (ctx.tid != 0) return;
  const int64_t pairs = m * p.top_k;
  for (int64_t e = 0; e <= p.experts; ++e) p.offsets[e] = 0;
  for (int64_t i = 0; i < pairs; ++i) ++p.offsets[p.ids[i] + 1];
  for (int64_t e = 0; e < p.experts; ++e) p.offsets[e + 1] += p.offsets[e];
  int32_t* next = reinterpret_cast<int32_t*>(ctx.scratch);
  for (int64_t e = 0; e < p.experts; ++e) next[e] = p.offsets[e];
  for (int64_t i = 0; i < pairs; ++i) p.order[next[p.ids[i]]++] = int32_t(i);
}

void moe_up(const MoeUpParams& p, Ctx& ctx) {
  const int64_t m = p.rows ? imin(*p.rows, p.m) : p.m;
  if (m <= 0) return;
  const Weights up = weights(p.up, p.format, p.inner, p.d, p.group, p.up_bias);
  const Weights sh = weights(p.shared_up, p.shared_format, p.shared, p.d, p.shared_group, p.shared_bias);
  // One row: few long streams. Many rows: what stays in L2 while an expert's rows pass.
  const int64_t panels = ceil_div(p.inner, 16), shared_panels = p.shared_up ? ceil_div(p.shared, 16) : 0;
  const int64_t most =
      p.m == 1 ? ceil_div(p.top_k * panels + shared_panels, 8 * ctx.n) : imax(hot_panels(up.panel) & ~1, 2);
  const int64_t chunk_size = ceil_div(panels, ceil_div(panels, imax(most, 1)));
  const int64_t chunks = ceil_div(panels, chunk_size), shared_chunks = ceil_div(shared_panels, chunk_size);
  const auto put = [&](const Weights& w, int64_t expert, float* row, int64_t panel, const float* c) {
    const int64_t n = w.n - panel * 16;
    F16 v = load(c);
    if (w.bias) v = add(v, loadn(w.bias + expert * w.n + panel * 16, n));
    storen(row + panel * 16, activate(v, p.act), n);
  };
  const auto last_panel = [chunk_size](const Weights& w, int64_t chunk) {
    return imin((chunk + 1) * chunk_size, ceil_div(w.n, 16));
  };

  if (p.m == 1) {
    float* row = reinterpret_cast<float*>(ctx.scratch);
    uint8_t* a = reinterpret_cast<uint8_t*>(row + round_up(p.d, 16));
    rms_norm_row(p.x, p.norm, p.d, p.eps, row);
    pack_row(up, row, a);
    const bool same = p.shared_format == p.format && p.shared_group == p.group;
    uint8_t* as = same ? a : a + moe_row_bytes(p.format, p.d, p.group);
    if (p.shared_up && !same) pack_row(sh, row, as);
    for (int64_t task; (task = claim(ctx)) < p.top_k * chunks + shared_chunks;) {
      const bool routed = task < p.top_k * chunks;
      const Weights& w = routed ? up : sh;
      const int64_t slot = routed ? task / chunks : 0, chunk = routed ? task % chunks : task - p.top_k * chunks;
      const int64_t expert = routed ? p.ids[slot] : 0;
      float* dst = routed ? p.h + slot * p.inner : p.hs;
      product(w, expert, 0, 1, routed ? a : as, 0, chunk * chunk_size, last_panel(w, chunk),
              [&](int64_t, int64_t panel, const float* c) { put(w, expert, dst, panel, c); });
    }
    return;
  }

  // Rows normalised once; each expert then gathers and packs its own.
  const int64_t rb = moe_row_bytes(p.format, p.d, p.group);
  const int64_t rbs = moe_row_bytes(p.shared_format, p.d, p.shared_group);
  const int64_t ld = round_up(p.d, 16);
  float* normed = reinterpret_cast<float*>(p.ws);
  uint8_t* tiles = p.ws + round_up(m * ld * 4, 64);
  uint8_t* shared_tiles = tiles + m * p.top_k * rb;
  for (int64_t t; (t = claim(ctx)) < m;) rms_norm_row(p.x + t * p.ldx, p.norm, p.d, p.eps, normed + t * ld);
  barrier(ctx);
  const Tiles st = split_rows(m, max_rows(p.shared_format));
  const int64_t shared_packs = p.shared_up ? st.count : 0;
  for (int64_t task; (task = claim(ctx)) < p.experts + shared_packs;) {
    if (task >= p.experts) {
      const int64_t i = task - p.experts, r0 = st.first(i);
      pack_rows(sh, st.rows(i), ctx.scratch, shared_tiles + r0 * rbs,
                [&](int64_t r) { return normed + (r0 + r) * ld; });
      continue;
    }
    const int64_t f = p.offsets[task], n = p.offsets[task + 1] - f;
    if (n == 0) continue;
    const Tiles et = split_rows(n, max_rows(p.format));
    for (int64_t i = 0; i < et.count; ++i) {
      const int64_t r0 = f + et.first(i);
      pack_rows(up, et.rows(i), ctx.scratch, tiles + r0 * rb,
                [&](int64_t r) { return normed + (p.order[r0 + r] / p.top_k) * ld; });
    }
  }
  barrier(ctx);
  for (int64_t task; (task = claim(ctx)) < shared_chunks + p.experts * chunks;) {
    if (task < shared_chunks) {  // the largest products first
      product(sh, 0, 0, m, shared_tiles, rbs, task * chunk_size, last_panel(sh, task),
              [&](int64_t r, int64_t panel, const float* c) { put(sh, 0, p.hs + r * p.shared, panel, c); });
      continue;
    }
    const int64_t e = (task - shared_chunks) / chunks, chunk = (task - shared_chunks) % chunks;
    const int64_t f = p.offsets[e], n = p.offsets[e + 1] - f;
    if (n == 0) continue;
    product(up, e, f, n, tiles, rb, chunk * chunk_size, last_panel(up, chunk),
            [&](int64_t r, int64_t panel, const float* c) { put(up, e, p.h + r * p.inner, panel, c); });
  }
}

void moe_down(const MoeDownParams& p, Ctx& ctx) {
  const int64_t m = p.rows ? imin(*p.rows, p.m) : p.m;
  if (m <= 0) return;
  const Weights down = weights(p.down, p.format, p.d, p.inner, p.group, p.down_bias);
  const Weights sh = weights(p.shared_down, p.shared_format, p.d, p.shared, p.shared_group, p.shared_bias);
  const int64_t panels = ceil_div(p.d, 16);
  // One row: long streams in each expert. Many rows: the weights of a task stay in L2 while an expert's rows pass.
  const int64_t chunk_size =
      pick_chunk(panels, ctx.n, p.m == 1 ? ceil_div(panels, 8 * ctx.n) : hot_panels(down.panel), p.m == 1 ? 1 : 2);
  const int64_t chunks = ceil_div(panels, chunk_size);
  const int64_t rb = moe_row_bytes(p.format, p.inner, p.group);
  const int64_t rbs = p.shared_down ? moe_row_bytes(p.shared_format, p.shared, p.shared_group) : 0;
  // out[t, panel] += scale * (c + bias): rows of one column block belong to one thread, experts come in order.
  const auto accumulate = [&](const Weights& w, int64_t expert, int64_t t, float scale, int64_t panel, const float* c) {
    const int64_t n = p.d - panel * 16;
    F16 v = load(c);
    if (w.bias) v = add(v, loadn(w.bias + expert * p.d + panel * 16, n));
    float* o = p.out + t * p.ldo + panel * 16;
    storen(o, fma(v, set1(scale), loadn(o, n)), n);
  };
  const auto start_from_residual = [&](int64_t p0, int64_t p1) {
    const int64_t c0 = p0 * 16, n = imin(p1 * 16, p.d) - c0;
    for (int64_t t = 0; t < m; ++t) {
      float* o = p.out + t * p.ldo + c0;
      if (!p.residual)
        memset(o, 0, size_t(n) * 4);
      else if (p.residual != p.out)
        memcpy(o, p.residual + t * p.ldr + c0, size_t(n) * 4);
    }
  };

  if (p.m == 1) {
    uint8_t* a = reinterpret_cast<uint8_t*>(ctx.scratch);
    uint8_t* as = a + p.top_k * rb;
    for (int64_t j = 0; j < p.top_k; ++j) pack_row(down, p.h + j * p.inner, a + j * rb);
    if (p.shared_down) pack_row(sh, p.hs, as);
    for (int64_t task; (task = claim(ctx)) < chunks;) {
      const int64_t p0 = task * chunk_size, p1 = imin(p0 + chunk_size, panels);
      start_from_residual(p0, p1);
      for (int64_t j = 0; j < p.top_k; ++j)
        product(down, p.ids[j], 0, 1, a + j * rb, 0, p0, p1,
                [&](int64_t, int64_t panel, const float* c) { accumulate(down, p.ids[j], 0, p.weights[j], panel, c); });
      if (p.shared_down)
        product(sh, 0, 0, 1, as, 0, p0, p1,
                [&](int64_t, int64_t panel, const float* c) { accumulate(sh, 0, 0, 1.f, panel, c); });
    }
    return;
  }

  uint8_t* tiles = p.ws;
  uint8_t* shared_tiles = tiles + m * p.top_k * rb;
  const Tiles st = split_rows(m, p.shared_down ? max_rows(p.shared_format) : 1);
  const int64_t shared_packs = p.shared_down ? st.count : 0;
  for (int64_t task; (task = claim(ctx)) < p.experts + shared_packs;) {
    if (task >= p.experts) {
      const int64_t i = task - p.experts, r0 = st.first(i);
      pack_rows(sh, st.rows(i), ctx.scratch, shared_tiles + r0 * rbs,
                [&](int64_t r) { return p.hs + (r0 + r) * p.shared; });
      continue;
    }
    const int64_t f = p.offsets[task], n = p.offsets[task + 1] - f;
    if (n == 0) continue;
    const Tiles et = split_rows(n, max_rows(p.format));
    for (int64_t i = 0; i < et.count; ++i) {
      const int64_t r0 = f + et.first(i);
      pack_rows(down, et.rows(i), ctx.scratch, tiles + r0 * rb, [&](int64_t r) { return p.h + (r0 + r) * p.inner; });
    }
  }
  barrier(ctx);
  for (int64_t task; (task = claim(ctx)) < chunks;) {
    const int64_t p0 = task * chunk_size, p1 = imin(p0 + chunk_size, panels);
    start_from_residual(p0, p1);
    for (int64_t e = 0; e < p.experts; ++e) {
      const int64_t f = p.offsets[e], n = p.offsets[e + 1] - f;
      if (n == 0) continue;
      product(down, e, f, n, tiles, rb, p0, p1, [&](int64_t r, int64_t panel, const float* c) {
        const int64_t pair = p.order[r];
        accumulate(down, e, pair / p.top_k, p.weights[pair], panel, c);
      });
    }
    if (p.shared_down)
      product(sh, 0, 0, m, shared_tiles, rbs, p0, p1,
              [&](int64_t r, int64_t panel, const float* c) { accumulate(sh, 0, r, 1.f, panel, c); });
  }
}

}  // namespace engine::cpu::ENGINE_NS
