"""The generator in plain torch, as published: what the folded plans must give (Wan 2.1, technical report, 2025).

Weights are mappings of tensors under the original names; everything is differentiable, so trainers use it too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.blocks.diffusion import time_sinusoid
from engine.blocks.diffusion_reference import channel_rms, turn
from engine.models.vega3d.generator_config import DitConfig, Tap, VaeConfig

Weights = Mapping[str, Tensor]


# ------------------------------------------------------------------------------------------------------ VAE
def vae_conv(w: Weights, name: str, x: Tensor, padding: int = 1) -> Tensor:
    """A causal convolution on one frame: the last tap in time is all that meets it."""
    weight = w[f"{name}.weight"]
    return F.conv2d(x, weight[:, :, -1] if weight.dim() == 5 else weight, w[f"{name}.bias"], padding=padding)


def vae_block(w: Weights, name: str, x: Tensor) -> Tensor:
    h = vae_conv(w, f"{name}.residual.2", F.silu(channel_rms(x, w[f"{name}.residual.0.gamma"])))
    h = vae_conv(w, f"{name}.residual.6", F.silu(channel_rms(h, w[f"{name}.residual.3.gamma"])))
    return h + (vae_conv(w, f"{name}.shortcut", x, 0) if f"{name}.shortcut.weight" in w else x)


def vae_attention(w: Weights, name: str, x: Tensor) -> Tensor:
    n, c, height, width = x.shape
    weight, bias = w[f"{name}.to_qkv.weight"].reshape(3 * c, c), w[f"{name}.to_qkv.bias"]
    tokens = channel_rms(x, w[f"{name}.norm.gamma"]).flatten(2).transpose(1, 2)
    q, k, v = F.linear(tokens, weight, bias).chunk(3, -1)
    out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
    out = F.linear(out, w[f"{name}.proj.weight"].reshape(c, c), w[f"{name}.proj.bias"])
    return x + out.transpose(1, 2).reshape(n, c, height, width)


def vae_stages(c: VaeConfig) -> list[tuple[str, bool]]:
    """(name, whether it halves the grid) of the encoder's parts before its middle, in order."""
    parts: list[tuple[str, bool]] = []
    for i in range(len(c.mult)):
        parts += [(f"encoder.downsamples.{len(parts) + j}", False) for j in range(c.blocks)]
        if i + 1 < len(c.mult):
            parts.append((f"encoder.downsamples.{len(parts)}", True))
    return parts


def vae_encode(w: Weights, c: VaeConfig, x: Tensor) -> Tensor:
    """Normalised means [N, z, H/f, W/f] of images [N, 3, H, W] in [-1, 1]."""
    x = vae_conv(w, "encoder.conv1", x)
    for name, halves in vae_stages(c):
        if halves:
            x = F.conv2d(F.pad(x, (0, 1, 0, 1)), w[f"{name}.resample.1.weight"], w[f"{name}.resample.1.bias"], stride=2)
        else:
            x = vae_block(w, name, x)
    x = vae_block(w, "encoder.middle.0", x)
    x = vae_attention(w, "encoder.middle.1", x)
    x = vae_block(w, "encoder.middle.2", x)
    x = vae_conv(w, "encoder.head.2", F.silu(channel_rms(x, w["encoder.head.0.gamma"])))
    mu = vae_conv(w, "conv1", x, 0)[:, : c.z]
    mean, std = (torch.tensor(v, dtype=x.dtype).reshape(1, -1, 1, 1) for v in (c.mean, c.std))
    return (mu - mean) / std


# ------------------------------------------------------------------------------------------------------ transformer
def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def modulations(w: Weights, c: DitConfig, timestep: float | Tensor) -> tuple[Tensor, Tensor]:
    """(e [N, d], e0 [N, 6, d]) of timesteps [N] or of one."""
    times = torch.as_tensor(timestep).reshape(-1)
    s = torch.stack([torch.from_numpy(time_sinusoid(float(t), c.freq_dim)) for t in times])
    s = s.to(w["time_embedding.0.weight"].dtype)
    e = F.linear(s, w["time_embedding.0.weight"], w["time_embedding.0.bias"])
    e = F.linear(F.silu(e), w["time_embedding.2.weight"], w["time_embedding.2.bias"])
    e0 = F.linear(F.silu(e), w["time_projection.1.weight"], w["time_projection.1.bias"])
    return e, e0.unflatten(-1, (6, c.dim))


