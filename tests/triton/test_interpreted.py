"""Triton programs without a GPU: every case of the registry, forced through them, in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.ops.registry import ops

pytest.importorskip("torch")
pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
# All that have a program; rng has a test of its own below.
OPS = tuple(name for name, op in ops().items() if "triton" not in op.absent and name != "rng")
# Launches per case; the interpreter takes minutes for the longest contexts, which 1023 positions stand in for.
CASES = [
    (name, i, case)
    for name in OPS
    for i, case in enumerate(ops()[name].cases)
    if case.kind != "real" and case.dims.get("past", 0) < 2000
]
JOBS: dict[str, dict] = {
    f"{name}-{case.id}": {"kind": "whole", "op_name": name, "index": i, "orders": orders}
    for name, i, case in CASES
    for orders in [["forward"] if case.dims.get("past", 0) > 1000 else ["forward", "backward", "shuffled"]]
}
# Recorded for more rows than a replay has.
LIVE = {"gemm": (29, 17), "moe": (40,), "ssm": (17, 130), "attention": (33,)}
JOBS |= {
    f"{name}-{case.id}-rows{live}": {"kind": "fewer", "op_name": name, "index": i, "live": live}
    for name, i, case in CASES
    if case.dims.get("m", case.dims.get("t")) in LIVE.get(name, ())
    for live in (0, 1, 13)
}


@pytest.fixture(scope="module")
def answers():
    """One process for all jobs: starting Triton takes longer than most of them."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    jobs = "".join(json.dumps(j) + "\n" for j in JOBS.values())
    done = subprocess.run([sys.executable, str(ROOT / "tests/triton/interpreted.py")], text=True, capture_output=True,
                          input=jobs, env=environment, check=False)  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == len(JOBS), done.stderr[-4000:]
    return dict(zip(JOBS, map(json.loads, lines)))


@pytest.mark.parametrize("job", JOBS)
def test_program(answers, job):
    answer = answers[job]
    assert "failed" not in answer, answer["failed"]
    assert answer["ran"], "no Triton program ran"
    assert not answer["broken"], f"written, and should not be: {answer['broken']}"
    assert answer["same"], "the order of the programs of a grid changes the result"
    for name, e in answer["errors"].items():
        assert e <= answer["limit"], f"{name}: error {e:.2e}, tolerance {answer['limit']:.0e}"


def test_every_kernel_ran(answers):
    """A kernel that no case reaches would be untested."""
    import ast

    ran = {kernel for a in answers.values() for kernel in a.get("ran", ())}
    recorded = set()
    for name in OPS:  # the names that the ops record
        for node in ast.walk(ast.parse((ROOT / f"engine/ops/{name}.py").read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Program":
                recorded.add(node.args[0].value)  # type: ignore[attr-defined]
    assert recorded and recorded == ran
