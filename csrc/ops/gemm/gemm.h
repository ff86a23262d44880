// gemm: out[m,:] = act(prologue(x)[m,:] @ W.T + bias) * scale * gate[m,:] + residual[m,:], W packed (see gemm_pack).
// x [M,K] f32 row-major (row stride ldx), or x16, the same in bf16 (without a prologue; x is null); out [M,N] f32 or bf16; residual [M,N] f32 (may be out itself); bias [N] f32.
// tap > 0: a row of x is K / tap pieces of tap values, ldtap apart: a convolution over rows (without a prologue).
// width > 0: rows are the cells of a grid, width in a line; cell (l, c) begins at l * ldline + c * ldx of x.
// rows, when given, is read at run time and replaces m: one recorded node serves every length up to m.
// Prologues: rms_norm    x * rsqrt(mean(x^2) + eps) over K
//            layer_norm  (x - mean) * rsqrt(var + eps) over K
//            gated       v = x * silu(z), then rms_norm over groups of norm_group channels, times pro_w
//            glu         pro_act(x) * z
// The first two are followed by * pro_w + pro_b (either may be null), then by * (1 + scale) + shift of the modulation.
// Modulation: mod [R, ldmod] f32 | bf16; row m uses row mod_rows[m] (row 0 when mod_rows is null; ids outside [0, R)
// are the caller's fault). Its scale, shift and gate start at columns mod_scale, mod_shift, mod_gate; -1: there is none.
// ws: workspace_bytes(m, k) of engine/ops/gemm.py, used when M*K is too large for every thread to pack it for itself.
// On a CPU rows pass in strips of kGemmStripBytes, so that ws stays in a cache however many there are.
#pragma once
#include "base/params.h"

namespace engine {

#define ENGINE_GEMM_PARAMS(F)                                                                            \
  F(const float*, x) F(int64_t, ldx) F(const uint8_t*, w) F(void*, out) F(int64_t, ldo)                  \
  F(const float*, residual) F(int64_t, ldr) F(const float*, bias) F(const float*, pro_w)                 \
  F(const float*, z) F(int64_t, ldz) F(uint8_t*, ws) F(const int32_t*, rows) F(int64_t, m) F(int64_t, n) \
  F(int64_t, k) F(int32_t, format) F(int32_t, group) F(int32_t, prologue) F(int64_t, norm_group)         \
  F(float, eps) F(int32_t, act) F(int32_t, out_dtype) F(float, scale) F(const float*, pro_b)             \
  F(int32_t, pro_act) F(const void*, mod) F(int64_t, ldmod) F(int32_t, mod_dtype)                        \
  F(const int32_t*, mod_rows) F(int64_t, mod_scale) F(int64_t, mod_shift) F(int64_t, mod_gate)           \
  F(int64_t, tap) F(int64_t, ldtap) F(const uint16_t*, x16) F(int64_t, width) F(int64_t, ldline)
ENGINE_PARAMS(GemmParams, ENGINE_GEMM_PARAMS)

constexpr int64_t kGemmStripBytes = 16 << 20;

// gemm_pack: rows [0,n) of src [n,k] (f32 | bf16 | f16, row stride lds) become rows [n0, n0+n) of a packed matrix.
// Packed: panels of 16 output rows, K inside, 64-byte vectors of 16 rows x {1 f32 | 2 bf16 | 4 u8 | 8 u4} k values;
// in quantised panels every two groups of codes are followed by their 2 x 16 fp16 scales: one stream to read. Same bytes
// on every ISA. k % group == 0 when quantised.
// *bad is set to 1 when a source value is NaN or infinite, or too large for a scale in fp16.
#define ENGINE_GEMM_PACK_PARAMS(F)                                                                     \
  F(const void*, src) F(int64_t, lds) F(int32_t, src_dtype) F(uint8_t*, dst) F(int64_t, n) F(int64_t, k) \
  F(int64_t, n0) F(int32_t, format) F(int32_t, group) F(int32_t*, bad)
ENGINE_PARAMS(GemmPackParams, ENGINE_GEMM_PACK_PARAMS)

// gemm_peak: the roofs of the benches. kind 0 f32, 1 bf16 pairs, 2 u8 x s8 quads: independent multiply-adds in registers,
// `iterations` per thread; *ops receives the operations done by all threads (a multiply-add counts two).
// kind 3: reads data [bytes], a multiple of 1 MiB, once with all threads.
#define ENGINE_GEMM_PEAK_PARAMS(F)                                                                       \
  F(int32_t, kind) F(int64_t, iterations) F(float*, sink) F(int64_t*, ops) F(const uint8_t*, data) F(int64_t, bytes)
ENGINE_PARAMS(GemmPeakParams, ENGINE_GEMM_PEAK_PARAMS)

// Bytes of one panel of 16 rows.
ENGINE_HD constexpr int64_t gemm_panel_bytes(int32_t format, int64_t k, int64_t group) {
  const int64_t codes = format == 0 ? 64 * k : format == 1 ? 32 * (k + (k & 1)) : format == 2 ? 16 * k : 8 * k;
  const int64_t scales = format >= 2 ? (k / group + 1) / 2 * 64 : 0;
  return codes + scales;
}

// Where the codes and the scales of group g lie in a quantised panel of `groups` groups of `code` bytes each.
ENGINE_HD constexpr int64_t gemm_codes_at(int64_t g, int64_t code) { return g * code + g / 2 * 64; }
ENGINE_HD constexpr int64_t gemm_scales_at(int64_t g, int64_t groups, int64_t code) {
  const int64_t end = (g | 1) + 1 < groups ? (g | 1) + 1 : groups;  // one past the block's last group
  return end * code + g / 2 * 64 + (g & 1) * 32;
}

}  // namespace engine
