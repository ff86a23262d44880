"""Rows of a table by ids that live in memory, means and weighted sums of rows (csrc/ops/gather)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.errors import InputError
from engine.ops.checks import Check
from engine.ops.dispatch import call
from engine.ops.gemm import SRC
from engine.ops.registry import Arrays, Case, Op, cases, guarded, register
from engine.runtime.arena import Arena, Tensor, as_tensor


@dataclass(frozen=True)
class Sums:
    """A sparse matrix [n, r] in memory: row i has the entries offsets[i]..offsets[i + 1] of rows (columns of the
    matrix, i32) and weights (f32)."""

    offsets: Tensor
    rows: Tensor
    weights: Tensor
    r: int

    @staticmethod
    def of(arena: Arena, name: str, matrix: list[list[tuple[int, float]]], r: int) -> Sums:
        """From the (column, weight) pairs of each row; every column in [0, r)."""
        flat = [entry for row in matrix for entry in row]
        parts = {
            "offsets": np.cumsum([0, *(len(row) for row in matrix)]).astype(np.int32),
            "rows": np.array([c for c, _ in flat], np.int32),
            "weights": np.array([w for _, w in flat], np.float32),
        }
        if len(flat) and not 0 <= parts["rows"].min() <= parts["rows"].max() < r:
            raise InputError(f"sums {name!r}: a column is outside [0, {r})")
        made = {}
        for part, value in parts.items():
            made[part] = arena.alloc(f"{name}.{part}", value.shape, "f32" if part == "weights" else "i32", "weights")
            if not arena.dry:
                made[part].write(value)
        return Sums(**made, r=r)

    @property
    def n(self) -> int:
        return self.offsets.shape[0] - 1


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


def gather_sum(x: Tensor, sums: Sums, out: Tensor, *, label: str = "") -> None:
    """out [batch*n, D] (f32 or bf16) = sums [n, r] times each of the `batch` grids of x [batch*r, D] f32: pooling and
    resampling of grids. Entries are trusted."""
    check = Check("gather_sum", label)
    check.takes("out", out, (None, None), "f32|bf16", strided=True)
    check.takes("sums.offsets", sums.offsets, (None,), "i32")
    check.takes("sums.rows", sums.rows, (None,), "i32")
    check.takes("sums.weights", sums.weights, sums.rows.shape)
    n, (m, d) = sums.n, out.shape
    check.need(n >= 1 and m % n == 0 and m > 0, f"{m} rows of out are not grids of {n}")
    check.takes("x", x, (m // n * sums.r, d), strided=True)
    check.apart("out", out, x=x)
    call("gather_sum", label, nbytes=x.nbytes, x=x, ldx=x.ld, offsets=sums.offsets, rows=sums.rows,
         weights=sums.weights, out=out, out_dtype=SRC[out.dtype], ldo=out.ld, batch=m // n, n=n, r=sums.r,
         d=d)  # fmt: skip


def _inputs(c: Case, rng: np.random.Generator) -> Arrays:
    if "mean" in c.dims:
        return {"x": rng.standard_normal((c.mean * c.n, c.d)).astype(np.float32)}
    if "sums" in c.dims:
        counts = rng.integers(0, 5, c.sums)
        return {"x": rng.standard_normal((c.b * c.r, c.d)).astype(np.float32),
                "offsets": np.cumsum([0, *counts]).astype(np.int32),
                "rows": rng.integers(0, c.r, counts.sum()).astype(np.int32),
                "weights": rng.standard_normal(counts.sum()).astype(np.float32)}  # fmt: skip
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
    if "sums" in c.dims:
        matrix = torch.zeros(c.sums, c.r, dtype=torch.float64)
        place = np.repeat(np.arange(c.sums), np.diff(a["offsets"]))
        matrix.index_put_((torch.from_numpy(place), torch.from_numpy(a["rows"]).long()),
                          torch.from_numpy(a["weights"]).double(), accumulate=True)  # fmt: skip
        return {"out": (matrix @ torch.from_numpy(a["x"]).double().reshape(c.b, c.r, c.d)).flatten(0, 1).numpy()}
    table = a["table"] if c.dtype == "f32" else (a["table"].astype(np.uint32) << 16).view(np.float32)
    padded = torch.cat([torch.from_numpy(table), torch.zeros(1, c.d)])
    ids = torch.from_numpy(a["ids"]).long()
    return {"out": padded[torch.where((ids < 0) | (ids >= c.v), c.v, ids)].numpy()}


def _call(c: Case, a: Arrays, make):
    if "mean" in c.dims:
        out = make(c.mean, c.d)
        return out, lambda: gather_mean(as_tensor(a["x"]), as_tensor(out))
    if "sums" in c.dims:
        out, t = make(c.b * c.sums, c.d, dtype=c.dims.get("to", "f32")), {k: as_tensor(v) for k, v in a.items()}
        x, sums, dst = t.pop("x"), Sums(**t, r=c.r), as_tensor(out)
        return out, lambda: gather_sum(x, sums, dst)
    out = make(c.t, c.d)
    return out, lambda: gather(as_tensor(a["table"]), as_tensor(a["ids"]), as_tensor(out))


def _run(c: Case, a: Arrays) -> Arrays:
    out, run = _call(c, a, guarded)
    run()
    return {"out": (out.astype(np.uint32) << 16).view(np.float32) if out.dtype == np.uint16 else out}


def _torch(c: Case, a: Arrays):
    import torch

    if "mean" in c.dims:
        x = torch.from_numpy(a["x"]).reshape(c.mean, c.n, c.d)
        return lambda: x.mean(1)
    if "sums" in c.dims:
        return lambda: _reference(c, a)
    table, ids = torch.from_numpy(a["table"].astype(np.float32)), torch.from_numpy(a["ids"]).long()
    return lambda: torch.nn.functional.embedding(ids, table)


def _bytes(c: Case) -> int:
    if "sums" in c.dims:
        return 4 * c.b * c.d * (c.r + c.sums)
    return 4 * c.mean * c.n * c.d if "mean" in c.dims else c.t * c.d * (8 if c.dtype == "f32" else 6)


register(
    Op(
        name="gather",
        kernels=("gather", "gather_mean", "gather_sum"),
        cases=[
            *cases("tiny", {"t": 1, "v": 8, "d": 16, "dtype": "f32"}, {"t": 5, "v": 50, "d": 64, "dtype": "bf16"}),
            *cases("odd", {"t": 3, "v": 7, "d": 13, "dtype": "f32"}, {"t": 9, "v": 5, "d": 101, "dtype": "bf16"}),
            *cases("tiny", {"mean": 3, "n": 49, "d": 64, "dtype": "mean"}),
            *cases("odd", {"mean": 2, "n": 1, "d": 7, "dtype": "mean"}, {"mean": 1, "n": 5, "d": 33, "dtype": "mean"}),
            *cases(
                "tiny",
                {"sums": 9, "b": 2, "r": 12, "d": 96, "dtype": "mean"},
                {"sums": 5, "b": 1, "r": 30, "d": 300, "dtype": "mean"},
            ),
            *cases("tiny", {"sums": 7, "b": 1, "r": 9, "d": 70, "to": "bf16", "dtype": "rounded"}),
            *cases("odd", {"sums": 3, "b": 3, "r": 4, "d": 13, "dtype": "mean"}),
            *cases("real", {"t": 512, "v": 32768, "d": 2688, "dtype": "f32"}),
        ],
        inputs=_inputs,
        reference=_reference,
        run=_run,
        prepare=lambda c, a: _call(c, a, lambda *s, **_: np.zeros(s, np.float32))[1],
        torch_eager=_torch,
        tolerance={"f32": 0.0, "bf16": 0.0, "mean": 1e-6, "rounded": 4e-3},
        bytes=_bytes,
        flops=lambda c: 0,
        absent={"triton": "a row copy needs no tiles"},
    )
)
