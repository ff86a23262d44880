// Register tiles of the packed GEMM, shared by every room that multiplies with packed weights.
// what     c[MR][NP*16] = A tile (MR rows, packed) x NP weight panels (16 rows each), full K in registers
// layout   A tile: 32-bit units [K/per_unit][MR]; unit = 1 f32 | 2 bf16 | 4 s8; s8 tiles add scale[G][MR] f32 and
//          corr[G][MR] i32 = -zero_point * sum(codes). Panels: gemm.h.
// mapping  one thread per tile; 14x2 (f32, bf16), 12x1 (s8) tiles on AVX-512: 28 of 32 registers accumulate
// moves    64 B of weights per NP*16 rows and unit; A from L1/L2
// tried    README.md
#pragma once
#include "base/simd.h"
#include "ops/gemm/gemm.h"

namespace engine::cpu::ENGINE_NS {
namespace {

#if ENGINE_ISA == ENGINE_ISA_AVX512
constexpr int kMaxRowsFloat = 14, kMaxRowsInt = 12;
constexpr bool kNativeBf16 = true;
#elif ENGINE_ISA == ENGINE_ISA_AVX2
constexpr int kMaxRowsFloat = 6, kMaxRowsInt = 4;
constexpr bool kNativeBf16 = false;
#else
constexpr int kMaxRowsFloat = 4, kMaxRowsInt = 4;
constexpr bool kNativeBf16 = false;
#endif
constexpr int kMaxRows = kMaxRowsFloat > kMaxRowsInt ? kMaxRowsFloat : kMaxRowsInt;
constexpr int kMaxPanels = 4;
constexpr int kMaxTile = kMaxRows * kMaxPanels * 16;

ENGINE_INLINE int max_rows(int32_t format) { return format >= kW_I8 ? kMaxRowsInt : kMaxRowsFloat; }
ENGINE_INLINE bool is_int(int32_t format) { return format >= kW_I8; }
ENGINE_INLINE int64_t units_per_row(int32_t format, int64_t k) {
  return is_int(format) ? k / 4 : (format == kW_BF16 && kNativeBf16) ? (k + 1) / 2 : k;
}
// Bytes of a packed A tile of `mr` rows, a multiple of 64.
ENGINE_INLINE int64_t a_tile_bytes(int32_t format, int64_t mr, int64_t k, int64_t group) {
  const int64_t units = units_per_row(format, k) * mr * 4;
  return round_up(units + (is_int(format) ? (k / group) * mr * 8 : 0), 64);
}

// ------------------------------------------------------------------------------------------------ A packing
struct Units {    // one row in unit form, before it is woven into a tile
  uint32_t* u;    // [units_per_row]
  float* scale;   // [groups]
  int32_t* corr;  // [groups]
};

// src: f32 row of k values; may read nothing past k.
static void to_units(int32_t format, const float* src, int64_t k, int64_t group, Units out) {
  if (format == kW_F32) {
    memcpy(out.u, src, size_t(k) * 4);
  } else if (format == kW_BF16) {
    if (kNativeBf16) {
      uint16_t* d = reinterpret_cast<uint16_t*>(out.u);
      int64_t i = 0;
#if ENGINE_ISA == ENGINE_ISA_AVX512
      // Flushes subnormals, as the dot product does with its operands.
      for (; i + 32 <= k; i += 32)
        _mm512_storeu_si512(d + i, (__m512i)_mm512_cvtne2ps_pbh(load(src + i + 16).v, load(src + i).v));
#endif
      for (; i < k; i += 16) storen_bf16(d + i, loadn(src + i, k - i), k - i);
      if (k & 1) d[k] = 0;
    } else {
      float* d = reinterpret_cast<float*>(out.u);
      for (int64_t i = 0; i < k; ++i) d[i] = bf16_to_f32(f32_to_bf16(src[i]));
    }
  } else {
    const float zero_point = format == kW_I8 ? 128.f : 8.f;
    int8_t* d = reinterpret_cast<int8_t*>(out.u);
    for (int64_t g = 0; g * group < k; ++g) {
      const float* s = src + g * group;
      F16 m = zero();
      for (int64_t i = 0; i < group; i += 16) m = max(m, abs(load(s + i)));
      const float amax = reduce_max(m);
      const float scale = amax / 127.f;
      const F16 inv = set1(amax > 0 ? 127.f / amax : 0.f);
      F16 sum = zero();
      for (int64_t i = 0; i < group; i += 16) {
        const F16 q = round_even(mul(load(s + i), inv));
        sum = add(sum, q);
        store_i8(d + g * group + i, q);
      }
      out.scale[g] = scale;
      out.corr[g] = -int32_t(zero_point * reduce_add(sum));
    }
  }
}

#if ENGINE_ISA == ENGINE_ISA_AVX512
// Sixteen units of `mr` rows to d[u * mr + r]. Stores are sixteen lanes wide and ascending, so what one writes too much
// the next one covers; `edge` (the tile ends here) masks them.
static void weave16(const uint32_t* src, int64_t stride, int64_t mr, int64_t count, bool edge, uint32_t* d) {
  __m512i r[16], t[16];
  const __mmask16 columns = mask_of(count);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    r[i] = i < mr ? _mm512_maskz_loadu_epi32(columns, src + i * stride) : _mm512_setzero_si512();
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // r[i + j]: column 4 L + j of four rows in 128-bit lane L
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i even_lo = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    const __m512i even_hi = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    const __m512i odd_lo = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    const __m512i odd_hi = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(even_lo, even_hi, 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(odd_lo, odd_hi, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(even_lo, even_hi, 0xdd);
    t[12 + j] = _mm512_shuffle_i32x4(odd_lo, odd_hi, 0xdd);
  }
  if (edge) {
    for (int64_t u = 0; u < count; ++u) _mm512_mask_storeu_epi32(d + u * mr, mask_of(mr), t[u]);
  } else {
#pragma GCC unroll 16
    for (int u = 0; u < 16; ++u) _mm512_storeu_si512(d + u * mr, t[u]);
  }
}
#endif

// Weaves `mr` rows of units (row stride `stride` units; scales/corr row stride `gstride`) into one tile.
static void weave(int32_t format, int64_t k, int64_t group, int64_t mr, const Units rows, int64_t stride,
                  int64_t gstride, uint8_t* tile) {
  const int64_t nu = units_per_row(format, k);
  uint32_t* d = reinterpret_cast<uint32_t*>(tile);
#if ENGINE_ISA == ENGINE_ISA_AVX512
  // The block before the last may run over into the last; 32 units and more lie behind every other one.
  for (int64_t u = 0; u < nu; u += 16) weave16(rows.u + u, stride, mr, imin(16, nu - u), u + 32 > nu, d + u * mr);
#else
  for (int64_t u = 0; u < nu; ++u)
    for (int64_t r = 0; r < mr; ++r) d[u * mr + r] = rows.u[r * stride + u];
#endif
  if (is_int(format)) {
    const int64_t groups = k / group;
    float* sc = reinterpret_cast<float*>(d + nu * mr);
    int32_t* co = reinterpret_cast<int32_t*>(sc + groups * mr);
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t r = 0; r < mr; ++r) {
        sc[g * mr + r] = rows.scale[r * gstride + g];
        co[g * mr + r] = rows.corr[r * gstride + g];
      }
  }
}

// ------------------------------------------------------------------------------------------------ tiles
// What to prefetch while reading at `offset` of NP neighbouring panels: so far ahead in the same panel, and at its end
// the start of the panel that comes next in this stream.
constexpr int64_t kAhead = 1024;
template <int NP> ENGINE_INLINE int64_t prefetch_at(int64_t offset, int64_t panel) {
  const int64_t ahead = offset + kAhead;
  return ahead < panel ? ahead : ahead + (NP - 1) * panel;
}

using TileFn = void (*)(const uint8_t* a, const uint8_t* w, int64_t panel, int64_t k, int64_t group, float* c);

template <int MR, int NP>
static void tile_f32(const uint8_t* a8, const uint8_t* w, int64_t panel, int64_t k, int64_t, float* c) {
  const float* a = reinterpret_cast<const float*>(a8);
  const float* b[NP];
  F16 acc[MR][NP];
  for (int p = 0; p < NP; ++p) b[p] = reinterpret_cast<const float*>(w + p * panel);
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < NP; ++p) acc[r][p] = zero();
  for (int64_t i = 0; i < k; ++i) {
    F16 bv[NP];
    [[maybe_unused]] const int64_t ahead = prefetch_at<NP>(i * 64, panel);
#pragma GCC unroll 4
    for (int p = 0; p < NP; ++p) {
      bv[p] = load(b[p] + i * 16);
#if ENGINE_ISA != ENGINE_ISA_SCALAR
      if (MR <= 4) _mm_prefetch(reinterpret_cast<const char*>(b[p]) + ahead, _MM_HINT_T0);
#endif
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const F16 av = set1(a[i * MR + r]);
#pragma GCC unroll 4
      for (int p = 0; p < NP; ++p) acc[r][p] = fma(av, bv[p], acc[r][p]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < NP; ++p) store(c + (r * NP + p) * 16, acc[r][p]);
}

template <int MR, int NP>
static void tile_bf16(const uint8_t* a8, const uint8_t* w, int64_t panel, int64_t k, int64_t, float* c) {
  const uint8_t* b[NP];
  F16 acc[MR][NP];
  for (int p = 0; p < NP; ++p) b[p] = w + p * panel;
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < NP; ++p) acc[r][p] = zero();
  const int64_t pairs = (k + 1) / 2;
#if ENGINE_ISA == ENGINE_ISA_AVX512
  const int32_t* a = reinterpret_cast<const int32_t*>(a8);
  for (int64_t i = 0; i < pairs; ++i) {
    __m512bh bv[NP];
    const int64_t ahead = prefetch_at<NP>(i * 64, panel);
#pragma GCC unroll 4
    for (int p = 0; p < NP; ++p) {
      bv[p] = (__m512bh)_mm512_loadu_si512(b[p] + i * 64);
      if (MR <= 4) _mm_prefetch(reinterpret_cast<const char*>(b[p] + ahead), _MM_HINT_T0);
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const __m512bh av = (__m512bh)_mm512_set1_epi32(a[i * MR + r]);
#pragma GCC unroll 4
      for (int p = 0; p < NP; ++p) acc[r][p].v = _mm512_dpbf16_ps(acc[r][p].v, av, bv[p]);
    }
  }
#else
  // Pairs (k, k+1) of 16 rows sit in 32-bit lanes: even k by a shift, odd k by a mask. Activations are f32 units
  // already rounded to bf16, so all ISAs multiply the same numbers.
  const float* a = reinterpret_cast<const float*>(a8);
  for (int64_t i = 0; i < pairs; ++i) {
    const bool odd_ok = 2 * i + 1 < k;
    for (int p = 0; p < NP; ++p) {
      F16 even, odd;
#if ENGINE_ISA == ENGINE_ISA_AVX2
      const __m256i lo = _mm256_loadu_si256((const __m256i*)(b[p] + i * 64));
      const __m256i hi = _mm256_loadu_si256((const __m256i*)(b[p] + i * 64 + 32));
      const __m256i mask = _mm256_set1_epi32(int(0xffff0000u));
      even = {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
      odd = {_mm256_castsi256_ps(_mm256_and_si256(lo, mask)), _mm256_castsi256_ps(_mm256_and_si256(hi, mask))};
#else
      const uint16_t* q = reinterpret_cast<const uint16_t*>(b[p] + i * 64);
      for (int j = 0; j < 16; ++j) {
        even.v[j] = bf16_to_f32(q[2 * j]);
        odd.v[j] = bf16_to_f32(q[2 * j + 1]);
      }
#endif
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        acc[r][p] = fma(set1(a[2 * i * MR + r]), even, acc[r][p]);
        if (odd_ok) acc[r][p] = fma(set1(a[(2 * i + 1) * MR + r]), odd, acc[r][p]);
      }
    }
  }
#endif
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < NP; ++p) store(c + (r * NP + p) * 16, acc[r][p]);
}

// Sixteen int32 lanes: the dot product of 4 u8 codes with 4 s8 activations per lane, exact.
#if ENGINE_ISA == ENGINE_ISA_AVX512
struct I16 {
  __m512i v;
};
using Codes = __m512i;
ENGINE_INLINE I16 set1_i32(int32_t x) {
  __m512i v = _mm512_set1_epi32(x);
  // Equal start values must not be merged into one register: gcc then copies every accumulator in every iteration.
  asm("" : "+v"(v));
  return {v};
}
ENGINE_INLINE Codes load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
ENGINE_INLINE Codes low_nibbles(Codes c) { return _mm512_and_si512(c, _mm512_set1_epi8(15)); }
ENGINE_INLINE Codes high_nibbles(Codes c) { return _mm512_and_si512(_mm512_srli_epi16(c, 4), _mm512_set1_epi8(15)); }
// Sixteen times the high nibbles: one instruction less per vector, one shift per group (the sums are exact).
ENGINE_INLINE Codes high_nibbles_x16(Codes c) { return _mm512_and_si512(c, _mm512_set1_epi8(char(0xf0))); }
ENGINE_INLINE I16 add_sixteenth(I16 a, I16 b) { return {_mm512_add_epi32(a.v, _mm512_srai_epi32(b.v, 4))}; }
template <bool kFourBit> ENGINE_INLINE I16 dot(I16 acc, Codes u, int32_t s) {
  return {_mm512_dpbusd_epi32(acc.v, u, _mm512_set1_epi32(s))};
}
ENGINE_INLINE F16 to_f32(I16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
#elif ENGINE_ISA == ENGINE_ISA_AVX2
struct I16 {
  __m256i lo, hi;
};
struct Codes {
  __m256i lo, hi;
};
ENGINE_INLINE I16 set1_i32(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
ENGINE_INLINE Codes load_codes(const uint8_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
ENGINE_INLINE Codes low_nibbles(Codes c) {
  const __m256i m = _mm256_set1_epi8(15);
  return {_mm256_and_si256(c.lo, m), _mm256_and_si256(c.hi, m)};
}
ENGINE_INLINE Codes high_nibbles(Codes c) {
  const __m256i m = _mm256_set1_epi8(15);
  return {_mm256_and_si256(_mm256_srli_epi16(c.lo, 4), m), _mm256_and_si256(_mm256_srli_epi16(c.hi, 4), m)};
}
// maddubs saturates at 16 bits: split an 8-bit code into its low 7 bits and its top bit. 4-bit codes cannot saturate.
template <bool kFourBit> ENGINE_INLINE __m256i dot8(__m256i acc, __m256i u, __m256i s) {
  const __m256i ones = _mm256_set1_epi16(1);
  if (kFourBit) return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), ones));
  const __m256i low = _mm256_and_si256(u, _mm256_set1_epi8(127));
  const __m256i top = _mm256_and_si256(_mm256_srli_epi16(u, 7), _mm256_set1_epi8(1));
  acc = _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(low, s), ones));
  return _mm256_add_epi32(acc, _mm256_slli_epi32(_mm256_madd_epi16(_mm256_maddubs_epi16(top, s), ones), 7));
}
template <bool kFourBit> ENGINE_INLINE I16 dot(I16 acc, Codes u, int32_t s) {
  const __m256i b = _mm256_set1_epi32(s);
  return {dot8<kFourBit>(acc.lo, u.lo, b), dot8<kFourBit>(acc.hi, u.hi, b)};
}
ENGINE_INLINE F16 to_f32(I16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
#else
struct I16 {
  int32_t v[16];
};
struct Codes {
  uint8_t v[64];
};
ENGINE_INLINE I16 set1_i32(int32_t x) {
  I16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = x;
  return r;
}
ENGINE_INLINE Codes load_codes(const uint8_t* p) {
  Codes c;
  memcpy(c.v, p, 64);
  return c;
}
ENGINE_INLINE Codes low_nibbles(Codes c) {
  for (int i = 0; i < 64; ++i) c.v[i] &= 15;
  return c;
}
ENGINE_INLINE Codes high_nibbles(Codes c) {
  for (int i = 0; i < 64; ++i) c.v[i] >>= 4;
  return c;
}
template <bool kFourBit> ENGINE_INLINE I16 dot(I16 acc, Codes u, int32_t s) {
  int8_t q[4];
  memcpy(q, &s, 4);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 4; ++j) acc.v[i] += int32_t(u.v[4 * i + j]) * q[j];
  return acc;
}
ENGINE_INLINE F16 to_f32(I16 a) {
  F16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = float(a.v[i]);
  return r;
}
#endif

