// fuse: a gate per token between two streams, with what follows it, and a gate per head
// layout   s, g, out, normed row-major f32 or bf16; weights and tables as in fuse.h
// mapping  gated_fuse: a task is a few pairs of rows, a pair shares every weight it loads; a fused row stays in thread
//          scratch (L1) until it is written, codes are added from their tables. gate_heads: a task is four rows
// moves    s, g and tables once (again from L1), out and normed once, past the caches where rows are aligned
// tried    README.md
#include "ops/fuse/fuse.h"

#include "base/dtype.h"
#include "base/simd.h"

namespace engine::cpu::ENGINE_NS {
namespace {

constexpr int64_t kPair = 2;
constexpr int64_t kPairs = 4;  // per task
constexpr int64_t kHeadRows = 4;

template <bool kHalf> ENGINE_INLINE F16 value(const void* p, int64_t i, int64_t n) {
#if ENGINE_ISA == ENGINE_ISA_AVX512
  if (kHalf && n == 16) {
    // One instruction for two: every half-word to the upper half of a word.
    const __m512i spread = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4,
                                            0, 3, 0, 2, 0, 1, 0, 0, 0);
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(p) + i));
    return {_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAAu, spread, _mm512_castsi256_si512(half)))};
  }
#endif
  return kHalf ? loadn_bf16(static_cast<const uint16_t*>(p) + i, n) : loadn(static_cast<const float*>(p) + i, n);
}

// fn(i, n) for sixteen values at a time; n is known to be 16 but for the last.
template <class Fn> ENGINE_INLINE void lanes(int64_t d, Fn&& fn) {
  const int64_t whole = d / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) fn(i, 16);
  if (whole < d) fn(whole, d - whole);
}
#define ENGINE_LANES [&](int64_t i, int64_t n) __attribute__((always_inline))

// Rows are written once and read much later: they need not come into the cache first.
template <bool kHalf> ENGINE_INLINE void put(char* row, int64_t i, F16 v, int64_t n, [[maybe_unused]] bool past_cache) {
#if ENGINE_ISA == ENGINE_ISA_AVX512
  if (past_cache && n == 16) {
    if (kHalf)
      // One instruction, which flushes subnormals: nothing that a later product would not flush.
      _mm256_stream_si256(reinterpret_cast<__m256i*>(row + 2 * i), (__m256i)_mm512_cvtneps_pbh(v.v));
    else
      _mm512_stream_ps(reinterpret_cast<float*>(row + 4 * i), v.v);
    return;
  }
#endif
  if (kHalf)
    storen_bf16(reinterpret_cast<uint16_t*>(row) + i, v, n);
  else
    storen(reinterpret_cast<float*>(row) + i, v, n);
}

template <bool kHalf> ENGINE_INLINE char* row_of(void* p, int64_t row, int64_t ld) {
  return static_cast<char*>(p) + row * ld * (kHalf ? 2 : 4);
}

// A finished row [D], whose squares sum to `squares`, to the row of out and normed that belongs to place r.
template <bool kHalf, class Ahead>
ENGINE_INLINE void emit(const GatedFuseParams& p, int64_t r, const float* o, float squares, Ahead&& ahead) {
  const int64_t row = p.order ? p.order[r] : r;
  char* out = row_of<kHalf>(p.out, row, p.ldo);
  const bool past = reinterpret_cast<uintptr_t>(out) % 64 == 0;
  if (!p.normed) {
    lanes(
        p.d, ENGINE_LANES {
          ahead(i);
          put<kHalf>(out, i, loadn(o + i, n), n, past);
        });
    return;
  }
  char* normed = row_of<kHalf>(p.normed, row, p.ldn);
  const bool past_too = reinterpret_cast<uintptr_t>(normed) % 64 == 0;
  const F16 scale = set1(1.f / sqrtf(squares / float(p.d) + p.norm_eps));
  lanes(
      p.d, ENGINE_LANES {
        const F16 v = loadn(o + i, n);
        ahead(i);
        put<kHalf>(out, i, v, n, past);
        put<kHalf>(normed, i, mul(mul(v, scale), loadn(p.norm_w + i, n)), n, past_too);
      });
}

