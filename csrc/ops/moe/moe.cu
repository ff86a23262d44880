// moe: the routed experts of a few tokens: ids and weights are chosen on the device and read from memory by what follows
// layout   packed panels as on the CPU, one expert after another; activations staged in shared memory
// mapping  route: blocks of 16 experts x a part of K; the last block to finish adds the parts in order and chooses, a warp per
//          token. up: a block per (slot, pair of panels); a slot is a pair of token and expert, or for many tokens the head
//          of up to R pairs of one expert; the shared expert takes further blocks. down: a block per pair of panels of the
//          output runs through all experts and the shared one, so sums have a fixed order and need no atomics
// moves    route: gate once. up, down: each chosen expert and the shared one once per R tokens
// tried    -
#include "ops/moe/moe.h"

#include "ops/gemm/gemv.cuh"

namespace engine::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kDownWarps = 16;
// Of the output per block: 512 threads keep enough in flight with two.
ENGINE_HD constexpr int down_panels(int rows) { return rows >= 8 ? 1 : 2; }
constexpr int kRouteParts = 4;         // of K: 8 panels alone would leave most of a device idle
constexpr int kRouteSteps = 4;         // that a warp of the router has in flight
constexpr size_t kStaged = 48 * 1024;  // activations that moe_down stages at a time
constexpr int kMaxPairs = 4096;

__device__ __forceinline__ int rows_of(const int32_t* rows, int64_t m) {
  return rows ? min(int(*rows), int(m)) : int(m);
}

// --------------------------------------------------------------------------------------------------------- route
// The best of a warp: larger value, then lower index.
__device__ __forceinline__ void warp_best(float& value, int& index) {
#pragma unroll
  for (int o = 16; o; o >>= 1) {
    const float v = __shfl_xor_sync(kFullWarp, value, o);
    const int i = __shfl_xor_sync(kFullWarp, index, o);
    if (v > value || (v == value && i < index)) {
      value = v;
      index = i;
    }
  }
}

__device__ __forceinline__ bool is_nan(float v) { return v != v; }
__device__ __forceinline__ float sigmoid(float v) { return 1.f / (1.f + expf(-v)); }

// One warp chooses for token t; choice [experts] is its scratch.
__device__ void choose(const MoeRouteParams& p, int t, float* choice) {
  const int lane = threadIdx.x & 31, experts = int(p.experts), top_k = int(p.top_k);
  const float* logits = p.logits + int64_t(t) * experts;
  for (int e = lane; e < experts; e += 32) choice[e] = sigmoid(logits[e]) + (p.bias ? p.bias[e] : 0.f);
  __syncwarp();
  if (p.n_group > 1) {
    const int groups = int(p.n_group), width = experts / groups;
    float* score = choice + experts;  // [groups]
    for (int g = lane; g < groups; g += 32) {
      float a = -INFINITY, b = -INFINITY;
      for (int e = g * width; e < (g + 1) * width; ++e) {
        const float v = choice[e];
        if (v > a) {
          b = a;
          a = v;
        } else if (v > b) {
          b = v;
        }
      }
      score[g] = width > 1 ? a + b : a;
    }
    __syncwarp();
    for (int kept = 0; kept < int(p.topk_group); ++kept) {
      float best = -INFINITY;
      int at = groups;
      for (int g = lane; g < groups; g += 32)
        if (score[g] > best || (score[g] == best && g < at)) {
          best = score[g];
          at = g;
        }
      warp_best(best, at);
      if (lane == 0 && at < groups) score[at] = NAN;  // kept; never compares greater
      __syncwarp();
    }
    for (int e = lane; e < experts; e += 32)
      if (!is_nan(score[e / width])) choice[e] = -INFINITY;
    __syncwarp();
  }
  float sum = 0.f;
  for (int j = 0; j < top_k; ++j) {
    float best = -INFINITY;
    int at = experts;
    // Experts outside the kept groups (-inf) come last, by index; chosen ones and NaN scores never do.
    for (int e = lane; e < experts; e += 32)
      if (choice[e] > best || (choice[e] == best && e < at)) {
        best = choice[e];
        at = e;
      }
    warp_best(best, at);
    if (at >= experts) at = 0;  // every score is NaN
    const float s = sigmoid(logits[at]);
    sum += s;
    if (lane == 0) {
      p.ids[int64_t(t) * top_k + j] = at;
      p.weights[int64_t(t) * top_k + j] = s;
      choice[at] = NAN;
    }
    __syncwarp();
  }
  const float by = p.norm_topk ? p.scale / (sum + 1e-20f) : p.scale;
  if (lane == 0)
    for (int j = 0; j < top_k; ++j) p.weights[int64_t(t) * top_k + j] *= by;
}

