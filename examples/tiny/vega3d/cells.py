"""What a visual token should tell, from a room's geometry: the solid that it shows, where in the picture, how far."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from rooms import COLOURS, SHAPES, SIZE, Views
from torch import Tensor

SIDE = 6  # visual tokens along an edge of a picture
SHARE = 0.15  # of a cell that a solid must fill to be what it shows
ACROSS, FAR = 12, 10  # steps of a place across the picture, of a distance
NEAREST, FARTHEST = 1.2, 5.5  # metres


@dataclass(frozen=True)
class Cells:
    """Of the visual tokens [N]: colour and shape (their number + 1, 0: no solid), across (0 to 1), far (metres)."""

    colour: np.ndarray
    shape: np.ndarray
    across: np.ndarray
    far: np.ndarray

    @staticmethod
    def of(views: Views) -> Cells:
        solids, edge = views.room.solids, SIZE // SIDE

        def cells(pixels: np.ndarray) -> np.ndarray:
            """[T, S, S] to [tokens, pixels of one]."""
            cut = pixels.reshape(len(pixels), SIDE, edge, SIDE, edge).swapaxes(2, 3)
            return cut.reshape(len(pixels) * SIDE * SIDE, edge * edge)

        which, depth = cells(views.which), cells(views.depth) / 1000.0
        column = cells(np.broadcast_to(np.arange(SIZE) / (SIZE - 1), views.which.shape))
        counts = np.stack([(which == k).sum(1) for k in range(len(solids))], 1)
        best = counts.argmax(1)
        mine = which == best[:, None]
        n = np.maximum(mine.sum(1), 1)
        there = counts.max(1) >= SHARE * edge * edge
        colour = np.array([list(COLOURS).index(s.colour) + 1 for s in solids])[best]
        shape = np.array([SHAPES.index(s.shape) + 1 for s in solids])[best]
        across, far = ((part * mine).sum(1) / n for part in (column, depth))
        return Cells(np.where(there, colour, 0).astype(np.int8), np.where(there, shape, 0).astype(np.int8),
                     across.astype(np.float32), far.astype(np.float32))  # fmt: skip


def steps(x: Tensor, count: int) -> Tensor:
    """[..., count] weights of the two steps around x in [0, 1]."""
    at = x.clamp(0, 1)[..., None] * (count - 1)
    return (1 - (at - torch.arange(count)).abs()).clamp(min=0)


def described(colour: Tensor, shape: Tensor, across: Tensor, far: Tensor) -> Tensor:
    """f32 [..., C]: all of it as one row of weights."""
    there = (colour > 0)[..., None].float()
    log = (far.clamp(min=NEAREST) / NEAREST).log() / float(np.log(FARTHEST / NEAREST))
    names = [F.one_hot(x.long(), n + 1).float() for x, n in ((colour, len(COLOURS)), (shape, len(SHAPES)))]
    return torch.cat([*names, steps(across, ACROSS) * there, steps(log, FAR) * there], -1)


WIDTH = len(COLOURS) + 1 + len(SHAPES) + 1 + ACROSS + FAR
