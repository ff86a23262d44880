"""VEGA-3D's parts made by diffusers, with their results; made once, then read from .cache/peers."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _peer import ROOT, made_once
from safetensors.numpy import load_file, save_file

from engine.models.vega3d.features import PROMPT_FILE, PROMPT_KEY
from engine.models.vega3d.schedule import noise_level

SCRIPT = ROOT / "tests/peers/vega_diffusers.py"
LANGUAGE_SCRIPT = ROOT / "tests/peers/vega_transformers.py"
QWEN_SCRIPT = ROOT / "tests/peers/vega_qwen.py"
SEED, CASES = 0, 12


@dataclass(frozen=True)
class PeerCase:
    """A random part of a model and what a peer computes from it in fp32; names and shapes of `io` in the script."""

    folder: Path
    about: dict
    io: dict[str, np.ndarray]

    @property
    def target(self) -> int:
        """A noise level asked for that gives the case's timestep."""
        return next(t for t in range(1001) if noise_level(t)[0] == self.about["timestep"])


def _cases(folder: Path, kind: str) -> list[PeerCase]:
    cases = []
    for path in sorted(folder.glob(f"{kind}-*")):
        about = json.loads((path / "config.json").read_text())
        cases.append(PeerCase(path, about, load_file(path / "peer.safetensors")))
    return cases


@functools.cache
def language_cases() -> list[PeerCase]:
    """Random SigLIP towers and Qwen2 models, in order."""
    return _cases(made_once("vega-language", LANGUAGE_SCRIPT, "transformers", SEED, CASES), "model")


@functools.cache
def qwen_cases() -> list[PeerCase]:
    """Random Qwen2.5-VL models, in order."""
    return _cases(made_once("vega-qwen", QWEN_SCRIPT, "transformers", SEED, CASES), "qwen")


@functools.cache
def made() -> Path:
    """Where all cases are; the first call of a new script or seed takes some seconds."""
    return made_once("vega", SCRIPT, "diffusers", SEED, CASES)


@functools.cache
def generator_cases(kind: str = "generator") -> list[PeerCase]:
    """In order; `prompt`: with a text of several tokens."""
    return _cases(made(), kind)


def as_folder(case: PeerCase, to: Path) -> Path:
    """The case in diffusers' layout, with its prompt."""
    for part, file in (("transformer", "transformer"), ("vae", "vae")):
        (to / part).mkdir(parents=True)
        (to / part / "config.json").write_text(json.dumps(case.about[part]))
        shutil.copy(case.folder / f"{file}.safetensors", to / part / "diffusion_pytorch_model.safetensors")
    save_file({PROMPT_KEY: case.io["prompt"]}, to / PROMPT_FILE)
    return to
