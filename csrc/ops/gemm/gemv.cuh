// The parts of every decode kernel that multiplies with packed panels (csrc/ops/gemm/gemm.h): activations are staged
// once per block in shared memory, in the form that the weight format multiplies with; every warp then streams panels.
//
// A warp reads 512 contiguous bytes of a panel at a time: lane = (vector = lane / 4, quad = lane % 4) takes 16 bytes, which
// are 4 rows x {1 f32 | 2 bf16 | 4 i8 | 8 i4} values of K. A lane keeps the sums of its 4 rows; 8 lanes share a row.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "base/dtype.h"
#include "base/ptx.cuh"
#include "base/reduce.cuh"
#include "ops/gemm/gemm.h"

namespace engine::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr size_t kMostShared = 96 * 1024;  // what every shipped architecture grants to a block

// What keeps the sums of R rows and the tiles in flight in registers.
// Every block stages all activations, which for one row is worth four panels.
ENGINE_HD constexpr int panels_per_turn(int rows) { return rows >= 8 ? 1 : rows >= 2 ? 2 : 4; }
ENGINE_HD constexpr int steps_in_flight(int rows) { return rows >= 8 ? 1 : 2; }
constexpr int kBlocksPerSm = 2;  // of 256 threads, at least

// ---------------------------------------------------------------------------------------------------- geometry of K
struct Depth {
  int k, vectors, steps;  // values; 64-byte vectors; turns of 8 vectors that a warp takes
  int groups, shift;      // quantised: groups and log2 of their width
};

inline int values_per_vector(int format) {
  return format == kW_F32 ? 1 : format == kW_BF16 ? 2 : format == kW_I8 ? 4 : 8;
}

inline Depth depth_of(int format, int64_t k, int64_t group) {
  const int per = values_per_vector(format), vectors = int((k + per - 1) / per);
  const int shift = group == 64 ? 6 : group == 32 ? 5 : 0;
  if (format >= kW_I8 && (!shift || k % group))
    throw std::invalid_argument("a quantised matrix has groups of 32 or 64 that divide K, not " +
                                std::to_string(group) + " of " + std::to_string(k));
  return {int(k), vectors, (vectors + 7) / 8, shift ? int(k >> shift) : 0, shift};
}

struct Panels {  // one packed matrix [n, k]
  const uint8_t* data;
  int64_t bytes;  // of a panel
  int n;
  Depth d;

  __device__ __forceinline__ const uint8_t* at(int panel) const { return data + panel * bytes; }
};

inline Panels panels_of(const uint8_t* data, int format, int64_t n, int64_t k, int64_t group) {
  return {data, gemm_panel_bytes(format, k, group), int(n), depth_of(format, k, group)};
}

