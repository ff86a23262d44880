"""Packed GEMM: out = act(prologue(x) @ W.T + bias) * scale * gate + residual, W packed once (csrc/ops/gemm)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from engine import _C
from engine.errors import InputError
from engine.ops.checks import Check
from engine.ops.dispatch import call, many_rows
from engine.ops.registry import Arrays, Case, GuardedArena, Op, cases, guarded, register
from engine.runtime import device
from engine.runtime.arena import DTYPES, Arena, Tensor, as_tensor
from engine.runtime.program import Program

FORMATS = {"f32": 0, "bf16": 1, "i8": 2, "i4": 3}
ACTS = {"none": 0, "relu2": 1, "silu": 2, "gelu_tanh": 3, "gelu": 4, "relu": 5, "quick_gelu": 6}
PROLOGUES = {"none": 0, "rms": 1, "gated": 2, "layer": 3, "glu": 4}
SRC = {"f32": 0, "bf16": 1, "f16": 2}
MAX_K = 65536  # rows are packed in per-thread scratch
STRIP_BYTES = 16 << 20  # packed activations that a CPU keeps at once (kGemmStripBytes)


def group_for(k: int) -> int | None:
    """Quantisation group along K: 64, else 32, else none (the matrix then stays unquantised)."""
    return 64 if k % 64 == 0 else 32 if k % 32 == 0 else None


@dataclass(frozen=True)
class PackedMatrix:
    """`count` weight matrices [n, k] in the panel layout of csrc/ops/gemm/gemm.h."""

    n: int
    k: int
    format: str
    group: int
    count: int
    data: Tensor

    @staticmethod
    def empty(arena: Arena | None, name: str, n: int, k: int, format: str, count: int = 1) -> PackedMatrix:
        if format not in FORMATS:
            raise InputError(f"weight format {format!r} is not one of {', '.join(FORMATS)}")
        if not 1 <= k <= MAX_K or n < 1:
            raise InputError(f"matrix {name!r} is [{n}, {k}]; K must be in 1..{MAX_K}")
        group = 1
        if format in ("i8", "i4"):
            chosen = group_for(k)
            if chosen is None:
                raise InputError(f"matrix {name!r} has K = {k}, not a multiple of 32; use format bf16 or f32")
            group = chosen
        nbytes = _C.gemm_panel_bytes(FORMATS[format], k, group) * math.ceil(n / 16) * count
        data = (arena or Arena()).alloc(name, (nbytes,), "u8", "weights")
        return PackedMatrix(n, k, format, group, count, data)

    @staticmethod
    def pack(name: str, src: np.ndarray, format: str, arena: Arena | None = None) -> PackedMatrix:
        """From [n, k] or [count, n, k] in f32, f16, or bf16 as uint16."""
        stack = src if src.ndim == 3 else src[None]
        out = PackedMatrix.empty(arena, name, stack.shape[1], stack.shape[2], format, stack.shape[0])
        for i, matrix in enumerate(stack):
            out.fill(matrix, index=i)
        return out

    @property
    def panel_bytes(self) -> int:
        return _C.gemm_panel_bytes(FORMATS[self.format], self.k, self.group)

    @property
    def matrix_bytes(self) -> int:
        return self.panel_bytes * math.ceil(self.n / 16)

    def fill(self, src: np.ndarray, row: int = 0, index: int = 0) -> bool:
        """Packs rows [row, row + len(src)) of matrix `index`; fill rows in ascending order.

        Returns True if the source holds NaN or infinity.
        """
        dtype = {np.dtype(np.float32): "f32", np.dtype(np.uint16): "bf16", np.dtype(np.float16): "f16"}.get(src.dtype)
        if dtype is None or src.ndim != 2 or src.shape[1] != self.k or row + src.shape[0] > self.n:
            raise InputError(f"cannot pack {src.dtype}{list(src.shape)} at row {row} of a [{self.n}, {self.k}] matrix")
        src = np.ascontiguousarray(src)
        bad = np.zeros(1, np.int32)
        first, last = row // 16, math.ceil((row + src.shape[0]) / 16)
        at, nbytes = index * self.matrix_bytes + first * self.panel_bytes, (last - first) * self.panel_bytes
        panels, here = self.data.slice(at, (nbytes,)), self.data.device == "cpu"
        if not here:  # packed on this side, then copied
            panels = as_tensor(np.zeros(nbytes, np.uint8))
            if row % 16:  # the panel that the rows before have begun
                begun = (self.panel_bytes,)
                panels.slice(0, begun).write(self.data.slice(at, begun).read())
        with device.on("cpu"):
            call("gemm_pack", src=src.ctypes.data, lds=self.k, src_dtype=SRC[dtype], dst=panels.address,
                 n=src.shape[0], k=self.k, n0=row % 16, format=FORMATS[self.format], group=self.group,
                 bad=bad.ctypes.data)  # fmt: skip
        if not here:
            self.data.slice(at, (nbytes,)).write(panels.numpy())
        return bool(bad[0])

    def part(self, row: int, n: int) -> PackedMatrix:
        """Rows [row, row + n) as a matrix of their own, in the same memory; row is a multiple of 16."""
        if self.count != 1 or row % 16 or not 0 <= row < row + n <= self.n or (n % 16 and row + n != self.n):
            raise InputError(
                f"rows [{row}, {row + n}) of a [{self.n}, {self.k}] matrix are not whole panels of 16 rows"
            )
        data = self.data.slice(row // 16 * self.panel_bytes, (math.ceil(n / 16) * self.panel_bytes,))
        return PackedMatrix(n, self.k, self.format, self.group, 1, data)

    def fits(self, check: Check, name: str, n: int, k: int, count: int = 1) -> None:
        """InputError unless this is `count` matrices [n, k]."""
        got, want = [self.count, self.n, self.k], [count, n, k]
        check.need(got == want, f"{name} is {got}; it must be {want} (count, N, K)")
        check.one_of(f"the format of {name}", self.format, FORMATS)
        check.takes(name, self.data, (self.matrix_bytes * count,), "u8")

    def addressable(self) -> None:
        """InputError where a program's 32-bit offsets do not reach the end of one matrix."""
        if self.matrix_bytes >= 1 << 32:
            raise InputError(
                f"a matrix [{self.n}, {self.k}] of {self.matrix_bytes} bytes exceeds the 4 GiB of programs"
            )

    def unpack(self, index: int = 0) -> np.ndarray:
        """The weights that the kernels multiply with, f32 [n, k]."""
        panels = math.ceil(self.n / 16)
        raw = self.data.slice(index * self.matrix_bytes, (self.matrix_bytes,)).host().reshape(panels, -1)
        k, g = self.k, self.group
        if self.format == "f32":
            w = raw.view(np.float32).reshape(panels, k, 16).transpose(0, 2, 1)
        elif self.format == "bf16":
            pairs = (k + 1) // 2
            bits = raw.view(np.uint16).reshape(panels, pairs, 16, 2).transpose(0, 2, 1, 3).reshape(panels, 16, -1)
            w = (bits[..., :k].astype(np.uint32) << 16).view(np.float32)
        else:
            # Blocks of two groups: their codes, then 2 x 16 fp16 scales; an odd last group has a block of its own.
            four, groups = self.format == "i4", k // g
            code = (8 if four else 16) * g
            w = np.empty((panels, 16, k), np.float32)
            for i in range(groups):
                at = i * code + i // 2 * 64
                end = min((i | 1) + 1, groups) * code + i // 2 * 64 + (i & 1) * 32
                codes = raw[:, at : at + code]
                if four:
                    v = codes.reshape(panels, g // 8, 1, 16, 4)
                    q = np.concatenate([v & 15, v >> 4], axis=2).astype(np.float32) - 8
                else:
                    q = codes.reshape(panels, g // 4, 1, 16, 4).astype(np.float32) - 128
                scale = np.ascontiguousarray(raw[:, end : end + 32]).view(np.float16).astype(np.float32)
                w[:, :, i * g : (i + 1) * g] = q.transpose(0, 3, 1, 2, 4).reshape(panels, 16, g) * scale[:, :, None]
        return np.ascontiguousarray(w.reshape(panels * 16, k)[: self.n], dtype=np.float32)


@dataclass(frozen=True)
class Modulation:
    """Scale, shift and gate of each row, looked up in a table (adaptive norms; Peebles and Xie, 2023, section 3.2).

    table [R, W] f32 or bf16; row m of a product uses table row rows[m] (i32, in [0, R)), or row 0 without rows. scale,
    shift, gate: the columns where each begins; None: there is none. A norm becomes norm(x) * (1 + scale) + shift, a
    product (x @ W.T) * gate.
    """

    table: Tensor
    rows: Tensor | None = None
    scale: int | None = None
    shift: int | None = None
    gate: int | None = None

    def fits(self, check: Check, m: int, n: int, k: int) -> None:
        """InputError unless m rows of a product [n, k] find their parts."""
        check.takes("modulation.table", self.table, (None, None), "f32|bf16", strided=True)
        check.may_take("modulation.rows", self.rows, (m,), "i32")
        for name, at, width in (("scale", self.scale, k), ("shift", self.shift, k), ("gate", self.gate, n)):
            if at is not None and not 0 <= at <= self.table.shape[1] - width:
                check.fail(f"modulation.{name} begins at column {at}; {width} do not fit {self.table.shape[1]} columns")

    @property
    def norms(self) -> bool:
        return self.scale is not None or self.shift is not None


@dataclass(frozen=True)
class Taps:
    """A convolution over rows: row m of the product reads rows m * stride + j * dilation, j < count, of x [R, C]; the
    weights are [N, count * C], tap after tap. Padding is rows of zeros in x."""

    count: int
    dilation: int = 1
    stride: int = 1

    def rows(self, m: int) -> int:
        """Rows of x that m rows of the product read."""
        return (m - 1) * self.stride + (self.count - 1) * self.dilation + 1

    def walk(self, ld: int, channels: int) -> Walk:
        piece, step = channels, self.dilation * ld
        if step == piece:  # the pieces lie side by side: rows that overlap
            piece = step = 0
        return Walk(self.stride * ld, piece, step)


@dataclass(frozen=True)
class Window:
    """A convolution over a channels-last grid: row m of the product reads size x size cells of x [R, C], whose rows are
    the cells of a grid of lines of `line` cells; the first is cell (m // width * stride, m % width * stride). The
    weights are [N, size * size * C], (ky, kx, c). Padding is cells of zeros in x."""

    size: int
    width: int
    line: int
    stride: int = 1

    @property
    def count(self) -> int:
        return self.size * self.size

    @property
    def dilation(self) -> int:
        return 1

    def rows(self, m: int) -> int:
        """Rows of x that m rows of the product read."""
        last = (m - 1) // self.width * self.stride * self.line + (min(m, self.width) - 1) * self.stride
        return last + (self.size - 1) * (self.line + 1) + 1

    def walk(self, ld: int, channels: int) -> Walk:
        del channels  # cells of a line lie side by side
        return Walk(self.stride * ld, self.size * ld, self.line * ld, self.width, self.stride * self.line * ld)


@dataclass(frozen=True)
class Walk:
    """Where the values of rows lie, in elements: see csrc/ops/gemm/gemm.h."""

    ldx: int
    tap: int = 0
    ldtap: int = 0
    width: int = 0
    ldline: int = 0


def workspace_bytes(m: int, k: int, *, direct: bool = False) -> int:
    """Bytes of ws for any format and ISA: packed activations of m rows; on a CPU of as many as a strip holds.

    direct: x and the weights are both bf16: nothing is rounded, and on a GPU the product reads x where it lies.
    All tiles are spaced like the largest one, and tiles of up to 14 rows differ in size by one: the last one ends at
    most 12 rows later than m rows would (m = 183 on AVX-512: one tile of 14 rows, then 13 of 13, 14 apart).
    """
    row = 4 * k + 8 * (k // 32 + 1) + 64
    whole = (m + 12) * row + 64
    if device.target() == "cpu":
        return min(whole, STRIP_BYTES + 14 * row + 64)
    return 0 if direct else whole


# ------------------------------------------------------------------------------------------------- Triton programs


@dataclass(frozen=True)
class Activations:
    """Rows [m, k] in the format of the weights that they meet, as triton_kernels/gemm.py lays them out in ws."""

    codes: Tensor
    scales: Tensor | None  # f32 [k/group, m]
    m: int
    k: int
    format: str
    group: int
    ld: int
    nbytes: int

    @staticmethod
    def place(ws: Tensor, at: int, m: int, k: int, format: str, group: int) -> Activations:
        """At byte `at` of ws; InputError if ws is too small."""
        if format in ("i8", "i4"):
            ld, size, groups = k, _ceil(m * k, 64), k // group
        else:
            ld, groups = _ceil(k, 4 if format == "f32" else 8), 0
            size = _ceil(m * ld * (4 if format == "f32" else 2), 64)
        if m * ld >= 1 << 31:
            raise InputError(f"{m} rows of {k} values exceed the 2^31 that programs address; use a smaller chunk")
        scales = part(ws, at + size, "f32", groups, m) if groups else None
        return Activations(part(ws, at, "u8", size), scales, m, k, format, group, ld, size + _ceil(4 * groups * m, 64))


def addressed(x: Tensor) -> Tensor:
    """x, whose values a program reaches with 32-bit offsets."""
    if x.shape[0] * x.ld >= 1 << 31:
        raise InputError(f"{x.shape[0]} rows {x.ld} values apart exceed the 2^31 that programs address")
    return x


def inferred(norm: Tensor | None, gate: Tensor | None) -> str:
    """The prologue that these arguments ask for where none is named."""
    return "gated" if gate is not None else "rms" if norm is not None else "none"


def _column(at: int | None) -> int:
    return -1 if at is None else at


def _ceil(a: int, b: int) -> int:
    return -(-a // b) * b


def part(ws: Tensor, at: int, dtype: str, *shape: int) -> Tensor:
    """A buffer at byte `at` of ws."""
    end = at + math.prod(shape) * DTYPES[dtype][0]
    if end > ws.nbytes:
        raise InputError(f"ws has {ws.nbytes} bytes; programs of this op need {end}")
    return Tensor(ws.address + at, shape, dtype, ws.owner, ws.device)


def row_programs(
    x: Tensor,
    to: Activations,
    *,
    rows: Tensor | None,
    per: int = 1,
    norm: Tensor | None = None,
    gate: Tensor | None = None,
    norm_group: int = 0,
    eps: float = 0.0,
    rstd: Tensor | None = None,
    prologue: str | None = None,
    norm_bias: Tensor | None = None,
    modulation: Modulation | None = None,
    pro_act: str = "none",
    walk: Walk | None = None,
) -> list[Program]:
    """Norm and rounding of activations. rstd [m, k/norm_group]: scratch of the gated norm; per: rows per live row."""
    out = []
    walk = walk or Walk(x.ld)
    m, k = to.m, to.k
    prologue = prologue or inferred(norm, gate)
    mod = modulation if modulation is not None and modulation.norms else None
    if prologue == "gated" and gate is not None:
        block = min(1024, max(16, power_of_two(norm_group)))
        args = {"x": x, "z": gate, "rstd": rstd, "rows": rows, "m": m, "ldx": x.ld, "ldz": gate.ld, "eps": eps}
        constants = {"NORM_GROUP": norm_group, "BLOCK": block}
        out.append(Program("gemm.group_norms", (m, k // norm_group, 1), args, constants, warps=1 if block < 512 else 4))
    block = min(2048, max(64, power_of_two(k)))
    out.append(
        Program(
            "gemm.rows",
            (m, 1, 1),
            {
                "x": x,
                "z": gate,
                "norm": norm,
                "rstd": rstd,
                "out": to.codes,
                "scales": to.scales,
                "live": rows,
                "m": m,
                "ldx": walk.ldx,
                "ldz": gate.ld if gate else 0,
                "eps": eps,
                "norm_bias": norm_bias,
                "mod": mod.table if mod else None,
                "mod_rows": mod.rows if mod else None,
                "ldmod": mod.table.ld if mod else 0,
                "ldtap": walk.ldtap,
                "ldline": walk.ldline,
            },
            {
                "K": k,
                "LDA": to.ld,
                "PER": per,
                "NORM": PROLOGUES[prologue],
                "NORM_GROUP": norm_group or k,
                "PRO_ACT": ACTS[pro_act],
                "SCALE": _column(mod.scale if mod else None),
                "SHIFT": _column(mod.shift if mod else None),
                "FORMAT": FORMATS[to.format],
                "GROUP": to.group,
                "BLOCK": block,
                "TAP": walk.tap,
                "WIDTH": walk.width,
            },
            warps=max(1, min(8, block // 256)),
            fusion=False,  # codes are rounded products: x * (127 / amax), then half to even
        )
    )
    return out


def power_of_two(n: int) -> int:
    """The smallest that is not below n."""
    return 1 << (n - 1).bit_length()


def tile(m: int, n: int, format: str) -> tuple[dict[str, int], int, int]:
    """(BM, BN, BK; warps; stages) of a product of m rows."""
    bm = min(128, max(16, power_of_two(m)))
    if format == "f32":
        return {"BM": min(bm, 32), "BN": 32 if n <= 512 else 64, "BK": 16}, 4, 2
    if format == "bf16":
        return {"BM": bm, "BN": 128 if n > 64 else 64, "BK": 64}, 8 if bm == 128 else 4, 3 if bm < 128 else 2
    # int32 sums and their fp32 totals are alive together: half the rows of a bf16 tile. Of 8-bit codes a tile of few
    # rows takes half the columns: 32 x 128 needs 130 registers, which ptxas cuts to 128 for sm_90 and spills.
    columns = 128 if n > 64 and (format == "i4" or bm >= 64) else 64
    return {"BM": min(bm, 64), "BN": columns, "BK": 64}, 4, 4


def matmul_program(
    a: Activations,
    w: PackedMatrix,
    out: Tensor,
    *,
    rows: Tensor | None,
    bias: Tensor | None = None,
    act: str = "none",
    scale: float = 1.0,
    residual: Tensor | None = None,
    modulation: Modulation | None = None,
    walk: Walk | None = None,
) -> Program:
    """walk: where the rows of `a` lie, when nothing has laid them out."""
    blocks, warps, stages = tile(a.m, w.n, w.format)
    at = walk or Walk(a.ld)
    w.addressable()
    mod = modulation if modulation is not None and modulation.gate is not None else None
    return Program(
        "gemm.matmul",
        (-(-a.m // blocks["BM"]), -(-w.n // blocks["BN"]), 1),
        {"a": a.codes, "scales": a.scales, "w": w.data, "out": out, "residual": residual, "bias": bias, "live": rows,
         "m": a.m, "ldo": out.ld, "ldr": residual.ld if residual else 0, "scale": float(scale), "ldtap": at.ldtap,
         "ldline": at.ldline, "mod": mod.table if mod else None, "mod_rows": mod.rows if mod else None,
         "ldmod": mod.table.ld if mod else 0},
        {"N": w.n, "K": w.k, "LDA": a.ld, "PANEL": w.panel_bytes // 4, "FORMAT": FORMATS[w.format], "GROUP": w.group,
         "ACT": ACTS[act], "GATE": _column(mod.gate if mod else None), "TAP": at.tap, "WIDTH": at.width, **blocks},
        warps,
        stages,
    )  # fmt: skip


def gemm(
    x: Tensor,
    w: PackedMatrix,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    act: str = "none",
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    gate: Tensor | None = None,
    norm_group: int = 0,
    eps: float = 1e-5,
    scale: float = 1.0,
    rows: Tensor | None = None,
    ws: Tensor | None = None,
    label: str = "",
    prologue: str | None = None,
    norm_bias: Tensor | None = None,
    pro_act: str = "none",
    modulation: Modulation | None = None,
    taps: Taps | Window | None = None,
) -> None:
    """out[m,:] = act(p(x)[m,:] @ w.T + bias) * scale * modulation.gate[m,:] + residual[m,:].

    x [M,K] f32, or bf16 without a prologue; out [M,N] f32 or bf16; bias [N], norm [K] f32. p, by `prologue`:
        None     the identity; 'rms' where norm is given; 'gated' where gate is given too
        'rms'    RMS norm over K, * norm (if given), + norm_bias (if given), then the scale and shift of modulation
        'layer'  the same behind a layer norm (biased variance)
        'gated'  v = x * silu(gate [M,K]), then RMS norm over groups of `norm_group` channels, * norm
        'glu'    pro_act(x) * gate
    taps: p gathers rows of x [R, C], R = taps.rows(M), without a prologue: a convolution.
    rows (i32 [1]), read at run time, replaces M. ws: workspace_bytes(M, K).
    """
    check, k = Check("gemm", label), w.k
    if taps is None:
        check.takes("x", x, (None, k), "f32|bf16", strided=True)
        m, walk = x.shape[0], Walk(x.ld)
    else:
        check.takes("out", out, (None, w.n), "f32|bf16", strided=True)
        m = out.shape[0]
        check.need(
            min(taps.count, taps.dilation, taps.stride) >= 1 and k % taps.count == 0, f"{taps} do not divide K = {k}"
        )
        if isinstance(taps, Window):
            check.need(taps.width >= 1 and taps.size <= taps.line, f"{taps} has no line of cells")
            check.need((taps.width - 1) * taps.stride + taps.size <= taps.line, f"{taps} leaves its lines")
        check.takes("x", x, (taps.rows(m), k // taps.count), "f32|bf16", strided=isinstance(taps, Taps))
        walk = taps.walk(x.ld, k // taps.count)
    half = x.dtype == "bf16"
    w.fits(check, "w", w.n, k, w.count)
    check.takes("out", out, (m, w.n), "f32|bf16", strided=True)
    check.may_take("residual", residual, (m, w.n), strided=True)
    check.may_take("bias", bias, (w.n,))
    check.may_take("norm", norm, (k,))
    check.may_take("gate", gate, (m, k), strided=True)
    check.may_take("rows", rows, (1,), "i32")
    check.apart("out", out, x=x, gate=gate)
    check.one_of("act", act, ACTS)
    kind = inferred(norm, gate) if prologue is None else prologue
    check.one_of("prologue", kind, PROLOGUES)
    check.one_of("pro_act", pro_act, ACTS)
    check.may_take("norm_bias", norm_bias, (k,))
    if kind == "gated" and (norm is None or gate is None or norm_group < 1 or k % norm_group):
        check.fail(f"a gated prologue needs norm and a norm_group that divides {k}, not {norm_group}")
    if kind == "glu" and gate is None:
        check.fail("prologue 'glu' needs gate")
    if kind not in ("rms", "layer") and (norm_bias is not None or (modulation is not None and modulation.norms)):
        check.fail(f"norm_bias and the scale and shift of a modulation need prologue 'rms' or 'layer', not {kind!r}")
    if taps is not None and kind != "none":
        check.fail(f"taps and prologue {kind!r} exclude each other")
    if half and kind != "none":
        check.fail(f"x in bf16 and prologue {kind!r} exclude each other")
    if modulation is not None:
        modulation.fits(check, m, w.n, k)
    direct = half and w.format == "bf16"
    need = workspace_bytes(m, k, direct=direct)
    if ws is not None:
        check.room(ws, need)
    elif need and m * k * 8 > 65536:
        check.fail(f"M*K = {m * k} needs ws of workspace_bytes(M, K)")
    # The C++ kernel of few rows knows the prologues of decoding; the others run as programs for any number of rows.
    decodes = kind in ("none", "gated") or (kind == "rms" and norm is not None)
    plain = decodes and norm_bias is None and modulation is None and not walk.tap and not half

    def programs() -> list[Program]:
        if direct:  # nothing to round: the product reads x itself
            a = Activations(addressed(x), None, m, k, w.format, w.group, walk.ldx, 0)
            return [matmul_program(a, w, out, rows=rows, bias=bias, act=act, scale=scale, residual=residual,
                                   modulation=modulation, walk=walk)]  # fmt: skip
        if ws is None:
            check.fail(f"{m} rows on a CUDA device need ws of workspace_bytes(M, K)")
        a = Activations.place(ws, 0, m, k, w.format, w.group)
        rstd = part(ws, a.nbytes, "f32", m, k // norm_group) if kind == "gated" else None
        pre = row_programs(x, a, rows=rows, norm=norm, gate=gate, norm_group=norm_group, eps=eps, rstd=rstd,
                           prologue=kind, norm_bias=norm_bias, modulation=modulation, pro_act=pro_act,
                           walk=walk)  # fmt: skip
        return [*pre, matmul_program(a, w, out, rows=rows, bias=bias, act=act, scale=scale, residual=residual,
                                     modulation=modulation)]  # fmt: skip

    mod = modulation
    call("gemm", label, nbytes=w.matrix_bytes, programs=programs if many_rows(m) or not plain else None,
         x=None if half else x, x16=x if half else None, ldx=walk.ldx, w=w.data, out=out, ldo=out.ld,
         residual=residual, ldr=residual.ld if residual else 0,
         bias=bias, pro_w=norm, z=gate,
         ldz=gate.ld if gate else 0, ws=ws, rows=rows, m=m, n=w.n, k=k,
         format=FORMATS[w.format], group=w.group, prologue=PROLOGUES[kind], norm_group=norm_group, eps=eps,
         act=ACTS[act], out_dtype=SRC[out.dtype], scale=scale, pro_b=norm_bias, pro_act=ACTS[pro_act],
         mod=mod.table if mod else None, ldmod=mod.table.ld if mod else 0,
         mod_dtype=SRC[mod.table.dtype] if mod else 0, mod_rows=mod.rows if mod else None,
         mod_scale=_column(mod.scale if mod else None), mod_shift=_column(mod.shift if mod else None),
         mod_gate=_column(mod.gate if mod else None), tap=walk.tap, ldtap=walk.ldtap, width=walk.width,
         ldline=walk.ldline)  # fmt: skip


# ---------------------------------------------------------------------------------------------------- contract


def quantised_activations(x, format: str, group: int):
    """What the kernels make of activations, in fp32 as they do, returned in fp64 (torch [M,K])."""
    import torch

    x = x.float()
    if format == "f32":
        return x.double()
    if format == "bf16":
        return x.bfloat16().double()
    g = x.reshape(x.shape[0], -1, group)
    amax = g.abs().amax(-1, keepdim=True)
    inv = torch.where(amax > 0, 127.0 / amax, torch.zeros_like(amax))
    return ((g * inv).round().double() * (amax / 127.0).double()).reshape(x.shape)


def activate(x, act: str):
    import torch.nn.functional as F

    return {
        "none": lambda v: v,
        "relu2": lambda v: v.relu().square(),
        "silu": F.silu,
        "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
        "gelu": F.gelu,
        "relu": F.relu,
        "quick_gelu": lambda v: v * (1.702 * v).sigmoid(),
    }[act](x)


def rms_norm(x, w, eps: float, group: int = 0):
    """x * rsqrt(mean(x^2) + eps) * w over the last axis or its groups (torch)."""
    g = x.reshape(*x.shape[:-1], -1, group or x.shape[-1])
    return (g * (g.square().mean(-1, keepdim=True) + eps).rsqrt()).reshape(x.shape) * w


def layer_norm(x, eps: float):
    """(x - mean) * rsqrt(var + eps) over the last axis (torch)."""
    return (x - x.mean(-1, keepdim=True)) * (x.var(-1, correction=0, keepdim=True) + eps).rsqrt()


TABLE_ROWS = 5  # of the modulation in cases


def _taps(c: Case) -> Taps | Window | None:
    if c.dims.get("window"):  # cells of a grid of `width` in a line, the border included
        step = c.dims.get("stride", 1)
        return Window(c.window, c.width, (c.width - 1) * step + c.window, step)
    return Taps(c.taps, c.dims.get("dilation", 1), c.dims.get("stride", 1)) if c.dims.get("taps") else None


def _inputs(c: Case, rng: np.random.Generator) -> Arrays:
    f, taps = np.float32, _taps(c)
    shape = (taps.rows(c.m), c.k // taps.count) if taps else (c.m, c.k)
    out = {"x": rng.standard_normal(shape).astype(f), "w": (rng.standard_normal((c.n, c.k)) / c.k**0.5).astype(f)}
    if c.dims.get("half"):
        out["x"] = (out["x"].view(np.uint32) >> 16).astype(np.uint16)
    if c.dims.get("epilogue"):
        out |= {"bias": rng.standard_normal(c.n).astype(f), "residual": rng.standard_normal((c.m, c.n)).astype(f)}
    kind = c.dims.get("prologue", "none")
    if kind in ("rms", "gated", "layer"):
        out["norm"] = (1 + 0.1 * rng.standard_normal(c.k)).astype(f)
    if kind in ("gated", "glu"):
        out["gate"] = rng.standard_normal((c.m, c.k)).astype(f)
    if kind == "layer":
        out["x"] += 3  # a mean worth subtracting
        out["norm_bias"] = rng.standard_normal(c.k).astype(f)
    if "mod" in c.dims:
        out["mod"] = rng.standard_normal((TABLE_ROWS, 2 * c.k + c.n)).astype(f)
        if c.mod == "bf16":
            out["mod"] = (out["mod"].view(np.uint32) >> 16).astype(np.uint16)
        out["mod_rows"] = rng.integers(0, TABLE_ROWS, c.m).astype(np.int32)
    return out


def _modulation(c: Case, a: Arrays):
    """(scale, shift, gate) of every row, fp64; scale and shift are absent behind no norm."""
    import torch

    table = a["mod"] if a["mod"].dtype == np.float32 else (a["mod"].astype(np.uint32) << 16).view(np.float32)
    return torch.from_numpy(table).double()[torch.from_numpy(a["mod_rows"]).long()].split([c.k, c.k, c.n], -1)


def _reference(c: Case, a: Arrays) -> Arrays:
    import torch

    w = torch.from_numpy(PackedMatrix.pack("w", a["w"], c.dtype).unpack()).double()
    t = {k: torch.from_numpy(v).double() for k, v in a.items() if v.dtype == np.float32}
    if "x" not in t:
        t["x"] = torch.from_numpy((a["x"].astype(np.uint32) << 16).view(np.float32)).double()
    x, kind, taps = t["x"], c.dims.get("prologue", "none"), _taps(c)
    if isinstance(taps, Window):
        m, size = torch.arange(c.m), torch.arange(taps.size)
        first = (m // taps.width * taps.line + m % taps.width) * taps.stride
        x = x[(first[:, None, None] + size[:, None] * taps.line + size).flatten(1)].flatten(1)
    elif taps:
        x = torch.cat([x[j * taps.dilation :][: taps.stride * c.m : taps.stride] for j in range(taps.count)], -1)
    if kind == "glu":
        x = activate(x, c.act) * t["gate"]
    elif kind == "gated":
        x = x * torch.nn.functional.silu(t["gate"])
    if kind == "layer":
        x = layer_norm(x, 1e-5) * t["norm"] + t["norm_bias"]
    elif "norm" in a:
        x = rms_norm(x, t["norm"], 1e-5, c.dims.get("norm_group", 0))
    elif kind == "adaptive":
        x = rms_norm(x, 1.0, 1e-5)
    scale, shift, gate = _modulation(c, a) if "mod" in a else (None, None, None)
    if scale is not None and kind in ("layer", "adaptive"):
        x = x * (1 + scale) + shift
    y = quantised_activations(x, c.dtype, group_for(c.k) or 0) @ w.T
    if "bias" in a:
        y = activate(y + t["bias"], c.act) * 0.5
    if gate is not None:
        y = y * gate
    return {"out": (y + t["residual"] if "residual" in a else y).numpy()}


def _call(c: Case, a: Arrays, out: np.ndarray):
    """Packs once; returns the call that writes `out`."""
    t = {k: as_tensor(v) for k, v in a.items()}
    arena = GuardedArena()
    w = PackedMatrix.pack("w", a["w"], c.dtype, arena)
    ws = arena.alloc("ws", (workspace_bytes(c.m, c.k),), "u8")
    dst = as_tensor(out)
    extra = {"bias": t["bias"], "residual": t["residual"], "act": c.act, "scale": 0.5} if "bias" in t else {}
    kind, taps = c.dims.get("prologue", "none"), _taps(c)
    if taps:
        extra["taps"] = taps
    if kind in ("layer", "glu", "adaptive"):
        extra |= {"prologue": "rms" if kind == "adaptive" else kind, "norm_bias": t.get("norm_bias")}
    if kind == "glu":
        extra |= {"pro_act": c.act}
    if "mod" in t:
        norms = kind in ("layer", "adaptive")
        extra["modulation"] = Modulation(t["mod"], t["mod_rows"], 0 if norms else None, c.k if norms else None, 2 * c.k)
    return lambda: gemm(
        t["x"], w, dst, norm=t.get("norm"), gate=t.get("gate"), ws=ws, norm_group=c.dims.get("norm_group", 0), **extra
    )


def _run(c: Case, a: Arrays) -> Arrays:
    out = guarded(c.m, c.n)
    _call(c, a, out)()
    return {"out": out}


def _prepare(c: Case, a: Arrays):
    return _call(c, a, np.zeros((c.m, c.n), np.float32))


def _torch(c: Case, a: Arrays):
    import torch

    dtype = torch.float32 if c.dtype == "f32" else torch.bfloat16
    x, w = torch.from_numpy(a["x"]).to(dtype), torch.from_numpy(a["w"]).to(dtype)
    return lambda: torch.nn.functional.linear(x, w)


def _weight_bytes(c: Case) -> int:
    return _C.gemm_panel_bytes(
        FORMATS[c.dtype], c.k, (group_for(c.k) or 1) if c.dtype in ("i8", "i4") else 1
    ) * math.ceil(c.n / 16)


_F = ("f32", "bf16", "i8", "i4")
register(
    Op(
        name="gemm",
        kernels=("gemm", "gemm_pack", "gemm_peak"),
        cases=[
            *cases(
                "tiny",
                *(
                    {"m": m, "n": n, "k": k, "dtype": f}
                    for f in _F
                    for m, n, k in ((1, 16, 64), (2, 48, 128), (7, 33, 96), (15, 80, 64), (29, 100, 160))
                ),
            ),
            *cases(
                "tiny",
                *(
                    {"m": m, "n": 40, "k": 128, "dtype": f, "prologue": "rms", "epilogue": 1, "act": act}
                    for f in _F
                    for m, act in ((1, "relu2"), (5, "silu"), (16, "gelu"), (20, "gelu_tanh"), (3, "none"))
                ),
            ),
            *cases(
                "tiny",
                *(
                    {"m": m, "n": 24, "k": 192, "dtype": f, "prologue": "gated", "norm_group": g}
                    for f in _F
                    for m, g in ((1, 96), (17, 64), (4, 12))
                ),
            ),
            *cases(
                "tiny",
                *(
                    {
                        "m": m,
                        "n": 48,
                        "k": 64,
                        "dtype": f,
                        "prologue": p,
                        "epilogue": 1,
                        "act": act,
                        "mod": mod,
                        "programs": 1,
                    }
                    for f in _F
                    for m, p, act, mod in (
                        (1, "layer", "gelu_tanh", "f32"),
                        (19, "adaptive", "none", "bf16"),
                        (6, "none", "none", "f32"),
                        (21, "glu", "gelu_tanh", "bf16"),
                    )
                ),
            ),
            *cases(
                "tiny",
                *(
                    {
                        "m": m,
                        "n": 40,
                        "k": k,
                        "dtype": f,
                        "taps": t,
                        "dilation": d,
                        "stride": s,
                        "epilogue": 1,
                        "act": act,
                        "programs": int(d > 1),
                    }
                    for f in _F
                    for m, k, t, d, s, act in (
                        (12, 160, 5, 1, 1, "relu"),
                        (19, 96, 3, 3, 1, "quick_gelu"),
                        (9, 128, 4, 1, 2, "silu"),
                        (3, 192, 3, 9, 1, "relu"),
                    )
                ),
            ),
            *cases(
                "tiny",
                *(
                    {
                        "m": m,
                        "n": 24,
                        "k": s * s * ch,
                        "dtype": f,
                        "window": s,
                        "width": w,
                        "stride": step,
                        "half": int(half),
                        "epilogue": 1,
                        "act": "none",
                        "programs": 1,
                    }
                    for f in _F
                    for half in (f != "f32",)
                    for m, s, ch, w, step in ((20, 3, 32, 5, 1), (6, 3, 64, 3, 2), (35, 2, 16, 7, 1))
                ),
                *({"m": m, "n": 40, "k": 96, "dtype": f, "half": 1, "programs": 1} for f in _F for m in (1, 3, 17)),
                {
                    "m": 12,
                    "n": 40,
                    "k": 160,
                    "dtype": "bf16",
                    "taps": 5,
                    "half": 1,
                    "epilogue": 1,
                    "act": "relu",
                    "programs": 1,
                },
            ),
            *cases(
                "odd",
                {"m": 15, "n": 9, "k": 63, "dtype": "f32", "window": 3, "width": 4, "programs": 1},
                {"m": 15, "n": 9, "k": 63, "dtype": "bf16", "window": 3, "width": 4, "half": 1, "programs": 1},
                {"m": 6, "n": 5, "k": 37, "dtype": "bf16", "half": 1, "programs": 1},
                {"m": 4, "n": 7, "k": 39, "dtype": "f32", "taps": 3, "dilation": 2, "programs": 1},
                {"m": 11, "n": 5, "k": 35, "dtype": "bf16", "taps": 5, "stride": 3},
                {"m": 5, "n": 37, "k": 53, "dtype": "f32", "prologue": "layer", "programs": 1},
                {"m": 17, "n": 21, "k": 101, "dtype": "bf16", "prologue": "adaptive", "mod": "f32", "programs": 1},
                {"m": 3, "n": 9, "k": 45, "dtype": "bf16", "prologue": "glu", "act": "gelu", "programs": 1},
            ),
            *cases(
                "odd",
                *(
                    {"m": m, "n": n, "k": k, "dtype": f}
                    for f in ("f32", "bf16")
                    for m, n, k in ((1, 1, 1), (3, 17, 7), (13, 5, 33), (61, 129, 101))
                ),
            ),
            *cases("odd", {"m": 700, "n": 50, "k": 320, "dtype": "i8"}, {"m": 700, "n": 50, "k": 320, "dtype": "f32"}),
            *cases("real", *({"m": m, "n": 10304, "k": 2688, "dtype": f} for f in _F for m in (1, 24, 512))),
        ],
        inputs=_inputs,
        reference=_reference,
        run=_run,
        prepare=_prepare,
        torch_eager=_torch,
        # Products and sums in fp32 on the same rounded operands; 8-bit codes may flip at a rounding tie.
        tolerance={"f32": 2e-6, "bf16": 2e-4, "i8": 2e-4, "i4": 2e-4},
        bytes=lambda c: _weight_bytes(c) + 4 * c.m * (c.k + c.n),
        flops=lambda c: 2 * c.m * c.n * c.k,
    )
)
