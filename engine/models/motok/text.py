"""CLIP's text tower as a plan: the tokens that are there, and the feature at the one that ends them.

Attention is causal and the feature is that of the last token, so what CLIP pads with changes nothing and is left out.
"""

from __future__ import annotations

import numpy as np

from engine.blocks.transformer import TowerBuffers, tower_layer
from engine.models.motok.config import ClipText
from engine.models.motok.planners import EPS, padded_ctx
from engine.models.motok.weights import TextWeights
from engine.ops import attention as attention_op
from engine.ops.attention import KVCache
from engine.ops.gather import gather
from engine.ops.gemm import gemm
from engine.ops.norm import norm
from engine.runtime.arena import Arena, Tensor


class TextPlan:
    """Buffers and plan of the tower (Radford et al. 2021, section 2.4)."""

    def __init__(self, arena: Arena, t: ClipText, w: TextWeights, ws: Tensor, kv: str) -> None:
        self.t, self.w, self.ws = t, w, ws

        def room(name: str, width: int, rows: int = t.ctx) -> Tensor:
            return arena.alloc(f"text.{name}", (rows, width))

        self.ids = arena.alloc("text.ids", (t.ctx,), "i32", "io")
        self.count, self.last = (arena.alloc(f"text.{n}", (1,), "i32", "io") for n in ("count", "last"))
        cache = KVCache.empty(arena, "text.kv", t.heads, t.width // t.heads, padded_ctx(t.ctx), kv, 1, "workspace")
        self.b = TowerBuffers(
            room("x", t.width), room("qkv", 3 * t.width), room("mixed", t.width), room("hidden", t.ff), cache,
            arena.alloc("text.pos", (1,), "i32", "io"), ws,
        )  # fmt: skip
        self.end = room("end", t.width, 1)
        self.feature = arena.alloc("text.feature", (1, t.embed), "f32", "io")

    @staticmethod
    def workspace(t: ClipText) -> int:
        return attention_op.workspace_bytes(t.ctx, t.heads, t.width // t.heads, padded_ctx(t.ctx))

    def request(self, ids: list[int]) -> None:
        whole = np.zeros(self.t.ctx, np.int32)
        whole[: len(ids)] = ids
        self.ids.write(whole)
        self.count.write(np.array([len(ids)], np.int32))
        self.last.write(np.array([len(ids) - 1], np.int32))

    def encode(self) -> None:
        """The feature [1, embed] of ids[: count]."""
        w, b = self.w, self.b
        gather(w.tokens, self.ids, b.x, rows=self.count, label="tokens")
        norm(b.x, b.x, kind="none", add=w.positions, rows=self.count, label="positions")
        for i, layer in enumerate(w.layers):
            tower_layer(layer, b, heads=self.t.heads, eps=EPS, act="quick_gelu", causal=True, live=self.count,
                        label=str(i))  # fmt: skip
        gather(b.x, self.last, self.end, label="end")
        gemm(self.end, w.projection, self.feature, prologue="layer", norm=w.norm.weight, norm_bias=w.norm.bias, eps=EPS,
             ws=self.ws, label="projection")  # fmt: skip
