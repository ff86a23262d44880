// sample: penalties, temperature, top-k / top-p / min-p thresholds, Gumbel-max draw
// layout   logits and work [V] f32; per-chunk results in ws, reduced in chunk order
// mapping  chunks of 4096 tokens; thresholds by radix selection on thread 0; draw again in chunks
// moves    logits once, work twice; three passes more for top-k, four more for top-p
// tried    sorting candidates: not needed, a threshold and Gumbel-max give the same distribution without order
#include "ops/sample/sample.h"

#include "base/philox.h"
#include "base/simd.h"

namespace engine::cpu::ENGINE_NS {
namespace {

struct ChunkBest {
  float value;
  int32_t id;
  double score;
};

// Unsigned keys in the order of the floats.
ENGINE_INLINE uint32_t key_of(float f) {
  const uint32_t u = f32_to_bits(f);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
ENGINE_INLINE float of_key(uint32_t k) { return bits_to_f32(k & 0x80000000u ? k & 0x7fffffffu : ~k); }

// Largest key K such that the weight of {key >= K} reaches `want`; weight 1 per token, or exp(l - top) if by_mass.
// Three passes over 11 + 11 + 10 bits.
uint32_t select_key(const float* l, int64_t n, float floor, float top, bool by_mass, double want, double* hist) {
  uint32_t prefix = 0, mask = 0;
  const int shifts[3] = {21, 10, 0}, widths[3] = {11, 11, 10};
  for (int pass = 0; pass < 3; ++pass) {
    const int bins = 1 << widths[pass];
    for (int i = 0; i < bins; ++i) hist[i] = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (!(l[i] >= floor)) continue;
      const uint32_t key = key_of(l[i]);
      if ((key & mask) == prefix) hist[(key >> shifts[pass]) & (bins - 1)] += by_mass ? double(expf(l[i] - top)) : 1.0;
    }
    int b = bins - 1;
    for (; b > 0; --b) {
      if (hist[b] >= want) break;
      want -= hist[b];
    }
    prefix |= uint32_t(b) << shifts[pass];
    mask |= uint32_t(bins - 1) << shifts[pass];
  }
  return prefix;
}

ENGINE_INLINE double gumbel(uint64_t seed, int64_t id, int64_t step) {
  const Philox r = philox(seed, uint32_t(id >> 2), uint64_t(step), 1);
  const double u = (double(r.v[id & 3]) + 0.5) * 2.3283064365386963e-10;
  return -log(-log(u));
}

}  // namespace

void sample(const SampleParams& p, Ctx& ctx) {
  const float temperature = p.control[0], top_p = p.control[1], min_p = p.control[2], penalty = p.control[3];
  const int64_t top_k = p.limits[0], step = *p.step;
  const bool greedy = !(temperature > 0.f);
  const float inv_t = greedy ? 1.f : 1.f / temperature;
  const int64_t chunks = ceil_div(p.vocab, kSampleChunk);
  float* threshold = reinterpret_cast<float*>(p.ws);
  double* bound = reinterpret_cast<double*>(p.ws + 8);
  ChunkBest* best = reinterpret_cast<ChunkBest*>(p.ws + 64);

  for (int64_t c; (c = claim(ctx)) < chunks;) {
    const int64_t i0 = c * kSampleChunk, n = imin(kSampleChunk, p.vocab - i0);
    ChunkBest b{-INFINITY, -1, 0};
    for (int64_t i = i0; i < i0 + n; ++i) {
      float l = p.logits[i];
      if (penalty != 1.f && p.seen[i]) l = l > 0.f ? l / penalty : l * penalty;
      l *= inv_t;
      p.work[i] = l;
      if (l > b.value) b = {l, int32_t(i), 0};
    }
    best[c] = b;
  }
  barrier(ctx);
  if (!greedy) {
    if (ctx.tid == 0) {
      ChunkBest top = best[0];
      for (int64_t c = 1; c < chunks; ++c)
        if (best[c].value > top.value) top = best[c];
      double* hist = reinterpret_cast<double*>(ctx.scratch);
      float floor = -INFINITY;
      if (top_k > 0 && top_k < p.vocab)
        floor = of_key(select_key(p.work, p.vocab, floor, top.value, false, double(top_k), hist));
      if (top_p < 1.f) {
        double mass = 0;
        for (int64_t i = 0; i < p.vocab; ++i)
          if (p.work[i] >= floor) mass += double(expf(p.work[i] - top.value));
        const float f = of_key(select_key(p.work, p.vocab, floor, top.value, true, double(top_p) * mass, hist));
        floor = f > floor ? f : floor;
      }
      if (min_p > 0.f) {
        const float f = top.value + logf(min_p);
        floor = f > floor ? f : floor;
      }
      *threshold = floor < top.value ? floor : top.value;
      *bound = double(top.value) + (top.id < 0 ? 0. : gumbel(*p.seed, top.id, step));
    }
    barrier(ctx);
    // -log(-log(u)) of the largest u is below 23: a token that far under a known score cannot win.
    const double reach = *bound - 23.0;
    for (int64_t c; (c = claim(ctx)) < chunks;) {
      const int64_t i0 = c * kSampleChunk, n = imin(kSampleChunk, p.vocab - i0);
      ChunkBest b{0, -1, -INFINITY};
      for (int64_t i = i0; i < i0 + n; ++i) {
        const float l = p.work[i];
        if (!(l >= *threshold) || double(l) < reach) continue;
        const double score = double(l) + gumbel(*p.seed, i, step);
        if (score > b.score) b = {l, int32_t(i), score};
      }
      best[c] = b;
    }
    barrier(ctx);
  }
  if (ctx.tid != 0) return;
  ChunkBest win = best[0];
  for (int64_t c = 1; c < chunks; ++c) {
    if (greedy ? best[c].id >= 0 && (win.id < 0 || best[c].value > win.value)
               : best[c].id >= 0 && (win.id < 0 || best[c].score > win.score))
      win = best[c];
  }
  const int32_t id = win.id;
  *p.token = id;
  if (id >= 0) p.seen[id] = 1;
  if (step >= 0 && step < p.capacity) p.history[step] = id;
  *p.pos += 1;
  *p.step = int32_t(step + 1);
}

}  // namespace engine::cpu::ENGINE_NS
