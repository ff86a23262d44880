// attention: append the new keys and values, then attention of a few tokens over a context that is split over blocks
// layout   K panel = 16 positions x d, V panel = 16 channels x ctx, as gemm operands: a 32-bit word of a bf16 panel holds two
//          neighbouring k of one column, which is what a lane gives to mma.m16n8k16 as its B operand
// mapping  a block per (kv head, split of the context): it appends the new positions of its split itself. bf16: 4 warps take 32
//          positions each in turn; the 16 rows of the matrix unit are (token, head of the group); lanes load 16 bytes = 4 columns,
//          so columns are numbered to fit the loads; probabilities go from accumulator to operand in registers. f32 (parity):
//          plain products. A second kernel combines the splits in order
// moves    K and V once per 16 rows; partial results once each way
// tried    -
#include "ops/attention/attention.h"

#include "ops/gemm/gemv.cuh"

namespace engine::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kStep = 32;      // positions of a warp's turn
constexpr int kTile = 16;      // rows of the matrix unit
constexpr int kMaxPanels = 8;  // of V per pass: what a lane's sums leave room for

struct Geometry {
  int64_t k_panel, v_panel, k_head, v_head;
  int split, splits, group;
  int first;  // token of this launch: more than kAttentionCudaRows take several
};

// Tokens of this launch; p is moved on to the first of them.
__device__ __forceinline__ int64_t tokens_of(AttentionParams& p, const Geometry& g, int64_t& pos) {
  const int64_t m = p.rows ? min(int64_t(*p.rows), p.m) : p.m;
  pos = *p.pos;
  // The caller bounds the context; nothing is written outside the cache.
  if (m <= g.first || pos < 0 || pos + m > p.ctx) return 0;
  pos += g.first;
  p.q += g.first * p.ldq;
  p.k += g.first * p.ldkv;
  p.v += g.first * p.ldkv;
  p.out += g.first * p.ldo;
  return min(m - g.first, kAttentionCudaRows);
}

// Positions [from, to) of this step into the cache of one kv head.
__device__ void append(const AttentionParams& p, const Geometry& g, int64_t head, int64_t pos, int64_t from, int64_t to,
                       int64_t end) {
  uint8_t* kh = p.k_cache + head * g.k_head;
  uint8_t* vh = p.v_cache + head * g.v_head;
  const int64_t pairs = (p.d + 1) / 2;
  for (int64_t at = from; at < to; ++at) {
    const float* k = p.k + (at - pos) * p.ldkv + head * p.d;
    const float* v = p.v + (at - pos) * p.ldkv + head * p.d;
    uint8_t* kp = kh + (at / 16) * g.k_panel;
    const int64_t lane = at % 16;
    if (p.format == kW_F32) {
      for (int64_t i = threadIdx.x; i < p.d; i += kThreads) {
        reinterpret_cast<float*>(kp)[i * 16 + lane] = k[i];
        reinterpret_cast<float*>(vh + (i / 16) * g.v_panel)[at * 16 + i % 16] = v[i];
      }
      continue;
    }
    for (int64_t i = threadIdx.x; i < pairs; i += kThreads)
      reinterpret_cast<uint32_t*>(kp)[i * 16 + lane] = pack_bf16(k[2 * i], 2 * i + 1 < p.d ? k[2 * i + 1] : 0.f);
    for (int64_t i = threadIdx.x; i < p.d; i += kThreads) {
      uint16_t* pair = reinterpret_cast<uint16_t*>(vh + (i / 16) * g.v_panel) + (at / 2) * 32 + (i % 16) * 2;
      pair[at & 1] = f32_to_bf16(v[i]);
      // The other half of the last pair is multiplied by a zero probability.
      if (at == end - 1 && !(at & 1)) pair[1] = 0;
    }
  }
}

