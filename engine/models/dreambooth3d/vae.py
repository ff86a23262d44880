"""The VAE as plans, a tile each: latents to frames, and frames to moments (HunyuanVideo-1.5).

decode.*   a tile of latents, in the sampler's scale, to pixels
encode.*   a tile of pixels to moments

Rows are cells by frame, row and column. A convolution goes frame by frame: the frame, normed, takes the place of the
one three before it in a ring; cells of the last three are copied side by side into a grid whose edges are repeated; and
one product reads it (`gemm.Window`). So what is normed is never held whole, and a residual block works in place.
Copies are sparse matrices (`gather.Sums`) whose tables depend on a tile's shape and are written when it changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from engine.blocks.diffusion import NORM_EPS
from engine.errors import InputError
from engine.models.dreambooth3d.config import VaeConfig
from engine.models.dreambooth3d.dit_weights import Linear
from engine.models.dreambooth3d.vae_weights import TIME_GROUPS, Coder, Middle, Resample, Residual
from engine.ops import attention as attention_op
from engine.ops import gemm as gemm_op
from engine.ops.attention import KVCache, attention
from engine.ops.gather import Sums, gather_sum
from engine.ops.gemm import Window, gemm
from engine.ops.norm import norm
from engine.runtime.arena import Arena, Tensor

RING = 3  # frames that a kernel sees
CONV_NODES = 3  # of a frame of a convolution
STACKS = ((0, 0, 0), (0, 0, 1), (0, 1, 2), (1, 2, 0), (2, 0, 1))  # places in the ring, for frames 0, 1, 2, 3, 4; again


def stack_of(frame: int) -> int:
    """Which of STACKS shows a frame and the two before it; before the first it is repeated."""
    return frame if frame < RING else 2 + (frame - 2) % RING


# ------------------------------------------------------------------------------------------------------ tables
def stacked(h: int, w: int, places: tuple[int, ...]) -> np.ndarray:
    """i32 [(h + 2) * (w + 2) * 3]: for each cell of the grid in its border, the cell in three frames of the ring."""
    cells = np.clip(np.arange(-1, h + 1), 0, h - 1)[:, None] * w + np.clip(np.arange(-1, w + 1), 0, w - 1)
    return (cells[..., None] + np.array(places) * (h * w)).reshape(-1).astype(np.int32)


def _quarters(h: int, w: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the cells of a grid twice as wide and high: the cell of [h, w] that each lies in, and which quarter it is."""
    y, x = np.divmod(np.arange(4 * h * w), 2 * w)
    return (y // 2) * w + x // 2, (y % 2) * 2 + x % 2


def widened(h: int, w: int) -> np.ndarray:
    """i32 [2h * 2w, 1]: rows of (cell, quarter) as cells of the wider grid."""
    cell, quarter = _quarters(h, w)
    return (4 * cell + quarter)[:, None].astype(np.int32)


def lengthened(h: int, w: int) -> np.ndarray:
    """i32 [2 * 2h * 2w, 2]: two frames of (cell, group), groups as the product has them, and of the shortcut's rows
    behind those."""
    cell, quarter = _quarters(h, w)
    place = np.argsort(TIME_GROUPS)
    parts = [np.stack([8 * cell + place[4 * t + quarter], 8 * (h * w + cell) + 4 * t + quarter], 1) for t in range(2)]
    return np.concatenate(parts).astype(np.int32)


def deepened(h: int, w: int, frames: int) -> np.ndarray:
    """i32 [h * w * 4 * frames, 1]: for (cell, frame, quarter), the row of the grid [frames, 2h, 2w]."""
    cell, quarter = _quarters(h, w)
    fine = np.empty((h * w, 4), np.int64)
    fine[cell, quarter] = np.arange(4 * h * w)
    return np.concatenate([fine + t * 4 * h * w for t in range(frames)], 1).reshape(-1, 1).astype(np.int32)


def deepened_first(h: int, w: int) -> np.ndarray:
    """i32 [h * w * 8, 2]: a first frame's rows twice, and those of the shortcut, two per fine cell, behind them."""
    fine = deepened(h, w, 1).reshape(h * w, 4)
    eighth = np.arange(8)
    return (
        np.stack([fine[:, eighth % 4], 4 * h * w + 2 * fine[:, eighth // 2] + eighth % 2], -1)
        .reshape(-1, 2)
        .astype(np.int32)
    )


@dataclass(frozen=True)
class _Level:
    """Of a level: its resolution (0: that of latents), channels, frames, blocks, and what follows them."""

    s: int
    width: int
    frames: int
    blocks: list[Residual]
    resample: Resample | None
    time: bool  # whether that changes the number of frames
    behind: int  # channels behind it


class Vae:
    """Buffers and plans for tiles of up to `frames` latent frames of `rows` x `columns` cells.

    latent f32 [frames * rows * columns, z] and moments [.., 2 z], pixels f32 [F * H * W, 3] in [-1, 1]; a smaller tile
    fills the first rows.
    """

    def __init__(
        self, arena: Arena, c: VaeConfig, encoder: Coder, decoder: Coder, *, frames: int, rows: int, columns: int,
        kv_format: str, encoded: int | None = None,
    ) -> None:  # fmt: skip
        """encoded: latent frames that are encoded at once, default 1: photos and references."""
        self.c, self._encoder, self._decoder = c, encoder, decoder
        self.limits, self.encoded = (frames, rows, columns), encoded or 1
        self.space = sum(s for s, _ in c.halvings)
        self._half = half = "bf16" if kv_format == "bf16" else "f32"
        cells = [(rows << s) * (columns << s) for s in range(self.space + 1)]
        borders = [((rows << s) + 2) * ((columns << s) + 2) for s in range(self.space + 1)]
        levels = [*self._down_levels(self.encoded), *self._up_levels(frames)]

        def ws(name: str, *shape: int, dtype: str = "f32") -> Tensor:
            return arena.alloc(f"vae.{name}", shape, dtype)

        def io(name: str, *shape: int, dtype: str = "f32") -> Tensor:
            return arena.alloc(f"vae.{name}", shape, dtype, "io")

        longest = max(self._pixel_frames(frames), self._pixel_frames(self.encoded))
        self.latent = io("latent", frames * cells[0], c.z)
        self.moments = io("moments", self.encoded * cells[0], 2 * c.z)
        self.pixels = io("pixels", longest * cells[-1], 3)
        top = c.widths[-1]
        self._streams = [
            ws(f"stream.{i}", max(one.frames * cells[one.s] * one.width for one in levels)) for i in range(2)
        ]
        wide = max(cells[one.s] * max(one.width, c.z) for one in levels)
        self._rings = [ws(f"ring.{i}", RING * wide) for i in range(2)]
        self._hidden = ws("hidden", wide)
        self._stack = ws("stack", max(borders[one.s] * RING * max(one.width, c.z) for one in levels), dtype=half)
        most = max(frames, self.encoded) * cells[0]
        self._parts = ws(
            "parts", max([4 * most * top, *(16 * cells[one.s] * one.behind for one in levels if one.resample)])
        )
        self._kv = KVCache.empty(arena, "vae.kv", 1, top, -(-most // 16) * 16, kv_format, 1, "workspace")
        self._pos = io("pos", max(frames, self.encoded), dtype="i32")
        # Tables: columns by name; entries all count once, so offsets and weights serve every table.
        sizes = {f"stack.{s}.{k}": RING * borders[s] for s in range(self.space + 1) for k in range(len(STACKS))}
        for s in range(self.space):
            sizes |= {f"widen.{s}": 4 * cells[s], f"lengthen.{s}": 16 * cells[s], f"deepen.{s}": 4 * cells[s],
                      f"deepen2.{s}": 8 * cells[s], f"deepen1.{s}": 16 * cells[s]}  # fmt: skip
        self._tables = {name: io(f"table.{name}", size, dtype="i32") for name, size in sizes.items()}
        most_entries = max(sizes.values())
        self._offsets = [arena.alloc(f"vae.offsets.{n}", (most_entries // n + 1,), "i32", "weights") for n in (1, 2)]
        self._ones = arena.alloc("vae.ones", (most_entries,), "f32", "weights")
        if not arena.dry:
            self._ones.write(np.ones(most_entries, np.float32))
            for n, offsets in zip((1, 2), self._offsets):
                offsets.write(np.arange(0, n * offsets.shape[0], n, dtype=np.int32))
        direct = half == "bf16" and decoder.begin.w.format == "bf16"
        needs = [gemm_op.workspace_bytes(cells[one.s], 27 * max(one.width, c.z), direct=direct) for one in levels]
        needs += [gemm_op.workspace_bytes(8 * cells[one.s], one.width) for one in levels]
        needs += [gemm_op.workspace_bytes(most, top), attention_op.workspace_bytes(cells[0], 1, top, self._kv.ctx)]
        self._ws = ws("ws", max(needs), dtype="u8")
        self._placed = (0, 0)

    # ------------------------------------------------------------------------------------------ geometry
    def _pixel_frames(self, frames: int) -> int:
        return (frames - 1) * self.c.temporal + 1

    def _up_levels(self, frames: int) -> Iterator[_Level]:
        s = 0
        times = sum(time for _, time in self.c.halvings)
        widths = self.c.widths[::-1]
        for i, (width, (blocks, up)) in enumerate(zip(widths, self._decoder.levels)):
            time = up is not None and i < times
            yield _Level(s, width, frames, blocks, up, time, widths[min(i + 1, len(widths) - 1)])
            s, frames = s + (up is not None), 2 * frames - 1 if time else frames

    def _down_levels(self, frames: int) -> Iterator[_Level]:
        """frames: of the moments."""
        s, count = self.space, self._pixel_frames(frames)
        widths = self.c.widths
        for i, ((_, time), (blocks, down)) in enumerate(zip(self.c.halvings, self._encoder.levels)):
            yield _Level(s, widths[i], count, blocks, down, time, widths[min(i + 1, len(widths) - 1)])
            s, count = s - (down is not None), (count + 1) // 2 if time else count

    def fits(self, frames: int, h: int, w: int, limit: int) -> None:
        """InputError unless the buffers hold a tile."""
        _, rows, columns = self.limits
        if not (1 <= frames <= limit and 1 <= h <= rows and 1 <= w <= columns):
            raise InputError(
                f"a tile of {frames} latent frames of {h} x {w} cells exceeds {limit} of {rows} x {columns}; load with "
                "larger limits"
            )

    def place_tile(self, h: int, w: int) -> None:
        """Writes the tables of a tile's shape, in cells of the latent; nothing where they are there."""
        if self._placed == (h, w):
            return
        self._placed = (0, 0)
        for s in range(self.space + 1):
            y, x = h << s, w << s
            made = {f"stack.{s}.{k}": stacked(y, x, places) for k, places in enumerate(STACKS)}
            if s < self.space:
                made |= {f"widen.{s}": widened(y, x), f"lengthen.{s}": lengthened(y, x)}
                made |= {f"deepen.{s}": deepened(y, x, 1), f"deepen2.{s}": deepened(y, x, 2),
                         f"deepen1.{s}": deepened_first(y, x)}  # fmt: skip
            for name, rows in made.items():
                self._tables[name].slice(0, (rows.size,)).write(rows.reshape(-1))
        self._pos.write(np.arange(self._pos.shape[0], dtype=np.int32) * (h * w))
        self._placed = (h, w)

    def _sums(self, name: str, n: int, r: int, entries: int = 1) -> Sums:
        """A table of n rows over r."""
        size = n * entries
        return Sums(self._offsets[entries - 1].slice(0, (n + 1,)), self._tables[name].slice(0, (size,)),
                    self._ones.slice(0, (size,)), r)  # fmt: skip

    # ------------------------------------------------------------------------------------------ parts
    def _conv(
        self, source: Tensor, frame: int, grid: tuple[int, int, int], w: Linear, out: Tensor, label: str, *,
        ring: int = 0, gamma: Tensor | None = None, residual: Tensor | None = None, first: int | None = None,
    ) -> None:  # fmt: skip
        """One frame of a convolution; grid: resolution, height and width. Frames come in order. first: that many of the
        output channels alone."""
        (s, h, width), (cells, c) = grid, source.shape
        places = self._rings[ring].slice(0, (RING * cells, c))
        norm(source, places.rows(frame % RING * cells, cells), kind="none" if gamma is None else "rms", weight=gamma,
             eps=NORM_EPS, act="none" if gamma is None else "silu", label=f"{label}.{frame}.norm")  # fmt: skip
        border = (h + 2) * (width + 2)
        stack = self._stack.slice(0, (border * RING, c))
        gather_sum(places, self._sums(f"stack.{s}.{stack_of(frame)}", border * RING, RING * cells), stack,
                   label=f"{label}.{frame}.stack")  # fmt: skip
        product, bias = (w.w, w.bias) if first is None else (w.w.part(0, first), w.bias.slice(0, (first,)))
        gemm(stack.slice(0, (border, RING * c)), product, out, bias=bias, residual=residual,
             taps=Window(3, width, width + 2), ws=self._ws, label=f"{label}.{frame}")  # fmt: skip

    def _residual(self, x: Tensor, frames: int, grid: tuple[int, int, int], w: Residual, label: str) -> None:
        cells = grid[1] * grid[2]
        hidden = self._hidden.slice(0, (cells, x.shape[1]))
        for f in range(frames):
            own = x.rows(f * cells, cells)
            self._conv(own, f, grid, w.conv1, hidden, f"{label}.conv1", gamma=w.norm1)
            self._conv(hidden, f, grid, w.conv2, own, f"{label}.conv2", ring=1, gamma=w.norm2, residual=own)

    def _middle(self, x: Tensor, frames: int, h: int, w: int, m: Middle, label: str) -> None:
        """One head over the cells of a frame and of those before it, between two residual blocks."""
        c, cells = x.shape[1], h * w
        self._residual(x, frames, (0, h, w), m.before, f"{label}.before")
        rows = frames * cells
        qkv, mixed = self._parts.slice(0, (rows, 3 * c)), self._parts.slice(3 * rows * c, (rows, c))
        gemm(x, m.qkv.w, qkv, prologue="rms", norm=m.norm, eps=NORM_EPS, bias=m.qkv.bias, ws=self._ws,
             label=f"{label}.qkv")  # fmt: skip
        for f in range(frames):
            q, k, v = (qkv.rows(f * cells, cells).columns(j * c, c) for j in range(3))
            attention(q, k, v, self._kv, self._pos.slice(f, (1,)), mixed.rows(f * cells, cells), heads=1, causal=False,
                      ws=self._ws, label=f"{label}.attention.{f}")  # fmt: skip
        gemm(mixed, m.out.w, x, bias=m.out.bias, residual=x, ws=self._ws, label=f"{label}.out")
        self._residual(x, frames, (0, h, w), m.behind, f"{label}.behind")

    def _other(self, x: Tensor, rows: int, width: int) -> Tensor:
        """The stream buffer that x is not in."""
        one, two = self._streams
        return (two if x.address == one.address else one).slice(0, (rows, width))

    def _widen(self, x: Tensor, level: _Level, grid: tuple[int, int, int], label: str) -> Tensor:
        """Twice the rows and columns, and with time the frames behind the first."""
        s, h, w = grid
        up, cells, c, t, behind = level.resample, h * w, level.width, level.frames, level.behind
        assert up is not None
        out = self._other(x, (2 * t - 1 if level.time else t) * 4 * cells, behind)
        at = 0
        for f in range(t):
            whole = level.time and f > 0
            groups = 8 if whole else 4
            made = self._parts.slice(0, (cells, groups * behind))
            share = self._parts.slice(cells * groups * behind, (cells * groups, behind))
            own = x.rows(f * cells, cells)
            matrix = up.first if level.time and f == 0 and up.first is not None else up.share
            gemm(own.slice(0, (cells * groups, c // groups)), matrix, share, ws=self._ws, label=f"{label}.{f}.share")
            same = share.slice(0, (cells, groups * behind))
            self._conv(own, f, grid, up.conv, made, label, residual=None if whole else same,
                       first=4 * behind if level.time and f == 0 else None)  # fmt: skip
            count = (8 if whole else 4) * cells
            if whole:
                rows, sums = 2 * cells * groups, self._sums(f"lengthen.{s}", count, 2 * cells * groups, 2)
            else:
                rows, sums = cells * groups, self._sums(f"widen.{s}", count, cells * groups)
            gather_sum(self._parts.slice(0, (rows, behind)), sums, out.rows(at, count), label=f"{label}.{f}.widen")
            at += count
        return out

    def _deepen(self, x: Tensor, level: _Level, grid: tuple[int, int, int], label: str) -> Tensor:
        """Half of the rows and columns, and with time of the frames behind the first."""
        s, h, w = grid
        down, cells, t, behind, groups = level.resample, h * w, level.frames, level.behind, 8 if level.time else 4
        assert down is not None
        few, each = behind // groups, cells // 4
        out = self._other(x, ((t + 1) // 2 if level.time else t) * each, behind)
        fine = out.slice(0, (out.shape[0] * groups, few))
        at = 0
        for f in range(t):
            own, start = x.rows(f * cells, cells), level.time and f == 0
            place = (f + 1) % 2 if level.time and f else 0  # of the two frames that become one
            made = self._parts.slice(place * cells * few, (cells, few))
            if start and down.first is not None:
                share = self._parts.slice(cells * few, (cells, 2 * few))
                gemm(own, down.first, share, ws=self._ws, label=f"{label}.{f}.share")
                self._conv(own, f, grid, down.conv, made, label)
                rows, sums = 3 * cells, self._sums(f"deepen1.{s - 1}", groups * each, 3 * cells, 2)
            else:
                gemm(own, down.share, made, ws=self._ws, label=f"{label}.{f}.share")
                self._conv(own, f, grid, down.conv, made, label, residual=made)
                if level.time and place == 0:
                    continue
                name, rows = (f"deepen2.{s - 1}", 2 * cells) if level.time else (f"deepen.{s - 1}", cells)
                sums = self._sums(name, groups * each, rows)
            gather_sum(
                self._parts.slice(0, (rows, few)), sums, fine.rows(at, groups * each), label=f"{label}.{f}.deepen"
            )
            at += groups * each
        return out

    # ------------------------------------------------------------------------------------------ plans
    def decode(self, frames: int, h: int, w: int) -> Callable[[], None]:
        """What the plan of a tile records, behind `place_tile`: `latent` to `pixels`."""
        self.fits(frames, h, w, self.limits[0])
        return partial(self._decode, frames, h, w)

    def encode(self, frames: int, h: int, w: int) -> Callable[[], None]:
        """What the plan of a tile of so many latent frames records, behind `place_tile`: `pixels` to `moments`."""
        self.fits(frames, h, w, self.encoded)
        return partial(self._encode, frames, h, w)

    def node_budget(self, kind: str, frames: int) -> int:
        """Most nodes of the plan of a tile of so many latent frames; kind: 'decode' or 'encode'."""
        levels = list(self._up_levels(frames) if kind == "decode" else self._down_levels(frames))
        shared, plain = CONV_NODES + 1, CONV_NODES  # beside a shortcut, and alone
        first, last = (shared, plain) if kind == "decode" else (plain, shared)
        ends = first * levels[0].frames + last * (levels[-1].frames if kind == "decode" else frames)
        inside = sum(
            one.frames * (2 * CONV_NODES * len(one.blocks) + (shared + 1 if one.resample else 0)) for one in levels
        )
        return ends + inside + 4 * CONV_NODES * frames + frames + 2

    def _decode(self, frames: int, h: int, w: int) -> None:
        d, cells = self._decoder, h * w
        x = self._streams[0].slice(0, (frames * cells, self.c.widths[-1]))
        for f in range(frames):
            z, own = self.latent.rows(f * cells, cells), x.rows(f * cells, cells)
            gemm(z, d.share, own, ws=self._ws, label=f"begin.{f}.share")
            self._conv(z, f, (0, h, w), d.begin, own, "begin", residual=own)
        self._middle(x, frames, h, w, d.middle, "middle")
        for i, level in enumerate(self._up_levels(frames)):
            grid = (level.s, h << level.s, w << level.s)
            for j, block in enumerate(level.blocks):
                self._residual(x, level.frames, grid, block, f"{i}.{j}")
            if level.resample is not None:
                x = self._widen(x, level, grid, f"{i}.up")
        cells = grid[1] * grid[2]
        for f in range(level.frames):
            self._conv(
                x.rows(f * cells, cells), f, grid, d.end, self.pixels.rows(f * cells, cells), "end", gamma=d.norm
            )

    def _encode(self, frames: int, h: int, w: int) -> None:
        c, e = self.c, self._encoder
        levels = list(self._down_levels(frames))
        grid = (self.space, h << self.space, w << self.space)
        cells = grid[1] * grid[2]
        x = self._streams[0].slice(0, (levels[0].frames * cells, c.widths[0]))
        for f in range(levels[0].frames):
            self._conv(self.pixels.rows(f * cells, cells), f, grid, e.begin, x.rows(f * cells, cells), "begin")
        for i, level in enumerate(levels):
            grid = (level.s, h << level.s, w << level.s)
            for j, block in enumerate(level.blocks):
                self._residual(x, level.frames, grid, block, f"{i}.{j}")
            if level.resample is not None:
                x = self._deepen(x, level, grid, f"{i}.down")
        self._middle(x, frames, h, w, e.middle, "middle")
        cells = h * w
        for f in range(frames):
            own, out = x.rows(f * cells, cells), self.moments.rows(f * cells, cells)
            gemm(own, e.share, out, ws=self._ws, label=f"end.{f}.share")
            self._conv(own, f, (0, h, w), e.end, out, "end", gamma=e.norm, residual=out)
