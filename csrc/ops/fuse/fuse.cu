// fuse: a gate per token between two streams, with what follows it, and a gate per head
// layout   s, g, out, normed row-major f32 or bf16; weights and tables as in fuse.h
// mapping  gated_fuse: a block per row, both rows in shared memory as f32, where the fused row takes the place of the
//          first. gate_heads: a block per row, a warp per head in turns
// moves    s, g, tables, out and normed once, 16 bytes per thread and turn where rows are aligned; weights from L2
// tried    README.md
#include "ops/fuse/fuse.h"

#include "base/dtype.h"
#include "base/launch.h"
#include "base/ptx.cuh"
#include "base/reduce.cuh"

namespace engine::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kEight = 8;  // values per thread and turn

__device__ __forceinline__ float sigmoid(float v) { return 1.f / (1.f + expf(-v)); }

__device__ __forceinline__ float value(const void* p, int dtype, int64_t i) {
  return dtype == kBF16 ? bf16_to_f32(static_cast<const uint16_t*>(p)[i]) : static_cast<const float*>(p)[i];
}

__device__ __forceinline__ bool aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

// Row of d values to shared memory as f32; returns this thread's share of their sum.
__device__ __forceinline__ float read_row(const void* p, int dtype, int64_t begin, int64_t d, float* to) {
  float sum = 0.f;
  const char* row = static_cast<const char*>(p) + begin * (dtype == kBF16 ? 2 : 4);
  const int64_t wide = aligned(row) ? d / kEight : 0;
  for (int64_t i = threadIdx.x; i < wide; i += kThreads) {
    float v[kEight];
    if (dtype == kBF16) {
      const uint4 w = reinterpret_cast<const uint4*>(row)[i];
      const uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        v[2 * j] = __uint_as_float(words[j] << 16);
        v[2 * j + 1] = __uint_as_float(words[j] & 0xffff0000u);
      }
    } else {
      const float4 a = reinterpret_cast<const float4*>(row)[2 * i], b = reinterpret_cast<const float4*>(row)[2 * i + 1];
      v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    }
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      to[i * kEight + j] = v[j];
      sum += v[j];
    }
  }
  for (int64_t i = wide * kEight + threadIdx.x; i < d; i += kThreads) {
    to[i] = value(row, dtype, i);
    sum += to[i];
  }
  return sum;
}

// Row of d values made by fn(i) to memory.
template <class Fn> __device__ __forceinline__ void write_row(void* p, int dtype, int64_t begin, int64_t d, Fn&& fn) {
  char* row = static_cast<char*>(p) + begin * (dtype == kBF16 ? 2 : 4);
  const int64_t wide = aligned(row) ? d / kEight : 0;
  for (int64_t i = threadIdx.x; i < wide; i += kThreads) {
    float v[kEight];
#pragma unroll
    for (int j = 0; j < kEight; ++j) v[j] = fn(i * kEight + j);
    if (dtype == kBF16) {
      reinterpret_cast<uint4*>(row)[i] =
          make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
    } else {
      reinterpret_cast<float4*>(row)[2 * i] = make_float4(v[0], v[1], v[2], v[3]);
      reinterpret_cast<float4*>(row)[2 * i + 1] = make_float4(v[4], v[5], v[6], v[7]);
    }
  }
  for (int64_t i = wide * kEight + threadIdx.x; i < d; i += kThreads) {
    if (dtype == kBF16)
      reinterpret_cast<uint16_t*>(row)[i] = f32_to_bf16(fn(i));
    else
      reinterpret_cast<float*>(row)[i] = fn(i);
  }
}

// A finished row of values fn(i) to the rows of out and normed that belong to place r of the sequence.
template <class Fn>
__device__ __forceinline__ void emit(const GatedFuseParams& p, int64_t r, float squares, float* sums, Fn&& fn) {
  const int64_t row = p.order ? p.order[r] : r;
  write_row(p.out, p.out_dtype, row * p.ldo, p.d, fn);
  if (!p.normed) return;
  const float scale = 1.f / sqrtf(block_sum<kWarps>(squares, sums) / float(p.d) + p.norm_eps);
  write_row(p.normed, p.out_dtype, row * p.ldn, p.d, [&](int64_t i) { return fn(i) * scale * p.norm_w[i]; });
}

