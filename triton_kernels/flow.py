"""flow: what the network sees of each action at its own local time, and what becomes of its answer.

layout   csrc/ops/flow/flow.h: chunks [B, H, A], all f32
mapping  begin: a program per action, its channels in one vector. end: a program per chunk, BH actions at a time; its
         step advances behind a barrier, when every thread has read it
moves    every operand once
tried    csrc/ops/flow/README.md
"""

from __future__ import annotations

import triton
import triton.language as tl

EULER, RENOISE, IMPLIED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def begin(
    step, tau, index, delay, prefix, noise, x, out, rows, context, times, hidden, ldo,
    STEPS: tl.constexpr, H: tl.constexpr, A: tl.constexpr, P: tl.constexpr, T: tl.constexpr, RULE: tl.constexpr,
    BA: tl.constexpr, BP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Grid (B * H). P, T: widths of context and times, 0 where there are none."""
    row = tl.program_id(0)
    b, i = row // H, row % H
    j = tl.load(step + b)
    if (j < 0) | (j >= STEPS):
        return
    t = tl.load(tau + (b * (STEPS + 1) + j) * H + i)
    time = tl.load(index + (b * STEPS + j) * H + i)
    c = tl.arange(0, BA)
    at = row * A + c
    v = tl.load(x + at, mask=c < A, other=0.0)
    if i < tl.load(delay + b):
        v = tl.load(prefix + at, mask=c < A, other=0.0)
        tl.store(x + at, v, mask=c < A)
    if RULE == RENOISE:
        v = tl.load(noise + at, mask=c < A, other=0.0) * t + v * (1.0 - t)
    if hidden is not None:
        v = tl.where(tl.load(hidden + c, mask=c < A, other=0) != 0, 0.0, v)
    out += row.to(tl.int64) * ldo
    tl.store(out + c, v, mask=c < A)
    if P > 0:
        k = tl.arange(0, BP)
        tl.store(out + A + k, tl.load(context + b * P + k, mask=k < P, other=0.0), mask=k < P)
    if T > 0:
        k = tl.arange(0, BT)
        tl.store(out + A + P + k, tl.load(times + time.to(tl.int64) * T + k, mask=k < T, other=0.0), mask=k < T)
    tl.store(rows + row, time)


@triton.jit
def end(
    step, tau, due, slot, pred, x, ring, scale, offset, low, high, squash, bad, ldp, slots,
    STEPS: tl.constexpr, H: tl.constexpr, A: tl.constexpr, DIMS: tl.constexpr, RULE: tl.constexpr,
    BH: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """Grid (B)."""
    b = tl.program_id(0)
    j = tl.load(step + b)
    if (j < 0) | (j >= STEPS):
        return
    c = tl.arange(0, BA)[None, :]
    place = tl.load(slot + b)
    factor = tl.load(scale + b * DIMS + c, mask=c < DIMS, other=0.0)
    shift = tl.load(offset + b * DIMS + c, mask=c < DIMS, other=0.0)
    least = tl.load(low + c, mask=c < DIMS, other=0.0)
    most = tl.load(high + c, mask=c < DIMS, other=0.0)
    broken = 0
    for h0 in range(0, H, BH):
        i = h0 + tl.arange(0, BH)[:, None]
        inside = (i < H) & (c < A)
        now = tl.load(tau + (b * (STEPS + 1) + j) * H + i, mask=i < H, other=0.0)
        at = (b * H + i) * A + c
        v = tl.load(x + at, mask=inside, other=0.0)
        said = tl.load(pred + (b * H + i).to(tl.int64) * ldp + c, mask=inside, other=0.0)
        then = tl.load(tau + (b * (STEPS + 1) + j + 1) * H + i, mask=i < H, other=0.0)
        if RULE == EULER:
            v += (then - now) * said
        elif RULE == IMPLIED:
            kept = then / tl.where(now > 0, now, 1.0)
            v = tl.where(now > 0, tl.where(kept > 0, kept * v + (1.0 - kept) * said, said), v)
        else:
            v = tl.where(now > 0, said, v)
        tl.store(x + at, v, mask=inside)
        leaves = (tl.load(due + b * H + i, mask=i < H, other=-1) == j) & (c < DIMS)
        if (place >= 0) & (place < slots):
            if squash is not None:
                v = tl.where(tl.load(squash + c, mask=c < A, other=0) != 0, 1.0 / (1.0 + tl.exp(-v)), v)
            v = v * factor + shift
            finite = tl.abs(v) < float("inf")
            broken += tl.sum(tl.sum((leaves & (finite == 0)).to(tl.int32), axis=1), axis=0)
            # Written so that NaN passes, as it does on other backends; bad tells.
            v = tl.where(v < least, least, v)
            v = tl.where(v > most, most, v)
            tl.store(ring + (place * H + i) * DIMS + c, v, mask=leaves)
    if broken > 0:
        tl.store(bad + b, 1)
    tl.debug_barrier()
    tl.store(step + b, j + 1)