// Where (m, l, o[d]) of a row of a split lies.
__device__ __forceinline__ float* partial_of(const AttentionParams& p, int64_t splits, int64_t t, int64_t head,
                                             int64_t split) {
  return reinterpret_cast<float*>(p.ws) + ((t * p.heads + head) * splits + split) * (p.d + 2);
}

// ---------------------------------------------------------------------------------------------------------- bf16
// One warp, one turn of 32 positions from `at`, against a tile of 16 rows. q: shared, [16][q_stride] bf16 pairs.
// Column n of product nb stands for position at + 16 * (n / 4) + 4 * (n % 4) + nb: what a 16-byte load of a lane holds.
__device__ __forceinline__ void scores_bf16(const uint32_t* q, int q_stride, const uint8_t* k_head, int64_t k_panel,
                                            int64_t at, int64_t end, int pairs, float (&s)[4][4]) {
  const int lane = threadIdx.x & 31, r = lane >> 2, c = lane & 3;
#pragma unroll
  for (int nb = 0; nb < 4; ++nb)
#pragma unroll
    for (int i = 0; i < 4; ++i) s[nb][i] = 0.f;
  const int64_t panel = at / 16 + r / 4;
  const bool there = panel * 16 < end;
  const uint4* k = reinterpret_cast<const uint4*>(k_head + panel * k_panel) + r % 4;
#pragma unroll 4
  for (int d0 = 0; d0 < pairs; d0 += 8) {
    const int low = d0 + c, high = low + 4;
    uint4 b0 = make_uint4(0, 0, 0, 0), b1 = b0;
    if (there && low < pairs) b0 = k[low * 4];
    if (there && high < pairs) b1 = k[high * 4];
    const uint32_t a[4] = {q[r * q_stride + low], q[(r + 8) * q_stride + low], q[r * q_stride + high],
                           q[(r + 8) * q_stride + high]};
    const uint32_t w[4][2] = {{b0.x, b1.x}, {b0.y, b1.y}, {b0.z, b1.z}, {b0.w, b1.w}};
#pragma unroll
    for (int nb = 0; nb < 4; ++nb) mma_bf16(s[nb], a, w[nb]);
  }
}

