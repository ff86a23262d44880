"""rng: Philox4x32-10 with the stream layout of csrc/base/philox.h, bit for bit."""

from __future__ import annotations

import triton
import triton.language as tl

BITS, UNIFORM, NORMAL = 0, 1, 2


@triton.jit
def _round(x0, x1, x2, x3, k0, k1):
    # 32x32 -> 64 bit products as 64-bit integers, which every target has.
    p0 = x0.to(tl.uint64) * 0xD2511F53
    p1 = x2.to(tl.uint64) * 0xCD9E8D57
    return (p1 >> 32).to(tl.uint32) ^ x1 ^ k0, p1.to(tl.uint32), (p0 >> 32).to(tl.uint32) ^ x3 ^ k1, p0.to(tl.uint32)


@triton.jit
def philox(counter, offset, stream, seed):
    """Four words of a counter block: counter, stream uint32; offset, seed uint64."""
    x0 = counter
    x1 = tl.zeros_like(counter) + offset.to(tl.uint32)
    x2 = tl.zeros_like(counter) + (offset >> 32).to(tl.uint32)
    x3 = tl.zeros_like(counter) + stream.to(tl.uint32)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        x0, x1, x2, x3 = _round(x0, x1, x2, x3, k0, k1)
        # Key words wrap at 2^32: added in 64 bits and cut, so that no target sees a signed overflow.
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return x0, x1, x2, x3


@triton.jit
def _sincospi(turns):
    """sin and cos of 2 pi turns, turns in [0, 1), fp64: Taylor series over an eighth of a turn, error below 1e-15.

    tl.sin would bring libdevice's reduction of huge arguments, which lies in local memory.
    """
    quarter = (turns * 4 + 0.5).to(tl.int32)
    x = (turns - quarter.to(tl.float64) * 0.25) * 6.283185307179586
    y = x * x
    s = 1.0 + y * (-1.0 / 6 + y * (1.0 / 120 + y * (-1.0 / 5040 + y * (1.0 / 362880 + y * (-1.0 / 39916800 + y * (
        1.0 / 6227020800 + y * (-1.0 / 1307674368000)))))))  # fmt: skip
    c = 1.0 + y * (-0.5 + y * (1.0 / 24 + y * (-1.0 / 720 + y * (1.0 / 40320 + y * (-1.0 / 3628800 + y * (
        1.0 / 479001600 + y * (-1.0 / 87178291200 + y * (1.0 / 20922789888000))))))))  # fmt: skip
    s = s * x
    odd = quarter % 2 == 1
    sine, cosine = tl.where(odd, c, s), tl.where(odd, s, c)
    return tl.where(quarter % 4 >= 2, -sine, sine), tl.where((quarter + 1) % 4 >= 2, -cosine, cosine)


@triton.jit
def _normal_pair(a, b):
    # fp64, as in the specification: the result is a double rounded to fp32.
    u = (a.to(tl.float64) + 0.5) * 2.3283064365386963e-10
    radius = tl.sqrt(-2.0 * tl.log(u))
    sine, cosine = _sincospi(b.to(tl.float64) * 2.3283064365386963e-10)
    return (radius * cosine).to(tl.float32), (radius * sine).to(tl.float32)


@triton.jit
def _store(out, i, v, n, KIND: tl.constexpr):
    if KIND == 0:
        tl.store(out + i, v.to(tl.int32, bitcast=True), mask=i < n)
    elif KIND == 1:
        # Through int32: 24 bits fit, and unsigned to float takes more instructions.
        tl.store(out + i, (v >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-8, mask=i < n)
    else:
        tl.store(out + i, v, mask=i < n)


@triton.jit(do_not_specialize=["n", "stream"])
def rng(out, n, seed_ptr, offset_ptr, stream, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """out [n] (i32 for bits, else f32); seed and offset are u64 [1] in memory; BLOCK counters per program.

    Grid: ceil(n / (4 * BLOCK)). Element i is lane i % 4 of counter i / 4.
    """
    counter = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
    offset = tl.load(offset_ptr).to(tl.uint64, bitcast=True)
    a, b, c, d = philox(counter.to(tl.uint32), offset, stream, seed)
    if KIND == 2:
        a, b = _normal_pair(a, b)
        c, d = _normal_pair(c, d)
    i = counter.to(tl.int64) * 4
    _store(out, i, a, n, KIND)
    _store(out, i + 1, b, n, KIND)
    _store(out, i + 2, c, n, KIND)
    _store(out, i + 3, d, n, KIND)
