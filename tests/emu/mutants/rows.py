"""Wrong edits of work on rows and grids: rng, gather, norm, conv, channel_attention, fuse."""

from __future__ import annotations

from .mutant import Mutant

MUTANTS: list[Mutant] = []

RNG = "ops/rng/rng.cu"
MUTANTS += [
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
        "if (t < 0) {\n    for (int64_t i = from + lane; i < from + k; i += Lanes) put(i, 0.f);",
        "if (t < 0) {",
    ),
    Mutant(NORM, "norm", "border not told from cells", "p.width ? norm_cell(row, p.width, m) : row", "row"),
    Mutant("ops/norm/norm.h", "norm", "cells beyond the last line", "|| y >= m / width ", ""),
    Mutant("ops/norm/norm.h", "norm", "cells of the line before", "|| x >= width ?", "?"),
    Mutant(NORM, "norm", "bf16 written as f32", "if (p.out_dtype == kBF16)", "if (false)"),
    Mutant(NORM, "norm", "normed where none is asked", "if (p.kind != kProNone) {", "if (true) {"),
    Mutant(NORM, "norm", "one sum for every row", "p.add + t * p.ldadd", "p.add"),
    Mutant(NORM, "norm", "early read", "  wait_for_previous();", "  "),
    Mutant(NORM, "norm", "every group the first", "from = unit % parts * k", "from = 0 * k"),
    Mutant(NORM, "norm", "a row of one group", "row = unit / parts", "row = unit"),
    Mutant(NORM, "norm", "groups share a norm", "    k = p.group;\n", ""),
    Mutant(NORM, "norm", "last groups lost", "(units + kWarps - 1) / kWarps", "units / kWarps"),
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
