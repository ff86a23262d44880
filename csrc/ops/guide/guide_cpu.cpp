// guide: constraint loss of a motion with its gradient in closed form, the solver around it, and the sampler's update
// layout   the solver's values as rows of frames: {yaw, x, z, height}, three per controlled joint, padded to vectors
// mapping  one task per motion: what is left of guidance is a few microseconds per evaluation
// moves    the active rows of x0 twice, x and noise once; the solver stays in L2
// tried    README.md
#include "ops/guide/guide.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "base/simd.h"
#include "ops/guide/angles.h"
#include "ops/guide/lbfgs.h"

namespace engine::cpu::ENGINE_NS {
namespace {

// Plain loops over frames: the compiler makes vectors of them, on every instruction set and in both precisions.
ENGINE_INLINE void sin_cos(double a, double* s, double* c) { *s = std::sin(a), *c = std::cos(a); }
ENGINE_INLINE void sin_cos(float a, float* s, float* c) { heading(a, s, c); }

constexpr int kSums = 16;

template <class R> ENGINE_INLINE double folded(const R* part) {
  double sum = 0;
  for (int j = 0; j < kSums; ++j) sum += double(part[j]);
  return sum;
}
template <class R> ENGINE_INLINE double total(const R* v, int64_t n) {
  R part[kSums] = {};
  for (int64_t i = 0; i < n; i += kSums)
    for (int j = 0; j < kSums; ++j) part[j] += v[i + j];
  return folded(part);
}

// Rows of a motion, a value per frame: heading, the root's step and place; forces on the root from here, on the heading,
// and what each frame adds to the loss.
template <class R> struct Frames {
  R *c, *s, *px, *pz, *rx, *rz, *fx, *fz, *turn, *loss;
  int64_t n;
};
template <class R> struct Targets {
  const R *mask, *at;  // at: rows x, y, z
  R unit;
};
struct Scale {
  const float *std, *mean;
};

// Rows never overlap. As parameters of functions that are not inlined the compiler believes it, and makes vectors.
template <class R> __attribute__((noinline)) void pull_root_rows(int64_t n, const R* __restrict m,
                                                                 const R* __restrict tx, const R* __restrict ty,
                                                                 const R* __restrict tz, const R* __restrict rx,
                                                                 const R* __restrict rz, const R* __restrict y,
                                                                 R* __restrict fx, R* __restrict fz, R* __restrict loss,
                                                                 R* __restrict gy, R unit, R std, R mean) {
  for (int64_t t = 0; t < n; ++t) {
    const R ex = m[t] * (rx[t] - tx[t]), ey = m[t] * (y[t] * std + mean - ty[t]), ez = m[t] * (rz[t] - tz[t]);
    loss[t] += ex * ex + ey * ey + ez * ez;
    fx[t] += unit * ex;
    fz[t] += unit * ez;
    gy[t] += unit * ey * std;
  }
}
template <class R> void pull_root(const Frames<R>& f, const Targets<R>& to, Scale by, const R* y, R* gy) {
  pull_root_rows<R>(f.n, to.mask, to.at, to.at + f.n, to.at + 2 * f.n, f.rx, f.rz, y, f.fx, f.fz, f.loss, gy, to.unit,
                    R(*by.std), R(*by.mean));
}

template <class R>
__attribute__((noinline)) void pull_joint_rows(int64_t n, const R* __restrict c, const R* __restrict s,
                                               const R* __restrict rx, const R* __restrict rz, const R* __restrict m,
                                               const R* __restrict to, const R* __restrict rho, const R* std,
                                               const R* mean, R unit, R* __restrict fx, R* __restrict fz,
                                               R* __restrict turn, R* __restrict loss, R* __restrict g) {
  const R sx = std[0], sy = std[1], sz = std[2], mx = mean[0], my = mean[1], mz = mean[2];
  for (int64_t t = 0; t < n; ++t) {
    const R ax = rho[t] * sx + mx, az = rho[2 * n + t] * sz + mz;
    const R lx = ax * c[t] - az * s[t], lz = ax * s[t] + az * c[t];
    const R ex = m[t] * (lx + rx[t] - to[t]), ey = m[t] * (rho[n + t] * sy + my - to[n + t]),
            ez = m[t] * (lz + rz[t] - to[2 * n + t]);
    loss[t] += ex * ex + ey * ey + ez * ez;
    const R gx = unit * ex, gz = unit * ez;
    fx[t] += gx;
    fz[t] += gz;
    turn[t] += lx * gz - lz * gx;
    g[t] = (gx * c[t] + gz * s[t]) * sx;
    g[n + t] = unit * ey * sy;
    g[2 * n + t] = (gz * c[t] - gx * s[t]) * sz;
  }
}
template <class R> void pull_joint(const Frames<R>& f, const Targets<R>& to, Scale by, const R* rho, R* g) {
  const R std[3] = {R(by.std[0]), R(by.std[1]), R(by.std[2])};
  const R mean[3] = {R(by.mean[0]), R(by.mean[1]), R(by.mean[2])};
  pull_joint_rows<R>(f.n, f.c, f.s, f.rx, f.rz, to.mask, to.at, rho, std, mean, to.unit, f.fx, f.fz, f.turn, f.loss, g);
}

template <class R>
__attribute__((noinline)) void headings(int64_t n, const R* __restrict phi, R* __restrict s, R* __restrict c) {
  for (int64_t t = 0; t < n; ++t) sin_cos(phi[t], &s[t], &c[t]);
}

template <class R> __attribute__((noinline)) void add_scaled(int64_t n, R a, const R* __restrict x, R b,
                                                             const R* __restrict y, R* __restrict out, bool fresh) {
  if (fresh)
    for (int64_t i = 0; i < n; ++i) out[i] = a * x[i];
  else
    for (int64_t i = 0; i < n; ++i) out[i] += a * x[i] + b * y[i];
}

// What frame t + 1 feels goes to row t, which leads to it. Behind the last frame nothing is felt: the sums are zero.
template <class R> __attribute__((noinline)) void spread_forces(int64_t n, const R* __restrict c, const R* __restrict s,
                                                                const R* __restrict px, const R* __restrict pz,
                                                                const R* __restrict sx, const R* __restrict sz,
                                                                R* __restrict turn, R* __restrict gx, R* __restrict gz,
                                                                R std_x, R std_z) {
  for (int64_t t = 0; t < n; ++t) turn[t] = 2 * (turn[t] + px[t] * sz[t] - pz[t] * sx[t]);
  for (int64_t t = 0; t < n - 1; ++t) {
    gx[t] = (sx[t + 1] * c[t + 1] + sz[t + 1] * s[t + 1]) * std_x;
    gz[t] = (sz[t + 1] * c[t + 1] - sx[t + 1] * s[t + 1]) * std_z;
  }
  gx[n - 1] = gz[n - 1] = 0;
}

// Running sums, from the first value on or from the last; n is a multiple of kSums. An addition waits for the one before:
// eight stretches at once, then their beginnings.
constexpr int kStretches = 8;
template <class R, bool kFromEnd>
__attribute__((noinline)) void running_sums(int64_t n, const R* __restrict in, R* __restrict out) {
  const int64_t length = n / kStretches;
  R sum[kStretches] = {};
  for (int64_t i = 0; i < length; ++i)
    for (int j = 0; j < kStretches; ++j) {
      const int64_t at = j * length + (kFromEnd ? length - 1 - i : i);
      out[at] = sum[j] += in[at];
    }
  R before = 0;
  for (int k = 0; k < kStretches; ++k) {
    const int j = kFromEnd ? kStretches - 1 - k : k;
    for (int64_t i = 0; i < length; ++i) out[j * length + i] += before;
    before += sum[j];
  }
}
#if ENGINE_ISA == ENGINE_ISA_AVX512
// A vector at a time: four doublings inside it, and what came before on top.
template <bool kFromEnd> ENGINE_INLINE void vector_sums(int64_t n, const float* __restrict in, float* __restrict out) {
  const auto moved = [](__m512 v, auto lanes) {
    const __m512i x = _mm512_castps_si512(v), none = _mm512_setzero_si512();
    constexpr int by = decltype(lanes)::value;
    return _mm512_castsi512_ps(kFromEnd ? _mm512_alignr_epi32(none, x, by) : _mm512_alignr_epi32(x, none, 16 - by));
  };
  const __m512i last = _mm512_set1_epi32(kFromEnd ? 0 : 15);
  __m512 before = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 16) {
    const int64_t at = kFromEnd ? n - 16 - i : i;
    __m512 v = _mm512_loadu_ps(in + at);
    v = _mm512_add_ps(v, moved(v, std::integral_constant<int, 1>()));
    v = _mm512_add_ps(v, moved(v, std::integral_constant<int, 2>()));
    v = _mm512_add_ps(v, moved(v, std::integral_constant<int, 4>()));
    v = _mm512_add_ps(v, moved(v, std::integral_constant<int, 8>()));
    _mm512_storeu_ps(out + at, _mm512_add_ps(v, before));
    before = _mm512_add_ps(before, _mm512_permutexvar_ps(last, v));
  }
}
template <> void running_sums<float, false>(int64_t n, const float* __restrict in, float* __restrict out) {
  vector_sums<false>(n, in, out);
}
template <> void running_sums<float, true>(int64_t n, const float* __restrict in, float* __restrict out) {
  vector_sums<true>(n, in, out);
}
#endif

// One motion and one thread; n is a multiple of kSums.
template <class R> class Solo {
 public:
  using real = R;

  Solo(const GuideParams& p, int64_t b, R* memory) : p_(p), b_(b), w_(guide_width(p.t)), n_(guide_size(p.t, p.k)) {
    frames_ = p.frames ? imin(imax(p.frames[b], 0), p.t) : p.t;
    x_ = memory;
    arrays_ = x_ + n_;
    target_ = arrays_ + n_ * (2 + kGuideGradients + 2 * (kGuideMaxHistory + 1));
    mask_ = target_ + 3 * p.k * w_;
    rows_ = mask_ + p.k * w_;
    load();
  }

  int64_t n() const { return n_; }
  R* x() { return x_; }
  R* arrays() { return arrays_; }
  LbfgsMemory& memory() { return memory_; }
  double controlled() const { return controlled_; }
  bool root() const { return root_ >= 0; }
  int64_t evaluations() const { return evaluations_; }

  template <class F> void each(F f) {
    for (int64_t i = 0; i < n_; ++i) f(i);
  }
  template <class F> void once(F f) { f(); }
  double dot(const R* a, const R* b) const {
    R part[kSums] = {};
    for (int64_t i = 0; i < n_; i += kSums)
      for (int j = 0; j < kSums; ++j) part[j] += a[i + j] * b[i + j];
    return folded(part);
  }
  template <class F> void products(int count, F pair, const R* y, const R* g, double* out) const {
    for (int k = 0; k < count; ++k) {
      const R *s = pair(k), *t = s + n_;
      R sy[kSums] = {}, ty[kSums] = {}, sg[kSums] = {}, tg[kSums] = {};
      for (int64_t i = 0; i < n_; i += kSums)
        for (int j = 0; j < kSums; ++j) {
          sy[j] += s[i + j] * y[i + j];
          ty[j] += t[i + j] * y[i + j];
          sg[j] += s[i + j] * g[i + j];
          tg[j] += t[i + j] * g[i + j];
        }
      out[4 * k] = folded(sy), out[4 * k + 1] = folded(ty), out[4 * k + 2] = folded(sg), out[4 * k + 3] = folded(tg);
    }
  }
  template <class F> void combine(int count, F pair, const R* g, R* d) const {
    add_scaled<R>(n_, R(memory_.of_g), g, R(0), g, d, true);
    for (int j = 0; j < count; ++j)
      add_scaled<R>(n_, R(memory_.of_s[j]), pair(j), R(memory_.of_y[j]), pair(j) + n_, d, false);
  }
  double abs_max(const R* v) {
    R part[kSums] = {};
    for (int64_t i = 0; i < n_; i += kSums)
      for (int j = 0; j < kSums; ++j) part[j] = part[j] < std::fabs(v[i + j]) ? std::fabs(v[i + j]) : part[j];
    R most = 0;
    for (int j = 0; j < kSums; ++j) most = part[j] > most ? part[j] : most;
    return double(most);
  }
  double abs_sum(const R* v) {
    R part[kSums] = {};
    for (int64_t i = 0; i < n_; i += kSums)
      for (int j = 0; j < kSums; ++j) part[j] += std::fabs(v[i + j]);
    return folded(part);
  }

  // Loss and gradient at v; in guide.h's words, with S_t the sum of the root's forces from t on.
  double evaluate(const R* v, R* g) {
    ++evaluations_;
    path(v);
    const Frames<R> f = {row(0), row(1), row(2), row(3), row(4), row(5), row(6), row(7), row(8), row(9), w_};
    R *c = f.c, *s = f.s, *px = f.px, *pz = f.pz, *fx = f.fx, *fz = f.fz, *turn = f.turn;
    const R unit = R(2 * double(p_.metres) * p_.metres / controlled_);
    for (int64_t t = 0; t < w_; ++t) fx[t] = fz[t] = turn[t] = f.loss[t] = 0;
    std::fill_n(g + 3 * w_, w_, R(0));
    for (int64_t k = 0; k < p_.k; ++k) {
      if (joint(k) <= 0) std::fill_n(g + (4 + 3 * k) * w_, 3 * w_, R(0));
      if (joint(k) < 0) continue;
      const int64_t at = joint(k) ? 4 + 3 * (joint(k) - 1) : 3;
      const Targets<R> to = {mask_ + k * w_, target_ + 3 * k * w_, unit};
      if (joint(k))
        pull_joint(f, to, {p_.std + at, p_.mean + at}, v + (4 + 3 * k) * w_, g + (4 + 3 * k) * w_);
      else
        pull_root(f, to, {p_.std + at, p_.mean + at}, v + 3 * w_, g + 3 * w_);
    }
    R *sx = row(10), *sz = row(11), *yaw = g, *gx = g + w_, *gz = g + 2 * w_;
    running_sums<R, true>(w_, fx, sx);
    running_sums<R, true>(w_, fz, sz);
    spread_forces<R>(w_, c, s, px, pz, sx, sz, turn, gx, gz, std_of(1), std_of(2));
    running_sums<R, true>(w_, turn, fx);
    const R s0 = std_of(0);
    for (int64_t t = 0; t < w_ - 1; ++t) yaw[t] = fx[t + 1] * s0;
    yaw[w_ - 1] = 0;
    return total(f.loss, w_) * double(p_.metres) * p_.metres / controlled_;
  }

  // The smallest change of the root's steps that meets its targets; then every other controlled joint is where it should.
  void project() {
    R* x = x_;
    path(x);
    R *c = row(0), *s = row(1), *rx = row(4), *rz = row(5), *shift_x = row(6), *shift_z = row(7);
    for (int64_t t = 0; t < w_; ++t) shift_x[t] = shift_z[t] = 0;
    if (root_ >= 0) {
      const R *m = mask_ + root_ * w_, *to = target_ + 3 * root_ * w_;
      int64_t from = 0;
      R dx = 0, dz = 0;  // already made up for at `from`
      for (int64_t t = 0; t < frames_; ++t) {
        if (m[t] == 0) continue;
        x[3 * w_ + t] = (to[w_ + t] - mean_of(3)) / std_of(3);
        if (!t) continue;  // the path begins at the origin
        const R count = R(t - from), ex = (to[t] - rx[t] - dx) / count, ez = (to[2 * w_ + t] - rz[t] - dz) / count;
        for (int64_t u = from + 1; u <= t; ++u) {
          dx += ex, dz += ez;
          shift_x[u] = dx, shift_z[u] = dz;
          x[w_ + u - 1] += (ex * c[u] + ez * s[u]) / std_of(1);
          x[2 * w_ + u - 1] += (ez * c[u] - ex * s[u]) / std_of(2);
        }
        from = t;
      }
      for (int64_t u = from + 1; u < frames_; ++u) shift_x[u] = dx, shift_z[u] = dz;
    }
    for (int64_t k = 0; k < p_.k; ++k) {
      if (joint(k) <= 0) continue;
      const R *m = mask_ + k * w_, *to = target_ + 3 * k * w_;
      R* rho = x + (4 + 3 * k) * w_;
      const int64_t f = 4 + 3 * (joint(k) - 1);
      for (int64_t t = 0; t < frames_; ++t) {
        if (m[t] == 0) continue;
        const R ex = to[t] - rx[t] - shift_x[t], ez = to[2 * w_ + t] - rz[t] - shift_z[t];
        rho[t] = (ex * c[t] + ez * s[t] - mean_of(f)) / std_of(f);
        rho[w_ + t] = (to[w_ + t] - mean_of(f + 1)) / std_of(f + 1);
        rho[2 * w_ + t] = (ez * c[t] - ex * s[t] - mean_of(f + 2)) / std_of(f + 2);
      }
    }
  }

  // The active values back into x0.
  void save(const R* v) {
    for (int64_t i = 0; i < n_ / w_; ++i) {
      const int64_t f = feature(i);
      if (f < 0) continue;
      float* to = p_.x0 + b_ * p_.t * p_.ldx0 + f;
      for (int64_t t = 0; t < frames_; ++t) to[t * p_.ldx0] = float(v[i * w_ + t]);
    }
  }

 private:
  int64_t joint(int64_t k) const { return p_.joints[b_ * p_.k + k]; }
  R mean_of(int64_t f) const { return R(p_.mean[f]); }
  R std_of(int64_t f) const { return R(p_.std[f]); }
  R* row(int64_t i) { return rows_ + i * w_; }
  // The feature that row i of the values holds; -1: none.
  int64_t feature(int64_t i) const {
    if (i < 4) return i;
    const int64_t j = joint((i - 4) / 3);
    return j <= 0 ? -1 : 4 + 3 * (j - 1) + (i - 4) % 3;
  }

  void load() {
    controlled_ = 0;
    root_ = -1;
    for (int64_t i = 0; i < n_ / w_; ++i) {
      const int64_t f = feature(i);
      const float* from = p_.x0 + b_ * p_.t * p_.ldx0 + (f < 0 ? 0 : f);
      for (int64_t t = 0; t < w_; ++t) x_[i * w_ + t] = f >= 0 && t < frames_ ? R(from[t * p_.ldx0]) : R(0);
    }
    for (int64_t k = 0; k < p_.k; ++k) {
      const bool used = joint(k) >= 0;
      int64_t count = 0;
      for (int64_t t = 0; t < w_; ++t) {
        const int64_t at = (b_ * p_.t + t) * p_.k + k;
        const bool on = used && t < frames_ && p_.mask[at] != 0.f;
        count += on;
        mask_[k * w_ + t] = on;
        for (int64_t i = 0; i < 3; ++i) target_[(3 * k + i) * w_ + t] = on ? R(p_.target[3 * at + i]) : R(0);
      }
      controlled_ += 3 * double(count);
      if (used && !joint(k) && count) root_ = k;
    }
  }

  // Heading and path of the root: cosine, sine, step, position of every frame.
  void path(const R* v) {
    R *c = row(0), *s = row(1), *px = row(2), *pz = row(3), *rx = row(4), *rz = row(5), *phi = row(10), *yaw = row(11);
    const R s0 = std_of(0), m0 = mean_of(0), s1 = std_of(1), m1 = mean_of(1), s2 = std_of(2), m2 = mean_of(2);
    for (int64_t t = 0; t < w_; ++t) yaw[t] = 2 * (v[t] * s0 + m0);
    running_sums<R, false>(w_, yaw, phi);
    s[0] = 0, c[0] = 1;
    headings<R>(w_ - 1, phi, s + 1, c + 1);
    px[0] = pz[0] = 0;
    for (int64_t t = 1; t < w_; ++t) {
      const R ax = v[w_ + t - 1] * s1 + m1, az = v[2 * w_ + t - 1] * s2 + m2;
      px[t] = ax * c[t] - az * s[t];
      pz[t] = ax * s[t] + az * c[t];
    }
    running_sums<R, false>(w_, px, rx);
    running_sums<R, false>(w_, pz, rz);
  }

  const GuideParams& p_;
  int64_t b_, w_, n_, frames_, root_ = -1, evaluations_ = 0;
  double controlled_ = 0;
  R *x_, *arrays_, *target_, *mask_, *rows_;
  LbfgsMemory memory_;
};

template <class R> void solve(const GuideParams& p, int64_t b) {
  Solo<R> solo(p, b, static_cast<R*>(p.ws) + b * guide_values(p.t, p.k));
  guide_solve(solo, p, p.stats + 4 * b);
}

}  // namespace

