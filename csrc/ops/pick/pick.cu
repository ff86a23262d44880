// pick: tokens drawn from guided logits by inverse CDF, the least certain masked again
// layout   logits f32, rows may lie apart; each warp has a row in shared memory, lane i its values i, i + 32, ...
// mapping  one block: masked: a warp per position in turns, as many warps as rows fit; then a thread per position ranks the
//          scores. next: one warp
// moves    logits once; the row in shared memory about 20 times
// tried    -
#include "ops/pick/pick.h"

#include "base/launch.h"
#include "base/ptx.cuh"

namespace engine::cuda {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kMostWarps = 32;
constexpr int64_t kScoreBytes = kPickPositions * int64_t(sizeof(double));
constexpr int64_t kRowsBytes = 96 * 1024 - kScoreBytes;  // what every shipped architecture grants to a block
constexpr double kKept = 1e5;                            // above every probability
static_assert(kPickCodes * 4 <= kRowsBytes);

struct Logits {  // of one position
  const float *cond, *uncond;
  float scale;
  __device__ __forceinline__ float at(int i) const {
    const float c = cond[i];
    return (uncond ? fmaf(scale, c - uncond[i], uncond[i]) : c) + 0.f;  // -0 is 0
  }
};

struct Drawn {
  int token;
  double chance;  // softmax of all logits at the token; 0 where none is finite
};

// Signed keys in the order of the floats.
__device__ __forceinline__ int key_of(float f) {
  const int i = __float_as_int(f);
  return i ^ ((i >> 31) & 0x7fffffff);
}

__device__ __forceinline__ int count_from(const float* row, int k, int least) {
  int n = 0;
  for (int i = threadIdx.x % 32; i < k; i += 32) n += key_of(row[i]) >= least;
  return __reduce_add_sync(kAll, n);
}

__device__ __forceinline__ double warp_sum(double v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(kAll, v, o);
  return v;
}

// A warp draws; the same in every lane. A lane touches only its own values of `row`.
__device__ __forceinline__ Drawn draw(const Logits& l, int k, int topk, float temperature, float uniform, float* row) {
  const int lane = threadIdx.x % 32;
  int low = 0x7fffffff, high = -0x7fffffff - 1;
  for (int i = lane; i < k; i += 32) {
    const float v = l.at(i);
    row[i] = v;
    low = min(low, key_of(v));
    high = max(high, key_of(v));
  }
  low = __reduce_min_sync(kAll, low);
  high = __reduce_max_sync(kAll, high);
  const float top = __int_as_float(high ^ ((high >> 31) & 0x7fffffff));
  int least = low, equal = k;  // kept: keys above `least`, and so many that equal it
  if (topk < k) {
    // At least topk keys reach `from`, fewer reach `past`.
    int64_t from = low, past = int64_t(high) + 1;
    int found = 0;
    while (past - from > 1 && found != topk) {
      const int64_t middle = from + (past - from) / 2;
      found = count_from(row, k, int(middle));
      if (found >= topk)
        from = middle;
      else
        past = middle;
    }
    least = int(from);
    if (found != topk) equal = topk - (least == high ? 0 : count_from(row, k, least + 1));
  }
  double sum = 0, all = 0;
  int last = 0;
  for (int first = 0; first < k; first += 32) {  // in index order
    const int i = first + lane;
    const float v = i < k ? row[i] : -INFINITY;
    const bool same = i < k && key_of(v) == least;
    const unsigned ties = __ballot_sync(kAll, same);
    const bool kept = i < k && (key_of(v) > least || (same && __popc(ties & ((1u << lane) - 1)) < equal));
    equal -= __popc(ties);
    const float weight = kept ? expf((v - top) / temperature) : 0.f;
    if (i < k) row[i] = weight;
    if (kept) last = i;
    sum += double(weight);
    all += double(expf(v - top));
  }
  const double reach = double(uniform) * warp_sum(sum);
  all = warp_sum(all);
  int token = __reduce_max_sync(kAll, last);
  double before = 0;
  for (int first = 0; first < k; first += 32) {
    const int i = first + lane;
    const float weight = i < k ? row[i] : 0.f;
    double mass = double(weight);
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const double other = __shfl_up_sync(kAll, mass, d);
      if (lane >= d) mass += other;
    }
    mass += before;
    const unsigned past = __ballot_sync(kAll, weight > 0.f && mass > reach);
    if (past) {
      token = first + __ffs(int(past)) - 1;
      break;
    }
    before = __shfl_sync(kAll, mass, 31);
  }
  return {token, top > -INFINITY ? double(expf(l.at(token) - top)) / all : 0.};
}

