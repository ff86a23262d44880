"""pi0.5 (openpi; Black et al. 2025): the prefix once, then flow steps, each one static plan.

vision_n   n camera views: patches, SigLIP, projector
prefix_n   n views and the prompt through the trunk; leaves keys and values for the expert, nothing else
times      modulations of every adaptive norm for the flow times of a schedule, once per schedule and delay
step_b     one flow step of b chunks: five nodes per layer of the expert
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import numpy as np

from engine.blocks.decoder import NODES_PER_LAYER, DecoderBuffers, Modulations, decoder_layer
from engine.blocks.observation import InputProfile, ModelInput, lerobot_pi05, openpi_pi05, relative_mask
from engine.blocks.policy import FlowPolicy
from engine.blocks.policy_options import norms_of
from engine.blocks.schedule import ScheduleTable
from engine.blocks.siglip import SiglipTower
from engine.blocks.siglip import workspace_bytes as siglip_bytes
from engine.blocks.weights import Shapes
from engine.io.checkpoint import Source
from engine.models.pi05.config import NORM_EPS, ROPE_THETA, Pi05Config
from engine.models.pi05.weights import Weights, load_weights, shapes
from engine.ops import attention as attention_op
from engine.ops import gemm as gemm_op
from engine.ops.attention import KVCache, rope_table
from engine.ops.flow import FlowState, flow_begin, flow_end
from engine.ops.gather import gather
from engine.ops.gemm import Modulation, gemm
from engine.runtime.arena import Arena, Tensor
from engine.runtime.plan import capture

NODES_OUTSIDE = 4  # of a step: begin, action_in, action_out, end


class Pi05(FlowPolicy):
    """A loaded pi0.5: `act`, `act_stream`, `reset`, `explain`, `memory`. See engine.load."""

    config: Pi05Config
    config_type = Pi05Config
    samplers: ClassVar = {"euler": "euler"}

    @classmethod
    def default_profile(cls, config: Pi05Config) -> InputProfile:
        """lerobot's or openpi's, by config.json."""
        c, size = config, config.vision.image_size
        dims = c.robot_dim or c.action_dim
        relative = relative_mask(dims, c.action_feature_names, c.relative_exclude_joints)
        # openpi's files list no features, so the cameras have their names in the model.
        made = lerobot_pi05 if c.image_keys[0].startswith("observation.") else openpi_pi05
        return made(
            c.image_keys, dims, model_dim=c.action_dim, size=(size, size), max_tokens=c.tokenizer_max_length,
            delta_mask=relative if c.use_relative_actions else (), **norms_of(c.normalization_mapping),
        )  # fmt: skip

    def _load(self, source: Source | None, arena: Arena) -> Weights:
        c, o = self.config, self.options
        places = source or Shapes(shapes(c))
        return load_weights(c, places, arena, o.dtype, o.quant, len(self.config.image_keys), o.progress)

    # ------------------------------------------------------------------------------------------ memory
    def _allocate(self, arena: Arena) -> FlowState:
        o = self.options
        c, v, t, e = self.config, self.config.vision, self.config.trunk, self.config.expert
        views, batch, horizon = len(c.image_keys), o.batch, c.horizon
        room = views * v.tokens + c.tokenizer_max_length  # of a prefix
        kv = "bf16" if o.dtype == "bf16" else "f32"
        q = t.heads * t.head_dim

        def ws(name: str, *shape: int, dtype: str = "f32") -> Tensor:
            return arena.alloc(name, shape, dtype)

        def io(name: str, *shape: int, dtype: str = "i32") -> Tensor:
            return arena.alloc(name, shape, dtype, "io")

        def stack(name: str, m: int, d: int, mlp: int) -> DecoderBuffers:
            widths = DecoderBuffers.widths(d, t.heads, t.kv_heads, t.head_dim, mlp)
            return DecoderBuffers(**{k: ws(f"{name}.{k}", m, n) for k, n in widths.items()}, ws=self._ws)

        m = views * v.tokens
        self._seen = ws("vision.out", m, t.width)
        # Tokens of each view as last computed: a camera that did not move is not looked at again.
        self._views = arena.alloc("views", (m, t.width), "f32", "state")
        self._view_ids, self._tokens = io("view_ids", m), io("tokens", c.tokenizer_max_length)
        self._rows, self._text_rows, self._zero = io("rows", 1), io("text_rows", 1), io("zero", max(views, 1))
        self._length = io("length", batch)  # tokens of each prefix
        ctx = -(-(room + horizon) // 16) * 16
        sizes = [gemm_op.workspace_bytes(a, b) for a, b in (
            (room, max(t.width, t.mlp, q)),
            (batch * horizon, max(e.width, e.mlp, q, c.action_dim)), (o.time_rows, e.width))]  # fmt: skip
        sizes.append(attention_op.workspace_bytes(room, t.heads, t.head_dim, ctx))
        sizes.append(siglip_bytes(v, views))
        self._ws = ws("ws", max(sizes), dtype="u8")
        self._vision = SiglipTower(arena, v, self.weights.vision, views, kv, self._ws)
        self._trunk = stack("trunk", room, t.width, t.mlp)
        self._expert = stack("expert", batch * horizon, e.width, e.mlp)
        self._caches = [KVCache.empty(arena, f"kv.{i}", t.kv_heads, t.head_dim, ctx, kv, batch) for i in range(t.depth)]
        self._rope = arena.alloc("rope", (ctx, t.head_dim), "f32", "weights")
        if not arena.dry:
            self._rope.write(rope_table(np.arange(ctx), t.head_dim, ROPE_THETA))
        flow = FlowState.empty(arena, "flow", batch, o.schedule.steps, horizon, c.action_dim, o.dims, o.ring)
        self._actions = ws("actions", batch * horizon, c.action_dim)
        self._velocity = ws("velocity", batch * horizon, c.action_dim)
        self._time_rows = io("time_rows", batch * horizon)
        n = self.weights.modulation.n
        self._modulations = arena.alloc("modulations", (o.time_slots * o.time_rows, n), kv, "state")
        self._times = io("times", o.time_rows, e.width, dtype="f32")
        self._hidden_times = ws("times.hidden", o.time_rows, e.width)
        self._condition = ws("times.condition", o.time_rows, e.width)
        self._time_count = io("time_count", 1)
        return flow

    # ------------------------------------------------------------------------------------------ the plans
    def _capture(self) -> None:
        o, views = self.options, len(self.config.image_keys)
        for n in range(1, views + 1):
            self.plans[f"vision_{n}"] = capture(partial(self._look, n), f"vision_{n}")
            for b in range(o.batch):
                name = f"prefix_{n}" if o.batch == 1 else f"prefix_{n}.{b}"
                self.plans[name] = capture(partial(self._read, n, b), name)
        for slot in range(o.time_slots):
            name = f"times.{slot}"
            self.plans[name] = capture(partial(self._modulate, slot), name)
        for b in range(1, o.batch + 1):
            name = "step" if o.batch == 1 else f"step_{b}"
            self.plans[name] = capture(partial(self._denoise, b), name)

    def _look(self, n: int) -> None:
        """Views 0..n of the image buffer to tokens of the trunk."""
        w, x, out = self.weights, self._vision.look(n), self._seen
        gemm(x, w.projector, out.slice(0, (x.shape[0], out.shape[1])), prologue="layer", norm=w.post_norm,
             norm_bias=w.post_norm_bias, eps=NORM_EPS, bias=w.projector_bias, ws=self._ws,
             label="projector")  # fmt: skip

    def _read(self, n: int, b: int) -> None:
        """n views and the prompt through the trunk, into the caches of chunk b."""
        v, t, w = self.config.vision, self.config.trunk, self.weights
        images, text = n * v.tokens, self.config.tokenizer_max_length
        s = self._trunk.first(images + text)
        gather(self._views, self._view_ids.slice(0, (images,)), s.x.slice(0, (images, t.width)), label="views")
        gather(w.embed, self._tokens, s.x.slice(images * t.width, (text, t.width)), rows=self._text_rows,
               label="prompt")  # fmt: skip
        for i, layer in enumerate(w.trunk):
            decoder_layer(layer, s, self._caches[i].sequences(b, 1), self._zero.slice(0, (1,)), heads=t.heads,
                          eps=NORM_EPS, rope=self._rope, act="gelu_tanh", causal=False, rows=self._rows,
                          label=f"{i}")  # fmt: skip

    def _modulate(self, slot: int) -> None:
        """Modulations of the flow times whose sinusoids lie in `times`, into a slot of the table."""
        w, ws, rows, o = self.weights, self._ws, self._time_count, self.options
        gemm(self._times, w.time_in, self._hidden_times, bias=w.time_in_bias, act="silu", rows=rows, ws=ws,
             label="time_in")  # fmt: skip
        gemm(self._hidden_times, w.time_out, self._condition, bias=w.time_out_bias, act="silu", rows=rows, ws=ws,
             label="time_out")  # fmt: skip
        width = self._modulations.shape[1]
        out = self._modulations.slice(slot * o.time_rows * width, (o.time_rows, width))
        gemm(self._condition, w.modulation, out, bias=w.modulation_bias, rows=rows, ws=ws, label="modulations")

    def _denoise(self, batch: int) -> None:
        """One flow step of chunks 0..batch."""
        c, g, w, ws = self.config, self.config.expert, self.weights, self._ws
        state, m = self.flow_of(batch), batch * c.horizon
        d = g.width

        def rows(t: Tensor) -> Tensor:
            return t.slice(0, (m, t.shape[1]))

        s = self._expert.first(m)
        actions, velocity, times = rows(self._actions), rows(self._velocity), self._time_rows.slice(0, (m,))
        pos = self._length.slice(0, (batch,))

        def mod(norm: int, gate: bool = False) -> Modulation:
            at = 3 * d * norm
            return Modulation(self._modulations, times, *((None, None, at + 2 * d) if gate else (at, at + d, None)))

        flow_begin(state, actions, times, label="begin")
        gemm(actions, w.action_in, s.x, bias=w.action_in_bias, ws=ws, label="action_in")
        for i, layer in enumerate(w.expert):
            one, two = 2 * i, 2 * i + 1
            decoder_layer(layer, s, self._caches[i].first(batch), pos, heads=g.heads, eps=NORM_EPS, rope=self._rope,
                          act="gelu_tanh", causal=False, label=f"{i}",
                          modulations=Modulations(mod(one), mod(one, True), mod(two), mod(two, True)))  # fmt: skip
        gemm(s.x, w.action_out, velocity, prologue="rms", modulation=mod(2 * g.depth), eps=NORM_EPS,
             bias=w.action_out_bias, ws=ws, label="action_out")  # fmt: skip
        flow_end(state, velocity, label="end")

    @property
    def node_budget(self) -> int:
        """Most nodes that a flow step may have."""
        return NODES_PER_LAYER * self.config.expert.depth + NODES_OUTSIDE

    # ------------------------------------------------------------------------------------------ a request
    def _prefix(self, b: int, views: list[np.ndarray | None], given: ModelInput) -> None:
        """Images f32 [S, S, 3] in [-1, 1] by camera (None: absent), token ids; into the caches of chunk b."""
        v = self.config.vision
        present = {i: image for i, image in enumerate(views) if image is not None}
        self.look_at(present, self._vision.images, self._seen, self._views, v.tokens)
        n, tokens = len(present), given.tokens
        with self.stage("prefix", f"prefix_{n}"):
            ids = np.concatenate([np.arange(i * v.tokens, (i + 1) * v.tokens, dtype=np.int32) for i in present])
            self._view_ids.slice(0, ids.shape).write(ids)
            self._tokens.slice(0, tokens.shape).write(tokens.astype(np.int32))
            self._text_rows.write(np.array([len(tokens)], np.int32))
            length = np.array([n * v.tokens + len(tokens)], np.int32)
            self._rows.write(length)
            self._length.slice(b, (1,)).write(length)
            self.plans[f"prefix_{n}" if self.options.batch == 1 else f"prefix_{n}.{b}"].replay()

    def _fill_times(self, slot: int, table: ScheduleTable) -> None:
        """Rows of the modulation table for the times of a schedule."""
        c, width = self.config, self.config.expert.width
        half = width // 2
        period = c.min_period * (c.max_period / c.min_period) ** (np.arange(half) / max(half - 1, 1))
        angle = 2 * np.pi * table.values.astype(np.float64)[:, None] / period
        rows = np.concatenate([np.sin(angle), np.cos(angle)], 1).astype(np.float32)
        self._times.slice(0, rows.shape).write(rows)
        self._time_count.write(np.array([len(rows)], np.int32))
        self.plans[f"times.{slot}"].replay()
