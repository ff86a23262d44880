"""RMS and layer norm of rows, with weight, bias and modulation (csrc/ops/norm)."""

from __future__ import annotations

import numpy as np

from engine.ops.checks import Check
from engine.ops.dispatch import call
from engine.ops.gemm import PROLOGUES, SRC, Modulation, layer_norm, rms_norm
from engine.ops.registry import Arrays, Case, Op, cases, guarded, register
from engine.runtime.arena import Tensor, as_tensor

KINDS = ("rms", "layer")


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
    rows: Tensor | None = None,
    label: str = "",
) -> None:
    """out [M,K] = the norm of each row of x + add [M,K] (f32, out may be x), * weight + bias, then the modulation's
    scale and shift. For norms that more than one product reads; in front of one product a norm is a prologue of gemm.
    """
    check = Check("norm", label)
    check.one_of("kind", kind, KINDS)
    check.takes("x", x, (None, None), strided=True)
    m, k = x.shape
    check.need(m > 0 and k > 0, f"x is {m} rows of {k} values; at least one of each is needed")
    check.takes("out", out, (m, k), strided=True)
    check.may_take("add", add, (m, k), strided=True)
    check.may_take("weight", weight, (k,))
    check.may_take("bias", bias, (k,))
    check.may_take("rows", rows, (1,), "i32")
    mod = modulation
    if mod is not None:
        mod.fits(check, m, 0, k)
    call("norm", label, nbytes=0, x=x, ldx=x.ld, out=out, ldo=out.ld, w=weight, b=bias,
         mod=mod.table if mod else None, ldmod=mod.table.ld if mod else 0,
         mod_dtype=SRC[mod.table.dtype] if mod else 0, mod_rows=mod.rows if mod else None,
         mod_scale=-1 if mod is None or mod.scale is None else mod.scale,
         mod_shift=-1 if mod is None or mod.shift is None else mod.shift,
         rows=rows, m=m, k=k, kind=PROLOGUES[kind], eps=eps, add=add,
         ldadd=add.ld if add else 0)  # fmt: skip


def _inputs(c: Case, rng: np.random.Generator) -> Arrays:
    f = np.float32
    out = {"x": (rng.standard_normal((c.m, c.k)) + 2).astype(f)}
    if c.dims.get("affine"):
        out |= {"weight": rng.standard_normal(c.k).astype(f), "bias": rng.standard_normal(c.k).astype(f)}
    if c.dims.get("add"):
        out["add"] = rng.standard_normal((c.m, c.k)).astype(f)
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
    y = layer_norm(x, 1e-5) if c.norm == "layer" else rms_norm(x, 1.0, 1e-5)
    if "weight" in t:
        y = y * t["weight"] + t["bias"]
    if "mod" in t:
        scale, shift = t["mod"][torch.from_numpy(a["mod_rows"]).long()].split(c.k, -1)
        y = y * (1 + scale) + shift
    return {"out": y.numpy()}


def _call(c: Case, a: Arrays, out: np.ndarray):
    t = {k: as_tensor(v) for k, v in a.items()}
    mod = Modulation(t["mod"], t["mod_rows"], 0, c.k) if "mod" in t else None
    return lambda: norm(
        t["x"],
        as_tensor(out),
        kind=c.norm,
        add=t.get("add"),
        weight=t.get("weight"),
        bias=t.get("bias"),
        modulation=mod,
    )


def _run(c: Case, a: Arrays) -> Arrays:
    out = guarded(c.m, c.k)
    _call(c, a, out)()
    return {"out": out}


def _torch(c: Case, a: Arrays):
    import torch

    x = torch.from_numpy(a["x"])
    return lambda: torch.nn.functional.layer_norm(x, (c.k,))


register(
    Op(
        name="norm",
        cases=[
            *cases("tiny", *({"m": m, "k": k, "norm": n, **more} for n in KINDS for m, k, more in (
                (1, 64, {"affine": 1}), (5, 128, {"mod": 1}), (33, 48, {"add": 1}),
                (2, 1024, {"affine": 1, "mod": 1})))),
            *cases("odd", *({"m": 3, "k": k, "norm": n, "affine": 1, "mod": 1} for n in KINDS for k in (1, 7, 301))),
            *cases("real", {"m": 114, "k": 1024, "norm": "layer", "affine": 1}),
        ],
        inputs=_inputs,
        reference=_reference,
        run=_run,
        prepare=lambda c, a: _call(c, a, np.zeros((c.m, c.k), np.float32)),
        torch_eager=_torch,
        tolerance={"f32": 1e-6},
        bytes=lambda c: 8 * c.m * c.k,
        flops=lambda c: 8 * c.m * c.k,
        absent={"triton": "a row is one reduction: it needs no tiles"},
    )
)  # fmt: skip
