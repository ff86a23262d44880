"""Wrong edits of the packed products: gemm and the experts of moe."""

from __future__ import annotations

from .mutant import Mutant

MUTANTS: list[Mutant] = []

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
