"""What video diffusion transformers share (Peebles & Xie 2023)."""

from __future__ import annotations

import numpy as np


def time_sinusoid(timestep: float, width: int) -> np.ndarray:
    """f64 [width]: cosines, then sines, of timestep * 10000^(-2i / width)."""
    half = width // 2
    angle = timestep * 10000.0 ** (-np.arange(half) / half)
    return np.concatenate([np.cos(angle), np.sin(angle)])
