"""What video diffusion transformers share, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RMS_FLOOR = 1e-12  # of a vector's length


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """Heads x [..., L, head_dim] by angles [L, head_dim / 2]: neighbours are pairs."""
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def channel_rms(x: Tensor, gamma: Tensor) -> Tensor:
    """x [N, C, ...] / max(|x|, 1e-12) * sqrt(C) * gamma, over channels."""
    shape = (1, -1, *(1,) * (x.dim() - 2))
    return F.normalize(x, dim=1, eps=RMS_FLOOR) * x.shape[1] ** 0.5 * gamma.reshape(shape)