// Pairs by expert, then by token; a thread per expert.
__device__ void sort_pairs(const MoeRouteParams& p, int pairs, int32_t* count) {
  for (int e = threadIdx.x; e < int(p.experts); e += blockDim.x) {
    int n = 0;
    for (int i = 0; i < pairs; ++i) n += p.ids[i] == e;
    count[e] = n;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int at = 0;
    for (int e = 0; e < int(p.experts); ++e) {
      const int n = count[e];
      p.offsets[e] = count[e] = at;
      at += n;
    }
    p.offsets[p.experts] = at;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < int(p.experts); e += blockDim.x) {
    int at = count[e];
    for (int i = 0; i < pairs; ++i)
      if (p.ids[i] == e) p.order[at++] = i;
  }
}

// parts > 1: sums of the parts of K lie in ws [parts][m][experts] until the last block adds them.
template <int R> __global__ void __launch_bounds__(kWarps * 32, kBlocksPerSm)
    moe_route_kernel(MoeRouteParams p, Panels gate, Prologue pro, int64_t row_bytes, int parts) {
  release_next();
  const int group = int(blockIdx.x), part = int(blockIdx.y);
  prefetch_panels(gate, group, 1);
  wait_for_previous();
  const int m = rows_of(p.rows, p.m), experts = int(p.experts);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  uint8_t* base = shared_memory();
  uint32_t* flag = reinterpret_cast<uint32_t*>(base);
  Shared s(base + 16, R, pro.groups, kWarps, 16);
  const bool wide = aligned16(p.x) && p.ldx % 4 == 0 && aligned16(pro.w);
  // Steps of K of this block, in whole turns of a warp.
  const int turns = (gate.d.steps + parts * kRouteSteps - 1) / (parts * kRouteSteps), first = part * turns;
  const int end = min((first + turns) * kRouteSteps, gate.d.steps);
  float* out = parts > 1 ? reinterpret_cast<float*>(p.ws) + int64_t(part) * m * experts : p.logits;
  for (int r0 = 0; r0 < m; r0 += R) {
    const int n = min(R, m - r0);
    stage_rows<kW_F32>(
        pro, n, gate.d, row_bytes,
        [&](int r) {
          return Row{p.x + int64_t(r0 + r) * p.ldx, nullptr, pro.w, s.inv + r * pro.groups, pro.norm_group, wide};
        },
        s);
    float acc[R][1][4] = {};
    dot<kW_F32, R, 1, kRouteSteps>(gate.at(group), gate.bytes, 1, gate.d, s.x, row_bytes, n, first + warp, kWarps, end,
                                   acc);
    sum_lanes(acc);
    if (lane < 4) {
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i) s.sums[(warp * R + r) * 16 + lane * 4 + i] = acc[r][0][i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n * 16; i += blockDim.x) {
      const int r = i / 16, e = group * 16 + i % 16;
      if (e >= experts) continue;
      float v = 0.f;
      for (int a = 0; a < kWarps; ++a) v += s.sums[(a * R + r) * 16 + i % 16];
      out[int64_t(r0 + r) * experts + e] = v;
    }
    __syncthreads();
  }
  if (!last_block(p.ticket, gridDim.x * gridDim.y, flag)) return;
  if (parts > 1) {
    const float* sums = reinterpret_cast<const float*>(p.ws);
    for (int i = threadIdx.x; i < m * experts; i += blockDim.x) {
      float v = 0.f;
      for (int a = 0; a < parts; ++a) v += sums[int64_t(a) * m * experts + i];
      p.logits[i] = v;
    }
    __syncthreads();
  }
  // The staged rows are done with: their memory holds the scores of one token per warp.
  float* scores = reinterpret_cast<float*>(base + 16);
  const int together = min(kWarps, int((kMostShared / 2) / ((p.experts + p.n_group) * 4)));
  if (warp < together)
    for (int t = warp; t < m; t += together) choose(p, t, scores + int64_t(warp) * (p.experts + p.n_group));
  if (p.m == 1) return;
  __syncthreads();
  sort_pairs(p, m * int(p.top_k), reinterpret_cast<int32_t*>(scores));
}

