"""The VAE, on single pictures: its latents have a frame for each of a clip's (through the engine's reference)."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.dreambooth3d import vae_reference as vae
from engine.models.dreambooth3d.config import VaeConfig
from engine.models.dreambooth3d.weights import vae_shapes
from examples.tiny.fitting import train

Weights = dict[str, Tensor]
VAE = VaeConfig((16, 16, 32, 32), 1, 16, spatial=8, temporal=1, scaling=1.0)
KL = 2e-5


def begin(shapes: dict[str, tuple[int, ...]], generator: torch.Generator) -> Weights:
    """Weights to train: norms one, biases zero, the rest by fan-in."""
    out = {}
    for name, shape in shapes.items():
        if name.endswith("gamma"):
            out[name] = torch.ones(shape)
        elif len(shape) > 1:
            out[name] = torch.randn(shape, generator=generator) * math.prod(shape[1:]) ** -0.5 * 0.6
        else:
            out[name] = torch.zeros(shape)
        out[name].requires_grad_()
    return out


def pixels(clips: np.ndarray) -> Tensor:
    """u8 [N, T, S, S, 3] to [N, 3, T, S, S] in [-1, 1]."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def moments(w: Weights, c: VaeConfig, x: Tensor) -> tuple[Tensor, Tensor]:
    """Means and deviations [N, z, t, h, w] of [N, 3, T, S, S]."""
    mean, log = torch.func.vmap(lambda clip: vae.encode(w, c, clip))(x).float().chunk(2, 1)
    return mean, (0.5 * log.clamp(-30, 20)).exp()


def decoded(w: Weights, c: VaeConfig, z: Tensor) -> Tensor:
    """[N, 3, T, S, S] of [N, z, t, h, w]."""
    return torch.func.vmap(lambda latent: vae.decode(w, c, latent))(z).float()


def whole(w: Weights) -> Weights:
    """Kernels [out, in, 3, 3] as the last of three taps in time: every frame is encoded alone."""
    return {k: F.pad(v[:, :, None], (0, 0, 0, 0, 2, 0)) if k.endswith("conv.weight") else v for k, v in w.items()}


def train_vae(pictures: np.ndarray, steps: int, seed: int) -> Weights:
    """pictures u8 [N, S, S, 3]."""
    g = torch.Generator().manual_seed(seed)
    shapes = {k: (*s[:2], *s[3:]) if k.endswith("conv.weight") else s for k, s in vae_shapes(VAE).items()}
    w = begin(shapes, g)

    def loss(step: int) -> Tensor:
        at = torch.randint(len(pictures), (24,), generator=g).numpy()
        x = pixels(pictures[at][:, None])
        kernels = whole(w)
        mean, deviation = moments(kernels, VAE, x)
        y = decoded(kernels, VAE, mean + deviation * torch.randn(mean.shape, generator=g))
        divergence = 0.5 * (mean.square() + deviation.square() - 1 - 2 * deviation.log()).sum(1).mean()
        return F.l1_loss(y, x) + F.mse_loss(y, x) + KL * divergence

    train("VAE", w.values(), loss, steps, 3e-3, every=200)
    return {k: v.detach() for k, v in whole(w).items()}


@torch.no_grad()
def encoded(w: Weights, c: VaeConfig, pictures: np.ndarray, per: int = 48) -> Tensor:
    """Means f32 [N, z, h, w] of u8 [N, S, S, 3]."""
    parts = [pictures[first : first + per] for first in range(0, len(pictures), per)]
    return torch.cat([moments(w, c, pixels(part[:, None]))[0][:, :, 0] for part in parts])


@torch.no_grad()
def psnr(w: Weights, c: VaeConfig, pictures: np.ndarray) -> float:
    """Of pictures behind encoding and decoding, dB."""
    x = pixels(pictures[:, None])
    y = decoded(w, c, moments(w, c, x)[0]).clamp(-1, 1)
    return float(-10 * ((y - x) / 2).square().mean((1, 2, 3, 4)).log10().mean())
