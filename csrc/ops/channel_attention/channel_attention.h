// channel_attention: attention between the channels of a group, over all tokens (DaViT, Ding et al. 2022, section 3.3).
//   logits[i,j] = scale * sum over n of q[n,i] k[n,j];  out[n,i] = sum over j of softmax(logits)[i,j] v[n,j]
// qkv [B*N, 3*C] f32 (row stride ldq): q, k, v each groups x d channels, C = groups * d, d <= 64; out [B*N, C].
#pragma once
#include "base/params.h"

namespace engine {
#define ENGINE_CHANNEL_ATTENTION_PARAMS(F)                                                         \
  F(const float*, qkv) F(int64_t, ldq) F(float*, out) F(int64_t, ldo) F(int64_t, batch)            \
  F(int64_t, tokens) F(int64_t, groups) F(int64_t, d) F(float, scale)
ENGINE_PARAMS(ChannelAttentionParams, ENGINE_CHANNEL_ATTENTION_PARAMS)

constexpr int64_t kChannelAttentionMaxD = 64;
}  // namespace engine
