"""3DreamBooth in plain torch, as released: what the plans must give (arXiv 2603.18524; HunyuanVideo-1.5, 2025).

Weights are mappings of tensors under the official names; everything is differentiable. Padding, which the released
model masks, is never computed. Guidance's two branches have texts of different lengths, so they are not one batch; for
training, latents, states, views and timesteps may have a dimension of samples in front, all of them or none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.blocks.diffusion import time_frequencies, time_sinusoid
from engine.blocks.diffusion_reference import turn
from engine.models.dreambooth3d.config import DitConfig
from engine.models.dreambooth3d.schedule import noise_levels, rotation_angles
from engine.models.dreambooth3d.weights import EMBED, GLYPH_EPS

Weights = Mapping[str, Tensor]
TEXT, GLYPH, VISION = range(3)  # rows of cond_type_embedding


@dataclass(frozen=True)
class Adapters:
    """Low-rank changes by module, `{module}.lora_A.weight` and `lora_B.weight`; their files' own scales play no part.

    subject: on video tokens, and on text tokens as `text` tells: 'off' (as released: its mask misses every token),
    'all', or a mask bool [n] of the text's tokens. views: on reference tokens. scale: of the subject's change on video
    tokens; as released 2 for an adapter of attention alone (`weights.KINDS`), which is used without references.
    """

    subject: Weights | None = None
    views: Weights | None = None
    text: str | Tensor = "off"
    scale: float = 1.0

    @property
    def share(self) -> Tensor | float | None:
        """[n, 1] of the subject's change at each text token, or 1 at all of them; None: nowhere."""
        if isinstance(self.text, Tensor):
            return self.text[:, None].float()
        return 1.0 if self.text == "all" else None


def linear(w: Weights, name: str, x: Tensor, adapter: Weights | None = None, share: Tensor | float = 1.0) -> Tensor:
    """x [..., K] through a product and, where there is one, the adapter's change of it, times `share`."""
    out = F.linear(x, w[f"{name}.weight"].flatten(1), w[f"{name}.bias"])
    if adapter is None or f"{name}.lora_A.weight" not in adapter:
        return out
    a, b = (adapter[f"{name}.lora_{m}.weight"].flatten(1) for m in "AB")
    low = F.linear(x, a)
    if x.dim() == 2 and isinstance(share, float) and share == 1.0:
        return torch.addmm(out, low, b.T)  # one pass, also backwards
    return out + share * F.linear(low, b)


def merged(w: Weights, adapter: Weights) -> dict[str, Tensor]:
    """Weights with an adapter in them: W + B A."""
    out = dict(w)
    for key in adapter:
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            a, b = (adapter[f"{name}.lora_{m}.weight"].flatten(1) for m in "AB")
            out[f"{name}.weight"] = w[f"{name}.weight"] + (b @ a).reshape(w[f"{name}.weight"].shape)
    return out


