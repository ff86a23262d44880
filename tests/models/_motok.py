"""Deterministic weights and inputs of MoTok: a hash of the tensor's name and of the index of the entry."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.models.motok.guidance_reference import Targets, recover_from_ric

# Tables that follow from the sizes.
DERIVED = ("position_enc.pe", "pos_embed.embed")


def hashed(key: str, count: int) -> np.ndarray:
    """`count` numbers in [-1, 1), fp64, the same everywhere for a key."""
    start = 0x9E3779B9 * zlib.crc32(key.encode()) % 2**32
    out = np.empty(count)
    for low in range(0, count, 1 << 20):
        part = out[low : low + (1 << 20)]
        h = np.arange(low, low + len(part), dtype=np.uint32) + np.uint32(start)
        h ^= h >> 16
        h *= np.uint32(0x85EBCA6B)
        h ^= h >> 13
        h *= np.uint32(0xC2B2AE35)
        h ^= h >> 16
        np.multiply(h, 2.0**-31, out=part)
        part -= 1
    return out


def uniform(key: str, *shape: int) -> torch.Tensor:
    return torch.from_numpy(hashed(key, math.prod(shape))).view(shape)


def normal(key: str, *shape: int) -> torch.Tensor:
    """Uniform numbers of variance 1."""
    return math.sqrt(3) * uniform(key, *shape)


def filled(module: nn.Module, prefix: str = "") -> nn.Module:
    """`module` in fp64 with deterministic weights of about unit gain."""
    module.double()
    with torch.no_grad():
        for key, tensor in module.state_dict().items():
            if key.endswith(DERIVED):
                continue
            u = uniform(prefix + key, *tensor.shape)
            if key == "quantizer.codebook":
                u *= 0.5
            elif tensor.ndim >= 2:
                u *= math.sqrt(3 / math.prod(tensor.shape[1:]))
            elif key.endswith("weight"):
                u = 1 + 0.1 * u
            else:
                u *= 0.05
            tensor.copy_(u)
    return module.requires_grad_(False).eval()


def single_waves(rows: int, width: int) -> torch.Tensor:
    """The position table in fp32 arithmetic, as the golden logits were made with."""
    rate = torch.exp(torch.arange(0, width, 2).float() * (-math.log(10_000.0) / width))
    angle = torch.arange(rows).float()[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, None]


def group_std(joints: int = 22) -> torch.Tensor:
    """Standard deviations of HumanML3D to three digits, constant within a group of features."""
    groups = ((0.0128, 1), (0.0169, 2), (0.1538, 1), (0.1222, 3 * (joints - 1)), (0.2997, 6 * (joints - 1)),
              (0.0195, 3 * joints), (0.3559, 4))  # fmt: skip
    return torch.cat([torch.full((count,), value, dtype=torch.float64) for value, count in groups])


def statistics(joints: int = 22) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of a motion, metres."""
    mean = torch.zeros(12 * joints - 1, dtype=torch.float64)
    mean[3] = 0.9
    return mean, group_std(joints)


def constrained(frames: int = 64, joints: tuple[int, ...] = (0, 20), every: int = 3, of: int = 22, scale: float = 1.0,
                reach: float = 0.2) -> tuple[torch.Tensor, Targets]:  # fmt: skip
    """A motion x [frames, 12 * of - 1], and constraints around where some of its joints are; lengths are 1 / scale
    metres."""
    mean, std = statistics(of)
    stretch = torch.ones_like(mean)
    stretch[1 : 4 + 3 * (of - 1)] = 1 / scale
    mean, std = mean * stretch, std * stretch
    x = normal("guide.x", frames, len(mean))
    target = scale * recover_from_ric(x * std + mean) + reach * uniform("guide.target", frames, of, 3)
    mask = torch.zeros(frames, of, dtype=torch.bool)
    mask[::every, list(joints)] = True
    return x, Targets(target, mask, mean, std, scale)


def check(x: Tensor, first: list[float], last: float | None, total: float, squares: float, rel: float = 1e-9) -> None:
    """Compare with golden numbers: the first four entries, the last one, sum and sum of squares."""
    x = x.flatten()
    scale = float(x.square().mean().sqrt())
    assert x[:4].tolist() == pytest.approx(first, rel=rel, abs=rel * scale)
    assert last is None or float(x[-1]) == pytest.approx(last, rel=rel, abs=rel * scale)
    assert float(x.sum()) == pytest.approx(total, rel=rel)
    assert float(x.square().sum()) == pytest.approx(squares, rel=rel)


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small products, and a second thread waits for a core that something else uses."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def reachable(**case: Any) -> tuple[Tensor, Targets]:
    x, c = constrained(**case)
    target = c.target.clone()
    target[0, 0, [0, 2]] = 0
    return x, replace(c, target=target)
