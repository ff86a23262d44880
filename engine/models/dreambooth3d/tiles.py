"""Frames and latents of any size through the VAE's tiles, which fade into one another as the released model's do.

Tiles are part of the result: attention and repeated edges see a tile alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine.errors import InputError
from engine.models.dreambooth3d.vae import Vae
from engine.runtime.plan import Plan, capture

LOG_VARIANCES = (-30.0, 20.0)  # what they are kept within


@dataclass(frozen=True)
class Tiling:
    """pixels: of a tile's edge. overlap: share of it that neighbours share. As released: 256 and 1/8, or 128 and 1/4
    where memory is short; 0 pixels: one tile, however large."""

    pixels: int = 256
    overlap: float = 0.125

    def checked(self, cell: int) -> Tiling:
        """Itself. Raises: InputError for what is no whole number of cells of so many pixels."""
        if type(self.pixels) is not int or self.pixels < 0 or self.pixels % cell or not 0 <= self.overlap < 1:
            raise InputError(
                f"tiles of {self.pixels!r} pixels, overlap {self.overlap!r}: a multiple of {cell}, and [0, 1)"
            )
        if not (self.pixels // cell * self.overlap).is_integer():
            raise InputError(
                f"tiles of {self.pixels} pixels that share {self.overlap}: whole cells of {cell} are needed"
            )
        return self


def faded(parts: list[list[np.ndarray]], count: int, keep: int) -> np.ndarray:
    """One array of tiles [T, h, w, c]: the first `count` rows and columns of each fade in over the last ones of its
    neighbours above and to the left, which have been faded themselves; its first `keep` are kept."""
    for i, row in enumerate(parts):
        for j, part in enumerate(row):
            if i:
                part = _over(parts[i - 1][j], part, count, 1)
            if j:
                part = _over(row[j - 1], part, count, 2)
            row[j] = part
    return np.concatenate([np.concatenate([p[:, :keep, :keep] for p in row], 2) for row in parts], 1)


def _over(before: np.ndarray, part: np.ndarray, count: int, axis: int) -> np.ndarray:
    count = min(before.shape[axis], part.shape[axis], count)
    if not count:
        return part
    share = (np.arange(count, dtype=np.float32) / np.float32(count)).reshape([-1 if a == axis else 1 for a in range(4)])
    end = np.take(before, range(before.shape[axis] - count, before.shape[axis]), axis)
    head, tail = np.split(part, [count], axis)
    return np.concatenate([end * (1 - share) + head * share, tail], axis)


class Tiles:
    """A VAE for sizes beyond a tile. All arrays f32, channels last."""

    def __init__(self, vae: Vae, tiling: Tiling, plans: dict[str, Plan]) -> None:
        """plans: where the plans of tiles are kept, by name; one per shape, when it is first met."""
        self._vae, self._tiling, self._plans = vae, tiling.checked(vae.c.spatial), plans

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """Pixels [F, H, W, 3], around [-1, 1], of a latent [T, h, w, z] in the sampler's scale."""
        v, cell = self._vae, self._vae.c.spatial

        def run(part: np.ndarray) -> np.ndarray:
            t, h, w, z = part.shape
            plan = self._plan("decode", t, h, w)
            v.latent.rows(0, t * h * w).write(part.reshape(-1, z))
            plan.replay()
            frames = (t - 1) * v.c.temporal + 1
            return v.pixels.rows(0, frames * h * w * cell * cell).read().reshape(frames, h * cell, w * cell, 3)

        return self._through(latent, 1, cell, run)

    def encode(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means and deviations [T, h, w, z] of the latent of frames [F, H, W, 3] in [-1, 1], in the sampler's scale."""
        v, c = self._vae, self._vae.c

        def run(part: np.ndarray) -> np.ndarray:
            frames, h, w, _ = part.shape
            t, h, w = (frames - 1) // c.temporal + 1, h // c.spatial, w // c.spatial
            plan = self._plan("encode", t, h, w)
            v.pixels.rows(0, part.size // 3).write(part.reshape(-1, 3))
            plan.replay()
            return v.moments.rows(0, t * h * w).read().reshape(t, h, w, 2 * c.z)

        if (len(pixels) - 1) % c.temporal or pixels.shape[1] % c.spatial or pixels.shape[2] % c.spatial:
            raise InputError(
                f"frames {list(pixels.shape)}: {c.temporal}n + 1 of them, sides multiples of {c.spatial} pixels"
            )
        mean, log = np.split(self._through(pixels, c.spatial, 1, run), 2, -1)
        return mean * np.float32(c.scaling), np.exp(0.5 * np.clip(log, *LOG_VARIANCES)) * np.float32(c.scaling)

    def _plan(self, kind: str, t: int, h: int, w: int) -> Plan:
        """Of a tile's shape, with the tables of that shape in place."""
        name = f"{kind}.{t}x{h}x{w}"
        if name not in self._plans:
            self._plans[name] = capture(getattr(self._vae, kind)(t, h, w), name)
        self._vae.place_tile(h, w)
        return self._plans[name]

    def _through(self, x: np.ndarray, before: int, behind: int, run: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """run on tiles of x; before, behind: places of a cell in front of it and behind it."""
        t, cell = self._tiling, self._vae.c.spatial
        if not t.pixels:
            return run(x)
        cells = t.pixels // cell
        step = round(cells * before * (1 - t.overlap))
        size = cells * before
        starts = [(i, j) for i in range(0, x.shape[1], step) for j in range(0, x.shape[2], step)]
        made: dict[tuple[int, int], np.ndarray] = {}
        # Those of one shape one after another: its tables are written once.
        for i, j in sorted(starts, key=lambda at: x[:, at[0] : at[0] + size, at[1] : at[1] + size].shape):
            made[i, j] = run(np.ascontiguousarray(x[:, i : i + size, j : j + size]))
        blend = int(cells * behind * t.overlap)
        parts = [[made[i, j] for j in range(0, x.shape[2], step)] for i in range(0, x.shape[1], step)]
        return faded(parts, blend, cells * behind - blend)