def norm(x: Tensor, eps: float, w: Weights | None = None, name: str = "") -> Tensor:
    """Layer norm, with a weight and a bias where a name is given."""
    weight, bias = (None, None) if w is None else (w[f"{name}.weight"], w[f"{name}.bias"])
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def modulated(x: Tensor, eps: float, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm times 1 + scale, plus shift; these [D], or [B, 1, D] of x [B, L, D]."""
    if shift.dim() > 1:
        return torch.addcmul(shift, norm(x, eps), 1 + scale)
    return F.layer_norm(x, x.shape[-1:], 1 + scale, shift, eps)


def embedded_time(w: Weights, name: str, c: DitConfig, timestep: float | Tensor) -> Tensor:
    """[D] of a timestep in [0, 1000], not rounded; [B, 1, D] of timesteps [B]."""
    if isinstance(timestep, Tensor):
        angle = timestep[:, None, None] * torch.from_numpy(time_frequencies(c.freq_dim, np.float32))
        s = torch.cat([angle.cos(), angle.sin()], -1)
    else:
        s = torch.from_numpy(time_sinusoid(timestep, c.freq_dim, np.float32))
    s = s.to(w[f"{name}.mlp.0.weight"].dtype)
    return linear(w, f"{name}.mlp.2", F.silu(linear(w, f"{name}.mlp.0", s)))


# ------------------------------------------------------------------------------------------------------ text
def text_tokens(
    w: Weights, c: DitConfig, states: Tensor, timestep: float | Tensor, glyphs: Tensor | None = None
) -> Tensor:  # fmt: skip
    """[n, D] of the language model's states [n, text_dim] of a prompt's tokens, behind those of quoted texts' glyphs
    [m, glyph_dim]."""
    p = "txt_in"
    pooled = linear(w, f"{p}.c_embedder.linear_1", states.mean(-2, keepdim=states.dim() > 2))
    vec = F.silu(
        embedded_time(w, f"{p}.t_embedder", c, timestep) + linear(w, f"{p}.c_embedder.linear_2", F.silu(pooled))
    )
    x = linear(w, f"{p}.input_embedder", states)
    for i in range(c.refiner_layers):
        b = f"{p}.individual_token_refiner.blocks.{i}"
        g1, g2 = linear(w, f"{b}.adaLN_modulation.1", vec).chunk(2, -1)
        q, k, v = (heads(t, c) for t in linear(w, f"{b}.self_attn_qkv", norm(x, c.eps, w, f"{b}.norm1")).chunk(3, -1))
        x = x + g1 * linear(w, f"{b}.self_attn_proj", attend(q, k, v))
        h = F.silu(linear(w, f"{b}.mlp.fc1", norm(x, c.eps, w, f"{b}.norm2")))
        x = x + g2 * linear(w, f"{b}.mlp.fc2", h)
    x = x + w["cond_type_embedding.weight"][TEXT]
    if glyphs is None:
        return x
    h = norm(glyphs, GLYPH_EPS, w, "byt5_in.layernorm")
    for name in ("fc1", "fc2"):
        h = F.gelu(linear(w, f"byt5_in.{name}", h))
    return torch.cat([linear(w, "byt5_in.fc3", h) + w["cond_type_embedding.weight"][GLYPH], x])


# ------------------------------------------------------------------------------------------------------ blocks
def heads(x: Tensor, c: DitConfig) -> Tensor:
    """[L, D] to [heads, L, head_dim]."""
    return x.unflatten(-1, (c.heads, c.head_dim)).transpose(-3, -2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[L, D] of heads [heads, L, head_dim]: every token sees every token."""
    lead = q.shape[:-3]
    q, k, v = (t.reshape(-1, *t.shape[-3:]) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).reshape(*lead, q.shape[-2], -1)


@dataclass(frozen=True)
class Stream:
    """Tokens with weights and modulations of their own. kind: img or txt; vec [D]; angles of the tokens [L, pairs]."""

    x: Tensor
    kind: str
    vec: Tensor
    angles: Tensor | None = None
    adapter: Weights | None = None
    share: Tensor | float = 1.0

    def product(self, w: Weights, block: str, name: str, x: Tensor) -> Tensor:
        return linear(w, f"{block}.{self.kind}_{name}", x, self.adapter, self.share)


def block(
    w: Weights, c: DitConfig, name: str, streams: Sequence[Stream], one_way: bool = False, last: bool = False
) -> list[Stream]:  # fmt: skip
    """The streams behind a block: attention over all of their tokens together, everything else for itself.

    last: only the first stream, which is the video, goes on; of the others there are only keys and values.
    one_way: the stream between the first and the last, which is the references', sees only itself.
    """
    mods: list[tuple[Tensor, ...]] = []
    parts: list[dict[str, Tensor]] = []
    for s in streams:
        mods.append(linear(w, f"{name}.{s.kind}_mod.linear", F.silu(s.vec)).chunk(6, -1))
        shift, scale = mods[-1][:2]
        h = modulated(s.x, c.eps, shift, scale)
        made = {n: heads(s.product(w, name, f"attn_{n}", h), c) for n in ("kv" if last and parts else "qkv")}
        for n in made.keys() - {"v"}:
            t = F.rms_norm(made[n], made[n].shape[-1:], w[f"{name}.{s.kind}_attn_{n}_norm.weight"], c.eps)
            made[n] = t if s.angles is None else turn(t, s.angles)
        parts.append(made)
    q, k, v = (torch.cat([made[n] for made in parts if n in made], -2) for n in "qkv")
    if last:
        streams, mods, one_way = streams[:1], mods[:1], False
    sizes = [s.x.shape[-2] for s in streams]
    mixed = attend(q, k, v).split(sizes, -2)
    if one_way and len(streams) > 2:
        views = slice(sizes[0], q.shape[-2] - sizes[-1])
        mixed = (
            mixed[0],
            *attend(q[..., views, :], k[..., views, :], v[..., views, :]).split(sizes[1:-1], -2),
            mixed[-1],
        )
    out = []
    for s, (_, _, g1, shift, scale, g2), o in zip(streams, mods, mixed):
        x = torch.addcmul(s.x, g1, s.product(w, name, "attn_proj", o))
        h = F.gelu(s.product(w, name, "mlp.fc1", modulated(x, c.eps, shift, scale)), approximate="tanh")
        x = torch.addcmul(x, g2, s.product(w, name, "mlp.fc2", h))
        out.append(Stream(x, s.kind, s.vec, s.angles, s.adapter, s.share))
    return out


def begin(
    w: Weights, c: DitConfig, latent: Tensor, timestep: float | Tensor, states: Tensor, views: Sequence[Tensor] = (),
    adapters: Adapters = Adapters(), glyphs: Tensor | None = None,
) -> list[Stream]:  # fmt: skip
    """Streams in front of the first block: video, references if there are any, text. See `velocity`."""
    rows, columns = latent.shape[-2:]

    def tokens(z: Tensor, adapter: Weights | None) -> tuple[Tensor, Tensor]:
        """What is embedded: the latent, and no condition behind it. The time of a reference is its number."""
        full = F.pad(z.flatten(-3).mT, (0, c.in_channels - z.shape[-4]))
        angles = rotation_angles(z.shape[-3], rows, columns, c.axes, c.theta)
        return linear(w, EMBED, full, adapter), torch.from_numpy(angles)

    vec, still = (embedded_time(w, "time_in", c, at) for at in (timestep, 0.0))
    x, angles = tokens(latent, adapters.subject)
    streams = [Stream(x, "img", vec, angles, adapters.subject, adapters.scale)]
    if len(views):
        x, angles = tokens(torch.stack(tuple(views), -3), adapters.views)
        streams.append(Stream(x, "img", still, angles, adapters.views))
    x = text_tokens(w, c, states, timestep, glyphs)
    share = adapters.share
    streams.append(
        Stream(x, "txt", vec, None, None if share is None else adapters.subject, 1.0 if share is None else share)
    )
    return streams


def velocity(
    w: Weights, c: DitConfig, latent: Tensor, timestep: float | Tensor, states: Tensor, views: Sequence[Tensor] = (),
    adapters: Adapters = Adapters(), glyphs: Tensor | None = None, one_way: bool = False,
) -> Tensor:  # fmt: skip
    """The velocity [z, T, h, w] of a noisy latent [z, T, h, w] at a timestep in [0, 1000].

    states [n, text_dim]: of the prompt's tokens. views: clean latents [z, h, w] of the references, whose order tells
    their times: they see the video and the text, which see them, at timestep 0. glyphs: see `text_tokens`. one_way:
    see `block`.
    """
    streams = begin(w, c, latent, timestep, states, views, adapters, glyphs)
    for i in range(c.layers):
        streams = block(w, c, f"double_blocks.{i}", streams, one_way, last=i == c.layers - 1)
    return ended(w, c, streams[0]).unflatten(-1, latent.shape[-3:])


def ended(w: Weights, c: DitConfig, video: Stream) -> Tensor:
    """[z, L] of the video behind the last block."""
    shift, scale = linear(w, "final_layer.adaLN_modulation.1", F.silu(video.vec)).chunk(2, -1)
    return linear(w, "final_layer.linear", modulated(video.x, c.eps, shift, scale)).mT


# ------------------------------------------------------------------------------------------------------ sampling
def sample(
    w: Weights, c: DitConfig, noise: Tensor, negative: Tensor, positive: Tensor, views: Sequence[Tensor] = (),
    adapters: Adapters = Adapters(), *, steps: int = 50, guidance: float = 6.0, shift: float | None = None,
) -> Tensor:  # fmt: skip
    """The clean latent [z, T, h, w] from noise by Euler steps; guidance between the prompts' states, in fp32.

    shift: of the schedule, default what the configuration says.
    """
    x, sigmas = noise.float(), noise_levels(steps, c.shift if shift is None else shift)
    for now, then in pairwise(sigmas):
        without, with_ = (
            velocity(w, c, x, 1000.0 * float(now), s, views, adapters).float() for s in (negative, positive)
        )
        x = x + (without + guidance * (with_ - without)) * float(then - now)
    return x


def one_frame_loss(
    w: Weights, c: DitConfig, clean: Tensor, noise: Tensor, timestep: float, states: Tensor, views: Sequence[Tensor],
    adapters: Adapters, *, one_way: bool = False,
) -> Tensor:  # fmt: skip
    """Of personalisation: squared error of the velocity `noise - clean` [z, 1, h, w] of one photo."""
    level = timestep / 1000
    noisy = (1 - level) * clean + level * noise
    got = velocity(w, c, noisy, timestep, states, views, adapters, one_way=one_way)
    return F.mse_loss(got.float(), noise - clean)
