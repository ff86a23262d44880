// ssm: conv + SiLU over channels, barrier, then the recurrence head by head
// layout   state [H][N][Pp]: lanes run over P, so y needs no horizontal sums; B and C are broadcast
// mapping  phase 1: 64 channels per task, all tokens; phase 2: one head per task, all tokens in order
// moves    state read and written once per 4 tokens (once per token in decode); u once each way
// tried    README.md
#include "ops/ssm/ssm.h"

#include "base/simd.h"

namespace engine::cpu::ENGINE_NS {
namespace {

constexpr int64_t kChannels = 64;

void conv_channels(const SsmParams& p, int64_t m, int64_t c0, int64_t n, int64_t channels) {
  const int64_t past = p.taps - 1;
  for (int64_t c = c0; c < c0 + n; c += 16) {
    const int64_t left = c0 + n - c;
    const F16 bias = p.conv_b ? loadn(p.conv_b + c, left) : zero();
    for (int64_t t = 0; t < m; ++t) {
      F16 s = bias;
      for (int64_t j = 0; j <= past; ++j) {
        const int64_t i = t - past + j;
        const float* x = i < 0 ? p.conv_state + (past + i) * channels : p.xbc + i * p.ldx;
        s = fma(loadn(p.conv_w + j * channels + c, left), loadn(x + c, left), s);
      }
      storen(p.u + t * channels + c, silu(s), left);
    }
    // Row j of the new state is row m + j of (old state, inputs); ascending j reads only rows not yet written.
    for (int64_t j = 0; j < past; ++j) {
      const int64_t i = m + j;
      const float* x = i < past ? p.conv_state + i * channels : p.xbc + (i - past) * p.ldx;
      storen(p.conv_state + j * channels + c, loadn(x + c, left), left);
    }
  }
}

// Advances TB tokens for PV vectors of P. decay[TB]; b, c point at the group's B and C of the first token.
template <int TB, int PV> ENGINE_INLINE void scan_block(float* state, int64_t pp, int64_t n_state, const float* decay,
                                                        const F16 (&dx)[TB][PV], const float* b, const float* c,
                                                        int64_t stride, F16 (&y)[TB][PV]) {
  F16 a[TB];
  for (int t = 0; t < TB; ++t) a[t] = set1(decay[t]);
  for (int64_t n = 0; n < n_state; ++n) {
    F16 s[PV];
#pragma GCC unroll 4
    for (int v = 0; v < PV; ++v) s[v] = load(state + n * pp + v * 16);
#pragma GCC unroll 4
    for (int t = 0; t < TB; ++t) {
      const F16 bn = set1(b[t * stride + n]), cn = set1(c[t * stride + n]);
#pragma GCC unroll 4
      for (int v = 0; v < PV; ++v) {
        s[v] = fma(bn, dx[t][v], mul(a[t], s[v]));
        y[t][v] = fma(cn, s[v], y[t][v]);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < PV; ++v) store(state + n * pp + v * 16, s[v]);
  }
}

template <int TB, int PV> void scan_tokens(const SsmParams& p, int64_t head, int64_t t0, int64_t v0, int64_t pp,
                                           int64_t channels, const float* dt, const float* decay) {
  const int64_t di = p.heads * p.head_dim, group = head / (p.heads / p.groups);
  const float* u = p.u + t0 * channels;
  F16 dx[TB][PV], y[TB][PV];
  for (int t = 0; t < TB; ++t)
    for (int v = 0; v < PV; ++v) {
      const int64_t i = (v0 + v) * 16;
      const F16 x = loadn(u + t * channels + head * p.head_dim + i, imax(p.head_dim - i, 0));
      dx[t][v] = mul(x, set1(dt[t]));
      y[t][v] = mul(x, set1(p.d_skip[head]));
    }
  const float* b = u + di + group * p.n_state;
  scan_block<TB, PV>(p.state + head * p.n_state * pp + v0 * 16, pp, p.n_state, decay, dx, b, b + p.groups * p.n_state,
                     channels, y);
  for (int t = 0; t < TB; ++t)
    for (int v = 0; v < PV; ++v) {
      const int64_t i = (v0 + v) * 16, left = p.head_dim - i;
      if (left > 0) storen(p.out + (t0 + t) * p.ldo + head * p.head_dim + i, y[t][v], left);
    }
}

void step_sizes(const SsmParams& p, int64_t head, int64_t t0, int64_t n, float* dt, float* decay) {
  for (int64_t t = 0; t < n; ++t) {
    const float v = p.dt[(t0 + t) * p.lddt + head] + p.dt_bias[head];
    float d = v > 20.f ? v : log1pf(expf(v));
    d = d < p.dt_min ? p.dt_min : d > p.dt_max ? p.dt_max : d;
    dt[t] = d;
    decay[t] = expf(d * p.a[head]);
  }
}

}  // namespace

void ssm(const SsmParams& p, Ctx& ctx) {
  const int64_t m = p.rows ? imin(*p.rows, p.m) : p.m;
  if (m <= 0) return;
  const int64_t channels = p.heads * p.head_dim + 2 * p.groups * p.n_state;
  const int64_t blocks = ceil_div(channels, kChannels);
  for (int64_t task; (task = claim(ctx)) < blocks;)
    conv_channels(p, m, task * kChannels, imin(kChannels, channels - task * kChannels), channels);
  barrier(ctx);
  const int64_t pp = round_up(p.head_dim, 16), vectors = pp / 16;
  for (int64_t head; (head = claim(ctx)) < p.heads;) {
    float dt[4], decay[4];
    int64_t t = 0;
    for (; t + 4 <= m; t += 4) {
      step_sizes(p, head, t, 4, dt, decay);
      int64_t v = 0;
      for (; v + 2 <= vectors; v += 2) scan_tokens<4, 2>(p, head, t, v, pp, channels, dt, decay);
      if (v < vectors) scan_tokens<4, 1>(p, head, t, v, pp, channels, dt, decay);
    }
    for (; t < m; ++t) {
      step_sizes(p, head, t, 1, dt, decay);
      int64_t v = 0;
      for (; v + 4 <= vectors; v += 4) scan_tokens<1, 4>(p, head, t, v, pp, channels, dt, decay);
      for (; v < vectors; ++v) scan_tokens<1, 1>(p, head, t, v, pp, channels, dt, decay);
    }
  }
}

}  // namespace engine::cpu::ENGINE_NS