// ------------------------------------------------------------------------------------------ small device functions
__device__ __forceinline__ float silu(float v) { return v / (1.f + expf(-v)); }
__device__ __forceinline__ float activate(float v, int act) {
  switch (act) {
    case kActRelu2: return v > 0.f ? v * v : 0.f;
    case kActSilu: return silu(v);
    case kActGeluTanh: return 0.5f * v * (1.f + tanhf(0.7978845608028654f * (v + 0.044715f * v * v * v)));
    case kActGeluErf: return 0.5f * v * (1.f + erff(v * 0.7071067811865476f));
    case kActRelu: return v > 0.f ? v : 0.f;
    case kActQuickGelu: return v / (1.f + expf(-1.702f * v));
    default: return v;
  }
}
__device__ __forceinline__ bool aligned16(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

// True in every thread of the block that is the last of `blocks` to come here; all that the others wrote is then visible.
// *ticket is 0 before the launch and after it.
__device__ __forceinline__ bool last_block(uint32_t* ticket, unsigned blocks, uint32_t* flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *flag = atomicInc(ticket, blocks - 1) == blocks - 1;
  __syncthreads();
  __threadfence();
  return *flag != 0;
}

// ------------------------------------------------------------------------------------------------ weight formats
// Codes<F>: kVector values of K per 64-byte vector; Tile: what a lane loads; X: the staged activations of one vector.
// A format is added by writing its Codes (fp8, nvfp4: scales lie where those of i4 lie).
template <int Format> struct Codes;

template <> struct Codes<kW_F32> {
  struct Tile {
    uint4 w;
  };
  using X = float;
  static size_t row_bytes(const Depth& d) { return (size_t(d.k) * 4 + 15) / 16 * 16; }
  __device__ static __forceinline__ Tile none() { return {make_uint4(0, 0, 0, 0)}; }
  __device__ static __forceinline__ Tile load(const uint8_t* panel, int v, int quad, const Depth&) {
    return {load_stream(reinterpret_cast<const uint4*>(panel + int64_t(v) * 64 + quad * 16))};
  }
  __device__ static __forceinline__ X x(const uint8_t* row, int v, const Depth&) {
    return reinterpret_cast<const float*>(row)[v];
  }
  __device__ static __forceinline__ void madd(float (&acc)[4], const Tile& t, X x) {
    acc[0] = fmaf(__uint_as_float(t.w.x), x, acc[0]);
    acc[1] = fmaf(__uint_as_float(t.w.y), x, acc[1]);
    acc[2] = fmaf(__uint_as_float(t.w.z), x, acc[2]);
    acc[3] = fmaf(__uint_as_float(t.w.w), x, acc[3]);
  }
  template <class Row> __device__ static __forceinline__ void put(uint8_t* to, int k, const Depth& d, const Row& row) {
    if (k < d.vectors) reinterpret_cast<float*>(to)[k] = row(k);
  }
};

template <> struct Codes<kW_BF16> {
  struct Tile {
    uint4 w;
  };
  using X = float2;
  static size_t row_bytes(const Depth& d) { return (size_t(d.vectors) * 4 + 15) / 16 * 16; }
  __device__ static __forceinline__ Tile none() { return {make_uint4(0, 0, 0, 0)}; }
  __device__ static __forceinline__ Tile load(const uint8_t* panel, int v, int quad, const Depth&) {
    return {load_stream(reinterpret_cast<const uint4*>(panel + int64_t(v) * 64 + quad * 16))};
  }
  __device__ static __forceinline__ X x(const uint8_t* row, int v, const Depth&) {
    const uint32_t pair = reinterpret_cast<const uint32_t*>(row)[v];
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  }
  __device__ static __forceinline__ void madd(float (&acc)[4], const Tile& t, X x) {
    const uint32_t w[4] = {t.w.x, t.w.y, t.w.z, t.w.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      acc[i] = fmaf(__uint_as_float(w[i] << 16), x.x, acc[i]);
      acc[i] = fmaf(__uint_as_float(w[i] & 0xffff0000u), x.y, acc[i]);
    }
  }
  template <class Row> __device__ static __forceinline__ void put(uint8_t* to, int v, const Depth& d, const Row& row) {
    if (v >= d.vectors) return;
    const int k = 2 * v;
    reinterpret_cast<uint32_t*>(to)[v] = pack_bf16(row(k), k + 1 < d.k ? row(k + 1) : 0.f);
  }
};

// Eight-bit activations of `n` values held by `lanes` neighbouring lanes that form a group; the scale comes back.
template <int N>
__device__ __forceinline__ float quantise(const float (&v)[N], int lanes, uint32_t (&codes)[N / 4], int& sum) {
  float most = 0.f;
#pragma unroll
  for (int i = 0; i < N; ++i) most = fmaxf(most, fabsf(v[i]));
  for (int o = 1; o < lanes; o <<= 1) most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, o));
  const float inv = most > 0.f ? 127.f / most : 0.f;
  sum = 0;
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    codes[i] = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int q = __float2int_rn(v[4 * i + j] * inv);
      sum += q;
      codes[i] |= uint32_t(q & 255) << (8 * j);
    }
  }
  return most / 127.f;
}

