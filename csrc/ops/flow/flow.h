// flow: one step of a flow sampler in which every action of every chunk has its own local time (FASTER, section 3).
// B chunks of H actions with A channels; chunk b stands before step j = step[b] of N. tau [B, N+1, H]: local times, falling
// from 1 (noise) to 0 (clean). A chunk with j outside [0, N) is finished: nothing of it changes.
//
// flow_begin: what the network sees.
//   x[b,i,:] = prefix[b,i,:] for i < delay[b]
//   value    = x                                     euler, implied
//            = noise * tau[b,j,i] + x * (1 - tau)    renoise: x is the last predicted action
//   out[b*H+i,:] = [value, 0 in channels with hidden[c] != 0 | context[b,:] | times[row,:]], row = index[b,j,i]
//   rows[b*H+i] = row      (context, times, hidden may be null)
// flow_end: what the network said, pred [B*H, A].
//   x += (tau[b,j+1,i] - tau[b,j,i]) * pred          euler
//   x  = pred where tau[b,j,i] > 0                   renoise
//   x  = r x + (1 - r) pred there                    implied: euler on the velocity (x - pred) / tau[b,j,i] that a clean
//        with r = tau[b,j+1,i] / tau[b,j,i]          prediction implies
//   rows with due[b,i] == j leave: ring[slot[b], i, c] = clamp(s(x[c]) * scale[b,c] + offset[b,c], low[c], high[c]),
//   c < dims, s the logistic function where squash[c] != 0, else the identity; bad[b] = 1 if a value is not finite
//   step[b] = j + 1
#pragma once
#include "base/params.h"

namespace engine {

#define ENGINE_FLOW_BEGIN_PARAMS(F)                                                                            \
  F(const int32_t*, step) F(const float*, tau) F(const int32_t*, index) F(const int32_t*, delay)               \
  F(const float*, prefix) F(const float*, noise) F(float*, x) F(float*, out) F(int64_t, ldo) F(int32_t*, rows)  \
  F(const float*, context) F(const float*, times) F(const int32_t*, hidden) F(int64_t, batch) F(int64_t, steps) \
  F(int64_t, horizon) F(int64_t, channels) F(int64_t, context_width) F(int64_t, time_width) F(int32_t, rule)
ENGINE_PARAMS(FlowBeginParams, ENGINE_FLOW_BEGIN_PARAMS)

#define ENGINE_FLOW_END_PARAMS(F)                                                                               \
  F(int32_t*, step) F(const float*, tau) F(const int32_t*, due) F(const int32_t*, slot) F(const float*, pred)   \
  F(int64_t, ldp) F(float*, x) F(float*, ring) F(const float*, scale) F(const float*, offset)                   \
  F(const float*, low) F(const float*, high) F(const int32_t*, squash) F(int32_t*, bad) F(int64_t, slots)       \
  F(int64_t, batch) F(int64_t, steps) F(int64_t, horizon) F(int64_t, channels) F(int64_t, dims) F(int32_t, rule)
ENGINE_PARAMS(FlowEndParams, ENGINE_FLOW_END_PARAMS)

enum FlowRule : int32_t { kFlowEuler = 0, kFlowRenoise = 1, kFlowImplied = 2 };

}  // namespace engine
