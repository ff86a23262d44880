// channel_attention: d x d attention between the channels of a group, summed over all tokens
// layout   a block stages kTokens rows of q and k (then of v) of its group in shared memory; logits [d][d] beside them
// mapping  a block per (grid, group); a thread owns up to kOwn logits while tokens pass, then a softmax row, then outputs
// moves    q, k, v once, out once
// tried    README.md
#include "ops/channel_attention/channel_attention.h"

#include "base/launch.h"
#include "base/ptx.cuh"

namespace engine::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTokens = 32;
constexpr int kMaxD = int(kChannelAttentionMaxD);
constexpr int kOwn = kMaxD * kMaxD / kThreads;

__global__ void __launch_bounds__(kThreads) channel_attention_kernel(ChannelAttentionParams p) {
  release_next();
  wait_for_previous();
  const int d = int(p.d), pairs = d * d;
  const int64_t b = blockIdx.x, g = blockIdx.y, c = p.groups * p.d;
  const float* q = p.qkv + b * p.tokens * p.ldq + g * d;
  float* out = p.out + b * p.tokens * p.ldo + g * d;
  float* logits = reinterpret_cast<float*>(shared_memory());  // [d][d]
  float* left = logits + kMaxD * kMaxD;                       // [kTokens][d]
  float* right = left + kTokens * kMaxD;                      // [kTokens][d]
  float acc[kOwn] = {};
  for (int64_t n0 = 0; n0 < p.tokens; n0 += kTokens) {
    const int count = int(min(int64_t(kTokens), p.tokens - n0));
    for (int at = threadIdx.x; at < count * d; at += kThreads) {
      const float* row = q + (n0 + at / d) * p.ldq + at % d;
      left[at] = row[0];
      right[at] = row[c];
    }
    __syncthreads();
#pragma unroll
    for (int o = 0; o < kOwn; ++o) {
      const int pair = o * kThreads + int(threadIdx.x);
      if (pair >= pairs) break;
      const int i = pair / d, j = pair % d;
      for (int n = 0; n < count; ++n) acc[o] = fmaf(left[n * d + i], right[n * d + j], acc[o]);
    }
    __syncthreads();
  }
#pragma unroll
  for (int o = 0; o < kOwn; ++o) {
    const int pair = o * kThreads + int(threadIdx.x);
    if (pair < pairs) logits[pair] = acc[o] * p.scale;
  }
  __syncthreads();
  if (int(threadIdx.x) < d) {
    float* row = logits + threadIdx.x * d;
    float best = row[0], total = 0.f;
    for (int j = 1; j < d; ++j) best = fmaxf(best, row[j]);
    for (int j = 0; j < d; ++j) total += row[j] = expf(row[j] - best);
    for (int j = 0; j < d; ++j) row[j] /= total;
  }
  for (int64_t n0 = 0; n0 < p.tokens; n0 += kTokens) {
    const int count = int(min(int64_t(kTokens), p.tokens - n0));
    for (int at = threadIdx.x; at < count * d; at += kThreads) left[at] = q[(n0 + at / d) * p.ldq + 2 * c + at % d];
    __syncthreads();  // also behind the softmax
    for (int at = threadIdx.x; at < count * d; at += kThreads) {
      const int n = at / d, i = at % d;
      float sum = 0.f;
      for (int j = 0; j < d; ++j) sum = fmaf(logits[i * d + j], left[n * d + j], sum);
      out[(n0 + n) * p.ldo + i] = sum;
    }
    __syncthreads();
  }
}

}  // namespace

void channel_attention(const ChannelAttentionParams& p, void* stream) {
  const size_t shared = (kMaxD * kMaxD + 2 * kTokens * kMaxD) * sizeof(float);
  const Launch l = {{unsigned(p.batch), unsigned(p.groups)}, kThreads, shared, stream, true};
  launch("channel_attention", channel_attention_kernel, l, p);
}

}  // namespace engine::cuda
