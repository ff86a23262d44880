"""The planners as plans: all passes of the discrete one, a step of the autoregressive one (section 3.3).

What a pass is conditioned on comes from a table of rows, one per position with and without the trajectory and one for
the text and for none; which rows each pass takes is known before the first, so coins are no decision of the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.blocks.transformer import TowerBuffers, post_norm_layer, tower_layer
from engine.models.motok.config import MoTokConfig
from engine.models.motok.convs import ConvBuffers, Stream
from engine.models.motok.schedule import masked_counts
from engine.models.motok.weights import PlannerWeights
from engine.ops import attention as attention_op
from engine.ops.attention import KVCache
from engine.ops.gather import gather
from engine.ops.gemm import gemm
from engine.ops.norm import norm
from engine.ops.pick import NextState, pick_masked, pick_next
from engine.runtime.arena import Arena, Tensor

EPS = 1e-5
HEAD_EPS = 1e-12
PASSES = 3  # of the autoregressive planner: with everything, without the text, without the trajectory


@dataclass(frozen=True)
class Conditions:
    """What a request conditions its tokens on. coins [steps] bool: the second pass drops the trajectory."""

    text: bool
    trajectory: bool
    coins: np.ndarray
    guided: bool  # classifier-free guidance needs a second pass

    @property
    def drops(self) -> bool:
        """The second pass drops one of two conditions."""
        return self.text and self.trajectory


def padded_ctx(positions: int) -> int:
    """Of a cache that holds so many."""
    return -(-positions // 16) * 16


class DDMPlan:
    """Buffers and plans of the discrete planner (MoMask, Guo et al. 2024, section 3.3)."""

    def __init__(self, arena: Arena, c: MoTokConfig, w: PlannerWeights, convs: ConvBuffers, kv: str) -> None:
        d, n, steps = c.ddm, c.max_tokens, c.ddm.steps
        m, ctx = 2 * (n + 1), padded_ctx(n + 1)
        self.c, self.w, self.convs, self.ws = c, w, convs, convs.ws
        self.steps = steps

        def ws(name: str, *shape: int) -> Tensor:
            return arena.alloc(f"ddm.{name}", shape)

        def io(name: str, *shape: int, dtype: str = "i32") -> Tensor:
            return arena.alloc(f"ddm.{name}", shape, dtype, "io")

        # Rows [text, positions with the trajectory; none, positions alone].
        self.table = arena.alloc("ddm.conditions", (2 * (n + 1), d.dim), "f32", "state")
        self.rows, self.ids = io("rows", steps, m), io("ids", n)
        self.uniforms, self.counts = io("uniforms", steps, n, dtype="f32"), io("counts", steps)
        self.scale = io("scale", 1, dtype="f32")
        self.feature = io("feature", 1, c.clip.embed, dtype="f32")
        cache = KVCache.empty(arena, "ddm.kv", d.heads, d.dim // d.heads, ctx, kv, 2, "workspace")
        self.b = TowerBuffers(ws("x", m, d.dim), ws("qkv", m, 3 * d.dim), ws("mixed", m, d.dim), ws("hidden", m, d.ff),
                              cache, io("pos", 2), self.ws)  # fmt: skip
        self.embedded, self.head, self.logits = ws("embedded", n, d.dim), ws("head", m, d.dim), ws("logits", m, c.codes)
        self.trajectory = ws("trajectory", n, d.dim)

    @staticmethod
    def workspace(c: MoTokConfig) -> int:
        d, n = c.ddm, c.max_tokens
        return attention_op.workspace_bytes(n + 1, d.heads, d.dim // d.heads, padded_ctx(n + 1))

    def prepare(self) -> None:
        """The rows that no request changes."""
        n, dim = self.c.max_tokens, self.c.ddm.dim
        bias = self.w.condition.bias
        assert bias is not None
        rows = np.concatenate([bias.read()[None], self.w.positions.read()])
        self.table.slice((n + 1) * dim, (n + 1, dim)).write(rows)

    def begin(self) -> None:
        """The text's row."""
        out = self.table.slice(0, (1, self.c.ddm.dim))
        gemm(self.feature, self.w.condition.w, out, bias=self.w.condition.bias, ws=self.ws, label="text")

    def hint(self, source: Stream, t: int) -> None:
        """Rows of positions with the trajectory, from the hints of t frames."""
        n, dim = t // self.c.rate, self.c.ddm.dim
        out = self.trajectory.slice(0, (n, dim))
        self.convs.encode(self.w.trajectory, source, out, t, "trajectory")
        norm(self.w.positions.slice(0, (n, dim)), self.table.slice(dim, (n, dim)), kind="none", add=out,
             label="trajectory.rows")  # fmt: skip

    def request(self, n: int, given: Conditions, uniforms: np.ndarray, ids: np.ndarray, scale: float) -> None:
        """Writes what the passes over n tokens read. ids [n] i32: known tokens, MASK where one is drawn."""
        half = self.c.max_tokens + 1
        places = np.arange(1, n + 1, dtype=np.int32)

        def rows(text: bool, trajectory: bool) -> np.ndarray:
            return np.concatenate([[0 if text else half], places + (0 if trajectory else half)]).astype(np.int32)

        table = np.full(self.rows.shape, half, np.int32)
        for i in range(self.steps):
            table[i, : n + 1] = rows(given.text, given.trajectory)
            drop = bool(given.coins[i]) if given.drops else False
            table[i, n + 1 : 2 * (n + 1)] = rows(drop, given.trajectory and not drop)
        self.rows.write(table)
        whole = np.zeros(self.ids.shape, np.int32)
        whole[:n] = ids
        self.ids.write(whole)
        draws = np.zeros(self.uniforms.shape, np.float32)
        draws.reshape(-1)[: uniforms.size] = uniforms.reshape(-1)
        self.uniforms.write(draws)
        self.counts.write(np.array(masked_counts(int((ids == self.c.codes).sum()), self.steps), np.int32))
        self.scale.write(np.array([scale], np.float32))

    def passes(self, n: int, guided: bool) -> None:
        """Every pass over n tokens, into ids."""
        c, d, w, b, ws = self.c, self.c.ddm, self.w, self.b, self.ws
        m, each = (2 if guided else 1) * (n + 1), n + 1

        def rows(x: Tensor, count: int = m) -> Tensor:
            return x.slice(0, (count, x.shape[1]))

        x, embedded, head, logits = rows(b.x), rows(self.embedded, n), rows(self.head), rows(self.logits)
        halves = 2 if guided else 1
        one = TowerBuffers(x, rows(b.qkv), rows(b.mixed), rows(b.hidden), b.cache.first(halves),
                           b.pos.slice(0, (halves,)), ws)  # fmt: skip
        ids = self.ids.slice(0, (n,))

        def tokens(t: Tensor, i: int) -> Tensor:  # of pass i, behind the text
            width = t.shape[1]
            return t.slice((i * each + 1) * width, (n, width))

        for i in range(self.steps):
            gather(self.table, self.rows.slice(i * self.rows.shape[1], (m,)), x, label=f"{i}.conditions")
            gather(w.tokens, ids, embedded, label=f"{i}.tokens")
            for j in range(halves):
                norm(tokens(x, j), tokens(x, j), kind="none", add=embedded, label=f"{i}.add")
            for j, layer in enumerate(w.layers):
                post_norm_layer(layer, one, heads=d.heads, eps=EPS, act="gelu", label=f"{i}.{j}")
            assert w.head_in is not None
            gemm(x, w.head_in.w, head, bias=w.head_in.bias, act="gelu", ws=ws, label=f"{i}.dense")
            gemm(head, w.head.w, logits, prologue="layer", norm=w.head_norm.weight, norm_bias=w.head_norm.bias,
                 eps=HEAD_EPS, bias=w.head.bias, ws=ws, label=f"{i}.logits")  # fmt: skip
            last = i + 1 == self.steps
            pick_masked(
                tokens(logits, 0), ids, self.uniforms.slice(i * n, (n,)),
                None if last else self.counts.slice(i + 1, (1,)), uncond=tokens(logits, 1) if guided else None,
                scale=self.scale if guided else None, mask_id=c.codes, topk=c.topk, temperature=d.temperature,
                label=f"{i}.pick",
            )  # fmt: skip


