"""fuse: a product of gated, normed rows that are never stored: out = rms(fuse(s, g)) * norm @ W.T + bias.

layout   s, g row-major f32 or bf16; six scalars of a row f32 in ws; W as triton_kernels/gemm.py has it, f32 or bf16
mapping  scalars: a program per row, three passes over it. matmul: a program per BM x BN tile, row tiles first; each K
         step forms the tile of fused rows in registers from the scalars, then multiplies on tensor cores
moves    scalars: s and g three times, the last two from L1; matmul: s and g once per BN columns from L2, W once per BM
         rows
tried    csrc/ops/fuse/README.md
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gemm import arranged, operand, straight


@triton.jit
def blended(
    s, g, k, inside, p, a, q, b, gate, w1, b1, w2, b2, voxels, px, py, pz, row, valid,
    D: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """[R, B] fused values of s, g [R, B] at channels k [B]: p * (s - a) + q * (g - b), each normed where NORMED, plus
    the codes of the rows' voxels."""
    one, two = p[:, None] * (s - a[:, None]), q[:, None] * (g - b[:, None])
    if NORMED:
        one = one * tl.load(w1 + k, mask=inside, other=0.0)[None, :]
        two = two * tl.load(w2 + k, mask=inside, other=0.0)[None, :]
        one += gate[:, None] * tl.load(b1 + k, mask=inside, other=0.0)[None, :]
        two += (1.0 - gate)[:, None] * tl.load(b2 + k, mask=inside, other=0.0)[None, :]
    o = one + two
    if voxels is not None:
        THIRD: tl.constexpr = D // 3
        axis = k // THIRD
        at = k % THIRD
        x = tl.load(voxels + row * 3, mask=valid, other=0)
        y = tl.load(voxels + row * 3 + 1, mask=valid, other=0)
        z = tl.load(voxels + row * 3 + 2, mask=valid, other=0)
        o += tl.load(px + x[:, None] * THIRD + at[None, :], mask=valid[:, None] & (axis == 0)[None, :],
                     other=0.0).to(tl.float32)  # fmt: skip
        o += tl.load(py + y[:, None] * THIRD + at[None, :], mask=valid[:, None] & (axis == 1)[None, :],
                     other=0.0).to(tl.float32)  # fmt: skip
        o += tl.load(pz + z[:, None] * THIRD + at[None, :], mask=valid[:, None] & (axis == 2)[None, :],
                     other=0.0).to(tl.float32)  # fmt: skip
    return o