// Panels: of V that a lane accumulates at a time; a wider head takes further passes, with the scores anew.
template <int Panels> __global__ void __launch_bounds__(kThreads, 2) split_bf16_kernel(AttentionParams p, Geometry g) {
  release_next();
  wait_for_previous();
  int64_t pos;
  const int64_t m = tokens_of(p, g, pos), length = pos + m;
  const int64_t head = blockIdx.x, from = int64_t(blockIdx.y) * g.split, to = min(from + g.split, length);
  if (m == 0 || from >= length) return;
  append(p, g, head, pos, max(from, pos), to, length);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, r = lane >> 2, c = lane & 3;
  const int pairs = int((p.d + 1) / 2),
            q_stride = (pairs + 7) / 8 * 8 + 4;  // 4 banks on: rows of a tile do not collide
  const int panels = int((p.d + 15) / 16);
  uint32_t* q = reinterpret_cast<uint32_t*>(shared_memory());     // [16][q_stride]
  float* stats = reinterpret_cast<float*>(q + kTile * q_stride);  // [warps][16][2]
  float* o = stats + kWarps * kTile * 2;                          // [warps][16][panels * 16]
  const uint8_t* k_head = p.k_cache + head * g.k_head;
  const uint8_t* v_head = p.v_cache + head * g.v_head;
  const int64_t rows = m * g.group;
  const int passes = (panels + Panels - 1) / Panels;
  for (int64_t turn = 0; turn < (rows + kTile - 1) / kTile * passes; ++turn) {
    const int64_t r0 = turn / passes * kTile;
    const int panel0 = int(turn % passes) * Panels, here = min(Panels, panels - panel0);
    for (int i = threadIdx.x; i < kTile * q_stride; i += kThreads) {
      const int64_t row = r0 + i / q_stride, d = 2 * (i % q_stride);
      uint32_t pair = 0;
      if (row < rows && d < p.d) {
        const float* x = p.q + (row / g.group) * p.ldq + (head * g.group + row % g.group) * p.d + d;
        pair = pack_bf16(x[0], d + 1 < p.d ? x[1] : 0.f);
      }
      q[i] = pair;
    }
    __syncthreads();  // appended and staged
    // The lane holds rows r and r + 8 of the tile.
    float most[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
    float acc[Panels / 2][4][4] = {};
    const int64_t limit[2] = {min(pos + (r0 + r) / g.group + 1, to), min(pos + (r0 + r + 8) / g.group + 1, to)};
    for (int64_t at = from + warp * kStep; at < to; at += kWarps * kStep) {
      float s[4][4];
      scores_bf16(q, q_stride, k_head, g.k_panel, at, to, pairs, s);
      float best[2] = {most[0], most[1]};
#pragma unroll
      for (int nb = 0; nb < 4; ++nb)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int n = 2 * c + (i & 1);
          const int64_t position = at + 16 * (n / 4) + 4 * (n % 4) + nb;
          s[nb][i] = position < limit[i >> 1] ? s[nb][i] * p.scale : -INFINITY;
          best[i >> 1] = fmaxf(best[i >> 1], s[nb][i]);
        }
      float by[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        best[h] = fmaxf(best[h], __shfl_xor_sync(kFullWarp, best[h], 1));
        best[h] = fmaxf(best[h], __shfl_xor_sync(kFullWarp, best[h], 2));
        by[h] = best[h] > -INFINITY ? expf(most[h] - best[h]) : 1.f;
        most[h] = best[h];
        sum[h] *= by[h];
      }
#pragma unroll
      for (int nb = 0; nb < 4; ++nb)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float e = s[nb][i] > -INFINITY ? expf(s[nb][i] - most[i >> 1]) : 0.f;
          s[nb][i] = e;
          sum[i >> 1] += e;
        }
#pragma unroll
      for (int d = 0; d < Panels / 2; ++d)
#pragma unroll
        for (int nb = 0; nb < 4; ++nb)
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[d][nb][i] *= by[i >> 1];
      // The lane's columns 2c and 2c+1 are 8 positions side by side; each product with V takes 4 of them.
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t a[4] = {pack_bf16(s[0][j], s[1][j]), pack_bf16(s[0][2 + j], s[1][2 + j]),
                               pack_bf16(s[2][j], s[3][j]), pack_bf16(s[2][2 + j], s[3][2 + j])};
        const int n = 2 * c + j;
        const int64_t position = at + 16 * (n / 4) + 4 * (n % 4);
#pragma unroll
        for (int d = 0; d < Panels / 2; ++d) {
          const int panel = panel0 + 2 * d + r / 4;
          const uint4* v = reinterpret_cast<const uint4*>(v_head + int64_t(panel) * g.v_panel) + r % 4;
          uint4 b0 = make_uint4(0, 0, 0, 0), b1 = b0;
          if (panel < panels && position < length) b0 = v[position / 2 * 4];
          if (panel < panels && position + 2 < length) b1 = v[(position / 2 + 1) * 4];
          const uint32_t w[4][2] = {{b0.x, b1.x}, {b0.y, b1.y}, {b0.z, b1.z}, {b0.w, b1.w}};
#pragma unroll
          for (int nb = 0; nb < 4; ++nb) mma_bf16(acc[d][nb], a, w[nb]);
        }
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(kFullWarp, sum[h], 1);
      sum[h] += __shfl_xor_sync(kFullWarp, sum[h], 2);
      if (c == 0) {
        stats[(warp * kTile + r + 8 * h) * 2] = most[h];
        stats[(warp * kTile + r + 8 * h) * 2 + 1] = sum[h];
      }
    }
    const int width = here * 16;
#pragma unroll
    for (int d = 0; d < Panels / 2; ++d)
#pragma unroll
      for (int nb = 0; nb < 4; ++nb)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int n = 2 * c + (i & 1), column = 32 * d + 16 * (n / 4) + 4 * (n % 4) + nb;
          if (column < width) o[(warp * kTile + r + 8 * (i >> 1)) * width + column] = acc[d][nb][i];
        }
    __syncthreads();
    for (int i = threadIdx.x; i < kTile * width; i += kThreads) {
      const int tile_row = i / width, column = i % width;
      const int64_t row = r0 + tile_row;
      if (row >= rows || panel0 * 16 + column >= p.d) continue;
      float best = -INFINITY, total = 0.f, v = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) best = fmaxf(best, stats[(w * kTile + tile_row) * 2]);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float* st = stats + (w * kTile + tile_row) * 2;
        const float by = st[0] > -INFINITY ? expf(st[0] - best) : 0.f;
        total += by * st[1];
        v += by * o[(w * kTile + tile_row) * width + column];
      }
      float* to_row = partial_of(p, g.splits, row / g.group, head * g.group + row % g.group, blockIdx.y);
      to_row[2 + panel0 * 16 + column] = v;
      if (panel0 + column == 0) {
        to_row[0] = best;
        to_row[1] = total;
      }
    }
  }
}

