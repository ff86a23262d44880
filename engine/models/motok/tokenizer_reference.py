"""MoTok's tokenizer, diffusion decoder and sampler in torch; see reference.py. Source: section 3.2, table 3."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import InputError
from engine.models.motok.config import Denoiser, Diffusion, MoTokConfig
from engine.models.motok.schedule import alpha_bars

DENOISER_EPS = 1e-6


def wide(x: Tensor) -> Tensor:
    """fp64 stays, everything narrower becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


# ---- tokenizer ------------------------------------------------------------------------------------------------------


class Res(nn.Module):
    """x [B, C, T] -> the same shape."""

    def __init__(self, width: int, dilation: int):
        super().__init__()
        self.conv1 = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.conv2 = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class ResStack(nn.Module):
    """Residual blocks, the widest dilation first."""

    def __init__(self, c: MoTokConfig):
        super().__init__()
        self.model = nn.Sequential(*(Res(c.width, c.dilation_growth**i) for i in reversed(range(c.depth))))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Encoder(nn.Module):
    """Convolutions that halve time: x [B, T, channels] -> [B, T / rate, out]."""

    def __init__(self, c: MoTokConfig, channels: int, out: int):
        super().__init__()
        stages = [nn.Sequential(nn.Conv1d(c.width, c.width, 4, 2, 1), ResStack(c)) for _ in range(c.down_t)]
        first, last = nn.Conv1d(channels, c.width, 3, padding=1), nn.Conv1d(c.width, out, 3, padding=1)
        self.model = nn.Sequential(first, nn.ReLU(), *stages, last)
        self.rate = c.rate

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 0 or x.shape[1] % self.rate:
            raise InputError(f"{x.shape[1]} frames are not a multiple of {self.rate}, the frames of a token")
        return self.model(x.transpose(1, 2)).transpose(1, 2)


class Decoder(nn.Module):
    """Convolutions that double time: codes [B, N, latent] -> condition per frame [B, T, latent], not a motion."""

    def __init__(self, c: MoTokConfig):
        super().__init__()

        def conv(channels: int, out: int) -> nn.Conv1d:
            return nn.Conv1d(channels, out, 3, padding=1)

        stages = [nn.Sequential(ResStack(c), nn.Upsample(scale_factor=2), conv(c.width, c.width))
                  for _ in range(c.down_t)]  # fmt: skip
        head = [conv(c.width, c.width), nn.ReLU(), conv(c.width, c.latent)]
        self.model = nn.Sequential(conv(c.latent, c.width), nn.ReLU(), *stages, *head)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.transpose(1, 2)).transpose(1, 2)


class Quantizer(nn.Module):
    codebook: Tensor

    def __init__(self, c: MoTokConfig):
        super().__init__()
        self.register_buffer("codebook", torch.randn(c.codes, c.latent))  # training moves it by averages

    def forward(self, h: Tensor) -> Tensor:
        """h [..., latent] -> number of the nearest code [...] int64, the lowest of equals (eq. 2)."""
        h, codes = wide(h), wide(self.codebook)
        return (codes.square().sum(-1) - 2 * h @ codes.T).argmin(-1)


class TimeEmbedding(nn.Module):
    def __init__(self, d: Denoiser):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(d.t_embed, d.width), nn.SiLU(), nn.Linear(d.width, d.width))
        self.pairs = d.t_embed // 2

    def waves(self, t: Tensor) -> Tensor:
        """Training timesteps t [...] -> [..., t_embed] fp64, cosines in front."""
        frequency = 10_000.0 ** (-torch.arange(self.pairs, dtype=torch.float64, device=t.device) / self.pairs)
        angle = t.double()[..., None] * frequency
        return torch.cat([angle.cos(), angle.sin()], -1)

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(self.waves(t).to(next(self.parameters()).dtype))


class ModulatedMLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=DENOISER_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, u: Tensor, e: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(e).chunk(3, -1)
        return u + gate * self.mlp(self.in_ln(u) * (1 + scale) + shift)


