"""What looks at pictures: a VAE, a generator that only learns to denoise, a semantic tower that only learns to name.

Weights have their published names and run through the engine's references, so what is trained is what is shipped.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from rooms import COLOURS, FRAMES, SHAPES, SIZE
from torch import Tensor, nn

from engine.blocks.siglip import SiglipConfig, siglip_shapes
from engine.models.vega3d import generator_reference as wan
from engine.models.vega3d import reference
from engine.models.vega3d.generator_config import DitConfig, Tap, VaeConfig
from engine.models.vega3d.generator_weights import dit_shapes, vae_shapes
from engine.models.vega3d.schedule import noise_level
from engine.models.vega3d.weights import VISION
from examples.tiny.fitting import train

Weights = dict[str, Tensor]
VAE = VaeConfig(dim=16, z=8, mult=(1, 2, 4), blocks=1, mean=(0.0,) * 8, std=(1.0,) * 8)
DIT = DitConfig(dim=96, ffn=256, heads=4, layers=6, channels=8, freq_dim=64, text_len=8, text_dim=32)
TAP = Tap(size=(SIZE, SIZE), timestep=200, block=3, grid=(6, 6))
EYES = SiglipConfig(width=96, depth=4, heads=4, mlp=256, patch_size=16, image_size=SIZE)
NAMED, UNSURE = 0.2, 0.06  # shares of a patch: a solid is named from the first on, and is none up to the second


def begin(shapes: dict[str, tuple[int, ...]], generator: torch.Generator) -> Weights:
    """Weights to train: norms one, biases and positions zero, the rest by fan-in; of kernels in time only the last tap,
    which is all that one frame meets."""
    out = {}
    for name, shape in shapes.items():
        norm = ("norm" in name or "gamma" in name) and not name.endswith("bias")
        value = torch.full(shape, float(norm))
        if not norm and len(shape) > 1 and "position_embedding" not in name:
            fan = int(np.prod(shape[1:])) // (shape[2] if len(shape) == 5 else 1)
            noise = torch.randn(shape, generator=generator) * (0.1 if "modulation" in name else fan**-0.5)
            if len(shape) == 5 and shape[2] > 1:
                value[:, :, -1] = noise[:, :, -1]
            else:
                value = noise
        out[name] = value.requires_grad_()
    return out


def pixels(frames: Tensor) -> Tensor:
    """[N, S, S, 3] uint8 to [N, 3, S, S] in [-1, 1]."""
    return frames.permute(0, 3, 1, 2).float() / 127.5 - 1


# ---- VAE ------------------------------------------------------------------------------------------------------------


class Decoder(nn.Sequential):
    """Pictures from latents: for training only."""

    def __init__(self, z: int) -> None:
        def up(cin: int, cout: int) -> list[nn.Module]:
            return [nn.Upsample(scale_factor=2), nn.Conv2d(cin, cout, 3, padding=1), nn.SiLU(),
                    nn.Conv2d(cout, cout, 3, padding=1), nn.SiLU()]  # fmt: skip

        super().__init__(nn.Conv2d(z, 64, 3, padding=1), nn.SiLU(), nn.Conv2d(64, 64, 3, padding=1), nn.SiLU(),
                         *up(64, 32), *up(32, 16), nn.Conv2d(16, 3, 3, padding=1))  # fmt: skip


def train_vae(frames: Tensor, steps: int, seed: int) -> tuple[Weights, dict[str, list[float]]]:
    """The encoder, and the `mean` and `std` of its latents by channel. frames [N, S, S, 3] uint8."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    w, decoder = begin(vae_shapes(VAE), g), Decoder(VAE.z)

    def loss(step: int) -> Tensor:
        x = pixels(frames[torch.randint(len(frames), (24,), generator=g)])
        with torch.autocast("cpu", torch.bfloat16):
            z = wan.vae_encode(w, VAE, x).float()
            y = decoder(z + 0.05 * torch.randn(z.shape, generator=g)).float()
        return (y - x).abs().mean() + 1e-3 * z.square().mean()

    train("VAE", [*w.values(), *decoder.parameters()], loss, steps, 2e-3)
    w = {k: v.detach() for k, v in w.items()}
    z = encode(w, VAE, frames[torch.randperm(len(frames), generator=g)[:512]]).float()
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3)).clamp(min=1e-3)
    return w, {"mean": mean.tolist(), "std": std.tolist()}


@torch.no_grad()
def encode(w: Weights, c: VaeConfig, frames: Tensor, per: int = 64) -> Tensor:
    """Latents bf16 [N, z, h, w]."""
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([wan.vae_encode(w, c, pixels(part)).bfloat16() for part in frames.split(per)])


# ---- generator ------------------------------------------------------------------------------------------------------


