"""Rows of a table by ids that live in memory, and means of rows (csrc/ops/gather)."""

from __future__ import annotations

import numpy as np

from engine.ops.checks import Check
from engine.ops.dispatch import call
from engine.ops.gemm import SRC
from engine.ops.registry import Arrays, Case, Op, cases, guarded, register
from engine.runtime.arena import Tensor, as_tensor


def gather(table: Tensor, ids: Tensor, out: Tensor, *, rows: Tensor | None = None, label: str = "") -> None:
    """out[t,:] = table[ids[t],:]; table [V,D] f32 or bf16, ids i32 [T], out f32. Ids outside [0,V) give zeros."""
    check = Check("gather", label)
    check.takes("table", table, (None, None), "f32|bf16")
    check.takes("out", out, (None, table.shape[1]), strided=True)
    check.takes("ids", ids, (out.shape[0],), "i32", longer=True)
    check.may_take("rows", rows, (1,), "i32")
    call("gather", label, nbytes=out.nbytes, table=table, table_dtype=SRC[table.dtype], vocab=table.shape[0],
         d=table.shape[1], ids=ids, out=out, ldo=out.ld, rows=rows,
         m=out.shape[0])  # fmt: skip


def gather_mean(x: Tensor, out: Tensor, *, label: str = "") -> None:
    """out [B,D] = the mean of each of B equal runs of rows of x [B*n, D]; f32."""
    check = Check("gather_mean", label)
    check.takes("out", out, (None, None), strided=True)
    batch, d = out.shape
    check.takes("x", x, (None, d), strided=True)
    check.need(0 < batch <= x.shape[0] and x.shape[0] % batch == 0, f"{x.shape[0]} rows are not {batch} equal runs")
    call("gather_mean", label, nbytes=x.nbytes, x=x, ldx=x.ld, out=out, ldo=out.ld, batch=batch,
         n=x.shape[0] // batch, d=d)  # fmt: skip


def _inputs(c: Case, rng: np.random.Generator) -> Arrays:
    if "mean" in c.dims:
        return {"x": rng.standard_normal((c.mean * c.n, c.d)).astype(np.float32)}
    table = rng.standard_normal((c.v, c.d)).astype(np.float32)
    if c.dtype == "bf16":
        table = (table.view(np.uint32) >> 16).astype(np.uint16)
    ids = rng.integers(0, c.v, c.t).astype(np.int32)
    if c.kind == "odd":
        ids[0] = -1
        ids[-1] = c.v
    return {"table": table, "ids": ids}


def _reference(c: Case, a: Arrays) -> Arrays:
    import torch

    if "mean" in c.dims:
        return {"out": torch.from_numpy(a["x"]).double().reshape(c.mean, c.n, c.d).mean(1).numpy()}
    table = a["table"] if c.dtype == "f32" else (a["table"].astype(np.uint32) << 16).view(np.float32)
    padded = torch.cat([torch.from_numpy(table), torch.zeros(1, c.d)])
    ids = torch.from_numpy(a["ids"]).long()
    return {"out": padded[torch.where((ids < 0) | (ids >= c.v), c.v, ids)].numpy()}


def _call(c: Case, a: Arrays, make):
    if "mean" in c.dims:
        out = make(c.mean, c.d)
        return out, lambda: gather_mean(as_tensor(a["x"]), as_tensor(out))
    out = make(c.t, c.d)
    return out, lambda: gather(as_tensor(a["table"]), as_tensor(a["ids"]), as_tensor(out))


def _run(c: Case, a: Arrays) -> Arrays:
    out, run = _call(c, a, guarded)
    run()
    return {"out": out}


def _torch(c: Case, a: Arrays):
    import torch

    if "mean" in c.dims:
        x = torch.from_numpy(a["x"]).reshape(c.mean, c.n, c.d)
        return lambda: x.mean(1)
    table, ids = torch.from_numpy(a["table"].astype(np.float32)), torch.from_numpy(a["ids"]).long()
    return lambda: torch.nn.functional.embedding(ids, table)


register(
    Op(
        name="gather",
        kernels=("gather", "gather_mean"),
        cases=[
            *cases("tiny", {"t": 1, "v": 8, "d": 16, "dtype": "f32"}, {"t": 5, "v": 50, "d": 64, "dtype": "bf16"}),
            *cases("odd", {"t": 3, "v": 7, "d": 13, "dtype": "f32"}, {"t": 9, "v": 5, "d": 101, "dtype": "bf16"}),
            *cases("tiny", {"mean": 3, "n": 49, "d": 64, "dtype": "mean"}),
            *cases("odd", {"mean": 2, "n": 1, "d": 7, "dtype": "mean"}, {"mean": 1, "n": 5, "d": 33, "dtype": "mean"}),
            *cases("real", {"t": 512, "v": 32768, "d": 2688, "dtype": "f32"}),
        ],
        inputs=_inputs,
        reference=_reference,
        run=_run,
        prepare=lambda c, a: _call(c, a, lambda *s: np.zeros(s, np.float32))[1],
        torch_eager=_torch,
        tolerance={"f32": 0.0, "bf16": 0.0, "mean": 1e-6},
        bytes=lambda c: 4 * c.mean * c.n * c.d if "mean" in c.dims else c.t * c.d * (8 if c.dtype == "f32" else 6),
        flops=lambda c: 0,
        absent={"triton": "a row copy needs no tiles"},
    )
)