template <int MR, int NP, bool kFourBit>
static void tile_int(const uint8_t* a8, const uint8_t* w, int64_t panel, int64_t k, int64_t group, float* c) {
  const int32_t* a = reinterpret_cast<const int32_t*>(a8);
  const int64_t groups = k / group;
  const float* a_scale = reinterpret_cast<const float*>(a + (k / 4) * MR);
  const int32_t* a_corr = reinterpret_cast<const int32_t*>(a_scale + groups * MR);
  const int64_t code_bytes = (kFourBit ? 8 : 16) * group;
  const uint8_t* b[NP];
  F16 acc[MR][NP];
  for (int p = 0; p < NP; ++p) b[p] = w + p * panel;
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < NP; ++p) acc[r][p] = zero();
  constexpr int kUnits = kFourBit ? 2 : 1;                            // units per 64-byte vector of codes
  [[maybe_unused]] constexpr bool kSplit = kFourBit && MR * NP <= 8;  // registers for a second set of sums
  for (int64_t g = 0; g < groups; ++g) {
    I16 sum[MR][NP];
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int p = 0; p < NP; ++p) sum[r][p] = set1_i32(a_corr[g * MR + r]);
#if ENGINE_ISA == ENGINE_ISA_AVX512
    I16 high[kSplit ? MR : 1][NP];
    if (kSplit)
      for (int r = 0; r < MR; ++r)
        for (int p = 0; p < NP; ++p) high[r][p] = set1_i32(0);