// ------------------------------------------------------------------------------------------------------------ up
// What one block of moe_up or a segment of moe_down multiplies: rows [0, n) of `pair(r)` with matrix `expert`.
struct Run {
  int expert, first, n;
};

// The run of pairs that begins at sorted position `slot`; n = 0 if none begins there.
__device__ __forceinline__ Run run_at(int slot, int pairs, bool one, const int32_t* ids, const int32_t* offsets,
                                      const int32_t* order, int most) {
  if (slot >= pairs) return {0, 0, 0};
  if (one) return {ids[slot], slot, 1};
  const int expert = ids[order[slot]], first = offsets[expert];
  if ((slot - first) % most) return {0, 0, 0};
  return {expert, slot, min(most, offsets[expert + 1] - slot)};
}

template <int F, int R> __global__ void __launch_bounds__(kWarps * 32, kBlocksPerSm)
    moe_up_kernel(MoeUpParams p, Panels up, Panels shared, Prologue pro, int64_t row_bytes, int shared_blocks,
                  int routed_blocks) {
  constexpr int P = panels_per_turn(R);
  release_next();
  const int block = int(blockIdx.x);
  if (block < shared_blocks) prefetch_panels(shared, block * P, P);
  wait_for_previous();
  const int m = rows_of(p.rows, p.m), top_k = int(p.top_k);
  Shared s(shared_memory(), R, pro.groups, kWarps, P * 16);
  const bool wide = aligned16(p.x) && p.ldx % 4 == 0 && aligned16(pro.w);
  const auto row = [&](int64_t t, int r) {
    return Row{p.x + t * p.ldx, nullptr, pro.w, s.inv + r * pro.groups, pro.norm_group, wide};
  };
  if (block < shared_blocks) {
    for (int r0 = 0; r0 < m; r0 += R) {
      const int n = min(R, m - r0);
      stage_rows<F>(pro, n, shared.d, row_bytes, [&](int r) { return row(r0 + r, r); }, s);
      project<F, R, P>(shared, block, 1, n, row_bytes, s, [&](int r, int i, float v) {
        if (p.shared_bias) v += p.shared_bias[i];
        p.hs[int64_t(r0 + r) * p.shared + i] = activate(v, p.act);
      });
    }
    return;
  }
  const int slot = (block - shared_blocks) / routed_blocks, group = (block - shared_blocks) % routed_blocks;
  const Run run = run_at(slot, m * top_k, p.m == 1, p.ids, p.offsets, p.order, R);
  if (run.n == 0) return;
  const Panels w = {up.data + int64_t(run.expert) * ((up.n + 15) / 16) * up.bytes, up.bytes, up.n, up.d};
  stage_rows<F>(
      pro, run.n, w.d, row_bytes, [&](int r) { return row(p.m == 1 ? 0 : p.order[run.first + r] / top_k, r); }, s);
  project<F, R, P>(w, group, 1, run.n, row_bytes, s, [&](int r, int i, float v) {
    if (p.up_bias) v += p.up_bias[int64_t(run.expert) * p.inner + i];
    p.h[int64_t(run.first + r) * p.inner + i] = activate(v, p.act);
  });
}

