"""From a checkpoint of the VAE to packed weights: every convolution as one product over stacked frames.

A kernel's columns are (ky, kx, kt, c): a cell holds its channels in the two frames before, then its own. Of a product
that makes two frames of one, the channels that a first frame keeps come first: they are a product of their own then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine.blocks.weights import Packer, Recipe
from engine.io.checkpoint import MappedSource, Source
from engine.models.dreambooth3d.config import VaeConfig
from engine.models.dreambooth3d.dit_weights import Linear
from engine.ops.gemm import PackedMatrix
from engine.runtime.arena import Arena, Tensor

FIRST_GROUPS = (0, 2, 4, 6)  # of the eight (time, row, column) that a product makes; a first frame keeps these four
TIME_GROUPS = (*FIRST_GROUPS, 1, 3, 5, 7)


@dataclass(frozen=True)
class Residual:
    norm1: Tensor
    conv1: Linear
    norm2: Tensor
    conv2: Linear


@dataclass(frozen=True)
class Middle:
    """qkv [3C, C]: one head over all channels."""

    before: Residual
    norm: Tensor
    qkv: Linear
    out: Linear
    behind: Residual


@dataclass(frozen=True)
class Resample:
    """A convolution whose channels become cells, or the reverse. share: of the shortcut's channels; first: of a first
    frame's, where time is resampled too."""

    conv: Linear
    share: PackedMatrix
    first: PackedMatrix | None


@dataclass(frozen=True)
class Coder:
    """levels: residual blocks, and what follows them if anything does. share: channels of the shortcut around the first
    convolution (decoder) or the last one (encoder)."""

    begin: Linear
    levels: list[tuple[list[Residual], Resample | None]]
    middle: Middle
    norm: Tensor
    end: Linear
    share: PackedMatrix


def repeats(rows: int, columns: int) -> np.ndarray:
    """[rows, columns]: every channel rows / columns times in a row."""
    return np.repeat(np.eye(columns, dtype=np.float32), rows // columns, 0)


def averages(rows: int, columns: int) -> np.ndarray:
    """[rows, columns]: means of columns / rows neighbouring channels."""
    return np.repeat(np.eye(rows, dtype=np.float32), columns // rows, 1) * np.float32(rows / columns)


class VaeLoader(Packer):
    """Packs a checkpoint under official names (canonical_vae)."""

    def __init__(self, c: VaeConfig, source: Source, arena: Arena, recipe: Recipe) -> None:
        super().__init__(MappedSource(source), arena)
        self.c, self.recipe = c, recipe

    def _conv(self, name: str, order: Callable[[np.ndarray], np.ndarray] = lambda w: w, scale: float = 1.0) -> Linear:
        """order: of the output channels. scale: of the input, taken off in the weights."""
        n, c = self.source.info(f"{name}.conv.weight").shape[:2]

        def columns(w: np.ndarray) -> np.ndarray:
            return order(w.transpose(0, 3, 4, 2, 1).reshape(n, -1)) / np.float32(scale)

        weight = self.matrix(name, [f"{name}.conv.weight"], self.recipe.format("vae", 27 * c), fn=columns, width=27 * c,
                             rows=n)  # fmt: skip
        return Linear(weight, self.vector(f"{name}.conv.bias", fn=order))

    def _point(self, label: str, names: list[str]) -> Linear:
        shape = self.source.info(f"{names[0]}.weight").shape
        weight = self.matrix(label, [f"{n}.weight" for n in names], self.recipe.format("vae", shape[1]),
                             fn=lambda w: w.reshape(shape[0], -1), width=shape[1], rows=shape[0])  # fmt: skip
        return Linear(weight, self.stacked(f"{label}.bias", [f"{n}.bias" for n in names]))

    def _gamma(self, name: str) -> Tensor:
        return self.vector(f"{name}.gamma", (self.source.info(f"{name}.gamma").shape[0],))

    def _residual(self, name: str) -> Residual:
        return Residual(self._gamma(f"{name}.norm1"), self._conv(f"{name}.conv1"), self._gamma(f"{name}.norm2"),
                        self._conv(f"{name}.conv2"))  # fmt: skip

    def _middle(self, name: str) -> Middle:
        p = f"{name}.attn_1"
        return Middle(self._residual(f"{name}.block_1"), self._gamma(f"{p}.norm"),
                      self._point(f"{p}.qkv", [f"{p}.{n}" for n in "qkv"]), self._point(f"{p}.out", [f"{p}.proj_out"]),
                      self._residual(f"{name}.block_2"))  # fmt: skip

    def _exact(self, label: str, value: np.ndarray) -> PackedMatrix:
        """A constant matrix of shortcuts, in fp32: half a percent of the convolution beside it."""
        out = PackedMatrix.empty(self.arena, label, value.shape[0], value.shape[1], "f32")
        if not self.arena.dry:
            out.fill(value)
        return out

    def _up(self, name: str, before: int, behind: int, time: bool) -> Resample:
        groups = 8 if time else 4

        def order(w: np.ndarray) -> np.ndarray:
            return w.reshape(8, behind, *w.shape[1:])[list(TIME_GROUPS)].reshape(w.shape) if time else w

        first = self._exact(f"{name}.first", repeats(behind, before // 4)) if time else None
        share = self._exact(f"{name}.share", repeats(behind, before // groups))
        return Resample(self._conv(f"{name}.conv", order), share, first)

    def _down(self, name: str, before: int, behind: int, time: bool) -> Resample:
        first = self._exact(f"{name}.first", averages(behind // 4, before)) if time else None
        share = averages(behind // (8 if time else 4), before)
        return Resample(self._conv(f"{name}.conv"), self._exact(f"{name}.share", share), first)

    def encoder(self) -> Coder:
        c = self.c
        levels: list[tuple[list[Residual], Resample | None]] = []
        for i, (space, time) in enumerate(c.halvings):
            blocks = [self._residual(f"encoder.down.{i}.block.{j}") for j in range(c.layers)]
            down = self._down(f"encoder.down.{i}.downsample", c.widths[i], c.widths[i + 1], time) if space else None
            levels.append((blocks, down))
        share = self._exact("encoder.share", averages(2 * c.z, c.widths[-1]))
        return Coder(self._conv("encoder.conv_in"), levels, self._middle("encoder.mid"),
                     self._gamma("encoder.norm_out"), self._conv("encoder.conv_out"), share)  # fmt: skip

    def decoder(self) -> Coder:
        """Takes latents in the sampler's scale."""
        c, widths = self.c, self.c.widths[::-1]
        space, time = (sum(h[k] for h in c.halvings) for k in (0, 1))
        levels: list[tuple[list[Residual], Resample | None]] = []
        for i in range(len(widths)):
            blocks = [self._residual(f"decoder.up.{i}.block.{j}") for j in range(c.layers + 1)]
            up = self._up(f"decoder.up.{i}.upsample", widths[i], widths[i + 1], i < time) if i < space else None
            levels.append((blocks, up))
        share = repeats(widths[0], c.z) / np.float32(c.scaling)
        return Coder(self._conv("decoder.conv_in", scale=c.scaling), levels, self._middle("decoder.mid"),
                     self._gamma("decoder.norm_out"), self._conv("decoder.conv_out"),
                     self._exact("decoder.share", share))  # fmt: skip
