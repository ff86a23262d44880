"""Qwen2 in plain torch: what plans of its decoder layers must give.

Weights are mappings of tensors under transformers' names; everything is differentiable.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.blocks.qwen_language import LanguageConfig

Weights = Mapping[str, Tensor]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def rms_norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], w[f"{name}.weight"], eps)


def heads_of(x: Tensor, heads: int) -> Tensor:
    """[B, T, heads * d] to [B, heads, T, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """x [..., T, d] by angles [T, d / 2]; channel i turns with channel i + d / 2."""
    a, b = x.chunk(2, -1)
    cos, sin = angle.cos().to(x), angle.sin().to(x)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def rotary_angles(c: LanguageConfig, places: Tensor) -> Tensor:
    """f64 [T, head_dim / 2] of places [T, 3] (time, row, column): each section of pairs turns by one of them."""
    assert c.sections is not None
    turn = c.theta ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
    return torch.cat([p[:, None] * t for p, t in zip(places.double().T, turn.split(list(c.sections)))], 1)


def text_angles(c: LanguageConfig, places: Tensor) -> Tensor:
    """f64 [T, head_dim / 2] of places [T] in a plain text."""
    turn = c.theta ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
    return places.double()[:, None] * turn


def decoded(
    w: Weights, c: LanguageConfig, x: Tensor, angle: Tensor | None = None, mask: Tensor | None = None,
    layers: int | None = None,
) -> Tensor:  # fmt: skip
    """Embeddings [T, D] or [B, T, D] to the stream behind the last of so many layers (default all), of the same shape.

    angle [T, head_dim / 2]: of each position; default those of a plain text. mask bool [T, T]: what each position sees;
    default itself and those before it.
    """
    if x.dim() == 2:
        return decoded(w, c, x[None], angle, mask, layers)[0]
    if angle is None:
        angle = text_angles(c, torch.arange(x.shape[1]))
    for i in range(c.layers if layers is None else layers):
        p = f"model.layers.{i}"
        h = rms_norm(w, f"{p}.input_layernorm", x, c.eps)
        q, k, v = (heads_of(linear(w, f"{p}.self_attn.{n}_proj", h), m)
                   for n, m in (("q", c.heads), ("k", c.kv_heads), ("v", c.kv_heads)))  # fmt: skip
        share = c.heads // c.kv_heads
        k, v = rotate(k, angle).repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        mixed = F.scaled_dot_product_attention(rotate(q, angle), k, v, mask, is_causal=mask is None)
        x = x + linear(w, f"{p}.self_attn.o_proj", mixed.transpose(1, 2).flatten(2))
        h = rms_norm(w, f"{p}.post_attention_layernorm", x, c.eps)
        h = F.silu(linear(w, f"{p}.mlp.gate_proj", h)) * linear(w, f"{p}.mlp.up_proj", h)
        x = x + linear(w, f"{p}.mlp.down_proj", h)
    return x


def language(
    w: Weights, c: LanguageConfig, x: Tensor, angle: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Hidden states behind the last norm: see `decoded`."""
    return rms_norm(w, "model.norm", decoded(w, c, x, angle, mask), c.eps)
