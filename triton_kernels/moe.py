"""moe: routing, grouped products over the chosen experts, and the sum per token, for many rows.

layout   logits [T, E], ids and weights [T, top_k]; order: pairs by expert, then by token; offsets [E + 1]; a tile table
         in ws: [0] tiles in use, then the expert of each tile, then its first position in order; expert matrices as in
         triton_kernels/gemm.py, one after another
mapping  choose: a program per token. sort and tiles: a program per expert, each counts what lies before it, so no order
         of programs can change a result. grouped: a program per (tile, BN columns), the grid as large as the capacity
         could need and what is not in use leaves at once. combine: a program per token and block of columns
moves    every touched expert once per tile of BM pairs; activations once per BN columns from L2; the outputs of pairs
         [T * top_k, D] f32 written and read once: sums per token then need no atomics and have one order
tried    csrc/ops/moe/README.md
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gemm import activate, live_rows, product

LOWEST = tl.constexpr(-3.0e38)  # below every score, above what is taken


@triton.jit
def best(v, at):
    """(largest value, its lowest index) of v [N]."""
    top = tl.max(v, axis=0)
    return top, tl.min(tl.where(v == top, at, 2147483647), axis=0)


@triton.jit
def choose(
    logits, bias, ids, weights, live, m, scale,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, GROUPS: tl.constexpr, KEEP: tl.constexpr, NORM: tl.constexpr,
    BG: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """ids and weights [T, TOP_K] from logits [T, EXPERTS]; BG x BS holds GROUPS x (EXPERTS / GROUPS). Grid (T)."""
    t = tl.program_id(0)
    if t >= live_rows(live, m):
        return
    SIZE: tl.constexpr = EXPERTS // GROUPS
    g, i = tl.arange(0, BG)[:, None], tl.arange(0, BS)[None, :]
    e = g * SIZE + i
    there = (g < GROUPS) & (i < SIZE)
    s = 1.0 / (1.0 + tl.exp(-tl.load(logits + t * EXPERTS + e, mask=there, other=0.0)))
    score = s
    if bias is not None:
        score += tl.load(bias + e, mask=there, other=0.0)
    if KEEP < GROUPS:
        inside = tl.where(there, score, -float("inf"))
        first = tl.max(inside, axis=1)
        total = first
        if SIZE > 1:
            at = tl.min(tl.where(inside == first[:, None], i, BS), axis=1)
            total += tl.max(tl.where(i == at[:, None], -float("inf"), inside), axis=1)
        group = tl.arange(0, BG)
        total = tl.where(group < GROUPS, total, -float("inf"))
        kept = group < 0
        for _ in tl.static_range(KEEP):
            _, at_group = best(tl.where(kept, -float("inf"), total), group)
            kept = kept | (group == at_group)
        score = tl.where(kept[:, None], score, LOWEST)
    score = tl.reshape(tl.where(there, score, -float("inf")), [BG * BS])
    value = tl.reshape(s, [BG * BS])
    expert = tl.reshape(tl.where(there, e, EXPERTS), [BG * BS])
    j = tl.arange(0, BK)
    chosen, weight = tl.zeros([BK], tl.int32), tl.zeros([BK], tl.float32)
    for i in tl.static_range(TOP_K):
        _, at = best(score, expert)
        at = tl.minimum(at, EXPERTS - 1)  # of NaN nothing is the best: any expert, but one that exists
        hit = expert == at
        chosen = tl.where(j == i, at, chosen)
        weight = tl.where(j == i, tl.sum(tl.where(hit, value, 0.0), axis=0), weight)
        score = tl.where(hit, -float("inf"), score)
    if NORM:
        scale = scale / (tl.sum(weight, axis=0) + 1e-20)
    tl.store(ids + t * TOP_K + j, chosen, mask=j < TOP_K)
    tl.store(weights + t * TOP_K + j, weight * scale, mask=j < TOP_K)


@triton.jit
def sort(ids, offsets, order, live, m, TOP_K: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """offsets [EXPERTS + 1] and order [T * TOP_K] from ids. Grid (EXPERTS): each places its own pairs, in order."""
    e = tl.program_id(0)
    pairs = live_rows(live, m) * TOP_K
    at = tl.arange(0, BLOCK)
    below = tl.zeros([BLOCK], tl.int32)
    for p0 in range(0, pairs, BLOCK):
        below += (tl.load(ids + p0 + at, mask=p0 + at < pairs, other=EXPERTS) < e).to(tl.int32)
    place = tl.sum(below, axis=0)
    tl.store(offsets + e, place)
    if e == EXPERTS - 1:
        tl.store(offsets + EXPERTS, pairs)
    for p0 in range(0, pairs, BLOCK):
        mine = (tl.load(ids + p0 + at, mask=p0 + at < pairs, other=EXPERTS) == e).to(tl.int32)
        tl.store(order + place + tl.cumsum(mine, axis=0) - 1, p0 + at, mask=mine != 0)
        place += tl.sum(mine, axis=0)


@triton.jit
def tiles(offsets, table, EXPERTS: tl.constexpr, SLOTS: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr):
    """The tile table: tiles of BM pairs that do not cross an expert. Grid (EXPERTS)."""
    e = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)
    for e0 in range(0, EXPERTS, BLOCK):
        i = e0 + at
        n = tl.load(offsets + i + 1, mask=i < e, other=0) - tl.load(offsets + i, mask=i < e, other=0)
        before += (n + BM - 1) // BM
    slot = tl.sum(before, axis=0)
    first = tl.load(offsets + e)
    n = (tl.load(offsets + e + 1) - first + BM - 1) // BM
    for t0 in range(0, n, BLOCK):
        tl.store(table + 1 + slot + t0 + at, tl.zeros([BLOCK], tl.int32) + e, mask=t0 + at < n)
        tl.store(table + 1 + SLOTS + slot + t0 + at, first + (t0 + at) * BM, mask=t0 + at < n)
    if e == EXPERTS - 1:
        tl.store(table, slot + n)


@triton.jit
def grouped(
    a, scales, w, out, bias, weights, table, offsets, order, scale_rows,
    N: tl.constexpr, K: tl.constexpr, LDA: tl.constexpr, PANEL: tl.constexpr, FORMAT: tl.constexpr,
    GROUP: tl.constexpr, ACT: tl.constexpr, TOP_K: tl.constexpr, UP: tl.constexpr, SLOTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """UP: out[position] = act(a[token] @ W_e.T + bias_e); else out[pair] = (a[position] @ W_e.T + bias_e) * weight.

    Grid (SLOTS, ceil(N/BN)).
    """
    slot = tl.program_id(0)
    if slot >= tl.load(table):
        return
    e = tl.load(table + 1 + slot)
    position = tl.load(table + 1 + SLOTS + slot) + tl.arange(0, BM)
    valid = position < tl.load(offsets + e + 1)
    row = position
    if UP:
        row = tl.load(order + position, mask=valid, other=0) // TOP_K
    n0 = tl.program_id(1) * BN
    words = w.to(tl.pointer_type(tl.int32)) + e.to(tl.int64) * ((N + 15) // 16 * PANEL)
    v = product(a, row, valid, scales, scale_rows, words, n0, N, K, LDA, FORMAT, GROUP, PANEL, BM, BN, BK)
    n = n0 + tl.arange(0, BN)
    if bias is not None:
        v += tl.load(bias + e * N + n, mask=n < N, other=0.0)[None, :]
    to = position
    if UP:
        v = activate(v, ACT)
    else:
        to = tl.load(order + position, mask=valid, other=0)
        v *= tl.load(weights + to, mask=valid, other=0.0)[:, None]
    tl.store(out + to.to(tl.int64)[:, None] * N + n[None, :], v, mask=valid[:, None] & (n < N)[None, :])


@triton.jit
def combine(pairs, base, out, live, m, ldb, ldo, D: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = base[t] + the TOP_K rows of token t in the order of the router. Grid (T, ceil(D/BLOCK))."""
    t = tl.program_id(0).to(tl.int64)
    if t >= live_rows(live, m):
        return
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    if base is not None:
        total = tl.load(base + t * ldb + n, mask=n < D, other=0.0)
    for j in tl.static_range(TOP_K):
        total += tl.load(pairs + (t * TOP_K + j) * D + n, mask=n < D, other=0.0)
    tl.store(out + t * ldo + n, total, mask=n < D)