class DenoiserBlock(nn.Module):
    """u, e [B, T, width] -> u."""

    def __init__(self, d: Denoiser):
        super().__init__()
        if d.kernel:
            self.conv_norm = nn.LayerNorm(d.width, eps=DENOISER_EPS)
            self.conv = nn.Conv1d(d.width, d.width, d.kernel, padding=d.kernel // 2)
        self.mlp_block = ModulatedMLP(d.width)
        self.kernel = d.kernel

    def forward(self, u: Tensor, e: Tensor) -> Tensor:
        if self.kernel:
            u = u + self.conv(F.silu(self.conv_norm(u)).transpose(1, 2)).transpose(1, 2)
        return self.mlp_block(u, e)


class FinalLayer(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, u: Tensor, e: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(e).chunk(2, -1)
        return self.linear(F.layer_norm(u, u.shape[-1:], eps=DENOISER_EPS) * (1 + scale) + shift)


class DiffusionDecoder(nn.Module):
    """Clean motion from a noisy one (section 3.2); sees a few frames around each, the rest comes with the condition."""

    def __init__(self, c: MoTokConfig):
        super().__init__()
        d = c.denoiser
        self.input_proj = nn.Linear(c.features, d.width)
        self.time_embed = TimeEmbedding(d)
        self.cond_embed = nn.Linear(c.latent, d.width)
        self.blocks = nn.ModuleList(DenoiserBlock(d) for _ in range(d.blocks))
        self.final_layer = FinalLayer(d.width, c.features)

    def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """x [B, T, D], training timesteps t [B] or [], condition s [B, T, latent] -> clean x [B, T, D]."""
        u, e = self.input_proj(x), self.time_embed(t)
        e = (e[:, None] if e.ndim == 2 else e) + self.cond_embed(s)
        for block in self.blocks:
            u = block(u, e)
        return self.final_layer(u, e)


class Tokenizer(nn.Module):
    """Motion to tokens and back; the keys of tokenizer.safetensors."""

    def __init__(self, c: MoTokConfig):
        super().__init__()
        self.encoder = Encoder(c, c.features, c.latent)
        self.quantizer = Quantizer(c)
        self.decoder = Decoder(c)
        self.denoiser = DiffusionDecoder(c)

    def encode(self, x: Tensor) -> Tensor:
        """Normalised motion x [B, T, D] -> tokens [B, N] int64."""
        return self.quantizer(self.encoder(x))

    def condition(self, tokens: Tensor) -> Tensor:
        """tokens [B, N] -> condition per frame s [B, T, latent]."""
        return self.decoder(self.quantizer.codebook[tokens])


# ---- noise schedule and sampler -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """Constants of the sampled steps, each [S] fp64; index 0 is the clean end.

    timesteps: int64, as training numbers them. alpha_bar: signal variance. ddim, a and b: x' = a * clean + b * x. ddpm,
    mean_clean and mean_x likewise, and sigma. posterior: variance of the exact posterior.
    """

    timesteps: Tensor
    alpha_bar: Tensor
    a: Tensor
    b: Tensor
    mean_clean: Tensor
    mean_x: Tensor
    sigma: Tensor
    posterior: Tensor


def schedule(d: Diffusion) -> Schedule:
    """The constants for the timesteps of `d`."""
    steps = torch.tensor(d.timesteps)
    bar = torch.from_numpy(alpha_bars(d))[steps]
    after = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    beta = 1 - bar / after
    b = ((1 - after) / (1 - bar)).sqrt()
    posterior = beta * (1 - after) / (1 - bar)
    return Schedule(
        timesteps=steps, alpha_bar=bar, a=after.sqrt() - b * bar.sqrt(), b=b,
        mean_clean=beta * after.sqrt() / (1 - bar), mean_x=(1 - after) * (1 - beta).sqrt() / (1 - bar),
        sigma=(beta if d.variance == "fixed_large" else posterior).sqrt(), posterior=posterior,
    )  # fmt: skip


def denoise(
    predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor, d: Diffusion, step_noise: Tensor | None = None,
    pull: Callable[[Tensor, int], Tensor] | None = None, on: str = "x0",
) -> Tensor:  # fmt: skip
    """Sample a normalised motion [B, T, D].

    Args:
        predict: (x [B, T, D], training timestep []) -> clean x.
        noise: [B, T, D], what sampling starts from.
        step_noise: [S, B, T, D] for `ddpm`; entry 0 is not read.
        pull: guidance, (estimate [B, T, D], step k) -> estimate, applied to what `on` says (`x0` or `mu`).
    """
    s, x = schedule(d), wide(noise)
    if d.sampler == "ddpm" and (step_noise is None or step_noise.shape != (len(s.timesteps), *x.shape)):
        raise InputError(f"ddpm needs step_noise of {[len(s.timesteps), *x.shape]}")
    clean_part, x_part = (s.a, s.b) if d.sampler == "ddim" else (s.mean_clean, s.mean_x)
    for k in reversed(range(len(s.timesteps))):
        clean = predict(x, s.timesteps[k].to(x.device)).to(x.dtype)
        if pull is not None and on == "x0":
            clean = pull(clean, k)
        x = float(clean_part[k]) * clean + float(x_part[k]) * x
        if pull is not None and on == "mu":
            x = pull(x, k)
        if d.sampler == "ddpm" and k > 0:
            x = x + float(s.sigma[k]) * cast(Tensor, step_noise)[k].to(x.dtype)
    return x
