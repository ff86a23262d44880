"""Wrong edits of what runs along a sequence: ssm, attention, sample."""

from __future__ import annotations

from .mutant import Mutant

MUTANTS: list[Mutant] = []

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