template <class Ahead>
ENGINE_INLINE void emit_as(const GatedFuseParams& p, int64_t r, const float* o, float squares, Ahead&& ahead) {
  p.out_dtype == kBF16 ? emit<true>(p, r, o, squares, ahead) : emit<false>(p, r, o, squares, ahead);
}

// The position code of a row: pieces of three tables, side by side, then zeros.
template <int kTable> struct Code {
  const char* now;  // where channel 0 would be, were all channels in the table of the present ones
  int64_t end;      // of those
  const char* tables[3];
  int64_t third;

  __attribute__((always_inline)) void begin(const GatedFuseParams& p, int64_t row) {
    constexpr int64_t kSize = kTable == kBF16 ? 2 : 4;
    const int32_t* voxel = p.voxels + row * 3;
    const void* all[3] = {p.px, p.py, p.pz};
    third = p.d / 3;
    for (int64_t a = 0; a < 3; ++a) tables[a] = static_cast<const char*>(all[a]) + (voxel[a] - a) * third * kSize;
    now = tables[0];
    end = third;
  }

  // Channels [i, i + n), asked for in order.
  __attribute__((always_inline)) F16 at(int64_t i, int64_t n) {
    if (i + n <= end) [[likely]]
      return value<kTable == kBF16>(now, i, n);
    return across(i, n);
  }

  __attribute__((noinline)) F16 across(int64_t i, int64_t n) {
    float out[16] = {};
    for (int64_t j = i; j < imin(i + n, 3 * third); ++j) {
      float one[16];
      store(one, value<kTable == kBF16>(tables[j / third], j, 1));
      out[j - i] = one[0];
    }
    const int64_t a = imin((i + n) / third, 2);
    now = tables[a];
    end = (a + 1) * third;
    return loadn(out, 16);
  }
};

struct Moments {
  float mean, scale, dot;  // scale: reciprocal deviation
};

// Of a row whose values less `pivot` have these sums: near enough to the mean, so that nothing cancels.
Moments moments(const GatedFuseParams& p, F16 sum, F16 squares, F16 dot, float pivot, float weights) {
  const float n = float(p.d), off = reduce_add(sum) / n, var = reduce_add(squares) / n - off * off;
  return {pivot + off, 1.f / sqrtf((var > 0.f ? var : 0.f) + p.eps), reduce_add(dot) - off * weights};
}

