"""gemm: out = act(prologue(x) @ W.T + bias) * scale * gate + residual for many rows, W in the panels of csrc/ops/gemm.

layout   activations row-major in ws: f32 | bf16 | int8 codes, then fp32 scales [K/group, M]; W as 32-bit words, word
         (kvec, row) of a panel at kvec * 16 + row, so 16 rows of one kvec are one 64-byte run; a word is 1 f32, 2 bf16,
         4 u8 or 8 u4 consecutive k of one output row, which is what one register of an MMA operand holds
mapping  rows: a program per row. matmul: a program per BM x BN tile, row tiles first so that those that share a panel
         run together; bf16 and int8 products on tensor cores, int32 sums exact per group, then scaled in fp32
moves    x once (twice with a norm), activations once per BN columns from L2, W once per BM rows, out and residual once
tried    csrc/ops/gemm/README.md
"""

from __future__ import annotations

import triton
import triton.language as tl

F32, BF16, I8, I4 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def silu(v):
    return v / (1.0 + tl.exp(-v))


@triton.jit
def round_even(v):
    """Round half to even, |v| <= 2^22; needs separate multiply and add (no fusion)."""
    return (v + 12582912.0) - 12582912.0


@triton.jit
def activate(v, ACT: tl.constexpr):
    if ACT == 1:
        v = tl.maximum(v, 0.0)
        v = v * v
    elif ACT == 2:
        v = silu(v)
    elif ACT == 3:  # tanh form: v * sigmoid(2 u)
        v = v / (1.0 + tl.exp(-1.5957691216057308 * (v + 0.044715 * v * v * v)))
    elif ACT == 4:
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACT == 5:
        v = tl.maximum(v, 0.0)
    elif ACT == 6:
        v = v / (1.0 + tl.exp(-1.702 * v))
    return v


@triton.jit
def live_rows(rows, m):
    """How many of the m rows this replay has."""
    if rows is not None:
        m = tl.minimum(tl.load(rows), m)
    return m