#endif
    const int64_t first = gemm_codes_at(g, code_bytes);
    for (int64_t offset = first; offset < first + code_bytes; offset += 64, a += kUnits * MR) {
      [[maybe_unused]] const int64_t ahead = prefetch_at<NP>(offset, panel);
#pragma GCC unroll 4
      for (int p = 0; p < NP; ++p) {
        const Codes v = load_codes(b[p] + offset);
#if ENGINE_ISA != ENGINE_ISA_SCALAR
        if (MR <= 4) _mm_prefetch(reinterpret_cast<const char*>(b[p] + ahead), _MM_HINT_T0);
#endif
        if (kFourBit) {
          const Codes lo = low_nibbles(v);
#pragma GCC unroll 16
          for (int r = 0; r < MR; ++r) sum[r][p] = dot<true>(sum[r][p], lo, a[r]);
#if ENGINE_ISA == ENGINE_ISA_AVX512
          if (kSplit) {
            const Codes hi = high_nibbles_x16(v);
#pragma GCC unroll 16
            for (int r = 0; r < MR; ++r) high[r][p] = dot<true>(high[r][p], hi, a[MR + r]);
            continue;
          }
#endif
          const Codes hi = high_nibbles(v);
#pragma GCC unroll 16
          for (int r = 0; r < MR; ++r) sum[r][p] = dot<true>(sum[r][p], hi, a[MR + r]);
        } else {
#pragma GCC unroll 16
          for (int r = 0; r < MR; ++r) sum[r][p] = dot<false>(sum[r][p], v, a[r]);
        }
      }
    }
