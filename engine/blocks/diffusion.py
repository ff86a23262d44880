"""What video diffusion transformers share (Peebles & Xie 2023)."""

from __future__ import annotations

import math

import numpy as np

NORM_EPS = 1e-26  # of the VAEs' norms, which only keep zero rows from dividing by zero


def time_sinusoid(timestep: float, width: int, dtype: type[np.floating] = np.float64) -> np.ndarray:
    """[width]: cosines, then sines, of timestep * 10000^(-2i / width), every step of it in `dtype`.

    At late times the rounding of fp32 moves a sine by 1e-4: models that were trained so are run so.
    """
    angle = dtype(timestep) * time_frequencies(width, dtype)
    return np.concatenate([np.cos(angle), np.sin(angle)])


def time_frequencies(width: int, dtype: type[np.floating] = np.float64) -> np.ndarray:
    """[width / 2] of `time_sinusoid`."""
    half = width // 2
    exponent = -np.log(dtype(10000)) * np.arange(half, dtype=dtype) / dtype(half)
    return np.exp(exponent.astype(np.float64)).astype(dtype)  # exp is rounded once


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x), of any floating dtype."""
    return x / (1 + np.exp(-x))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """GELU by its tanh approximation, of any floating dtype."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
