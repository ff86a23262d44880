// rng: fills out [n] from Philox(seed, index = i, offset, stream). kind 0: u32 bits; 1: uniform f32 in [0,1), 24 bits;
// 2: standard normal f32 by Box-Muller on pairs (2i, 2i+1): r cos, r sin, r = sqrt(-2 log((bits + 0.5) 2^-32)).
#pragma once
#include "base/params.h"

namespace engine {
#define ENGINE_RNG_PARAMS(F) \
  F(void*, out) F(int64_t, n) F(const uint64_t*, seed) F(const uint64_t*, offset) F(int32_t, stream) F(int32_t, kind)
ENGINE_PARAMS(RngParams, ENGINE_RNG_PARAMS)
}  // namespace engine
