// pick: tokens drawn from guided logits by inverse CDF, the least certain masked again
// layout   logits f32, rows may lie apart; a row, its keys and weights lie in the thread's scratch
// mapping  masked: one task per position; thread 0 ranks the scores. next: thread 0
// moves    logits once; a row in L1 is counted about 17 times until the highest are found
// tried    gathering the kept before their exponentials: 67 us instead of 42 (README)
#include "ops/pick/pick.h"

#include <cmath>

#include "base/simd.h"

namespace engine::cpu::ENGINE_NS {
namespace {

constexpr double kKept = 1e5;  // above every probability
// The team's, not a thread's; the pool runs one kernel at a time.
double scores[kPickPositions];

struct Row {            // in scratch, up to whole vectors
  float l[kPickCodes];  // -inf behind the last
  int32_t key[kPickCodes];
  float weight[kPickCodes];
  double sum[kPickCodes / 16];  // of sixteen weights
};

// Signed keys in the order of the floats.
ENGINE_INLINE int32_t key_of(float f) {
  const int32_t i = int32_t(f32_to_bits(f));
  return i ^ ((i >> 31) & 0x7fffffff);
}

// Guided logits of a row; returns the largest.
ENGINE_INLINE float read_row(const float* c, const float* u, float scale, int64_t k, Row& r) {
  const F16 w = set1(scale);
  F16 top = set1(-INFINITY);
  for (int64_t i = 0; i < k; i += 16) {
    F16 v = loadn(c + i, k - i);
    if (u) {
      const F16 other = loadn(u + i, k - i);
      v = fma(w, sub(v, other), other);
    }
    store(r.l + i, add(v, zero()));  // -0 is 0
    for (int64_t j = k - i; j < 16; ++j) r.l[i + j] = -INFINITY;
    top = max(top, load(r.l + i));
  }
  return reduce_max(top);
}

ENGINE_INLINE int64_t count_from(const int32_t* key, int64_t k, int32_t least) {
  int32_t n = 0;
  for (int64_t i = 0; i < k; ++i) n += key[i] >= least;
  return n;
}

// The key that the topk highest logits reach; of equals that would be too many, the last lose theirs.
ENGINE_INLINE int32_t threshold(Row& r, int64_t k, int64_t topk) {
  for (int64_t i = 0; i < k; ++i) r.key[i] = key_of(r.l[i]);
  if (topk >= k) return INT32_MIN;
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
  if (found == topk) return least;
  int64_t equal = topk - (least == high ? 0 : count_from(r.key, k, least + 1));
  for (int64_t i = 0; i < k; ++i)
    if (r.key[i] == least && equal-- <= 0) r.key[i] = INT32_MIN;
  return least;
}

// In four chains, which are one vector.
ENGINE_INLINE double sum16(const float* w) {
  double sum[4] = {};
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 4; ++j) sum[j] += double(w[i + j]);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

struct Drawn {
  int32_t token;
  double chance;  // softmax of all logits at the token; 0 where none is finite
};

ENGINE_INLINE Drawn draw(Row& r, int64_t k, int64_t topk, float temperature, float uniform, float top) {
  const int32_t least = threshold(r, k, topk);
  double all[16] = {};
  for (int64_t i = 0; i < k; i += 16) {
    const F16 x = sub(load(r.l + i), set1(top)), e = exp(x);
    float share[16];
    store(share, e);
    for (int j = 0; j < 16; ++j) all[j] += double(share[j]);
    store(r.weight + i, temperature == 1.f ? e : exp(div(x, set1(temperature))));
  }
  // exp() of the vectors is never 0.
  for (int64_t i = 0; i < k; ++i) r.weight[i] = (r.key[i] >= least) & (r.l[i] > -INFINITY) ? r.weight[i] : 0.f;
  for (int64_t i = k; i % 16; ++i) r.weight[i] = 0.f;
  double sum = 0;
  for (int64_t i = 0; i < k; i += 16) sum += r.sum[i / 16] = sum16(r.weight + i);
  const double reach = double(uniform) * sum;
  double mass = 0;
  int64_t token = -1, i = 0;
  for (; i < k && !(mass + r.sum[i / 16] > reach); i += 16) mass += r.sum[i / 16];
  for (const int64_t past = imin(i + 16, k); i < past; ++i) {
    if (!(r.weight[i] > 0.f)) continue;
    token = i;  // the last of the sixteen, should rounding end before
    if ((mass += double(r.weight[i])) > reach) break;
  }
  for (i = 0; token < 0; ++i)  // no finite logit
    if (i == k - 1 || count_from(r.key + i + 1, k - i - 1, least) == 0) token = i;
  for (int s = 8; s; s >>= 1)
    for (int j = 0; j < s; ++j) all[j] += all[j + s];
  float own[16];
  store(own, exp(set1(r.l[token] - top)));
  return {int32_t(token), top > -INFINITY ? double(own[0]) / all[0] : 0.};
}

}  // namespace

void pick_masked(const PickMaskedParams& p, Ctx& ctx) {
  static_assert(sizeof(Row) <= kScratchBytes);
  Row& r = *reinterpret_cast<Row*>(ctx.scratch);
  const float scale = p.uncond ? *p.scale : 0.f;
  for (int64_t row; (row = claim(ctx)) < p.n;) {
    scores[row] = kKept;
    if (p.ids[row] != p.mask_id) continue;
    const float top = read_row(p.cond + row * p.ldc, p.uncond ? p.uncond + row * p.ldu : nullptr, scale, p.k, r);
    const Drawn drawn = draw(r, p.k, p.topk, p.temperature, p.uniforms[row], top);
    p.ids[row] = drawn.token;
    scores[row] = drawn.chance;
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
  const float top = read_row(p.cond, p.uncond, p.uncond ? *p.scale : 0.f, k, r);
  const int32_t token = draw(r, k, k, 1.f, p.uniforms[n], top).token;
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
