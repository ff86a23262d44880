"""pi0.5 and X-VLA checkpoints made by lerobot, with its results; made once, then read from .cache/peers.

`compare` holds any implementation to them: the plain-torch references, or an engine loaded from the same folder.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _peer import ROOT, made_once
from safetensors.numpy import load_file

SCRIPT = ROOT / "tests/peers/faster_lerobot.py"
SEED, CASES = 0, 12  # of each model
TOLERANCE = 1e-4  # of the largest value of what is compared
SCHEDULES = {"const": "tau_const", "has": "tau_has", "delayed": "tau_delay"}


@dataclass(frozen=True)
class FlowCase:
    """A random checkpoint folder and what lerobot computes from it in fp32; names and shapes of `io` in the script."""

    folder: Path
    io: dict[str, np.ndarray]

    @property
    def batch(self) -> int:
        return len(self.io["noise"])

    def delay(self, name: str) -> int:
        """Committed actions of the chunk `name`."""
        return int(self.io["delay"][0]) if name == "delayed" else 0

    def tau(self, name: str) -> np.ndarray:
        """Times [N + 1, H] of the chunk `name`."""
        return self.io[SCHEDULES[name]]


def error(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference over the largest value; the difference itself where all values are zero."""
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / (np.abs(want).max() or 1)) if want.size else 0.0


def compare(case: FlowCase, sample: Callable[[FlowCase, str], np.ndarray]) -> dict[str, float]:
    """Errors of `sample(case, name)`, a chunk [B, H, .], for every schedule; committed rows are left out."""
    out = {}
    for name in SCHEDULES:
        got, rows = np.asarray(sample(case, name)), slice(case.delay(name), None)
        out[name] = error(got[:, rows], case.io[name][:, rows])
    return out


@functools.cache
def flow_cases(model: str) -> list[FlowCase]:
    """All cases of `pi05` or `xvla`, in order; the first call of a new script or seed takes some seconds."""
    folder = made_once("faster", SCRIPT, "lerobot", SEED, CASES)
    return [FlowCase(path, load_file(path / "peer.safetensors")) for path in sorted(folder.glob(f"{model}-*"))]