#if ENGINE_ISA == ENGINE_ISA_AVX512
    if (kSplit)
      for (int r = 0; r < MR; ++r)
        for (int p = 0; p < NP; ++p) sum[r][p] = add_sixteenth(sum[r][p], high[r][p]);
#endif
    const int64_t scales = gemm_scales_at(g, groups, code_bytes);
#pragma GCC unroll 4
    for (int p = 0; p < NP; ++p) {
      const F16 ws = load_f16(reinterpret_cast<const uint16_t*>(b[p] + scales));
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) acc[r][p] = fma(to_f32(sum[r][p]), mul(ws, set1(a_scale[g * MR + r])), acc[r][p]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < NP; ++p) store(c + (r * NP + p) * 16, acc[r][p]);
}

// ------------------------------------------------------------------------------------------------ one row
// A single row is bound by memory: one panel at a time, so that each thread reads one ascending stream, and four
// accumulators over K to hide latency.
static void row_f32(const uint8_t* a8, const uint8_t* w, int64_t, int64_t k, int64_t, float* c) {
  const float* a = reinterpret_cast<const float*>(a8);
  const float* b = reinterpret_cast<const float*>(w);
  F16 s[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 <= k; i += 4)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) s[j] = fma(set1(a[i + j]), load(b + (i + j) * 16), s[j]);
  for (; i < k; ++i) s[0] = fma(set1(a[i]), load(b + i * 16), s[0]);
  store(c, add(add(s[0], s[1]), add(s[2], s[3])));
}

