"""What sees frames: the semantic towers of both variants behind one face, and what brings generator features to the
language model's width."""

from __future__ import annotations

import numpy as np

from engine.blocks.qwen_vision import QwenVisionTower, QwenVisionWeights, patches_of
from engine.blocks.qwen_vision import workspace_bytes as qwen_bytes
from engine.blocks.scene import fit_width, resize
from engine.blocks.siglip import SiglipTower, SiglipWeights
from engine.blocks.siglip import workspace_bytes as siglip_bytes
from engine.errors import InputError
from engine.models.vega3d.config import FIT_WIDTH, SceneConfig, SpatialConfig
from engine.models.vega3d.generator import bilinear
from engine.models.vega3d.weights import Mlp
from engine.ops import gemm as gemm_op
from engine.ops.gather import Sums, gather_sum
from engine.ops.gemm import gemm
from engine.ops.norm import norm
from engine.runtime.arena import Arena, Tensor

#: Of the pictures that CLIP, and Qwen2.5-VL after it, was trained on.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MERGER_EPS = 1e-6

Entries = list[list[tuple[int, float]]]


def bilinear_grid(source: tuple[int, int], to: tuple[int, int]) -> Entries:
    """What each cell of a grid (rows, columns) takes of another: bilinear between centres, no antialias."""
    (rows, by_row), (columns, by_column) = (bilinear(n, m) for n, m in zip(source, to))
    return [
        [(int(y) * source[1] + int(x), float(a * b))
         for y, a in zip(rows[i], by_row[i]) for x, b in zip(columns[j], by_column[j])]
        for i in range(to[0]) for j in range(to[1])
    ]  # fmt: skip


