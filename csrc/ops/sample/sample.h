// sample: the next token from logits [V] f32, chosen on the device; the id never leaves memory between steps.
//   l = logits with repetition penalty for seen tokens (l > 0 ? l / r : l * r), divided by temperature;
//   top_k keeps every logit >= the k-th largest; top_p keeps the smallest set of largest probabilities (after top_k)
//   whose mass reaches p; min_p keeps p_i >= min_p * p_max; then argmax(l + Gumbel), Gumbel from Philox
//   (seed, index = token id, offset = step, stream 1). temperature 0: argmax of the penalised logits, lowest id on ties.
// control f32 [4]: temperature, top_p, min_p, repetition_penalty; limits i32 [1]: top_k (0 = off); seed u64 [1].
// Without a finite logit the id is -1. Then: *token = id; seen[id] = 1; history[step] = id (if step < capacity); *pos += 1; *step += 1.
// ticket [2]: zero before and after every launch (CUDA: the last block to finish decides).
// work f32 [V]; ws: sample_workspace(V) bytes.
#pragma once
#include "base/params.h"

namespace engine {
#define ENGINE_SAMPLE_PARAMS(F)                                                                             \
  F(const float*, logits) F(int64_t, vocab) F(const float*, control) F(const int32_t*, limits)              \
  F(const uint64_t*, seed) F(uint8_t*, seen) F(float*, work) F(uint8_t*, ws) F(int32_t*, token)             \
  F(int32_t*, history) F(int64_t, capacity) F(int32_t*, pos) F(int32_t*, step)           \
  F(uint32_t*, ticket)
ENGINE_PARAMS(SampleParams, ENGINE_SAMPLE_PARAMS)

constexpr int64_t kSampleChunk = 4096;
constexpr int64_t sample_workspace(int64_t vocab) { return ((vocab + kSampleChunk - 1) / kSampleChunk + 2) * 32 + 64; }
}  // namespace engine
