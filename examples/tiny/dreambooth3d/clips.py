"""Short clips of solids that turn or move, with captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from solids import CLASSES, COLOURS, VIEWS, Solid, draw_solid, turntable

FRAMES = VIEWS + 1  # a full turn, whose last picture is its first
MOTIONS = ("turning left", "turning right", "moving left", "moving right")
REACH = 5  # pixels to either side of the middle that a solid moves


@dataclass(frozen=True)
class Shown:
    """A solid and its turntable, u8 [VIEWS, S, S, 3]."""

    solid: Solid
    views: np.ndarray


def draw(seed: int, index: int, *, held_out: bool = False) -> Shown:
    """Solid `index` of a set; those held out are never trained on."""
    solid = draw_solid(np.random.default_rng([seed, held_out, index]))
    return Shown(solid, turntable(solid))


def turned(first: int, motion: str, frames: int = FRAMES) -> np.ndarray:
    """Numbers of the views of a turn."""
    return (first + (1 if motion == "turning left" else -1) * np.arange(frames)) % VIEWS


def clip(shown: Shown, motion: str, first: int) -> np.ndarray:
    """u8 [FRAMES, S, S, 3] that begins with view `first`."""
    if motion.startswith("turning"):
        return shown.views[turned(first, motion)]
    way = -1 if motion == "moving left" else 1
    at = np.round(way * np.linspace(-REACH, REACH, FRAMES)).astype(int)
    return np.stack([np.roll(shown.views[first], n, 1) for n in at])


def caption(solid: Solid, motion: str | None, colours: bool) -> str:
    """motion None: of a single picture."""
    name = solid.name if colours else solid.kind
    return f"A video of a {name}{'' if motion is None else f' {motion}'}."


def captions() -> Sequence[str]:
    """Every caption's words, for the tokenizer and the language model."""
    out = []
    for kind in CLASSES:
        for motion in ("", *(f" {m}" for m in MOTIONS)):
            out.append(f"A video of a {kind}{motion}.")
            out += [f"A video of a {a} and {b} {kind}{motion}." for a in COLOURS for b in COLOURS if a != b]
    return out
