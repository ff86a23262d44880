"""Convolutions over frames as products over rows: the encoders, and the decoder of codes (section 3.2).

Every stream lies between rows of zeros, so a convolution reads beyond both ends; the rows behind the last frame are
cleared where a plan begins to fill a stream, because plans of other lengths use the same memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.models.motok.config import MoTokConfig
from engine.models.motok.weights import DecoderWeights, EncoderWeights, Linear, Residual
from engine.ops.codebook import codebook_conv
from engine.ops.gather import gather
from engine.ops.gemm import Taps, gemm
from engine.ops.norm import norm
from engine.runtime.arena import Arena, Tensor


@dataclass(frozen=True)
class Zeros:
    """One row of zeros and ids that all name it."""

    row: Tensor  # f32 [1, C]
    ids: Tensor  # i32 [most]

    @staticmethod
    def empty(arena: Arena, width: int, most: int) -> Zeros:
        return Zeros(arena.alloc("zeros", (1, width)), arena.alloc("zeros.ids", (most,), "i32", "io"))

    def into(self, out: Tensor, label: str) -> None:
        """Clears out [rows, C]."""
        rows, width = out.shape
        gather(self.row.slice(0, (1, width)), self.ids.slice(0, (rows,)), out, label=label)


@dataclass(frozen=True)
class Stream:
    """Frames [T, C], T up to a limit, between `pad` rows of zeros."""

    whole: Tensor
    pad: int
    zeros: Zeros

    @staticmethod
    def empty(arena: Arena, name: str, frames: int, width: int, pad: int, zeros: Zeros) -> Stream:
        return Stream(arena.alloc(name, (frames + 2 * pad, width)), pad, zeros)

    def rows(self, t: int) -> Tensor:
        return self.around(t, 0)

    def around(self, t: int, reach: int) -> Tensor:
        """Frames -reach to t + reach."""
        width = self.whole.shape[1]
        return self.whole.slice((self.pad - reach) * width, (t + 2 * reach, width))

    def close(self, t: int, label: str) -> None:
        """Clears the rows behind frame t - 1."""
        width = self.whole.shape[1]
        self.zeros.into(self.whole.slice((self.pad + t) * width, (self.pad, width)), f"{label}.end")


@dataclass(frozen=True)
class Level:
    """Buffers at one rate of frames: the stream, its rectified copy, the hidden values of a residual block."""

    x: Stream
    rectified: Stream
    hidden: Tensor


class ConvBuffers:
    """What encoders and decoder work in, from the rate of frames down to that of tokens."""

    def __init__(self, arena: Arena, c: MoTokConfig, ws: Tensor) -> None:
        self.ws, self.levels = ws, []
        reach = c.dilation_growth ** max(c.depth - 1, 0)
        widest = max(c.features, c.traj.channels, c.width, c.denoiser.width)
        zeros = self.zeros = Zeros.empty(arena, widest, max(reach, c.denoiser.kernel // 2, 1))
        for i in range(c.down_t + 1):
            t, name = c.max_tokens * c.rate >> i, f"frames.{i}"
            self.levels.append(
                Level(
                    Stream.empty(arena, f"{name}.x", t, c.width, 1, zeros),
                    Stream.empty(arena, f"{name}.rectified", t, c.width, reach, zeros),
                    arena.alloc(f"{name}.hidden", (t, c.width)),
                )
            )

    def conv(
        self, x: Tensor, w: Linear, out: Tensor, taps: Taps, label: str, act: str = "none",
        residual: Tensor | None = None,
    ) -> None:  # fmt: skip
        gemm(x, w.w, out, taps=taps, bias=w.bias, act=act, residual=residual, ws=self.ws, label=label)

    def residuals(self, blocks: list[Residual], level: Level, t: int, label: str) -> None:
        """Residual blocks, in place on the level's stream."""
        x, hidden = level.x.rows(t), level.hidden.slice(0, (t, level.hidden.shape[1]))
        if blocks:
            level.rectified.close(t, label)
        for i, block in enumerate(blocks):
            name, reach = f"{label}.{i}", block.dilation
            norm(x, level.rectified.rows(t), kind="none", act="relu", label=f"{name}.relu")
            self.conv(level.rectified.around(t, reach), block.conv1, hidden, Taps(3, dilation=reach), f"{name}.conv1",
                      "relu")  # fmt: skip
            self.conv(hidden, block.conv2, x, Taps(1), f"{name}.conv2", residual=x)

    def encode(self, w: EncoderWeights, source: Stream, out: Tensor, t: int, label: str) -> None:
        """out [t / rate, C] of the t frames in source."""
        source.close(t, f"{label}.source")
        level = self.levels[0]
        self.conv(source.around(t, 1), w.first, level.x.rows(t), Taps(3), f"{label}.first", "relu")
        for i, (down, blocks) in enumerate(w.stages):
            level.x.close(t, f"{label}.{i}")
            level, above, t = self.levels[i + 1], level.x.around(t, 1), t // 2
            self.conv(above, down, level.x.rows(t), Taps(4, stride=2), f"{label}.{i}.down")
            self.residuals(blocks, level, t, f"{label}.{i}")
        level.x.close(t, label)
        self.conv(level.x.around(t, 1), w.last, out, Taps(3), f"{label}.last")

    def decode(self, w: DecoderWeights, ids: Tensor, out: Tensor, label: str) -> None:
        """out [T, C], the condition of every frame, of tokens ids i32 [N]."""
        n, level = ids.shape[0], self.levels[-1]
        codebook_conv(ids, w.table, w.bias, level.x.rows(n), label=f"{label}.codes")
        for i, (blocks, double) in enumerate(w.stages):
            self.residuals(blocks, level, n, f"{label}.{i}")
            level.x.close(n, f"{label}.{i}")
            below, level = level.x, self.levels[-2 - i]
            width = below.whole.shape[1]
            pairs = level.x.rows(2 * n).slice(0, (n, 2 * width))
            around = below.around(n, 1)
            for j, half in enumerate((double.even, double.odd)):
                x = around.slice(j * width, (n + 1, width))
                self.conv(x, half, pairs.columns(j * width, width), Taps(2), f"{label}.{i}.{('even', 'odd')[j]}")
            n *= 2
        level.x.close(n, label)
        self.conv(level.x.around(n, 1), w.hidden, level.rectified.rows(n), Taps(3), f"{label}.hidden", "relu")
        level.rectified.close(n, f"{label}.hidden")
        self.conv(level.rectified.around(n, 1), w.last, out, Taps(3), f"{label}.last")
