// gather: out[t,:] = table[ids[t],:], t < rows. table [V,D] f32 or bf16; out [T,D] f32. An id outside [0,V) gives zeros.
#pragma once
#include "base/params.h"

namespace engine {
#define ENGINE_GATHER_PARAMS(F)                                                                             \
  F(const void*, table) F(int32_t, table_dtype) F(int64_t, vocab) F(int64_t, d) F(const int32_t*, ids)      \
  F(float*, out) F(int64_t, ldo) F(const int32_t*, rows) F(int64_t, m)
ENGINE_PARAMS(GatherParams, ENGINE_GATHER_PARAMS)

// gather_mean: out[b,:] = mean of the rows [b*n, (b+1)*n) of x [B*n, D] f32.
#define ENGINE_GATHER_MEAN_PARAMS(F) \
  F(const float*, x) F(int64_t, ldx) F(float*, out) F(int64_t, ldo) F(int64_t, batch) F(int64_t, n) F(int64_t, d)
ENGINE_PARAMS(GatherMeanParams, ENGINE_GATHER_MEAN_PARAMS)

// gather_sum: out[b*N+i,:] = sum over j in [offsets[i], offsets[i+1]) of weights[j] * x[b*R + rows[j], :]: a sparse matrix
// [N, R] times each of `batch` grids of x [batch*R, D] f32. Its entries are the caller's business: they are not checked.
#define ENGINE_GATHER_SUM_PARAMS(F)                                                                        \
  F(const float*, x) F(int64_t, ldx) F(const int32_t*, offsets) F(const int32_t*, rows)                    \
  F(const float*, weights) F(void*, out) F(int32_t, out_dtype) F(int64_t, ldo) F(int64_t, batch)           \
  F(int64_t, n) F(int64_t, r) F(int64_t, d)
ENGINE_PARAMS(GatherSumParams, ENGINE_GATHER_SUM_PARAMS)
}  // namespace engine
