"""attention: append K and V to the packed caches, then causal grouped-query attention with an online softmax.

layout   k_cache [kv_heads][ctx/16 panels, K = d], v_cache [kv_heads][ceil(d/16) panels, K = ctx], panels as in
         triton_kernels/gemm.py: both are operands of an MMA as they lie in memory
mapping  append: a program per 16 tokens and kv head. causal: a program per (BM rows, kv head), a row being a token and
         one of the heads that share this K and V; the longest contexts start first
moves    q and out once, k and v once more into the cache; the cache up to its own position once per BM rows
tried    csrc/ops/attention/README.md
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gemm import BF16, F32, arranged, columns, live_rows, operand, straight


@triton.jit
def append(
    k, v, k_cache, v_cache, pos, live, m, ldkv,
    CTX: tl.constexpr, D: tl.constexpr, K_PANEL: tl.constexpr, V_PANEL: tl.constexpr, FORMAT: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Rows of k and v at positions pos... Grid (ceil(T/BT), kv_heads). Panels are K_PANEL and V_PANEL values."""
    count = live_rows(live, m)
    start = tl.load(pos)
    t0 = tl.program_id(0) * BT
    if (start < 0) | (start + count > CTX) | (t0 >= count):
        return
    h = tl.program_id(1)
    t = t0 + tl.arange(0, BT)[:, None]
    i = tl.arange(0, BD)[None, :]
    at = start + t
    inside = (t < count) & (i < D)
    source = t.to(tl.int64) * ldkv + h * D + i
    kv = tl.load(k + source, mask=inside, other=0.0)
    vv = tl.load(v + source, mask=inside, other=0.0)
    k_head = h.to(tl.int64) * (CTX // 16 * K_PANEL) + at // 16 * K_PANEL
    v_head = h.to(tl.int64) * ((D + 15) // 16 * V_PANEL) + i // 16 * V_PANEL
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
def causal(
    q, k_cache, v_cache, pos, out, live, m, ldq, ldo, scale,
    CTX: tl.constexpr, D: tl.constexpr, SHARE: tl.constexpr, K_PANEL: tl.constexpr, V_PANEL: tl.constexpr,
    FORMAT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out of `live` tokens at positions pos.. over the cache. Grid (ceil(T*SHARE/BM), kv_heads); panels in words.

    BK < BD: q and K pass in slices of the head (fp32 products, wide heads) instead of staying in registers.
    """
    count = live_rows(live, m)
    start = tl.load(pos)
    r0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    if (start < 0) | (start + count > CTX) | (r0 >= count * SHARE):
        return
    h = tl.program_id(1)
    PER: tl.constexpr = 1 if FORMAT == F32 else 2
    KVECS: tl.constexpr = (D + PER - 1) // PER
    r = r0 + tl.arange(0, BM)
    token = r // SHARE
    valid = token < count
    head = h * SHARE + r % SHARE
    i = tl.arange(0, BK)
    q_at = q + token.to(tl.int64)[:, None] * ldq + head[:, None] * D + i[None, :]
    qv = tl.load(q_at, mask=valid[:, None] & (i < D)[None, :], other=0.0)
    if FORMAT == BF16:
        qv = qv.to(tl.bfloat16)
    # Positions, and below channels, in the order of gemm.columns: 16 bytes at once, straightened after the product.
    j = columns(0, BN)
    k4 = tl.arange(0, BN // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    kv = tl.arange(0, BK // PER)
    words = k_cache.to(tl.pointer_type(tl.int32)) + h.to(tl.int64) * (CTX // 16 * K_PANEL)
    k_at = words + (kv * 16)[:, None, None] + (k4 // 16 * K_PANEL + k4 % 16)[None, :, :]
    n = tl.arange(0, BD // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    sv = tl.arange(0, BN // PER)
    words = v_cache.to(tl.pointer_type(tl.int32)) + h.to(tl.int64) * ((D + 15) // 16 * V_PANEL)
    v_at = words + (sv * 16)[:, None, None] + (n // 16 * V_PANEL + n % 16)[None, :, :]
    acc = tl.zeros([BM, BD], tl.float32)
    best = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    length = start + count
    end = start + tl.minimum((r0 + BM - 1) // SHARE, count - 1) + 1
    for s0 in range(0, end, BN):
        near = (s0 + k4 < CTX)[None, :, :]  # not yet written positions are masked in the scores
        if BK >= BD:
            word = tl.load(k_at + s0 // 16 * K_PANEL, mask=near & (kv < KVECS)[:, None, None], other=0)
            score = tl.dot(qv, operand(arranged(word, BK // PER, BN), FORMAT, BK // PER, BN), input_precision="ieee")
        else:
            score = tl.zeros([BM, BN], tl.float32)
            for d0 in range(0, D, BK):
                part = tl.load(q_at + d0, mask=valid[:, None] & (d0 + i < D)[None, :], other=0.0)
                if FORMAT == BF16:
                    part = part.to(tl.bfloat16)
                at = k_at + s0 // 16 * K_PANEL + d0 // PER * 16
                word = tl.load(at, mask=near & (d0 // PER + kv < KVECS)[:, None, None], other=0)
                score = tl.dot(
                    part, operand(arranged(word, BK // PER, BN), FORMAT, BK // PER, BN), score, input_precision="ieee"
                )
        visible = (s0 + j)[None, :] <= (start + token)[:, None]
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
    c = tl.arange(0, BD)
    to = out + token.to(tl.int64)[:, None] * ldo + head[:, None] * D + c[None, :]
    tl.store(to, acc, mask=valid[:, None] & (c < D)[None, :])