@triton.jit
def group_norms(x, z, rstd, rows, m, ldx, ldz, eps, NORM_GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """rstd [M, groups] of x * silu(z) over groups of NORM_GROUP channels. Grid (M, groups)."""
    row, g = tl.program_id(0), tl.program_id(1)
    if row >= live_rows(rows, m):
        return
    x += row.to(tl.int64) * ldx + g * NORM_GROUP
    z += row.to(tl.int64) * ldz + g * NORM_GROUP
    total = tl.zeros([BLOCK], tl.float32)
    for k0 in range(0, NORM_GROUP, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        v = tl.load(x + k, mask=k < NORM_GROUP, other=0.0)
        v *= silu(tl.load(z + k, mask=k < NORM_GROUP, other=0.0))
        total += v * v
    mean = tl.sum(total) / NORM_GROUP
    tl.store(rstd + row * tl.num_programs(1) + g, 1.0 / tl.sqrt(mean + eps))


@triton.jit
def row_begin(row, ldx, ldline, WIDTH: tl.constexpr):
    """Where rows begin: ldx apart, or as cells of a grid, WIDTH in a line."""
    if WIDTH > 0:
        at = row // WIDTH * ldline + row % WIDTH * ldx
    else:
        at = row * ldx
    return at


@triton.jit
def rows(
    x, z, norm, rstd, out, scales, live, m, ldx, ldz, eps, norm_bias, mod, mod_rows, ldmod, ldtap, ldline,
    K: tl.constexpr, LDA: tl.constexpr, PER: tl.constexpr, NORM: tl.constexpr, NORM_GROUP: tl.constexpr,
    PRO_ACT: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, TAP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out [M, LDA] in FORMAT (scales [K/GROUP, M] when quantised) from x [M, K]. Grid (M); PER rows per live one.

    NORM 0: as it is; 1: RMS norm; 2: x * silu(z), times rstd of its norm group; 3: layer norm; 4: act(x) * z. 1 and 3
    are followed by norm and norm_bias, then by scale and shift at columns SCALE and SHIFT (-1: none) of row
    mod_rows[m] of mod. TAP: a row is K / TAP pieces of x, ldtap apart (0: one piece). WIDTH: rows are cells of a grid.
    K padding of LDA is written as zero.
    """
    row = tl.program_id(0)
    if row >= live_rows(live, m // PER) * PER:
        return
    x += row_begin(row.to(tl.int64), ldx, ldline, WIDTH)
    factor = 1.0
    mean = 0.0
    if NORM == 3:
        total = tl.zeros([BLOCK], tl.float32)
        for k0 in range(0, K, BLOCK):
            k = k0 + tl.arange(0, BLOCK)
            total += tl.load(x + k, mask=k < K, other=0.0)
        mean = tl.sum(total) / K
    if NORM == 1 or NORM == 3:
        total = tl.zeros([BLOCK], tl.float32)
        for k0 in range(0, K, BLOCK):
            k = k0 + tl.arange(0, BLOCK)
            v = tl.load(x + k, mask=k < K, other=0.0)
            if NORM == 3:
                v = tl.where(k < K, v - mean, 0.0)
            total += v * v
        factor = 1.0 / tl.sqrt(tl.sum(total) / K + eps)
    if mod is not None and mod_rows is not None:
        mod += tl.load(mod_rows + row).to(tl.int64) * ldmod
    for k0 in range(0, K, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        if TAP > 0:
            v = tl.load(x + (k // TAP).to(tl.int64) * ldtap + k % TAP, mask=k < K, other=0.0).to(tl.float32)
        else:
            v = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        if NORM == 2:
            v *= silu(tl.load(z + row.to(tl.int64) * ldz + k, mask=k < K, other=0.0))
            v *= tl.load(rstd + row * (K // NORM_GROUP) + k // NORM_GROUP, mask=k < K, other=0.0)
        if NORM == 3:
            v -= mean
        if NORM == 1 or NORM == 3:
            v *= factor
        if NORM == 4:
            v = activate(v, PRO_ACT) * tl.load(z + row.to(tl.int64) * ldz + k, mask=k < K, other=0.0)
        if norm is not None:
            v *= tl.load(norm + k, mask=k < K, other=0.0)
        if norm_bias is not None:
            v += tl.load(norm_bias + k, mask=k < K, other=0.0)
        if mod is not None and SCALE >= 0:
            v *= 1.0 + tl.load(mod + SCALE + k, mask=k < K, other=0.0).to(tl.float32)
        if mod is not None and SHIFT >= 0:
            v += tl.load(mod + SHIFT + k, mask=k < K, other=0.0).to(tl.float32)
        if NORM == 3:  # the padding holds what a mean left there
            v = tl.where(k < K, v, 0.0)
        at = row.to(tl.int64) * LDA + k
        if FORMAT == F32:
            tl.store(out.to(tl.pointer_type(tl.float32)) + at, v, mask=k < LDA)
        elif FORMAT == BF16:
            tl.store(out.to(tl.pointer_type(tl.bfloat16)) + at, v.to(tl.bfloat16), mask=k < LDA)
        else:
            g = tl.reshape(v, [BLOCK // GROUP, GROUP])
            amax = tl.max(tl.abs(g), axis=1)
            inverse = tl.where(amax > 0, tl.div_rn(127.0, tl.where(amax > 0, amax, 1.0)), 0.0)
            q = round_even(g * inverse[:, None])
            code = tl.reshape(q.to(tl.int32).to(tl.int8), [BLOCK])
            tl.store(out.to(tl.pointer_type(tl.int8)) + at, code, mask=k < K)
            i = k0 // GROUP + tl.arange(0, BLOCK // GROUP)
            tl.store(scales + i.to(tl.int64) * m + row, tl.div_rn(amax, 127.0), mask=i < K // GROUP)


@triton.jit
def columns(n0, BN: tl.constexpr):
    """[BN] weight rows in the order of an operand's columns: column c is row 4 * (c % (BN / 4)) + c / (BN / 4).

    Four neighbouring rows then lie BN / 4 columns apart, in one thread of an MMA, which so reads 16 bytes at once.
    """
    c = tl.arange(0, BN)
    return n0 + c % (BN // 4) * 4 + c // (BN // 4)


@triton.jit
def straight(v, BM: tl.constexpr, BN: tl.constexpr):
    """[BM, BN] with columns as `columns` has them, back in ascending order."""
    return tl.reshape(tl.permute(tl.reshape(v, [BM, 4, BN // 4]), (0, 2, 1)), [BM, BN])


@triton.jit
def arranged(word, KV: tl.constexpr, BN: tl.constexpr):
    """[KV, BN / 4, 4] words, rows ascending, to [KV, BN] in the order of `columns`."""
    return tl.reshape(tl.permute(word, (0, 2, 1)), [KV, BN])


@triton.jit
def int8_of(x, shift: tl.constexpr):
    return (x >> shift).to(tl.int8)


@triton.jit
def operand(word, FORMAT: tl.constexpr, KV: tl.constexpr, BN: tl.constexpr):
    """[K, BN] matrix operand from KV x BN words; the values of a word stay together, in ascending k."""
    if FORMAT == F32:
        return word.to(tl.float32, bitcast=True)
    elif FORMAT == BF16:
        v = tl.join(word.to(tl.int16), (word >> 16).to(tl.int16)).to(tl.bfloat16, bitcast=True)
        return tl.reshape(tl.permute(v, (0, 2, 1)), [2 * KV, BN])
    elif FORMAT == I8:
        s = word ^ -2139062144  # 0x80808080: the zero point 128
        v = tl.join(tl.join(int8_of(s, 0), int8_of(s, 16)), tl.join(int8_of(s, 8), int8_of(s, 24)))
        return tl.reshape(tl.permute(tl.reshape(v, [KV, BN, 4]), (0, 2, 1)), [4 * KV, BN])
    else:
        nibbles = tl.join(word & 0x0F0F0F0F, (word >> 4) & 0x0F0F0F0F)
        # Four subtractions of the zero point 8 at once: the set top bits keep borrows inside a byte.
        s = ((nibbles | -2139062144) - 0x08080808) ^ -2139062144
        v = tl.join(tl.join(int8_of(s, 0), int8_of(s, 16)), tl.join(int8_of(s, 8), int8_of(s, 24)))
        return tl.reshape(tl.permute(tl.reshape(v, [KV, BN, 8]), (0, 2, 1)), [8 * KV, BN])


@triton.jit
def product(
    a, row, valid, scales, scale_rows, w, n0,
    N: tl.constexpr, K: tl.constexpr, LDA: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr,
    PANEL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ldtap=0, ldline=0,
    TAP: tl.constexpr = 0, WIDTH: tl.constexpr = 0,
):  # fmt: skip
    """[BM, BN] f32 sums of activation rows `row` [BM] (where `valid`) with weight rows n0..n0 + BN.

    w: int32 words of one matrix, PANEL words a panel; scales: of row r and group g at g * scale_rows + r. TAP and
    WIDTH, as `rows` has them, of f32 and bf16 rows that nothing has laid out.
    """
    n = n0 + tl.arange(0, BN // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    there = (n < (N + 15) // 16 * 16)[None, :, :]  # whole panels: rows beyond N are zero
    acc = tl.zeros([BM, BN], tl.float32)
    # Bases advance, offsets stay: 32 bits each (engine/ops/gemm.py bounds them), half the registers of pointers.
    if FORMAT < I8:
        PER: tl.constexpr = 1 if FORMAT == F32 else 2
        KV: tl.constexpr = BK // PER
        KVECS: tl.constexpr = (K + PER - 1) // PER
        if FORMAT == F32:
            base = a.to(tl.pointer_type(tl.float32))
        else:
            base = a.to(tl.pointer_type(tl.bfloat16))
        k = tl.arange(0, BK)
        kv = tl.arange(0, KV)
        begin = row_begin(row, LDA, ldline, WIDTH)
        a_at = begin[:, None] + k[None, :]
        w_at = (n // 16 * PANEL + n % 16)[None, :, :] + kv[:, None, None] * 16
        for k0 in range(0, K, BK):
            if TAP > 0:
                c = k0 + k
                at_piece = begin[:, None] + (c // TAP * ldtap + c % TAP)[None, :]
                av = tl.load(base + at_piece, mask=valid[:, None] & (c < K)[None, :], other=0.0)
            elif K % BK == 0:
                av = tl.load(base + k0 + a_at, mask=valid[:, None], other=0.0)
            else:
                av = tl.load(base + k0 + a_at, mask=valid[:, None] & (k0 + k < K)[None, :], other=0.0)
            at = w + k0 // PER * 16
            if K % BK == 0 and N % BN == 0:
                word = tl.load(at + w_at)
            elif K % BK == 0:
                word = tl.load(at + w_at, mask=there, other=0)
            else:
                word = tl.load(at + w_at, mask=there & (k0 // PER + kv < KVECS)[:, None, None], other=0)
            acc = tl.dot(av, operand(arranged(word, KV, BN), FORMAT, KV, BN), acc, input_precision="ieee")
    else:
        KV: tl.constexpr = GROUP // (4 if FORMAT == I8 else 8)
        GROUPS: tl.constexpr = K // GROUP
        k = tl.arange(0, GROUP)
        kv = tl.arange(0, KV)
        codes = a.to(tl.pointer_type(tl.int8))
        a_at = row[:, None] * LDA + k[None, :]
        w_at = (n // 16 * PANEL + n % 16)[None, :, :] + kv[:, None, None] * 16
        # Behind the codes of two groups lie 2 x 16 fp16 scales, which are 16 words.
        halves = w.to(tl.pointer_type(tl.float16))
        c = columns(n0, BN)
        s_at = c // 16 * (2 * PANEL) + c % 16
        for g in range(0, GROUPS):
            av = tl.load(codes + g * GROUP + a_at, mask=valid[:, None], other=0)
            at = g * (KV * 16) + g // 2 * 16
            end = tl.minimum((g | 1) + 1, GROUPS) * (KV * 32) + g // 2 * 32 + (g & 1) * 16
            if N % BN == 0:
                word = tl.load(w + at + w_at)
                sw = tl.load(halves + end + s_at)
            else:
                word = tl.load(w + at + w_at, mask=there, other=0)
                sw = tl.load(halves + end + s_at, mask=c < (N + 15) // 16 * 16, other=0.0)
            sa = tl.load(scales + g * scale_rows + row, mask=valid, other=0.0)
            exact = tl.dot(av, operand(arranged(word, KV, BN), FORMAT, KV, BN), out_dtype=tl.int32)
            acc += exact.to(tl.float32) * (sa[:, None] * sw.to(tl.float32)[None, :])
    return straight(acc, BM, BN)


@triton.jit
def matmul(
    a, scales, w, out, residual, bias, live, m, ldo, ldr, scale, ldtap, ldline, mod, mod_rows, ldmod,
    N: tl.constexpr, K: tl.constexpr, LDA: tl.constexpr, PANEL: tl.constexpr, FORMAT: tl.constexpr,
    GROUP: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr, TAP: tl.constexpr, WIDTH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out = act(a @ W.T + bias) * scale * gate + residual; a as `rows` leaves it, or x itself where it needs no
    rounding; gate at column GATE of row mod_rows[m] of mod. Grid (ceil(M/BM), ceil(N/BN)).
    """
    count = live_rows(live, m)
    m0 = tl.program_id(0) * BM
    if m0 >= count:
        return
    n0 = tl.program_id(1) * BN
    row = m0 + tl.arange(0, BM)
    valid = row < count
    words = w.to(tl.pointer_type(tl.int32))
    v = product(a, row, valid, scales, m, words, n0, N, K, LDA, FORMAT, GROUP, PANEL, BM, BN, BK, ldtap, ldline, TAP,
                WIDTH)  # fmt: skip
    n = n0 + tl.arange(0, BN)
    if bias is not None:
        v += tl.load(bias + n, mask=n < N, other=0.0)[None, :]
    v = activate(v, ACT) * scale
    inside = valid[:, None] & (n < N)[None, :]
    if mod is not None:
        if mod_rows is not None:
            at = tl.load(mod_rows + row, mask=valid, other=0).to(tl.int64) * ldmod + GATE
        else:
            at = row.to(tl.int64) * 0 + GATE
        v *= tl.load(mod + at[:, None] + n[None, :], mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        v += tl.load(residual + row.to(tl.int64)[:, None] * ldr + n[None, :], mask=inside, other=0.0)
    tl.store(out + row.to(tl.int64)[:, None] * ldo + n[None, :], v.to(out.dtype.element_ty), mask=inside)