#if ENGINE_ISA == ENGINE_ISA_AVX512
static void row_bf16(const uint8_t* a8, const uint8_t* w, int64_t, int64_t k, int64_t, float* c) {
  const int32_t* a = reinterpret_cast<const int32_t*>(a8);
  const int64_t pairs = (k + 1) / 2;
  F16 s[4] = {zero(), zero(), zero(), zero()};
  const auto step = [&](int j, int64_t i) {
    s[j].v = _mm512_dpbf16_ps(s[j].v, (__m512bh)_mm512_set1_epi32(a[i]), (__m512bh)_mm512_loadu_si512(w + i * 64));
  };
  int64_t i = 0;
  for (; i + 4 <= pairs; i += 4)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) step(j, i + j);
  for (; i < pairs; ++i) step(0, i);
  store(c, add(add(s[0], s[1]), add(s[2], s[3])));
}

template <bool kFourBit>
static void row_int(const uint8_t* a8, const uint8_t* w, int64_t, int64_t k, int64_t group, float* c) {
  const int32_t* a = reinterpret_cast<const int32_t*>(a8);
  const int64_t groups = k / group, code_bytes = (kFourBit ? 8 : 16) * group;
  const float* a_scale = reinterpret_cast<const float*>(a + k / 4);
  const int32_t* a_corr = reinterpret_cast<const int32_t*>(a_scale + groups);
  F16 acc = zero();
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* b = w + gemm_codes_at(g, code_bytes);
    I16 s[4] = {set1_i32(a_corr[g]), set1_i32(0), set1_i32(0), set1_i32(0)};
    // Groups are 32 or 64: a multiple of two 4-bit vectors, of four 8-bit vectors.
    if (kFourBit) {
      for (int64_t v = 0; v < code_bytes; v += 128, a += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          const Codes u = load_codes(b + v + j * 64);
          // Two thirds of the instructions here are arithmetic: the hardware looks ahead too little.
          _mm_prefetch(reinterpret_cast<const char*>(b + v + j * 64 + 2048), _MM_HINT_T0);
          s[j] = dot<true>(s[j], low_nibbles(u), a[2 * j]);
          s[2 + j] = dot<true>(s[2 + j], high_nibbles_x16(u), a[2 * j + 1]);
        }
      s[0] = add_sixteenth({_mm512_add_epi32(s[0].v, s[1].v)}, {_mm512_add_epi32(s[2].v, s[3].v)});
    } else {
      for (int64_t v = 0; v < code_bytes; v += 256, a += 4)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) s[j] = dot<false>(s[j], load_codes(b + v + j * 64), a[j]);
      s[0].v = _mm512_add_epi32(_mm512_add_epi32(s[0].v, s[1].v), _mm512_add_epi32(s[2].v, s[3].v));
    }
    const F16 ws = load_f16(reinterpret_cast<const uint16_t*>(w + gemm_scales_at(g, groups, code_bytes)));
    acc = fma(to_f32(s[0]), mul(ws, set1(a_scale[g])), acc);
  }
  store(c, acc);
}
#endif