// The four fp16 scales of a lane's rows in group g. Two groups of codes are followed by their scales.
__device__ __forceinline__ uint2 load_scales(const uint8_t* panel, int g, int quad, const Depth& d, int code_bytes) {
  return load_stream(reinterpret_cast<const uint2*>(panel + gemm_scales_at(g, d.groups, code_bytes) + quad * 8));
}
__device__ __forceinline__ void unpack_scales(uint2 s, float by, float (&out)[4]) {
  out[0] = f16_to_f32(uint16_t(s.x & 0xffff)) * by;
  out[1] = f16_to_f32(uint16_t(s.x >> 16)) * by;
  out[2] = f16_to_f32(uint16_t(s.y & 0xffff)) * by;
  out[3] = f16_to_f32(uint16_t(s.y >> 16)) * by;
}

struct QuantTile {
  uint4 w;
  uint2 scale;
};

template <> struct Codes<kW_I8> {
  using Tile = QuantTile;
  struct X {
    uint32_t codes;
    int32_t zero;  // -128 times the sum of the codes
    float scale;
  };
  // {codes, zero} per vector, then one scale per group.
  static size_t row_bytes(const Depth& d) { return (size_t(d.vectors) * 8 + size_t(d.groups) * 4 + 15) / 16 * 16; }
  __device__ static __forceinline__ Tile none() { return {make_uint4(0, 0, 0, 0), make_uint2(0, 0)}; }
  __device__ static __forceinline__ Tile load(const uint8_t* panel, int v, int quad, const Depth& d) {
    const int g = v * 4 >> d.shift;
    return {load_stream(reinterpret_cast<const uint4*>(panel + (int64_t(v) + g / 2) * 64 + quad * 16)),
            load_scales(panel, g, quad, d, 16 << d.shift)};
  }
  __device__ static __forceinline__ X x(const uint8_t* row, int v, const Depth& d) {
    const uint2 c = reinterpret_cast<const uint2*>(row)[v];
    return {c.x, int32_t(c.y), reinterpret_cast<const float*>(row + int64_t(d.vectors) * 8)[v * 4 >> d.shift]};
  }
  __device__ static __forceinline__ void madd(float (&acc)[4], const Tile& t, const X& x) {
    float s[4];
    unpack_scales(t.scale, x.scale, s);
    acc[0] = fmaf(float(dp4a_us(t.w.x, x.codes, x.zero)), s[0], acc[0]);
    acc[1] = fmaf(float(dp4a_us(t.w.y, x.codes, x.zero)), s[1], acc[1]);
    acc[2] = fmaf(float(dp4a_us(t.w.z, x.codes, x.zero)), s[2], acc[2]);
    acc[3] = fmaf(float(dp4a_us(t.w.w, x.codes, x.zero)), s[3], acc[3]);
  }
  template <class Row> __device__ static __forceinline__ void put(uint8_t* to, int v, const Depth& d, const Row& row) {
    const int lanes = 1 << (d.shift - 2);
    float x[4] = {};
    if (v < d.vectors) row.four(4 * v, x);
    uint32_t codes[1];
    int sum;
    const float scale = quantise(x, lanes, codes, sum);
    if (v >= d.vectors) return;
    reinterpret_cast<uint2*>(to)[v] = make_uint2(codes[0], uint32_t(-128 * sum));
    if (v % lanes == 0) reinterpret_cast<float*>(to + int64_t(d.vectors) * 8)[v / lanes] = scale;
  }
};

