// One vector vocabulary for three instruction sets: F16 is sixteen fp32 lanes (one zmm, two ymm, or an array).
// Included only by *_cpu.cpp files, which are compiled once per ISA with ENGINE_ISA set. Everything here sits in an
// ISA namespace and is force-inlined or static, so that no object can hand a wide instruction to a narrow host.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "base/dtype.h"
#include "base/pool.h"

#define ENGINE_ISA_SCALAR 0
#define ENGINE_ISA_AVX2 1
#define ENGINE_ISA_AVX512 2

#if ENGINE_ISA == ENGINE_ISA_AVX512
#define ENGINE_NS avx512
#elif ENGINE_ISA == ENGINE_ISA_AVX2
#define ENGINE_NS avx2
#else
#define ENGINE_NS scalar
#endif

#if ENGINE_ISA != ENGINE_ISA_SCALAR
#include <immintrin.h>
#endif

#define ENGINE_INLINE static inline __attribute__((always_inline))

namespace engine::cpu::ENGINE_NS {
namespace {

constexpr int kLanes = 16;

ENGINE_INLINE int64_t imin(int64_t a, int64_t b) { return a < b ? a : b; }
ENGINE_INLINE int64_t imax(int64_t a, int64_t b) { return a > b ? a : b; }
ENGINE_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
ENGINE_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

ENGINE_INLINE float bits_to_f32(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
ENGINE_INLINE uint32_t f32_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
ENGINE_INLINE float bf16_to_f32(uint16_t h) { return bits_to_f32(uint32_t(h) << 16); }
// Round to nearest even; NaN stays NaN.
ENGINE_INLINE uint16_t f32_to_bf16(float f) {
  uint32_t u = f32_to_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 0x40);
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
ENGINE_INLINE float f16_to_f32(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16;
  const uint32_t e = (h >> 10) & 31, m = h & 1023;
  if (e == 0) return bits_to_f32(sign | f32_to_bits(float(m) * 5.9604644775390625e-8f));
  if (e == 31) return bits_to_f32(sign | 0x7f800000u | (m << 13));
  return bits_to_f32(sign | ((e + 112) << 23) | (m << 13));
}
// Round to nearest even, saturating to infinity.
ENGINE_INLINE uint16_t f32_to_f16(float f) {
  const uint32_t u = f32_to_bits(f), sign = (u >> 16) & 0x8000, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return uint16_t(sign | 0x7e00);
  if (a >= 0x477ff000u) return uint16_t(sign | 0x7c00);
  if (a < 0x38800000u) {  // subnormal half: let the fp32 adder round
    const float t = bits_to_f32(a) + 0.5f;
    return uint16_t(sign | (f32_to_bits(t) - 0x3f000000u));
  }
  return uint16_t(sign | ((a - 0x38000000u + 0xfffu + ((a >> 13) & 1)) >> 13));
}

// ---------------------------------------------------------------------------------------------- sixteen fp32 lanes
#if ENGINE_ISA == ENGINE_ISA_AVX512

struct F16 {
  __m512 v;
};
ENGINE_INLINE F16 zero() { return {_mm512_setzero_ps()}; }
ENGINE_INLINE F16 set1(float x) { return {_mm512_set1_ps(x)}; }
ENGINE_INLINE F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
ENGINE_INLINE void store(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
ENGINE_INLINE __mmask16 mask_of(int64_t n) { return n >= 16 ? __mmask16(0xffff) : __mmask16((1u << n) - 1); }
ENGINE_INLINE F16 loadn(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(mask_of(n), p)}; }
ENGINE_INLINE void storen(float* p, F16 a, int64_t n) { _mm512_mask_storeu_ps(p, mask_of(n), a.v); }
ENGINE_INLINE F16 widen_bf16(__m256i h) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
ENGINE_INLINE F16 load_bf16(const uint16_t* p) { return widen_bf16(_mm256_loadu_si256((const __m256i*)p)); }
ENGINE_INLINE F16 loadn_bf16(const uint16_t* p, int64_t n) {
  return widen_bf16(_mm256_maskz_loadu_epi16(mask_of(n), p));
}
ENGINE_INLINE __m256i narrow_bf16(F16 a) {
  // Integer rounding keeps subnormals, which vcvtneps2bf16 flushes: the same bits on every ISA.
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i q = _mm512_or_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(r, nan, q));
}
ENGINE_INLINE void store_bf16(uint16_t* p, F16 a) { _mm256_storeu_si256((__m256i*)p, narrow_bf16(a)); }
ENGINE_INLINE void storen_bf16(uint16_t* p, F16 a, int64_t n) {
  _mm256_mask_storeu_epi16(p, mask_of(n), narrow_bf16(a));
}
ENGINE_INLINE F16 load_f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
ENGINE_INLINE F16 add(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
ENGINE_INLINE F16 sub(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
ENGINE_INLINE F16 mul(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
ENGINE_INLINE F16 div(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
ENGINE_INLINE F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
ENGINE_INLINE F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
ENGINE_INLINE F16 min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
ENGINE_INLINE F16 abs(F16 a) { return {_mm512_abs_ps(a.v)}; }
ENGINE_INLINE F16 round_even(F16 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT)}; }
ENGINE_INLINE F16 pow2i(F16 n) { return {_mm512_scalef_ps(_mm512_set1_ps(1.f), n.v)}; }
ENGINE_INLINE float reduce_add(F16 a) { return _mm512_reduce_add_ps(a.v); }
ENGINE_INLINE float reduce_max(F16 a) { return _mm512_reduce_max_ps(a.v); }
ENGINE_INLINE void store_i8(int8_t* p, F16 a) {  // a holds integers in [-128, 127]
  _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

#elif ENGINE_ISA == ENGINE_ISA_AVX2

struct F16 {
  __m256 lo, hi;
};
ENGINE_INLINE F16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
ENGINE_INLINE F16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
ENGINE_INLINE F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
ENGINE_INLINE void store(float* p, F16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
ENGINE_INLINE F16 loadn(const float* p, int64_t n) {
  if (n >= 16) return load(p);
  float t[16] = {};
  for (int64_t i = 0; i < n; ++i) t[i] = p[i];
  return load(t);
}
ENGINE_INLINE void storen(float* p, F16 a, int64_t n) {
  if (n >= 16) return store(p, a);
  float t[16];
  store(t, a);
  for (int64_t i = 0; i < n; ++i) p[i] = t[i];
}
ENGINE_INLINE __m256 widen8(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
ENGINE_INLINE F16 load_bf16(const uint16_t* p) {
  return {widen8(_mm_loadu_si128((const __m128i*)p)), widen8(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
ENGINE_INLINE F16 loadn_bf16(const uint16_t* p, int64_t n) {
  if (n >= 16) return load_bf16(p);
  uint16_t t[16] = {};
  for (int64_t i = 0; i < n; ++i) t[i] = p[i];
  return load_bf16(t);
}
ENGINE_INLINE __m256i narrow8(__m256 a) {
  const __m256i u = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i q = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  return _mm256_blendv_epi8(r, q, _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
}
ENGINE_INLINE void store_bf16(uint16_t* p, F16 a) {
  const __m256i packed = _mm256_packus_epi32(narrow8(a.lo), narrow8(a.hi));
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
}
ENGINE_INLINE void storen_bf16(uint16_t* p, F16 a, int64_t n) {
  if (n >= 16) return store_bf16(p, a);
  uint16_t t[16];
  store_bf16(t, a);
  for (int64_t i = 0; i < n; ++i) p[i] = t[i];
}
ENGINE_INLINE F16 load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
#define ENGINE_F16_BIN(name, op) \
  ENGINE_INLINE F16 name(F16 a, F16 b) { return {op(a.lo, b.lo), op(a.hi, b.hi)}; }
ENGINE_F16_BIN(add, _mm256_add_ps)
ENGINE_F16_BIN(sub, _mm256_sub_ps)
ENGINE_F16_BIN(mul, _mm256_mul_ps)
ENGINE_F16_BIN(div, _mm256_div_ps)
ENGINE_F16_BIN(max, _mm256_max_ps)
ENGINE_F16_BIN(min, _mm256_min_ps)
#undef ENGINE_F16_BIN
ENGINE_INLINE F16 fma(F16 a, F16 b, F16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
ENGINE_INLINE F16 abs(F16 a) {
  const __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(a.lo, m), _mm256_and_ps(a.hi, m)};
}
ENGINE_INLINE F16 round_even(F16 a) {
  return {_mm256_round_ps(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
ENGINE_INLINE __m256 pow2i8(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
ENGINE_INLINE F16 pow2i(F16 n) { return {pow2i8(n.lo), pow2i8(n.hi)}; }
ENGINE_INLINE float reduce_add(F16 a) {
  const __m256 s = _mm256_add_ps(a.lo, a.hi);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
ENGINE_INLINE float reduce_max(F16 a) {
  const __m256 s = _mm256_max_ps(a.lo, a.hi);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
ENGINE_INLINE void store_i8(int8_t* p, F16 a) {
  const __m256i w =
      _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)), 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
}

#else

struct F16 {
  float v[16];
};
#define ENGINE_EACH(expr)              \
  F16 r;                               \
  for (int i = 0; i < 16; ++i) r.v[i] = (expr); \
  return r
ENGINE_INLINE F16 zero() { ENGINE_EACH(0.f); }
ENGINE_INLINE F16 set1(float x) { ENGINE_EACH(x); }
ENGINE_INLINE F16 load(const float* p) { ENGINE_EACH(p[i]); }
ENGINE_INLINE void store(float* p, F16 a) { memcpy(p, a.v, 64); }
ENGINE_INLINE F16 loadn(const float* p, int64_t n) { ENGINE_EACH(i < n ? p[i] : 0.f); }
ENGINE_INLINE void storen(float* p, F16 a, int64_t n) {
  for (int i = 0; i < 16 && i < n; ++i) p[i] = a.v[i];
}
ENGINE_INLINE F16 load_bf16(const uint16_t* p) { ENGINE_EACH(bf16_to_f32(p[i])); }
ENGINE_INLINE F16 loadn_bf16(const uint16_t* p, int64_t n) { ENGINE_EACH(i < n ? bf16_to_f32(p[i]) : 0.f); }
ENGINE_INLINE void storen_bf16(uint16_t* p, F16 a, int64_t n) {
  for (int i = 0; i < 16 && i < n; ++i) p[i] = f32_to_bf16(a.v[i]);
}
ENGINE_INLINE void store_bf16(uint16_t* p, F16 a) { storen_bf16(p, a, 16); }
ENGINE_INLINE F16 load_f16(const uint16_t* p) { ENGINE_EACH(f16_to_f32(p[i])); }
ENGINE_INLINE F16 add(F16 a, F16 b) { ENGINE_EACH(a.v[i] + b.v[i]); }
ENGINE_INLINE F16 sub(F16 a, F16 b) { ENGINE_EACH(a.v[i] - b.v[i]); }
ENGINE_INLINE F16 mul(F16 a, F16 b) { ENGINE_EACH(a.v[i] * b.v[i]); }
ENGINE_INLINE F16 div(F16 a, F16 b) { ENGINE_EACH(a.v[i] / b.v[i]); }
ENGINE_INLINE F16 fma(F16 a, F16 b, F16 c) { ENGINE_EACH(a.v[i] * b.v[i] + c.v[i]); }
ENGINE_INLINE F16 max(F16 a, F16 b) { ENGINE_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
ENGINE_INLINE F16 min(F16 a, F16 b) { ENGINE_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
ENGINE_INLINE F16 abs(F16 a) { ENGINE_EACH(a.v[i] < 0 ? -a.v[i] : a.v[i]); }
ENGINE_INLINE F16 round_even(F16 a) { ENGINE_EACH(nearbyintf(a.v[i])); }
ENGINE_INLINE F16 pow2i(F16 n) { ENGINE_EACH(bits_to_f32(uint32_t(int32_t(n.v[i]) + 127) << 23)); }
#undef ENGINE_EACH
ENGINE_INLINE float reduce_add(F16 a) {
  for (int s = 8; s; s >>= 1)
    for (int i = 0; i < s; ++i) a.v[i] += a.v[i + s];
  return a.v[0];
}
ENGINE_INLINE float reduce_max(F16 a) {
  for (int i = 1; i < 16; ++i) a.v[0] = a.v[i] > a.v[0] ? a.v[i] : a.v[0];
  return a.v[0];
}
ENGINE_INLINE void store_i8(int8_t* p, F16 a) {
  for (int i = 0; i < 16; ++i) p[i] = int8_t(a.v[i]);
}

#endif

// The first n lanes, zero behind them; 0 < n <= 16.
ENGINE_INLINE F16 first_lanes(F16 a, int64_t n) {
#if ENGINE_ISA == ENGINE_ISA_AVX512
  return {_mm512_maskz_mov_ps(mask_of(n), a.v)};
#else
  float t[16];
  store(t, a);
  return loadn(t, n);
#endif
}

// Sixteen pairs of bf16: a in the low halves, b in the high ones.
ENGINE_INLINE void store_bf16_pairs(void* p, F16 a, F16 b) {
#if ENGINE_ISA == ENGINE_ISA_AVX512
  const __m512i low = _mm512_cvtepu16_epi32(narrow_bf16(a)), high = _mm512_cvtepu16_epi32(narrow_bf16(b));
  _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#else
  uint16_t low[16], high[16], *out = static_cast<uint16_t*>(p);
  store_bf16(low, a);
  store_bf16(high, b);
  for (int i = 0; i < 16; ++i) {
    out[2 * i] = low[i];
    out[2 * i + 1] = high[i];
  }
#endif
}

// exp(x): 2^n * p(r) with a degree-6 polynomial, relative error < 2e-7 on [-87, 88]; below -87 gives about 1e-38.
ENGINE_INLINE F16 exp(F16 x) {
  x = min(max(x, set1(-87.f)), set1(88.f));
  const F16 n = round_even(mul(x, set1(1.44269504088896341f)));
  F16 r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  F16 p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  return mul(pow2i(n), add(fma(mul(r, r), p, r), set1(1.f)));
}
ENGINE_INLINE F16 neg(F16 a) { return sub(zero(), a); }
// 1 / x of a normal x, to an ulp or two: a division takes as long as the rest of an activation.
ENGINE_INLINE F16 reciprocal(F16 x) {
#if ENGINE_ISA == ENGINE_ISA_AVX512
  const F16 r = {_mm512_rcp14_ps(x.v)};
  return mul(r, sub(set1(2.f), mul(x, r)));
#else
  return div(set1(1.f), x);
#endif
}
ENGINE_INLINE F16 sigmoid(F16 x) { return reciprocal(add(set1(1.f), exp(neg(x)))); }
ENGINE_INLINE F16 silu(F16 x) { return mul(x, sigmoid(x)); }
ENGINE_INLINE F16 tanh(F16 x) { return sub(set1(1.f), mul(set1(2.f), sigmoid(neg(add(x, x))))); }

// erf(x), x >= 0, by a rational Chebyshev fit through exp (Numerical Recipes, erfcc), relative error of erfc < 1.2e-7.
ENGINE_INLINE F16 erf_positive(F16 x) {
  const F16 t = reciprocal(fma(x, set1(0.5f), set1(1.f)));
  F16 p = set1(0.17087277f);
  p = fma(p, t, set1(-0.82215223f));
  p = fma(p, t, set1(1.48851587f));
  p = fma(p, t, set1(-1.13520398f));
  p = fma(p, t, set1(0.27886807f));
  p = fma(p, t, set1(-0.18628806f));
  p = fma(p, t, set1(0.09678418f));
  p = fma(p, t, set1(0.37409196f));
  p = fma(p, t, set1(1.00002368f));
  p = fma(p, t, set1(-1.26551223f));
  return sub(set1(1.f), mul(t, exp(sub(p, mul(x, x)))));
}

ENGINE_INLINE F16 activate(F16 x, int32_t act) {
  switch (act) {
    case kActRelu2: {
      const F16 r = max(x, zero());
      return mul(r, r);
    }
    case kActSilu: return silu(x);
    case kActGeluTanh: {
      // x (1 + tanh(u)) / 2 = x sigmoid(2 u)
      return mul(x, sigmoid(mul(x, fma(mul(x, x), set1(0.0713548162726f), set1(1.5957691216057308f)))));
    }
    case kActGeluErf: {  // x (1 + erf(x / sqrt 2)) / 2; erf is odd
      const F16 a = abs(x);
      return mul(set1(0.5f), fma(a, erf_positive(mul(a, set1(0.7071067811865476f))), x));
    }
    case kActRelu: return max(x, zero());
    case kActQuickGelu: return mul(x, sigmoid(mul(x, set1(1.702f))));
    default: return x;
  }
}

}  // namespace
}  // namespace engine::cpu::ENGINE_NS
