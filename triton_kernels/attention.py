"""attention: append K and V to the packed caches, then grouped-query attention with an online softmax.

layout   k_cache [batch][kv_heads][ctx/16 panels, K = d], v_cache [..][ceil(d/16) panels, K = ctx], panels as in
         triton_kernels/gemm.py: both are operands of an MMA as they lie in memory
mapping  append: a program per 16 tokens, kv head and sequence. attend: a program per (BM rows, kv head, sequence), a
         row being a token and one of the heads that share this K and V; the longest contexts start first
moves    q and out once, k and v once more into the cache; the cache up to its own position once per BM rows
tried    csrc/ops/attention/README.md
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gemm import BF16, F32, arranged, columns, live_rows, operand, straight


@triton.jit
def sequence(pos, offsets, live, m, b):
    """(first row, rows, cached positions) of sequence b."""
    if offsets is not None:
        first = tl.load(offsets + b)
        count = tl.minimum(tl.load(offsets + b + 1) - first, m)
    else:
        first = b * m
        count = live_rows(live, m)
    return first, count, tl.load(pos + b)


@triton.jit
def rows_at(order, first, t, valid):
    """Where rows first + t lie."""
    if order is not None:
        return tl.load(order + first + t, mask=valid, other=0).to(tl.int64)
    else:
        return (first + t).to(tl.int64)


@triton.jit
def turned(base, at, rope, position, i, inside, D: tl.constexpr):
    """Channels i of the heads that begin at base + at, turned by the angles of their positions."""
    v = tl.load(base + at + i, mask=inside, other=0.0)
    if rope is not None:
        HALF: tl.constexpr = D // 2
        low = i < HALF
        other = tl.load(base + at + tl.where(low, i + HALF, i - HALF), mask=inside, other=0.0)
        angle = rope + position * D + tl.where(low, i, i - HALF)
        cos = tl.load(angle, mask=inside, other=0.0)
        sin = tl.load(angle + HALF, mask=inside, other=0.0)
        v = v * cos + tl.where(low, -other, other) * sin
    return v


@triton.jit
def append(
    k, v, k_cache, v_cache, ldkv, pos, live, m, offsets, order, rope,
    CTX: tl.constexpr, D: tl.constexpr, K_PANEL: tl.constexpr, V_PANEL: tl.constexpr, FORMAT: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Rows of k and v at positions pos... Grid (ceil(T/BT), kv_heads, batch). Panels are K_PANEL and V_PANEL values."""
    b = tl.program_id(2)
    first, count, start = sequence(pos, offsets, live, m, b)
    t0 = tl.program_id(0) * BT
    if (start < 0) | (start + count > CTX) | (t0 >= count):
        return
    h = tl.program_id(1)
    t = t0 + tl.arange(0, BT)[:, None]
    i = tl.arange(0, BD)[None, :]
    at = start + t
    inside = (t < count) & (i < D)
    source = rows_at(order, first, t, t < count) * ldkv + h * D
    kv = turned(k, source, rope, at, i, inside, D)
    vv = tl.load(v + source + i, mask=inside, other=0.0)
    head = (b * tl.num_programs(1) + h).to(tl.int64)
    k_head = head * (CTX // 16 * K_PANEL) + at // 16 * K_PANEL
    v_head = head * ((D + 15) // 16 * V_PANEL) + i // 16 * V_PANEL
    if FORMAT == F32:
        tl.store(k_cache.to(tl.pointer_type(tl.float32)) + k_head + i * 16 + at % 16, kv, mask=inside)
        tl.store(v_cache.to(tl.pointer_type(tl.float32)) + v_head + at * 16 + i % 16, vv, mask=inside)
    else:
        kc, vc = k_cache.to(tl.pointer_type(tl.bfloat16)), v_cache.to(tl.pointer_type(tl.bfloat16))
        # The second half of an odd last pair of channels is zero.
        tl.store(
            kc + k_head + i // 2 * 32 + at % 16 * 2 + i % 2, kv.to(tl.bfloat16), mask=(t < count) & (i < D + D % 2)
        )
        to = vc + v_head + at // 2 * 32 + i % 16 * 2
        tl.store(to + at % 2, vv.to(tl.bfloat16), mask=inside)
        # The other half of the last pair of positions meets a probability of zero: it must not be NaN.
        tl.store(to + 1, tl.zeros([BT, BD], tl.bfloat16), mask=inside & (t == count - 1) & (at % 2 == 0))


@triton.jit
def attend(
    q, k_cache, v_cache, out, ldq, ldo, scale, pad_k, pad_v, pads, queries, pos, live, m, offsets, order, rope,
    CTX: tl.constexpr, D: tl.constexpr, SHARE: tl.constexpr, K_PANEL: tl.constexpr, V_PANEL: tl.constexpr,
    FORMAT: tl.constexpr, CAUSAL: tl.constexpr, APPENDED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out of the tokens at positions pos.. over the cache. Grid (ceil(T*SHARE/BM), kv_heads, batch); panels in words.

    APPENDED 0: the tokens have no positions, and see all pos of the cache. queries: rows of a sequence that ask.

    BK < BD: q and K pass in slices of the head (fp32 products, wide heads) instead of staying in registers.
    """
    b = tl.program_id(2)
    first, count, start = sequence(pos, offsets, live, m, b)
    r0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    if (start < 0) | (start + count * APPENDED > CTX) | (r0 >= tl.minimum(count, queries) * SHARE):
        return
    h = tl.program_id(1)
    PER: tl.constexpr = 1 if FORMAT == F32 else 2
    KVECS: tl.constexpr = (D + PER - 1) // PER
    r = r0 + tl.arange(0, BM)
    token = r // SHARE
    valid = token < tl.minimum(count, queries)
    head = h * SHARE + r % SHARE
    i = tl.arange(0, BK)
    row = rows_at(order, first, token, valid)
    q_at = row[:, None] * ldq + head[:, None] * D
    place = (start + token)[:, None]
    qv = turned(q, q_at, rope, place, i[None, :], valid[:, None] & (i < D)[None, :], D)
    if FORMAT == BF16:
        qv = qv.to(tl.bfloat16)
    # Positions, and below channels, in the order of gemm.columns: 16 bytes at once, straightened after the product.
    j = columns(0, BN)
    k4 = tl.arange(0, BN // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    kv = tl.arange(0, BK // PER)
    cached = (b * tl.num_programs(1) + h).to(tl.int64)
    words = k_cache.to(tl.pointer_type(tl.int32)) + cached * (CTX // 16 * K_PANEL)
    k_at = words + (kv * 16)[:, None, None] + (k4 // 16 * K_PANEL + k4 % 16)[None, :, :]
    n = tl.arange(0, BD // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    sv = tl.arange(0, BN // PER)
    words = v_cache.to(tl.pointer_type(tl.int32)) + cached * ((D + 15) // 16 * V_PANEL)
    v_at = words + (sv * 16)[:, None, None] + (n // 16 * V_PANEL + n % 16)[None, :, :]
    acc = tl.zeros([BM, BD], tl.float32)
    best = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    c = tl.arange(0, BD)
    if pads is not None:  # the state behind `often` equal keys; scores count in powers of two
        often = tl.load(pads + b).to(tl.float32)
        dot = tl.zeros([BM], tl.float32)
        for d0 in range(0, D, BK):
            part = tl.load(q + q_at + d0 + i[None, :], mask=valid[:, None] & (d0 + i < D)[None, :], other=0.0)
            dot += tl.sum(part * tl.load(pad_k + h * D + d0 + i, mask=d0 + i < D, other=0.0)[None, :], axis=1)
        best = tl.where(often > 0, dot * (scale * 1.4426950408889634), best)
        total += often
        # In the order of `columns`, as the accumulator is.
        acc += (often * tl.load(pad_v + h * D + columns(0, BD), mask=columns(0, BD) < D, other=0.0))[None, :]
    length = start + count * APPENDED
    end = length
    if CAUSAL:
        end = start + tl.minimum((r0 + BM - 1) // SHARE, count - 1) + 1
    for s0 in range(0, end, BN):
        near = (s0 + k4 < CTX)[None, :, :]  # not yet written positions are masked in the scores
        if BK >= BD:
            word = tl.load(k_at + s0 // 16 * K_PANEL, mask=near & (kv < KVECS)[:, None, None], other=0)
            score = tl.dot(qv, operand(arranged(word, BK // PER, BN), FORMAT, BK // PER, BN), input_precision="ieee")
        else:
            score = tl.zeros([BM, BN], tl.float32)
            for d0 in range(0, D, BK):
                part = turned(q, q_at, rope, place, d0 + i[None, :], valid[:, None] & (d0 + i < D)[None, :], D)
                if FORMAT == BF16:
                    part = part.to(tl.bfloat16)
                at = k_at + s0 // 16 * K_PANEL + d0 // PER * 16
                word = tl.load(at, mask=near & (d0 // PER + kv < KVECS)[:, None, None], other=0)
                score = tl.dot(
                    part, operand(arranged(word, BK // PER, BN), FORMAT, BK // PER, BN), score, input_precision="ieee"
                )
        if CAUSAL:
            visible = (s0 + j)[None, :] <= (start + token)[:, None]
        else:
            visible = (s0 + j < length)[None, :]
        score = tl.where(visible, score * (scale * 1.4426950408889634), -float("inf"))
        larger = tl.maximum(best, tl.max(score, axis=1))
        p = tl.exp2(score - larger[:, None])
        shrink = tl.exp2(best - larger)
        total = total * shrink + tl.sum(p, axis=1)
        best = larger
        there = ((n < (D + 15) // 16 * 16)[None, :, :]) & (s0 + sv * PER < length)[:, None, None]
        word = tl.load(v_at + s0 // PER * 16, mask=there, other=0)
        values = operand(arranged(word, BN // PER, BD), FORMAT, BN // PER, BD)
        if FORMAT == BF16:
            p = p.to(tl.bfloat16)
        acc = tl.dot(straight(p, BM, BN), values, acc * shrink[:, None], input_precision="ieee")
    acc = straight(acc / total[:, None], BM, BD)
    to = out + row[:, None] * ldo + head[:, None] * D + c[None, :]
    tl.store(to, acc, mask=valid[:, None] & (c < D)[None, :])
