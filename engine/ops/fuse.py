"""Two streams of tokens blended by a gate per token, and attention to two keys as a gate per head (csrc/ops/fuse)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.errors import InputError
from engine.ops.checks import Check
from engine.ops.dispatch import call, many_rows
from engine.ops.gemm import FORMATS, SRC, PackedMatrix, gemm, layer_norm, part, power_of_two, rms_norm, workspace_bytes
from engine.ops.registry import Arrays, Case, GuardedArena, Op, cases, register
from engine.runtime.arena import Arena, Tensor, as_tensor
from engine.runtime.program import Program

BLENDS = {"normed": 0, "raw": 1, "residual": 2}
MAX_D = 6144  # two rows lie in a block's shared memory
# BM, BN, BK; warps; stages: of a product whose rows are made in registers, by the format of the weights.
PRODUCT_ROWS = 40  # of the matrix that cases multiply with: not whole panels
PRODUCT_TILES = {"f32": ({"BM": 32, "BN": 32, "BK": 16}, 4, 1), "bf16": ({"BM": 64, "BN": 64, "BK": 32}, 4, 2)}


@dataclass(frozen=True)
class Gate:
    """Weights of a fusion: both layer norms f32 [D], and the gate behind them, folded.

    u1, u2 = gate weight * norm weight, c = gate weight . norm biases + gate bias.
    """

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    u1: Tensor
    u2: Tensor
    c: float
    eps: float = 1e-5

    @staticmethod
    def fold(
        arena: Arena, name: str, norms: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], weight: np.ndarray,
        bias: float, eps: float = 1e-5,
    ) -> Gate:  # fmt: skip
        """norms: (weight, bias) of the first and of the second stream, f32 [D]; gate: weight [2D], bias."""
        w1, b1, w2, b2 = (np.asarray(n, np.float64) for n in norms)
        d = w1.size
        if any(n.shape != (d,) for n in (w1, b1, w2, b2)) or np.shape(weight) != (2 * d,):
            raise InputError(f"gate {name!r}: norms must be [D] and the gate's weight [2D], with one D")
        one, two = np.asarray(weight, np.float64).reshape(2, d)
        parts = {"w1": w1, "b1": b1, "w2": w2, "b2": b2, "u1": one * w1, "u2": two * w2}
        made = {}
        for vector, v in parts.items():
            made[vector] = arena.alloc(f"{name}.{vector}", (d,), "f32", "weights")
            if not arena.dry:
                made[vector].write(v.astype(np.float32))
        return Gate(**made, c=float(one @ b1 + two @ b2 + bias), eps=eps)

    @property
    def d(self) -> int:
        return self.w1.shape[0]


@dataclass(frozen=True)
class Code:
    """Codes that are added to fused rows: voxels i32 [M, 3] (trusted) choose one row of each table [*, D // 3], f32 or
    bf16, which lie side by side; the last D % 3 channels get nothing."""

    voxels: Tensor
    x: Tensor
    y: Tensor
    z: Tensor


def _streams_fit(
    check: Check, s: Tensor, g: Tensor, gate: Gate, blend: str, force: float | None, code: Code | None
) -> tuple[int, int]:
    """(M, D) of two streams that a gate and codes go with; else InputError."""
    d = gate.d
    check.need(1 <= d <= MAX_D, f"rows are {d} wide; 1 to {MAX_D} are possible")
    check.takes("s", s, (None, d), "f32|bf16", strided=True)
    m = s.shape[0]
    check.need(m >= 1, "s has no rows")
    check.takes("g", g, (m, d), s.dtype, strided=True)
    for name in ("w1", "b1", "w2", "b2", "u1", "u2"):
        check.takes(f"gate.{name}", getattr(gate, name), (d,))
    check.one_of("blend", blend, BLENDS)
    check.need(force is None or 0 <= force <= 1, f"force={force} is not in [0, 1]")
    if code is not None:
        check.takes("code.voxels", code.voxels, (m, 3), "i32")
        for axis in "xyz":
            check.takes(f"code.{axis}", getattr(code, axis), (None, d // 3), code.x.dtype)
        check.one_of("code.x.dtype", code.x.dtype, ("f32", "bf16"))
    return m, d


def gated_fuse(
    s: Tensor,
    g: Tensor,
    gate: Gate,
    out: Tensor,
    *,
    blend: str = "normed",
    rho: float = 1.0,
    force: float | None = None,
    code: Code | None = None,
    newline: Tensor | None = None,
    period: int = 0,
    order: Tensor | None = None,
    normed: Tensor | None = None,
    norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    gates: Tensor | None = None,
    label: str = "",
) -> None:
    """out = the blend of s and g [M, D] (both f32 or both bf16) by a gate per row, sigmoid(w . [LN1(s), LN2(g)] + b).

    blend: 'normed' gate * LN1(s) + (1 - gate) * LN2(g); 'raw' the same of s and g; 'residual' s + rho * (1 - gate) *
    (g - s). force in [0, 1] replaces the gate. Then code is added. newline f32 [D]: a row of it follows every `period`
    rows, so that out [M + M / period, D] has M / period lines. order i32: row r, newlines counted, goes to row order[r]
    of out and normed (trusted), which may then be longer. normed = the RMS norm of out, times norm [D]. gates f32 [M]:
    the gates. out and normed both f32 or both bf16; sums in fp32.
    """
    check = Check("gated_fuse", label)
    m, d = _streams_fit(check, s, g, gate, blend, force, code)
    check.need((newline is None) == (period == 0), "newline and period belong together")
    check.may_take("newline", newline, (d,))
    check.need(not period or (period > 0 and m % period == 0), f"{m} rows are not lines of {period}")
    rows = m + m // period if period else m
    check.may_take("order", order, (rows,), "i32")
    check.takes("out", out, (rows if order is None else None, d), "f32|bf16", strided=True)
    check.need((normed is None) == (norm is None), "normed and norm belong together")
    check.may_take("normed", normed, (out.shape[0], d), out.dtype, strided=True)
    check.may_take("norm", norm, (d,))
    check.may_take("gates", gates, (m,))
    check.apart("out", out, s=s, g=g, normed=normed)
    if normed is not None:
        check.apart("normed", normed, s=s, g=g)
    call("gated_fuse", label, nbytes=s.nbytes + g.nbytes + out.nbytes, s=s, g=g, in_dtype=SRC[s.dtype], lds=s.ld,
         ldg=g.ld, w1=gate.w1, b1=gate.b1, w2=gate.w2, b2=gate.b2, u1=gate.u1, u2=gate.u2, c=gate.c, eps=gate.eps,
         blend=BLENDS[blend], rho=rho, force=-1.0 if force is None else force, voxels=code.voxels if code else None,
         px=code.x if code else None, py=code.y if code else None, pz=code.z if code else None,
         table_dtype=SRC[code.x.dtype] if code else 0, newline=newline, period=period, order=order, out=out,
         out_dtype=SRC[out.dtype], ldo=out.ld, normed=normed,
         ldn=normed.ld if normed else 0, norm_w=norm, norm_eps=norm_eps, gates=gates, m=m, d=d)  # fmt: skip


def _lines(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def product_bytes(m: int, d: int) -> int:
    """Workspace of `fuse_product`."""
    return 2 * _lines(4 * m * d) + workspace_bytes(m, d)


def fuse_product(
    s: Tensor, g: Tensor, gate: Gate, w: PackedMatrix, out: Tensor, *, norm: Tensor, blend: str = "normed",
    rho: float = 1.0, force: float | None = None, code: Code | None = None, norm_eps: float = 1e-6,
    bias: Tensor | None = None, ws: Tensor, label: str = "",
) -> None:  # fmt: skip
    """out f32 [M, N] = (the RMS norm of what `gated_fuse` makes of s and g [M, D]) * norm [D] @ w.T + bias [N].

    Many rows on a GPU are fused while they are multiplied and never stored; else this is `gated_fuse`, then `gemm`. w:
    f32 or bf16. ws: product_bytes(M, D). The other arguments as `gated_fuse` has them.
    """
    check = Check("fuse_product", label)
    m, d = _streams_fit(check, s, g, gate, blend, force, code)
    w.fits(check, "w", w.n, d, 1)
    check.one_of("the format of w", w.format, ("f32", "bf16"))
    check.takes("out", out, (m, w.n), strided=True)
    check.may_take("bias", bias, (w.n,))
    check.takes("norm", norm, (d,))
    check.apart("out", out, s=s, g=g)
    check.room(ws, product_bytes(m, d))
    if not many_rows(m):
        size = _lines(4 * m * d)
        rows, normed, at = part(ws, 0, "f32", m, d), part(ws, size, "f32", m, d), 2 * size
        gated_fuse(s, g, gate, rows, blend=blend, rho=rho, force=force, code=code, normed=normed, norm=norm,
                   norm_eps=norm_eps, label=f"{label}/fuse")  # fmt: skip
        gemm(normed, w, out, bias=bias, ws=part(ws, at, "u8", ws.nbytes - at), label=label)
        return
    for name, x in (("s", s), ("g", g)):
        check.need(x.shape[0] * x.ld < 1 << 31, f"{name} reaches beyond what programs address")
    w.addressable()
    scalars = part(ws, 0, "f32", m, 6)
    where = {"voxels": code.voxels if code else None, "px": code.x if code else None, "py": code.y if code else None,
             "pz": code.z if code else None}  # fmt: skip
    ends = {"w1": gate.w1, "b1": gate.b1, "w2": gate.w2, "b2": gate.b2}
    blocks, warps, stages = PRODUCT_TILES[w.format]

    def programs() -> list[Program]:
        return [
            Program(
                "fuse.scalars",
                (m, 1, 1),
                {"s": s, "g": g, **ends, "u1": gate.u1, "u2": gate.u2, **where, "out": scalars, "lds": s.ld,
                 "ldg": g.ld, "c": float(gate.c), "eps": float(gate.eps), "rho": float(rho),
                 "force": -1.0 if force is None else float(force), "norm_eps": float(norm_eps)},
                {"D": d, "BLEND": BLENDS[blend], "BLOCK": min(1024, power_of_two(d))},
            ),
            Program(
                "fuse.matmul",
                (-(-m // blocks["BM"]), -(-w.n // blocks["BN"]), 1),
                {"s": s, "g": g, **ends, **where, "of_row": scalars, "norm": norm, "w": w.data, "bias": bias,
                 "out": out, "m": m, "lds": s.ld, "ldg": g.ld, "ldo": out.ld},
                {"D": d, "N": w.n, "PANEL": w.panel_bytes // 4, "FORMAT": FORMATS[w.format],
                 "NORMED": int(blend == "normed"), **blocks},
                warps,
                stages,
            ),
        ]  # fmt: skip

    call("gated_fuse", label, nbytes=w.matrix_bytes, programs=programs)


def gate_heads(
    q: Tensor, dk: Tensor, u: Tensor, base: Tensor, x: Tensor, out: Tensor, *, bias: float, eps: float = 1e-6,
    label: str = "",
) -> None:  # fmt: skip
    """out [M, D] = x + base + sum over heads h of p_h * u[h], p_h = sigmoid(rms(q)[head h] . dk[head h] - bias).

    Attention over two keys, one of them seen e^bias times as often as the other, with an RMS norm over the whole
    query: dk [D] is the difference of both keys times norm weight and scale; u [H, D] that of both values, head by head
    through the output matrix; base [D] what the other key alone gives. q, x, out [M, D] f32; out may be x.
    """
    check = Check("gate_heads", label)
    check.takes("u", u, (None, None))
    heads, d = u.shape
    check.need(1 <= heads <= MAX_D and d >= heads and d % heads == 0, f"{heads} heads do not divide {d} channels")
    check.takes("q", q, (None, d), strided=True)
    m = q.shape[0]
    check.need(m >= 1, "q has no rows")
    check.takes("dk", dk, (d,))
    check.takes("base", base, (d,))
    check.takes("x", x, (m, d), strided=True)
    check.takes("out", out, (m, d), strided=True)
    check.apart("out", out, q=q)
    call("gate_heads", label, nbytes=q.nbytes + 2 * x.nbytes, q=q, ldq=q.ld, dk=dk, u=u, base=base, x=x, ldx=x.ld,
         out=out, ldo=out.ld, bias=bias, eps=eps, m=m, d=d, heads=heads)  # fmt: skip


# ---------------------------------------------------------------------------------------------------- contract
def _half(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def _wide(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x


def _inputs(c: Case, rng: np.random.Generator) -> Arrays:
    f = np.float32

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(f)

    if "heads" in c.dims:
        out = {"q": normal(c.m, c.d), "dk": normal(c.d), "u": normal(c.heads, c.d), "base": normal(c.d),
               "x": normal(c.m, c.d)}  # fmt: skip
        return out | _product_inputs(c, normal)
    out = {"s": normal(c.m, c.d) + 1, "g": 3 * normal(c.m, c.d) - 2, "weight": normal(2 * c.d) / c.d**0.5,
           "bias": normal(1)}  # fmt: skip
    out |= {n: normal(c.d) + (n[0] == "w") for n in ("w1", "b1", "w2", "b2")}
    if c.dims.get("streams") == "bf16":
        out |= {n: _half(out[n]) for n in "sg"}
    if c.dims.get("code"):
        out |= {f"p{a}": _half(normal(n, c.d // 3)) if c.dims.get("streams") == "bf16" else normal(n, c.d // 3)
                for a, n in (("x", 7), ("z", 5))}  # fmt: skip
        out["voxels"] = rng.integers(0, 5, (c.m, 3)).astype(np.int32)
    if c.dims.get("period"):
        out["newline"] = normal(c.d)
    if c.dims.get("order"):
        out["order"] = rng.permutation(_rows(c)).astype(np.int32)
    if c.dims.get("next"):
        out["norm"] = normal(c.d)
    return out if c.kind == "real" else out | _product_inputs(c, normal)


def _product_inputs(c: Case, normal: Any) -> Arrays:
    """Of the product behind a fusion, which every small case also makes."""
    w = normal(PRODUCT_ROWS, c.d) / c.d**0.5
    return {"qkv": _wide(_half(w)) if c.dtype == "bf16" else w, "qkv_bias": normal(PRODUCT_ROWS),
            "qkv_norm": normal(c.d)}  # fmt: skip


def _streams(c: Case, a: Arrays) -> Arrays:
    """What a product fuses: the streams of the case; where it has none, what there is of their shapes."""
    if "heads" not in c.dims:
        return a
    dk, base = a["dk"], a["base"]
    weight = np.concatenate([dk, base]) / c.d**0.5
    return {"s": a["x"], "g": a["q"], "w1": dk, "b1": base, "w2": base, "b2": dk, "weight": weight,
            "bias": np.full(1, 0.3, np.float32)}  # fmt: skip


def _rows(c: Case) -> int:
    period = c.dims.get("period", 0)
    return c.m + c.m // period if period else c.m


def _fused(c: Case, a: Arrays) -> Any:
    """(fused rows, gates [M, 1]) in fp64, codes added."""
    import torch

    t = {k: torch.from_numpy(_wide(v)).double() for k, v in a.items() if v.dtype != np.int32}
    s, g = t["s"], t["g"]
    one, two = layer_norm(s, 1e-5) * t["w1"] + t["b1"], layer_norm(g, 1e-5) * t["w2"] + t["b2"]
    gate = (torch.cat([one, two], -1) @ t["weight"] + t["bias"]).sigmoid()[:, None]
    gate = torch.full_like(gate, c.force) if "force" in c.dims else gate
    blend = c.dims.get("blend", "normed")
    o = gate * one + (1 - gate) * two if blend == "normed" else gate * s + (1 - gate) * g
    if blend == "residual":
        o = s + 0.3 * (o - s)
    if "voxels" in a:
        v, n = torch.from_numpy(a["voxels"]).long(), c.d // 3
        code = torch.cat([t["px"][v[:, 0]], t["px"][v[:, 1]], t["pz"][v[:, 2]]], -1)
        o = o + torch.nn.functional.pad(code, (0, c.d - 3 * n))
    return o, gate


def _reference(c: Case, a: Arrays) -> Arrays:
    import torch

    t = {k: torch.from_numpy(_wide(v)).double() for k, v in a.items() if v.dtype != np.int32}
    more = {}
    if "qkv" in a:
        rows = rms_norm(_fused(c, _streams(c, a))[0], t["qkv_norm"], 1e-6)
        more["product"] = (rows @ t["qkv"].T + t["qkv_bias"]).numpy()
    if "heads" in c.dims:
        q = rms_norm(t["q"], 1.0, 1e-6).reshape(c.m, c.heads, -1)
        p = ((q * t["dk"].reshape(c.heads, -1)).sum(-1) - 1.5).sigmoid()
        return {"out": (t["x"] + t["base"] + p @ t["u"]).numpy()} | more
    o, gate = _fused(c, a)
    if "newline" in a:
        lines = o.reshape(-1, c.period, c.d)
        o = torch.cat([lines, t["newline"].expand(len(lines), 1, c.d)], 1).flatten(0, 1)
    if "order" in a:
        placed = torch.empty_like(o)
        placed[torch.from_numpy(a["order"]).long()] = o
        o = placed
    out = {"out": o.numpy(), "gates": gate[:, 0].numpy()} | more
    return out | ({"normed": rms_norm(o, t["norm"], 1e-6).numpy()} if "norm" in a else {})


def _call(c: Case, a: Arrays, whole: bool = True) -> tuple[Any, dict[str, Tensor]]:
    """whole: with the product behind a fusion."""
    arena, given = GuardedArena(), _streams(c, a)
    t = {k: as_tensor(v) for k, v in (a | given).items() if k not in ("weight", "bias")}
    norms = (given["w1"], given["b1"], given["w2"], given["b2"])
    gate = Gate.fold(Arena(), "gate", norms, given["weight"], float(given["bias"][0]))
    code = Code(t["voxels"], t["px"], t["px"], t["pz"]) if "voxels" in t else None
    made = {}
    if "qkv" in a and whole:
        made["product"] = arena.alloc("product", (c.m, PRODUCT_ROWS), "f32", "io")
        w, ws = PackedMatrix.pack("qkv", a["qkv"], c.dtype), arena.alloc("ws", (product_bytes(c.m, c.d),), "u8")

    def product() -> None:
        if made:
            fuse_product(t["s"], t["g"], gate, w, made["product"], norm=t["qkv_norm"], ws=ws, bias=t["qkv_bias"],
                         blend=c.dims.get("blend", "normed"), rho=0.3, force=c.dims.get("force"),
                         code=code)  # fmt: skip

    if "heads" in c.dims:
        out = {"out": arena.alloc("out", (c.m, c.d), "f32", "io")} | made

        def heads() -> None:
            gate_heads(t["q"], t["dk"], t["u"], t["base"], t["x"], out["out"], bias=1.5)
            product()

        return heads, out
    dtype = c.dtype
    out = {"out": arena.alloc("out", (_rows(c), c.d), dtype, "io"), "gates": arena.alloc("gates", (c.m,), "f32", "io")}
    if "norm" in a:
        out["normed"] = arena.alloc("normed", (_rows(c), c.d), dtype, "io")
    out |= made

    def run() -> None:
        gated_fuse(t["s"], t["g"], gate, out["out"], blend=c.dims.get("blend", "normed"), rho=0.3,
                   force=c.dims.get("force"), code=code, newline=t.get("newline"), period=c.dims.get("period", 0),
                   order=t.get("order"), normed=out.get("normed"), norm=t.get("norm"), gates=out["gates"])  # fmt: skip
        product()

    return run, out


def _run(c: Case, a: Arrays) -> Arrays:
    run, out = _call(c, a)
    run()
    return {name: _wide(tensor.read()) for name, tensor in out.items()}


def _torch(c: Case, a: Arrays) -> Any:
    """The chain that eager code runs, in the dtype of the streams."""
    import torch
    import torch.nn.functional as F

    if "heads" in c.dims:
        return lambda: _reference(c, a)
    dtype = torch.bfloat16 if c.dims.get("streams") == "bf16" else torch.float32
    t = {k: torch.from_numpy(_wide(v)).to(dtype) for k, v in a.items() if v.dtype != np.int32}
    voxels, n = (torch.from_numpy(a["voxels"]).long() if "voxels" in a else None), c.d // 3

    def chain() -> Any:
        one = F.layer_norm(t["s"], (c.d,), t["w1"], t["b1"])
        two = F.layer_norm(t["g"], (c.d,), t["w2"], t["b2"])
        gate = torch.sigmoid(F.linear(torch.cat([one, two], -1), t["weight"][None], t["bias"]))
        o = gate * one + (1 - gate) * two
        if voxels is not None:
            code = torch.cat([t["px"][voxels[:, 0]], t["px"][voxels[:, 1]], t["pz"][voxels[:, 2]]], -1)
            o = o + F.pad(code, (0, c.d - 3 * n))
        if "newline" in t:
            lines = o.reshape(-1, c.period, c.d)
            o = torch.cat([lines, t["newline"].expand(len(lines), 1, c.d)], 1).flatten(0, 1)
        return F.rms_norm(o, (c.d,), t["norm"], 1e-6) if "norm" in t else o

    return chain


def _bytes(c: Case) -> int:
    if "heads" in c.dims:
        return 4 * c.d * (3 * c.m + c.heads)
    outs = _rows(c) * (1 + c.dims.get("next", 0)) * (2 if c.dtype == "bf16" else 4)
    return c.d * (2 * c.m * (2 if c.dims.get("streams") == "bf16" else 4) + outs)


register(
    Op(
        name="fuse",
        kernels=("gated_fuse", "gate_heads"),
        cases=[
            *cases(
                "tiny",
                *(
                    {"m": m, "d": d, "streams": f, "dtype": "f32", "blend": blend, **more}
                    for f in ("f32", "bf16")
                    for m, d, blend, more in (
                        (1, 64, "normed", {}),
                        (12, 96, "normed", {"code": 1, "period": 4, "next": 1}),
                        (6, 96, "raw", {"period": 3, "order": 1}),
                        (9, 128, "residual", {"next": 1, "order": 1}),
                        (5, 80, "normed", {"force": 0.25, "code": 1}),
                    )
                ),
                {"m": 8, "d": 96, "streams": "bf16", "dtype": "bf16", "code": 1, "period": 4, "next": 1},
                {"m": 70, "d": 64, "streams": "bf16", "dtype": "bf16", "code": 1},
                {"m": 5, "d": 64, "heads": 4, "dtype": "f32"},
                {"m": 9, "d": 96, "heads": 12, "dtype": "f32"},
            ),
            *cases(
                "odd",
                {"m": 3, "d": 37, "dtype": "f32", "code": 1, "period": 1, "next": 1},
                {"m": 2, "d": 1, "streams": "bf16", "dtype": "f32", "blend": "raw"},
                {"m": 7, "d": 301, "streams": "bf16", "dtype": "f32", "blend": "residual", "next": 1},
                {"m": 3, "d": 51, "dtype": "bf16", "blend": "residual"},
                {"m": 3, "d": 19, "heads": 1, "dtype": "f32"},
                {"m": 6, "d": 51, "heads": 17, "dtype": "f32"},
            ),
            *cases(
                "real",
                {"m": 6272, "d": 3584, "streams": "bf16", "dtype": "bf16", "code": 1, "period": 14, "next": 1},
                {"m": 9120, "d": 3584, "streams": "bf16", "dtype": "bf16", "blend": "residual"},
                {"m": 1560, "d": 1536, "heads": 12, "dtype": "f32"},
            ),
        ],
        inputs=_inputs,
        reference=_reference,
        run=_run,
        prepare=lambda c, a: _call(c, a, whole=False)[0],
        torch_eager=_torch,
        tolerance={"f32": 2e-6, "bf16": 4e-3},
        bytes=_bytes,
        flops=lambda c: 2 * c.m * c.d * (c.heads + 2) if "heads" in c.dims else 20 * c.m * c.d,
        absent={},
    )
)
