// ssm: conv + SiLU, step size, state update and read-out of a few tokens in one kernel
// layout   state [H][N][Pp] f32: a thread owns 4 neighbouring values of P for some n, so loads are 16 bytes wide
// mapping  a block per (head, 32 of P): 128 threads = 8 quads of P x 16 rows of N. Each block convolves the channels it needs:
//          its own x, and B and C of its group (again in every block of the group: 2 N channels from L2). Its own x columns
//          of the conv state it moves on itself; those of B and C are moved by the last block of the group
// moves    state once each way per token; xbc, conv weights and conv state once per block
// tried    -
#include "ops/ssm/ssm.h"

#include "ops/gemm/gemv.cuh"

namespace engine::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWidth = 32;                // of P per block
constexpr int kQuads = kWidth / 4;        // threads along P
constexpr int kRows = kThreads / kQuads;  // threads along N
constexpr int kHeld = 8;                  // values of N that a thread loads before it works on them

// u of channel c for token t: the sum over the taps behind the bias, then SiLU.
__device__ __forceinline__ float conv(const SsmParams& p, int64_t channels, int64_t t, int64_t c) {
  const int past = int(p.taps) - 1;
  float s = p.conv_b ? p.conv_b[c] : 0.f;
#pragma unroll 4
  for (int j = 0; j <= past; ++j) {
    const int64_t i = t - past + j;
    const float* x = i < 0 ? p.conv_state + (past + i) * channels + c : p.xbc + i * p.ldx + c;
    s = fmaf(p.conv_w[j * channels + c], *x, s);
  }
  return silu(s);
}

// Row j of the new conv state is row m + j of (old state, inputs); ascending j reads only rows not yet written.
__device__ __forceinline__ void move_on(const SsmParams& p, int64_t channels, int64_t m, int64_t c) {
  const int64_t past = p.taps - 1;
  for (int64_t j = 0; j < past; ++j) {
    const int64_t i = m + j;
    p.conv_state[j * channels + c] = i < past ? p.conv_state[i * channels + c] : p.xbc[(i - past) * p.ldx + c];
  }
}

// One token of the state of a thread: s = decay s + b dx, y += c s.
__device__ __forceinline__ void update(float4& s, float decay, float b, float c, const float4& dx, float4& y) {
  s.x = fmaf(b, dx.x, decay * s.x);
  s.y = fmaf(b, dx.y, decay * s.y);
  s.z = fmaf(b, dx.z, decay * s.z);
  s.w = fmaf(b, dx.w, decay * s.w);
  y.x = fmaf(c, s.x, y.x);
  y.y = fmaf(c, s.y, y.y);
  y.z = fmaf(c, s.z, y.z);
  y.w = fmaf(c, s.w, y.w);
}