// Rows [r0, r0 + kPair), or those of them below m. o: [kPair][D] of scratch. sums: of u1 and u2.
template <bool kHalf, int kTable> void fuse_pair(const GatedFuseParams& p, int64_t r0, float* o, const float* sums) {
  const int64_t d = p.d, size = kHalf ? 2 : 4, last = p.m - 1, some = imin(d, 64);
  const char *s[kPair], *g[kPair];
  F16 pivot1[kPair], pivot2[kPair], a1[kPair], a2[kPair], v1[kPair], v2[kPair], d1[kPair], d2[kPair];
#pragma GCC unroll 2
  for (int r = 0; r < kPair; ++r) {
    const int64_t row = imin(r0 + r, last);
    s[r] = static_cast<const char*>(p.s) + row * p.lds * size;
    g[r] = static_cast<const char*>(p.g) + row * p.ldg * size;
    a1[r] = a2[r] = v1[r] = v2[r] = d1[r] = d2[r] = zero();
    for (int64_t i = 0; i < some; i += 16) {
      a1[r] = add(a1[r], value<kHalf>(s[r], i, some - i));
      a2[r] = add(a2[r], value<kHalf>(g[r], i, some - i));
    }
    pivot1[r] = set1(reduce_add(a1[r]) / float(some));
    pivot2[r] = set1(reduce_add(a2[r]) / float(some));
    a1[r] = a2[r] = zero();
  }
  lanes(
      d, ENGINE_LANES {
        const F16 u1 = loadn(p.u1 + i, n), u2 = loadn(p.u2 + i, n);
#pragma GCC unroll 2
        for (int r = 0; r < kPair; ++r) {
          F16 a = sub(value<kHalf>(s[r], i, n), pivot1[r]), b = sub(value<kHalf>(g[r], i, n), pivot2[r]);
          if (n < 16) a = first_lanes(a, n), b = first_lanes(b, n);
          a1[r] = add(a1[r], a);
          a2[r] = add(a2[r], b);
          v1[r] = fma(a, a, v1[r]);
          v2[r] = fma(b, b, v2[r]);
          d1[r] = fma(a, u1, d1[r]);
          d2[r] = fma(b, u2, d2[r]);
        }
      });
  F16 m1[kPair], m2[kPair], gate[kPair], rest[kPair], scale1[kPair], scale2[kPair];
#pragma GCC unroll 2
  for (int r = 0; r < kPair; ++r) {
    float c1[16], c2[16], one[16];
    store(c1, pivot1[r]);
    store(c2, pivot2[r]);
    const Moments x = moments(p, a1[r], v1[r], d1[r], c1[0], sums[0]),
                  y = moments(p, a2[r], v2[r], d2[r], c2[0], sums[1]);
    store(one, sigmoid(set1(x.scale * x.dot + y.scale * y.dot + p.c)));
    const float w = p.force >= 0.f ? p.force : one[0];
    if (p.gates && r0 + r <= last) p.gates[r0 + r] = w;
    m1[r] = set1(x.mean);
    m2[r] = set1(y.mean);
    gate[r] = set1(w);
    rest[r] = set1(p.blend == kFuseResidual ? p.rho * (1.f - w) : 1.f - w);
    scale1[r] = set1(w * x.scale);
    scale2[r] = set1((1.f - w) * y.scale);
  }
  Code<kTable> codes[kPair];
  if (kTable >= 0)
    for (int64_t r = 0; r < kPair; ++r) codes[r].begin(p, imin(r0 + r, last));
  // By value: sums that live in memory would wait for every store of the loop.
  const auto finish = [&](int r, int64_t i, int64_t n, F16 v, F16 sum) __attribute__((always_inline)) {
    if (kTable >= 0) v = add(v, codes[r].at(i, n));
    if (n < 16) v = first_lanes(v, n);
    storen(o + r * d + i, v, n);
    return fma(v, v, sum);
  };
  F16 q0 = zero(), q1 = zero();
  if (p.blend == kFuseNormed) {
    lanes(
        d, ENGINE_LANES {
          const F16 w1 = loadn(p.w1 + i, n), w2 = loadn(p.w2 + i, n), b2 = loadn(p.b2 + i, n);
          const F16 between = sub(loadn(p.b1 + i, n), b2);  // once for both rows
          const auto blend = [&](int r) __attribute__((always_inline)) {
            const F16 a = mul(sub(value<kHalf>(s[r], i, n), m1[r]), scale1[r]),
                      b = mul(sub(value<kHalf>(g[r], i, n), m2[r]), scale2[r]);
            return fma(a, w1, fma(b, w2, fma(gate[r], between, b2)));
          };
          q0 = finish(0, i, n, blend(0), q0);
          q1 = finish(1, i, n, blend(1), q1);
        });
  } else {
    const bool raw = p.blend == kFuseRaw;
    lanes(
        d, ENGINE_LANES {
          const auto blend = [&](int r) __attribute__((always_inline)) {
            const F16 a = value<kHalf>(s[r], i, n), b = value<kHalf>(g[r], i, n);
            return raw ? fma(gate[r], a, mul(rest[r], b)) : fma(rest[r], sub(b, a), a);
          };
          q0 = finish(0, i, n, blend(0), q0);
          q1 = finish(1, i, n, blend(1), q1);
        });
  }
  const float squares[kPair] = {reduce_add(q0), reduce_add(q1)};
  for (int64_t r = 0; r < kPair && r0 + r <= last; ++r) {
    const int64_t row = r0 + r, place = p.newline ? row + row / p.period : row;
    // Rows end in the middle of a page, where the hardware stops to look ahead: the next pair is asked for here.
    const char *next_s = s[r] + kPair * p.lds * size, *next_g = g[r] + kPair * p.ldg * size;
    emit_as(p, place, o + r * d, squares[r], [&](int64_t i) __attribute__((always_inline)) {
#if ENGINE_ISA != ENGINE_ISA_SCALAR
      _mm_prefetch(next_s + i * size, _MM_HINT_T0);
      _mm_prefetch(next_g + i * size, _MM_HINT_T0);
#else
      (void)next_s, (void)next_g, (void)i;
#endif
    });
    if (p.newline && row % p.period == p.period - 1) emit_as(p, place + 1, p.newline, sums[2], [](int64_t) {});
  }
}

