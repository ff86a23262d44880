"""Noise levels, sinusoids, rotations and sizes of HunyuanVideo-1.5 (flow matching; Lipman et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from engine.errors import InputError
from engine.io.values import show

STRIDE = 16  # pixels of a latent's cell
BASES = {"720p": 960, "480p": 640}  # pixels of the edge of a square of as many pixels
MAX_RATIO = 4


def noise_levels(steps: int, shift: float) -> np.ndarray:
    """f64 [steps + 1] from 1 to 0: sigma before each step and behind the last; a timestep is 1000 sigma.

    Raises: InputError for a number of steps or a shift that is not positive.
    """
    if type(steps) is not int or steps < 1 or not 0 < shift < np.inf:
        raise InputError(f"steps={steps!r}, shift={shift!r}: at least one step and a positive shift are needed")
    s = 1.0 - np.arange(steps + 1) / steps
    return shift * s / (1 + (shift - 1) * s)


def given_levels(timesteps: Sequence[float]) -> np.ndarray:
    """f64 [n + 1]: sigma of timesteps in (0, 1000], which fall, and 0 behind them: of distilled checkpoints.

    Raises: InputError for others.
    """
    try:
        levels = np.array([*timesteps, 0.0], np.float64) / 1000
    except (TypeError, ValueError) as fault:
        raise InputError(f"timesteps={show(timesteps)} are no numbers") from fault
    if len(levels) < 2 or not (0 < levels[0] <= 1 and (np.diff(levels) < 0).all()):
        raise InputError(f"timesteps={show(timesteps)} must fall within (0, 1000]")
    return levels


def computed_steps(steps: int, every: int) -> list[bool]:
    """Which steps run where the others repeat the last velocity: all of the first fifth and of the last tenth, and
    every so many in between (as the base's published cache has it: 11 and 5 of 50, every fourth)."""
    first, last = math.ceil(0.22 * steps), steps - math.ceil(0.1 * steps)
    return [i < first or i >= last or (i - first) % every == 0 for i in range(steps)]


def rotation_angles(
    frames: int, rows: int, columns: int, axes: tuple[int, int, int], theta: float, first: int = 0
) -> np.ndarray:
    """f64 [frames * rows * columns, sum(axes) / 2]: angle of each pair of channels of a head, tokens by frame and row.

    first: time of the first frame. A reference is one frame, with its number as its time.
    """
    at = np.stack(np.meshgrid(np.arange(first, first + frames), np.arange(rows), np.arange(columns), indexing="ij"), -1)
    parts = [at.reshape(-1, 3)[:, i : i + 1] * theta ** (-2.0 * np.arange(n // 2) / n) for i, n in enumerate(axes)]
    return np.concatenate(parts, 1)


def bucket(height: float, width: float, resolution: str = "720p") -> tuple[int, int]:
    """(height, width) in pixels of the allowed size whose shape is nearest to the one asked for.

    Raises: InputError for sizes that are not positive, and another resolution than those of BASES.
    """
    if resolution not in BASES or not (0 < height < np.inf and 0 < width < np.inf):
        raise InputError(
            f"{height!r} x {width!r} at {resolution!r}: two positive numbers and one of {', '.join(BASES)}"
        )
    limit = (BASES[resolution] // STRIDE) ** 2
    sizes, a, b = [], 1, limit
    # Down the staircase of the largest sizes: one cell higher while that fits, else one narrower.
    while b:
        if max(a, b) <= MAX_RATIO * min(a, b):
            sizes.append((a, b))
        if (a + 1) * b <= limit:
            a += 1
        else:
            b -= 1
    a, b = min(sizes, key=lambda s: abs(s[0] / s[1] - height / width))
    return a * STRIDE, b * STRIDE


def latent_frames(frames: int, stride: int = 4) -> int:
    """Latent frames of stride n + 1 frames. Raises: InputError for another number."""
    if type(frames) is not int or frames < 1 or (frames - 1) % stride:
        raise InputError(f"frames={frames!r}; {stride}n + 1 are needed, such as {12 * stride + 1} or {20 * stride + 1}")
    return (frames - 1) // stride + 1
