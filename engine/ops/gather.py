"""Rows of a table by ids that live in memory: token embedding, last row of a chunk (csrc/ops/gather)."""

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


def _inputs(c: Case, rng: np.random.Generator) -> Arrays:
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

    table = a["table"] if c.dtype == "f32" else (a["table"].astype(np.uint32) << 16).view(np.float32)
    padded = torch.cat([torch.from_numpy(table), torch.zeros(1, c.d)])
    ids = torch.from_numpy(a["ids"]).long()
    return {"out": padded[torch.where((ids < 0) | (ids >= c.v), c.v, ids)].numpy()}


def _run(c: Case, a: Arrays) -> Arrays:
    out = guarded(c.t, c.d)
    gather(as_tensor(a["table"]), as_tensor(a["ids"]), as_tensor(out))
    return {"out": out}


def _prepare(c: Case, a: Arrays):
    table, ids, out = as_tensor(a["table"]), as_tensor(a["ids"]), as_tensor(np.zeros((c.t, c.d), np.float32))
    return lambda: gather(table, ids, out)


def _torch(c: Case, a: Arrays):
    import torch

    table, ids = torch.from_numpy(a["table"].astype(np.float32)), torch.from_numpy(a["ids"]).long()
    return lambda: torch.nn.functional.embedding(ids, table)


register(
    Op(
        name="gather",
        cases=[
            *cases("tiny", {"t": 1, "v": 8, "d": 16, "dtype": "f32"}, {"t": 5, "v": 50, "d": 64, "dtype": "bf16"}),
            *cases("odd", {"t": 3, "v": 7, "d": 13, "dtype": "f32"}, {"t": 9, "v": 5, "d": 101, "dtype": "bf16"}),
            *cases("real", {"t": 512, "v": 32768, "d": 2688, "dtype": "f32"}),
        ],
        inputs=_inputs,
        reference=_reference,
        run=_run,
        prepare=_prepare,
        torch_eager=_torch,
        tolerance={"f32": 0.0, "bf16": 0.0},
        bytes=lambda c: c.t * c.d * (8 if c.dtype == "f32" else 6),
        flops=lambda c: 0,
        absent={"triton": "a row copy needs no tiles"},
    )
)