template <> struct Codes<kW_I4> {
  using Tile = QuantTile;
  using X = uint4;  // codes of k 0..3, of k 4..7, -8 times their sum, scale
  static size_t row_bytes(const Depth& d) { return size_t(d.vectors) * 16; }
  __device__ static __forceinline__ Tile none() { return {make_uint4(0, 0, 0, 0), make_uint2(0, 0)}; }
  __device__ static __forceinline__ Tile load(const uint8_t* panel, int v, int quad, const Depth& d) {
    const int g = v * 8 >> d.shift;
    return {load_stream(reinterpret_cast<const uint4*>(panel + (int64_t(v) + g / 2) * 64 + quad * 16)),
            load_scales(panel, g, quad, d, 8 << d.shift)};
  }
  __device__ static __forceinline__ X x(const uint8_t* row, int v, const Depth&) {
    return reinterpret_cast<const uint4*>(row)[v];
  }
  __device__ static __forceinline__ void madd(float (&acc)[4], const Tile& t, const X& x) {
    float s[4];
    unpack_scales(t.scale, __uint_as_float(x.w), s);
    const uint32_t w[4] = {t.w.x, t.w.y, t.w.z, t.w.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int low = dp4a_us(w[i] & 0x0f0f0f0fu, x.x, int32_t(x.z));
      acc[i] = fmaf(float(dp4a_us((w[i] >> 4) & 0x0f0f0f0fu, x.y, low)), s[i], acc[i]);
    }
  }
  template <class Row> __device__ static __forceinline__ void put(uint8_t* to, int v, const Depth& d, const Row& row) {
    float x[8] = {};
    if (v < d.vectors) {
      float a[4], b[4];
      row.four(8 * v, a);
      row.four(8 * v + 4, b);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] = a[i];
        x[4 + i] = b[i];
      }
    }
    uint32_t codes[2];
    int sum;
    const float scale = quantise(x, 1 << (d.shift - 3), codes, sum);
    if (v < d.vectors)
      reinterpret_cast<uint4*>(to)[v] = make_uint4(codes[0], codes[1], uint32_t(-8 * sum), __float_as_uint(scale));
  }
};

// ------------------------------------------------------------------------------------------------- activations
// One row of activations behind its prologue: x, or x * silu(z), then (with w) times inv[k / norm_group] * w[k].
struct Row {
  const float* x;
  const float* z;
  const float* w;
  const float* inv;
  int norm_group;
  bool wide;  // all pointers on 16 bytes

  __device__ __forceinline__ float raw(int k) const { return z ? x[k] * silu(z[k]) : x[k]; }
  __device__ __forceinline__ float operator()(int k) const {
    const float v = raw(k);
    return w ? v * inv[k / norm_group] * w[k] : v;
  }
  __device__ __forceinline__ void raw_four(int k, float (&v)[4]) const {
    if (!wide) {
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = raw(k + i);
      return;
    }
    const float4 a = *reinterpret_cast<const float4*>(x + k);
    v[0] = a.x;
    v[1] = a.y;
    v[2] = a.z;
    v[3] = a.w;
    if (z) {
      const float4 b = *reinterpret_cast<const float4*>(z + k);
      v[0] *= silu(b.x);
      v[1] *= silu(b.y);
      v[2] *= silu(b.z);
      v[3] *= silu(b.w);
    }
  }
  __device__ __forceinline__ void four(int k, float (&v)[4]) const {
    raw_four(k, v);
    if (!w) return;
    if (wide) {
      const float4 b = *reinterpret_cast<const float4*>(w + k);
      v[0] *= b.x;
      v[1] *= b.y;
      v[2] *= b.z;
      v[3] *= b.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] *= w[k + i];
    }
    if (norm_group % 4 == 0) {
      const float s = inv[k / norm_group];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] *= s;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] *= inv[(k + i) / norm_group];
    }
  }
};

struct Prologue {
  const float* w;  // null: none
  int norm_group, groups;
  float eps;
};

inline Prologue prologue_of(const float* w, int64_t norm_group, int64_t k, float eps) {
  return {w, int(norm_group), w ? int(k / norm_group) : 0, eps};
}

// Shared memory of a block: norm scales, sums of the warps (two sets, used in turn), staged rows.
struct Shared {
  float* inv;   // [rows][groups]
  float* sums;  // [2][warps][rows * out]
  uint8_t* x;   // [rows][row_bytes]

  __device__ __forceinline__ Shared(uint8_t* base, int rows, int groups, int warps, int out) {
    inv = reinterpret_cast<float*>(base);
    sums = inv + (rows * groups + 3) / 4 * 4;
    x = reinterpret_cast<uint8_t*>(sums + 2 * warps * rows * out);
  }
  static size_t bytes(int rows, int groups, int warps, int out, size_t row_bytes) {
    return (size_t(rows * groups + 3) / 4 * 4 + size_t(2) * warps * rows * out) * 4 + rows * row_bytes;
  }
};