// ----------------------------------------------------------------------------------------------------------- f32
// One row at a time: scores of the split in shared memory, a thread per position; then a thread per channel.
__global__ void __launch_bounds__(kThreads, 4) split_f32_kernel(AttentionParams p, Geometry g) {
  release_next();
  wait_for_previous();
  int64_t pos;
  const int64_t m = tokens_of(p, g, pos), length = pos + m;
  const int64_t head = blockIdx.x, from = int64_t(blockIdx.y) * g.split, to = min(from + g.split, length);
  if (m == 0 || from >= length) return;
  append(p, g, head, pos, max(from, pos), to, length);
  __syncthreads();
  float* s = reinterpret_cast<float*>(shared_memory());  // [split]
  float* work = s + g.split;                             // [2 * warps]
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const uint8_t* k_head = p.k_cache + head * g.k_head;
  const uint8_t* v_head = p.v_cache + head * g.v_head;
  for (int64_t row = 0; row < m * g.group; ++row) {
    const int64_t t = row / g.group, h = head * g.group + row % g.group, end = min(to, pos + t + 1);
    const float* q = p.q + t * p.ldq + h * p.d;
    float most = -INFINITY, sum = 0.f;
    for (int64_t at = from + threadIdx.x; at < end; at += kThreads) {
      const float* k = reinterpret_cast<const float*>(k_head + (at / 16) * g.k_panel) + at % 16;
      float v = 0.f;
      for (int64_t i = 0; i < p.d; ++i) v = fmaf(q[i], k[i * 16], v);
      s[at - from] = v * p.scale;
      most = fmaxf(most, v * p.scale);
    }
#pragma unroll
    for (int x = 16; x; x >>= 1) most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, x));
    if (lane == 0) work[warp] = most;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) most = fmaxf(most, work[w]);
    for (int64_t at = from + threadIdx.x; at < end; at += kThreads) {
      const float e = expf(s[at - from] - most);
      s[at - from] = e;
      sum += e;
    }
    sum = warp_sum(sum);
    if (lane == 0) work[kWarps + warp] = sum;
    __syncthreads();
    float* to_row = partial_of(p, g.splits, t, h, blockIdx.y);
    if (threadIdx.x == 0) {
      to_row[0] = most;
      float total = 0.f;
      for (int w = 0; w < kWarps; ++w) total += work[kWarps + w];
      to_row[1] = total;
    }
    for (int64_t i = threadIdx.x; i < p.d; i += kThreads) {
      const float* v = reinterpret_cast<const float*>(v_head + (i / 16) * g.v_panel) + i % 16;
      float a = 0.f;
      for (int64_t at = from; at < end; ++at) a = fmaf(s[at - from], v[at * 16], a);
      to_row[2 + i] = a;
    }
    __syncthreads();  // scores and sums are read
  }
}

