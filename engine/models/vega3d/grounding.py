"""Grounding of variant A: features of boxes, the query of a description, and their cosines (InfoNCE heads)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from engine.blocks.scene import patches_in_boxes, position_code
from engine.models.vega3d.config import OBJECTS, SceneConfig
from engine.models.vega3d.towers import SiglipEyes
from engine.models.vega3d.weights import GroundWeights, Mlp
from engine.ops import gemm as gemm_op
from engine.ops.gather import Sums, gather_sum
from engine.ops.gemm import gemm
from engine.ops.norm import norm
from engine.runtime.arena import Arena, Tensor
from engine.runtime.plan import Plan

HEAD_EPS = 1e-5  # of the layer norms in the heads


class Grounder:
    """Buffers and plans: query (of a hidden state f32 [1, D]), mean, objects, match."""

    def __init__(self, arena: Arena, c: SceneConfig, w: GroundWeights, eyes: SiglipEyes, n: int, ws: Tensor) -> None:
        d, self._c, self._w, self._eyes, self._ws = c.language.width, c, w, eyes, ws

        def io(name: str, *shape: int, dtype: str = "f32") -> Tensor:
            return arena.alloc(f"ground.{name}", shape, dtype, "io")

        most = OBJECTS * n * c.vision.tokens
        self._members = Sums(io("offsets", OBJECTS + 1, dtype="i32"), io("rows", most, dtype="i32"),
                             io("weights", most), n * c.vision.tokens)  # fmt: skip
        self._part, self._sum = arena.alloc("ground.part", (OBJECTS, d)), io("sum", OBJECTS, d)
        self._objects, self._object_hidden = io("objects", OBJECTS, d), arena.alloc("ground.hidden", (OBJECTS, d))
        self._object_out, self._query_out = io("object_out", OBJECTS, d), io("query_out", 1, d)
        self.hidden, self._query_hidden = io("query", 1, d), arena.alloc("ground.query_hidden", (1, d))

    @staticmethod
    def workspace(c: SceneConfig) -> int:
        return gemm_op.workspace_bytes(OBJECTS, c.language.width)

    def steps(self) -> dict[str, Callable[[], None]]:
        """What each plan records; the query's begins with what writes `hidden`."""
        return {"mean": self._mean, "objects": lambda: self._eyes.project(self._sum, self._objects),
                "match": lambda: self._head(self._w.objects, self._objects, self._object_hidden, self._object_out,
                                            "objects")}  # fmt: skip

    def query(self) -> None:
        """`hidden` through the query's head."""
        self._head(self._w.query, self.hidden, self._query_hidden, self._query_out, "query")

    def _head(self, w: Mlp, x: Tensor, hidden: Tensor, out: Tensor, label: str) -> None:
        gemm(x, w.fc1, hidden, bias=w.fc1_bias, act="relu", ws=self._ws, label=f"{label}.0")
        gemm(hidden, w.fc2, out, prologue="layer", norm=w.norm, norm_bias=w.norm_bias, eps=HEAD_EPS, bias=w.fc2_bias,
             ws=self._ws, label=f"{label}.3")  # fmt: skip

    def _mean(self) -> None:
        """Adds to each object's sum what a pass of frames shows of it, between the projector's products."""
        self._eyes.activate()
        gather_sum(self._eyes.hidden, self._members, self._part, label="members")
        norm(self._part, self._sum, kind="none", add=self._sum, label="sum")

    # ------------------------------------------------------------------------------------------ what a caller gives
    def objects(
        self, plans: dict[str, Plan], coords: np.ndarray, tokens: list[np.ndarray], boxes: np.ndarray, coord_dtype: str
    ) -> np.ndarray:
        """f32 [K, D]: mean of the unfused semantic tokens of each box's patches, with the code of its centre.

        coords [T, S, S, 3]; tokens: SigLIP's by pass; boxes [K, 6].
        """
        c, v = self._c, self._c.vision
        seen = patches_in_boxes(coords, boxes, (v.side, v.side), v.patch_size, coord_dtype=coord_dtype)
        flat = seen.reshape(len(boxes), len(tokens), -1)
        counts = flat.sum((1, 2))
        out = np.empty((len(boxes), c.language.width), np.float32)
        for at in range(0, len(boxes), OBJECTS):
            part = flat[at : at + OBJECTS]
            self._sum.write(np.zeros(self._sum.shape, np.float32))
            for i in np.flatnonzero(part.any((0, 2))):
                self._eyes.tower.x.write(tokens[i])
                members = [np.flatnonzero(row) for row in part[:, i]]
                sizes = [len(m) for m in members] + [0] * (OBJECTS - len(members))
                self._members.offsets.write(np.cumsum([0, *sizes]).astype(np.int32))
                self._members.rows.window()[: sum(sizes)] = np.concatenate(members)
                share = np.repeat(1 / np.maximum(counts[at : at + OBJECTS], 1), sizes[: len(part)])
                self._members.weights.window()[: sum(sizes)] = share
                plans["mean"].replay()
            plans["objects"].replay()
            out[at : at + len(part)] = self._objects.read()[: len(part)]
        out[counts == 0] = 0
        return out + position_code(c.voxels.of(boxes[:, :3], coord_dtype), c.language.width)

    def scores(self, plans: dict[str, Plan], objects: np.ndarray) -> np.ndarray:
        """f64 [K + 1]: cosine of the last query with each object [K, D], last with 'none of them'."""
        query = self._query_out.read().astype(np.float64)[0]
        rows, out = np.concatenate([objects, self._w.zero_target.reshape(1, -1)]), []
        for at in range(0, len(rows), OBJECTS):
            part = rows[at : at + OBJECTS]
            padded = np.zeros(self._objects.shape, np.float32)
            padded[: len(part)] = part
            self._objects.write(padded)
            plans["match"].replay()
            out.append(self._object_out.read()[: len(part)].astype(np.float64))
        made = np.concatenate(out)
        return made @ query / (np.linalg.norm(made, axis=1) * np.linalg.norm(query))