// inv[r][g] = 1 / rms of group g of row r. Ends with a barrier.
template <class RowOf>
__device__ void norm_scales(const Prologue& pro, int rows, int k, RowOf row_of, float* inv, float* sums) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  const int width = pro.norm_group;
  const bool fours = width % 4 == 0;
  if (pro.groups > 1) {
    for (int pair = warp; pair < rows * pro.groups; pair += warps) {
      const Row row = row_of(pair / pro.groups);
      const int k0 = pair % pro.groups * width;
      float s = 0.f, v[4];
      if (fours) {
        for (int i = lane * 4; i < width; i += 128) {
          row.raw_four(k0 + i, v);
          s += v[0] * v[0] + v[1] * v[1] + v[2] * v[2] + v[3] * v[3];
        }
      } else {
        for (int i = lane; i < width; i += 32) s += row.raw(k0 + i) * row.raw(k0 + i);
      }
      s = warp_sum(s);
      if (lane == 0) inv[pair] = 1.f / sqrtf(s / float(width) + pro.eps);
    }
    __syncthreads();
    return;
  }
  for (int r = 0; r < rows; ++r) {
    const Row row = row_of(r);
    float s = 0.f, v[4];
    if (fours) {
      for (int i = threadIdx.x * 4; i < k; i += blockDim.x * 4) {
        row.raw_four(i, v);
        s += v[0] * v[0] + v[1] * v[1] + v[2] * v[2] + v[3] * v[3];
      }
    } else {
      for (int i = threadIdx.x; i < k; i += blockDim.x) s += row.raw(i) * row.raw(i);
    }
    s = warp_sum(s);
    if (lane == 0) sums[r * warps + warp] = s;
  }
  __syncthreads();
  if (int(threadIdx.x) < rows) {
    float s = 0.f;
    for (int w = 0; w < warps; ++w) s += sums[threadIdx.x * warps + w];
    inv[threadIdx.x] = 1.f / sqrtf(s / float(k) + pro.eps);
  }
  __syncthreads();
}

// Rows [0, n) into shared memory: all threads over all rows at once, a warp inside one row (groups never leave a warp).
template <int F, class RowOf>
__device__ void stage(uint8_t* to, size_t row_bytes, int n, const Depth& d, RowOf row_of) {
  const int width = (d.vectors + 31) / 32 * 32;
  for (int i = threadIdx.x; i < n * width; i += blockDim.x) {
    const int r = i / width;
    Codes<F>::put(to + r * row_bytes, i - r * width, d, row_of(r));
  }
}

// The same behind the prologue. Ends with a barrier.
template <int F, class RowOf>
__device__ void stage_rows(const Prologue& pro, int n, const Depth& d, size_t row_bytes, RowOf row_of, Shared& s) {
  if (pro.w) norm_scales(pro, n, d.k, row_of, s.inv, s.sums);
  stage<F>(s.x, row_bytes, n, d, row_of);
  __syncthreads();
}

// ----------------------------------------------------------------------------------------------------- products
// acc[r][p][i] += the lane's share of row quad*4+i of panel p times activations r, over the steps first, first+stride, ..
// in pieces of U. Panels from `count` on and rows from `n` on repeat the last one; their sums are not used.
template <int F, int R, int P, int U>
__device__ __forceinline__ void dot(const uint8_t* w, int64_t panel_bytes, int count, const Depth& d, const uint8_t* x,
                                    size_t row_bytes, int n, int first, int stride, int end, float (&acc)[R][P][4]) {
  using C = Codes<F>;
  const int lane = threadIdx.x & 31, vector = lane >> 2, quad = lane & 3;
  for (int s = first * U; s < end; s += stride * U) {
    typename C::Tile tile[U][P];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int v = (s + u) * 8 + vector;
#pragma unroll
      for (int p = 0; p < P; ++p)
        tile[u][p] = s + u < end && v < d.vectors && p < count ? C::load(w + p * panel_bytes, v, quad, d) : C::none();
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int v = (s + u) * 8 + vector, at = v < d.vectors ? v : 0;  // a tile of zeros meets any finite value
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const typename C::X xv = C::x(x + (r < n ? r : n - 1) * row_bytes, at, d);
#pragma unroll
        for (int p = 0; p < P; ++p) C::madd(acc[r][p], tile[u][p], xv);
      }
    }
  }
}