__global__ void __launch_bounds__(32 * kMostWarps, 1) pick_masked_kernel(PickMaskedParams p) {
  release_next();
  wait_for_previous();
  double* scores = reinterpret_cast<double*>(shared_memory());  // [kPickPositions]
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, positions = int(p.n);
  float* row = reinterpret_cast<float*>(scores + kPickPositions) + warp * p.k;
  const float scale = p.uncond ? *p.scale : 0.f;
  for (int n = warp; n < positions; n += warps) {
    double score = kKept;
    if (p.ids[n] == p.mask_id) {
      const Logits l = {p.cond + n * p.ldc, p.uncond ? p.uncond + n * p.ldu : nullptr, scale};
      const Drawn drawn = draw(l, int(p.k), int(min(p.topk, p.k)), p.temperature, p.uniforms[n], row);
      score = drawn.chance;
      if (threadIdx.x % 32 == 0) p.ids[n] = drawn.token;
    }
    if (threadIdx.x % 32 == 0) scores[n] = score;
  }
  if (!p.counts) return;
  __syncthreads();
  for (int n = threadIdx.x; n < positions; n += blockDim.x) {
    if (!(scores[n] < kKept)) continue;
    int rank = 0;
    for (int i = 0; i < positions; ++i) rank += scores[i] < scores[n] || (scores[i] == scores[n] && i < n);
    if (rank < *p.counts) p.ids[n] = p.mask_id;
  }
}

__global__ void __launch_bounds__(32, 1) pick_next_kernel(PickNextParams p) {
  release_next();
  wait_for_previous();
  const int64_t n = *p.step;
  const int end = int(p.k) - 1;
  if (n < 0 || n >= p.capacity) return;
  const Logits l = {p.cond, p.uncond, p.uncond ? *p.scale : 0.f};
  const int k = *p.open ? end + 1 : end;
  const int token = draw(l, k, k, 1.f, p.uniforms[n], reinterpret_cast<float*>(shared_memory())).token;
  if (threadIdx.x) return;
  const bool done = *p.done || token == end || n >= *p.limit;
  *p.done = done;
  p.tokens[n] = done ? int32_t(p.k) : token;
  *p.step = int32_t(n + 1);
  const int64_t next = min(n + 1, p.capacity - 1);
  for (int64_t i = 0; i < p.pair; ++i) {
    p.ids[i] = min(token, end - 1);
    p.pos[i] = int32_t(n + 1);
    p.rows[i] = p.rows_table[next * p.pair + i];
  }
}

}  // namespace

void pick_masked(const PickMaskedParams& p, void* stream) {
  int64_t warps = kRowsBytes / (4 * p.k);
  warps = warps < kMostWarps ? warps : kMostWarps;
  warps = warps < p.n ? warps : p.n;
  const Launch l = {1, unsigned(32 * warps), size_t(kScoreBytes + warps * p.k * 4), stream, true};
  launch("pick_masked", pick_masked_kernel, l, p);
}

void pick_next(const PickNextParams& p, void* stream) {
  launch("pick_next", pick_next_kernel, Launch{1, 32, size_t(p.k) * 4, stream, true}, p);
}

}  // namespace engine::cuda
