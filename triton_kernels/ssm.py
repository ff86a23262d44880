"""ssm: causal conv + SiLU, then the Mamba-2 selective scan in chunks (state space duality, Dao & Gu 2024).

layout   u [T, channels] = [x: H*P | B: G*N | C: G*N]; state [H, N, Pp] fp32; a chunk of Q tokens is one tile
mapping  conv: a program per BT tokens x BC channels. tail: a program per BC channels; a launch of its own, because conv
         programs read the conv state that it replaces. scan: a program per (head, BP channels) walks the chunks; inside
         a chunk three products: C B^T, its decayed lower triangle times x, C times the state
moves    xbc once (taps - 1 more from L2); u written once, x read once, B and C once per head and BP channels, twice for
         B; state once each way per chunk, from L1 and L2 after the first
tried    csrc/ops/ssm/README.md
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gemm import live_rows, silu


@triton.jit
def conv(
    xbc, conv_w, conv_b, conv_state, u, live, m, ldx,
    CHANNELS: tl.constexpr, TAPS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """u = silu(conv_b + sum_j conv_w[j] * input[t - TAPS + 1 + j]). Grid (ceil(T/BT), ceil(CHANNELS/BC))."""
    count = live_rows(live, m)
    t0 = tl.program_id(0) * BT
    if t0 >= count:
        return
    t = t0 + tl.arange(0, BT)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    there = c < CHANNELS
    total = tl.zeros([BT, BC], tl.float32)
    if conv_b is not None:
        total += tl.load(conv_b + c, mask=there, other=0.0)[None, :]
    for j in tl.static_range(TAPS):
        i = t - (TAPS - 1) + j
        new = ((i >= 0) & (t < count))[:, None] & there[None, :]
        v = tl.load(xbc + i.to(tl.int64)[:, None] * ldx + c[None, :], mask=new, other=0.0)
        if j < TAPS - 1:
            old = (i < 0)[:, None] & there[None, :]
            v += tl.load(conv_state + (i + TAPS - 1)[:, None] * CHANNELS + c[None, :], mask=old, other=0.0)
        total += tl.load(conv_w + j * CHANNELS + c, mask=there, other=0.0)[None, :] * v
    tl.store(
        u + t.to(tl.int64)[:, None] * CHANNELS + c[None, :], silu(total), mask=(t < count)[:, None] & there[None, :]
    )


@triton.jit
def tail(xbc, conv_state, live, m, ldx, CHANNELS: tl.constexpr, TAPS: tl.constexpr, BC: tl.constexpr):
    """Row j of the conv state becomes row count + j of (old state, inputs). Grid (ceil(CHANNELS/BC)).

    A thread keeps its channels for all rows, and ascending j reads only rows that are not yet written.
    """
    count = live_rows(live, m)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    there = c < CHANNELS
    if count > 0:
        for j in tl.static_range(TAPS - 1):
            i = count + j
            if i < TAPS - 1:
                v = tl.load(conv_state + i * CHANNELS + c, mask=there, other=0.0)
            else:
                v = tl.load(xbc + (i - (TAPS - 1)).to(tl.int64) * ldx + c, mask=there, other=0.0)
            tl.store(conv_state + j * CHANNELS + c, v, mask=there)


@triton.jit
def softplus(v):
    """max(v, 0) + log1p(exp(-|v|)); log1p(y) = 2 atanh(y / (2 + y)), a short series for y <= 1, exact near 0."""
    y = tl.exp(-tl.abs(v))
    s = y / (2.0 + y)
    q = s * s
    series = 1.0 / 15.0
    series = series * q + 1.0 / 13.0
    series = series * q + 1.0 / 11.0
    series = series * q + 1.0 / 9.0
    series = series * q + 1.0 / 7.0
    series = series * q + 1.0 / 5.0
    series = series * q + 1.0 / 3.0
    return tl.maximum(v, 0.0) + 2.0 * s * (1.0 + q * series)


@triton.jit
def scan(
    u, dt, a, d_skip, dt_bias, state, out, live, m, lddt, ldo, dt_min, dt_max,
    HEADS: tl.constexpr, P: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr, PP: tl.constexpr, Q: tl.constexpr,
    BN: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out and state from u. Grid (HEADS, ceil(P/BP)). Only differences of summed steps go into exp, masked before.

    The state stays in memory (L1 and L2) and passes in slices of BN: a product over all of N at once spills.
    """
    h = tl.program_id(0)
    count = live_rows(live, m)
    CHANNELS: tl.constexpr = HEADS * P + 2 * GROUPS * N
    n = tl.arange(0, BN)
    p = tl.program_id(1) * BP + tl.arange(0, BP)
    step = tl.arange(0, Q)
    cell = state + h.to(tl.int64) * (N * PP) + n[:, None] * PP + p[None, :]
    wide = (p < P)[None, :]
    decay, skip, bias = tl.load(a + h), tl.load(d_skip + h), tl.load(dt_bias + h)
    x_at = u + h * P + p[None, :]
    b_at = u + HEADS * P + h // (HEADS // GROUPS) * N + n[None, :]
    for t0 in range(0, count, Q):
        t = t0 + step
        alive = t < count
        row = t.to(tl.int64)[:, None] * CHANNELS
        gram = tl.zeros([Q, Q], tl.float32)
        y = tl.zeros([Q, BP], tl.float32)
        for n0 in range(0, N, BN):
            inside = n0 + n < N
            seen = alive[:, None] & inside[None, :]
            b = tl.load(b_at + row + n0, mask=seen, other=0.0)
            c = tl.load(b_at + GROUPS * N + row + n0, mask=seen, other=0.0)
            s = tl.load(cell + n0 * PP, mask=inside[:, None] & wide, other=0.0)
            gram = tl.dot(c, tl.trans(b), gram, input_precision=PRECISION)
            y = tl.dot(c, s, y, input_precision=PRECISION)
        d = softplus(tl.load(dt + t.to(tl.int64) * lddt + h, mask=alive, other=0.0) + bias)
        d = tl.where(alive, tl.minimum(tl.maximum(d, dt_min), dt_max), 0.0)
        total = tl.cumsum(d * decay, axis=0)
        end = tl.sum(d * decay, axis=0)
        gap = tl.where(step[:, None] >= step[None, :], total[:, None] - total[None, :], -float("inf"))
        x = tl.load(x_at + row, mask=alive[:, None] & wide, other=0.0)
        y = y * tl.exp(total)[:, None] + skip * x
        y = tl.dot(gram * tl.exp(gap) * d[None, :], x, y, input_precision=PRECISION)
        tl.store(out + t.to(tl.int64)[:, None] * ldo + h * P + p[None, :], y, mask=alive[:, None] & wide)
        left = x * (tl.exp(end - total) * d)[:, None]
        tl.debug_barrier()  # every thread has read the state that is now replaced
        for n0 in range(0, N, BN):
            inside = n0 + n < N
            b = tl.load(b_at + row + n0, mask=alive[:, None] & inside[None, :], other=0.0)
            s = tl.load(cell + n0 * PP, mask=inside[:, None] & wide, other=0.0) * tl.exp(end)
            s = tl.dot(tl.trans(b), left, s, input_precision=PRECISION)
            tl.debug_barrier()
            tl.store(cell + n0 * PP, s, mask=inside[:, None] & wide)
        tl.debug_barrier()
