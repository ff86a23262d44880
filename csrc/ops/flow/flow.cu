// flow: what the network sees of each action at its own local time, and what becomes of its answer
// layout   flow.h; all f32, chunks of a few KB
// mapping  flow_begin: a block per action, a thread per channel. flow_end: a block per chunk, a thread per value in turns;
//          the step advances behind a barrier, when every thread has read it
// moves    every operand once
// tried    README.md
#include "ops/flow/flow.h"

#include "base/launch.h"
#include "base/ptx.cuh"

namespace engine::cuda {
namespace {

constexpr int kBeginThreads = 64;
constexpr int kEndThreads = 256;

__global__ void __launch_bounds__(kBeginThreads) flow_begin_kernel(FlowBeginParams p) {
  release_next();
  wait_for_previous();
  const int64_t row = blockIdx.x, h = p.horizon, a = p.channels, b = row / h, i = row % h;
  const int64_t j = p.step[b];
  if (j < 0 || j >= p.steps) return;
  const float tau = p.tau[(b * (p.steps + 1) + j) * h + i];
  const int32_t time = p.index[(b * p.steps + j) * h + i];
  const bool committed = i < p.delay[b];
  float* out = p.out + row * p.ldo;
  for (int64_t c = threadIdx.x; c < a; c += kBeginThreads) {
    float x = p.x[row * a + c];
    if (committed) {
      x = p.prefix[row * a + c];
      p.x[row * a + c] = x;
    }
    const float value = p.rule == kFlowRenoise ? p.noise[row * a + c] * tau + x * (1.f - tau) : x;
    out[c] = p.hidden && p.hidden[c] ? 0.f : value;
  }
  const int64_t context = p.context ? p.context_width : 0;
  for (int64_t c = threadIdx.x; c < context; c += kBeginThreads) out[a + c] = p.context[b * context + c];
  const int64_t width = p.times ? p.time_width : 0;
  for (int64_t c = threadIdx.x; c < width; c += kBeginThreads) out[a + context + c] = p.times[time * width + c];
  if (threadIdx.x == 0) p.rows[row] = time;
}

__global__ void __launch_bounds__(kEndThreads) flow_end_kernel(FlowEndParams p) {
  release_next();
  wait_for_previous();
  const int64_t b = blockIdx.x, h = p.horizon, a = p.channels, j = p.step[b];
  if (j < 0 || j >= p.steps) return;
  const float* now = p.tau + (b * (p.steps + 1) + j) * h;
  const int64_t slot = p.slot[b];
  for (int64_t at = threadIdx.x; at < h * a; at += kEndThreads) {
    const int64_t i = at / a, c = at % a;
    float* x = p.x + (b * h + i) * a + c;
    const float pred = p.pred[(b * h + i) * p.ldp + c];
    float value = *x;
    if (p.rule == kFlowEuler) {
      value += (now[h + i] - now[i]) * pred;
    } else if (now[i] > 0.f) {
      const float kept = p.rule == kFlowImplied ? now[h + i] / now[i] : 0.f;
      value = kept > 0.f ? kept * value + (1.f - kept) * pred : pred;
    }
    *x = value;
    if (c >= p.dims || p.due[b * h + i] != j || slot < 0 || slot >= p.slots) continue;
    if (p.squash && p.squash[c]) value = 1.f / (1.f + expf(-value));
    value = value * p.scale[b * p.dims + c] + p.offset[b * p.dims + c];
    if (!(fabsf(value) <= 3.402823466e38f)) p.bad[b] = 1;
    if (p.low) value = value < p.low[c] ? p.low[c] : value;
    if (p.high) value = value > p.high[c] ? p.high[c] : value;
    p.ring[(slot * h + i) * p.dims + c] = value;
  }
  __syncthreads();
  if (threadIdx.x == 0) p.step[b] = int32_t(j + 1);
}

}  // namespace

void flow_begin(const FlowBeginParams& p, void* stream) {
  const Launch l = {unsigned(p.batch * p.horizon), kBeginThreads, 0, stream, true};
  launch("flow_begin", flow_begin_kernel, l, p);
}

void flow_end(const FlowEndParams& p, void* stream) {
  const Launch l = {unsigned(p.batch), kEndThreads, 0, stream, true};
  launch("flow_end", flow_end_kernel, l, p);
}

}  // namespace engine::cuda
