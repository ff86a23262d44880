"""Checkpoints made by a peer implementation, with its results; made once, then read from .cache/peers."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests/peers/nemotron_transformers.py"
SEED, CASES = 0, 24


@dataclass(frozen=True)
class PeerCase:
    """One random checkpoint folder and what transformers computes from it in fp32."""

    folder: Path
    ids: np.ndarray  # [T] int64
    logits: np.ndarray  # [T, V] fp32
    greedy: np.ndarray  # [64] int64, the greedy continuation of ids


def peer_python() -> Path:
    """The peer environment's interpreter; fails the test that asks when there is none."""
    python = Path(os.environ.get("QUINTET_PEER_TRANSFORMERS", ROOT / ".venvs/transformers/bin/python"))
    if not python.is_file():
        pytest.fail(f"no peer environment at {python}: run `./run peers`, or set QUINTET_PEER_TRANSFORMERS")
    return python


@functools.cache
def peer_cases() -> list[PeerCase]:
    """All cases, in order; the first call of a new script or seed takes about a minute."""
    key = hashlib.sha256(SCRIPT.read_bytes() + f"{SEED}/{CASES}".encode()).hexdigest()[:16]
    folder = ROOT / ".cache/peers" / f"nemotron-{key}"
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
    cases = []
    for path in sorted(folder.glob("case-*")):
        t = load_file(path / "peer.safetensors")
        cases.append(PeerCase(path, t["ids"], t["logits"], t["greedy"]))
    return cases