// Held: n_state <= kHeld * kRows, and the state stays in registers from the first token to the last.
template <bool Held> __global__ void __launch_bounds__(kThreads, 4) ssm_kernel(SsmParams p) {
  release_next();
  wait_for_previous();
  const int64_t m = p.rows ? min(int64_t(*p.rows), p.m) : p.m;
  if (m <= 0) return;
  const int tid = threadIdx.x, quad = tid % kQuads, row = tid / kQuads, warp = tid >> 5;
  const int64_t head = blockIdx.x, p0 = int64_t(blockIdx.y) * kWidth, pp = (p.head_dim + 15) / 16 * 16;
  const int64_t per_group = p.heads / p.groups, group = head / per_group, n_state = p.n_state;
  const int64_t di = p.heads * p.head_dim, gn = p.groups * n_state, channels = di + 2 * gn;
  const int64_t x0 = head * p.head_dim + p0, width = min(int64_t(kWidth), p.head_dim - p0);  // of real values of P
  uint8_t* base = shared_memory();
  uint32_t* flag = reinterpret_cast<uint32_t*>(base);
  float* x = reinterpret_cast<float*>(base + 16);                      // [kWidth]
  float4* sums = reinterpret_cast<float4*>(x + kWidth);                // [warps][kQuads]
  float* b = reinterpret_cast<float*>(sums + kThreads / 32 * kQuads);  // [n_state], then C
  float* c = b + n_state;

  const bool mine = p0 + quad * 4 < pp;
  float4* state = reinterpret_cast<float4*>(p.state + head * n_state * pp + p0 + quad * 4);
  const int64_t step = pp / 4;  // from one n to the next
  float4 s[kHeld];
  const auto load = [&](int64_t n0) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t n = n0 + i * kRows;
      s[i] = mine && n < n_state ? load_keep(state + n * step) : make_float4(0.f, 0.f, 0.f, 0.f);
    }
  };
  const auto store = [&](int64_t n0) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t n = n0 + i * kRows;
      if (mine && n < n_state) store_keep(state + n * step, s[i]);
    }
  };
  if (Held) load(row);  // in flight while the channels are convolved
  for (int64_t t = 0; t < m; ++t) {
    for (int64_t i = tid; i < 2 * n_state; i += kThreads)
      b[i] = conv(p, channels, t, di + (i < n_state ? group * n_state + i : gn + group * n_state + i - n_state));
    if (tid < kWidth) x[tid] = tid < width ? conv(p, channels, t, x0 + tid) : 0.f;
    const float raw = p.dt[t * p.lddt + head] + p.dt_bias[head];
    float dt = raw > 20.f ? raw : log1pf(expf(raw));
    dt = fminf(fmaxf(dt, p.dt_min), p.dt_max);
    const float decay = expf(dt * p.a[head]);
    __syncthreads();
    float4 y = make_float4(0.f, 0.f, 0.f, 0.f);
    const float4 v = reinterpret_cast<const float4*>(x)[quad];
    const float4 dx = make_float4(dt * v.x, dt * v.y, dt * v.z, dt * v.w);
    for (int64_t n0 = row; n0 < n_state; n0 += kHeld * kRows) {
      if (!Held) load(n0);
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int64_t n = n0 + i * kRows;
        if (n < n_state) update(s[i], decay, b[n], c[n], dx, y);
      }
      if (!Held) store(n0);
    }
#pragma unroll
    for (int o = kQuads; o < 32; o <<= 1) {
      y.x += __shfl_xor_sync(kFullWarp, y.x, o);
      y.y += __shfl_xor_sync(kFullWarp, y.y, o);
      y.z += __shfl_xor_sync(kFullWarp, y.z, o);
      y.w += __shfl_xor_sync(kFullWarp, y.w, o);
    }
    if ((tid & 31) < kQuads) sums[warp * kQuads + quad] = y;
    __syncthreads();
    if (tid < width) {
      float v = p.d_skip[head] * x[tid];
      for (int w = 0; w < kThreads / 32; ++w) v += reinterpret_cast<const float*>(sums + w * kQuads)[tid];
      p.out[t * p.ldo + x0 + tid] = v;
    }
  }
  if (Held) store(row);
  if (tid < width) move_on(p, channels, m, x0 + tid);
  if (!last_block(p.ticket + group, unsigned(per_group) * gridDim.y, flag)) return;
  for (int64_t i = tid; i < 2 * n_state; i += kThreads)
    move_on(p, channels, m, di + (i < n_state ? group * n_state + i : gn + group * n_state + i - n_state));
}

}  // namespace

void ssm(const SsmParams& p, void* stream) {
  if (!p.ticket) throw std::invalid_argument("ssm: ticket is null; it must be one zeroed word per group in memory");
  const size_t shared = 16 + kWidth * 4 + size_t(kThreads / 32) * kQuads * 16 + size_t(p.n_state) * 8;
  if (shared > kMostShared)
    throw std::invalid_argument("ssm: n_state " + std::to_string(p.n_state) + " exceeds the shared memory of a block");
  const int64_t pp = (p.head_dim + 15) / 16 * 16;
  const Launch l = {dim3(unsigned(p.heads), unsigned((pp + kWidth - 1) / kWidth)), kThreads, shared, stream, true};
  launch("ssm", p.n_state <= kHeld * kRows ? ssm_kernel<true> : ssm_kernel<false>, l, p);
}

}  // namespace engine::cuda
