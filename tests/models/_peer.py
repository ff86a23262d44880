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


def peer_python(name: str) -> Path:
    """Interpreter of the peer environment .venvs/<name>; fails the test that asks when there is none."""
    variable = f"QUINTET_PEER_{name.upper()}"
    python = Path(os.environ.get(variable, ROOT / ".venvs" / name / "bin/python"))
    if not python.is_file():
        pytest.fail(f"no peer environment at {python}: run `./run peers`, or set {variable}")
    return python


def made_once(what: str, script: Path, peer: str, seed: int, cases: int) -> Path:
    """The folder that `script` fills in the environment of a peer; kept under the hash of the script and arguments."""
    key = hashlib.sha256(script.read_bytes() + f"{seed}/{cases}".encode()).hexdigest()[:16]
    folder = ROOT / ".cache/peers" / f"{what}-{key}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix="making-", dir=folder.parent))
    command = [str(peer_python(peer)), str(script), str(made), "--seed", str(seed), "--cases", str(cases)]
    # The peer imports nothing of this repository.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        shutil.rmtree(made)
        pytest.fail(f"{script.name} failed:\n{done.stderr[-3000:]}")
    try:
        made.rename(folder)  # complete or not there at all
    except OSError:  # another test process was faster
        shutil.rmtree(made)
    return folder


@functools.cache
def peer_cases() -> list[PeerCase]:
    """All cases, in order; the first call of a new script or seed takes about a minute."""
    folder = made_once("nemotron", SCRIPT, "transformers", SEED, CASES)
    cases = []
    for path in sorted(folder.glob("case-*")):
        t = load_file(path / "peer.safetensors")
        cases.append(PeerCase(path, t["ids"], t["logits"], t["greedy"]))
    return cases
