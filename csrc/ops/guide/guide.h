// guide: pulls chosen joints of a motion estimate towards targets, then makes a step of the sampler. Kinematics and their
// gradient in closed form (HumanML3D's recover_from_ric), the solver on the device: no host decision inside a step.
//
// x0 [B*T, D] f32: normalised features of B motions of up to T frames, frames[b] of them real (null: T); X = x0 * std + mean.
//   phi_t = 2 sum_{u<t} X[u,0]; p_t = R(phi_t) X[t-1,1:3], p_0 = 0; r_t = sum_{u<=t} p_u (xz), r_t.y = X[t,3]
//   joint j >= 1: P = (R(phi_t) rho.xz + r.xz, rho.y), rho = X[t, 4 + 3(j-1) :]; joint 0: P = r.  R(a) v = (v.x c - v.z s,
//   v.x s + v.z c)
// joints [B, K]: which joint slot k controls, -1: none. target [B, T, K, 3] and mask [B, T, K] (0 | 1).
//   loss = 1 / (3 sum mask) sum mask |metres * (P - target)|^2
// solver  none; gradient (of the loss into x0, for tests); descent: `steps` times x0 -= eta * gradient;
//         lbfgs: `steps` times one step of torch's L-BFGS (lbfgs.h); project: the smallest change of the root's path that
//         meets its targets, then every other joint set; without a controlled root lbfgs first.
// then    x = a * x0 + b * x + sigma * noise (x may be null; noise too).
// stats [B, 4]: loss before, loss after, evaluations, controlled values.
// precise != 0: the solver computes in fp64. ws: guide_workspace() bytes.
//
// guide_joints: positions [B*T, J, 3] of x [B*T, D]; frames behind a motion's end are zero.
#pragma once
#include "base/params.h"

namespace engine {

#define ENGINE_GUIDE_PARAMS(F)                                                                                     \
  F(float*, x0) F(int64_t, ldx0) F(float*, x) F(int64_t, ldx) F(const float*, noise) F(const float*, mean)         \
  F(const float*, std) F(const int32_t*, frames) F(const int32_t*, joints) F(const float*, target)                 \
  F(const float*, mask) F(void*, ws) F(float*, stats) F(int64_t, batch) F(int64_t, t) F(int64_t, d) F(int64_t, k)  \
  F(int32_t, solver) F(int32_t, steps) F(int32_t, max_iter) F(int32_t, history) F(int32_t, precise) F(float, eta)  \
  F(float, metres) F(float, a) F(float, b) F(float, sigma)
ENGINE_PARAMS(GuideParams, ENGINE_GUIDE_PARAMS)

#define ENGINE_GUIDE_JOINTS_PARAMS(F)                                                                           \
  F(const float*, x) F(int64_t, ldx) F(const float*, mean) F(const float*, std) F(const int32_t*, frames)       \
  F(float*, out) F(int64_t, batch) F(int64_t, t) F(int64_t, joints)
ENGINE_PARAMS(GuideJointsParams, ENGINE_GUIDE_JOINTS_PARAMS)

enum GuideSolver : int32_t {
  kGuideNone = 0,
  kGuideGradient = 1,
  kGuideDescent = 2,
  kGuideLbfgs = 3,
  kGuideProject = 4,
};

constexpr int64_t kGuideMaxHistory = 10;
constexpr int64_t kGuideMaxFrames = 256;  // a thread of a block owns one
constexpr int64_t kGuideGradients = 6;    // that a line search keeps at once

// Values of one array of a solver: rows {yaw, x, z, height} and three per slot, each padded to whole vectors.
ENGINE_HD int64_t guide_width(int64_t t) { return (t + 15) / 16 * 16; }
ENGINE_HD int64_t guide_size(int64_t t, int64_t k) { return (4 + 3 * k) * guide_width(t); }
// Per motion: x, its trial, direction, gradients, pairs of the history and one more; targets, masks; 12 rows of frames.
ENGINE_HD int64_t guide_values(int64_t t, int64_t k) {
  return guide_size(t, k) * (3 + kGuideGradients + 2 * (kGuideMaxHistory + 1)) + (4 * k + 12) * guide_width(t);
}
ENGINE_HD int64_t guide_workspace_bytes(int64_t batch, int64_t t, int64_t k, int32_t precise) {
  return batch * guide_values(t, k) * (precise ? 8 : 4);
}

}  // namespace engine