class ARPlan:
    """Buffers and plans of the autoregressive planner (T2M-GPT, Zhang et al. 2023, section 3.2)."""

    def __init__(self, arena: Arena, c: MoTokConfig, w: PlannerWeights, convs: ConvBuffers, kv: str) -> None:
        a, n = c.ar, c.max_tokens
        ctx = padded_ctx(a.block)
        self.c, self.w, self.convs, self.ws = c, w, convs, convs.ws

        def ws(name: str, *shape: int) -> Tensor:
            return arena.alloc(f"ar.{name}", shape)

        def io(name: str, *shape: int) -> Tensor:
            return arena.alloc(f"ar.{name}", shape, "f32", "io")

        # Four rows of position 0 (text and trajectory, text, trajectory, none), then positions with it, then without.
        self.table = arena.alloc("ar.conditions", (4 + 2 * n, a.dim), "f32", "state")
        self.state = NextState.empty(arena, "ar", n, PASSES + 1)
        self.scale, self.feature = io("scale", 1), io("feature", 1, c.clip.embed)
        self.caches = [KVCache.empty(arena, f"ar.kv.{i}", a.heads, a.dim // a.heads, ctx, kv, PASSES)
                       for i in range(len(w.layers))]  # fmt: skip
        self.x, self.qkv, self.mixed = ws("x", PASSES, a.dim), ws("qkv", PASSES, 3 * a.dim), ws("mixed", PASSES, a.dim)
        self.hidden, self.embedded = ws("hidden", PASSES, a.ff), ws("embedded", PASSES, a.dim)
        self.logits, self.other = ws("logits", PASSES, c.codes + 1), ws("other", 1, c.codes + 1)
        self.trajectory = ws("trajectory", n, a.dim)

    @staticmethod
    def workspace(c: MoTokConfig) -> int:
        a = c.ar
        return attention_op.workspace_bytes(1, a.heads, a.dim // a.heads, padded_ctx(a.block))

    def _row(self, i: int, count: int = 1) -> Tensor:
        dim = self.c.ar.dim
        return self.table.slice(i * dim, (count, dim))

    def prepare(self) -> None:
        """The rows that no request changes."""
        n, bias = self.c.max_tokens, self.w.condition.bias
        assert bias is not None
        positions = self.w.positions.read()
        self._row(3).write(bias.read()[None] + positions[:1])
        self._row(4 + n, n).write(positions[:n])

    def begin(self) -> None:
        """The text's row."""
        first = self.w.positions.slice(0, (1, self.c.ar.dim))
        gemm(self.feature, self.w.condition.w, self._row(1), bias=self.w.condition.bias, residual=first, ws=self.ws,
             label="text")  # fmt: skip

    def hint(self, source: Stream, t: int) -> None:
        """Rows with the trajectory, from the hints of t frames; after `begin`."""
        n, dim = t // self.c.rate, self.c.ar.dim
        out = self.trajectory.slice(0, (n, dim))
        self.convs.encode(self.w.trajectory, source, out, t, "trajectory")
        norm(self.w.positions.slice(0, (n, dim)), self._row(4, n), kind="none", add=out, label="trajectory.rows")
        for with_it, without in ((0, 1), (2, 3)):
            norm(
                self._row(without),
                self._row(with_it),
                kind="none",
                add=out.slice(0, (1, dim)),
                label="trajectory.first",
            )

    def request(self, n: int, given: Conditions, uniforms: np.ndarray, scale: float) -> None:
        """Writes what the steps read. n: tokens that come at most; END does not come before `state.open` is set."""
        s, most = self.state, self.c.max_tokens
        places = np.arange(most, dtype=np.int32)

        def rows(text: bool, trajectory: bool) -> np.ndarray:
            out = places + (4 if trajectory else 4 + most)
            out[0] = (0 if text else 2) + (0 if trajectory else 1)
            return out

        drop = np.zeros(most, bool)
        drop[: len(given.coins)] = given.coins if given.drops else False
        columns = (rows(given.text, given.trajectory), rows(False, given.trajectory), rows(given.text, False), 1 + drop)
        table = np.stack(columns, 1).astype(np.int32)
        draws = np.zeros(most, np.float32)
        draws[: len(uniforms)] = uniforms
        s.uniforms.write(draws)
        s.tokens.write(np.full(most, self.c.codes + 1, np.int32))
        for tensor, value in ((s.step, 0), (s.limit, n), (s.open, 0), (s.done, 0)):
            tensor.write(np.array([value], np.int32))
        s.ids.write(np.full(PASSES + 1, -1, np.int32))  # no token yet: a row of zeros
        s.pos.write(np.zeros(PASSES + 1, np.int32))
        s.rows_table.write(table)
        s.rows.write(table[0])
        self.scale.write(np.array([scale], np.float32))

    def step(self, passes: int) -> None:
        """The next token. passes: 1; 2 with guidance; 3 where a coin says which condition the second one drops."""
        a, w, s, ws = self.c.ar, self.w, self.state, self.ws

        def rows(t: Tensor, count: int = passes) -> Tensor:
            return t.slice(0, (count, t.shape[1]))

        x, embedded, logits = rows(self.x), rows(self.embedded), rows(self.logits)
        gather(self.table, s.rows.slice(0, (passes,)), x, label="conditions")
        gather(w.tokens, s.ids.slice(0, (passes,)), embedded, label="token")
        norm(x, x, kind="none", add=embedded, label="add")
        for i, layer in enumerate(w.layers):
            one = TowerBuffers(x, rows(self.qkv), rows(self.mixed), rows(self.hidden), self.caches[i].first(passes),
                               s.pos.slice(0, (passes,)), ws)  # fmt: skip
            tower_layer(layer, one, heads=a.heads, eps=EPS, act="gelu", causal=True, label=str(i))
        gemm(x, w.head.w, logits, prologue="layer", norm=w.head_norm.weight, norm_bias=w.head_norm.bias, eps=EPS,
             ws=ws, label="logits")  # fmt: skip
        other = None
        if passes == 2:
            other = logits.slice(logits.shape[1], (1, logits.shape[1]))
        elif passes == PASSES:
            other = self.other
            gather(logits, s.rows.slice(PASSES, (1,)), other, label="second")
        pick_next(rows(logits, 1), s, uncond=other, scale=self.scale if other is not None else None, label="pick")