def context_of(w: Weights, c: DitConfig, prompt: Tensor) -> Tensor:
    """[text_len, d] of a prompt [n, text_dim]: zero rows behind it count as text."""
    rows = F.pad(prompt, (0, 0, 0, c.text_len - len(prompt)))
    h = F.gelu(F.linear(rows, w["text_embedding.0.weight"], w["text_embedding.0.bias"]), approximate="tanh")
    return F.linear(h, w["text_embedding.2.weight"], w["text_embedding.2.bias"])


def rotations(c: DitConfig, frames: int, rows: int, columns: int) -> Tensor:
    """Angles f64 [frames * rows * columns, head_dim / 2], pair after pair."""
    half = c.head_dim // 2
    axis = half // 3
    at = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in (frames, rows, columns)))
    at = at.reshape(-1, 3)
    parts = [at[:, i : i + 1] * 10000.0 ** (-torch.arange(n, dtype=torch.float64) / n)
             for i, n in enumerate((half - 2 * axis, axis, axis))]  # fmt: skip
    return torch.cat(parts, -1)


def attention(w: Weights, c: DitConfig, name: str, x: Tensor, to: Tensor, angles: Tensor | None = None) -> Tensor:
    """x [N, L, d] looks at `to` [N or 1, S, d]. angles: of the first rows of both; rows behind them do not turn."""

    def heads(t: Tensor) -> Tensor:
        return t.unflatten(-1, (c.heads, c.head_dim)).transpose(1, 2)

    def linear(which: str, t: Tensor) -> Tensor:
        return F.linear(t, w[f"{name}.{which}.weight"], w[f"{name}.{which}.bias"])

    q = heads(rms(linear("q", x), w[f"{name}.norm_q.weight"], c.eps))
    k = heads(rms(linear("k", to), w[f"{name}.norm_k.weight"], c.eps))
    v = heads(linear("v", to))
    if angles is not None:
        n = len(angles)
        q, k = torch.cat([turn(q[..., :n, :], angles), q[..., n:, :]], -2), turn(k, angles)
    return linear("o", F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def block(w: Weights, c: DitConfig, name: str, x: Tensor, e0: Tensor, context: Tensor, angles: Tensor) -> Tensor:
    """x [N, L, d] behind one block; e0 [N or 1, 6, d], context [1, S, d]. Rows beyond the angles are only queries."""
    sh1, sc1, g1, sh2, sc2, g2 = (w[f"{name}.modulation"] + e0).unsqueeze(2).unbind(1)
    d = (c.dim,)
    h = F.layer_norm(x, d, eps=c.eps) * (1 + sc1) + sh1
    x = x + g1 * attention(w, c, f"{name}.self_attn", h, h[:, : len(angles)], angles)
    h = F.layer_norm(x, d, w[f"{name}.norm3.weight"], w[f"{name}.norm3.bias"], c.eps)
    x = x + attention(w, c, f"{name}.cross_attn", h, context)
    h = F.layer_norm(x, d, eps=c.eps) * (1 + sc2) + sh2
    h = F.gelu(F.linear(h, w[f"{name}.ffn.0.weight"], w[f"{name}.ffn.0.bias"]), approximate="tanh")
    return x + g2 * F.linear(h, w[f"{name}.ffn.2.weight"], w[f"{name}.ffn.2.bias"])


def patches(w: Weights, name: str, z: Tensor) -> Tensor:
    """Tokens [N, F * h * w, d] of latents [N, C, F, 2h, 2w]."""
    weight = w[f"{name}.weight"]
    return F.conv3d(z, weight, w[f"{name}.bias"], stride=weight.shape[2:]).flatten(2).transpose(1, 2)


def features(w: Weights, c: DitConfig, z: Tensor, prompt: Tensor, timestep: float | Tensor, upto: int) -> Tensor:
    """Output [N, L, d] of block `upto` for latents z [N, C, F, h, w] and a prompt [n, text_dim]."""
    e0 = modulations(w, c, timestep)[1]
    context = context_of(w, c, prompt)[None]
    angles = rotations(c, z.shape[2], z.shape[3] // c.patch, z.shape[4] // c.patch)
    x = patches(w, "patch_embedding", z)
    for i in range(upto + 1):
        x = block(w, c, f"blocks.{i}", x, e0, context, angles)
    return x


def vace_context(c: DitConfig, clean: Tensor, black: Tensor) -> Tensor:
    """[N, vace_channels, 2, h, w] of clean latents [N, z, h, w] and a black frame's [z, h, w]: the first frame under an
    empty mask, then black and the frame itself under a full one."""
    n, z = clean.shape[:2]
    mask = (n, c.vace_channels - 2 * z, *clean.shape[2:])
    first = torch.cat([clean[:1].expand(n, -1, -1, -1), torch.zeros_like(clean), clean.new_zeros(mask)], 1)
    second = torch.cat([black.expand(n, -1, -1, -1), clean, clean.new_ones(mask)], 1)
    return torch.stack([first, second], 2)


def vace_features(
    w: Weights, c: DitConfig, z: Tensor, context: Tensor, prompt: Tensor, timestep: float | Tensor, upto: int,
    scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """Output [N, L, d] of block `upto` for latents z [N, C, 1, h, w] and `vace_context`: the padded half of its rows,
    hints times `scale` included (All-in-One Video Creation and Editing, Jiang et al. 2025)."""
    e0, text = modulations(w, c, timestep)[1], context_of(w, c, prompt)[None]
    angles = rotations(c, 1, z.shape[3] // c.patch, z.shape[4] // c.patch)
    x = patches(w, "patch_embedding", z)
    x = torch.cat([x, torch.zeros_like(x)], 1)
    hints, before = [], "vace_blocks.0.before_proj"
    h = F.linear(patches(w, "vace_patch_embedding", context), w[f"{before}.weight"], w[f"{before}.bias"]) + x
    for j in range(len(c.vace_layers)):
        h = block(w, c, f"vace_blocks.{j}", h, e0, text, angles)
        after = f"vace_blocks.{j}.after_proj"
        hints.append(F.linear(h, w[f"{after}.weight"], w[f"{after}.bias"]))
    for i in range(upto + 1):
        x = block(w, c, f"blocks.{i}", x, e0, text, angles)
        if i in c.vace_layers:
            x = x + hints[c.vace_layers.index(i)] * scale
    return x.chunk(2, 1)[1]


def denoise(w: Weights, c: DitConfig, z: Tensor, prompt: Tensor, timestep: float | Tensor) -> Tensor:
    """The velocity [N, C, F, h, w] that the whole transformer predicts."""
    e, _ = modulations(w, c, timestep)
    x = features(w, c, z, prompt, timestep, c.layers - 1)
    shift, scale = (w["head.modulation"] + e[:, None]).unsqueeze(2).unbind(1)
    x = F.layer_norm(x, (c.dim,), eps=c.eps) * (1 + scale) + shift
    x = F.linear(x, w["head.head.weight"], w["head.head.bias"])
    n, _, f, h, wd = z.shape
    p = c.patch
    x = x.reshape(n, f, h // p, wd // p, p, p, c.channels)
    return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(n, c.channels, f, h, wd)


def pooled(x: Tensor, rows: int, columns: int, tap: Tap) -> Tensor:
    """[N, cells, d] on the tap's grid from tokens [N, rows * columns, d]."""
    if tap.grid is None:
        return x
    grid = x.transpose(1, 2).unflatten(2, (rows, columns))
    return F.adaptive_avg_pool2d(grid, tap.grid).flatten(2).transpose(1, 2)


def cover(images: Tensor, width: int, height: int) -> Tensor:
    """Images [N, 3, h, w] scaled until they cover width x height (bilinear, no antialias), the middle of them."""
    h, w = images.shape[-2:]
    s = max(height / h, width / w)
    nh, nw = round(h * s), round(w * s)
    out = F.interpolate(images, (nh, nw), mode="bilinear", align_corners=False)
    top, left = (nh - height) // 2, (nw - width) // 2
    return out[..., top : top + height, left : left + width]
