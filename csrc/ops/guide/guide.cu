// guide: constraint loss of a motion with its gradient in closed form, the solver around it, and the sampler's update
// layout   the solver's values in ws as rows of frames: {yaw, x, z, height}, three per controlled joint
// mapping  guide: a block per motion, a thread per frame; paths are scans over the block; the solver's scalars are the same in
//          every thread. update: a thread per value. joints: a block per motion
// moves    the active rows of x0 twice; the solver's vectors stay in L1 and L2; the update x0, x, noise once
// tried    README.md
#include "ops/guide/guide.h"

#include "base/launch.h"
#include "base/ptx.cuh"
#include "ops/guide/angles.h"
#include "ops/guide/lbfgs.h"

namespace engine::cuda {
namespace {

constexpr int kThreads = int(kGuideMaxFrames);
constexpr int kWarps = kThreads / 32;
constexpr int kUpdateThreads = 256;

__device__ __forceinline__ void sin_cos(float a, float* s, float* c) { heading(a, s, c); }
// In half turns, for the same reason: see angles.h.
__device__ __forceinline__ void sin_cos(double a, double* s, double* c) { sincospi(a * 0.318309886183790672, s, c); }

template <class R> struct Shared {
  LbfgsMemory memory;
  double sums[2][kWarps];  // of two reductions in turn: one barrier each
  double products[kWarps][4 * kLbfgsSlots];
  R warps[2][kWarps];
  R rows[4][kThreads];  // cosine, sine and the root's place of every frame
  R moved[2][kThreads];
};

template <class R> class Block {
 public:
  using real = R;

  __device__ Block(const GuideParams& p, int64_t b, R* memory, Shared<R>& shared)
      : p_(p), b_(b), w_(guide_width(p.t)), n_(guide_size(p.t, p.k)), m_(shared) {
    const int64_t frames = p.frames ? p.frames[b] : p.t;
    frames_ = int(frames < 0 ? 0 : frames < p.t ? frames : p.t);
    x_ = memory;
    arrays_ = x_ + n_;
    target_ = arrays_ + n_ * (2 + kGuideGradients + 2 * (kGuideMaxHistory + 1));
    mask_ = target_ + 3 * p.k * w_;
    load();
  }

  __device__ int64_t n() const { return n_; }
  __device__ R* x() { return x_; }
  __device__ R* arrays() { return arrays_; }
  __device__ LbfgsMemory& memory() { return m_.memory; }
  __device__ double controlled() const { return controlled_; }
  __device__ bool root() const { return root_ >= 0; }
  __device__ int evaluations() const { return evaluations_; }

  // A thread's values are its own between evaluations.
  template <class F> __device__ __forceinline__ void each(F f) {
    for (int64_t i = threadIdx.x; i < n_; i += kThreads) f(i);
  }
  template <class F> __device__ __forceinline__ void once(F f) {
    if (threadIdx.x == 0) f();
    __syncthreads();
  }
  __device__ double dot(const R* a, const R* b) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < n_; i += kThreads) sum += double(a[i]) * double(b[i]);
    return total(sum);
  }
  __device__ double abs_sum(const R* v) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < n_; i += kThreads) sum += fabs(double(v[i]));
    return total(sum);
  }
  __device__ double abs_max(const R* v) {
    double most = 0;
    for (int64_t i = threadIdx.x; i < n_; i += kThreads) most = fmax(most, fabs(double(v[i])));
    for (int d = 16; d; d /= 2) most = fmax(most, __shfl_xor_sync(~0u, most, d));
    double* sums = turn_sums();
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = most;
    __syncthreads();
    for (int i = 0; i < kWarps; ++i) most = fmax(most, sums[i]);
    return most;
  }
  template <class F> __device__ __forceinline__ void products(int count, F pair, const R* y, const R* g, double* out) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int j = 0; j < count; ++j) {
      const R *s = pair(j), *t = s + n_;
      double sum[4] = {};
      for (int64_t i = threadIdx.x; i < n_; i += kThreads) {
        const double si = s[i], ti = t[i], yi = y[i], gi = g[i];
        sum[0] += si * yi;
        sum[1] += ti * yi;
        sum[2] += si * gi;
        sum[3] += ti * gi;
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        for (int d = 16; d; d /= 2) sum[k] += __shfl_xor_sync(~0u, sum[k], d);
        if (lane == 0) m_.products[warp][4 * j + k] = sum[k];
      }
    }
    __syncthreads();
    if (int(threadIdx.x) < 4 * count) {
      double sum = 0;
      for (int i = 0; i < kWarps; ++i) sum += m_.products[i][threadIdx.x];
      out[threadIdx.x] = sum;
    }
    __syncthreads();
  }

  template <class F> __device__ __forceinline__ void combine(int count, F pair, const R* g, R* d) {
    const LbfgsMemory& of = m_.memory;
    for (int64_t i = threadIdx.x; i < n_; i += kThreads) {
      R sum = R(of.of_g) * g[i];
      for (int j = 0; j < count; ++j) sum += R(of.of_s[j]) * pair(j)[i] + R(of.of_y[j]) * pair(j)[n_ + i];
      d[i] = sum;
    }
  }

  // Loss and gradient at v. Thread t is frame t; what comes before or after it is a scan.
  __device__ double evaluate(const R* v, R* g) {
    ++evaluations_;
    __syncthreads();  // v is written
    const int t = threadIdx.x;
    const bool live = t < frames_;
    R c, s, px, pz, rx, rz;
    path(v, c, s, px, pz, rx, rz);
    const R unit = R(2 * double(p_.metres) * p_.metres / controlled_);
    R fx = 0, fz = 0, turn = 0, height = 0;
    double loss = 0;
    for (int64_t k = 0; k < p_.k; ++k) {
      R* gk = g + (4 + 3 * k) * w_ + t;
      const int64_t j = joint(k);
      if (t >= w_) continue;
      if (!live || j <= 0) gk[0] = gk[w_] = gk[2 * w_] = 0;
      if (!live || j < 0) continue;
      const R m = mask_[k * w_ + t];
      const R* to = target_ + 3 * k * w_ + t;
      if (!j) {
        const R ex = m * (rx - to[0]), ey = m * (v[3 * w_ + t] * std_of(3) + mean_of(3) - to[w_]),
                ez = m * (rz - to[2 * w_]);
        loss += double(ex) * ex + double(ey) * ey + double(ez) * ez;
        fx += unit * ex;
        fz += unit * ez;
        height += unit * ey * std_of(3);
        continue;
      }
      const R* rho = v + (4 + 3 * k) * w_ + t;
      const int64_t f = 4 + 3 * (j - 1);
      const R ax = rho[0] * std_of(f) + mean_of(f), az = rho[2 * w_] * std_of(f + 2) + mean_of(f + 2);
      const R lx = ax * c - az * s, lz = ax * s + az * c;
      const R ex = m * (lx + rx - to[0]), ey = m * (rho[w_] * std_of(f + 1) + mean_of(f + 1) - to[w_]),
              ez = m * (lz + rz - to[2 * w_]);
      loss += double(ex) * ex + double(ey) * ey + double(ez) * ez;
      const R gx = unit * ex, gz = unit * ez;
      fx += gx;
      fz += gz;
      turn += lx * gz - lz * gx;
      gk[0] = (gx * c + gz * s) * std_of(f);
      gk[w_] = unit * ey * std_of(f + 1);
      gk[2 * w_] = (gz * c - gx * s) * std_of(f + 2);
    }
    fx = from_here(fx);
    fz = from_here(fz);
    const R later = from_here(2 * (turn + px * fz - pz * fx));
    if (t < w_) g[3 * w_ + t] = height;
    // Frame t feels what is stored in the row before it; nothing feels the last row.
    const int row = t ? t - 1 : int(w_) - 1;
    if (t < w_) {
      const bool felt = t && live;
      g[row] = felt ? later * std_of(0) : R(0);
      g[w_ + row] = felt ? (fx * c + fz * s) * std_of(1) : R(0);
      g[2 * w_ + row] = felt ? (fz * c - fx * s) * std_of(2) : R(0);
    }
    return total(loss) * double(p_.metres) * p_.metres / controlled_;  // behind a barrier: g is written
  }

  // The smallest change of the root's steps that meets its targets; then every other controlled joint is where it should.
  __device__ void project() {
    __syncthreads();
    const int t = threadIdx.x;
    R c, s, px, pz, rx, rz;
    path(x_, c, s, px, pz, rx, rz);
    m_.rows[0][t] = c;
    m_.rows[1][t] = s;
    m_.rows[2][t] = rx;
    m_.rows[3][t] = rz;
    m_.moved[0][t] = m_.moved[1][t] = 0;
    __syncthreads();
    if (t == 0 && root_ >= 0) move_root();
    __syncthreads();
    if (t >= frames_) return;
    for (int64_t k = 0; k < p_.k; ++k) {
      const int64_t j = joint(k);
      if (j <= 0 || mask_[k * w_ + t] == 0) continue;
      const R* to = target_ + 3 * k * w_ + t;
      R* rho = x_ + (4 + 3 * k) * w_ + t;
      const int64_t f = 4 + 3 * (j - 1);
      const R ex = to[0] - rx - m_.moved[0][t], ez = to[2 * w_] - rz - m_.moved[1][t];
      rho[0] = (ex * c + ez * s - mean_of(f)) / std_of(f);
      rho[w_] = (to[w_] - mean_of(f + 1)) / std_of(f + 1);
      rho[2 * w_] = (ez * c - ex * s - mean_of(f + 2)) / std_of(f + 2);
    }
  }

  // The active values back into x0.
  __device__ void save(const R* v) {
    __syncthreads();
    for (int64_t i = 0; i < n_ / w_; ++i) {
      const int64_t f = feature(i);
      if (f >= 0 && int(threadIdx.x) < frames_)
        p_.x0[(b_ * p_.t + threadIdx.x) * p_.ldx0 + f] = float(v[i * w_ + threadIdx.x]);
    }
  }

 private:
  __device__ int64_t joint(int64_t k) const { return p_.joints[b_ * p_.k + k]; }
  __device__ R mean_of(int64_t f) const { return R(p_.mean[f]); }
  __device__ R std_of(int64_t f) const { return R(p_.std[f]); }
  __device__ int64_t feature(int64_t i) const {
    if (i < 4) return i;
    const int64_t j = joint((i - 4) / 3);
    return j <= 0 ? -1 : 4 + 3 * (j - 1) + (i - 4) % 3;
  }
  __device__ double* turn_sums() {
    side_ ^= 1;
    return m_.sums[side_];
  }
  __device__ double total(double v) {
    for (int d = 16; d; d /= 2) v += __shfl_xor_sync(~0u, v, d);
    double* sums = turn_sums();
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
    __syncthreads();
    double sum = 0;
    for (int i = 0; i < kWarps; ++i) sum += sums[i];
    return sum;
  }
  // Sum over the frames up to and with this thread's.
  __device__ R to_here(R v) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int d = 1; d < 32; d *= 2) {
      const R other = __shfl_up_sync(~0u, v, d);
      if (lane >= d) v += other;
    }
    side_ ^= 1;
    if (lane == 31) m_.warps[side_][warp] = v;
    __syncthreads();
    R before = 0;
    for (int i = 0; i < warp; ++i) before += m_.warps[side_][i];
    return before + v;
  }
  // The same from this thread's frame on.
  __device__ R from_here(R v) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int d = 1; d < 32; d *= 2) {
      const R other = __shfl_down_sync(~0u, v, d);
      if (lane + d < 32) v += other;
    }
    side_ ^= 1;
    if (lane == 0) m_.warps[side_][warp] = v;
    __syncthreads();
    R after = 0;
    for (int i = kWarps - 1; i > warp; --i) after += m_.warps[side_][i];
    return after + v;
  }

  __device__ void path(const R* v, R& c, R& s, R& px, R& pz, R& rx, R& rz) {
    const int t = threadIdx.x;
    const bool moves = t && t < frames_;
    const R yaw = moves ? 2 * (v[t - 1] * std_of(0) + mean_of(0)) : R(0);
    sin_cos(to_here(yaw), &s, &c);
    const R ax = moves ? v[w_ + t - 1] * std_of(1) + mean_of(1) : R(0);
    const R az = moves ? v[2 * w_ + t - 1] * std_of(2) + mean_of(2) : R(0);
    px = ax * c - az * s;
    pz = ax * s + az * c;
    rx = to_here(px);
    rz = to_here(pz);
  }

  // In one thread: a few hundred additions.
  __device__ void move_root() {
    const R *m = mask_ + root_ * w_, *to = target_ + 3 * root_ * w_;
    const R *c = m_.rows[0], *s = m_.rows[1], *rx = m_.rows[2], *rz = m_.rows[3];
    int from = 0;
    R dx = 0, dz = 0;
    for (int t = 0; t < frames_; ++t) {
      if (m[t] == 0) continue;
      x_[3 * w_ + t] = (to[w_ + t] - mean_of(3)) / std_of(3);
      if (!t) continue;  // the path begins at the origin
      const R count = R(t - from), ex = (to[t] - rx[t] - dx) / count, ez = (to[2 * w_ + t] - rz[t] - dz) / count;
      for (int u = from + 1; u <= t; ++u) {
        dx += ex;
        dz += ez;
        m_.moved[0][u] = dx;
        m_.moved[1][u] = dz;
        x_[w_ + u - 1] += (ex * c[u] + ez * s[u]) / std_of(1);
        x_[2 * w_ + u - 1] += (ez * c[u] - ex * s[u]) / std_of(2);
      }
      from = t;
    }
    for (int u = from + 1; u < frames_; ++u) {
      m_.moved[0][u] = dx;
      m_.moved[1][u] = dz;
    }
  }

  __device__ void load() {
    const int t = threadIdx.x;
    for (int64_t i = 0; i < n_ / w_; ++i) {
      const int64_t f = feature(i);
      if (t < w_) x_[i * w_ + t] = f >= 0 && t < frames_ ? R(p_.x0[(b_ * p_.t + t) * p_.ldx0 + f]) : R(0);
    }
    for (int64_t k = 0; k < p_.k; ++k) {
      const int64_t at = (b_ * p_.t + t) * p_.k + k;
      const bool on = joint(k) >= 0 && t < frames_ && p_.mask[at] != 0.f;
      if (t < w_) {
        mask_[k * w_ + t] = on ? R(1) : R(0);
        for (int64_t i = 0; i < 3; ++i) target_[(3 * k + i) * w_ + t] = on ? R(p_.target[3 * at + i]) : R(0);
      }
      const int count = __syncthreads_count(on);
      controlled_ += 3. * count;
      if (!joint(k) && count) root_ = k;
    }
  }

  const GuideParams& p_;
  const int64_t b_, w_, n_;
  Shared<R>& m_;
  R *x_, *arrays_, *target_, *mask_;
  int64_t root_ = -1;
  int frames_, evaluations_ = 0, side_ = 0;
  double controlled_ = 0;
};