// Panels that one tile call covers for tiles of mr rows.
ENGINE_INLINE int panels_for([[maybe_unused]] int32_t format, int64_t mr) {
#if ENGINE_ISA == ENGINE_ISA_AVX512
  if (mr == 1) return 1;
  if (is_int(format)) return mr == 2 ? 4 : mr <= 4 ? 2 : 1;
  return mr <= 6 ? 4 : 2;
#else
  return mr == 2 ? 2 : 1;
#endif
}

template <int MR, int NP> ENGINE_INLINE TileFn pick(int32_t format) {
  switch (format) {
    case kW_F32: return tile_f32<MR, NP>;
    case kW_BF16: return tile_bf16<MR, NP>;
    case kW_I8: return MR <= kMaxRowsInt ? tile_int<(MR <= kMaxRowsInt ? MR : 1), NP, false> : nullptr;
    default: return MR <= kMaxRowsInt ? tile_int<(MR <= kMaxRowsInt ? MR : 1), NP, true> : nullptr;
  }
}

// np: 1, 2 or 4, at most panels_for(format, mr).
static TileFn tile_fn(int32_t format, int64_t mr, int np) {
  if (mr == 1 && format == kW_F32) return row_f32;
#if ENGINE_ISA == ENGINE_ISA_AVX512
  if (mr == 1) return format == kW_BF16 ? row_bf16 : format == kW_I8 ? row_int<false> : row_int<true>;
#endif
#define ENGINE_TILE_ROW(MR)                                               \
  case MR:                                                                \
    if (np == 4) return pick<MR, (MR <= 6 ? 4 : 1)>(format);              \
    if (np == 2) return pick<MR, 2>(format);                              \
    return pick<MR, 1>(format);
  switch (mr) {
    ENGINE_TILE_ROW(1)
    ENGINE_TILE_ROW(2)
    ENGINE_TILE_ROW(3)
    ENGINE_TILE_ROW(4)
#if ENGINE_ISA != ENGINE_ISA_SCALAR
    ENGINE_TILE_ROW(5)
    ENGINE_TILE_ROW(6)
#endif
#if ENGINE_ISA == ENGINE_ISA_AVX512
    ENGINE_TILE_ROW(7)
    ENGINE_TILE_ROW(8)
    ENGINE_TILE_ROW(9)
    ENGINE_TILE_ROW(10)
    ENGINE_TILE_ROW(11)
    ENGINE_TILE_ROW(12)
    ENGINE_TILE_ROW(13)
    ENGINE_TILE_ROW(14)
#endif
  }
#undef ENGINE_TILE_ROW
  return nullptr;
}

