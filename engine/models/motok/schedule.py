"""What is known of sampling before it begins: signal that noise leaves, constants of each step, tokens of each pass."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from engine.models.motok.config import Diffusion


def alpha_bars(d: Diffusion) -> np.ndarray:
    """Signal variance [steps] fp64 after every training step."""
    if d.beta_schedule == "linear":
        beta = np.linspace(1e-4, 0.02, d.steps, dtype=np.float64)
    else:
        bar = np.cos((np.arange(d.steps + 1) / d.steps + 0.008) / 1.008 * np.pi / 2) ** 2
        beta = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    return np.cumprod(1 - beta)


@dataclass(frozen=True)
class Update:
    """x' = clean * x0 + x * state + sigma * noise, of one sampled step."""

    clean: float
    state: float
    sigma: float


def updates(d: Diffusion) -> list[Update]:
    """Of every sampled step; index 0 is the clean end (DDIM, Song et al. 2021, eq. 12 with eta 0; DDPM, Ho et al.
    2020, eq. 7)."""
    kept = alpha_bars(d)
    out, after = [], 1.0
    for k, t in enumerate(d.timesteps):
        bar_t = float(kept[t])
        beta = 1 - bar_t / after
        if d.sampler == "ddim":
            state = math.sqrt((1 - after) / (1 - bar_t))
            out.append(Update(math.sqrt(after) - state * math.sqrt(bar_t), state, 0.0))
        else:
            variance = beta if d.variance == "fixed_large" else beta * (1 - after) / (1 - bar_t)
            clean = beta * math.sqrt(after) / (1 - bar_t)
            state = (1 - after) * math.sqrt(1 - beta) / (1 - bar_t)
            out.append(Update(clean, state, math.sqrt(variance) if k else 0.0))
        after = bar_t
    return out


def masked_counts(length: int, steps: int) -> list[int]:
    """How many of `length` tokens each of the discrete planner's passes draws, by a quarter of a cosine.

    Halves go down, as the fp32 arithmetic of the original has it for ten steps.
    """
    share = [math.cos(i / max(steps - 1, 1) * math.pi / 2) for i in range(steps)]
    return [min(length, max(1, round(s * length - 1e-9))) for s in share]
