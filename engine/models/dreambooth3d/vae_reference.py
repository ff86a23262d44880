"""The VAE of HunyuanVideo-1.5 in plain torch: causal 3-D convolutions, the first frame apart (Tencent, 2025).

Weights are mappings of tensors under the official names. One video [C, T, H, W] at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.blocks.diffusion_reference import channel_rms
from engine.models.dreambooth3d.config import VaeConfig

Weights = Mapping[str, Tensor]
TILE, OVERLAP = 256, 0.125  # pixels of a tile, and the share of it that neighbours share


def conv(w: Weights, name: str, x: Tensor) -> Tensor:
    """3 x 3 x 3, seeing no later frame; edges are repeated."""
    if x.shape[1] == 1:  # all of a kernel's taps in time meet the one frame
        x = F.pad(x.transpose(0, 1), (1, 1, 1, 1), mode="replicate")
        return F.conv2d(x, w[f"{name}.conv.weight"].sum(2), w[f"{name}.conv.bias"]).transpose(0, 1)
    x = F.pad(x[None], (1, 1, 1, 1, 2, 0), mode="replicate")
    return F.conv3d(x, w[f"{name}.conv.weight"], w[f"{name}.conv.bias"])[0]


def point(w: Weights, name: str, x: Tensor) -> Tensor:
    """1 x 1 x 1."""
    return F.conv3d(x[None], w[f"{name}.weight"], w[f"{name}.bias"])[0]


def normed(w: Weights, name: str, x: Tensor) -> Tensor:
    return channel_rms(x[None], w[f"{name}.gamma"])[0]


def residual(w: Weights, name: str, x: Tensor) -> Tensor:
    h = conv(w, f"{name}.conv1", F.silu(normed(w, f"{name}.norm1", x)))
    h = conv(w, f"{name}.conv2", F.silu(normed(w, f"{name}.norm2", h)))
    return h + (point(w, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in w else x)


def attention(w: Weights, name: str, x: Tensor) -> Tensor:
    """One head over all cells of a frame and of those before it."""
    c, t, rows, columns = x.shape
    h = normed(w, f"{name}.norm", x)
    q, k, v = (point(w, f"{name}.{n}", h).flatten(1).T for n in "qkv")
    frame = torch.arange(t).repeat_interleave(rows * columns)
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=frame[:, None] >= frame)[0]
    return x + point(w, f"{name}.proj_out", out.T.reshape(c, t, rows, columns))


def middle(w: Weights, name: str, x: Tensor) -> Tensor:
    x = attention(w, f"{name}.attn_1", residual(w, f"{name}.block_1", x))
    return residual(w, f"{name}.block_2", x)


def deepen(x: Tensor, time: int) -> Tensor:
    """Space, and time where it is 2, to channels: [C, T, H, W] to [time * 4 C, T / time, H / 2, W / 2]."""
    x = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).unflatten(1, (-1, time))
    return x.permute(2, 4, 6, 0, 1, 3, 5).flatten(0, 3)


def widen(x: Tensor, time: int) -> Tensor:
    """The reverse of `deepen`."""
    x = x.unflatten(0, (time, 2, 2, -1))
    return x.permute(3, 4, 0, 5, 1, 6, 2).flatten(5, 6).flatten(3, 4).flatten(1, 2)


def means(x: Tensor, channels: int) -> Tensor:
    """[channels, ...]: means of neighbouring channels."""
    return x.unflatten(0, (channels, -1)).mean(1)


def down(w: Weights, name: str, x: Tensor, channels: int, time: bool) -> Tensor:
    """Half of the rows and columns, and of the frames behind the first; beside a shortcut without weights."""
    h = conv(w, f"{name}.conv", x)
    if not time:
        return deepen(h, 1) + means(deepen(x, 1), channels)
    first = deepen(h[:, :1], 1).repeat(2, 1, 1, 1) + means(deepen(x[:, :1], 1), channels)
    return torch.cat([first, deepen(h[:, 1:], 2) + means(deepen(x[:, 1:], 2), channels)], 1)


def up(w: Weights, name: str, x: Tensor, channels: int, time: bool) -> Tensor:
    """Twice the rows and columns, and the frames behind the first."""
    h, more = conv(w, f"{name}.conv", x), 4 * channels // len(x)
    if not time:
        return widen(h, 1) + widen(x.repeat_interleave(more, 0), 1)
    first = widen(h[:, :1], 1)[:channels] + widen(x[:, :1].repeat_interleave(more, 0), 1)
    rest = widen(h[:, 1:], 2) + widen(x[:, 1:].repeat_interleave(2 * more, 0), 2)
    return torch.cat([first, rest], 1)


def encode(w: Weights, c: VaeConfig, x: Tensor) -> Tensor:
    """Moments [2 z, t, h, w] (means, then log variances) of a video [3, T, H, W] in [-1, 1], T = 4n + 1."""
    x = conv(w, "encoder.conv_in", x)
    for i, (space, time) in enumerate(c.halvings):
        for j in range(c.layers):
            x = residual(w, f"encoder.down.{i}.block.{j}", x)
        if space:
            x = down(w, f"encoder.down.{i}.downsample", x, c.widths[i + 1], time)
    x = middle(w, "encoder.mid", x)
    return conv(w, "encoder.conv_out", F.silu(normed(w, "encoder.norm_out", x))) + means(x, 2 * c.z)


def decode(w: Weights, c: VaeConfig, z: Tensor) -> Tensor:
    """A video [3, 4 (t - 1) + 1, 16 h, 16 w] around [-1, 1] of a latent [z, t, h, w], its scale taken off before."""
    widths = c.widths[::-1]
    x = conv(w, "decoder.conv_in", z) + z.repeat_interleave(widths[0] // c.z, 0)
    x = middle(w, "decoder.mid", x)
    halvings = c.halvings
    space, time = (sum(h[i] for h in halvings) for i in (0, 1))
    for i in range(len(widths)):
        for j in range(c.layers + 1):
            x = residual(w, f"decoder.up.{i}.block.{j}", x)
        if i < space:
            x = up(w, f"decoder.up.{i}.upsample", x, widths[i + 1], i < time)
    return conv(w, "decoder.conv_out", F.silu(normed(w, "decoder.norm_out", x)))


# ------------------------------------------------------------------------------------------------------ tiles
def tiled(x: Tensor, tile: int, blend: int, keep: int, run: Callable[[Tensor], Tensor]) -> Tensor:
    """run on tiles of x [C, T, H, W] of `tile` cells, which share a part with their neighbours.

    A result's first `blend` rows and columns fade in over the last ones of its neighbours above and to the left, which
    have been faded themselves; its first `keep` rows and columns are kept.
    """
    step = round(tile * (1 - OVERLAP))
    rows = [[run(x[..., i : i + tile, j : j + tile]) for j in range(0, x.shape[-1], step)]
            for i in range(0, x.shape[-2], step)]  # fmt: skip
    for i, row in enumerate(rows):
        for j, part in enumerate(row):
            if i:
                part = faded(rows[i - 1][j], part, blend, -2)
            if j:
                part = faded(row[j - 1], part, blend, -1)
            row[j] = part
    return torch.cat([torch.cat([part[..., :keep, :keep] for part in row], -1) for row in rows], -2)


def faded(before: Tensor, x: Tensor, count: int, dim: int) -> Tensor:
    """x with its first `count` places along dim blended with the last of `before`."""
    count = min(before.shape[dim], x.shape[dim], count)
    shape = [1] * x.dim()
    shape[dim] = count
    share = (torch.arange(count) / count).reshape(shape).to(x)
    end = before.narrow(dim, before.shape[dim] - count, count)
    head = end * (1 - share) + x.narrow(dim, 0, count) * share
    return torch.cat([head, x.narrow(dim, count, x.shape[dim] - count)], dim)


def tiled_decode(w: Weights, c: VaeConfig, z: Tensor, tile: int = TILE) -> Tensor:
    """As `decode`, in tiles of `tile` pixels: as the released model always does."""
    blend = int(tile * OVERLAP)
    return tiled(z, tile // c.spatial, blend, tile - blend, lambda part: decode(w, c, part))


def tiled_encode(w: Weights, c: VaeConfig, x: Tensor, tile: int = TILE) -> Tensor:
    """As `encode`, in tiles of `tile` pixels."""
    cells = tile // c.spatial
    blend = int(cells * OVERLAP)
    return tiled(x, tile, blend, cells - blend, lambda part: encode(w, c, part))