class SiglipEyes:
    """SigLIP and the semantic projector, whose second product is linear: pooled before it (spec 5.3).

    out f32 [n * cells, D]; hidden f32 [n * tokens, D], between the products.
    """

    def __init__(
        self, arena: Arena, c: SceneConfig, vision: SiglipWeights, projector: Mlp, n: int, kv: str, ws: Tensor
    ) -> None:
        d, v, self._c, self._w, self._ws = c.language.width, c.vision, c, projector, ws
        self.tower = SiglipTower(arena, v, vision, n, kv, ws)
        self._pool = Sums.of(arena, "pool", bilinear_grid((v.side,) * 2, c.grid), v.tokens)
        self.hidden = arena.alloc("semantic.hidden", (n * v.tokens, d))
        self._pooled = arena.alloc("semantic.pooled", (n * c.cells, d))
        self.out = arena.alloc("semantic", (n * c.cells, d), "f32", "io")

    @staticmethod
    def workspace(c: SceneConfig, n: int) -> int:
        d, rows = c.language.width, n * c.vision.tokens
        wide = (gemm_op.workspace_bytes(rows, max(d, c.vision.width)), gemm_op.workspace_bytes(n * c.cells, d))
        return max(*wide, siglip_bytes(c.vision, n))

    def prepare(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 frames as the tower, and as the generator, get them."""
        made = resize(pixels, (self._c.vision.image_size,) * 2)
        return made, made

    def place(self, pictures: np.ndarray) -> None:
        self.tower.images.write(pictures.astype(np.float32) / 127.5 - 1)

    def look(self) -> None:
        self.tower.look(self.tower.images.shape[0])
        self.activate()
        gather_sum(self.hidden, self._pool, self._pooled, label="pool")
        gemm(self._pooled, self._w.fc2, self.out, bias=self._w.fc2_bias, ws=self._ws, label="projector.2")

    def activate(self) -> None:
        """The projector's first product of what the tower holds."""
        gemm(self.tower.x, self._w.fc1, self.hidden, bias=self._w.fc1_bias, act="gelu", ws=self._ws,
             label="projector.0")  # fmt: skip

    def project(self, x: Tensor, out: Tensor) -> None:
        """Its second product."""
        gemm(x, self._w.fc2, out, bias=self._w.fc2_bias, ws=self._ws, label="projector.2")


class QwenEyes:
    """Qwen2.5-VL's tower with its merger. out f32 [n * cells, D]."""

    def __init__(self, arena: Arena, c: SpatialConfig, vision: QwenVisionWeights, n: int, kv: str, ws: Tensor) -> None:
        self._c = c
        self.tower = QwenVisionTower(arena, c.vision, vision, n, kv, ws)
        self.out = self.tower.out

    @staticmethod
    def workspace(c: SpatialConfig, n: int) -> int:
        return qwen_bytes(c.vision, n)

    def prepare(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 frames as the tower, and as the generator, get them: the towers see the same cut."""
        (width, height), (h, w) = self._c.frame_size, pixels.shape[1:3]
        if (h, w) != (height, width):
            raise InputError(
                f"frames of {w} x {h} pixels; this model was loaded for {width} x {height}, load it with "
                f"frame_size=({w}, {h})"
            )
        fitted = fit_width(pixels, FIT_WIDTH, self._c.vision.patch_size)
        return resize(fitted, self._c.vision.size), fitted

    def place(self, pictures: np.ndarray) -> None:
        mean, std = (np.array(v, np.float32) for v in (CLIP_MEAN, CLIP_STD))
        self.tower.images.write((pictures.astype(np.float32) / 255 - mean) / std)

    def look(self) -> None:
        self.tower.look()


class GenerativeProjector:
    """Generator features to the language model's width. given f32 [n * cells of the generator, C]; out f32 [n * cells,
    D].

    Variant A's features come pooled to the visual tokens' grid. Variant B's come on the generator's own, are brought to
    that of the patches, normed, and 2 x 2 of them meet one product.
    """

    def __init__(
        self, arena: Arena, c: SceneConfig | SpatialConfig, w: Mlp, source: tuple[int, int], n: int, ws: Tensor
    ) -> None:
        """source: the grid of the features."""
        self._w, self._ws, rows, d = w, ws, source[0] * source[1], c.language.width
        self.cells = rows
        self.given = arena.alloc("features", (n * rows, c.generative), "f32", "io")
        self._input, self._grid = self.given, None
        if isinstance(c, SpatialConfig):
            v = c.vision
            units = np.stack(np.divmod(np.arange(c.cells), v.merged[1]), -1)
            taken, places = bilinear_grid(source, v.grid), patches_of(units, v.merge).reshape(-1, 2)
            self._grid = Sums.of(arena, "features.grid", [taken[y * v.grid[1] + x] for y, x in places], rows)
            self._resized = arena.alloc("features.resized", (n * v.tokens, c.generative))
            self._normed = arena.alloc("features.normed", (n * v.tokens, c.generative))
            self._input = self._normed.slice(0, (n * c.cells, c.generative * v.merge**2))
        self._hidden = arena.alloc("generative.hidden", (n * c.cells, w.fc1.n))
        self.out = arena.alloc("generative", (n * c.cells, d))

    @staticmethod
    def workspace(c: SceneConfig | SpatialConfig, n: int) -> int:
        if isinstance(c, SpatialConfig):
            return gemm_op.workspace_bytes(n * c.cells, max(c.hidden, c.generative * c.vision.merge**2))
        return gemm_op.workspace_bytes(n * c.cells, max(c.language.width, c.generative))

    def project(self) -> None:
        w = self._w
        if self._grid is not None:
            gather_sum(self.given, self._grid, self._resized, label="generative.grid")
            norm(self._resized, self._normed, kind="rms", weight=w.norm, eps=MERGER_EPS, label="generative.norm")
        gemm(self._input, w.fc1, self._hidden, bias=w.fc1_bias, act="gelu", ws=self._ws, label="generative.0")
        gemm(self._hidden, w.fc2, self.out, bias=w.fc2_bias, ws=self._ws, label="generative.2")
