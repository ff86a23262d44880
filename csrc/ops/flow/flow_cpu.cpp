// flow: what the network sees of each action at its own local time, and what becomes of its answer
// layout   flow.h; all f32, chunks of a few KB
// mapping  flow_begin: one task per action. flow_end: one task per chunk, so that its step advances behind its last row
// moves    every operand once
// tried    -
#include "ops/flow/flow.h"

#include <cmath>

#include "base/simd.h"

namespace engine::cpu::ENGINE_NS {

void flow_begin(const FlowBeginParams& p, Ctx& ctx) {
  const int64_t h = p.horizon, a = p.channels;
  for (int64_t row; (row = claim(ctx)) < p.batch * h;) {
    const int64_t b = row / h, i = row % h, j = p.step[b];
    if (j < 0 || j >= p.steps) continue;
    const float tau = p.tau[(b * (p.steps + 1) + j) * h + i];
    const int32_t time = p.index[(b * p.steps + j) * h + i];
    float* x = p.x + row * a;
    float* out = p.out + row * p.ldo;
    if (i < p.delay[b]) memcpy(x, p.prefix + row * a, size_t(a) * 4);
    for (int64_t c = 0; c < a; ++c) {
      const float value = p.rule == kFlowRenoise ? p.noise[row * a + c] * tau + x[c] * (1.f - tau) : x[c];
      out[c] = p.hidden && p.hidden[c] ? 0.f : value;
    }
    if (p.context) memcpy(out + a, p.context + b * p.context_width, size_t(p.context_width) * 4);
    if (p.times) {
      float* to = out + a + (p.context ? p.context_width : 0);
      memcpy(to, p.times + time * p.time_width, size_t(p.time_width) * 4);
    }
    p.rows[row] = time;
  }
}

void flow_end(const FlowEndParams& p, Ctx& ctx) {
  const int64_t h = p.horizon, a = p.channels;
  for (int64_t b; (b = claim(ctx)) < p.batch;) {
    const int64_t j = p.step[b];
    if (j < 0 || j >= p.steps) continue;
    const float* now = p.tau + (b * (p.steps + 1) + j) * h;
    const int64_t slot = p.slot[b];
    for (int64_t i = 0; i < h; ++i) {
      float* x = p.x + (b * h + i) * a;
      const float* pred = p.pred + (b * h + i) * p.ldp;
      if (p.rule == kFlowEuler) {
        const float delta = now[h + i] - now[i];
        for (int64_t c = 0; c < a; ++c) x[c] += delta * pred[c];
      } else if (now[i] > 0.f) {
        const float kept = p.rule == kFlowImplied ? now[h + i] / now[i] : 0.f;
        for (int64_t c = 0; c < a; ++c) x[c] = kept > 0.f ? kept * x[c] + (1.f - kept) * pred[c] : pred[c];
      }
      if (p.due[b * h + i] != j || slot < 0 || slot >= p.slots) continue;
      float* to = p.ring + (slot * h + i) * p.dims;
      for (int64_t c = 0; c < p.dims; ++c) {
        float v = x[c];
        if (p.squash && p.squash[c]) v = 1.f / (1.f + expf(-v));
        v = v * p.scale[b * p.dims + c] + p.offset[b * p.dims + c];
        if (!std::isfinite(v)) p.bad[b] = 1;
        if (p.low) v = v < p.low[c] ? p.low[c] : v;
        if (p.high) v = v > p.high[c] ? p.high[c] : v;
        to[c] = v;
      }
    }
    p.step[b] = int32_t(j + 1);
  }
}

}  // namespace engine::cpu::ENGINE_NS
