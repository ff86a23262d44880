"""Runs registry cases with their Triton programs in the interpreter: jobs as JSON lines on stdin, answers on stdout.

A process of its own (TRITON_INTERPRET=1 is read when a kernel is decorated). What has no program runs on the CPU.
"""

from __future__ import annotations

import importlib
import json
import random
import sys
import time
import traceback
from contextlib import ExitStack
from unittest.mock import patch

import numpy as np

from engine import _C
from engine.ops import dispatch
from engine.ops.registry import POISON, Case, error, ops, surrounded, watch
from engine.runtime import cuda, device
from engine.runtime.arena import as_tensor
from engine.runtime.program import Program, interpret

ROWS = {"gemm": "m", "moe": "t", "ssm": "t", "attention": "t"}  # what a case calls its rows
VERBS = {"moe": ("moe_route", "moe_up", "moe_down")}


class Interpreter(cuda.Recorder):
    """The CUDA driver of engine.runtime.cuda over host memory."""

    def __init__(self) -> None:
        self.order = None  # how a grid is walked
        self.ran: set[str] = set()

    def cuda_run(self, op: int, ordinal: int, values: dict) -> None:
        _C.run(op, device.isa(), values)

    def cuda_run_program(self, program: Program, ordinal: int) -> None:
        self.ran.add(program.kernel)
        interpret(program, self.order)


ORDERS = {
    "forward": None,
    "backward": lambda grid: grid[::-1],
    "shuffled": lambda grid: random.Random(5).sample(grid, len(grid)),
}


def run(driver: Interpreter, op, case: Case, arrays: dict, order: str = "forward") -> tuple[dict, list[str]]:
    """Outputs, and what was written that should not be."""
    driver.order = ORDERS[order]
    given = surrounded(arrays)
    with cuda.use(driver), device.on("cuda"), watch() as broken:
        out = op.run(case, given)
    return out, broken() + [f"input {k}" for k, v in arrays.items() if given[k].tobytes() != v.tobytes()]


def whole(driver: Interpreter, op_name: str, index: int, orders: list[str]) -> dict:
    """A case of the registry as it is, its grids walked in several orders."""
    op = ops()[op_name]
    case = op.cases[index]
    arrays = op.inputs(case, np.random.default_rng(7))
    start = time.perf_counter()
    runs, written = zip(*(run(driver, op, case, arrays, order) for order in orders))
    seconds = time.perf_counter() - start
    want = op.reference(case, arrays)
    return {
        "errors": {k: error(runs[0][k], want[k]) for k in want},
        "limit": op.tolerance_of(case),
        "broken": [name for names in written for name in names],
        "same": all(np.array_equal(runs[0][k], r[k]) for r in runs for k in want),
        "ran": sorted(driver.ran),
        "seconds": seconds,
    }


def fewer(driver: Interpreter, op_name: str, index: int, live: int) -> dict:
    """A case recorded for its rows and run with `live` of them, read from memory: the rest stays as it was."""
    op = ops()[op_name]
    module = importlib.import_module(f"engine.ops.{op_name}")
    full = op.cases[index]
    dim = ROWS[op_name]
    capacity, count = full.dims[dim], as_tensor(np.array([live], np.int32))
    arrays = op.inputs(full, np.random.default_rng(7))
    start = time.perf_counter()
    with ExitStack() as stack:
        for verb in VERBS.get(op_name, (op_name,)):
            original = getattr(module, verb)

            def limited(*args, original=original, **named):
                rows = next(a.shape[0] for a in args if hasattr(a, "address"))
                return original(*args, **named, **({"rows": count} if rows % capacity == 0 else {}))

            stack.enter_context(patch.object(module, verb, limited))
        got, broken = run(driver, op, full, arrays)
    out = got["out"]
    if not (out[live:].view(np.uint16) == POISON).all():
        broken.append("out beyond the live rows")
    errors = {}
    if live:
        case = Case(full.kind, {**full.dims, dim: live})
        kept = full.dims.get("past", 0)
        lengths = {"x", "residual", "gate", "mod_rows", "xbc", "dt", "q", "k", "v"} - (
            {"gate"} if op_name == "moe" else set()
        )
        short = {k: v[: kept + live] if k in lengths else v for k, v in arrays.items()}
        want = op.reference(case, short)
        rowwise = {"out", "ids", "weights"}
        errors = {k: error(got[k][:live] if k in rowwise else got[k], want[k]) for k in want}
    elif op_name == "ssm" and not all(
        np.array_equal(got[k], arrays[k][..., : got[k].shape[-1]]) for k in ("state", "conv_state")
    ):
        broken.append("states without a row")
    return {"errors": errors, "limit": op.tolerance_of(full), "broken": broken, "same": True,
            "ran": sorted(driver.ran), "seconds": time.perf_counter() - start}  # fmt: skip


def main() -> None:
    driver = Interpreter()
    np.seterr(all="ignore")
    dispatch.PROGRAM_ROWS = 0  # few rows too: every case is a case for the programs
    for line in sys.stdin:
        driver.ran.clear()
        try:
            task = json.loads(line)
            answer = {"whole": whole, "fewer": fewer}[task.pop("kind")](driver, **task)
        except Exception:
            answer = {"failed": traceback.format_exc()[-3000:]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