// ---------------------------------------------------------------------------------------------------------- down
// A segment: rows of h (or hs) against one matrix, added to the tokens of these rows. expert -1: the shared one.
// Shared memory: sums [warps][tokens][P*16], segments of a pass, staged rows.
template <int F, int R> __global__ void __launch_bounds__(kDownWarps * 32, 1)
    moe_down_kernel(MoeDownParams p, Panels down, Panels shared, int64_t row_bytes, int64_t shared_row_bytes,
                    int staged, int with_routed) {
  constexpr int P = down_panels(R), kOut = P * 16;
  release_next();
  const int group = int(blockIdx.x), panel = group * P;
  if (p.shared_down) prefetch_panels(shared, panel, P);
  wait_for_previous();
  const int m = rows_of(p.rows, p.m), top_k = int(p.top_k);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, panels = (down.n + 15) / 16;
  const bool one = p.m == 1;
  uint8_t* base = shared_memory();
  float* sums = reinterpret_cast<float*>(base);  // [warps][R][out]
  uint8_t* x = base + kDownWarps * R * kOut * 4;
  const bool wide = aligned16(p.h) && p.inner % 4 == 0 && aligned16(p.hs) && p.shared % 4 == 0;
  const Row none = {nullptr, nullptr, nullptr, nullptr, 1, wide};
  // Tokens in sets of R, so that their sums fit; all experts of a set in ascending order, the shared one last.
  for (int t0 = 0; t0 < m; t0 += R) {
    const int tokens = min(R, m - t0), pairs = with_routed ? m * top_k : 0;
    for (int i = lane; i < R * kOut; i += 32) sums[warp * R * kOut + i] = 0.f;
    __syncwarp();
    int slot = 0;
    bool shared_left = p.shared_down != nullptr;
    while (slot < pairs || shared_left) {
      // One pass: stage as many rows as fit, then stream the panels of their experts without a barrier between.
      const int first = slot, fit = row_bytes ? min(pairs - first, int(staged / row_bytes)) : 0, last = first + fit;
      stage<F>(x, row_bytes, fit, down.d, [&](int r) {
        Row row = none;
        row.x = p.h + int64_t(first + r) * p.inner;
        return row;
      });
      uint8_t* const shared_x = x + fit * row_bytes;
      const bool take_shared = shared_left && last == pairs && fit * row_bytes + tokens * shared_row_bytes <= staged;
      if (take_shared)
        stage<F>(shared_x, shared_row_bytes, tokens, shared.d, [&](int r) {
          Row row = none;
          row.x = p.hs + int64_t(t0 + r) * p.shared;
          return row;
        });
      __syncthreads();
      while (slot < last) {
        // The pairs of one expert; those of this set lie side by side, as tokens ascend.
        const int expert = p.ids[one ? slot : p.order[slot]];
        int begin = -1, rows = 0, token[R];
        float weight[R];
#pragma unroll
        for (int r = 0; r < R; ++r) {
          token[r] = 0;
          weight[r] = 0.f;
        }
        do {
          const int pair = one ? slot : p.order[slot], t = one ? 0 : pair / top_k - t0;
          if (t >= 0 && t < tokens) {
            if (rows == 0) begin = slot;
#pragma unroll
            for (int r = 0; r < R; ++r)
              if (r == rows) {
                token[r] = t;
                weight[r] = p.weights[pair];
              }
            ++rows;
          }
          ++slot;
        } while (!one && slot < last && p.ids[p.order[slot]] == expert);
        if (rows == 0) continue;
        float acc[R][P][4] = {};
        const uint8_t* w = down.data + (int64_t(expert) * panels + panel) * down.bytes;
        dot<F, R, P, steps_in_flight(R)>(w, down.bytes, panels - panel, down.d, x + (begin - first) * row_bytes,
                                         row_bytes, rows, warp, kDownWarps, down.d.steps, acc);
        sum_lanes(acc);
        if (lane < 4) {
#pragma unroll
          for (int r = 0; r < R; ++r) {
            if (r >= rows) break;
            float* to = sums + (warp * R + token[r]) * kOut + lane * 4;
#pragma unroll
            for (int q = 0; q < P; ++q)
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                const int row = (panel + q) * 16 + lane * 4 + i;
                float v = acc[r][q][i];
                // The bias is added once, by the first warp.
                if (p.down_bias && warp == 0 && row < down.n) v += p.down_bias[int64_t(expert) * p.d + row];
                to[q * 16 + i] += weight[r] * v;
              }
          }
        }
      }
      if (take_shared) {
        float acc[R][P][4] = {};
        dot<F, R, P, steps_in_flight(R)>(shared.at(panel), shared.bytes, panels - panel, shared.d, shared_x,
                                         shared_row_bytes, tokens, warp, kDownWarps, shared.d.steps, acc);
        sum_lanes(acc);
        if (lane < 4) {
#pragma unroll
          for (int r = 0; r < R; ++r) {
            if (r >= tokens) break;
#pragma unroll
            for (int q = 0; q < P; ++q)
#pragma unroll
              for (int i = 0; i < 4; ++i) sums[(warp * R + r) * kOut + q * 16 + lane * 4 + i] += acc[r][q][i];
          }
        }
        shared_left = false;
      }
      __syncthreads();  // the staged rows are read
    }
    for (int i = threadIdx.x; i < tokens * kOut; i += blockDim.x) {
      const int r = i / kOut, row = panel * 16 + i % kOut;
      if (row >= down.n) continue;
      float v = 0.f;
      for (int a = 0; a < kDownWarps; ++a) v += sums[(a * R + r) * kOut + i % kOut];
      if (p.shared_down && p.shared_bias) v += p.shared_bias[row];
      if (p.residual) v += p.residual[int64_t(t0 + r) * p.ldr + row];
      p.out[int64_t(t0 + r) * p.ldo + row] = v;
    }
    __syncthreads();
  }
}

