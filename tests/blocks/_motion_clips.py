"""Made-up motions with stiff bones, and the deterministic numbers of the golden values."""

from __future__ import annotations

from zlib import crc32

import numpy as np

from engine.blocks.motion.features import place_along
from engine.blocks.motion.rotations import unit, yaw
from engine.blocks.motion.skeleton import HUMANML3D, Skeleton


def clip(frames: int, seed: int = 0, skeleton: Skeleton = HUMANML3D, spin: float = 0.0) -> np.ndarray:
    """[frames, J, 3] fp64: a person who wanders, turns and moves every limb; `spin` rad/s on top."""
    random = np.random.default_rng(seed)
    t = np.arange(frames)[:, None] / skeleton.fps

    def wave(n: int, size: float, fastest: float) -> np.ndarray:
        parts = [
            random.normal(size=n) * np.sin(2 * np.pi * t * random.uniform(0.1, fastest, n) + random.uniform(0, 6.3, n))
            for _ in range(3)
        ]
        return size * np.sum(parts, axis=0)

    directions = skeleton.axes + 0.25 * wave(3 * skeleton.joints, 1, 1).reshape(frames, -1, 3)
    for j in skeleton.facing:
        directions[:, j, 1:] *= 0.3  # hips and shoulders stay beside each other, so that the heading is clear
    directions = unit(directions, (0, 1, 0))
    turn = yaw(wave(1, 0.6, 0.3)[:, 0] + spin * t[:, 0] + 0.7)
    lengths = np.full(skeleton.joints, 0.25) if skeleton.lengths is None else np.array(skeleton.lengths)
    root = wave(3, 0.3, 0.5) + np.array([2, 1, -3])
    return place_along((turn[:, None] @ directions[..., None])[..., 0], root, skeleton, lengths)


def uniform(key: str, *shape: int) -> np.ndarray:
    """Numbers in [-1, 1) that depend on the key and the place only: murmur3's last mixing of a counter."""
    low = np.uint64(2**32 - 1)
    h = np.arange(np.prod(shape), dtype=np.uint64) + np.uint64((0x9E3779B9 * crc32(key.encode())) % 2**32) & low
    h ^= h >> np.uint64(16)
    h = h * np.uint64(0x85EBCA6B) & low
    h ^= h >> np.uint64(13)
    h = h * np.uint64(0xC2B2AE35) & low
    h ^= h >> np.uint64(16)
    return (h / 2**31 - 1).reshape(shape)
