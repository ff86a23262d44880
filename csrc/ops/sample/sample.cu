// sample: the next token from logits, chosen where they lie; two kernels, each finished by its last block
// layout   logits and work [V] f32; per-chunk results in ws, reduced in chunk order
// mapping  chunks of 4096 tokens, 512 threads each. score: penalties and temperature; the last block finds the largest logit and
//          the threshold of the filters by radix selection. draw: Gumbel-max over what is left; the last block names the winner
// moves    logits once, work twice; three passes of one block more for top-k, four more for top-p
// tried    -
#include "ops/sample/sample.h"

#include "base/philox.h"
#include "ops/gemm/gemv.cuh"

namespace engine::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = 2048;
constexpr double kUnit = 1099511627776.0;  // 2^40: probabilities as integers, so that sums do not depend on order

struct ChunkBest {
  float value;
  int32_t id;
  double score;
};

struct Header {  // of ws
  float threshold, top;
  double bound;
};

__device__ __forceinline__ ChunkBest* chunks_of(const SampleParams& p) {
  return reinterpret_cast<ChunkBest*>(p.ws + 64);
}

// Unsigned keys in the order of the floats.
__device__ __forceinline__ uint32_t key_of(float f) {
  const uint32_t u = __float_as_uint(f);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
__device__ __forceinline__ float of_key(uint32_t k) { return __uint_as_float(k & 0x80000000u ? k & 0x7fffffffu : ~k); }

__device__ __forceinline__ double uniform_of(uint64_t seed, int64_t id, int64_t step) {
  const Philox r = philox(seed, uint32_t(id >> 2), uint64_t(step), 1);
  const uint32_t low = id & 1 ? r.v[1] : r.v[0], high = id & 1 ? r.v[3] : r.v[2];
  return (double(id & 2 ? high : low) + 0.5) * 2.3283064365386963e-10;
}

__device__ __forceinline__ double gumbel(double u) { return -log(-log(u)); }

// Of two candidates the one with the larger score, then the lower id; id -1 is none.
template <class T> __device__ __forceinline__ bool better(T a, int ia, T b, int ib) {
  return ia >= 0 && (ib < 0 || a > b || (a == b && ia < ib));
}

// The best of a block, in thread 0. `work` holds kWarps entries.
template <class T> __device__ void block_best(T& score, int& id, T* scores, int* ids) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#pragma unroll
  for (int o = 16; o; o >>= 1) {
    const T s = __shfl_xor_sync(kFullWarp, score, o);
    const int i = __shfl_xor_sync(kFullWarp, id, o);
    if (better(s, i, score, id)) {
      score = s;
      id = i;
    }
  }
  if (lane == 0) {
    scores[warp] = score;
    ids[warp] = id;
  }
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < kWarps; ++w)
      if (better(scores[w], ids[w], score, id)) {
        score = scores[w];
        id = ids[w];
      }
  __syncthreads();
}

__device__ __forceinline__ uint64_t weight_of(float l, float top, bool by_mass) {
  return by_mass ? uint64_t(double(expf(l - top)) * kUnit) : 1;
}

// The largest key K such that the weight of {key >= K} reaches `want`; weight 1 per token, or its probability in units.
// The whole block works on it; three passes over 11 + 11 + 10 bits.
__device__ uint32_t select_key(const SampleParams& p, float floor, float top, bool by_mass, uint64_t want,
                               uint64_t* hist, uint64_t* shared) {
  uint32_t prefix = 0, mask = 0;
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0, bins = pass == 2 ? 1024 : 2048;
    for (int i = threadIdx.x; i < bins; i += kThreads) hist[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < p.vocab; i += kThreads) {
      const float l = p.work[i];
      const uint32_t key = key_of(l);
      if (l >= floor && (key & mask) == prefix)
        atomicAdd(reinterpret_cast<unsigned long long*>(hist + ((key >> shift) & (bins - 1))),
                  static_cast<unsigned long long>(weight_of(l, top, by_mass)));
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int b = bins - 1;
      for (; b > 0; --b) {
        if (hist[b] >= want) break;
        want -= hist[b];
      }
      shared[0] = uint64_t(b);
      shared[1] = want;
    }
    __syncthreads();
    prefix |= uint32_t(shared[0]) << shift;
    want = shared[1];
    mask |= uint32_t(bins - 1) << shift;
    __syncthreads();  // `shared` and `hist` are read
  }
  return prefix;
}

__device__ __forceinline__ void finish(const SampleParams& p, int id, int64_t step) {
  *p.token = id;
  if (id >= 0) p.seen[id] = 1;
  if (step >= 0 && step < p.capacity) p.history[step] = id;
  *p.pos += 1;
  *p.step = int32_t(step + 1);
}

