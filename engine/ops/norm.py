"""RMS and layer norm of rows, or none, with weight, bias, modulation and activation (csrc/ops/norm)."""

from __future__ import annotations

import numpy as np

from engine.ops.checks import Check
from engine.ops.dispatch import call
from engine.ops.gemm import ACTS, PROLOGUES, SRC, Modulation, activate, layer_norm, rms_norm
from engine.ops.registry import Arrays, Case, Op, cases, guarded, register
from engine.runtime.arena import Tensor, as_tensor

KINDS = ("none", "rms", "layer")
MAX_ROW = 65536  # a row in bf16 is made in per-thread scratch


def mod_free(modulation: Modulation | None) -> bool:
    """Every row uses the same row of the modulation, or there is none."""
    return modulation is None or modulation.rows is None


def norm(
    x: Tensor,
    out: Tensor,
    *,
    kind: str = "layer",
    add: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    modulation: Modulation | None = None,
    eps: float = 1e-5,
    act: str = "none",
    rows: Tensor | None = None,
    width: int | None = None,
    group: int | None = None,
    label: str = "",
) -> None:
    """out [M,K] = act(the norm of each row of x + add (f32, out may be x), * weight + bias, then the modulation's scale
    and shift). add [M,K], or [K] for every row. kind 'none': the sum as it is, without weight, bias and modulation.
    out f32 or bf16. For norms that more than one product reads; in front of one product a norm is a prologue of gemm.
    group: each run of that many values of a row (the heads of queries and keys) is normalised for itself.

    width: x is a grid of M / width lines; out [(M / width + 2) * (width + 2), K] is that grid in a border of one cell
    of zeros, as a convolution reads it (gemm.Window).
    """
    check = Check("norm", label)
    check.one_of("kind", kind, KINDS)
    check.takes("x", x, (None, None), strided=True)
    m, k = x.shape
    check.need(m > 0 and k > 0, f"x is {m} rows of {k} values; at least one of each is needed")
    cells = m
    if width is not None:
        check.need(1 <= width <= m and m % width == 0, f"{m} rows are not lines of {width} cells")
        cells = (m // width + 2) * (width + 2)
        check.need(rows is None and mod_free(modulation), "a grid takes neither rows nor rows of a modulation")
    check.takes("out", out, (cells, k), "f32|bf16", strided=True)
    if width is not None or out.dtype == "bf16":
        check.need(k <= MAX_ROW, f"rows are {k} wide; {MAX_ROW} is the limit for a grid or bf16")
        check.apart("out", out, x=x)
    check.may_take("add", add, [(m, k), (k,)], strided=True)
    check.one_of("act", act, ACTS)
    check.may_take("weight", weight, (k,))
    check.may_take("bias", bias, (k,))
    check.may_take("rows", rows, (1,), "i32")
    mod = modulation
    if kind == "none" and (weight is not None or bias is not None or mod is not None):
        check.fail("weight, bias and modulation need kind 'rms' or 'layer', not 'none'")
    if group is not None:
        check.need(1 <= group <= k and k % group == 0, f"rows of {k} values do not divide into groups of {group}")
        check.need(kind != "none", "a group needs kind 'rms' or 'layer'")
    if mod is not None:
        mod.fits(check, m, 0, k)
    call("norm", label, nbytes=0, x=x, ldx=x.ld, out=out, ldo=out.ld, w=weight, b=bias,
         mod=mod.table if mod else None, ldmod=mod.table.ld if mod else 0,
         mod_dtype=SRC[mod.table.dtype] if mod else 0, mod_rows=mod.rows if mod else None,
         mod_scale=-1 if mod is None or mod.scale is None else mod.scale,
         mod_shift=-1 if mod is None or mod.shift is None else mod.shift,
         rows=rows, m=m, k=k, kind=PROLOGUES[kind], eps=eps, add=add,
         ldadd=add.ld if add and len(add.shape) == 2 else 0, act=ACTS[act], out_dtype=SRC[out.dtype],
         width=width or 0, group=group or 0)  # fmt: skip


def _inputs(c: Case, rng: np.random.Generator) -> Arrays:
    f = np.float32
    out = {"x": (rng.standard_normal((c.m, c.k)) + 2).astype(f)}
    if c.dims.get("affine"):
        out |= {"weight": rng.standard_normal(c.k).astype(f), "bias": rng.standard_normal(c.k).astype(f)}
    if c.dims.get("add"):
        out["add"] = rng.standard_normal((c.m, c.k) if c.add > 1 else c.k).astype(f)
    if c.dims.get("mod"):
        out |= {
            "mod": rng.standard_normal((5, 2 * c.k)).astype(f),
            "mod_rows": rng.integers(0, 5, c.m).astype(np.int32),
        }
    return out


def _reference(c: Case, a: Arrays) -> Arrays:
    import torch

    t = {k: torch.from_numpy(v).double() for k, v in a.items() if v.dtype == np.float32}
    x = t["x"] + t["add"] if "add" in t else t["x"]
    y = x.unflatten(-1, (-1, c.dims.get("group", c.k)))
    y = {"none": lambda v: v, "layer": lambda v: layer_norm(v, 1e-5), "rms": lambda v: rms_norm(v, 1.0, 1e-5)}[c.norm](
        y
    ).flatten(-2)
    if "weight" in t:
        y = y * t["weight"] + t["bias"]
    if "mod" in t:
        scale, shift = t["mod"][torch.from_numpy(a["mod_rows"]).long()].split(c.k, -1)
        y = y * (1 + scale) + shift
    y = activate(y, c.dims.get("act", "none"))
    if c.dims.get("width"):
        y = torch.nn.functional.pad(y.reshape(-1, c.width, c.k), (0, 0, 1, 1, 1, 1)).flatten(0, 1)
    return {"out": y.numpy()}


def _shape(c: Case) -> tuple[int, int]:
    w = c.dims.get("width")
    return ((c.m // w + 2) * (w + 2) if w else c.m, c.k)


def _call(c: Case, a: Arrays, out: np.ndarray):
    t = {k: as_tensor(v) for k, v in a.items()}
    mod = Modulation(t["mod"], t["mod_rows"], 0, c.k) if "mod" in t else None
    dst = as_tensor(out)
    return lambda: norm(
        t["x"],
        dst,
        kind=c.norm,
        add=t.get("add"),
        weight=t.get("weight"),
        bias=t.get("bias"),
        modulation=mod,
        act=c.dims.get("act", "none"),
        width=c.dims.get("width"),
        group=c.dims.get("group"),
    )


def _run(c: Case, a: Arrays) -> Arrays:
    out = guarded(*_shape(c), dtype=c.dims.get("dtype", "f32"))
    _call(c, a, out)()
    return {"out": (out.astype(np.uint32) << 16).view(np.float32) if out.dtype == np.uint16 else out}


def _torch(c: Case, a: Arrays):
    import torch

    x, size = torch.from_numpy(a["x"]), (c.dims.get("group", c.k),)
    call = torch.nn.functional.rms_norm if c.norm == "rms" else torch.nn.functional.layer_norm
    return lambda: call(x.unflatten(-1, (-1, *size)), size)


register(
    Op(
        name="norm",
        cases=[
            *cases("tiny", *({"m": m, "k": k, "norm": n, **more} for n in KINDS[1:] for m, k, more in (
                (1, 64, {"affine": 1}), (5, 128, {"mod": 1}), (33, 48, {"add": 2}),
                (2, 1024, {"affine": 1, "mod": 1}), (4, 80, {"affine": 1, "act": "silu"}))),
                {"m": 33, "k": 48, "norm": "none", "add": 2},
                {"m": 6, "k": 96, "norm": "none", "add": 1, "act": "silu"},
                {"m": 2, "k": 64, "norm": "layer", "add": 1, "affine": 1, "act": "relu"},
                {"m": 12, "k": 32, "norm": "rms", "affine": 1, "act": "silu", "width": 4},
                {"m": 7, "k": 48, "norm": "none", "width": 7},
                {"m": 6, "k": 96, "norm": "rms", "affine": 1, "act": "silu", "width": 2, "dtype": "bf16"},
                {"m": 9, "k": 64, "norm": "layer", "mod": 1, "dtype": "bf16"},
                {"m": 5, "k": 96, "norm": "rms", "affine": 1, "group": 32},
                {"m": 7, "k": 160, "norm": "layer", "mod": 1, "group": 40},
                {"m": 4, "k": 64, "norm": "rms", "affine": 1, "group": 16, "width": 2, "dtype": "bf16"}),
            *cases("odd", *({"m": 3, "k": k, "norm": n, "affine": 1, "mod": 1} for n in KINDS[1:] for k in (1, 7, 301)),
                   *({"m": 3, "k": k, "norm": "none", "act": a}
                     for k, a in ((7, "relu"), (301, "quick_gelu"), (5, "none"))),
                   {"m": 5, "k": 19, "norm": "rms", "width": 1, "dtype": "bf16"},
                   {"m": 3, "k": 37, "norm": "none", "add": 1, "dtype": "bf16"},
                   {"m": 3, "k": 21, "norm": "rms", "affine": 1, "group": 7}),
            *cases("real", {"m": 114, "k": 1024, "norm": "layer", "affine": 1},
                   {"m": 196, "k": 768, "norm": "layer", "affine": 1, "act": "silu"},
                   {"m": 1590, "k": 4096, "norm": "rms", "affine": 1, "group": 128}),
        ],
        inputs=_inputs,
        reference=_reference,
        run=_run,
        prepare=lambda c, a: _call(c, a, np.zeros(_shape(c), np.float32)),
        torch_eager=_torch,
        tolerance={"f32": 1e-6, "bf16": 4e-3},
        bytes=lambda c: 8 * c.m * c.k,
        flops=lambda c: 8 * c.m * c.k,
        absent={"triton": "a row is one reduction: it needs no tiles"},
    )
)  # fmt: skip