def train_generator(latents: Tensor, prompt: Tensor, steps: int, seed: int) -> Weights:
    """Flow matching on single frames (Lipman et al. 2023): the velocity from clean to noise at any level."""
    g = torch.Generator().manual_seed(seed)
    w = begin(dit_shapes(DIT), g)

    def loss(step: int) -> Tensor:
        z = latents[torch.randint(len(latents), (32,), generator=g)].float()[:, :, None]
        sigma = torch.sigmoid(torch.randn(32, generator=g))
        noise = torch.randn(z.shape, generator=g)
        level = sigma[:, None, None, None, None]
        with torch.autocast("cpu", torch.bfloat16):
            v = wan.denoise(w, DIT, (1 - level) * z + level * noise, prompt, 1000 * sigma)
        return F.mse_loss(v.float(), noise - z)

    train("generator", w.values(), loss, steps, 1.5e-3)
    return {k: v.detach() for k, v in w.items()}


@torch.no_grad()
def generative(w: Weights, latents: Tensor, prompt: Tensor, seed: int, tap: Tap = TAP, per: int = 64) -> Tensor:
    """Features bf16 [N, cells, C] of latents [N, z, h, w]."""
    g = torch.Generator().manual_seed(seed)
    t, alpha, sigma = noise_level(tap.timestep, tap.shift)
    side, out = latents.shape[-1] // DIT.patch, []
    for z in latents.split(per):
        noisy = alpha * z.float() + sigma * torch.randn(z.shape, generator=g)
        with torch.autocast("cpu", torch.bfloat16):
            x = wan.features(w, DIT, noisy[:, :, None], prompt, t, tap.block)
        out.append(wan.pooled(x.float(), side, side, tap).bfloat16())
    return torch.cat(out)


# ---- semantic tower -------------------------------------------------------------------------------------------------


def names_of(which: np.ndarray, colour: np.ndarray, shape: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colour and shape of each pixel as number + 1 (0: no solid), int8, of pixels' solids and the solids' names."""
    there = which >= 0
    return (np.where(there, colour[which] + 1, 0).astype(np.int8), np.where(there, shape[which] + 1, 0).astype(np.int8))


def train_eyes(frames: Tensor, colour: Tensor, shape: Tensor, steps: int, seed: int) -> Weights:
    """Names what each patch shows, wherever and however large it is: pictures are flipped, shifted and scaled.

    frames [N, S, S, 3] uint8; colour, shape [N, S, S] int8 of each pixel.
    """
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    w = begin(siglip_shapes(VISION, EYES), g)
    heads = nn.ModuleList([nn.Linear(EYES.width, len(COLOURS) + 1), nn.Linear(EYES.width, len(SHAPES) + 1)])

    def loss(step: int) -> Tensor:
        at = torch.randint(len(frames), (96,), generator=g)
        x, labels = pixels(frames[at]), torch.stack([colour[at], shape[at]], 1)
        zoom = 0.75 + 0.6 * torch.rand(96, generator=g)
        flip = torch.where(torch.rand(96, generator=g) < 0.5, -1.0, 1.0)
        shift = 0.9 * torch.rand(96, 2, generator=g) - 0.45
        theta = torch.zeros(96, 2, 3)
        theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = zoom * flip, zoom, shift
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
        y = F.grid_sample(labels.float(), grid, mode="nearest", padding_mode="reflection", align_corners=False)
        p, side = EYES.patch_size, EYES.side
        y = y.long().unflatten(3, (side, p)).unflatten(2, (side, p)).transpose(3, 4).flatten(4).flatten(2, 3)
        shares = F.one_hot(y[:, 0], len(COLOURS) + 1).float().mean(2)
        most, winner = shares[..., 1:].max(-1)
        mine = y[:, 0] == (winner + 1)[..., None]
        form = (y[:, 1] * mine).amax(-1)
        sure = (most >= NAMED) | (most <= UNSURE)
        first = torch.where(sure, torch.where(most >= NAMED, winner + 1, 0), -100)
        second = torch.where(sure, torch.where(most >= NAMED, form, 0), -100)
        with torch.autocast("cpu", torch.bfloat16):
            told = reference.siglip(w, EYES, x)
            one, two = (head(told).float().flatten(0, 1) for head in heads)
        return F.cross_entropy(one, first.flatten()) + F.cross_entropy(two, second.flatten())

    train("semantic tower", [*w.values(), *heads.parameters()], loss, steps, 2e-3)
    return {k: v.detach() for k, v in w.items()}


@torch.no_grad()
def semantic(w: Weights, frames: Tensor, per: int = 128) -> Tensor:
    """Features bf16 [N, tokens, C]."""
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([reference.siglip(w, EYES, pixels(part)).bfloat16() for part in frames.split(per)])


def rooms(features: Tensor) -> Tensor:
    """[N, cells, C] of frames to [rooms, T * cells, C]."""
    return features.unflatten(0, (-1, FRAMES)).flatten(1, 2)