// out = the splits' results, weighted by their share of the softmax, in order.
__global__ void __launch_bounds__(kThreads, 4) combine_kernel(AttentionParams p, Geometry g) {
  release_next();
  wait_for_previous();
  int64_t pos;
  const int64_t m = tokens_of(p, g, pos), t = blockIdx.x, head = blockIdx.y;
  if (t >= m) return;
  const int splits = int((pos + m + g.split - 1) / g.split);  // <= kThreads
  const float* part = partial_of(p, g.splits, t, head, 0);
  const int64_t stride = p.d + 2;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  float* weight = reinterpret_cast<float*>(shared_memory());  // [kThreads]
  float* work = weight + kThreads;                            // [2 * warps]
  const bool mine = int(threadIdx.x) < splits;
  float most = mine ? part[threadIdx.x * stride] : -INFINITY, top = most;
#pragma unroll
  for (int x = 16; x; x >>= 1) top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, x));
  if (lane == 0) work[warp] = top;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) top = fmaxf(top, work[w]);
  const float by = most > -INFINITY ? expf(most - top) : 0.f;
  weight[threadIdx.x] = by;
  const float share = warp_sum(mine ? by * part[threadIdx.x * stride + 1] : 0.f);
  if (lane == 0) work[kWarps + warp] = share;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += work[kWarps + w];
  for (int64_t i = threadIdx.x; i < p.d; i += kThreads) {
    float v = 0.f;
    // A split that a token does not see has weight 0 and finite sums.
#pragma unroll 8
    for (int s = 0; s < splits; ++s) v = fmaf(weight[s], part[s * stride + 2 + i], v);
    p.out[t * p.ldo + head * p.d + i] = v / total;
  }
}

}  // namespace

void attention(const AttentionParams& p, void* stream) {
  const int64_t panels = (p.d + 15) / 16;
  Geometry g = {};
  g.k_panel = gemm_panel_bytes(p.format, p.d, 1);
  g.v_panel = gemm_panel_bytes(p.format, p.ctx, 1);
  g.k_head = (p.ctx / 16) * g.k_panel;
  g.v_head = panels * g.v_panel;
  g.split = int(attention_cuda_split(p.ctx));
  g.splits = int((p.ctx + g.split - 1) / g.split);
  g.group = int(p.heads / p.kv_heads);
  const Launch combine = {dim3(unsigned(p.m < kAttentionCudaRows ? p.m : kAttentionCudaRows), unsigned(p.heads)),
                          kThreads, (kThreads + 2 * kWarps) * 4, stream, true};
  Launch split = {dim3(unsigned(p.kv_heads), unsigned(g.splits)), kThreads, 0, stream, true};
  const int64_t pairs = (p.d + 1) / 2, q_stride = (pairs + 7) / 8 * 8 + 4,
                per_pass = panels < kMaxPanels ? panels : kMaxPanels;
  split.shared = p.format == kW_F32 ? size_t(g.split + 2 * kWarps) * 4
                                    : size_t(kTile * q_stride + kWarps * kTile * (2 + per_pass * 16)) * 4;
  for (; g.first < p.m; g.first += int(kAttentionCudaRows)) {
    if (p.format == kW_F32)
      launch("attention.split", split_f32_kernel, split, p, g);
    else if (panels <= 2)
      launch("attention.split", split_bf16_kernel<2>, split, p, g);
    else if (panels <= 4)
      launch("attention.split", split_bf16_kernel<4>, split, p, g);
    else
      launch("attention.split", split_bf16_kernel<kMaxPanels>, split, p, g);
    launch("attention.combine", combine_kernel, combine, p, g);
  }
}

}  // namespace engine::cuda
