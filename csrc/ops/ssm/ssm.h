// ssm: causal depthwise conv + SiLU, then the Mamba-2 selective scan, for 1..m tokens that continue a sequence.
//   u_t = silu(conv_b + sum_j conv_w[j] * xbc_{t-K+1+j});  u = [x: H*P | B: G*N | C: G*N]
//   dt  = clamp(softplus(dt_raw + dt_bias), dt_min, dt_max);  S = exp(dt*a) S + (dt*x) B^T;  y = S C + D x
// xbc [T, H*P+2GN] and dt [T,H] f32 (row strides ldx, lddt); conv_w [K, channels] (transposed), conv_b or null;
// conv_state [K-1, channels] f32: the last K-1 raw inputs; a [H] = -exp(A_log); state [H, N, Pp] f32 with
// Pp = P rounded up to 16; u [T, channels] workspace; out y [T, H*P]. Both states are updated in place.
// ticket [G]: zero before and after every launch (CUDA: the last block of a group moves its conv state on).
#pragma once
#include "base/params.h"

namespace engine {
#define ENGINE_SSM_PARAMS(F)                                                                                   \
  F(const float*, xbc) F(int64_t, ldx) F(const float*, dt) F(int64_t, lddt) F(const float*, conv_w)            \
  F(const float*, conv_b) F(float*, conv_state) F(const float*, a) F(const float*, d_skip)                     \
  F(const float*, dt_bias) F(float*, state) F(float*, u) F(float*, out) F(int64_t, ldo)                        \
  F(const int32_t*, rows) F(int64_t, m) F(int64_t, heads) F(int64_t, head_dim) F(int64_t, groups)              \
  F(int64_t, n_state) F(int64_t, taps) F(float, dt_min) F(float, dt_max)           \
  F(uint32_t*, ticket)
ENGINE_PARAMS(SsmParams, ENGINE_SSM_PARAMS)
}  // namespace engine
