"""Qwen2.5-VL's image tower (Bai et al. 2025, section 2.1): windows of 8 x 8 patches, full attention in a few layers,
2 x 2 patches merged into a token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine.blocks.decoder import DecoderBuffers, DecoderLayer, gated_layer
from engine.blocks.weights import Packer, Recipe
from engine.ops import attention as attention_op
from engine.ops import gemm as gemm_op
from engine.ops.attention import KVCache, attention
from engine.ops.conv import conv_patches
from engine.ops.gather import gather
from engine.ops.gemm import PackedMatrix, gemm
from engine.ops.norm import norm
from engine.runtime.arena import Arena, Tensor

NORM_EPS, THETA = 1e-6, 10000.0


@dataclass(frozen=True)
class QwenVisionConfig:
    """Sizes; `grid`: (rows, columns) of patches of a frame. out: width of a merged token; full: layers whose attention
    sees the whole frame; window: edge of a window in merged tokens."""

    width: int
    depth: int
    heads: int
    mlp: int
    out: int
    grid: tuple[int, int]
    patch_size: int = 14
    merge: int = 2
    window: int = 4
    full: tuple[int, ...] = (7, 15, 23, 31)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def tokens(self) -> int:
        """Patches of a frame."""
        return self.grid[0] * self.grid[1]

    @property
    def merged(self) -> tuple[int, int]:
        """(rows, columns) of tokens of a frame."""
        return self.grid[0] // self.merge, self.grid[1] // self.merge

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of a frame in pixels."""
        return self.grid[0] * self.patch_size, self.grid[1] * self.patch_size


