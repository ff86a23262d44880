"""MoTok in small sizes; imports no torch."""

from __future__ import annotations

from typing import Any

from engine.models.motok.config import MoTokConfig

#: Small sizes with the shape of the full ones.
TINY: dict[str, Any] = {
    "width": 24, "latent": 20, "codes": 40, "max_frames": 64, "min_frames": 8,
    "denoiser": {"blocks": 2, "width": 24, "kernel": 5, "t_embed": 16},
    "ddm": {"dim": 24, "layers": 2, "heads": 3, "ff": 32, "code_dim": 20, "steps": 5},
    "ar": {"dim": 24, "layers_base": 1, "layers_head": 1, "heads": 2, "ff": 40},
    "clip": {"width": 16, "layers": 2, "heads": 2, "ctx": 12, "ff": 24, "vocab": 50, "embed": 14},
}  # fmt: skip


def tiny(**more: Any) -> MoTokConfig:
    return MoTokConfig.from_json({**TINY, **more})