@triton.jit
def scalars(
    s, g, w1, b1, w2, b2, u1, u2, voxels, px, py, pz, out, lds, ldg, c, eps, rho, force, norm_eps,
    D: tl.constexpr, BLEND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [M, 6]: p, a, q, b and the gate of `blended`, and the factor of the RMS norm. Grid (M). force < 0: none."""
    row = tl.program_id(0) + tl.zeros([1], tl.int32)
    valid = row >= 0
    at = row.to(tl.int64)[:, None]
    zero = tl.zeros([1], tl.float32)
    m1 = zero
    m2 = zero
    for k0 in range(0, D, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        inside = (k < D)[None, :]
        m1 += tl.sum(tl.load(s + at * lds + k[None, :], mask=inside, other=0.0).to(tl.float32), 1)
        m2 += tl.sum(tl.load(g + at * ldg + k[None, :], mask=inside, other=0.0).to(tl.float32), 1)
    m1 = m1 / D
    m2 = m2 / D
    v1 = zero
    v2 = zero
    d1 = zero
    d2 = zero
    for k0 in range(0, D, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        inside = (k < D)[None, :]
        x = tl.load(s + at * lds + k[None, :], mask=inside, other=0.0).to(tl.float32)
        y = tl.load(g + at * ldg + k[None, :], mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x - m1[:, None], 0.0)
        y = tl.where(inside, y - m2[:, None], 0.0)
        v1 += tl.sum(x * x, 1)
        v2 += tl.sum(y * y, 1)
        d1 += tl.sum(x * tl.load(u1 + k, mask=k < D, other=0.0)[None, :], 1)
        d2 += tl.sum(y * tl.load(u2 + k, mask=k < D, other=0.0)[None, :], 1)
    r1 = 1.0 / tl.sqrt(v1 / D + eps)
    r2 = 1.0 / tl.sqrt(v2 / D + eps)
    gate = 1.0 / (1.0 + tl.exp(-(r1 * d1 + r2 * d2 + c)))
    gate = tl.where(force >= 0, zero + force, gate)
    a = zero
    b = zero
    if BLEND == 0:
        p = gate * r1
        q = (1.0 - gate) * r2
        a = m1
        b = m2
    elif BLEND == 1:
        p = gate
        q = 1.0 - gate
    else:
        q = rho * (1.0 - gate)
        p = 1.0 - q
    squares = zero
    for k0 in range(0, D, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        inside = k < D
        x = tl.load(s + at * lds + k[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
        y = tl.load(g + at * ldg + k[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
        o = blended(x, y, k, inside, p, a, q, b, gate, w1, b1, w2, b2, voxels, px, py, pz, row, valid, D, BLEND == 0)
        o = tl.where(inside[None, :], o, 0.0)
        squares += tl.sum(o * o, 1)
    out += row * 6
    tl.store(out, p)
    tl.store(out + 1, a)
    tl.store(out + 2, q)
    tl.store(out + 3, b)
    tl.store(out + 4, gate)
    tl.store(out + 5, 1.0 / tl.sqrt(squares / D + norm_eps))


@triton.jit
def matmul(
    s, g, w1, b1, w2, b2, voxels, px, py, pz, of_row, norm, w, bias, out, m, lds, ldg, ldo,
    D: tl.constexpr, N: tl.constexpr, PANEL: tl.constexpr, FORMAT: tl.constexpr, NORMED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [M, N] from the scalars `of_row` [M, 6]. Grid (ceil(M / BM), ceil(N / BN))."""
    PER: tl.constexpr = 1 if FORMAT == 0 else 2
    KV: tl.constexpr = BK // PER
    KVECS: tl.constexpr = (D + PER - 1) // PER
    n0 = tl.program_id(1) * BN
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = row < m
    at = of_row + row * 6
    p = tl.load(at, mask=valid, other=0.0)
    a = tl.load(at + 1, mask=valid, other=0.0)
    q = tl.load(at + 2, mask=valid, other=0.0)
    b = tl.load(at + 3, mask=valid, other=0.0)
    gate = tl.load(at + 4, mask=valid, other=0.0)
    factor = tl.load(at + 5, mask=valid, other=0.0)
    s += row.to(tl.int64)[:, None] * lds
    g += row.to(tl.int64)[:, None] * ldg
    words = w.to(tl.pointer_type(tl.int32))
    n = n0 + tl.arange(0, BN // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    there = (n < (N + 15) // 16 * 16)[None, :, :]
    kv = tl.arange(0, KV)
    w_at = (n // 16 * PANEL + n % 16)[None, :, :] + kv[:, None, None] * 16
    acc = tl.zeros([BM, BN], tl.float32)
    for k0 in range(0, D, BK):
        k = k0 + tl.arange(0, BK)
        inside = k < D
        some = valid[:, None] & inside[None, :]
        x = tl.load(s + k[None, :], mask=some, other=0.0).to(tl.float32)
        y = tl.load(g + k[None, :], mask=some, other=0.0).to(tl.float32)
        o = blended(x, y, k, inside, p, a, q, b, gate, w1, b1, w2, b2, voxels, px, py, pz, row, valid, D, NORMED)
        o = o * factor[:, None]
        if norm is not None:
            o = o * tl.load(norm + k, mask=inside, other=0.0)[None, :]
        o = tl.where(some, o, 0.0)
        word = tl.load(words + k0 // PER * 16 + w_at, mask=there & (k0 // PER + kv < KVECS)[:, None, None], other=0)
        if FORMAT == 0:
            acc = tl.dot(o, operand(arranged(word, KV, BN), FORMAT, KV, BN), acc, input_precision="ieee")
        else:
            acc = tl.dot(o.to(tl.bfloat16), operand(arranged(word, KV, BN), FORMAT, KV, BN), acc)
    v = straight(acc, BM, BN)
    c = n0 + tl.arange(0, BN)
    if bias is not None:
        v += tl.load(bias + c, mask=c < N, other=0.0)[None, :]
    inside = valid[:, None] & (c < N)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * ldo + c[None, :], v, mask=inside)
