"""A model on the emulated device beside the CPU, in a process of its own: what tests/emu/<module>.py prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np

from engine.ops.registry import error

from . import build

MODELS = str(build.ROOT / "tests/models")  # whose helpers the modules import


def problems(model: Any) -> list[str]:
    """What an audit of every plan of a model finds, replayed once."""
    return [f"{name}: {p}" for name, plan in model.plans.items() for p in plan.audit(model.arena, replays=1).problems]


def tell(model: Any, got: np.ndarray, want: np.ndarray, audit: list[str] | None) -> None:
    """Prints the line of a module that is run by `beside`: the error, which kinds of nodes ran, what an audit found."""
    kinds = sorted({n.impl for plan in model.plans.values() for n in plan.nodes})
    print(json.dumps({"error": error(got, want), "kinds": kinds, "audit": audit}))


def beside(module: str, *arguments: str) -> dict[str, Any]:
    """The JSON line of `python -m tests.emu.<module> arguments`, Triton interpreted; AssertionError with its errors."""
    build.module("plain")  # here, not in the worker's time
    paths = os.pathsep.join([str(build.ROOT), MODELS, *sys.path])
    command = [sys.executable, "-W", "ignore", "-m", f"tests.emu.{module}", *arguments]
    done = subprocess.run(command, cwd=build.ROOT, capture_output=True, text=True, check=False,
                          env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths})  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
