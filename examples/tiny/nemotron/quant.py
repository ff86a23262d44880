"""Simulated weight quantisation: what the engine's int8 and int4 formats do to the weights, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 64


def round_groups(w: Tensor, bits: int) -> Tensor:
    """w [.., K] rounded to symmetric `bits`-bit codes with one scale for each group along K."""
    group = GROUP if w.shape[-1] % GROUP == 0 else 32
    top = 2 ** (bits - 1) - 1
    g = w.float().unflatten(-1, (-1, group))
    scale = (g.abs().amax(-1, keepdim=True) / top).clamp_min(1e-8).half().float()
    return ((g / scale).round().clamp(-top - 1, top) * scale).flatten(-2).to(w.dtype)


def bits_of(name: str, pattern: str) -> int | None:
    """How many bits a weight gets under int4: 8 for the sensitive ones, None where it stays bf16 or fp32."""
    if name == "lm_head.weight":
        return 8
    if not name.startswith("backbone.layers.") or not name.endswith("_proj.weight"):
        return None
    layer = int(name.split(".")[2])
    before_attention = pattern[layer] == "M" and pattern[layer + 1 : layer + 2] == "*"
    return 8 if pattern[layer] == "*" or before_attention else 4


def stored(name: str, w: Tensor, pattern: str, mode: str) -> Tensor:
    """The value that a format keeps of a weight: mode "fp32", "bf16", "int8" or "int4"."""
    if mode == "fp32" or ".gate." in name:
        return w
    w = w.bfloat16().to(w.dtype)
    bits = bits_of(name, pattern) if mode in ("int8", "int4") else None
    return w if bits is None else round_groups(w, 8 if mode == "int8" else bits)


@torch.no_grad()
def convert(model: torch.nn.Module, mode: str) -> dict[str, Tensor]:
    """Replace the model's weights by what `mode` keeps; returns the originals for `restore`."""
    originals = {}
    for name, p in model.named_parameters():
        originals[name] = p.data
        p.data = stored(name, p.data, model.config.pattern, mode)
    return originals


@torch.no_grad()
def restore(model: torch.nn.Module, originals: dict[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        p.data = originals[name]