float total(const float* x, int64_t d, bool squares) {
  F16 sum = zero();
  if (x)
    lanes(
        d, ENGINE_LANES {
          const F16 v = loadn(x + i, n);
          sum = add(sum, squares ? mul(v, v) : v);
        });
  return reduce_add(sum);
}

template <bool kHalf> void fuse_rows(const GatedFuseParams& p, int64_t r, float* o, const float* sums) {
  if (!p.voxels)
    fuse_pair<kHalf, -1>(p, r, o, sums);
  else if (p.table_dtype == kBF16)
    fuse_pair<kHalf, kBF16>(p, r, o, sums);
  else
    fuse_pair<kHalf, kF32>(p, r, o, sums);
}

}  // namespace

void gated_fuse(const GatedFuseParams& p, Ctx& ctx) {
  float* o = reinterpret_cast<float*>(ctx.scratch);
  constexpr int64_t kRows = kPair * kPairs;
  const float sums[3] = {total(p.u1, p.d, false), total(p.u2, p.d, false), total(p.newline, p.d, true)};
  for (int64_t task; (task = claim(ctx)) < ceil_div(p.m, kRows);)
    for (int64_t r = task * kRows; r < imin(task * kRows + kRows, p.m); r += kPair)
      p.in_dtype == kBF16 ? fuse_rows<true>(p, r, o, sums) : fuse_rows<false>(p, r, o, sums);
#if ENGINE_ISA == ENGINE_ISA_AVX512
  _mm_sfence();  // the stores past the cache are ordered by nothing else
#endif
}

// gate_heads: attention over two keys, whose weights are one number per head
// layout   q, x, out row-major f32
// mapping  a task is four rows; u passes through L2 once per task
// moves    q, x and out once
// tried    -
void gate_heads(const GateHeadsParams& p, Ctx& ctx) {
  const int64_t hd = p.d / p.heads;
  float* gates = reinterpret_cast<float*>(ctx.scratch);  // [kHeadRows][heads]
  for (int64_t task; (task = claim(ctx)) < ceil_div(p.m, kHeadRows);) {
    const int64_t r0 = task * kHeadRows, rows = imin(kHeadRows, p.m - r0);
    for (int64_t r = 0; r < rows; ++r) {
      const float* q = p.q + (r0 + r) * p.ldq;
      F16 squares = zero();
      for (int64_t h = 0; h < p.heads; ++h) {
        F16 dot = zero();
        for (int64_t i = 0; i < hd; i += 16) {
          const F16 v = loadn(q + h * hd + i, hd - i);
          squares = fma(v, v, squares);
          dot = fma(v, loadn(p.dk + h * hd + i, hd - i), dot);
        }
        gates[r * p.heads + h] = reduce_add(dot);
      }
      const float scale = 1.f / sqrtf(reduce_add(squares) / float(p.d) + p.eps);
      for (int64_t h = 0; h < p.heads; h += 16) {
        const int64_t n = p.heads - h;
        float* to = gates + r * p.heads + h;
        storen(to, sigmoid(sub(mul(loadn(to, n), set1(scale)), set1(p.bias))), n);
      }
    }
    for (int64_t i = 0; i < p.d; i += 16) {
      const int64_t n = p.d - i;
      const F16 base = loadn(p.base + i, n);
      F16 sum[kHeadRows];
#pragma GCC unroll 4
      for (int r = 0; r < kHeadRows; ++r) sum[r] = add(loadn(p.x + imin(r0 + r, p.m - 1) * p.ldx + i, n), base);
      for (int64_t h = 0; h < p.heads; ++h) {
        const F16 u = loadn(p.u + h * p.d + i, n);
#pragma GCC unroll 4
        for (int r = 0; r < kHeadRows; ++r) sum[r] = fma(set1(gates[imin(r, rows - 1) * p.heads + h]), u, sum[r]);
      }
      for (int64_t r = 0; r < rows; ++r) storen(p.out + (r0 + r) * p.ldo + i, sum[r], n);
    }
  }
}

}  // namespace engine::cpu::ENGINE_NS