__global__ void __launch_bounds__(kThreads, 2) score_kernel(SampleParams p) {
  release_next();
  wait_for_previous();
  uint8_t* base = shared_memory();
  uint64_t* hist = reinterpret_cast<uint64_t*>(base);  // [kBins]
  uint64_t* pair = hist + kBins;                       // [2]
  float* scores = reinterpret_cast<float*>(pair + 2);  // [kWarps]
  int* ids = reinterpret_cast<int*>(scores + kWarps);  // [kWarps]
  uint32_t* flag = reinterpret_cast<uint32_t*>(ids + kWarps);
  const float temperature = p.control[0], top_p = p.control[1], min_p = p.control[2], penalty = p.control[3];
  const bool greedy = !(temperature > 0.f);
  const float inv_t = greedy ? 1.f : 1.f / temperature;
  ChunkBest* best = chunks_of(p);

  const int64_t first = int64_t(blockIdx.x) * kSampleChunk, end = min(first + kSampleChunk, p.vocab);
  float value = -INFINITY;
  int id = -1;
  for (int64_t i = first + threadIdx.x; i < end; i += kThreads) {
    float l = p.logits[i];
    if (penalty != 1.f && p.seen[i]) l = l > 0.f ? l / penalty : l * penalty;
    l *= inv_t;
    p.work[i] = l;
    if (l > value) {
      value = l;
      id = int(i);
    }
  }
  block_best(value, id, scores, ids);
  if (threadIdx.x == 0) best[blockIdx.x] = {value, id, 0.};
  if (!last_block(p.ticket, gridDim.x, flag)) return;

  value = -INFINITY;
  id = -1;
  for (int i = threadIdx.x; i < int(gridDim.x); i += kThreads)
    if (better(best[i].value, best[i].id, value, id)) {
      value = best[i].value;
      id = best[i].id;
    }
  block_best(value, id, scores, ids);
  if (threadIdx.x == 0) {
    scores[0] = value;
    ids[0] = id;
  }
  __syncthreads();
  const float top = scores[0];
  id = ids[0];
  if (greedy) {
    if (threadIdx.x == 0) finish(p, id, *p.step);
    return;
  }
  float floor = -INFINITY;
  const int64_t top_k = p.limits[0];
  if (top_k > 0 && top_k < p.vocab) floor = of_key(select_key(p, floor, top, false, uint64_t(top_k), hist, pair));
  if (top_p < 1.f) {
    for (int i = threadIdx.x; i < 1; i += kThreads) hist[0] = 0;
    __syncthreads();
    unsigned long long mass = 0;
    for (int64_t i = threadIdx.x; i < p.vocab; i += kThreads)
      if (p.work[i] >= floor) mass += weight_of(p.work[i], top, true);
    atomicAdd(reinterpret_cast<unsigned long long*>(hist), mass);
    __syncthreads();
    const uint64_t want = uint64_t(double(top_p) * double(hist[0]));
    __syncthreads();
    floor = fmaxf(floor, of_key(select_key(p, floor, top, true, want > 0 ? want : 1, hist, pair)));
  }
  if (min_p > 0.f) floor = fmaxf(floor, top + logf(min_p));
  if (threadIdx.x == 0) {
    Header* h = reinterpret_cast<Header*>(p.ws);
    h->threshold = fminf(floor, top);
    h->top = top;
    h->bound = double(top) + (id < 0 ? 0. : gumbel(uniform_of(*p.seed, id, *p.step)));
  }
}

__global__ void __launch_bounds__(kThreads, 2) draw_kernel(SampleParams p) {
  release_next();
  wait_for_previous();
  if (!(p.control[0] > 0.f)) return;  // the first kernel has chosen
  uint8_t* base = shared_memory();
  double* scores = reinterpret_cast<double*>(base);    // [kWarps]
  int* ids = reinterpret_cast<int*>(scores + kWarps);  // [kWarps]
  uint32_t* flag = reinterpret_cast<uint32_t*>(ids + kWarps);
  const Header h = *reinterpret_cast<const Header*>(p.ws);
  const uint64_t seed = *p.seed;
  const int64_t step = *p.step;
  ChunkBest* best = chunks_of(p);
  // -log(-log(u)) of the largest u is below 23: a token that far under a known score cannot win.
  const double reach = h.bound - 23.0;

  const int64_t first = int64_t(blockIdx.x) * kSampleChunk, end = min(first + kSampleChunk, p.vocab);
  double score = -INFINITY;
  int id = -1;
  for (int64_t i = first + threadIdx.x; i < end; i += kThreads) {
    const float l = p.work[i];
    if (!(l > -INFINITY) || !(l >= h.threshold) || double(l) < reach) continue;
    const double u = uniform_of(seed, i, step);
    // Single precision is enough to see that most cannot win; near u = 1 it is not.
    if (u < 0.999 && double(l - logf(-logf(float(u)))) < h.bound - 0.01) continue;
    const double v = double(l) + gumbel(u);
    if (better(v, int(i), score, id)) {
      score = v;
      id = int(i);
    }
  }
  block_best(score, id, scores, ids);
  if (threadIdx.x == 0) best[blockIdx.x] = {0.f, id, score};
  if (!last_block(p.ticket + 1, gridDim.x, flag)) return;
  score = -INFINITY;
  id = -1;
  for (int i = threadIdx.x; i < int(gridDim.x); i += kThreads)
    if (better(best[i].score, best[i].id, score, id)) {
      score = best[i].score;
      id = best[i].id;
    }
  block_best(score, id, scores, ids);
  if (threadIdx.x == 0) finish(p, id, step);
}

}  // namespace

void sample(const SampleParams& p, void* stream) {
  if (!p.ticket) throw std::invalid_argument("sample: ticket is null; it must be two zeroed words in memory");
  const unsigned chunks = unsigned((p.vocab + kSampleChunk - 1) / kSampleChunk);
  launch("sample.score", score_kernel, Launch{chunks, kThreads, (kBins + 2) * 8 + kWarps * 8 + 16, stream, true}, p);
  launch("sample.draw", draw_kernel, Launch{chunks, kThreads, kWarps * 12 + 16, stream, true}, p);
}

}  // namespace engine::cuda
