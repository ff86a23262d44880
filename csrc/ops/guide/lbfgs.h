// One L-BFGS for all backends: torch.optim.LBFGS with line_search_fn="strong_wolfe" (2.13), step for step. Vectors belong to
// a team (a thread on a CPU, a block on CUDA); scalars are fp64 and the same in every thread of it.
//
// Team: real; n(); each(f): f(i) for every i; dot(a, b), abs_max(v), abs_sum(v); products(count, pair, y, g, out): of
//   s = pair(j) and t = s + n(), out[4 j ...] = {s.y, t.y, s.g, t.g}; combine(count, pair, g, d): d = of_g g +
//   sum of_s[j] s + of_y[j] t, by the memory; evaluate(x, g): loss and gradient; once(f): f in one thread, seen by all;
//   memory(): LbfgsMemory of the team.
// The two-loop recursion runs on inner products: one round of them per iteration instead of two for every pair.
#pragma once
#include <cmath>

#include "ops/guide/guide.h"

#if defined(__CUDACC__)
#define ENGINE_MEMBER __device__ __forceinline__
#else
#define ENGINE_MEMBER inline
#endif

namespace engine {

constexpr int kLbfgsSlots = int(kGuideMaxHistory) + 1;  // one holds the pair that may be taken in

struct LbfgsMemory {
  double sy[kLbfgsSlots][kLbfgsSlots];  // s_i . y_j, j not older than i
  double yy[kLbfgsSlots][kLbfgsSlots];
  double found[4 * kLbfgsSlots];
  double al[kLbfgsSlots];
  double of_s[kLbfgsSlots], of_y[kLbfgsSlots], of_g;  // of the direction
};

struct LbfgsOptions {
  int max_iter, history;
  ENGINE_MEMBER int max_eval() const { return max_iter * 5 / 4; }
};

constexpr double kLbfgsFlat = 1e-7;     // of the gradient
constexpr double kLbfgsChange = 1e-9;   // of parameters and loss
constexpr double kLbfgsCurved = 1e-10;  // of a pair that is taken in

ENGINE_HD double lbfgs_min(double a, double b) { return b < a ? b : a; }
ENGINE_HD double lbfgs_max(double a, double b) { return b > a ? b : a; }

// The minimum of the cubic through two points with slopes, inside bounds.
ENGINE_HD double lbfgs_cubic(double x1, double f1, double g1, double x2, double f2, double g2, double low,
                             double high) {
  const double d1 = g1 + g2 - 3 * (f1 - f2) / (x1 - x2), square = d1 * d1 - g1 * g2;
  if (!(square >= 0)) return (low + high) / 2;
  const double d2 = sqrt(square);
  const double at = x1 <= x2 ? x2 - (x2 - x1) * ((g2 + d2 - d1) / (g2 - g1 + 2 * d2))
                             : x1 - (x1 - x2) * ((g1 + d2 - d1) / (g1 - g2 + 2 * d2));
  return lbfgs_min(lbfgs_max(at, low), high);
}

template <class Team> class Lbfgs {
 public:
  using R = typename Team::real;

  // x is improved in place; `arrays`: 2 + kGuideGradients + 2 kLbfgsSlots arrays of team.n() values.
  ENGINE_MEMBER Lbfgs(Team& team, LbfgsOptions options, R* x, R* arrays)
      : team_(team),
        options_(options),
        x_(x),
        trial_(arrays),
        d_(arrays + team.n()),
        gradients_(arrays + 2 * team.n()),
        pairs_(gradients_ + kGuideGradients * team.n()) {}

  // As LBFGS.step(): what was learned stays for the next one.
  ENGINE_MEMBER void step() {
    int g = spare(previous_, -1, -1);
    double loss = team_.evaluate(x_, gradient(g));
    int evaluations = 1;
    if (!iterations_) first_loss_ = loss;
    loss_ = loss;
    if (team_.abs_max(gradient(g)) <= kLbfgsFlat) return;
    for (int i = 1; i <= options_.max_iter; ++i) {
      ++iterations_;
      direction(g);
      previous_ = g;
      const double before = loss;
      t_ = iterations_ == 1 ? lbfgs_min(1., 1. / team_.abs_sum(gradient(g))) : 1.;
      const double slope = team_.dot(gradient(g), d_);
      if (slope > -kLbfgsChange) break;
      const double reach = team_.abs_max(d_);
      evaluations += search(options_.max_eval() - evaluations, slope, reach, loss, g);
      const R t = R(t_);
      R *x = x_, *d = d_;
      team_.each([=](int64_t at) { x[at] += t * d[at]; });
      loss_ = loss;
      if (i == options_.max_iter || evaluations >= options_.max_eval()) break;
      if (team_.abs_max(gradient(g)) <= kLbfgsFlat) break;
      if (reach * fabs(t_) <= kLbfgsChange || fabs(loss - before) < kLbfgsChange) break;
    }
  }

  ENGINE_MEMBER double first_loss() const { return first_loss_; }
  ENGINE_MEMBER double loss() const { return loss_; }

 private:
  ENGINE_MEMBER R* gradient(int i) { return gradients_ + i * team_.n(); }
  ENGINE_MEMBER R* s(int slot) { return pairs_ + 2 * slot * team_.n(); }
  ENGINE_MEMBER R* y(int slot) { return s(slot) + team_.n(); }
  ENGINE_MEMBER int slot(int i) const { return (oldest_ + i) % kLbfgsSlots; }

  // A gradient's place that none of these use.
  ENGINE_MEMBER static int spare(int a, int b, int c) {
    int i = 0;
    while (i == a || i == b || i == c) ++i;
    return i;
  }

  // d = -H g, after the pair of the last move has been taken in.
  ENGINE_MEMBER void direction(int g) {
    const R* now = gradient(g);
    R* d = d_;
    if (iterations_ == 1) {
      team_.each([=](int64_t at) { d[at] = -now[at]; });
      return;
    }
    const int fresh = slot(count_), known = count_ + 1;
    const R *last = gradient(previous_), t = R(t_);
    R *sf = s(fresh), *yf = y(fresh);
    team_.each([=](int64_t at) {
      yf[at] = now[at] - last[at];
      sf[at] = d[at] * t;
    });
    LbfgsMemory& m = team_.memory();
    const R* pairs = pairs_;
    const int64_t n = team_.n();
    const int oldest = oldest_;
    // Of every pair, the fresh one last: s.y', y.y', s.g, y.g.
    team_.products(known, [=](int j) { return pairs + 2 * ((oldest + j) % kLbfgsSlots) * n; }, yf, now, m.found);
    const double curved = m.found[4 * count_];
    const bool taken = curved > kLbfgsCurved;
    if (taken) {
      diagonal_ = curved / m.found[4 * count_ + 1];
      if (count_ == options_.history)
        oldest_ = slot(1);
      else
        ++count_;
    }
    const int first = taken && known > count_ ? 1 : 0;  // found[] counts from the pair that was oldest
    team_.once([&] {
      for (int j = 0; j < known; ++j) {
        const int at = (fresh + kLbfgsSlots - (known - 1 - j)) % kLbfgsSlots;
        m.sy[at][fresh] = m.found[4 * j];
        m.yy[fresh][at] = m.yy[at][fresh] = m.found[4 * j + 1];
      }
      const double *sg = m.found + 4 * first + 2, *yg = sg + 1;
      double* al = m.al;
      for (int i = count_ - 1; i >= 0; --i) {
        double sq = -sg[4 * i];
        for (int j = count_ - 1; j > i; --j) sq -= al[j] * m.sy[slot(i)][slot(j)];
        al[i] = sq / m.sy[slot(i)][slot(i)];
      }
      m.of_g = -diagonal_;
      for (int i = 0; i < count_; ++i) m.of_y[i] = -diagonal_ * al[i];
      for (int i = 0; i < count_; ++i) {
        double yr = m.of_g * yg[4 * i];
        for (int j = 0; j < count_; ++j) yr += m.of_y[j] * m.yy[slot(i)][slot(j)];
        for (int j = 0; j < i; ++j) yr += m.of_s[j] * m.sy[slot(j)][slot(i)];
        m.of_s[i] = al[i] - yr / m.sy[slot(i)][slot(i)];
      }
    });
    const int from = oldest_;
    team_.combine(count_, [=](int j) { return pairs + 2 * ((from + j) % kLbfgsSlots) * n; }, now, d);
  }

  // Loss and gradient at x + t d, and the slope there.
  ENGINE_MEMBER double probe(double t, int into, double& slope) {
    const R *x = x_, *d = d_, step = R(t);
    R* trial = trial_;
    team_.each([=](int64_t at) { trial[at] = x[at] + step * d[at]; });
    const double loss = team_.evaluate(trial_, gradient(into));
    slope = team_.dot(gradient(into), d_);
    return loss;
  }

  struct Point {
    double t, loss, slope;
    int g;
  };

  // Strong Wolfe conditions, c1 = 1e-4, c2 = 0.9, by bracketing and zooming; sets t_, loss and g; returns evaluations.
  ENGINE_MEMBER int search(int most, double slope, double reach, double& loss, int& g) {
    const double f0 = loss;
    const Point start = {0, f0, slope, g};
    Point before = start, now = {t_, 0, 0, spare(g, -1, -1)};
    now.loss = probe(now.t, now.g, now.slope);
    int tried = 0, evaluations = 1;
    Point low = start, high = start;
    bool done = false, bracketed = false;
    while (tried < most) {
      if (now.loss > f0 + 1e-4 * now.t * slope || (tried > 1 && now.loss >= before.loss)) {
        low = before, high = now, bracketed = true;
        break;
      }
      if (fabs(now.slope) <= -0.9 * slope) {
        low = now, done = true;
        break;
      }
      if (now.slope >= 0) {
        low = before, high = now, bracketed = true;
        break;
      }
      const double t = lbfgs_cubic(before.t, before.loss, before.slope, now.t, now.loss, now.slope,
                                   now.t + 0.01 * (now.t - before.t), now.t * 10);
      before = now;
      now = {t, 0, 0, spare(g, before.g, -1)};
      now.loss = probe(now.t, now.g, now.slope);
      ++evaluations;
      ++tried;
    }
    if (!done && !bracketed) low = start, high = now;  // all evaluations are spent
    // Ends keep their places: of equal losses, the first is the low one.
    Point one = low, two = done ? low : high;
    bool first = one.loss <= two.loss, stuck = false;
    while (!done && tried < most) {
      if (fabs(two.t - one.t) * reach < kLbfgsChange) break;
      const double left = lbfgs_min(one.t, two.t), right = lbfgs_max(one.t, two.t), margin = 0.1 * (right - left);
      double t = lbfgs_cubic(one.t, one.loss, one.slope, two.t, two.loss, two.slope, left, right);
      if (lbfgs_min(right - t, t - left) < margin) {
        if (stuck || t >= right || t <= left) {
          t = fabs(t - right) < fabs(t - left) ? right - margin : left + margin;
          stuck = false;
        } else {
          stuck = true;
        }
      } else {
        stuck = false;
      }
      now = {t, 0, 0, spare(g, one.g, two.g)};
      now.loss = probe(now.t, now.g, now.slope);
      ++evaluations;
      ++tried;
      Point best = first ? one : two, other = first ? two : one;
      if (now.loss > f0 + 1e-4 * now.t * slope || now.loss >= best.loss) {
        if (first)
          two = now;
        else
          one = now;
        first = one.loss <= two.loss;
        continue;
      }
      if (fabs(now.slope) <= -0.9 * slope)
        done = true;
      else if (now.slope * (other.t - best.t) >= 0)
        other = best;
      best = now;
      one = first ? best : other, two = first ? other : best;
    }
    const Point best = first ? one : two;
    t_ = best.t, loss = best.loss, g = best.g;
    return evaluations;
  }

  Team& team_;
  LbfgsOptions options_;
  R *x_, *trial_, *d_, *gradients_, *pairs_;
  int iterations_ = 0, count_ = 0, oldest_ = 0, previous_ = -1;
  double t_ = 0, diagonal_ = 1, first_loss_ = 0, loss_ = 0;
};

// What guide does with one motion. Team also: x(), arrays(): places for Lbfgs; save(v): into x0; project(); root(): whether
// it is controlled; controlled(), evaluations().
template <class Team> ENGINE_MEMBER void guide_solve(Team& team, const GuideParams& p, float* stats) {
  using R = typename Team::real;
  double before = 0, loss = 0;
  if (team.controlled() > 0) {
    R *x = team.x(), *g = team.arrays() + 2 * team.n();
    if (p.steps && (p.solver == kGuideLbfgs || (p.solver == kGuideProject && !team.root()))) {
      Lbfgs<Team> lbfgs(team, {p.max_iter, p.history}, x, team.arrays());
      for (int32_t i = 0; i < p.steps; ++i) lbfgs.step();
      before = lbfgs.first_loss(), loss = lbfgs.loss();
    } else {
      before = loss = team.evaluate(x, g);
    }
    if (p.solver == kGuideDescent) {
      const R eta = R(p.eta);
      for (int32_t i = 0; i < p.steps; ++i) {
        team.each([=](int64_t at) { x[at] -= eta * g[at]; });
        loss = team.evaluate(x, g);
      }
    }
    if (p.solver == kGuideProject) {
      team.project();
      loss = team.evaluate(x, g);
    }
    team.save(p.solver == kGuideGradient ? g : x);
  }
  team.once([&] {
    stats[0] = float(before);
    stats[1] = float(loss);
    stats[2] = float(team.evaluations());
    stats[3] = float(team.controlled());
  });
}

}  // namespace engine
