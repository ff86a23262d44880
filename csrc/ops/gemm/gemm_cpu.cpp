// gemm: out = act(prologue(x) @ W.T + bias) * scale * gate + residual, W packed once at load
// layout   gemm.h (operands), microkernel.h (tiles)
// mapping  small M*K: every thread packs all rows for itself, then takes chunks of panels (no barrier);
//          few panels and many rows: a tile of rows is packed and meets every panel before the next one (no barrier);
//          else, strip by strip: rows are packed into ws, barrier, then (row block, panel chunk) tasks, dynamic
// moves    W once per row block of <= 4 MB of A; x, out, residual once
// tried    README.md
#include "ops/gemm/gemm.h"

#include "ops/gemm/microkernel.h"

namespace engine::cpu::ENGINE_NS {
namespace {

constexpr int64_t kPrivateBytes = 128 << 10;  // A that each thread may pack redundantly
constexpr int64_t kBlockBytes = 4 << 20;      // A kept hot in the last-level cache
constexpr int64_t kNarrowBytes = 768 << 10;   // W that stays in a core's own cache

int64_t mod_row(const GemmParams& p, int64_t m) { return p.mod_rows ? p.mod_rows[m] : 0; }

int64_t row_begin(const GemmParams& p, int64_t m) {
  return p.width ? m / p.width * p.ldline + m % p.width * p.ldx : m * p.ldx;
}

// fn(to, from, n): n values of row m lie at `from` of x.
template <class Fn> void each_piece(const GemmParams& p, int64_t m, Fn&& fn) {
  const int64_t piece = p.tap ? p.tap : p.k;
  for (int64_t at = 0, from = row_begin(p, m); at < p.k; at += piece, from += p.ldtap) fn(at, from, piece);
}

const float* prologue_row(const GemmParams& p, int64_t m, float* tmp) {
  const float* x = p.x + row_begin(p, m);
  const float* z = p.z + m * p.ldz;
  switch (p.prologue) {
    case kProRmsNorm:
    case kProLayerNorm: {
      const auto part = [&](int64_t column) {
        return p.mod && column >= 0 ? span_at(p.mod, p.mod_dtype, mod_row(p, m) * p.ldmod + column) : Span();
      };
      norm_row({p.prologue, p.pro_w, p.pro_b, part(p.mod_scale), part(p.mod_shift), p.eps}, x, p.k, tmp);
      return tmp;
    }
    case kProGatedGroupNorm: gated_group_norm_row(x, z, p.pro_w, p.k, p.norm_group, p.eps, tmp); return tmp;
    case kProGlu: glu_row(x, z, p.k, p.pro_act, tmp); return tmp;
    default:
      if (p.x16) {
        each_piece(p, m, [&](int64_t at, int64_t from, int64_t n) {
          for (int64_t i = 0; i < n; i += 16) storen(tmp + at + i, loadn_bf16(p.x16 + from + i, n - i), n - i);
        });
        return tmp;
      }
      if (!p.tap) return x;
      each_piece(p, m, [&](int64_t at, int64_t from, int64_t n) { memcpy(tmp + at, p.x + from, size_t(n) * 4); });
      return tmp;
  }
}

// Row m in the units of the format; `tmp` holds one f32 row.
void row_units(const GemmParams& p, int64_t m, float* tmp, const Units& out) {
  if (p.x16 && p.format == kW_BF16 && kNativeBf16) {  // as it is
    uint16_t* d = reinterpret_cast<uint16_t*>(out.u);
    each_piece(p, m, [&](int64_t at, int64_t from, int64_t n) { memcpy(d + at, p.x16 + from, size_t(n) * 2); });
    if (p.k & 1) d[p.k] = 0;
    return;
  }
  to_units(p.format, prologue_row(p, m, tmp), p.k, p.group, out);
}

// Packs rows [m0, m0+mr) into a tile. `scratch` holds one f32 row and mr rows of units.
void pack_tile(const GemmParams& p, int64_t m0, int64_t mr, char* scratch, uint8_t* tile) {
  const int64_t nu = units_per_row(p.format, p.k), groups = is_int(p.format) ? p.k / p.group : 0;
  float* row = reinterpret_cast<float*>(scratch);
  float* scale = row + round_up(p.k, 16);
  int32_t* corr = reinterpret_cast<int32_t*>(scale + groups * kMaxRows);
  if (mr == 1) {
    uint32_t* d = reinterpret_cast<uint32_t*>(tile);
    float* sc = reinterpret_cast<float*>(d + nu);
    row_units(p, m0, row, {d, sc, reinterpret_cast<int32_t*>(sc + groups)});
    return;
  }
  uint32_t* units = reinterpret_cast<uint32_t*>(corr + groups * kMaxRows);
  for (int64_t r = 0; r < mr; ++r) row_units(p, m0 + r, row, {units + r * nu, scale + r * groups, corr + r * groups});
  weave(p.format, p.k, p.group, mr, {units, scale, corr}, nu, groups, tile);
}

void emit_block(const GemmParams& p, int64_t m0, int64_t mr, int64_t panel, int np, const float* c) {
  for (int64_t r = 0; r < mr; ++r) {
    const int64_t m = m0 + r;
    const bool gated = p.mod && p.mod_gate >= 0;
    const int64_t gate = gated ? mod_row(p, m) * p.ldmod + p.mod_gate : 0;
    for (int q = 0; q < np; ++q) {
      const int64_t n0 = (panel + q) * 16, left = p.n - n0;
      if (left <= 0) break;
      F16 v = load(c + (r * np + q) * 16);
      if (p.bias) v = add(v, loadn(p.bias + n0, left));
      if (p.act != kActNone) v = activate(v, p.act);
      if (p.scale != 1.f) v = mul(v, set1(p.scale));
      if (gated) v = mul(v, span_at(p.mod, p.mod_dtype, gate + n0).at(0, left));
      if (p.residual) v = add(v, loadn(p.residual + m * p.ldr + n0, left));
      if (p.out_dtype == kBF16)
        storen_bf16(static_cast<uint16_t*>(p.out) + m * p.ldo + n0, v, left);
      else
        storen(static_cast<float*>(p.out) + m * p.ldo + n0, v, left);
    }
  }
}

}  // namespace

void gemm(const GemmParams& p, Ctx& ctx) {
  const int64_t m = p.rows ? imin(*p.rows, p.m) : p.m;
  if (m <= 0) return;
  const int64_t panel_bytes = gemm_panel_bytes(p.format, p.k, p.group);
  const int64_t panels = ceil_div(p.n, 16);
  const Tiles tiles = split_rows(m, max_rows(p.format));
  const int64_t tile_bytes = a_tile_bytes(p.format, tiles.rows(0), p.k, p.group);
  const bool priv = tiles.count * tile_bytes <= kPrivateBytes;
  uint8_t* own = reinterpret_cast<uint8_t*>(ctx.scratch) + kScratchBytes - kPrivateBytes;
  if (!priv && panels * panel_bytes <= kNarrowBytes && tile_bytes <= kPrivateBytes && tiles.count >= 4 * ctx.n) {
    for (int64_t t; (t = claim(ctx)) < tiles.count;) {
      const int64_t m0 = tiles.first(t), mr = tiles.rows(t);
      pack_tile(p, m0, mr, ctx.scratch, own);
      run_panels(p.format, mr, own, p.w, panel_bytes, 0, panels, p.k, p.group,
                 [&](int64_t q, int np, const float* c) { emit_block(p, m0, mr, q, np, c); });
    }
    return;
  }
  const int64_t strip = priv ? tiles.count : imax(1, kGemmStripBytes / tile_bytes);
  uint8_t* a = priv ? own : p.ws;
  const int step = panels_for(p.format, tiles.rows(0));
  // At least four tasks per thread and row block, for a core that is disturbed.
  const int64_t most = imin(ceil_div(panels, 4 * ctx.n), tiles.count == 1 ? 64 : hot_panels(panel_bytes));
  const int64_t chunk = pick_chunk(panels, ctx.n, most, step);
  const int64_t chunks = ceil_div(panels, chunk);
  for (int64_t s0 = 0; s0 < tiles.count; s0 += strip) {
    const int64_t count = imin(strip, tiles.count - s0);
    const auto pack = [&](int64_t t) {
      pack_tile(p, tiles.first(s0 + t), tiles.rows(s0 + t), ctx.scratch, a + t * tile_bytes);
    };
    if (priv) {
      for (int64_t t = 0; t < count; ++t) pack(t);
    } else {
      if (s0) barrier(ctx);  // the strip before has been read
      for (int64_t t; (t = claim(ctx)) < count;) pack(t);
      barrier(ctx);
    }
    const int64_t block = imax(1, imin(count, kBlockBytes / tile_bytes));
    for (int64_t task; (task = claim(ctx)) < ceil_div(count, block) * chunks;) {
      const int64_t t0 = (task / chunks) * block, t1 = imin(t0 + block, count);
      const int64_t p0 = (task % chunks) * chunk, p1 = imin(p0 + chunk, panels);
      for (int64_t t = t0; t < t1; ++t) {
        const int64_t m0 = tiles.first(s0 + t), mr = tiles.rows(s0 + t);
        run_panels(p.format, mr, a + t * tile_bytes, p.w, panel_bytes, p0, p1, p.k, p.group,
                   [&](int64_t q, int np, const float* c) { emit_block(p, m0, mr, q, np, c); });
      }
    }
  }
}

// gemm_pack: quantise and lay out rows of a matrix, once at load
// layout   gemm.h
// mapping  one task per destination panel
// moves    src once, dst once
// tried    README.md
void gemm_pack(const GemmPackParams& p, Ctx& ctx) {
  const int64_t panel_bytes = gemm_panel_bytes(p.format, p.k, p.group);
  const int64_t first = p.n0 / 16, last = ceil_div(p.n0 + p.n, 16);
  float* row = reinterpret_cast<float*>(ctx.scratch);
  for (int64_t task; (task = claim(ctx)) < last - first;) {
    const int64_t panel = first + task;
    uint8_t* d = p.dst + panel * panel_bytes;
    for (int64_t lane = 0; lane < 16; ++lane) {
      const int64_t n = panel * 16 + lane - p.n0;
      const bool inside = n >= 0 && n < p.n;
      if (!inside && n < 0) continue;  // an earlier call wrote this row
      if (inside) {
        const int64_t o = n * p.lds;
        F16 poison = zero();  // stays 0 unless a value is NaN or infinite
        for (int64_t i = 0; i < p.k; i += 16) {
          const int64_t left = p.k - i;
          F16 v;
          if (p.src_dtype == kF32)
            v = loadn(static_cast<const float*>(p.src) + o + i, left);
          else if (p.src_dtype == kBF16)
            v = loadn_bf16(static_cast<const uint16_t*>(p.src) + o + i, left);
          else {
            float t[16] = {};
            for (int64_t j = 0; j < 16 && j < left; ++j)
              t[j] = f16_to_f32(static_cast<const uint16_t*>(p.src)[o + i + j]);
            v = load(t);
          }
          poison = fma(v, zero(), poison);
          storen(row + i, v, left);
        }
        if (!(reduce_add(poison) == 0.f) && p.bad) __atomic_store_n(p.bad, 1, __ATOMIC_RELAXED);
      } else {
        for (int64_t i = 0; i < p.k; ++i) row[i] = 0.f;
      }
      if (p.format == kW_F32) {
        float* q = reinterpret_cast<float*>(d);
        for (int64_t i = 0; i < p.k; ++i) q[i * 16 + lane] = row[i];
      } else if (p.format == kW_BF16) {
        uint16_t* q = reinterpret_cast<uint16_t*>(d);
        for (int64_t i = 0; i < p.k; ++i) q[(i / 2) * 32 + lane * 2 + (i & 1)] = f32_to_bf16(row[i]);
        if (p.k & 1) q[(p.k / 2) * 32 + lane * 2 + 1] = 0;
      } else {
        const bool four = p.format == kW_I4;
        const int64_t code_bytes = (four ? 8 : 16) * p.group, groups = p.k / p.group;
        const float top = four ? 8.f : 128.f, high = four ? 7.f : 127.f;
        for (int64_t g = 0; g < groups; ++g) {
          const float* s = row + g * p.group;
          F16 hi = set1(-3.4e38f), lo = set1(3.4e38f);
          for (int64_t i = 0; i < p.group; i += 16) {
            const F16 v = load(s + i);
            hi = max(hi, v);
            lo = min(lo, v);
          }
          const float vmax = reduce_max(hi), vmin = -reduce_max(neg(lo));
          // The code range is [-top, high], one step longer on the negative side: let the larger end use it.
          const float extreme = vmax > -vmin ? vmax : vmin;
          float best_err = 3.4e38f, best = 0.f;
          const int candidates = four ? 9 : 1;
          for (int c = 0; c < candidates && extreme != 0.f; ++c) {
            const float want = four ? -extreme / (top - 0.125f * float(c)) : (vmax > -vmin ? vmax : -vmin) / high;
            const float scale = f16_to_f32(f32_to_f16(want));
            if (!(fabsf(scale) <= 65504.f) && p.bad) __atomic_store_n(p.bad, 1, __ATOMIC_RELAXED);
            if (scale == 0.f) continue;
            const F16 inv = set1(1.f / scale), sc = set1(scale);
            F16 err = zero();
            for (int64_t i = 0; i < p.group; i += 16) {
              const F16 v = load(s + i);
              const F16 q = min(max(round_even(mul(v, inv)), set1(four ? -top : -high)), set1(high));
              const F16 e = sub(v, mul(q, sc));
              err = fma(e, e, err);
            }
            const float total = reduce_add(err);
            if (total < best_err) {
              best_err = total;
              best = scale;
            }
          }
          reinterpret_cast<uint16_t*>(d + gemm_scales_at(g, groups, code_bytes))[lane] = f32_to_f16(best);
          uint8_t* codes = d + gemm_codes_at(g, code_bytes);
          const float inv = best != 0.f ? 1.f / best : 0.f;
          for (int64_t i = 0; i < p.group; ++i) {
            float q = nearbyintf(s[i] * inv);
            q = q < (four ? -top : -high) ? (four ? -top : -high) : q > high ? high : q;
            const uint8_t code = uint8_t(int(q) + int(top));
            if (four) {
              uint8_t* b = codes + (i / 8) * 64 + lane * 4 + (i & 3);
              *b = (i & 4) ? uint8_t((*b & 15) | (code << 4)) : uint8_t((*b & 0xf0) | code);
            } else {
              codes[(i / 4) * 64 + lane * 4 + (i & 3)] = code;
            }
          }
        }
      }
    }
  }
}

// gemm_peak: the roofs of the benches
// layout   registers only; kind 3 any memory
// mapping  every thread the same loop, 16 independent chains; kind 3: 1 MiB per task, one stream per thread
// moves    nothing; kind 3 bytes
// tried    -
void gemm_peak(const GemmPeakParams& p, Ctx& ctx) {
  constexpr int kChains = 16;
  float total = 0.f;
  int64_t per_step = kChains * 16 * 2;
  if (p.kind == 3) {
    constexpr int64_t kPiece = 1 << 20;
    F16 s[4] = {zero(), zero(), zero(), zero()};
    for (int64_t t; (t = claim(ctx)) < p.bytes / kPiece;) {
      const float* d = reinterpret_cast<const float*>(p.data + t * kPiece);
      for (int64_t i = 0; i < kPiece / 4; i += 64)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) s[j] = add(s[j], load(d + i + j * 16));
    }
    if (ctx.tid < 64) p.sink[ctx.tid] = reduce_add(add(add(s[0], s[1]), add(s[2], s[3])));
    return;
  }
  if (p.kind == 2) {
    const uint8_t codes[64] = {1};
    const Codes u = load_codes(codes);
    I16 acc[kChains];
    for (int i = 0; i < kChains; ++i) acc[i] = set1_i32(i);
    for (int64_t n = 0; n < p.iterations; ++n)
#pragma GCC unroll 16
      for (int i = 0; i < kChains; ++i) acc[i] = dot<true>(acc[i], u, int32_t(n));
    for (int i = 0; i < kChains; ++i) total += reduce_add(to_f32(acc[i]));
    per_step *= 4;
  } else {
    F16 acc[kChains];
    for (int i = 0; i < kChains; ++i) acc[i] = set1(float(i));
    const F16 a = set1(1e-3f), b = set1(0.5f);
#if ENGINE_ISA == ENGINE_ISA_AVX512
    if (p.kind == 1) {
      const __m512bh x = (__m512bh)_mm512_castps_si512(a.v), y = (__m512bh)_mm512_castps_si512(b.v);
      for (int64_t n = 0; n < p.iterations; ++n)
#pragma GCC unroll 16
        for (int i = 0; i < kChains; ++i) acc[i].v = _mm512_dpbf16_ps(acc[i].v, x, y);
      per_step *= 2;
    } else
#endif
      for (int64_t n = 0; n < p.iterations; ++n)
#pragma GCC unroll 16
        for (int i = 0; i < kChains; ++i) acc[i] = fma(a, b, acc[i]);
    for (int i = 0; i < kChains; ++i) total += reduce_add(acc[i]);
  }
  if (ctx.tid < 64) p.sink[ctx.tid] = total;
  __atomic_fetch_add(p.ops, p.iterations * per_step, __ATOMIC_RELAXED);
}

}  // namespace engine::cpu::ENGINE_NS