void check_pairs(const char* op, int64_t m, int64_t top_k) {
  if (m * top_k > kMaxPairs)
    throw std::invalid_argument(std::string(op) + ": " + std::to_string(m * top_k) +
                                " pairs; the CUDA kernel for few rows takes at most " + std::to_string(kMaxPairs));
}

}  // namespace

void moe_route(const MoeRouteParams& p, void* stream) {
  check_pairs("moe_route", p.m, p.top_k);
  if (!p.ticket) throw std::invalid_argument("moe_route: ticket is null; it must be one zeroed word in memory");
  const Panels gate = panels_of(p.gate, kW_F32, p.experts, p.d, 1);
  const Prologue pro = prologue_of(p.norm, p.d, p.d, p.eps);
  const size_t row_bytes = Codes<kW_F32>::row_bytes(gate.d);
  const int64_t panels = (p.experts + 15) / 16, scores = (p.experts + p.n_group) * 4;
  // ws has at least 4 (m + 12) d bytes.
  const int parts = p.ws && kRouteParts * p.m * p.experts <= (p.m + 12) * p.d && gate.d.steps >= kRouteParts * kWarps
                        ? kRouteParts
                        : 1;
  if (scores > int64_t(kMostShared / 2))
    throw std::invalid_argument("moe_route: " + std::to_string(p.experts) +
                                " experts exceed the scores that a block holds");
  const auto bytes = [&](int rows) {
    const size_t choice = size_t(scores) * kWarps < kMostShared / 2 ? size_t(scores) * kWarps : kMostShared / 2;
    const size_t product = Shared::bytes(rows, pro.groups, kWarps, 16, row_bytes);
    return 16 + (product > choice ? product : choice);
  };
  with_rows("moe_route", p.m, bytes, [&](auto rows) {
    constexpr int R = decltype(rows)::value;
    const Launch l = {dim3(unsigned(panels), unsigned(parts)), kWarps * 32, bytes(R), stream, true};
    launch("moe_route", moe_route_kernel<R>, l, p, gate, pro, int64_t(row_bytes), parts);
  });
}