__global__ void __launch_bounds__(kThreads) gated_fuse_kernel(GatedFuseParams p) {
  release_next();
  wait_for_previous();
  float* sums = reinterpret_cast<float*>(shared_memory());  // [2 * kWarps]
  float *s = sums + 2 * kWarps, *g = s + p.d;
  const int64_t row = blockIdx.x;
  const float n = float(p.d);
  const float s_sum = read_row(p.s, p.in_dtype, row * p.lds, p.d, s);
  const float g_sum = read_row(p.g, p.in_dtype, row * p.ldg, p.d, g);
  float2 mean = block_sum<kWarps>(make_float2(s_sum, g_sum), sums);
  mean = make_float2(mean.x / n, mean.y / n);
  float2 squares = make_float2(0.f, 0.f), dots = make_float2(0.f, 0.f);
  for (int64_t i = threadIdx.x; i < p.d; i += kThreads) {
    const float a = s[i] - mean.x, b = g[i] - mean.y;
    squares.x = fmaf(a, a, squares.x);
    squares.y = fmaf(b, b, squares.y);
    dots.x = fmaf(a, p.u1[i], dots.x);
    dots.y = fmaf(b, p.u2[i], dots.y);
  }
  squares = block_sum<kWarps>(squares, sums);
  dots = block_sum<kWarps>(dots, sums);
  const float r1 = 1.f / sqrtf(squares.x / n + p.eps), r2 = 1.f / sqrtf(squares.y / n + p.eps);
  const float gate = p.force >= 0.f ? p.force : sigmoid(r1 * dots.x + r2 * dots.y + p.c), rest = 1.f - gate;
  if (p.gates && threadIdx.x == 0) p.gates[row] = gate;
  float total = 0.f;
  const int64_t third = p.d / 3;
  for (int64_t i = threadIdx.x; i < p.d; i += kThreads) {
    float o;
    if (p.blend == kFuseNormed)
      o = (s[i] - mean.x) * (gate * r1) * p.w1[i] + (g[i] - mean.y) * (rest * r2) * p.w2[i] +
          (gate * p.b1[i] + rest * p.b2[i]);
    else if (p.blend == kFuseRaw)
      o = gate * s[i] + rest * g[i];
    else
      o = s[i] + p.rho * rest * (g[i] - s[i]);
    if (p.voxels && i < 3 * third) {
      const int64_t axis = i / third;
      const void* table = axis == 0 ? p.px : axis == 1 ? p.py : p.pz;
      o += value(table, p.table_dtype, p.voxels[row * 3 + axis] * third + i % third);
    }
    s[i] = o;
    total = fmaf(o, o, total);
  }
  __syncthreads();
  const int64_t place = p.newline ? row + row / p.period : row;
  emit(p, place, total, sums, [&](int64_t i) { return s[i]; });
  if (p.newline && row % p.period == p.period - 1) {
    total = 0.f;
    for (int64_t i = threadIdx.x; i < p.d; i += kThreads) total = fmaf(p.newline[i], p.newline[i], total);
    emit(p, place + 1, total, sums, [&](int64_t i) { return p.newline[i]; });
  }
}

// gate_heads: attention over two keys, whose weights are one number per head
// layout   q, x, out row-major f32
// mapping  a block per row: a warp per head in turns, then a thread per channel
// moves    q, x and out once; u from L2
// tried    -
__global__ void __launch_bounds__(kThreads) gate_heads_kernel(GateHeadsParams p) {
  release_next();
  wait_for_previous();
  float* sums = reinterpret_cast<float*>(shared_memory());  // [kWarps]
  float* gates = sums + kWarps;                             // [heads]
  const int64_t row = blockIdx.x, hd = p.d / p.heads;
  const float* q = p.q + row * p.ldq;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float squares = 0.f;
  for (int64_t h = warp; h < p.heads; h += kWarps) {
    float dot = 0.f;
    for (int64_t i = lane; i < hd; i += 32) {
      const float v = q[h * hd + i];
      squares = fmaf(v, v, squares);
      dot = fmaf(v, p.dk[h * hd + i], dot);
    }
    dot = warp_sum(dot);
    if (lane == 0) gates[h] = dot;
  }
  const float scale = 1.f / sqrtf(block_sum<kWarps>(squares, sums) / float(p.d) + p.eps);
  for (int64_t h = threadIdx.x; h < p.heads; h += kThreads) gates[h] = sigmoid(gates[h] * scale - p.bias);
  __syncthreads();
  for (int64_t i = threadIdx.x; i < p.d; i += kThreads) {
    float sum = p.x[row * p.ldx + i] + p.base[i];
    for (int64_t h = 0; h < p.heads; ++h) sum = fmaf(gates[h], p.u[h * p.d + i], sum);
    p.out[row * p.ldo + i] = sum;
  }
}

}  // namespace

void gated_fuse(const GatedFuseParams& p, void* stream) {
  const size_t shared = size_t(2 * kWarps + 2 * p.d) * sizeof(float);
  const Launch l = {unsigned(p.m), kThreads, shared, stream, true};
  launch("gated_fuse", gated_fuse_kernel, l, p);
}

void gate_heads(const GateHeadsParams& p, void* stream) {
  const Launch l = {unsigned(p.m), kThreads, size_t(kWarps + p.heads) * sizeof(float), stream, true};
  launch("gate_heads", gate_heads_kernel, l, p);
}

}  // namespace engine::cuda
