"""pi0.5 and X-VLA checkpoints made by lerobot, with its results; made once, then read from .cache/peers.

`compare` holds any implementation to them: the plain-torch references, or an engine loaded from the same folder.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
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


def peer_python() -> Path:
    """The peer environment's interpreter; fails the test that asks when there is none."""
    python = Path(os.environ.get("QUINTET_PEER_LEROBOT", ROOT / ".venvs/lerobot/bin/python"))
    if not python.is_file():
        pytest.fail(f"no peer environment at {python}: run `./run peers`, or set QUINTET_PEER_LEROBOT")
    return python


@functools.cache
def flow_cases(model: str) -> list[FlowCase]:
    """All cases of `pi05` or `xvla`, in order; the first call of a new script or seed takes some seconds."""
    key = hashlib.sha256(SCRIPT.read_bytes() + f"{SEED}/{CASES}".encode()).hexdigest()[:16]
    folder = ROOT / ".cache/peers" / f"faster-{key}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix="making-", dir=folder.parent))
        command = [str(peer_python()), str(SCRIPT), str(made), "--seed", str(SEED), "--cases", str(CASES)]
        # The peer imports nothing of this repository.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            shutil.rmtree(made)
            pytest.fail(f"{SCRIPT.name} failed:\n{done.stderr[-3000:]}")
        try:
            made.rename(folder)  # complete or not there at all
        except OSError:  # another test process was faster
            shutil.rmtree(made)
    return [FlowCase(path, load_file(path / "peer.safetensors")) for path in sorted(folder.glob(f"{model}-*"))]