// Many rows: the weights of a task stay in L2 while the tiles pass, and each output row is written in long pieces.
constexpr int64_t kHotBytes = 512 << 10;
ENGINE_INLINE int64_t hot_panels(int64_t panel_bytes) { return imax(kHotBytes / panel_bytes, 1); }

// Panels per task, a multiple of `step`: the largest number in [most/4, most] that lets `n` equal threads finish first.
// Sums do not depend on it, only time does.
ENGINE_INLINE int64_t pick_chunk(int64_t panels, int64_t n, int64_t most, int64_t step) {
  most = round_up(imax(most, 1), step);
  int64_t best = most, best_span = INT64_MAX;
  for (int64_t c = most; c >= step && c * 4 >= most; c -= step) {
    const int64_t span = ceil_div(ceil_div(panels, c), n) * c;
    if (span < best_span) {
      best_span = span;
      best = c;
    }
  }
  return best;
}

// Runs one A tile against panels [p0, p1): fn(p, np, c) receives each finished block, c [mr][np*16].
template <class Emit> ENGINE_INLINE void run_panels(int32_t format, int64_t mr, const uint8_t* a, const uint8_t* w,
                                                    int64_t panel_bytes, int64_t p0, int64_t p1, int64_t k,
                                                    int64_t group, Emit&& emit) {
  alignas(64) float c[kMaxTile];
  int np = panels_for(format, mr);
  for (int64_t p = p0; p < p1; p += np) {
    while (p + np > p1) np >>= 1;
    tile_fn(format, mr, np)(a, w + p * panel_bytes, panel_bytes, k, group, c);
    emit(p, np, static_cast<const float*>(c));
  }
}

