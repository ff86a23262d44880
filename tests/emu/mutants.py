"""Small wrong edits of kernels. Each must make a test of the emulator fail; a survivor needs a reason.

`old` must occur exactly once in the file. Add one for every line whose loss a case should notice:
bounds, barriers, masks, tails, rounding.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    file: str  # under csrc/
    kernel: str
    name: str
    old: str
    new: str

    @property
    def id(self) -> str:
        return f"{self.kernel}: {self.name}"


RNG = "ops/rng/rng.cu"
MUTANTS = [
    Mutant(RNG, "rng", "no tail", "if (4 * c + j < p.n) out", "out"),
    Mutant(RNG, "rng", "tail one short", "if (4 * c + j < p.n)", "if (4 * c + j < p.n - 1)"),
    Mutant(RNG, "rng", "store crosses the end", "if (4 * c + 4 <= p.n)", "if (4 * c + 3 <= p.n)"),
    Mutant(RNG, "rng", "last counter lost", "(p.n + 3) / 4, step", "p.n / 4, step"),
    Mutant(RNG, "rng", "blocks overlap", "int64_t(blockIdx.x) * blockDim.x + threadIdx.x",
           "int64_t(blockIdx.x) * (blockDim.x - 1) + threadIdx.x"),
    Mutant(RNG, "rng", "offset dropped", "uint32_t(c), offset,", "uint32_t(c), 0,"),
    Mutant(RNG, "rng", "stream dropped", "offset, uint32_t(p.stream)", "offset, 0"),
    Mutant(RNG, "rng", "kinds swapped", "p.kind == 1 ?", "p.kind != 1 ?"),
    Mutant(RNG, "rng", "second pair is the first", "(r.v[2], r.v[3], v + 2)", "(r.v[0], r.v[1], v + 2)"),
    Mutant(RNG, "rng", "sine and cosine swapped", "&s, &c);", "&c, &s);"),
    Mutant(RNG, "rng", "half dropped", "(double(a) + 0.5)", "(double(a) + 0.0)"),
    Mutant(RNG, "rng", "fp32 logarithm", "sqrt(-2.0 * log(u))", "sqrtf(-2.0f * logf(float(u)))"),
    Mutant(RNG, "rng", "too few blocks", "kMaxBlocks = 1024", "kMaxBlocks = 0"),
    Mutant(RNG, "rng", "early read", "  wait_for_previous();", "  "),
]  # fmt: skip

GEMV, GEMM, MOE = "ops/gemm/gemv.cuh", "ops/gemm/gemm.cu", "ops/moe/moe.cu"
MUTANTS += [
    # the product that gemm, moe_up, moe_route and moe_down share
    Mutant(
        GEMV,
        "gemm",
        "scale of the wrong group",
        "const int g = v * 8 >> d.shift;",
        "const int g = v * 8 >> (d.shift + 1);",
    ),
    Mutant(
        GEMV,
        "gemm",
        "scale of the neighbour group (8 bits)",
        "const int g = v * 4 >> d.shift;",
        "const int g = (v * 4 >> d.shift) ^ 1;",
    ),
    Mutant(GEMV, "gemm", "zero point dropped (4 bits)", "int32_t(x.z));", "0);"),
    Mutant(GEMV, "gemm", "zero point of 127 (8 bits)", "uint32_t(-128 * sum)", "uint32_t(-127 * sum)"),
    Mutant(GEMV, "gemm", "high nibbles lost", "(w[i] >> 4) & 0x0f0f0f0fu", "w[i] & 0x0f0f0f0fu"),
    Mutant(
        GEMV,
        "gemm",
        "second of a bf16 pair lost",
        "acc[i] = fmaf(__uint_as_float(w[i] & 0xffff0000u), x.y, acc[i]);",
        "",
    ),
    Mutant(
        GEMV, "gemm", "last vector lost", "s + u < end && v < d.vectors && p", "s + u < end && v + 1 < d.vectors && p"
    ),
    Mutant(
        GEMV, "gemm", "tail of K not masked", "s + u < end && v < d.vectors && p < count", "s + u < end && p < count"
    ),
    Mutant(GEMV, "gemm", "panels beyond the last not masked", "v < d.vectors && p < count ?", "v < d.vectors ?"),
    Mutant(
        GEMV,
        "gemm",
        "a warp's steps twice",
        "for (int s = first * U; s < end; s += stride * U)",
        "for (int s = first * U; s < end; s += (stride - 1) * U)",
    ),
    Mutant(GEMV, "gemm", "one lane left out of the sum", "v += __shfl_xor_sync(kFullWarp, v, 8);", ""),
    Mutant(
        GEMV,
        "gemm",
        "last warp left out",
        "for (int a = 0; a < warps; ++a) v += sums[(a * R + r) * out",
        "for (int a = 0; a + 1 < warps; ++a) v += sums[(a * R + r) * out",
    ),
    Mutant(
        GEMV,
        "gemm",
        "rows beyond N written",
        "      if (row >= w.n) continue;\n      float v = 0.f;\n      for (int a = 0; a < warps",
        "      float v = 0.f;\n      for (int a = 0; a < warps",
    ),
    Mutant(
        GEMV,
        "gemm",
        "sums read before they are there",
        "i] = acc[r][p][i];\n    }\n    __syncthreads();",
        "i] = acc[r][p][i];\n    }\n",
    ),
    Mutant(
        GEMV,
        "gemm",
        "rows read before they are staged",
        "stage<F>(s.x, row_bytes, n, d, row_of);\n  __syncthreads();",
        "stage<F>(s.x, row_bytes, n, d, row_of);",
    ),
    Mutant(GEMV, "gemm", "codes rounded towards zero", "__float2int_rn(v[4 * i + j] * inv)", "int(v[4 * i + j] * inv)"),
    Mutant(
        GEMV,
        "gemm",
        "largest value of half a group",
        "for (int o = 1; o < lanes; o <<= 1)",
        "for (int o = 1; 2 * o < lanes; o <<= 1)",
    ),
    Mutant(
        GEMV,
        "gemm",
        "epsilon dropped from the groups",
        "sqrtf(s / float(width) + pro.eps)",
        "sqrtf(s / float(width - 1) + pro.eps)",
    ),
    Mutant(
        GEMV, "gemm", "norm over one value less", "sqrtf(s / float(k) + pro.eps)", "sqrtf(s / float(k - 1) + pro.eps)"
    ),
    Mutant(
        GEMV,
        "gemm",
        "gate without its sigmoid",
        "return z ? x[k] * silu(z[k]) : x[k];",
        "return z ? x[k] * z[k] : x[k];",
    ),
    Mutant(
        GEMM,
        "gemm",
        "rows of the next pass repeat",
        "for (int r0 = 0; r0 < m; r0 += R) {",
        "for (int r0 = 0; r0 < min(m, R); r0 += R) {",
    ),
    Mutant(GEMM, "gemm", "residual of the first row", "v += p.residual[t * p.ldr + row];", "v += p.residual[row];"),
    Mutant(
        GEMM,
        "gemm",
        "bias after the activation",
        "      if (p.bias) v += p.bias[row];\n      v = activate(v, p.act) * p.scale;",
        "      v = activate(v, p.act) * p.scale;\n      if (p.bias) v += p.bias[row];",
    ),
    Mutant(GEMM, "gemm", "early read", "  wait_for_previous();\n", ""),
    # moe
    Mutant(
        MOE,
        "moe_route",
        "ties to the higher index",
        "if (v > value || (v == value && i < index)) {",
        "if (v > value || (v == value && i > index)) {",
    ),
    Mutant(
        MOE,
        "moe_route",
        "bias in the weight",
        "const float s = sigmoid(logits[at]);",
        "const float s = sigmoid(logits[at]) + p.bias[at];",
    ),
    Mutant(MOE, "moe_route", "chosen twice", "      choice[at] = NAN;\n", ""),
    Mutant(MOE, "moe_route", "group score of one expert", "score[g] = width > 1 ? a + b : a;", "score[g] = a;"),
    Mutant(MOE, "moe_route", "groups not masked", "if (!is_nan(score[e / width])) choice[e] = -INFINITY;", ""),
    Mutant(
        MOE,
        "moe_route",
        "every block chooses",
        "  if (!last_block(p.ticket, gridDim.x * gridDim.y, flag)) return;",
        "  last_block(p.ticket, gridDim.x * gridDim.y, flag);",
    ),
    Mutant(MOE, "moe_route", "offsets shifted", "p.offsets[e] = count[e] = at;", "p.offsets[e] = count[e] = at + n;"),
    Mutant(
        MOE,
        "moe_route",
        "order before all ids are there",
        "  if (p.m == 1) return;\n  __syncthreads();\n",
        "  if (p.m == 1) return;\n",
    ),
    Mutant(MOE, "moe_route", "not renormalised", "p.norm_topk ? p.scale / (sum + 1e-20f) : p.scale", "p.scale"),
    Mutant(
        MOE,
        "moe_up",
        "the first expert's weights",
        "const Panels w = {up.data + int64_t(run.expert) *",
        "const Panels w = {up.data + int64_t(0) *",
    ),
    Mutant(
        MOE,
        "moe_up",
        "run one pair too long",
        "return {expert, slot, min(most, offsets[expert + 1] - slot)};",
        "return {expert, slot, min(most, offsets[expert + 1] - slot + 1)};",
    ),
    Mutant(
        MOE,
        "moe_up",
        "token of the pair",
        "p.order[run.first + r] / top_k, r)",
        "p.order[run.first + r] % (m * top_k) / (top_k + 1), r)",
    ),
    Mutant(MOE, "moe_up", "runs overlap", "if ((slot - first) % most) return {0, 0, 0};", ""),
    Mutant(
        MOE,
        "moe_up",
        "activation dropped",
        "    p.h[int64_t(run.first + r) * p.inner + i] = activate(v, p.act);",
        "    p.h[int64_t(run.first + r) * p.inner + i] = v;",
    ),
    Mutant(
        MOE,
        "moe_up",
        "shared rows of one pass",
        "p.hs[int64_t(r0 + r) * p.shared + i]",
        "p.hs[int64_t(r) * p.shared + i]",
    ),
    Mutant(MOE, "moe_down", "weight dropped", "to[q * 16 + i] += weight[r] * v;", "to[q * 16 + i] += v;"),
    Mutant(
        MOE,
        "moe_down",
        "sums of the wrong token",
        "float* to = sums + (warp * R + token[r]) * kOut + lane * 4;",
        "float* to = sums + (warp * R + r) * kOut + lane * 4;",
    ),
    Mutant(
        MOE,
        "moe_down",
        "shared expert lost",
        "        shared_left = false;",
        "        shared_left = false;\n        continue;",
    ),
    Mutant(
        MOE,
        "moe_down",
        "rows read before they are staged",
        "          return row;\n        });\n      __syncthreads();\n      while",
        "          return row;\n        });\n      while",
    ),
    Mutant(MOE, "moe_down", "residual lost", "if (p.residual) v += p.residual[int64_t(t0 + r) * p.ldr + row];", ""),
    Mutant(
        MOE,
        "moe_down",
        "sums kept from the set before",
        "sums[warp * R * kOut + i] = 0.f;",
        "if (t0 == 0) sums[warp * R * kOut + i] = 0.f;",
    ),
    Mutant(MOE, "moe_down", "staged rows of another pair", "x + (begin - first) * row_bytes,", "x,"),
    Mutant(
        MOE,
        "moe_down",
        "staged rows replaced while they are read",
        "      __syncthreads();  // the staged rows are read\n",
        "",
    ),
]

SSM = "ops/ssm/ssm.cu"
MUTANTS += [
    Mutant(SSM, "ssm", "channels read before they are there", "* p.a[head]);\n    __syncthreads();", "* p.a[head]);"),
    Mutant(
        SSM,
        "ssm",
        "sums read before they are there",
        "sums[warp * kQuads + quad] = y;\n    __syncthreads();",
        "sums[warp * kQuads + quad] = y;",
    ),
    Mutant(
        SSM,
        "ssm",
        "conv state moved by every block",
        "  if (!last_block(p.ticket + group, unsigned(per_group) * gridDim.y, flag)) return;",
        "  last_block(p.ticket + group, unsigned(per_group) * gridDim.y, flag);",
    ),
    Mutant(SSM, "ssm", "conv state never moved", "  if (tid < width) move_on(p, channels, m, x0 + tid);\n", ""),
    Mutant(
        SSM,
        "ssm",
        "taps shifted",
        "const int64_t i = t - past + j;",
        "const int64_t i = t - past + j + (j < past ? 1 : 0);",
    ),
    Mutant(
        SSM,
        "ssm",
        "P beyond the head",
        "tid < width ? conv(p, channels, t, x0 + tid) : 0.f",
        "conv(p, channels, t, x0 + tid)",
    ),
    Mutant(
        SSM,
        "ssm",
        "B of the first group",
        "(i < n_state ? group * n_state + i : gn + group * n_state + i - n_state));\n    if",
        "(i < n_state ? i : gn + group * n_state + i - n_state));\n    if",
    ),
    Mutant(SSM, "ssm", "decay without the step size", "expf(dt * p.a[head])", "expf(p.a[head])"),
    Mutant(SSM, "ssm", "skip dropped", "float v = p.d_skip[head] * x[tid];", "float v = 0.f;"),
    Mutant(SSM, "ssm", "state not written", "  if (Held) store(row);\n", ""),
    Mutant(SSM, "ssm", "softplus beyond 20 only", "raw > 20.f ? raw : log1pf(expf(raw))", "raw"),
    Mutant(SSM, "ssm", "early read", "  wait_for_previous();\n", ""),
]

ATTENTION = "ops/attention/attention.cu"
MUTANTS += [
    Mutant(
        ATTENTION,
        "attention.split bf16",
        "future visible",
        "s[nb][i] = position < limit[i >> 1] ?",
        "s[nb][i] = position < to ?",
    ),
    Mutant(
        ATTENTION, "attention.split bf16", "scale dropped", "s[nb][i] * p.scale : -INFINITY", "s[nb][i] : -INFINITY"
    ),
    Mutant(
        ATTENTION,
        "attention.split bf16",
        "columns numbered straight",
        "const int64_t position = at + 16 * (n / 4) + 4 * (n % 4) + nb;",
        "const int64_t position = at + 8 * nb + n;",
    ),
    Mutant(ATTENTION, "attention.split bf16", "sums not rescaled", "acc[d][nb][i] *= by[i >> 1];", ""),
    Mutant(
        ATTENTION,
        "attention.split bf16",
        "largest of half a row",
        "      best[h] = fmaxf(best[h], __shfl_xor_sync(kFullWarp, best[h], 2));\n".replace("      ", "        ", 1),
        "",
    ),
    Mutant(
        ATTENTION,
        "attention.split bf16",
        "read before it is appended",
        "    __syncthreads();  // appended and staged\n",
        "",
    ),
    Mutant(
        ATTENTION,
        "attention.split bf16",
        "V beyond the context",
        "if (panel < panels && position + 2 < length) b1",
        "if (panel < panels) b1",
    ),
    Mutant(
        ATTENTION,
        "attention.split bf16",
        "other half of the last pair kept",
        "if (at == end - 1 && !(at & 1)) pair[1] = 0;",
        "",
    ),
    Mutant(
        ATTENTION,
        "attention.split bf16",
        "last warp left out of the total",
        "total += by * st[1];",
        "total += w + 1 < kWarps ? by * st[1] : 0.f;",
    ),
    Mutant(ATTENTION, "attention.split bf16", "tail of d", "d + 1 < p.d ? x[1] : 0.f", "x[1]"),
    Mutant(ATTENTION, "attention.split f32", "future visible", "end = min(to, pos + t + 1);", "end = to;"),
    Mutant(
        ATTENTION,
        "attention.split f32",
        "read before it is appended",
        "append(p, g, head, pos, max(from, pos), to, length);\n  __syncthreads();\n  float* s",
        "append(p, g, head, pos, max(from, pos), to, length);\n  float* s",
    ),
    Mutant(
        ATTENTION,
        "attention.split f32",
        "scores replaced while they are read",
        "    __syncthreads();  // scores and sums are read\n",
        "",
    ),
    Mutant(
        ATTENTION,
        "attention.split f32",
        "head of the first group",
        "h = head * g.group + row % g.group, end",
        "h = row % g.group, end",
    ),
    Mutant(
        ATTENTION,
        "attention.split f32",
        "last position lost",
        "for (int64_t at = from; at < end; ++at) a =",
        "for (int64_t at = from; at + 1 < end; ++at) a =",
    ),
    Mutant(
        ATTENTION,
        "attention.combine",
        "weights of the splits dropped",
        "const float by = most > -INFINITY ? expf(most - top) : 0.f;",
        "const float by = most > -INFINITY ? 1.f : 0.f;",
    ),
    Mutant(
        ATTENTION,
        "attention.combine",
        "last split lost",
        "for (int s = 0; s < splits; ++s) v =",
        "for (int s = 0; s + 1 < splits; ++s) v =",
    ),
    Mutant(
        ATTENTION,
        "attention.combine",
        "splits beyond the context",
        "const bool mine = int(threadIdx.x) < splits;",
        "const bool mine = int(threadIdx.x) <= splits;",
    ),
    Mutant(
        ATTENTION,
        "attention.combine",
        "total read before it is there",
        "  if (lane == 0) work[kWarps + warp] = share;\n  __syncthreads();",
        "  if (lane == 0) work[kWarps + warp] = share;",
    ),
    Mutant(ATTENTION, "attention.combine", "not divided by the total", "= v / total;", "= v;"),
]

SAMPLE = "ops/sample/sample.cu"
MUTANTS += [
    Mutant(SAMPLE, "sample.score", "penalty the wrong way", "l > 0.f ? l / penalty : l * penalty", "l / penalty"),
    Mutant(SAMPLE, "sample.score", "temperature dropped", "    l *= inv_t;\n", ""),
    Mutant(
        SAMPLE,
        "sample.score",
        "every block finishes",
        "  if (!last_block(p.ticket, gridDim.x, flag)) return;",
        "  last_block(p.ticket, gridDim.x, flag);",
    ),
    Mutant(
        SAMPLE, "sample.score", "threshold one bin low", "if (hist[b] >= want) break;", "if (hist[b] > want) break;"
    ),
    Mutant(SAMPLE, "sample.score", "min-p dropped", "if (min_p > 0.f) floor", "if (min_p > 2.f) floor"),
    Mutant(
        SAMPLE,
        "sample.score",
        "histogram read before it is full",
        "static_cast<unsigned long long>(weight_of(l, top, by_mass)));\n    }\n    __syncthreads();",
        "static_cast<unsigned long long>(weight_of(l, top, by_mass)));\n    }",
    ),
    Mutant(
        SAMPLE,
        "sample.score",
        "last token of a chunk lost",
        "end = min(first + kSampleChunk, p.vocab);\n  float value",
        "end = min(first + kSampleChunk, p.vocab) - 1;\n  float value",
    ),
    Mutant(SAMPLE, "sample.score", "ties to the higher id", "(a == b && ia < ib)", "(a == b && ia > ib)"),
    Mutant(
        SAMPLE,
        "sample.draw",
        "threshold ignored",
        "|| !(l >= h.threshold) || double(l) < reach) continue;",
        "|| double(l) < reach) continue;",
    ),
    Mutant(SAMPLE, "sample.draw", "a token without probability", "if (!(l > -INFINITY) || ", "if ("),
    Mutant(
        SAMPLE,
        "sample.draw",
        "same noise every step",
        "const double u = uniform_of(seed, i, step);",
        "const double u = uniform_of(seed, i, 0);",
    ),
    Mutant(SAMPLE, "sample.draw", "noise of the neighbour", "id & 2 ? high : low", "id & 2 ? low : high"),
    Mutant(SAMPLE, "sample.draw", "short cut too eager", "< h.bound - 0.01) continue;", "< h.bound + 2.0) continue;"),
    Mutant(
        SAMPLE,
        "sample.draw",
        "last token of a chunk lost",
        "end = min(first + kSampleChunk, p.vocab);\n  double score",
        "end = min(first + kSampleChunk, p.vocab) - 1;\n  double score",
    ),
    Mutant(
        SAMPLE,
        "sample.draw",
        "every block finishes",
        "  if (!last_block(p.ticket + 1, gridDim.x, flag)) return;",
        "  last_block(p.ticket + 1, gridDim.x, flag);",
    ),
]

GATHER = "ops/gather/gather.cu"
MUTANTS += [
    Mutant(GATHER, "gather", "ids not bounded above", "id >= 0 && id < p.vocab", "id >= 0"),
    Mutant(GATHER, "gather", "ids not bounded below", "id >= 0 && id < p.vocab", "id < p.vocab"),
    Mutant(
        GATHER,
        "gather",
        "tail lost",
        "for (int64_t i = eights * 8 + threadIdx.x;",
        "for (int64_t i = eights * 8 + kThreads + threadIdx.x;",
    ),
    Mutant(
        GATHER,
        "gather",
        "tail of f32 lost",
        "for (int64_t i = fours * 4 + threadIdx.x;",
        "for (int64_t i = fours * 4 + kThreads + threadIdx.x;",
    ),
    Mutant(
        GATHER,
        "gather",
        "halves of a pair swapped",
        "to[0] = make_float4(__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xffff0000u)",
        "to[0] = make_float4(__uint_as_float(v.x & 0xffff0000u), __uint_as_float(v.x << 16)",
    ),
    Mutant(GATHER, "gather", "row of the first id", "const int64_t id = p.ids[t];", "const int64_t id = p.ids[0];"),
]

MUTANTS += [
    Mutant(GATHER, "gather_mean", "last row of a run lost", "t < p.n; ++t) sum", "t < p.n - 1; ++t) sum"),
    Mutant(GATHER, "gather_mean", "sum, not mean", "= sum / float(p.n);", "= sum;"),
    Mutant(GATHER, "gather_mean", "runs overlap", "(b * p.n + t) * p.ldx", "(b + t) * p.ldx"),
    Mutant(GATHER, "gather_mean", "channels not bounded", "  if (i >= p.d) return;\n  float sum", "  float sum"),
]

MUTANTS += [
    Mutant(
        GATHER, "gather_sum", "last entry lost", "j < p.offsets[i + 1]; ++j) sum", "j < p.offsets[i + 1] - 1; ++j) sum"
    ),
    Mutant(GATHER, "gather_sum", "weights dropped", "fmaf(p.weights[j], x[", "fmaf(1.f, x["),
    Mutant(GATHER, "gather_sum", "first grid only", "p.x + b * p.r * p.ldx + c;", "p.x + c;"),
    Mutant(
        GATHER, "gather_sum", "channels not bounded", "  if (c >= p.d) return;\n  const float* x", "  const float* x"
    ),
    Mutant(GATHER, "gather_sum", "rows not looked up", "x[p.rows[j] * p.ldx]", "x[i * p.ldx]"),
    Mutant(GATHER, "gather_sum", "bf16 written as f32", "if (p.out_dtype == kBF16)", "if (false)"),
]

FLOW = "ops/flow/flow.cu"
MUTANTS += [
    Mutant(
        FLOW,
        "flow_begin",
        "finished chunks go on",
        "if (j < 0 || j >= p.steps) return;\n  const float tau",
        "const float tau",
    ),
    Mutant(FLOW, "flow", "implied is renoise", "p.rule == kFlowImplied ?", "false ?"),
    Mutant(
        FLOW,
        "flow",
        "sample and prediction swapped",
        "kept * value + (1.f - kept) * pred",
        "kept * pred + (1.f - kept) * value",
    ),
    Mutant(FLOW, "flow", "ratio of times upside down", "now[h + i] / now[i]", "now[i] / now[h + i]"),
    Mutant(FLOW, "flow_begin", "one committed action too many", "i < p.delay[b]", "i <= p.delay[b]"),
    Mutant(FLOW, "flow_begin", "prefix not kept", "      p.x[row * a + c] = x;\n", ""),
    Mutant(
        FLOW,
        "flow_begin",
        "time of the next step",
        "(b * (p.steps + 1) + j) * h + i];\n  const int32_t time",
        "(b * (p.steps + 1) + j + 1) * h + i];\n  const int32_t time",
    ),
    Mutant(FLOW, "flow_begin", "tables of the first chunk", "(b * p.steps + j) * h + i]", "j * h + i]"),
    Mutant(FLOW, "flow_begin", "no noise", "p.noise[row * a + c] * tau + x", "x"),
    Mutant(FLOW, "flow_begin", "weights swapped", "* tau + x * (1.f - tau)", "* (1.f - tau) + x * tau"),
    Mutant(FLOW, "flow_begin", "hidden channels shown", "p.hidden && p.hidden[c] ? 0.f : value", "value"),
    Mutant(FLOW, "flow_begin", "context of the first chunk", "p.context[b * context + c]", "p.context[c]"),
    Mutant(FLOW, "flow_begin", "last column of the context lost", "c < context; c", "c < context - 1; c"),
    Mutant(FLOW, "flow_begin", "times behind no context", "out[a + context + c] =", "out[a + c] ="),
    Mutant(FLOW, "flow_begin", "row not told", "if (threadIdx.x == 0) p.rows[row] = time;", ""),
    Mutant(FLOW, "flow_begin", "early read", "  wait_for_previous();\n  const int64_t row", "  const int64_t row"),
    Mutant(
        FLOW,
        "flow_end",
        "finished chunks go on",
        "if (j < 0 || j >= p.steps) return;\n  const float* now",
        "const float* now",
    ),
    Mutant(FLOW, "flow_end", "uphill", "(now[h + i] - now[i]) * pred", "(now[i] - now[h + i]) * pred"),
    Mutant(FLOW, "flow_end", "finished actions move", "else if (now[i] > 0.f)", "else"),
    Mutant(FLOW, "flow_end", "padding leaves too", "if (c >= p.dims || p.due", "if (p.due"),
    Mutant(FLOW, "flow_end", "due of the first chunk", "p.due[b * h + i] != j", "p.due[i] != j"),
    Mutant(FLOW, "flow_end", "leaves a step late", "p.due[b * h + i] != j ||", "p.due[b * h + i] != j - 1 ||"),
    Mutant(FLOW, "flow_end", "first slot for all", "p.ring[(slot * h + i)", "p.ring[i"),
    Mutant(FLOW, "flow_end", "no logistic", "if (p.squash && p.squash[c]) value", "if (false) value"),
    Mutant(FLOW, "flow_end", "logistic for all", "if (p.squash && p.squash[c]) value", "if (p.squash) value"),
    Mutant(FLOW, "flow_end", "scale of the first chunk", "p.scale[b * p.dims + c]", "p.scale[c]"),
    Mutant(FLOW, "flow_end", "offset of the first chunk", "p.offset[b * p.dims + c]", "p.offset[c]"),
    Mutant(
        FLOW,
        "flow_end",
        "NaN passes unseen",
        "if (!(fabsf(value) <= 3.402823466e38f))",
        "if (fabsf(value) > 3.402823466e38f)",
    ),
    Mutant(FLOW, "flow_end", "no lower limit", "value < p.low[c] ? p.low[c] : value", "value"),
    Mutant(FLOW, "flow_end", "no upper limit", "value > p.high[c] ? p.high[c] : value", "value"),
    Mutant(
        FLOW,
        "flow_end",
        "step moves before all have read it",
        "  __syncthreads();\n  if (threadIdx.x == 0) p.step[b]",
        "  if (threadIdx.x == 0) p.step[b]",
    ),
    Mutant(FLOW, "flow_end", "step stands still", "p.step[b] = int32_t(j + 1)", "p.step[b] = int32_t(j)"),
    Mutant(FLOW, "flow_end", "early read", "  wait_for_previous();\n  const int64_t b", "  const int64_t b"),
]

NORM, REDUCE = "ops/norm/norm.cu", "base/reduce.cuh"
MUTANTS += [
    Mutant(NORM, "norm", "sum not added", "more ? x[i] + more[i] : x[i]", "x[i]"),
    Mutant(NORM, "norm", "no mean", "if (p.kind == kProLayerNorm) {", "if (false) {"),
    Mutant(NORM, "norm", "mean of RMS norms", "if (p.kind == kProLayerNorm) {", "if (true) {"),
    Mutant(REDUCE, "norm", "sums overwritten", "total += sums[w];\n  __syncthreads();", "total += sums[w];"),
    Mutant(REDUCE, "norm", "sums read early", "= v;\n  __syncthreads();\n  float total", "= v;\n  float total"),
    Mutant(
        REDUCE, "norm", "last warp lost", "w < kWarps; ++w) total += sums[w];", "w < kWarps - 1; ++w) total += sums[w];"
    ),
    Mutant(REDUCE, "norm", "half a warp", "for (int o = 16; o; o >>= 1) v +=", "for (int o = 8; o; o >>= 1) v +="),
    Mutant(NORM, "norm", "no weight", "if (p.w) v *= p.w[i];", ""),
    Mutant(NORM, "norm", "no bias", "if (p.b) v += p.b[i];", ""),
    Mutant(NORM, "norm", "scale without one", "v *= 1.f + modulation", "v *= modulation"),
    Mutant(NORM, "norm", "shift from the scale", "mod + p.mod_shift + i", "mod + p.mod_scale + i"),
    Mutant(NORM, "norm", "modulation of row 0", "(p.mod_rows ? p.mod_rows[t] : 0)", "(p.mod_rows ? p.mod_rows[0] : 0)"),
    Mutant(NORM, "norm", "no activation", "put(i, activate(v, p.act));", "put(i, v);"),
    Mutant(
        NORM,
        "norm",
        "border keeps what it held",
        "if (t < 0) {\n    for (int64_t i = threadIdx.x; i < p.k; i += kThreads) put(i, 0.f);",
        "if (t < 0) {",
    ),
    Mutant(NORM, "norm", "border not told from cells", "p.width ? norm_cell(row, p.width, m) : row", "row"),
    Mutant("ops/norm/norm.h", "norm", "cells beyond the last line", "|| y >= m / width ", ""),
    Mutant("ops/norm/norm.h", "norm", "cells of the line before", "|| x >= width ?", "?"),
    Mutant(NORM, "norm", "bf16 written as f32", "if (p.out_dtype == kBF16)", "if (false)"),
    Mutant(NORM, "norm", "normed where none is asked", "if (p.kind != kProNone) {", "if (true) {"),
    Mutant(NORM, "norm", "one sum for every row", "p.add + t * p.ldadd", "p.add"),
    Mutant(NORM, "norm", "early read", "  wait_for_previous();", "  "),
]

CONV = "ops/conv/conv.cu"
MUTANTS += [
    Mutant(CONV, "conv_patches", "padding not counted", "oy * p.stride - p.pad + ky", "oy * p.stride + ky"),
    Mutant(CONV, "conv_patches", "no stride", "ox * p.stride - p.pad + kx", "ox - p.pad + kx"),
    Mutant(CONV, "conv_patches", "rows not bounded below", "if (y >= 0 && y < p.height &&", "if (y < p.height &&"),
    Mutant(CONV, "conv_patches", "columns not bounded above", "x >= 0 && x < p.width) {", "x >= 0) {"),
    Mutant(
        CONV,
        "conv_patches",
        "taps transposed",
        "kx = at / c % p.size, ky = at / c / p.size",
        "ky = at / c % p.size, kx = at / c / p.size",
    ),
    Mutant(
        CONV, "conv_patches", "first grid for all", "((b * p.height + y) * p.width + x) * c", "(y * p.width + x) * c"
    ),
    Mutant(CONV, "conv_patches", "scale dropped", "if (p.scale) v = v * p.scale[i] + p.offset[i];", ""),
    Mutant(CONV, "conv_patches", "bytes read as floats", "p.kind == 0 ?", "true ?"),
    Mutant(CONV, "conv_depthwise", "no residual", "= p.x[cell * c + i] + sum;", "= sum;"),
    Mutant(CONV, "conv_depthwise", "no bias", "float sum = p.bias[i];", "float sum = 0.f;"),
    Mutant(CONV, "conv_depthwise", "rows run into the next grid", "gy < 0 || gy >= p.height ||", "gy < 0 ||"),
    Mutant(CONV, "conv_depthwise", "columns wrap", "|| gx < 0 || gx >= p.width) continue;", ") continue;"),
    Mutant(CONV, "conv_depthwise", "taps transposed", "p.w[(ky * 3 + kx) * c + i]", "p.w[(kx * 3 + ky) * c + i]"),
    Mutant(CONV, "conv_depthwise", "channels not bounded", "  if (i >= c) return;", ""),
]

CODEBOOK = "ops/codebook/codebook.cu"
MUTANTS += [
    Mutant(CODEBOOK, "codebook_search", "no lengths", "p.norms[k] - 2.f * sum[r]", "-2.f * sum[r]"),
    Mutant(CODEBOOK, "codebook_search", "product once", "- 2.f * sum[r]", "- 1.f * sum[r]"),
    Mutant(CODEBOOK, "codebook_search", "last code wins a tie", "if (distance < best[r])", "if (distance <= best[r])"),
    Mutant(CODEBOOK, "codebook_search", "last warp wins a tie", "found[w][r] < id)", "found[w][r] > id)"),
    Mutant(
        CODEBOOK,
        "codebook_search",
        "one warp looked at",
        "for (int w = 1; w < kWarps; ++w)",
        "for (int w = 1; w < 1; ++w)",
    ),
    Mutant(
        CODEBOOK,
        "codebook_search",
        "last lane lost",
        "for (int d = 16; d; d /= 2) sum[r]",
        "for (int d = 8; d; d /= 2) sum[r]",
    ),
    Mutant(
        CODEBOOK,
        "codebook_search",
        "rows of the next block",
        "first = int64_t(blockIdx.x) * kRows",
        "first = int64_t(blockIdx.x)",
    ),
    Mutant(
        CODEBOOK,
        "codebook_search",
        "vectors read early",
        "x[i] = r < rows ? p.x[(first + r) * p.ldx + i % p.d] : 0.f;\n  }\n  __syncthreads();",
        "x[i] = r < rows ? p.x[(first + r) * p.ldx + i % p.d] : 0.f;\n  }",
    ),
    Mutant(
        CODEBOOK,
        "codebook_search",
        "winners read early",
        "found[warp][r] = at[r];\n  }\n  __syncthreads();",
        "found[warp][r] = at[r];\n  }",
    ),
    Mutant(
        CODEBOOK,
        "codebook_search",
        "choice read early",
        "if (!p.out) return;\n  __syncthreads();",
        "if (!p.out) return;",
    ),
    Mutant(
        CODEBOOK,
        "codebook_search",
        "rows behind the last",
        "if (int(threadIdx.x) < rows) {",
        "if (int(threadIdx.x) < kRows) {",
    ),
    Mutant(CODEBOOK, "codebook_search", "blocks too few", "(p.m + kRows - 1) / kRows", "p.m / kRows"),
    Mutant(CODEBOOK, "codebook_conv", "no bias", "float sum = p.bias[i];", "float sum = 0.f;"),
    Mutant(CODEBOOK, "codebook_conv", "taps not centred", "n + j - p.taps / 2", "n + j"),
    Mutant(CODEBOOK, "codebook_conv", "sequences run together", "if (from < 0 || from >= p.n) continue;", ""),
    Mutant(CODEBOOK, "codebook_conv", "first tap for all", "(id * p.taps + j) * p.c", "(id * p.taps) * p.c"),
    Mutant(CODEBOOK, "codebook_conv", "always rectified", "p.relu ? fmaxf(sum, 0.f) : sum", "fmaxf(sum, 0.f)"),
    Mutant(CODEBOOK, "codebook_conv", "ids of the first sequence", "p.ids[begin + from]", "p.ids[from]"),
]

GUIDE = "ops/guide/guide.cu"
MUTANTS += [
    Mutant(GUIDE, "guide", "heading not doubled", "moves ? 2 * (v[t - 1]", "moves ? 1 * (v[t - 1]"),
    Mutant(GUIDE, "guide", "heading of this frame", "2 * (v[t - 1] * std_of(0)", "2 * (v[t] * std_of(0)"),
    Mutant(GUIDE, "guide", "turned the other way", "px = ax * c - az * s;", "px = ax * c + az * s;"),
    Mutant(GUIDE, "guide", "path of one warp", "i < warp; ++i) before += m_.warps", "i < 0; ++i) before += m_.warps"),
    Mutant(GUIDE, "guide", "later frames lost", "i > warp; --i) after", "i > kWarps; --i) after"),
    Mutant(GUIDE, "guide", "scan one short", "if (lane + d < 32) v += other;", "if (lane + d < 31) v += other;"),
    Mutant(GUIDE, "guide", "height without its scale", "height += unit * ey * std_of(3);", "height += unit * ey;"),
    Mutant(GUIDE, "guide", "turn of joints lost", "turn += lx * gz - lz * gx;", ""),
    Mutant(GUIDE, "guide", "turn of the path lost", "2 * (turn + px * fz - pz * fx)", "2 * turn"),
    Mutant(GUIDE, "guide", "force on the wrong row", "const int row = t ? t - 1 : int(w_) - 1;", "const int row = t;"),
    Mutant(GUIDE, "guide", "mask ignored", "const R m = mask_[k * w_ + t];", "const R m = 1;"),
    Mutant(GUIDE, "guide", "unused slot pulls", "if (!live || j < 0) continue;", "if (!live) continue;"),
    Mutant(
        GUIDE,
        "guide",
        "rows behind the end pull",
        "const bool on = joint(k) >= 0 && t < frames_ &&",
        "const bool on = joint(k) >= 0 &&",
    ),
    Mutant(GUIDE, "guide", "trial read early", "    __syncthreads();  // v is written\n", ""),
    Mutant(GUIDE, "guide", "frame 0 moved", "      if (!t) continue;  // the path begins at the origin\n", ""),
    Mutant(GUIDE, "guide", "joints forget the path's move", "to[0] - rx - m_.moved[0][t]", "to[0] - rx"),
    Mutant(
        GUIDE,
        "guide",
        "path's move not shared",
        "    if (t == 0 && root_ >= 0) move_root();\n    __syncthreads();",
        "    if (t == 0 && root_ >= 0) move_root();",
    ),
    Mutant(GUIDE, "guide", "units ignored", "R(2 * double(p_.metres) * p_.metres / controlled_)", "R(2 / controlled_)"),
    Mutant(
        GUIDE, "guide", "fp32 for fp64", "if (p.precise)\n      solve<double>", "if (!p.precise)\n      solve<double>"
    ),
    Mutant(GUIDE, "guide_update", "frames behind the end written", "row % p.t >= p.frames[row / p.t]", "false"),
    Mutant(GUIDE, "guide_update", "no noise", "if (p.noise) next", "if (false) next"),
    Mutant(
        GUIDE, "guide_update", "last block lost", "p.d + kUpdateThreads - 1) / kUpdateThreads", "p.d) / kUpdateThreads"
    ),
    Mutant(
        GUIDE,
        "guide_joints",
        "heading of one warp",
        "i < warp; ++i) before += sums[i]",
        "i < 0; ++i) before += sums[i]",
    ),
    Mutant(
        GUIDE,
        "guide_joints",
        "root drawn as a joint",
        "const float lx = j ? value(x, f) : 0.f",
        "const float lx = value(x, f)",
    ),
    Mutant(
        GUIDE,
        "guide_joints",
        "dead frames shown",
        "const bool live = t < p.t && t < frames,",
        "const bool live = t < p.t,",
    ),
]

PICK = "ops/pick/pick.cu"
MUTANTS += [
    Mutant(PICK, "pick_masked", "guided the other way", "fmaf(scale, c - uncond[i],", "fmaf(scale, uncond[i] - c,"),
    Mutant(PICK, "pick_masked", "guided from the condition", "c - uncond[i], uncond[i])", "c - uncond[i], c)"),
    Mutant(PICK, "pick_masked", "-0 below 0", " + 0.f;  // -0 is 0", ";"),
    Mutant(PICK, "pick_masked", "negative keys reversed", "return i ^ ((i >> 31) & 0x7fffffff);", "return i;"),
    Mutant(PICK, "pick_masked", "one kept too many", "if (found >= topk)", "if (found > topk)"),
    Mutant(PICK, "pick_masked", "all equals kept", "if (found != topk) equal = topk -",
           "if (found != topk) equal = k -"),
    Mutant(PICK, "pick_masked", "equals counted as above", "count_from(row, k, least + 1)",
           "count_from(row, k, least)"),
    Mutant(PICK, "pick_masked", "last equals kept", "__popc(ties & ((1u << lane) - 1)) < equal",
           "__popc(ties >> lane) <= equal"),
    Mutant(PICK, "pick_masked", "equals of each turn", "    equal -= __popc(ties);\n", ""),
    Mutant(PICK, "pick_masked", "no filter", "key_of(v) > least ||", "key_of(v) > low ||"),
    Mutant(PICK, "pick_masked", "temperature dropped", "(v - top) / temperature", "(v - top)"),
    Mutant(PICK, "pick_masked", "score among the kept", "all += double(expf(v - top));", "all += double(weight);"),
    Mutant(PICK, "pick_masked", "score of the likeliest", "double(expf(l.at(token) - top)) / all", "1. / all"),
    Mutant(PICK, "pick_masked", "score of no logit", "top > -INFINITY ? double(", "true ? double("),
    Mutant(PICK, "pick_masked", "mass not normalised", "double(uniform) * warp_sum(sum)", "double(uniform)"),
    Mutant(PICK, "pick_masked", "lanes before counted twice", "if (lane >= d) mass += other;", "mass += other;"),
    Mutant(PICK, "pick_masked", "scan one short", "if (lane >= d) mass", "if (lane > d) mass"),
    Mutant(PICK, "pick_masked", "turns before lost", "    mass += before;\n", ""),
    Mutant(PICK, "pick_masked", "last lane lost", "before = __shfl_sync(kAll, mass, 31);",
           "before = __shfl_sync(kAll, mass, 30);"),
    Mutant(PICK, "pick_masked", "token behind", "first + __ffs(int(past)) - 1", "first + __ffs(int(past))"),
    Mutant(PICK, "pick_masked", "nothing kept", "__reduce_max_sync(kAll, last)", "__reduce_min_sync(kAll, last)"),
    Mutant(PICK, "pick_masked", "known tokens drawn", "if (p.ids[n] == p.mask_id) {", "if (true) {"),
    Mutant(PICK, "pick_masked", "rows of uncond packed", "p.uncond + n * p.ldu", "p.uncond + n * p.k"),
    Mutant(PICK, "pick_masked", "one uniform", "p.temperature, p.uniforms[n], row)",
           "p.temperature, p.uniforms[0], row)"),
    Mutant(PICK, "pick_masked", "one turn of positions", "n = warp; n < positions;", "n = warp; n < warps;"),
    Mutant(PICK, "pick_masked", "one row for all warps", "+ warp * p.k;", "+ 0 * p.k;"),
    Mutant(PICK, "pick_masked", "scores read early", "if (!p.counts) return;\n  __syncthreads();",
           "if (!p.counts) return;"),
    Mutant(PICK, "pick_masked", "known tokens masked", "if (!(scores[n] < kKept)) continue;", ""),
    Mutant(PICK, "pick_masked", "last of equals masked", "scores[n] && i < n)", "scores[n] && i > n)"),
    Mutant(PICK, "pick_masked", "certain masked", "rank += scores[i] < scores[n] ||",
           "rank += scores[i] > scores[n] ||"),
    Mutant(PICK, "pick_masked", "one masked too many", "if (rank < *p.counts)", "if (rank <= *p.counts)"),
    Mutant(PICK, "pick_masked", "block too wide", "warps = warps < kMostWarps ? warps : kMostWarps;", ""),
    Mutant(PICK, "pick_masked", "no room for scores", "size_t(kScoreBytes + warps * p.k * 4)",
           "size_t(warps * p.k * 4)"),
    Mutant(PICK, "pick_masked", "early read", "  wait_for_previous();\n  double* scores", "  double* scores"),
    Mutant(PICK, "pick_next", "END comes while closed", "*p.open ? end + 1 : end;", "end + 1;"),
    Mutant(PICK, "pick_next", "goes on behind END", "= *p.done || token == end ||", "= token == end ||"),
    Mutant(PICK, "pick_next", "END is a token", "*p.done || token == end ||", "*p.done ||"),
    Mutant(PICK, "pick_next", "one token too many", "n >= *p.limit;", "n > *p.limit;"),
    Mutant(PICK, "pick_next", "END as padding", "done ? int32_t(p.k) : token", "done ? end : token"),
    Mutant(PICK, "pick_next", "END is looked up", "min(token, end - 1)", "token"),
    Mutant(PICK, "pick_next", "row of the first pass", "p.rows_table[next * p.pair + i]",
           "p.rows_table[next * p.pair]"),
    Mutant(PICK, "pick_next", "row of this step", "p.rows_table[next *", "p.rows_table[n *"),
    Mutant(PICK, "pick_next", "row behind the last", "min(n + 1, p.capacity - 1)", "n + 1"),
    Mutant(PICK, "pick_next", "written behind the capacity", "n < 0 || n >= p.capacity", "n < 0"),
    Mutant(PICK, "pick_next", "position of this step", "p.pos[i] = int32_t(n + 1);", "p.pos[i] = int32_t(n);"),
    Mutant(PICK, "pick_next", "first uniform", "1.f, p.uniforms[n],", "1.f, p.uniforms[0],"),
    Mutant(PICK, "pick_next", "early read", "  wait_for_previous();\n  const int64_t n", "  const int64_t n"),
]  # fmt: skip

CHANNELS = "ops/channel_attention/channel_attention.cu"
MUTANTS += [
    Mutant(CHANNELS, "channel_attention", "q and k swapped", "left[n * d + i], right[n * d + j], acc",
           "left[n * d + j], right[n * d + i], acc"),
    Mutant(CHANNELS, "channel_attention", "no scale", "acc[o] * p.scale;", "acc[o];"),
    Mutant(CHANNELS, "channel_attention", "last token of a piece lost", "for (int n = 0; n < count; ++n) acc",
           "for (int n = 0; n < count - 1; ++n) acc"),
    Mutant(CHANNELS, "channel_attention", "not normalised", "row[j] /= total;", "row[j] /= 1.f;"),
    Mutant(CHANNELS, "channel_attention", "largest not taken", "best = fmaxf(best, row[j])",
           "best = fminf(best, row[j])"),
    Mutant(CHANNELS, "channel_attention", "softmax over columns", "logits[i * d + j], left", "logits[j * d + i], left"),
    Mutant(CHANNELS, "channel_attention", "v is k", "2 * c + at % d];\n    __syncthreads();",
           "c + at % d];\n    __syncthreads();"),
    Mutant(CHANNELS, "channel_attention", "first group for all", "b * p.tokens * p.ldq + g * d",
           "b * p.tokens * p.ldq"),
    Mutant(CHANNELS, "channel_attention", "grids overlap", "p.out + b * p.tokens * p.ldo", "p.out + b * p.ldo"),
    Mutant(CHANNELS, "channel_attention", "staged rows read early",
           "      right[at] = row[c];\n    }\n    __syncthreads();", "      right[at] = row[c];\n    }"),
    Mutant(CHANNELS, "channel_attention", "staged rows overwritten", "    }\n    __syncthreads();\n  }\n#pragma unroll",
           "    }\n  }\n#pragma unroll"),
    Mutant(CHANNELS, "channel_attention", "softmax before the logits", "acc[o] * p.scale;\n  }\n  __syncthreads();",
           "acc[o] * p.scale;\n  }"),
    Mutant(CHANNELS, "channel_attention", "early read", "  wait_for_previous();", "  "),
]  # fmt: skip

FUSE = "ops/fuse/fuse.cu"
MUTANTS += [
    Mutant(
        FUSE,
        "gated_fuse",
        "tail of a row not read",
        "for (int64_t i = wide * kEight + threadIdx.x; i < d; i += kThreads) {\n    to[i]",
        "for (int64_t i = d; i < d; i += kThreads) {\n    to[i]",
    ),
    Mutant(
        FUSE,
        "gated_fuse",
        "tail of a row not written",
        "for (int64_t i = wide * kEight + threadIdx.x; i < d; i += kThreads) {\n    if",
        "for (int64_t i = d; i < d; i += kThreads) {\n    if",
    ),
    Mutant(
        FUSE,
        "gated_fuse",
        "halves of a pair swapped",
        "v[2 * j] = __uint_as_float(words[j] << 16);\n        v[2 * j + 1]",
        "v[2 * j + 1] = __uint_as_float(words[j] << 16);\n        v[2 * j]",
    ),
    Mutant(FUSE, "gated_fuse", "words out of order", "{w.x, w.y, w.z, w.w}", "{w.x, w.z, w.y, w.w}"),
    Mutant(
        FUSE,
        "gated_fuse",
        "eights as fours",
        "reinterpret_cast<const float4*>(row)[2 * i + 1];",
        "reinterpret_cast<const float4*>(row)[2 * i];",
    ),
    Mutant(
        FUSE,
        "gated_fuse",
        "wide loads of any row",
        "const char* row = static_cast<const char*>(p) + begin * (dtype == kBF16 ? 2 : 4);\n"
        "  const int64_t wide = aligned(row) ? d / kEight : 0;",
        "const char* row = static_cast<const char*>(p) + begin * (dtype == kBF16 ? 2 : 4);\n"
        "  const int64_t wide = d / kEight;",
    ),
    Mutant(FUSE, "gated_fuse", "no mean of g", "b = g[i] - mean.y;", "b = g[i];"),
    Mutant(
        FUSE,
        "gated_fuse",
        "one norm for both",
        "dots.y = fmaf(b, p.u2[i], dots.y);",
        "dots.y = fmaf(b, p.u1[i], dots.y);",
    ),
    Mutant(FUSE, "gated_fuse", "gate without its constant", "r2 * dots.y + p.c)", "r2 * dots.y)"),
    Mutant(FUSE, "gated_fuse", "force ignored", "p.force >= 0.f ? p.force : sigmoid", "false ? p.force : sigmoid"),
    Mutant(FUSE, "gated_fuse", "gate of every thread's row", "p.gates[row] = gate;", "p.gates[0] = gate;"),
    Mutant(FUSE, "gated_fuse", "biases dropped", "(gate * p.b1[i] + rest * p.b2[i]);", "0.f;"),
    Mutant(FUSE, "gated_fuse", "streams swapped", "o = gate * s[i] + rest * g[i];", "o = gate * g[i] + rest * s[i];"),
    Mutant(FUSE, "gated_fuse", "rho dropped", "p.rho * rest * (g[i] - s[i])", "rest * (g[i] - s[i])"),
    Mutant(FUSE, "gated_fuse", "code beyond its channels", "if (p.voxels && i < 3 * third) {", "if (p.voxels) {"),
    Mutant(FUSE, "gated_fuse", "x for every axis", "axis == 0 ? p.px : axis == 1 ? p.py : p.pz", "p.px"),
    Mutant(FUSE, "gated_fuse", "voxel of the first axis", "p.voxels[row * 3 + axis]", "p.voxels[row * 3]"),
    Mutant(
        FUSE,
        "gated_fuse",
        "row read before it is whole",
        "    total = fmaf(o, o, total);\n  }\n  __syncthreads();",
        "    total = fmaf(o, o, total);\n  }",
    ),
    Mutant(FUSE, "gated_fuse", "newlines take no place", "p.newline ? row + row / p.period : row;", "row;"),
    Mutant(
        FUSE,
        "gated_fuse",
        "newline after every row",
        "row % p.period == p.period - 1",
        "row % p.period <= p.period - 1",
    ),
    Mutant(FUSE, "gated_fuse", "order ignored", "p.order ? p.order[r] : r;", "r;"),
    Mutant(
        FUSE,
        "gated_fuse",
        "norm of the next without eps and mean",
        "/ float(p.d) + p.norm_eps);\n  write_row",
        ");\n  write_row",
    ),
    Mutant(FUSE, "gated_fuse", "norm weight dropped", "fn(i) * scale * p.norm_w[i]", "fn(i) * scale"),
    Mutant(
        FUSE,
        "gated_fuse",
        "newline's squares are the row's",
        "    total = 0.f;\n    for (int64_t i = threadIdx.x; i < p.d; i += kThreads) total",
        "    for (int64_t i = threadIdx.x; i < p.d; i += kThreads) total",
    ),
    Mutant(
        FUSE,
        "gated_fuse",
        "early read",
        "__launch_bounds__(kThreads) gated_fuse_kernel(GatedFuseParams p) {\n  release_next();\n  wait_for_previous();",
        "__launch_bounds__(kThreads) gated_fuse_kernel(GatedFuseParams p) {\n  release_next();",
    ),
    Mutant(REDUCE, "gated_fuse", "second sum of the first", "total.y += sums[kWarps + w]", "total.y += sums[w]"),
    Mutant(REDUCE, "gated_fuse", "pair read early", "= v.y;\n  }\n  __syncthreads();", "= v.y;\n  }"),
    Mutant(
        REDUCE,
        "gated_fuse",
        "pair overwritten",
        "total.y += sums[kWarps + w];\n  __syncthreads();",
        "total.y += sums[kWarps + w];",
    ),
    Mutant(
        FUSE,
        "gate_heads",
        "head's tail lost",
        "for (int64_t i = lane; i < hd; i += 32) {",
        "for (int64_t i = lane; i < hd / 32 * 32; i += 32) {",
    ),
    Mutant(
        FUSE,
        "gate_heads",
        "heads beyond a round lost",
        "for (int64_t h = warp; h < p.heads; h += kWarps) {",
        "for (int64_t h = warp; h < kWarps && h < p.heads; h += kWarps) {",
    ),
    Mutant(FUSE, "gate_heads", "keys of head 0", "p.dk[h * hd + i]", "p.dk[i]"),
    Mutant(
        FUSE,
        "gate_heads",
        "norm over one head",
        "(squares, sums) / float(p.d) + p.eps);",
        "(squares, sums) / float(hd) + p.eps);",
    ),
    Mutant(FUSE, "gate_heads", "padding not counted", "gates[h] * scale - p.bias", "gates[h] * scale"),
    Mutant(FUSE, "gate_heads", "gates read early", "- p.bias);\n  __syncthreads();", "- p.bias);"),
    Mutant(FUSE, "gate_heads", "base dropped", "p.x[row * p.ldx + i] + p.base[i];", "p.x[row * p.ldx + i];"),
    Mutant(FUSE, "gate_heads", "values of head 0", "p.u[h * p.d + i]", "p.u[i]"),
    Mutant(
        FUSE,
        "gate_heads",
        "early read",
        "gate_heads_kernel(GateHeadsParams p) {\n  release_next();\n  wait_for_previous();",
        "gate_heads_kernel(GateHeadsParams p) {\n  release_next();",
    ),
]

# Mutant.id: why no case can tell it from the original.
SURVIVORS: dict[str, str] = {
    "gated_fuse: wide loads of any row": "a host reads 16 bytes at any address, a device only at multiples of 16",
    "guide: frame 0 moved": "no step leads to frame 0, so the loop behind the test has no turn there",
    "rng: half dropped": "changes a normal by one part in 2^33 unless its word is tiny, and no case draws a tiny one",
    "rng: fp32 logarithm": "one fp32 rounding more, which the tolerance of the normals allows",
}
