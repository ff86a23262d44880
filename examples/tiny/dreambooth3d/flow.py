"""The transformer learns to denoise clips and pictures of captions; then its adapter of reference views, one view at a
time (flow matching, Lipman et al. 2023; through the engine's reference)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from clips import MOTIONS, turned
from solids import VIEWS
from torch import Tensor

from engine.models.dreambooth3d.config import DitConfig
from engine.models.dreambooth3d.personalize import fresh_adapter
from engine.models.dreambooth3d.reference import Adapters, velocity
from engine.models.dreambooth3d.weights import KINDS, dit_shapes
from examples.tiny.fitting import train

Weights = dict[str, Tensor]
DIT = DitConfig(
    width=128, heads=4, layers=5, refiner_layers=1, mlp=256, channels=16, in_channels=33, text_dim=64, glyph_dim=0,
    vision_dim=32, axes=(8, 12, 12), resolution="480p",
)  # fmt: skip
RANK = 8
NONE = Adapters()


@dataclass(frozen=True)
class Lessons:
    """Of S solids. views [S, VIEWS, z, h, w]: latents of their turntables; moves [S, FRAMES, z, h, w]: of a move,
    `way` [S] in MOTIONS. States of captions, by whether they tell colours: moving [S, motions, n, D], still [S, n, D];
    nothing [n, D] by kind of chat."""

    views: Tensor
    moves: Tensor
    way: Tensor
    moving: dict[bool, Tensor]
    still: dict[bool, Tensor]
    nothing: dict[str, Tensor]

    def clips(self, at: Tensor, told: bool | None, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents [B, z, FRAMES, h, w] of these solids, two turns to every move, with states; told None: of nothing."""
        motion, made = self.way[at].clone(), self.moves[at]
        for i, solid in enumerate(at.tolist()):
            if i % 3:
                motion[i] = int(torch.randint(2, (1,), generator=g))
                first = int(torch.randint(VIEWS, (1,), generator=g))
                made[i] = self.views[solid, turned(first, MOTIONS[motion[i]])]
        text = self.nothing["video"].expand(len(at), -1, -1) if told is None else self.moving[told][at, motion]
        return made.transpose(1, 2), text

    def pictures(self, at: Tensor, told: bool | None, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents [B, z, 1, h, w] of a view of each, with states."""
        made = self.views[at, torch.randint(VIEWS, (len(at),), generator=g)]
        text = self.nothing["image"].expand(len(at), -1, -1) if told is None else self.still[told][at]
        return made[:, :, None], text


def begin(generator: torch.Generator) -> Weights:
    """Norms one, biases zero, what modulates and ends zero (Peebles and Xie 2023), the rest by fan-in."""
    out = {}
    for name, shape in dit_shapes(DIT).items():
        still = any(part in name for part in ("_mod.", "adaLN", "final_layer"))
        if len(shape) > 1 and not still:
            scale = 0.5 if name.startswith("cond_type") else math.prod(shape[1:]) ** -0.5
            out[name] = torch.randn(shape, generator=generator) * scale
        else:
            out[name] = torch.full(shape, float("norm" in name and name.endswith("weight")))
        out[name].requires_grad_()
    return out


def losses(
    w: Weights, clean: Tensor, states: Tensor, shift: float, generator: torch.Generator, views: Tensor | None = None,
    adapters: Adapters = NONE,
) -> Tensor:  # fmt: skip
    """Mean squared error of velocities: clean [B, z, t, h, w], states [B, n, D] or [n, D], views [B, z, h, w]."""
    s = torch.sigmoid(torch.randn(len(clean), generator=generator))
    level = shift * s / (1 + (shift - 1) * s)
    noise = torch.randn(clean.shape, generator=generator)
    at = level[:, None, None, None, None]

    with torch.autocast("cpu", torch.bfloat16):
        made = velocity(w, DIT, (1 - at) * clean + at * noise, 1000 * level, states.expand(len(clean), -1, -1),
                        () if views is None else (views,), adapters)  # fmt: skip
    return F.mse_loss(made.float(), noise - clean)


def train_base(lessons: Lessons, steps: int, seed: int) -> Weights:
    g = torch.Generator().manual_seed(seed)
    w = begin(g)

    def loss(step: int) -> Tensor:
        draw = float(torch.rand(1, generator=g))
        told = None if draw < 0.1 else draw > 0.5
        still = step % 4 == 3
        at = torch.randint(len(lessons.views), (64 if still else 16,), generator=g)
        clean, text = (lessons.pictures if still else lessons.clips)(at, told, g)
        return losses(w, clean, text, 1.5 if still else 3.0, g)

    train("transformer", w.values(), loss, steps, 2e-3)
    return {k: v.detach() for k, v in w.items()}


def train_views(w: Weights, lessons: Lessons, steps: int, seed: int) -> Weights:
    """The adapter of reference views, beside one view from any side; the base stays."""
    g = torch.Generator().manual_seed(seed)
    adapter = {k: v.requires_grad_() for k, v in fresh_adapter(DIT, RANK, KINDS["views"], g).items()}

    def loss(step: int) -> Tensor:
        still = step % 2 == 1
        at = torch.randint(len(lessons.views), (64 if still else 12,), generator=g)
        clean, text = (lessons.pictures if still else lessons.clips)(at, step % 8 > 5, g)
        view = lessons.views[at, torch.randint(VIEWS, (len(at),), generator=g)]
        return losses(w, clean, text, 1.5 if still else 3.0, g, view, Adapters(views=adapter))

    train("adapter of views", adapter.values(), loss, steps, 2e-3)
    return {k: v.detach() for k, v in adapter.items()}
