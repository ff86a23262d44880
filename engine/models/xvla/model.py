"""X-VLA (Zheng et al. 2025): images and text once, then flow steps, each one static plan.

vision_n   n camera views: DaViT (windows without their padding), projection
prefix     view 0 and the prompt through the BART encoder, all of it projected into the tokens that every step reads
step_b     one flow step of b chunks: the whole sequence through the transformer, for its blocks change every token
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np

from engine.blocks.observation import ActionSpace, InputProfile, ModelInput, lerobot_xvla
from engine.blocks.observation import profile as preset
from engine.blocks.policy import FlowPolicy
from engine.blocks.policy_options import norms_of
from engine.blocks.schedule import ScheduleTable
from engine.blocks.transformer import (
    TowerBuffers,
    TowerLayer,
    post_norm_layer,
    thirds,
    tower_layer,
    tower_qkv,
    tower_rest,
)
from engine.blocks.weights import Shapes
from engine.errors import InputError
from engine.io.checkpoint import Source
from engine.models.xvla.config import NORM_EPS, TIME_PERIOD, XVLAConfig
from engine.models.xvla.weights import Block, PerDomain, Weights, load_weights, shapes
from engine.ops import attention as attention_op
from engine.ops import gemm as gemm_op
from engine.ops.attention import KVCache, Pads, attention
from engine.ops.channel_attention import channel_attention
from engine.ops.conv import conv_depthwise, conv_patches
from engine.ops.flow import FlowState, flow_begin, flow_end
from engine.ops.gather import gather, gather_mean
from engine.ops.gemm import gemm
from engine.ops.norm import norm
from engine.runtime.arena import Arena, Tensor
from engine.runtime.plan import capture

NODES_PER_LAYER = 5
NODES_OUTSIDE = 6  # of a step: begin, action encoder, action decoder, end; the last block has two more
ACT = "gelu_tanh"  # of the policy's blocks


@dataclass
class Windows:
    """Attention windows of one stage: row `order[r]` of a grid is the r-th of its window."""

    side: int
    order: Tensor  # i32 [views * cells]
    offsets: Tensor  # i32 [views * windows + 1]
    pads: Tensor  # i32 [views * windows]: cells that padding would add
    per_view: int
    cache: KVCache


def window_rows(height: int, width: int, side: int) -> tuple[np.ndarray, list[int]]:
    """(raster rows window by window, cells of each window) of a grid whose padding to whole windows is left out."""
    cells = np.arange(height * width, dtype=np.int32).reshape(height, width)
    parts = [
        cells[y : y + side, x : x + side].reshape(-1) for y in range(0, height, side) for x in range(0, width, side)
    ]
    return np.concatenate(parts), [len(p) for p in parts]


class XVLA(FlowPolicy):
    """A loaded X-VLA: `act`, `act_stream`, `reset`, `explain`, `memory`. See engine.load."""

    config: XVLAConfig
    config_type = XVLAConfig
    samplers: ClassVar = {"renoise": "renoise", "euler": "implied"}

    @classmethod
    def default_profile(cls, config: XVLAConfig) -> InputProfile:
        """lerobot's or the authors', by config.json."""
        return _default_profile(config)

    @classmethod
    def vocabulary(cls, config: XVLAConfig) -> int:
        return config.language.vocab_size

    def _load(self, source: Source | None, arena: Arena) -> Weights:
        c, o = self.config, self.options
        places = source or Shapes(shapes(c))
        return load_weights(c, places, arena, o.dtype, o.quant, o.batch, o.progress)

    def _prepare(self) -> None:
        self._domain = -1
        self._choose_domain(self.options.preprocess.profile.domain)

    # ------------------------------------------------------------------------------------------ memory
    def _allocate(self, arena: Arena) -> FlowState:
        o = self.options
        c, v, t, p = self.config, self.config.vision, self.config.language, self.config.policy
        views, batch, kv = c.num_views, o.batch, "bf16" if o.dtype == "bf16" else "f32"
        grids = v.grids
        cells = [h * w for h, w in grids]

        def ws(name: str, *shape: int, dtype: str = "f32") -> Tensor:
            return arena.alloc(name, shape, dtype)

        def io(name: str, *shape: int, dtype: str = "i32", value: np.ndarray | None = None) -> Tensor:
            out = arena.alloc(name, shape, dtype, "io")
            if value is not None and not arena.dry:
                out.write(value)
            return out

        self._images = io("images", views, *v.image_size, 3, dtype="f32")
        patch = [k * k * (v.dims[s - 1] if s else 3) for s, k in enumerate(v.kernels)]
        self._patches = ws("patches", views * max(n * k for n, k in zip(cells, patch)))
        grid = views * max(n * d for n, d in zip(cells, v.dims))
        self._x, self._y, self._mixed = ws("vision.x", grid), ws("vision.y", grid), ws("vision.mixed", grid)
        self._qkv = ws("vision.qkv", 3 * grid)
        self._hidden = ws("vision.hidden", views * max(n * m for n, m in zip(cells, v.mlp)))
        self._windows: list[Windows] = []
        for s, (h, w) in enumerate(grids):
            order, counts = window_rows(h, w, v.window)
            n, longest = len(counts), max(counts)
            rows = np.concatenate([order + i * h * w for i in range(views)])
            cache = KVCache.empty(arena, f"vision.kv.{s}", v.heads[s], v.dims[s] // v.heads[s],
                                  -(-longest // 16) * 16, kv, views * n, "workspace")  # fmt: skip
            self._windows.append(Windows(
                longest, io(f"windows.{s}.order", len(rows), value=rows),
                io(f"windows.{s}.offsets", views * n + 1, value=np.cumsum([0, *counts * views])),
                io(f"windows.{s}.pads", views * n, value=v.window**2 - np.array(counts * views)), n, cache,
            ))  # fmt: skip
        zeros = max(batch, *(views * x.per_view for x in self._windows))
        self._zero = io("zero", zeros)
        last = cells[-1]
        # Projected cells of n views, then their means: one table, from which each view takes its mean first.
        self._projected = ws("projected", views * (last + 1), t.width)
        self._picked = io("picked", views, views * v.tokens, value=np.stack(
            [_picked(n, views, last) for n in range(1, views + 1)]))  # fmt: skip
        self._seen = ws("vision.out", views * v.tokens, t.width)
        self._views = arena.alloc("views", (views * v.tokens, t.width), "f32", "state")
        length = v.tokens + c.tokenizer_max_length
        m, width = batch * c.sequence, c.action_dim + c.proprio_dim + c.dim_time
        sizes = [gemm_op.workspace_bytes(a, b) for a, b in (
            *((views * n, max(k, m_, d)) for n, k, m_, d in zip(cells, patch, v.mlp, v.dims)),
            (length, max(t.width, t.mlp)), (views * v.tokens, t.width), (m, max(p.width, p.mlp, width)))]  # fmt: skip
        sizes += [attention_op.workspace_bytes(x.side, x.cache.kv_heads, x.cache.d, x.cache.ctx) for x in self._windows]
        sizes += [attention_op.workspace_bytes(n, h, d // h, -(-n // 16) * 16) for n, h, d in (
            (length, t.heads, t.width), (c.sequence, p.heads, p.width))]  # fmt: skip
        self._ws = ws("ws", max(sizes), dtype="u8")
        self._tokens = io("tokens", c.tokenizer_max_length)
        self._counting = io("counting", v.tokens, value=np.arange(v.tokens))
        self._encoder = TowerBuffers(
            ws("encoder.x", length, t.width), ws("encoder.qkv", length, 3 * t.width),
            ws("encoder.mixed", length, t.width), ws("encoder.hidden", length, t.mlp),
            KVCache.empty(arena, "encoder.kv", t.heads, t.width // t.heads, -(-length // 16) * 16, kv, 1, "workspace"),
            self._zero.slice(0, (1,)), self._ws,
        )  # fmt: skip
        # Encoded actions of all chunks, then what their steps share; and the first block's queries, keys and values.
        self._fixed = c.context + c.len_soft_prompts
        self._table = arena.alloc("tokens.table", (m, p.width), "f32", "state")
        self._first = arena.alloc("tokens.qkv", (m, 3 * p.width), "f32", "state")
        self._orders = [None, *(io(f"order_{b}", b * c.sequence, value=_order(b, c.horizon, self._fixed))
                                for b in range(2, batch + 1))]  # fmt: skip
        self._behind = io("behind", batch, value=np.full(batch, self._fixed))
        self._tower = TowerBuffers(
            ws("policy.x", m, p.width), ws("policy.qkv", m, 3 * p.width), ws("policy.mixed", m, p.width),
            ws("policy.hidden", m, p.mlp),
            KVCache.empty(arena, "policy.kv", p.heads, p.width // p.heads, -(-c.sequence // 16) * 16, kv, batch, "kv"),
            self._zero, self._ws,
        )  # fmt: skip
        flow = FlowState.empty(arena, "flow", batch, o.schedule.steps, c.horizon, c.action_dim, o.dims, o.ring)
        self._actions = ws("actions", batch * c.horizon, width)
        self._predicted = ws("predicted", batch * c.horizon, c.action_dim)
        self._time_rows = io("time_rows", batch * c.horizon)
        self._times = arena.alloc("times", (o.time_slots * o.time_rows, c.dim_time), "f32", "state")
        self._proprio = io("proprio", batch, c.proprio_dim, dtype="f32") if c.proprio_dim else None
        grippers = np.isin(np.arange(c.action_dim), c.grippers).astype(np.int32)
        self._grippers = io("grippers", c.action_dim, value=grippers)
        return flow

    # ------------------------------------------------------------------------------------------ the plans
    def _capture(self) -> None:
        o = self.options
        for n in range(1, self.config.num_views + 1):
            self.plans[f"vision_{n}"] = capture(partial(self._look, n), f"vision_{n}")
        for b in range(o.batch):
            name = "prefix" if o.batch == 1 else f"prefix.{b}"
            self.plans[name] = capture(partial(self._read, b), name)
        for b in range(1, o.batch + 1):
            name = "step" if o.batch == 1 else f"step_{b}"
            self.plans[name] = capture(partial(self._denoise, b), name)

    def _look(self, n: int) -> None:
        """Views 0..n of the image buffer to tokens of the encoder."""
        v, w, t = self.config.vision, self.weights, self.config.language
        grid = self._images.slice(0, (n, *self._images.shape[1:]))
        for s, (stage, (height, width)) in enumerate(zip(w.stages, v.grids)):
            rows, d = n * height * width, v.dims[s]
            patch = v.kernels[s] ** 2 * grid.shape[3]
            if s:
                flat = grid.slice(0, (grid.shape[0] * grid.shape[1] * grid.shape[2], grid.shape[3]))
                normed = self._y.slice(0, flat.shape)
                norm(flat, normed, weight=stage.norm, bias=stage.norm_bias, eps=NORM_EPS, label=f"vision.{s}.norm")
                grid = normed.slice(0, grid.shape)
            patches, x = self._patches.slice(0, (rows, patch)), self._x.slice(0, (rows, d))
            conv_patches(grid, patches, size=v.kernels[s], stride=v.strides[s], pad=v.paddings[s],
                         label=f"vision.{s}.patches")  # fmt: skip
            gemm(patches, stage.conv, x, bias=stage.conv_bias, ws=self._ws, label=f"vision.{s}.conv")
            if not s:
                norm(x, x, weight=stage.norm, bias=stage.norm_bias, eps=NORM_EPS, label=f"vision.{s}.norm")
            for i, (spatial, channel) in enumerate(zip(stage.spatial, stage.channel)):
                self._block(s, n, spatial, f"vision.{s}.{i}.spatial")
                self._block(s, n, channel, f"vision.{s}.{i}.channel", channels=True)
            grid = x.slice(0, (n, height, width, d))
        cells = v.grids[-1][0] * v.grids[-1][1]
        x = self._x.slice(0, (n * cells, v.dims[-1]))
        projected = self._projected.slice(0, (n * cells, t.width))
        means = self._projected.slice(n * cells * t.width, (n, t.width))
        gemm(x, w.projection, projected, residual=w.projected_positions.slice(0, projected.shape), ws=self._ws,
             label="projection")  # fmt: skip
        gather_mean(projected, means, label="means")  # of what is projected: the projection is linear
        out = self._seen.slice(0, (n * v.tokens, t.width))
        table = self._projected.slice(0, (n * (cells + 1), t.width))
        picked = self._picked.slice((n - 1) * self._picked.shape[1], (n * v.tokens,))
        gather(table, picked, out, label="mean first")
        norm(out, out, weight=w.projection_norm, bias=w.projection_norm_bias, eps=NORM_EPS, label="projection.norm")

    def _block(self, s: int, n: int, w: Block, label: str, channels: bool = False) -> None:
        """One DaViT block over the grids of n views, in place on x; y holds the stream between the convolutions."""
        v, ws = self.config.vision, self._ws
        (height, width), d = v.grids[s], v.dims[s]
        rows = n * height * width
        x, y, mixed = (b.slice(0, (rows, d)) for b in (self._x, self._y, self._mixed))
        gx, gy = (b.slice(0, (n, height, width, d)) for b in (self._x, self._y))
        qkv, hidden = self._qkv.slice(0, (rows, 3 * d)), self._hidden.slice(0, (rows, v.mlp[s]))
        conv_depthwise(gx, w.conv1, w.conv1_bias, gy, label=f"{label}.conv1")
        gemm(y, w.qkv, qkv, prologue="layer", norm=w.norm1, norm_bias=w.norm1_bias, eps=NORM_EPS, bias=w.qkv_bias,
             ws=ws, label=f"{label}.qkv")  # fmt: skip
        if channels:
            channel_attention(qkv, mixed, groups=v.groups[s], batch=n, label=f"{label}.attention")
        else:
            windows = self._windows[s]
            count = n * windows.per_view
            q, k, value = (qkv.columns(i * d, d) for i in range(3))
            # A padded cell is zero in front of qkv: its key and value are the bias.
            pads = Pads(w.qkv_bias.slice(d, (d,)), w.qkv_bias.slice(2 * d, (d,)), windows.pads.slice(0, (count,)))
            attention(q, k, value, windows.cache.first(count), self._zero.slice(0, (count,)), mixed, heads=v.heads[s],
                      causal=False, offsets=windows.offsets.slice(0, (count + 1,)), longest=windows.side,
                      order=windows.order.slice(0, (rows,)), pads=pads, ws=ws, label=f"{label}.attention")  # fmt: skip
        gemm(mixed, w.proj, y, bias=w.proj_bias, residual=y, ws=ws, label=f"{label}.proj")
        conv_depthwise(gy, w.conv2, w.conv2_bias, gx, label=f"{label}.conv2")
        gemm(x, w.fc1, hidden, prologue="layer", norm=w.norm2, norm_bias=w.norm2_bias, eps=NORM_EPS, bias=w.fc1_bias,
             act="gelu", ws=ws, label=f"{label}.fc1")  # fmt: skip
        gemm(hidden, w.fc2, x, bias=w.fc2_bias, residual=x, ws=ws, label=f"{label}.fc2")

    def _read(self, b: int) -> None:
        """View 0 and the prompt through the encoder; with the other views into the table of chunk b."""
        c, t, p, w, e, ws = self.config, self.config.language, self.config.policy, self.weights, self._encoder, self._ws
        per, text = c.vision.tokens, c.tokenizer_max_length
        length, d = per + text, t.width
        gather(w.embed, self._tokens, e.x.slice(per * d, (text, d)), label="prompt")
        gather(self._views, self._counting, e.x.slice(0, (per, d)), label="view 0")
        norm(e.x, e.x, add=w.positions, weight=w.embed_norm, bias=w.embed_norm_bias, eps=NORM_EPS, label="embed.norm")
        for i, layer in enumerate(w.encoder):
            post_norm_layer(layer, e, heads=t.heads, eps=NORM_EPS, act="gelu", label=f"encoder.{i}")
        base, width = self._at(b), p.width
        vlm = self._table.slice(base * width, (length, width))
        matrix, bias = _linear(w.vlm_proj)
        gemm(e.x, matrix, vlm, bias=bias, residual=w.sequence.slice(c.horizon * width, (length, width)), ws=ws,
             label="vlm_proj")  # fmt: skip
        rest = (c.num_views - 1) * per
        if rest:
            aux = self._table.slice((base + length) * width, (rest, width))
            matrix, bias = _linear(w.aux_proj)
            gemm(self._views.slice(per * d, (rest, d)), matrix, aux, bias=bias,
                 residual=w.sequence.slice((c.horizon + length) * width, (rest, width)), ws=ws,
                 label="aux_proj")  # fmt: skip
        fixed = self._table.slice(base * width, (self._fixed, width))
        tower_qkv(w.blocks[0], fixed, self._first.slice(base * 3 * width, (self._fixed, 3 * width)), ws, NORM_EPS, "0")

    def _at(self, b: int) -> int:
        """The first of the rows that all steps of chunk b share."""
        return self.options.batch * self.config.horizon + b * self._fixed

    def _denoise(self, batch: int) -> None:
        """One flow step of chunks 0..batch."""
        c, p, w, ws = self.config, self.config.policy, self.weights, self._ws
        state, h = self.flow_of(batch), self.config.horizon

        def rows(t: Tensor, m: int) -> Tensor:
            return t.slice(0, (m, *t.shape[1:]))

        actions, predicted, times = (rows(t, batch * h) for t in (self._actions, self._predicted, self._time_rows))
        flow_begin(state, actions, times, rule=self.rule, times=self._times, hidden=self._grippers,
                   context=rows(self._proprio, batch) if self._proprio is not None else None,
                   label="begin")  # fmt: skip
        # Rows of all buffers: the actions of all chunks, then what their steps share.
        n, m = batch * h, batch * c.sequence
        at = (self.options.batch - batch) * h
        table, first = (t.slice(at * t.shape[1], (m, t.shape[1])) for t in (self._table, self._first))
        gemm(actions, w.action_encoder.one, rows(table, n), bias=w.action_encoder.bias,
             residual=rows(w.action_positions, n), ws=ws, label="action_encoder")  # fmt: skip
        b, order, zero = self._tower, self._orders[batch - 1], self._zero.slice(0, (batch,))
        one = TowerBuffers(rows(b.x, m), rows(b.qkv, m), rows(b.mixed, m), rows(b.hidden, m), b.cache.first(batch),
                           zero, ws)  # fmt: skip
        layer = w.blocks[0]
        tower_qkv(layer, rows(table, n), rows(first, n), ws, NORM_EPS, "0")  # of the others the prefix made them
        attention(*thirds(first), one.cache, zero, one.mixed, heads=p.heads, causal=False, order=order, ws=ws,
                  label="0.attention")  # fmt: skip
        tower_rest(layer, one, table, NORM_EPS, ACT, "0", n if p.depth == 1 else m)
        for i, layer in enumerate(w.blocks[1:-1], 1):
            tower_layer(layer, one, heads=p.heads, eps=NORM_EPS, act=ACT, order=order, label=str(i))
        if p.depth > 1:
            self._last_block(w.blocks[-1], one, n, str(p.depth - 1))
        x = rows(one.x, n)
        gemm(x, w.action_decoder.one, predicted, prologue="layer", norm=w.norm, norm_bias=w.norm_bias, eps=NORM_EPS,
             bias=w.action_decoder.bias, ws=ws, label="action_decoder")  # fmt: skip
        flow_end(state, predicted, rule=self.rule, squash=self._grippers, label="end")

    def _last_block(self, layer: TowerLayer, b: TowerBuffers, n: int, label: str) -> None:
        """Only the actions, its first n rows, are read: they alone have queries."""
        m, d = b.x.shape
        eps, heads, ws = NORM_EPS, self.config.policy.heads, b.ws
        assert layer.query is not None
        tower_qkv(layer, b.x, b.qkv.columns(d, 2 * d), ws, eps, label)
        x = b.x.slice(0, (n, d))
        gemm(x, layer.query, b.qkv.slice(0, (n, 3 * d)).columns(0, d), prologue="layer", norm=layer.norm1,
             norm_bias=layer.norm1_bias, eps=eps, bias=layer.query_bias, ws=ws, label=f"{label}.query")  # fmt: skip
        _, k, v = thirds(b.qkv.slice(n * 3 * d, (m - n, 3 * d)))
        attention(None, k, v, b.cache, b.pos, None, heads=heads, ws=ws, label=f"{label}.append")
        q, k, v = thirds(b.qkv.slice(0, (n, 3 * d)))
        attention(q, k, v, b.cache, self._behind.slice(0, b.pos.shape), b.mixed.slice(0, (n, d)), heads=heads,
                  causal=False, ws=ws, label=f"{label}.attention")  # fmt: skip
        tower_rest(layer, b, b.x, eps, ACT, label, n)

    @property
    def node_budget(self) -> int:
        """Most nodes that a flow step of one chunk may have."""
        return NODES_PER_LAYER * self.config.policy.depth + NODES_OUTSIDE

    # ------------------------------------------------------------------------------------------ a request
    def _accept(self, inputs: Sequence[ModelInput]) -> None:
        first = inputs[0].domain
        for given in inputs:
            if not 0 <= given.domain < self.config.num_domains:
                raise InputError(f"domain_id {given.domain} is outside [0, {self.config.num_domains})")
            if given.domain != first:
                raise InputError(f"chunks of one batch share a domain; one has {given.domain}, the first has {first}")

    def _prefix(self, b: int, views: list[np.ndarray | None], given: ModelInput) -> None:
        """Images f32 [height, width, 3], normalised (None: absent, its features are zeros), padded token ids."""
        v = self.config.vision
        present = {i: image for i, image in enumerate(views) if image is not None}
        size = v.tokens * self.config.language.width
        for i in range(len(views)):
            if i not in present and not self.views_seen.empty(i):
                self._views.slice(i * size, (size,)).write(np.zeros(size, np.float32))
                self.views_seen.clear(i)
        self.look_at(present, self._images, self._seen, self._views, v.tokens)
        with self.stage("prefix"):
            self._choose_domain(given.domain)
            self._tokens.write(given.tokens.astype(np.int32))
            if self._proprio is not None:
                width = self._proprio.shape[1]
                self._proprio.slice(b * width, (width,)).write(given.proprio)
            self.plans["prefix" if self.options.batch == 1 else f"prefix.{b}"].replay()

    def _choose_domain(self, domain: int) -> None:
        """Puts the weights and soft prompts of a domain where the plans read them."""
        if domain == self._domain:
            return
        c, w = self.config, self.weights
        self._domain = -1  # none, if this is interrupted
        for layer in (w.action_encoder, w.action_decoder, w.vlm_proj, w.aux_proj):
            if isinstance(layer, PerDomain):
                layer.choose(domain)
        if w.soft_prompts is not None:
            n = c.len_soft_prompts * c.policy.width
            for b in range(self.options.batch):
                at = (self._at(b) + c.context) * c.policy.width
                self._table.slice(at, (n,)).copy_from(w.soft_prompts.slice(domain * n, (n,)))
        self._domain = domain

    def _fill_times(self, slot: int, table: ScheduleTable) -> None:
        """Time sinusoids of a schedule: cosines, then sines."""
        half = self.config.dim_time // 2
        angle = table.values.astype(np.float64)[:, None] * TIME_PERIOD ** -(np.arange(half) / half)
        rows = np.concatenate([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
        self._times.slice(slot * self.options.time_rows * self._times.shape[1], rows.shape).write(rows)


def _linear(layer: PerDomain | tuple[Any, Tensor]) -> tuple[Any, Tensor]:
    return (layer.one, layer.bias) if isinstance(layer, PerDomain) else layer


def _picked(n: int, views: int, cells: int) -> np.ndarray:
    """Rows of the table [n * cells projected, n means]: of each view its mean, then its cells."""
    ids = [np.concatenate([[n * cells + i], np.arange(i * cells, (i + 1) * cells)]) for i in range(n)]
    out = np.full(views * (cells + 1), -1, np.int32)
    out[: n * (cells + 1)] = np.concatenate(ids)
    return out


def _order(batch: int, horizon: int, fixed: int) -> np.ndarray:
    """Of rows [batch * horizon, batch * fixed]: of each chunk its actions, then the others."""
    return np.concatenate([
        np.concatenate([b * horizon + np.arange(horizon), batch * horizon + b * fixed + np.arange(fixed)])
        for b in range(batch)
    ]).astype(np.int32)  # fmt: skip


def _default_profile(c: XVLAConfig) -> InputProfile:
    space = ActionSpace(c.action_mode, c.action_dim, c.robot_dim, c.grippers)
    if "type" not in c.extra and c.image_keys and not c.image_keys[0].startswith("observation."):
        base = preset("xvla")
        return base.replace(action=space, proprio_dim=c.proprio_dim, max_tokens=c.tokenizer_max_length,
                            image=replace(base.image, size=c.vision.image_size))  # fmt: skip
    return lerobot_xvla(
        c.image_keys, space, proprio_dim=c.proprio_dim, slots=c.num_views, resize=c.resize_imgs_with_padding,
        max_tokens=c.tokenizer_max_length, **norms_of(c.normalization_mapping),
    )  # fmt: skip