// The lane's sums over the 8 lanes that share its rows.
template <int R, int P> __device__ __forceinline__ void sum_lanes(float (&acc)[R][P][4]) {
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int p = 0; p < P; ++p)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float v = acc[r][p][i];
        v += __shfl_xor_sync(kFullWarp, v, 4);
        v += __shfl_xor_sync(kFullWarp, v, 8);
        acc[r][p][i] = v + __shfl_xor_sync(kFullWarp, v, 16);
      }
}

// Every product of rows [0, n) with panels of `w`: turn t takes panels [P*(group0+t), +P). K is split over the warps and
// their sums are added in order, so results do not depend on timing. put(r, row of w, value).
template <int F, int R, int P, class Put> __device__ __forceinline__ void project(const Panels& w, int group0,
                                                                                  int groups, int n, size_t row_bytes,
                                                                                  Shared& s, Put put) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  constexpr int out = P * 16;
  const int panels = (w.n + 15) / 16;
  for (int t = 0; t < groups; ++t) {
    const int panel = (group0 + t) * P;
    if (panel >= panels) break;
    float acc[R][P][4] = {};
    dot<F, R, P, steps_in_flight(R)>(w.at(panel), w.bytes, panels - panel, w.d, s.x, row_bytes, n, warp, warps,
                                     w.d.steps, acc);
    sum_lanes(acc);
    float* sums = s.sums + (t & 1) * warps * R * out;  // the other set may still be read
    if (lane < 4) {
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int p = 0; p < P; ++p)
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[(warp * R + r) * out + p * 16 + lane * 4 + i] = acc[r][p][i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n * out; i += blockDim.x) {
      const int r = i / out, row = panel * 16 + i % out;
      if (row >= w.n) continue;
      float v = 0.f;
      for (int a = 0; a < warps; ++a) v += sums[(a * R + r) * out + i % out];
      put(r, row, v);
    }
  }
  __syncthreads();  // the caller may stage other rows or leave the sums to another product
}

// Weights do not depend on the kernel before, nor on the prologue: what the warps read first is on its way to L2 while
// activations are staged.
constexpr int64_t kFetched = 8192;  // of each panel
__device__ __forceinline__ void prefetch_panels(const Panels& w, int panel, int count) {
  const int64_t bytes = w.bytes < kFetched ? w.bytes : kFetched;
  const int lines = int((bytes + 127) / 128), here = min(count, (w.n + 15) / 16 - panel);
  for (int i = threadIdx.x; i < here * lines; i += blockDim.x)
    prefetch_l2(w.at(panel + i / lines) + int64_t(i % lines) * 128);
}

// ------------------------------------------------------------------------------------------------------ launching
// Calls f(integral_constant R) with the smallest R of 1, 2, 4, 8 that holds m rows, or with less where shared memory ends.
template <class Bytes, class F> void with_rows(const char* op, int64_t m, Bytes bytes, F f) {
  const int want = m <= 1 ? 1 : m <= 2 ? 2 : m <= 4 ? 4 : 8;
  if (want >= 8 && bytes(8) <= kMostShared) return f(std::integral_constant<int, 8>());
  if (want >= 4 && bytes(4) <= kMostShared) return f(std::integral_constant<int, 4>());
  if (want >= 2 && bytes(2) <= kMostShared) return f(std::integral_constant<int, 2>());
  if (bytes(1) <= kMostShared) return f(std::integral_constant<int, 1>());
  throw std::invalid_argument(std::string(op) + ": one row of activations takes " + std::to_string(bytes(1)) +
                              " bytes of shared memory; a block has " + std::to_string(kMostShared));
}

template <class F> void with_format(const char* op, int format, F f) {
  switch (format) {
    case kW_F32: return f(std::integral_constant<int, kW_F32>());
    case kW_BF16: return f(std::integral_constant<int, kW_BF16>());
    case kW_I8: return f(std::integral_constant<int, kW_I8>());
    case kW_I4: return f(std::integral_constant<int, kW_I4>());
    default:
      throw std::invalid_argument(std::string(op) + ": weight format " + std::to_string(format) +
                                  " has no CUDA kernel");
  }
}

}  // namespace engine::cuda
