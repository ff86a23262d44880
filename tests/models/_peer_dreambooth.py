"""3DreamBooth's parts made by diffusers, with their results; made once, then read from .cache/peers."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from _peer import ROOT, made_once
from safetensors.torch import load_file
from torch import Tensor

from engine.io.checkpoint import SafetensorsFile, Source
from engine.models.dreambooth3d.config import DitConfig, VaeConfig
from engine.models.dreambooth3d.weights import canonical_dit, canonical_vae

SCRIPT = ROOT / "tests/peers/dreambooth_diffusers.py"
SEED, CASES = 0, 12


@dataclass(frozen=True)
class PeerCase:
    """A random part of a model and what a peer computes from it in fp32; names and shapes of `io` in the script."""

    folder: Path
    about: dict
    io: dict[str, Tensor]

    @property
    def dit(self) -> tuple[DitConfig, dict[str, Tensor]]:
        """The transformer under its official names."""
        c = DitConfig.from_json(self.about["transformer"])
        with SafetensorsFile(self.folder / "transformer.safetensors") as file:
            return c, _read(canonical_dit(file, c))

    @property
    def vae(self) -> tuple[VaeConfig, dict[str, Tensor]]:
        with SafetensorsFile(self.folder / "vae.safetensors") as file:
            return VaeConfig.from_json(self.about["vae"]), _read(canonical_vae(file))


def _read(source: Source) -> dict[str, Tensor]:
    return {key: torch.from_numpy(source.read(key).copy()) for key in source.keys()}  # noqa: SIM118


@functools.cache
def cases() -> list[PeerCase]:
    """In order."""
    folder = made_once("dreambooth", SCRIPT, "diffusers", SEED, CASES)
    return [PeerCase(path, json.loads((path / "config.json").read_text()), load_file(path / "peer.safetensors"))
            for path in sorted(folder.glob("case-*"))]  # fmt: skip
