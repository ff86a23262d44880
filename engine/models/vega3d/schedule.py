"""The generator's noise levels: flow matching with a shifted schedule (Wan 2.1; Lipman et al. 2023)."""

from __future__ import annotations

import numpy as np

from engine.models.vega3d.generator_config import TRAIN_STEPS

SIGMA_MAX = 0.999


def noise_level(target: int, shift: float = 5.0) -> tuple[int, float, float]:
    """(timestep, alpha, sigma) of the schedule's step nearest to `target` of 1000; z = alpha * z0 + sigma * noise.

    Timesteps are cut to integers; where two steps share one, the second gives sigma.
    """
    s = np.linspace(SIGMA_MAX, 0.0, TRAIN_STEPS + 1)[:-1]
    sigmas = (shift * s / (1 + (shift - 1) * s)).astype(np.float32)
    steps = (sigmas * np.float32(TRAIN_STEPS)).astype(np.int64)
    at = int(np.abs(steps - target).argmin())
    if at + 1 < len(steps) and steps[at + 1] == steps[at]:
        at += 1
    sigma = float(sigmas[at])
    return int(steps[at]), 1 - sigma, sigma


def rotation_angles(rows: int, columns: int, head_dim: int) -> np.ndarray:
    """f64 [rows * columns, head_dim / 2]: angle of each pair of channels at each cell of one frame, row by row.

    Pairs belong to time (always at 0 here), height and width, in that order: a half less two thirds, and a third each.
    """
    half = head_dim // 2
    axis = half // 3
    y, x = np.divmod(np.arange(rows * columns), columns)
    angles = np.zeros((rows * columns, half))
    for position, first in ((y, half - 2 * axis), (x, half - axis)):
        angles[:, first : first + axis] = position[:, None] * 10000.0 ** (-np.arange(axis) / axis)
    return angles