def qwen_vision_shapes(prefix: str, c: QwenVisionConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor and its shape."""
    d, wide = c.width, c.width * c.merge**2
    out: dict[str, tuple[int, ...]] = {f"{prefix}patch_embed.proj.weight": (d, 3, 2, c.patch_size, c.patch_size)}

    def linear(name: str, rows: int, columns: int) -> None:
        out[f"{prefix}{name}.weight"], out[f"{prefix}{name}.bias"] = (rows, columns), (rows,)

    for i in range(c.depth):
        p = f"blocks.{i}"
        out[f"{prefix}{p}.norm1.weight"] = out[f"{prefix}{p}.norm2.weight"] = (d,)
        linear(f"{p}.attn.qkv", 3 * d, d)
        linear(f"{p}.attn.proj", d, d)
        linear(f"{p}.mlp.gate_proj", c.mlp, d)
        linear(f"{p}.mlp.up_proj", c.mlp, d)
        linear(f"{p}.mlp.down_proj", d, c.mlp)
    out[f"{prefix}merger.ln_q.weight"] = (d,)
    linear("merger.mlp.0", wide, wide)
    linear("merger.mlp.2", c.out, wide)
    return out


@dataclass
class QwenVisionWeights:
    """patch: columns (y, x, channel), both frames of a pair as one; merger: norm, then two products."""

    patch: PackedMatrix
    layers: list[DecoderLayer]
    norm: Tensor
    fc1: PackedMatrix
    fc1_bias: Tensor
    fc2: PackedMatrix
    fc2_bias: Tensor


def load_qwen_vision(
    packer: Packer, recipe: Recipe, prefix: str, c: QwenVisionConfig, done: Callable[[], object] = lambda: None
) -> QwenVisionWeights:
    """done: called after each layer."""

    def product(name: str, parts: list[str], k: int) -> tuple[PackedMatrix, Tensor]:
        names = [f"{prefix}{n}" for n in parts]
        weights = packer.matrix(name, [f"{n}.weight" for n in names], recipe.format("vision", k))
        return weights, packer.stacked(f"{name}.bias", [f"{n}.bias" for n in names])

    def layer(i: int) -> DecoderLayer:
        p = f"blocks.{i}"
        qkv, qkv_bias = product(f"vision.{i}.qkv", [f"{p}.attn.qkv"], c.width)
        out, o_bias = product(f"vision.{i}.out", [f"{p}.attn.proj"], c.width)
        gate_up, gate_up_bias = product(f"vision.{i}.gate_up", [f"{p}.mlp.{n}_proj" for n in ("gate", "up")], c.width)
        down, down_bias = product(f"vision.{i}.down", [f"{p}.mlp.down_proj"], c.mlp)
        one, two = (packer.vector(f"{prefix}{p}.norm{n}.weight") for n in (1, 2))
        done()
        return DecoderLayer(qkv, out, gate_up, down, one, two, qkv_bias, o_bias, gate_up_bias, down_bias)

    patch, wide = f"{prefix}patch_embed.proj.weight", c.width * c.merge**2
    return QwenVisionWeights(
        packer.matrix("vision.patch", [patch], recipe.dtype, width=3 * c.patch_size**2, rows=c.width,
                      fn=lambda w: w.sum(2).transpose(0, 2, 3, 1)),
        [layer(i) for i in range(c.depth)], packer.vector(f"{prefix}merger.ln_q.weight"),
        *product("merger.0", ["merger.mlp.0"], wide), *product("merger.2", ["merger.mlp.2"], wide),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ windows
@dataclass(frozen=True)
class Windows:
    """Windows of one shape: the merged tokens of each, [windows, rows * columns, 2] (row, column), row by row."""

    shape: tuple[int, int]
    units: np.ndarray


def windows_of(c: QwenVisionConfig) -> list[Windows]:
    """Of a frame, those of equal shape together; at the right and at the bottom they are smaller."""
    rows, columns = c.merged
    found: dict[tuple[int, int], list[np.ndarray]] = {}
    for y in range(0, rows, c.window):
        for x in range(0, columns, c.window):
            h, w = min(c.window, rows - y), min(c.window, columns - x)
            units = np.stack(np.meshgrid(np.arange(y, y + h), np.arange(x, x + w), indexing="ij"), -1).reshape(-1, 2)
            found.setdefault((h, w), []).append(units)
    return [Windows(shape, np.stack(units)) for shape, units in found.items()]


def patches_of(units: np.ndarray, merge: int) -> np.ndarray:
    """[..., merge^2, 2]: (row, column) of the patches of merged tokens [..., 2], row by row."""
    inside = np.stack(np.meshgrid(np.arange(merge), np.arange(merge), indexing="ij"), -1).reshape(-1, 2)
    return units[..., None, :] * merge + inside


def rotary_rows(places: np.ndarray, head_dim: int) -> np.ndarray:
    """f32 [n, head_dim]: cosines, then sines, of the angles of patches at (row, column) [n, 2]: the first half of the
    pairs turns by row, the second by column."""
    half = head_dim // 2
    turn = THETA ** (-np.arange(0, half, 2, dtype=np.float64) / half)
    angle = (places[:, :, None] * turn).reshape(len(places), -1)
    return np.concatenate([np.cos(angle), np.sin(angle)], 1).astype(np.float32)


def workspace_bytes(c: QwenVisionConfig, images: int) -> int:
    """Of a pass of `images`."""
    m = images * c.tokens
    sizes = [gemm_op.workspace_bytes(m, max(c.width, c.mlp, 3 * c.patch_size**2)),
             gemm_op.workspace_bytes(m // c.merge**2, c.width * c.merge**2)]  # fmt: skip
    longest = [c.tokens, *(w.units.shape[1] * c.merge**2 for w in windows_of(c))]
    return max(*sizes, *(attention_op.workspace_bytes(n, c.heads, c.head_dim, _room(n)) for n in longest))


def _room(tokens: int) -> int:
    return -(-tokens // 16) * 16


@dataclass
class _Group:
    """Windows of one shape in memory: rows first .. first + count of every buffer, as sequences of a cache."""

    first: int
    count: int
    cache: KVCache
    pos: Tensor
    rope: Tensor


class QwenVisionTower:
    """Buffers of a pass and its ops. images f32 [n, H, W, 3], normalised; out f32 [n * tokens, width]: merged tokens
    frame by frame, row by row.

    In memory rows lie window by window, those of equal shape together, so that each shape is one attention over equal
    sequences. Rotary angles matter by their differences alone, so a window's table begins at its own corner.
    """

    def __init__(
        self, arena: Arena, c: QwenVisionConfig, weights: QwenVisionWeights, images: int, kv_format: str, ws: Tensor
    ) -> None:
        self.config, self.weights, self._n, self._ws = c, weights, images, ws
        m, d = images * c.tokens, c.width
        (height, width), units = c.size, m // c.merge**2

        def buffer(name: str, rows: int, columns: int) -> Tensor:
            return arena.alloc(f"vision.{name}", (rows, columns))

        def constant(name: str, values: np.ndarray) -> Tensor:
            dtype = "f32" if values.dtype == np.float32 else "i32"
            out = arena.alloc(f"vision.{name}", values.shape, dtype, "weights")
            if not arena.dry:
                out.write(values.astype(np.float32 if dtype == "f32" else np.int32))
            return out

        def table(name: str, places: np.ndarray) -> Tensor:
            rows = rotary_rows(places, c.head_dim)
            return constant(name, np.pad(rows, ((0, _room(len(rows)) - len(rows)), (0, 0))))

        self.images = arena.alloc("images", (images, height, width, 3), "f32", "io")
        self._patches, self._placed = (buffer(name, m, 3 * c.patch_size**2) for name in ("patches", "placed"))
        widths = DecoderBuffers.widths(d, c.heads, c.heads, c.head_dim, c.mlp)
        self._b = DecoderBuffers(**{k: buffer(k, m, n) for k, n in widths.items()}, ws=ws)
        self._normed = buffer("normed", m, d)
        self._merged = buffer("merged", units, d * c.merge**2)
        self._unordered, self.out = (
            buffer("unordered", units, c.out),
            arena.alloc("semantic", (units, c.out), "f32", "io"),
        )
        # Where each row of memory is: frame, merged token, patch.
        order, merged_at, places, self._groups = [], np.empty(units, np.int64), [], []
        columns, token_columns, at = c.grid[1], c.merged[1], 0
        for i, w in enumerate(windows_of(c)):
            size = w.units.shape[1] * c.merge**2
            local = patches_of(w.units[0] - w.units[0, 0], c.merge).reshape(-1, 2)
            count = images * len(w.units)
            cache = KVCache.empty(arena, f"vision.kv.{i}", c.heads, c.head_dim, _room(size), kv_format, count,
                                  "workspace")  # fmt: skip
            self._groups.append(_Group(at, count * size, cache, constant(f"pos.{i}", np.zeros(count, np.int32)),
                                       table(f"rope.{i}", local)))  # fmt: skip
            for f in range(images):
                patches = patches_of(w.units, c.merge).reshape(-1, 2)
                order.append(f * c.tokens + patches[:, 0] * columns + patches[:, 1])
                where = f * c.tokens // c.merge**2 + (w.units[..., 0] * token_columns + w.units[..., 1]).reshape(-1)
                merged_at[where] = (at + np.arange(len(patches))).reshape(-1, c.merge**2)[:, 0] // c.merge**2
                places.append(np.concatenate([np.full((len(patches), 1), f), patches], 1))
                at += len(patches)
        rows = np.concatenate(places)
        by_frame = np.argsort(rows[:, 0], kind="stable")  # memory row of each row of the frames' sequences
        self._order = constant("order", np.concatenate(order))
        self._raster = constant("raster", merged_at)
        self._full_order = constant("full_order", by_frame)
        self._full_rope = table("full_rope", rows[by_frame[: c.tokens], 1:])
        self._full = KVCache.empty(arena, "vision.kv", c.heads, c.head_dim, _room(c.tokens), kv_format, images,
                                   "workspace")  # fmt: skip
        self._zeros = constant("pos", np.zeros(images, np.int32))

    def look(self) -> Tensor:
        """All images through every layer and the merger, into `out`."""
        c, w, b, ws = self.config, self.weights, self._b, self._ws
        conv_patches(self.images, self._patches, size=c.patch_size, stride=c.patch_size, label="patches")
        gather(self._patches, self._order, self._placed, label="windows")
        gemm(self._placed, w.patch, b.x, ws=ws, label="patch")
        for i, layer in enumerate(w.layers):
            mix = self._whole if i in c.full else self._windowed
            gated_layer(layer, b, mix, c.heads * c.head_dim, eps=NORM_EPS, label=f"vision.{i}")
        norm(b.x, self._normed, kind="rms", weight=w.norm, eps=NORM_EPS, label="merger.norm")
        units = self._normed.slice(0, self._merged.shape)
        gemm(units, w.fc1, self._merged, bias=w.fc1_bias, act="gelu", ws=ws, label="merger.0")
        gemm(self._merged, w.fc2, self._unordered, bias=w.fc2_bias, ws=ws, label="merger.2")
        gather(self._unordered, self._raster, self.out, label="raster")
        return self.out

    def _windowed(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        for g in self._groups:
            q_, k_, v_, out_ = (t.rows(g.first, g.count) for t in (q, k, v, out))
            attention(q_, k_, v_, g.cache, g.pos, out_, heads=self.config.heads, causal=False, rope=g.rope,
                      ws=self._ws, label="windows")  # fmt: skip

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        attention(q, k, v, self._full, self._zeros, out, heads=self.config.heads, causal=False, rope=self._full_rope,
                  order=self._full_order, ws=self._ws, label="frames")  # fmt: skip
