"""What a replay costs beyond its kernels: nodes that do nothing, per node and per call."""

from __future__ import annotations

import numpy as np

from bench.report import Report
from bench.timing import once
from engine.ops.gather import gather
from engine.runtime.arena import Arena, as_tensor
from engine.runtime.plan import capture


def overhead(nodes: int, rounds: int = 200) -> float:
    """Median microseconds of one replay of `nodes` empty nodes."""
    arena = Arena()
    rows = arena.alloc("rows", (1,), "i32")  # zero rows: every kernel returns at once
    table, ids, out = (
        as_tensor(np.zeros((1, 16), np.float32)),
        arena.alloc("ids", (1,), "i32"),
        arena.alloc("out", (1, 16)),
    )

    def step() -> None:
        for _ in range(nodes):
            gather(table, ids, out, rows=rows)

    plan = capture(step)
    plan.replay()
    return float(np.median([once(plan.replay, 3) for _ in range(rounds)])) * 1e6


def main() -> None:
    report = Report("plan")
    one, many = overhead(1), overhead(1001)
    per_node = (many - one) / 1000
    report.add(call_us=one, per_node_us=per_node)
    threads = report.data["machine"]["threads"]
    print(f"replay call {one:.2f} us, {per_node:.3f} us per node (barrier of {threads} threads included)")
    print("written:", report.save())
