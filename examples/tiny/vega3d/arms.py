"""Ways to bring two streams of features into one language model, trained alike and compared on the same questions.

First the visual tokens are fitted to the room's geometry in the language model's own terms (as LLaVA aligns projectors
with captions before it tunes on questions), then everything is trained on questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from cells import SIDE
from language import Asked, Batch, Reader
from rooms import FRAMES
from torch import Tensor
from towers import DIT, EYES

from engine.models.vega3d.reference import fuse, position_code, projector
from examples.tiny.fitting import train

Weights = dict[str, Tensor]
#: "code" is the token gate with codes of world coordinates, which hand the geometry over.
ARMS = ("semantic", "generative", "add", "token_gated", "code")


@dataclass(frozen=True)
class Streams:
    """Features of rooms, bf16: semantic and generative [R, T * cells, C]; voxels [R, T * cells, 3] of the codes."""

    semantic: Tensor
    generative: Tensor
    voxels: Tensor


def lines(tokens: Tensor, newline: Tensor) -> Tensor:
    """[B, T * cells, D] to [B, T * rows * (columns + 1), D]."""
    grid = tokens.unflatten(1, (FRAMES, SIDE, SIDE))
    return torch.cat([grid, newline.to(grid).expand(*grid.shape[:3], 1, -1)], 3).flatten(1, 3)


class Arm:
    """Projectors and fusion under their published names in w; `tokens` is what the language model gets."""

    def __init__(self, name: str, w: Weights) -> None:
        self.name, self.w = name, w

    @staticmethod
    def begin(name: str, width: int, newline: Tensor, seed: int) -> Arm:
        """One to train."""
        g = torch.Generator().manual_seed(seed)
        w = {"model.image_newline": newline.clone()}

        def linear(key: str, rows: int, columns: int, scale: float = 1.0) -> None:
            w[f"model.{key}.weight"] = torch.randn(rows, columns, generator=g) * columns**-0.5 * scale
            w[f"model.{key}.bias"] = torch.zeros(rows)

        for key, source in (("mm_projector", EYES.width), ("generative_projector", DIT.dim)):
            linear(f"{key}.0", width, source)
            linear(f"{key}.2", width, width, 0.1)
        for n in (1, 2):
            w[f"model.feature_fusion.norm{n}.weight"] = torch.full((width,), 0.2)
            w[f"model.feature_fusion.norm{n}.bias"] = torch.zeros(width)
        linear("feature_fusion.gate_projection.0", 1, 2 * width, 0.1)
        for value in w.values():
            value.requires_grad_()
        return Arm(name, w)

    def fused(self, s: Streams, at: Tensor) -> Tensor:
        """[B, T * cells, D] of rooms `at`."""
        if self.name == "generative":
            return projector(self.w, "model.generative_projector", s.generative[at].float())
        seen = projector(self.w, "model.mm_projector", s.semantic[at].float())
        if self.name == "semantic":
            return seen
        dreamt = projector(self.w, "model.generative_projector", s.generative[at].float())
        if self.name == "add":
            return seen + dreamt
        return fuse(self.w, seen, dreamt, "normed")[0]

    def tokens(self, s: Streams, at: Tensor) -> Tensor:
        x = self.fused(s, at)
        if self.name == "code":
            x = x + position_code(s.voxels[at], x.shape[-1]).to(x)
        return lines(x, self.w["model.image_newline"])

    def align(self, s: Streams, target: Tensor, weight: Tensor, steps: int, seed: int) -> None:
        """Fits fused tokens to target [R, T * cells, D] under weights [R, T * cells]."""
        g = torch.Generator().manual_seed(seed)
        scale = target[:256].var()

        def loss(step: int) -> Tensor:
            at = torch.randint(len(target), (64,), generator=g)
            off = (self.fused(s, at) - target[at]).square().mean(-1)
            return (off * weight[at]).sum() / weight[at].sum() / scale

        train(f"{self.name}, alignment", self.w.values(), loss, steps, 2e-3, every=500)

    def tune(self, reader: Reader, s: Streams, rooms: Sequence[Asked], steps: int, seed: int) -> None:
        """Trains the arm and its language model on questions."""
        rng = np.random.default_rng(seed)

        def loss(step: int) -> Tensor:
            at = rng.integers(0, len(rooms), 16)
            batch = Batch.of([(rooms[i], rooms[i].chosen(rng)) for i in at], reader.prefix)
            return reader.loss(self.tokens(s, torch.from_numpy(at)), batch)

        train(f"{self.name}, questions", [*self.w.values(), *reader.w.values()], loss, steps, 6e-4)


@torch.no_grad()
def examine(
    arm: Arm, reader: Reader, s: Streams, rooms: Sequence[Asked], papers: Sequence[np.ndarray]
) -> list[tuple[str, bool]]:  # fmt: skip
    """(kind, whether right) of every question, room by room."""
    out = []
    for i, mine in enumerate(papers):
        if len(mine):
            right = reader.right(arm.tokens(s, torch.tensor([i])), Batch.of([(rooms[i], mine)], reader.prefix))[0]
            out += [(rooms[i].kinds[j], good) for j, good in zip(mine, right.tolist())]
    return out
