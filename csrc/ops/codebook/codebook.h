// codebook: vectors to codes and codes to features (vector quantisation: van den Oord et al. 2017, section 3.1).
//
// codebook_search: ids[m] = argmin_k norms[k] - 2 <x[m,:], codes[k,:]>, the lowest k where several are least; norms[k] =
//   |codes[k]|^2, so this is the nearest code. out[m,:] = codes[ids[m],:] where out is given.
//   x [M, D], codes [K, D], norms [K], out [M, D] f32; ids i32.
// codebook_conv: a convolution over embedded codes, folded into one table:
//   out[b*N+n,:] = act(bias + sum_j table[ids[b*N + n + j - taps/2], j, :]), j in [0, taps); positions outside a sequence and
//   ids outside [0, K) add nothing. table [K, taps, C], bias [C], out [B*N, C] f32; relu != 0: act = max(., 0).
#pragma once
#include "base/params.h"

namespace engine {

#define ENGINE_CODEBOOK_SEARCH_PARAMS(F)                                                                            \
  F(const float*, x) F(int64_t, ldx) F(const float*, codes) F(const float*, norms) F(int32_t*, ids) F(float*, out) \
  F(int64_t, ldo) F(int64_t, m) F(int64_t, d) F(int64_t, k)
ENGINE_PARAMS(CodebookSearchParams, ENGINE_CODEBOOK_SEARCH_PARAMS)

#define ENGINE_CODEBOOK_CONV_PARAMS(F)                                                                           \
  F(const int32_t*, ids) F(const float*, table) F(const float*, bias) F(float*, out) F(int64_t, ldo)            \
  F(int64_t, batch) F(int64_t, n) F(int64_t, k) F(int64_t, taps) F(int64_t, c) F(int32_t, relu)
ENGINE_PARAMS(CodebookConvParams, ENGINE_CODEBOOK_CONV_PARAMS)

}  // namespace engine
