"""Nemotron-Cascade 2 / Nemotron 3 Nano (nemotron_h): the step as ops on static buffers, captured as plans.

Three nodes per layer: Mamba-2 = in_proj, conv + scan, out_proj; MoE = route, up, down; attention = qkv, attention,
o_proj (a dense MLP has two). The norms are prologues, residual adds are epilogues. The residual stream is fp32.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from engine.blocks.language import LanguageModel, TokenIO
from engine.errors import ConfigError, InputError, MemoryPlanError, TokenizerError
from engine.io.checkpoint import Checkpoint, Source
from engine.io.text import ChatTemplate, Tokenizer
from engine.models.nemotron.config import NemotronConfig
from engine.models.nemotron.weights import Attention, Dense, Experts, Mamba, Weights, load_weights
from engine.ops import attention as attention_op
from engine.ops import gemm as gemm_op
from engine.ops import moe as moe_op
from engine.ops.attention import KVCache, attention
from engine.ops.dispatch import strict as strict_dispatch
from engine.ops.gather import gather
from engine.ops.gemm import gemm
from engine.ops.moe import Routing, moe_down, moe_route, moe_up
from engine.ops.sample import sample
from engine.ops.ssm import SsmShape, ssm
from engine.runtime.arena import Arena, Tensor
from engine.runtime.device import parse_dtype
from engine.runtime.plan import capture

DEFAULT_CONTEXT = 8192
DEFAULT_CHUNK = 512
NODE_BUDGET = {"M": 3, "E": 3, "*": 3, "-": 2}  # per layer; 3 more outside: embedding, head, draw
SCORE_BYTES = 64 << 20  # logits kept for score(), at most


class Buffers:
    """Workspace of a step of up to `m` tokens; layers share it."""

    def __init__(self, c: NemotronConfig, w: Weights, arena: Arena, m: int, context: int) -> None:
        def ws(name: str, *shape: int, dtype: str = "f32") -> Tensor:
            return arena.alloc(name, shape, dtype)

        d = c.hidden_size
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.x = ws("x", m, d)
        self.proj = ws("proj", m, c.mamba_inner + c.conv_dim + c.mamba_num_heads) if "M" in c.pattern else None
        self.u = ws("u", m, c.conv_dim) if "M" in c.pattern else None
        self.y = ws("y", m, max(c.mamba_inner if "M" in c.pattern else 1, q if "*" in c.pattern else 1))
        self.qkv = ws("qkv", m, q + 2 * kv) if "*" in c.pattern else None
        self.mlp = ws("mlp", m, c.intermediate_size) if "-" in c.pattern else None
        moe = next((layer for layer in w.layers if isinstance(layer, Experts)), None)
        sizes = [gemm_op.workspace_bytes(m, k) for k in (d, self.y.shape[1], c.intermediate_size)]
        self.routing = None
        if moe is not None:
            self.routing = Routing.empty(arena, "routing", m, c.n_routed_experts, c.num_experts_per_tok)
            self.h = ws("h", m * c.num_experts_per_tok, c.moe_intermediate_size)
            self.hs = ws("hs", m, max(c.shared_width, 1))
            sizes.append(moe_op.moe_workspace(m, d, moe.up, c.num_experts_per_tok, moe.shared_up))
        if "*" in c.pattern:
            sizes.append(attention_op.workspace_bytes(m, c.num_attention_heads, c.head_dim, context))
        self.ws = ws("ws", max(sizes), dtype="u8")

    def rows(self, m: int) -> Buffers:
        """The same memory, seen as a step of m tokens."""
        out = object.__new__(Buffers)
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name != "ws":
                lead = m * (value.shape[0] // self.x.shape[0])
                value = value.slice(0, (lead, value.shape[1]))
            elif isinstance(value, Routing):
                value = Routing(value.ids.slice(0, (m, value.top_k)), value.weights.slice(0, (m, value.top_k)),
                                value.offsets, value.order, value.logits.slice(0, (m, value.experts)), value.experts,
                                value.top_k)  # fmt: skip
            setattr(out, name, value)
        return out


class Nemotron(LanguageModel):
    """A loaded model: `generate`, `stream`, `chat`, `score`, `logits`, `explain`, `memory`. See engine.load."""

    config: NemotronConfig

    @classmethod
    def load(cls, folder: Path, *, source: Source | None = None, **options: object) -> Nemotron:
        """From a folder in the published layout; `source` replaces its weight files."""
        config = NemotronConfig.from_folder(folder)
        tokenizer = Tokenizer.from_folder(folder) if (folder / "tokenizer.json").exists() else None
        try:
            template = ChatTemplate.from_folder(folder)
        except TokenizerError:
            if (folder / "chat_template.jinja").exists():
                raise
            template = None
        if source is not None:
            return cls(config, source, name=folder.name, tokenizer=tokenizer, template=template, **options)  # type: ignore[arg-type]
        with Checkpoint(folder) as checkpoint:
            return cls(config, checkpoint, name=folder.name, tokenizer=tokenizer, template=template, **options)  # type: ignore[arg-type]

    def __init__(
        self,
        config: NemotronConfig,
        source: Source,
        *,
        name: str = "nemotron",
        dtype: object = "auto",
        quant: str | None = None,
        context: int | None = None,
        chunk: int = DEFAULT_CHUNK,
        snapshots: int = 4,
        strict: bool = False,
        tokenizer: Tokenizer | None = None,
        template: ChatTemplate | None = None,
        progress: bool = True,
    ) -> None:
        """Packs the weights and captures every plan.

        dtype: 'auto' (that of the checkpoint), float32 or bfloat16. quant: None, 'int8', 'int4'. context: tokens of KV
        cache, default min(8192, the model's limit). chunk: prompt tokens per prefill step. snapshots: states kept for
        prefix reuse.
        """
        c = self.config = config
        parsed = parse_dtype(c.torch_dtype if dtype in ("auto", None) else dtype)
        context = _bounded(
            "context", context or min(DEFAULT_CONTEXT, c.max_position_embeddings), 16, c.max_position_embeddings
        )
        chunk = min(_bounded("chunk", chunk, 1, 16384), context)
        _bounded("snapshots", snapshots, 0, 64)
        if tokenizer is not None and tokenizer.vocab_size > c.vocab_size:
            raise ConfigError(
                f"tokenizer.json has {tokenizer.vocab_size} tokens and config.json a vocab_size of {c.vocab_size}; "
                "the files do not belong together"
            )
        context = math.ceil(context / 16) * 16
        kv_format = "f32" if parsed == "f32" and quant is None else "bf16"
        arena = Arena()
        _check_memory(c, parsed, quant, context, kv_format)
        self.weights = w = load_weights(c, source, arena, parsed, quant, progress)

        mamba = [i for i, k in enumerate(c.pattern) if k == "M"]
        shape = SsmShape(c.mamba_num_heads, c.mamba_head_dim, c.n_groups, c.ssm_state_size, c.conv_kernel)
        self._ssm = shape
        self._conv = {i: arena.alloc(f"conv.{i}", (c.conv_kernel - 1, c.conv_dim), "f32", "state") for i in mamba}
        self._state = {i: arena.alloc(f"ssm.{i}", shape.state, "f32", "state") for i in mamba}
        self._kv = {i: KVCache.empty(arena, f"kv.{i}", c.num_key_value_heads, c.head_dim, context, kv_format)
                    for i, k in enumerate(c.pattern) if k == "*"}  # fmt: skip
        score_chunk = max(1, min(chunk, SCORE_BYTES // (4 * c.vocab_size)))
        io = TokenIO.empty(arena, c.vocab_size, chunk, score_chunk, context)
        super().__init__(
            name, arena, io, [*self._conv.values(), *self._state.values()], vocab_size=c.vocab_size,
            context=context, stop_ids=c.eos_token_ids, tokenizer=tokenizer, template=template,
            snapshots=snapshots,
        )  # fmt: skip
        self.weight_notes = w.notes
        if w.skipped:
            more = ", ..." if len(w.skipped) > 4 else ""
            self.notes.append(
                f"skipped {len(w.skipped)} tensors (multi-token prediction): {', '.join(w.skipped[:4])}{more}"
            )
        buffers = Buffers(c, w, arena, chunk, context)
        last = arena.alloc("last_row", (1, c.hidden_size))
        arena.seal()
        with strict_dispatch(strict):
            self._capture(buffers, last, score_chunk)

    @staticmethod
    def plan(
        config: dict, *, dtype: object = "auto", quant: str | None = None, context: int | None = None
    ) -> dict[str, int]:
        """Bytes of weights, kv and state that a load would take, from config.json alone."""
        c = NemotronConfig.from_json(config)
        parsed = parse_dtype(c.torch_dtype if dtype in ("auto", None) else dtype)
        context = _bounded(
            "context", context or min(DEFAULT_CONTEXT, c.max_position_embeddings), 16, c.max_position_embeddings
        )
        return plan_bytes(
            c, parsed, quant, math.ceil(context / 16) * 16, "f32" if parsed == "f32" and quant is None else "bf16"
        )

    # ------------------------------------------------------------------------------------------ the step
    def _capture(self, buffers: Buffers, last: Tensor, score_chunk: int) -> None:
        io, w = self.io, self.weights
        one, scoring = buffers.rows(1), buffers.rows(score_chunk)

        def decode() -> None:
            gather(w.embed, io.sampler.token, one.x, label="embed")
            self._layers(one, None)
            self._head(one.x, io.logits, one)
            sample(io.logits, io.sampler)

        def prefill() -> None:
            gather(w.embed, io.ids, buffers.x, rows=io.rows, label="embed")
            self._layers(buffers, io.rows)

        def head() -> None:
            gather(buffers.x, io.last, last, label="last row")
            self._head(last, io.logits, one)

        def score() -> None:
            self._head(scoring.x, io.score_logits, scoring, io.rows)

        for name, step in (("decode", decode), ("prefill", prefill), ("head", head), ("score", score),
                           ("draw", lambda: sample(io.logits, io.sampler))):  # fmt: skip
            self.plans[name] = capture(step, name)

    def _head(self, x: Tensor, logits: Tensor, b: Buffers, rows: Tensor | None = None) -> None:
        gemm(x, self.weights.lm_head, logits, norm=self.weights.norm_f, **self._at(b, rows, "lm_head"))

    def _at(self, b: Buffers, rows: Tensor | None, label: str) -> dict[str, Any]:
        """What every node with a norm prologue takes."""
        return {"eps": self.config.layer_norm_epsilon, "rows": rows, "ws": b.ws, "label": label}

    def _layers(self, b: Buffers, rows: Tensor | None) -> None:
        for i, layer in enumerate(self.weights.layers):
            if isinstance(layer, Mamba):
                self._mamba(i, layer, b, rows)
            elif isinstance(layer, Experts):
                self._experts(i, layer, b, rows)
            elif isinstance(layer, Attention):
                self._attention(i, layer, b, rows)
            else:
                self._dense(i, layer, b, rows)

    def _mamba(self, i: int, w: Mamba, b: Buffers, rows: Tensor | None) -> None:
        c, s = self.config, self._ssm
        assert b.proj is not None and b.u is not None
        di = c.mamba_inner
        z, xbc, dt = b.proj.columns(0, di), b.proj.columns(di, s.channels), b.proj.columns(di + s.channels, s.heads)
        y = b.y.columns(0, di)
        gemm(b.x, w.in_proj, b.proj, norm=w.norm, bias=w.in_bias, **self._at(b, rows, f"{i}.in_proj"))
        ssm(s, xbc, dt, y, conv_w=w.conv_w, conv_b=w.conv_b, conv_state=self._conv[i], a=w.a, d_skip=w.d_skip,
            dt_bias=w.dt_bias, state=self._state[i], u=b.u, dt_limit=c.time_step_limit, rows=rows,
            label=f"{i}.ssm")  # fmt: skip
        gemm(y, w.out_proj, b.x, norm=w.gated_norm, gate=z, norm_group=di // c.n_groups, bias=w.out_bias,
             residual=b.x, **self._at(b, rows, f"{i}.out_proj"))  # fmt: skip

    def _attention(self, i: int, w: Attention, b: Buffers, rows: Tensor | None) -> None:
        c = self.config
        assert b.qkv is not None
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        out = b.y.columns(0, q)
        gemm(b.x, w.qkv, b.qkv, norm=w.norm, bias=w.qkv_bias, **self._at(b, rows, f"{i}.qkv"))
        attention(b.qkv.columns(0, q), b.qkv.columns(q, kv), b.qkv.columns(q + kv, kv), self._kv[i],
                  self.io.sampler.pos, out, heads=c.num_attention_heads, rows=rows, ws=b.ws,
                  label=f"{i}.attention")  # fmt: skip
        gemm(out, w.o_proj, b.x, bias=w.o_bias, residual=b.x, **self._at(b, rows, f"{i}.o_proj"))

    def _experts(self, i: int, w: Experts, b: Buffers, rows: Tensor | None) -> None:
        c = self.config
        assert b.routing is not None
        moe_route(b.x, w.norm, w.gate, w.gate_bias, b.routing, scale=c.routed_scaling_factor,
                  norm_topk=c.norm_topk_prob, n_group=c.n_group, topk_group=c.topk_group,
                  **self._at(b, rows, f"{i}.route"))  # fmt: skip
        moe_up(b.x, w.norm, w.up, b.routing, b.h, shared=w.shared_up, hs=b.hs, up_bias=w.up_bias,
               shared_bias=w.shared_up_bias, **self._at(b, rows, f"{i}.up"))  # fmt: skip
        moe_down(b.h, w.down, b.routing, b.x, residual=b.x, shared=w.shared_down, hs=b.hs, down_bias=w.down_bias,
                 shared_bias=w.shared_down_bias, rows=rows, ws=b.ws, label=f"{i}.down")  # fmt: skip

    def _dense(self, i: int, w: Dense, b: Buffers, rows: Tensor | None) -> None:
        assert b.mlp is not None
        gemm(b.x, w.up, b.mlp, norm=w.norm, bias=w.up_bias, act="relu2", **self._at(b, rows, f"{i}.up"))
        gemm(b.mlp, w.down, b.x, bias=w.down_bias, residual=b.x, **self._at(b, rows, f"{i}.down"))

    @property
    def node_budget(self) -> int:
        """Most nodes that a decode step may have."""
        return sum(NODE_BUDGET[k] for k in self.config.pattern) + 3


def plan_bytes(c: NemotronConfig, dtype: str, quant: str | None, context: int, kv_format: str) -> dict[str, int]:
    """Bytes of the large parts, from the configuration alone: what `load` will take."""
    from engine.models.nemotron.weights import Recipe, tensor_shapes

    bits = {"f32": 32.0, "bf16": 16.0, "i8": 8.25, "i4": 4.25}
    recipe = Recipe(c, dtype, quant)
    weights = 0.0
    for name, shape in tensor_shapes(c).items():
        size = math.prod(shape)
        if name == "embeddings.weight":
            weights += size * (4 if dtype == "f32" and quant is None else 2)
        elif len(shape) != 2 or ".gate." in name:
            weights += size * 4
        else:
            layer = int(name.split(".")[1]) if name.startswith("layers.") else -1
            role = (
                "lm_head"
                if layer < 0
                else {"M": "mamba", "*": "attention", "E": "experts", "-": "mlp"}[c.pattern[layer]]
            )
            weights += size * bits[recipe.format(role, shape[1], layer)] / 8
    kv = sum(KVCache.nbytes(c.num_key_value_heads, c.head_dim, context, kv_format)) * c.pattern.count("*")
    scan = SsmShape(c.mamba_num_heads, c.mamba_head_dim, c.n_groups, c.ssm_state_size, c.conv_kernel)
    state = c.pattern.count("M") * 4 * (math.prod(scan.state) + (c.conv_kernel - 1) * c.conv_dim)
    return {"weights": int(weights), "kv": kv, "state": state}


def _check_memory(c: NemotronConfig, dtype: str, quant: str | None, context: int, kv_format: str) -> None:
    parts = plan_bytes(c, dtype, quant, context, kv_format)
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    need = sum(parts.values())
    if need > have:
        largest = max(parts, key=lambda k: parts[k])
        advice = "load with quant='int4'" if largest == "weights" and quant != "int4" else "lower context="
        listing = ", ".join(f"{k} {v / 1e9:.2f} GB" for k, v in parts.items())
        raise MemoryPlanError(
            f"this model needs {need / 1e9:.2f} GB ({listing}) and the machine has {have / 1e9:.2f} GB; {advice}"
        )


def _bounded(name: str, value: int, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{name}={value!r} is not an integer in [{low}, {high}]")
    return value