// Even split of M rows into tiles of at most max_rows: sizes differ by one at most, no thin last tile.
struct Tiles {
  int64_t count, base, extra;
  int64_t rows(int64_t i) const { return base + (i < extra); }
  int64_t first(int64_t i) const { return i * base + imin(i, extra); }
};
ENGINE_INLINE Tiles split_rows(int64_t m, int64_t max_rows) {
  const int64_t count = ceil_div(m, max_rows);
  return {count, m / count, m % count};
}

// ------------------------------------------------------------------------------------------------ prologues
// A span of f32 or bf16 values, or nothing.
struct Span {
  const void* data = nullptr;
  int32_t dtype = kF32;
  explicit operator bool() const { return data != nullptr; }
  F16 at(int64_t i, int64_t n) const {
    return dtype == kBF16 ? loadn_bf16(static_cast<const uint16_t*>(data) + i, n)
                          : loadn(static_cast<const float*>(data) + i, n);
  }
};
ENGINE_INLINE Span span_at(const void* table, int32_t dtype, int64_t element) {
  return {static_cast<const char*>(table) + element * (dtype == kBF16 ? 2 : 4), dtype};
}

struct RowNorm {
  int32_t kind;    // kProRmsNorm | kProLayerNorm
  const float* w;  // may be null, as all that follow
  const float* b;
  Span scale, shift;  // * (1 + scale) + shift
  float eps;
};

// Normalises one row of k values into dst, which may be x.
static void norm_row(const RowNorm& norm, const float* x, int64_t k, float* dst) {
  F16 mean = zero();
  if (norm.kind == kProLayerNorm) {
    for (int64_t i = 0; i < k; i += 16) mean = add(mean, loadn(x + i, k - i));
    mean = set1(reduce_add(mean) / float(k));
  }
  F16 s = zero();
  const int64_t whole = k / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) {
    const F16 v = sub(load(x + i), mean);
    s = fma(v, v, s);
  }
  float total = reduce_add(s);
  float centre[16];
  store(centre, mean);
  for (int64_t i = whole; i < k; ++i) total += (x[i] - centre[0]) * (x[i] - centre[0]);
  const F16 r = set1(1.f / sqrtf(total / float(k) + norm.eps)), one = set1(1.f);
  for (int64_t i = 0; i < k; i += 16) {
    const int64_t n = k - i;
    F16 v = mul(sub(loadn(x + i, n), mean), r);
    if (norm.w) v = mul(v, loadn(norm.w + i, n));
    if (norm.b) v = add(v, loadn(norm.b + i, n));
    if (norm.scale) v = mul(v, add(one, norm.scale.at(i, n)));
    if (norm.shift) v = add(v, norm.shift.at(i, n));
    storen(dst + i, v, n);
  }
}

static void rms_norm_row(const float* x, const float* w, int64_t k, float eps, float* dst) {
  norm_row({kProRmsNorm, w, nullptr, {}, {}, eps}, x, k, dst);
}

static void glu_row(const float* x, const float* z, int64_t k, int32_t act, float* dst) {
  for (int64_t i = 0; i < k; i += 16)
    storen(dst + i, mul(activate(loadn(x + i, k - i), act), loadn(z + i, k - i)), k - i);
}

static void gated_group_norm_row(const float* x, const float* z, const float* w, int64_t k, int64_t gs, float eps,
                                 float* dst) {
  for (int64_t g = 0; g < k; g += gs) {
    F16 s = zero();
    for (int64_t i = g; i < g + gs; i += 16) {
      const int64_t n = g + gs - i;
      const F16 v = mul(loadn(x + i, n), silu(loadn(z + i, n)));
      s = fma(v, v, s);
      storen(dst + i, v, n);
    }
    const F16 r = set1(1.f / sqrtf(reduce_add(s) / float(gs) + eps));
    for (int64_t i = g; i < g + gs; i += 16) {
      const int64_t n = g + gs - i;
      storen(dst + i, mul(mul(loadn(dst + i, n), r), loadn(w + i, n)), n);
    }
  }
}

}  // namespace
}  // namespace engine::cpu::ENGINE_NS