template <class R> __global__ void __launch_bounds__(kThreads, 1) guide_kernel(GuideParams p) {
  release_next();
  wait_for_previous();
  const int64_t b = blockIdx.x;
  Block<R> block(p, b, static_cast<R*>(p.ws) + b * guide_values(p.t, p.k),
                 *reinterpret_cast<Shared<R>*>(shared_memory()));
  guide_solve(block, p, p.stats + 4 * b);
}

__global__ void __launch_bounds__(kUpdateThreads) guide_update_kernel(GuideParams p) {
  release_next();
  wait_for_previous();
  const int64_t at = int64_t(blockIdx.x) * kUpdateThreads + threadIdx.x, row = at / p.d, c = at % p.d;
  if (row >= p.batch * p.t || (p.frames && row % p.t >= p.frames[row / p.t])) return;
  float next = p.a * p.x0[row * p.ldx0 + c];
  if (p.b != 0.f) next = fmaf(p.b, p.x[row * p.ldx + c], next);  // 0 drops x, whatever it holds
  if (p.noise) next = fmaf(p.sigma, p.noise[at], next);
  p.x[row * p.ldx + c] = next;
}

__global__ void __launch_bounds__(kThreads) guide_joints_kernel(GuideJointsParams p) {
  release_next();
  wait_for_previous();
  __shared__ double warps[3][kWarps];
  const int64_t b = blockIdx.x, t = threadIdx.x, frames = p.frames ? p.frames[b] : p.t;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float* x = p.x + (b * p.t + t) * p.ldx;
  const bool live = t < p.t && t < frames, moves = live && t > 0;
  const auto scan = [&](double v, double* sums) {
    for (int d = 1; d < 32; d *= 2) {
      const double other = __shfl_up_sync(~0u, v, d);
      if (lane >= d) v += other;
    }
    if (lane == 31) sums[warp] = v;
    __syncthreads();
    double before = 0;
    for (int i = 0; i < warp; ++i) before += sums[i];
    return before + v;
  };
  const float* last = x - p.ldx;
  const auto value = [&](const float* row, int64_t f) { return row[f] * p.std[f] + p.mean[f]; };
  const double phi = scan(moves ? 2. * value(last, 0) : 0., warps[0]);
  double sine, cosine;
  sin_cos(phi, &sine, &cosine);
  const double vx = moves ? value(last, 1) : 0., vz = moves ? value(last, 2) : 0.;
  const float rx = float(scan(vx * cosine - vz * sine, warps[1])), rz = float(scan(vx * sine + vz * cosine, warps[2]));
  if (t >= p.t) return;
  float* out = p.out + (b * p.t + t) * p.joints * 3;
  const float c = float(cosine), s = float(sine);
  for (int64_t j = 0; j < p.joints; ++j) {
    float ax = 0.f, ay = 0.f, az = 0.f;
    if (live) {
      const int64_t f = j ? 4 + 3 * (j - 1) : 3;
      ay = value(x, j ? f + 1 : f);
      const float lx = j ? value(x, f) : 0.f, lz = j ? value(x, f + 2) : 0.f;
      ax = lx * c - lz * s + rx;
      az = lx * s + lz * c + rz;
    }
    out[3 * j] = ax;
    out[3 * j + 1] = ay;
    out[3 * j + 2] = az;
  }
}

template <class R> void solve(const GuideParams& p, void* stream) {
  const Launch l = {unsigned(p.batch), kThreads, sizeof(Shared<R>), stream, true};
  launch("guide", guide_kernel<R>, l, p);
}

}  // namespace

void guide(const GuideParams& p, void* stream) {
  if (p.solver != kGuideNone) {
    if (p.precise)
      solve<double>(p, stream);
    else
      solve<float>(p, stream);
  }
  if (!p.x) return;
  const Launch l = {unsigned((p.batch * p.t * p.d + kUpdateThreads - 1) / kUpdateThreads), kUpdateThreads, 0, stream,
                    true};
  launch("guide_update", guide_update_kernel, l, p);
}

void guide_joints(const GuideJointsParams& p, void* stream) {
  const Launch l = {unsigned(p.batch), kThreads, 0, stream, true};
  launch("guide_joints", guide_joints_kernel, l, p);
}

}  // namespace engine::cuda
