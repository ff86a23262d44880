// pick: tokens drawn from guided logits by inverse CDF, the least certain masked again
// layout   logits f32, rows may lie apart; a row, its keys and what is kept of it lie in the thread's scratch
// mapping  masked: one task per position; thread 0 ranks the scores. next: thread 0
// moves    logits once; a row in L1 is counted about 17 times until the highest are found
// tried    -
#include "ops/pick/pick.h"

#include <cmath>

#include "base/simd.h"

namespace engine::cpu::ENGINE_NS {
namespace {

constexpr double kKept = 1e5;  // above every probability
// The team's, not a thread's; the pool runs one kernel at a time.
double scores[kPickPositions];

struct Row {            // in scratch
  float l[kPickCodes];  // -inf behind the last, up to whole vectors
  float kept[kPickCodes];
  int32_t key[kPickCodes];
  int32_t at[kPickCodes];  // index of a kept logit
};

// Guided logits of a row; returns the largest.
ENGINE_INLINE float read_row(const float* c, const float* u, float scale, int64_t k, float* l) {
  const F16 w = set1(scale);
  F16 top = set1(-INFINITY);
  for (int64_t i = 0; i < k; i += 16) {
    F16 v = loadn(c + i, k - i);
    if (u) {
      const F16 other = loadn(u + i, k - i);
      v = fma(w, sub(v, other), other);
    }
    store(l + i, add(v, zero()));  // -0 is 0
    for (int64_t j = k - i; j < 16; ++j) l[i + j] = -INFINITY;
    top = max(top, load(l + i));
  }
  return reduce_max(top);
}

// Signed keys in the order of the floats.
ENGINE_INLINE int32_t key_of(float f) {
  const int32_t i = int32_t(f32_to_bits(f));
  return i ^ ((i >> 31) & 0x7fffffff);
}

ENGINE_INLINE int64_t count_from(const int32_t* key, int64_t k, int32_t least) {
  int32_t n = 0;
  for (int64_t i = 0; i < k; ++i) n += key[i] >= least;
  return n;
}

// The indices of the topk highest, in index order; returns how many.
ENGINE_INLINE int64_t keep(Row& r, int64_t k, int64_t topk) {
  if (topk >= k) {
    for (int64_t i = 0; i < k; ++i) r.at[i] = int32_t(i);
    return k;
  }
  for (int64_t i = 0; i < k; ++i) r.key[i] = key_of(r.l[i]);
  int32_t low = r.key[0], high = low;
  for (int64_t i = 1; i < k; ++i) {
    low = r.key[i] < low ? r.key[i] : low;
    high = r.key[i] > high ? r.key[i] : high;
  }
  // At least topk keys reach `from`, fewer reach `past`.
  int64_t from = low, past = int64_t(high) + 1, found = 0;
  while (past - from > 1 && found != topk) {
    const int64_t middle = from + (past - from) / 2;
    found = count_from(r.key, k, int32_t(middle));
    (found >= topk ? from : past) = middle;
  }
  const int32_t least = int32_t(from);
  int64_t equal = found == topk ? k : topk - (least == high ? 0 : count_from(r.key, k, least + 1)), n = 0;
  for (int64_t i = 0; i < k; ++i) {
    const bool same = r.key[i] == least;
    r.at[n] = int32_t(i);
    n += r.key[i] > least || (same && equal > 0);
    equal -= same;
  }
  return n;
}

// One of the n kept indices, in which kept[i] is (l - top) / temperature.
ENGINE_INLINE int32_t draw(Row& r, int64_t n, float uniform) {
  double sum = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const F16 x = loadn(r.kept + i, n - i);
    float w[16];
    store(w, exp(x));
    for (int64_t j = i; j < imin(i + 16, n); ++j) {
      r.kept[j] = r.kept[j] > -INFINITY ? w[j - i] : 0.f;  // exp() of the vectors is never 0
      sum += double(r.kept[j]);
    }
  }
  const double reach = double(uniform) * sum;
  double mass = 0;
  for (int64_t i = 0; i < n; ++i) {
    mass += double(r.kept[i]);
    if (mass > reach) return r.at[i];
  }
  return r.at[n - 1];
}

// exp(l[token] - top) over the sum of the row.
ENGINE_INLINE double chance(const float* l, int64_t k, float top, int32_t token) {
  double sum[16] = {};
  float w[16];
  for (int64_t i = 0; i < k; i += 16) {
    store(w, exp(sub(load(l + i), set1(top))));
    for (int j = 0; j < 16; ++j) sum[j] += double(w[j]);
  }
  for (int s = 8; s; s >>= 1)
    for (int j = 0; j < s; ++j) sum[j] += sum[j + s];
  store(w, exp(set1(l[token] - top)));
  return double(w[0]) / sum[0];
}

}  // namespace

void pick_masked(const PickMaskedParams& p, Ctx& ctx) {
  static_assert(sizeof(Row) <= kScratchBytes);
  Row& r = *reinterpret_cast<Row*>(ctx.scratch);
  const float scale = p.uncond ? *p.scale : 0.f;
  for (int64_t row; (row = claim(ctx)) < p.n;) {
    scores[row] = kKept;
    if (p.ids[row] != p.mask_id) continue;
    const float top = read_row(p.cond + row * p.ldc, p.uncond ? p.uncond + row * p.ldu : nullptr, scale, p.k, r.l);
    const int64_t n = keep(r, p.k, p.topk);
    for (int64_t i = 0; i < n; ++i) r.kept[i] = (r.l[r.at[i]] - top) / p.temperature;
    const int32_t token = draw(r, n, p.uniforms[row]);
    p.ids[row] = token;
    if (p.counts) scores[row] = chance(r.l, p.k, top, token);
  }
  if (!p.counts) return;
  barrier(ctx);
  if (ctx.tid != 0) return;
  for (int64_t i = 0; i < p.n; ++i) {
    if (!(scores[i] < kKept)) continue;
    int64_t rank = 0;
    for (int64_t j = 0; j < p.n; ++j) rank += scores[j] < scores[i] || (scores[j] == scores[i] && j < i);
    if (rank < *p.counts) p.ids[i] = p.mask_id;
  }
}

void pick_next(const PickNextParams& p, Ctx& ctx) {
  if (ctx.tid != 0) return;
  const int64_t n = *p.step, end = p.k - 1;
  if (n < 0 || n >= p.capacity) return;
  Row& r = *reinterpret_cast<Row*>(ctx.scratch);
  const int64_t k = *p.open ? p.k : end;
  const float top = read_row(p.cond, p.uncond, p.uncond ? *p.scale : 0.f, k, r.l);
  keep(r, k, k);
  for (int64_t i = 0; i < k; ++i) r.kept[i] = r.l[i] - top;
  const int32_t token = draw(r, k, p.uniforms[n]);
  const bool done = *p.done || token == end || n >= *p.limit;
  *p.done = done;
  p.tokens[n] = done ? int32_t(p.k) : token;
  *p.step = int32_t(n + 1);
  const int64_t next = imin(n + 1, p.capacity - 1);
  for (int64_t i = 0; i < p.pair; ++i) {
    p.ids[i] = int32_t(imin(token, end - 1));
    p.pos[i] = int32_t(n + 1);
    p.rows[i] = p.rows_table[next * p.pair + i];
  }
}

}  // namespace engine::cpu::ENGINE_NS
