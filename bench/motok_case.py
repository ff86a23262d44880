"""What both sides of bench/motok.py are given: random weights in files, a prompt, waypoints; and the golden weights."""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import numpy as np

from bench.sources import RandomSource
from engine.blocks.motion import HUMANML3D, HUMANML3D_STATISTICS, Constraints, Waypoints
from engine.io.writer import save
from engine.models.motok.config import MoTokConfig
from engine.models.motok.layout import FILES, shapes

FRAMES, EVERY, JOINTS = 196, 4, ("pelvis", "l_wrist", "r_foot")
PROMPT = "a person walks forward with energy, then waves"
#: Of the prompt; CLIP's vocabulary is not part of the engine.
IDS = [49406, 320, 2533, 8192, 2342, 593, 3131, 267, 1594, 4160, 49407]
CASE = "case.safetensors"  # beside the weights: the draws of one request


class Words:
    """Stands in for the text tokenizer."""

    vocab_size = 49408

    def encode(self, text: str, ctx: int = 77) -> list[int]:
        return IDS[:ctx]


class Weights(RandomSource):
    """Weights of unit gain and the statistics of the data set, in fp32: of bf16 weights nothing would be rounded, and
    a comparison with fp32 would flatter bf16."""

    def __init__(self, c: MoTokConfig, parts: tuple[str, ...] = ("ddm", "clip")) -> None:
        super().__init__(shapes(c, parts), dtype="F32")

    def read(self, name: str) -> np.ndarray:
        s = HUMANML3D_STATISTICS
        given = {"mean": s.mean, "std": s.std, "hint_mean": s.joint_mean, "hint_std": s.joint_std}
        if name.startswith("stats."):
            return np.ascontiguousarray(given[name.removeprefix("stats.")].reshape(-1), np.float32)
        shape = self.info(name).shape
        if len(shape) == 1 and name.endswith("weight"):  # of norms, whose names here do not say so
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            return (1 + 0.1 * rng.standard_normal(shape)).astype(np.float32)
        # Smaller codes would drown in the decoder's biases: every motion would be the same.
        return super().read(name) * np.float32(8 if name == "quantizer.codebook" else 1)


class Golden(Weights):
    """The weights behind the golden values (specification 15.2): a hash of the name and of the entry's index."""

    def __init__(self, c: MoTokConfig) -> None:
        super().__init__(c, ())

    def read(self, name: str) -> np.ndarray:
        if name.startswith("stats."):
            return super().read(name)
        shape = self.info(name).shape
        u = hashed(name, math.prod(shape)).reshape(shape)
        if name == "quantizer.codebook":
            u *= 0.5
        elif len(shape) >= 2:
            u *= math.sqrt(3 / math.prod(shape[1:]))
        else:
            u = 1 + 0.1 * u if name.endswith("weight") else 0.05 * u
        return u.astype(np.float32)


def hashed(key: str, count: int) -> np.ndarray:
    """`count` numbers in [-1, 1), fp64."""
    h = np.arange(count, dtype=np.uint32) + np.uint32(0x9E3779B9 * zlib.crc32(key.encode()) % 2**32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h ^= h >> np.uint32(shift)
        h *= np.uint32(factor)
    h ^= h >> np.uint32(16)
    return h * 2.0**-31 - 1


def normal(key: str, *shape: int) -> np.ndarray:
    """Hashed numbers of variance 1."""
    return math.sqrt(3) * hashed(key, math.prod(shape)).reshape(shape)


def write_weights(c: MoTokConfig, folder: Path) -> None:
    """The files of a checkpoint, as `weights.open_source` reads them."""
    source = Weights(c)
    files: dict[str, dict[str, tuple[str, np.ndarray]]] = {}
    for name in source.keys():  # noqa: SIM118 - a Source is no dict
        prefix = max((p for p in FILES if name.startswith(p)), key=len)
        files.setdefault(FILES[prefix], {})[name.removeprefix(prefix)] = ("F32", source.read(name))
    for stem, tensors in files.items():
        save(folder / f"{stem}.safetensors", tensors)


def waypoints() -> Constraints:
    at, rng = np.arange(0, FRAMES, EVERY), np.random.default_rng(3)
    path = np.cumsum(0.03 * rng.standard_normal((len(at), 3)), 0) * [1, 0, 1] + [0, 0.9, 0]
    return Constraints([Waypoints(j, at, path + 0.3 * i) for i, j in enumerate(JOINTS)], HUMANML3D)


def flops(c: MoTokConfig) -> tuple[float, float]:
    """Of one denoise of FRAMES frames, multiply-add = 2: nominal, as the module is drawn, and without the condition's
    embedding, which the engine folds into the decoder."""
    d = c.denoiser
    block = d.kernel * d.width**2 + 2 * d.width**2 + 3 * d.width**2
    done = 2 * c.features * d.width + d.blocks * block + 2 * d.width**2
    return 2.0 * FRAMES * (done + c.latent * d.width), 2.0 * FRAMES * done
