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
class GeneratorCase:
    """A random generator and what diffusers computes from it in fp32; names and shapes of `io` in the script."""

    folder: Path
    about: dict
    io: dict[str, np.ndarray]

    @property
    def target(self) -> int:
        """A noise level asked for that gives the case's timestep."""
        return next(t for t in range(1001) if noise_level(t)[0] == self.about["timestep"])


@dataclass(frozen=True)
class LanguageCase:
    """A random SigLIP tower and Qwen2 model and what transformers computes from them in fp32."""

    folder: Path
    about: dict
    io: dict[str, np.ndarray]

    @property
    def config(self) -> dict:
        """Keys of a VEGA-3D config.json; the last layer of the tower is left out."""
        v = self.about["vision"]
        return self.about["text"] | {"vision_config": v | {"num_hidden_layers": v["num_hidden_layers"] - 1}}


@functools.cache
def language_cases() -> list[LanguageCase]:
    """In order."""
    cases = []
    for path in sorted(made_once("vega-language", LANGUAGE_SCRIPT, "transformers", SEED, CASES).glob("model-*")):
        about = json.loads((path / "config.json").read_text())
        cases.append(LanguageCase(path, about, load_file(path / "peer.safetensors")))
    return cases


@functools.cache
def qwen_cases() -> list[GeneratorCase]:
    """Random Qwen2.5-VL models, in order."""
    cases = []
    for path in sorted(made_once("vega-qwen", QWEN_SCRIPT, "transformers", SEED, CASES).glob("qwen-*")):
        about = json.loads((path / "config.json").read_text())
        cases.append(GeneratorCase(path, about, load_file(path / "peer.safetensors")))
    return cases


@functools.cache
def made() -> Path:
    """Where all cases are; the first call of a new script or seed takes some seconds."""
    return made_once("vega", SCRIPT, "diffusers", SEED, CASES)


@functools.cache
def generator_cases(kind: str = "generator") -> list[GeneratorCase]:
    """In order; `prompt`: with a text of several tokens."""
    cases = []
    for path in sorted(made().glob(f"{kind}-*")):
        about = json.loads((path / "config.json").read_text())
        cases.append(GeneratorCase(path, about, load_file(path / "peer.safetensors")))
    return cases


def as_folder(case: GeneratorCase, to: Path) -> Path:
    """The case in diffusers' layout, with its prompt."""
    for part, file in (("transformer", "transformer"), ("vae", "vae")):
        (to / part).mkdir(parents=True)
        (to / part / "config.json").write_text(json.dumps(case.about[part]))
        shutil.copy(case.folder / f"{file}.safetensors", to / part / "diffusion_pytorch_model.safetensors")
    save_file({PROMPT_KEY: case.io["prompt"]}, to / PROMPT_FILE)
    return to