namespace {

// One launch for the parts that share a weight format; `routed` and `shared` say which ones.
template <int F> void launch_up(const MoeUpParams& p, bool routed, bool with_shared, void* stream) {
  const Prologue pro = prologue_of(p.norm, p.d, p.d, p.eps);
  const Panels up = routed ? panels_of(p.up, F, p.inner, p.d, p.group) : Panels{};
  const Panels sh = with_shared ? panels_of(p.shared_up, F, p.shared, p.d, p.shared_group) : Panels{};
  const size_t a = routed ? Codes<F>::row_bytes(up.d) : 0, b = with_shared ? Codes<F>::row_bytes(sh.d) : 0,
               row_bytes = a > b ? a : b;
  const auto bytes = [&](int rows) {
    return Shared::bytes(rows, pro.groups, kWarps, 16 * panels_per_turn(rows), row_bytes);
  };
  with_rows("moe_up", p.m, bytes, [&](auto rows) {
    constexpr int R = decltype(rows)::value;
    constexpr int per = 16 * panels_per_turn(R);
    const int64_t shared_blocks = with_shared ? (p.shared + per - 1) / per : 0,
                  routed_blocks = (p.inner + per - 1) / per;
    const int64_t blocks = shared_blocks + (routed ? p.m * p.top_k * routed_blocks : 0);
    const Launch l = {unsigned(blocks), kWarps * 32, bytes(R), stream, true};
    launch("moe_up", moe_up_kernel<F, R>, l, p, up, sh, pro, int64_t(row_bytes), int(shared_blocks),
           int(routed_blocks));
  });
}

template <int F> void launch_down(const MoeDownParams& p, bool routed, void* stream) {
  const Panels down = panels_of(p.down, routed ? F : p.format, p.d, p.inner, p.group);
  const Panels sh = p.shared_down ? panels_of(p.shared_down, F, p.d, p.shared, p.shared_group) : Panels{};
  const size_t row_bytes = routed ? Codes<F>::row_bytes(down.d) : 0,
               shared_bytes = p.shared_down ? Codes<F>::row_bytes(sh.d) : 0;
  const auto staged = [&](int rows) {
    const size_t all = p.m * p.top_k * row_bytes + rows * shared_bytes,
                 least = row_bytes > rows * shared_bytes ? row_bytes : rows * shared_bytes;
    const size_t most = kStaged > least ? kStaged : least;
    return all < most ? all : most;
  };
  const auto bytes = [&](int rows) { return size_t(kDownWarps) * rows * down_panels(rows) * 64 + staged(rows); };
  with_rows("moe_down", p.m, bytes, [&](auto rows) {
    constexpr int R = decltype(rows)::value;
    constexpr int per = 16 * down_panels(R);
    const Launch l = {unsigned((p.d + per - 1) / per), kDownWarps * 32, bytes(R), stream, true};
    launch("moe_down", moe_down_kernel<F, R>, l, p, down, sh, int64_t(row_bytes), int64_t(shared_bytes), int(staged(R)),
           int(routed));
  });
}

}  // namespace

void moe_up(const MoeUpParams& p, void* stream) {
  check_pairs("moe_up", p.m, p.top_k);
  const bool same = p.shared_up && p.shared_format == p.format;
  with_format("moe_up", p.format, [&](auto f) { launch_up<decltype(f)::value>(p, true, same, stream); });
  if (p.shared_up && !same)
    with_format("moe_up", p.shared_format, [&](auto f) { launch_up<decltype(f)::value>(p, false, true, stream); });
}

void moe_down(const MoeDownParams& p, void* stream) {
  check_pairs("moe_down", p.m, p.top_k);
  const bool same = !p.shared_down || p.shared_format == p.format;
  MoeDownParams routed = p;
  if (!same) routed.shared_down = nullptr;
  with_format("moe_down", p.format, [&](auto f) { launch_down<decltype(f)::value>(routed, true, stream); });
  if (same) return;
  // Another format for the shared expert: its own launch adds to what is there.
  MoeDownParams rest = p;
  rest.residual = p.out;
  rest.ldr = p.ldo;
  with_format("moe_down", p.shared_format, [&](auto f) { launch_down<decltype(f)::value>(rest, false, stream); });
}

}  // namespace engine::cuda
