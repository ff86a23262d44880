// pick: tokens drawn from guided logits by inverse CDF, with uniforms that the caller brings.
//   l = uncond + scale * (cond - uncond), or cond where uncond is null; of a row of weights w_i, in index order,
//   draw(w, u) = the first kept i with w_0 + ... + w_i > u * sum(w), else the last kept i.
//
// pick_masked: one pass of a masked planner over a sequence of N positions. Where ids[n] == mask_id:
//   the topk highest l of the row are kept (of equals the lowest index), w = exp((l - max l) / temperature),
//   ids[n] = draw(w, uniforms[n]), score[n] = softmax(l)[ids[n]], of all logits and without temperature, 0 where none is finite.
//   Then, where counts is given: the counts[0] lowest scores, ties to the lowest index, among the positions just drawn are
//   mask_id again (all of them where counts[0] is more).
//   cond, uncond [N, K], rows ldc, ldu apart; scale [1]; uniforms [N] in [0, 1) f32; ids [N], counts [1] i32.
//   N <= kPickPositions, K <= kPickCodes; mask_id is not in [0, K).
// pick_next: the next token of one sequence. n = *step; nothing happens where n is not in [0, capacity). Token K-1 is END, with
//   weight 0 where *open == 0. token = draw(exp(l), uniforms[n]); *done |= token == K-1 or n >= *limit;
//   tokens[n] = *done ? K : token; ids[:] = min(token, K-2); *step = n+1; pos[:] = n+1;
//   rows[:] = rows_table[min(n+1, capacity-1), :].
//   cond, uncond [K]; uniforms [capacity] f32; tokens [capacity], ids, pos, rows [pair], rows_table [capacity, pair] i32.
#pragma once
#include "base/params.h"

namespace engine {

constexpr int64_t kPickPositions = 256;
constexpr int64_t kPickCodes = 4096;

#define ENGINE_PICK_MASKED_PARAMS(F)                                                                                 \
  F(const float*, cond) F(int64_t, ldc) F(const float*, uncond) F(int64_t, ldu) F(const float*, scale)              \
  F(int32_t*, ids) F(const float*, uniforms) F(const int32_t*, counts) F(int64_t, n) F(int64_t, k) F(int64_t, topk) \
  F(int32_t, mask_id) F(float, temperature)
ENGINE_PARAMS(PickMaskedParams, ENGINE_PICK_MASKED_PARAMS)

#define ENGINE_PICK_NEXT_PARAMS(F)                                                                                  \
  F(const float*, cond) F(const float*, uncond) F(const float*, scale) F(int64_t, k) F(const float*, uniforms)      \
  F(int32_t*, tokens) F(int32_t*, step) F(const int32_t*, limit) F(const int32_t*, open) F(int32_t*, done)          \
  F(int32_t*, ids) F(int32_t*, pos) F(const int32_t*, rows_table) F(int32_t*, rows) F(int64_t, capacity)            \
  F(int64_t, pair)
ENGINE_PARAMS(PickNextParams, ENGINE_PICK_NEXT_PARAMS)

}  // namespace engine