void guide(const GuideParams& p, Ctx& ctx) {
  for (int64_t b; (b = claim(ctx)) < p.batch;) {
    if (p.solver != kGuideNone) {
      if (p.precise)
        solve<double>(p, b);
      else
        solve<float>(p, b);
    }
    if (!p.x) continue;
    const int64_t frames = p.frames ? imin(p.frames[b], p.t) : p.t;
    for (int64_t t = 0; t < frames; ++t) {
      const int64_t row = b * p.t + t;
      const float *x0 = p.x0 + row * p.ldx0, *noise = p.noise ? p.noise + row * p.d : nullptr;
      float* x = p.x + row * p.ldx;
      for (int64_t i = 0; i < p.d; i += 16) {
        const int64_t n = p.d - i;
        // b = 0 drops x, whatever it holds.
        F16 next = mul(set1(p.a), loadn(x0 + i, n));
        if (p.b != 0.f) next = fma(set1(p.b), loadn(x + i, n), next);
        if (noise) next = fma(set1(p.sigma), loadn(noise + i, n), next);
        storen(x + i, next, n);
      }
    }
  }
}

void guide_joints(const GuideJointsParams& p, Ctx& ctx) {
  for (int64_t b; (b = claim(ctx)) < p.batch;) {
    const int64_t frames = p.frames ? imin(imax(p.frames[b], 0), p.t) : p.t;
    const auto value = [&](int64_t t, int64_t f) { return p.x[(b * p.t + t) * p.ldx + f] * p.std[f] + p.mean[f]; };
    double phi = 0, rx = 0, rz = 0;
    for (int64_t t = 0; t < p.t; ++t) {
      float* out = p.out + (b * p.t + t) * p.joints * 3;
      if (t >= frames) {
        for (int64_t i = 0; i < 3 * p.joints; ++i) out[i] = 0.f;
        continue;
      }
      if (t) phi += 2. * value(t - 1, 0);
      const double cosine = std::cos(phi), sine = std::sin(phi);
      if (t) {
        const double vx = value(t - 1, 1), vz = value(t - 1, 2);
        rx += vx * cosine - vz * sine;
        rz += vx * sine + vz * cosine;
      }
      const float c = float(cosine), s = float(sine);
      out[0] = float(rx), out[1] = value(t, 3), out[2] = float(rz);
      for (int64_t j = 1; j < p.joints; ++j) {
        const int64_t f = 4 + 3 * (j - 1);
        const float ax = value(t, f), az = value(t, f + 2);
        out[3 * j] = ax * c - az * s + float(rx);
        out[3 * j + 1] = value(t, f + 1);
        out[3 * j + 2] = ax * s + az * c + float(rz);
      }
    }
  }
}

}  // namespace engine::cpu::ENGINE_NS
