"""Nemotron-Cascade 2 / Nemotron 3 Nano (nemotron_h): the step as ops on static buffers, captured as plans.

Three nodes per layer: Mamba-2 = in_proj, conv + scan, out_proj; MoE = route, up, down; attention = qkv, attention,
o_proj (a dense MLP has two). The norms are prologues, residual adds are epilogues. The residual stream is fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.blocks.language import LanguageModel, TokenIO
from engine.blocks.prefix import PrefixCache
from engine.blocks.weights import Shapes
from engine.errors import ConfigError
from engine.io.checkpoint import Checkpoint, Source
from engine.io.text import ChatTemplate, Tokenizer
from engine.models.nemotron.config import NemotronConfig
from engine.models.nemotron.weights import Attention, Dense, Experts, Mamba, load_weights, tensor_shapes
from engine.ops import attention as attention_op
from engine.ops import gemm as gemm_op
from engine.ops import moe as moe_op
from engine.ops.attention import KVCache, attention
from engine.ops.dispatch import strict as strict_dispatch
from engine.ops.gather import gather
from engine.ops.gemm import PackedMatrix, gemm
from engine.ops.moe import Routing, moe_down, moe_route, moe_up
from engine.ops.sample import sample
from engine.ops.ssm import SsmShape, ssm
from engine.runtime.arena import Arena, Tensor
from engine.runtime.device import on, parse_dtype
from engine.runtime.fit import require
from engine.runtime.model import bounded, keywords
from engine.runtime.plan import capture

DEFAULT_CONTEXT = 8192
DEFAULT_CHUNK = 512
NODE_BUDGET = {"M": 3, "E": 3, "*": 3, "-": 2}  # per layer; 3 more outside: embedding, head, draw
DEFAULT_SNAPSHOTS = 4
MAX_HEAD_DIM = 1024
MAX_ROUTED_BYTES = 3 << 20  # activations of one token that moe_down packs in thread scratch
SCORE_BYTES = 64 << 20  # logits kept for score(), at most


class Buffers:
    """Workspace of a step of up to `m` tokens; layers share it. `up` and `shared` are those of any MoE layer."""

    def __init__(
        self,
        c: NemotronConfig,
        up: PackedMatrix | None,
        shared: PackedMatrix | None,
        arena: Arena,
        m: int,
        context: int,
    ) -> None:
        def ws(name: str, *shape: int, dtype: str = "f32") -> Tensor:
            return arena.alloc(name, shape, dtype)

        d = c.hidden_size
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.x = ws("x", m, d)
        self.proj = ws("proj", m, c.mamba_inner + c.conv_dim + c.mamba_num_heads) if "M" in c.pattern else None
        self.u = ws("u", m, c.conv_dim) if "M" in c.pattern else None
        self.ticket = arena.alloc("ticket", (c.n_groups,), "i32", "io") if "M" in c.pattern else None
        self.y = ws("y", m, max(c.mamba_inner if "M" in c.pattern else 1, q if "*" in c.pattern else 1))
        self.qkv = ws("qkv", m, q + 2 * kv) if "*" in c.pattern else None
        self.mlp = ws("mlp", m, c.intermediate_size) if "-" in c.pattern else None
        sizes = [gemm_op.workspace_bytes(m, k) for k in (d, self.y.shape[1], c.intermediate_size)]
        self.routing = None
        if up is not None:
            self.routing = Routing.empty(arena, "routing", m, c.n_routed_experts, c.num_experts_per_tok)
            self.h = ws("h", m * c.num_experts_per_tok, c.moe_intermediate_size)
            self.hs = ws("hs", m, c.shared_width) if c.shared_width else None
            sizes.append(moe_op.moe_workspace(m, d, up, c.num_experts_per_tok, shared))
        if "*" in c.pattern:
            sizes.append(attention_op.workspace_bytes(m, c.num_attention_heads, c.head_dim, context))
        self.ws = ws("ws", max(sizes), dtype="u8")

    def rows(self, m: int) -> Buffers:
        """The same memory, seen as a step of m tokens."""
        out = object.__new__(Buffers)
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name not in ("ws", "ticket"):
                lead = m * (value.shape[0] // self.x.shape[0])
                value = value.slice(0, (lead, value.shape[1]))
            elif isinstance(value, Routing):
                value = Routing(value.ids.slice(0, (m, value.top_k)), value.weights.slice(0, (m, value.top_k)),
                                value.offsets, value.order, value.logits.slice(0, (m, value.experts)), value.ticket,
                                value.experts, value.top_k)  # fmt: skip
            setattr(out, name, value)
        return out


class Nemotron(LanguageModel):
    """A loaded model: `generate`, `stream`, `chat`, `score`, `logits`, `explain`, `memory`. See engine.load."""

    config: NemotronConfig

    @classmethod
    def load_options(cls) -> frozenset[str]:
        """Names of the options that `engine.load` takes."""
        return keywords(cls.__init__, "name", "tokenizer", "template")

    @classmethod
    def load(cls, folder: Path, *, source: Source | None = None, **options: object) -> Nemotron:
        """From a folder in the published layout; `source` replaces its weight files."""
        config = NemotronConfig.from_folder(folder)
        tokenizer = Tokenizer.from_folder(folder) if (folder / "tokenizer.json").exists() else None
        template = ChatTemplate.from_folder(folder) if _has_template(folder) else None
        if source is not None:
            return cls(config, source, name=folder.name, tokenizer=tokenizer, template=template, **options)  # type: ignore[arg-type]
        with Checkpoint(folder) as checkpoint:
            return cls(config, checkpoint, name=folder.name, tokenizer=tokenizer, template=template, **options)  # type: ignore[arg-type]

    def __init__(
        self,
        config: NemotronConfig,
        source: Source | None,
        *,
        name: str = "nemotron",
        device: str = "cpu",
        dtype: object = "auto",
        quant: str | None = None,
        context: int | None = None,
        chunk: int = DEFAULT_CHUNK,
        snapshots: int = DEFAULT_SNAPSHOTS,
        strict: bool = False,
        tokenizer: Tokenizer | None = None,
        template: ChatTemplate | None = None,
        progress: bool = True,
    ) -> None:
        """Packs the weights and captures every plan.

        source: the tensors; None makes a sketch, see there. device: 'cpu', 'cuda' or 'cuda:N'. dtype: 'auto' (that of
        the checkpoint), float32 or bfloat16. quant: None, 'int8', 'int4'. context: tokens of KV cache, default
        min(8192, the model's limit). chunk: prompt tokens per prefill step. snapshots: states kept for prefix reuse.
        """
        c = self.config = config
        o = Options.of(c, dtype, quant, context, chunk, snapshots)
        if tokenizer is not None and tokenizer.vocab_size > c.vocab_size:
            raise ConfigError(
                f"tokenizer.json has {tokenizer.vocab_size} tokens and config.json a vocab_size of {c.vocab_size}; "
                "the files do not belong together"
            )
        if source is not None:
            parts = o.bytes(c, device)
            weighs = max(parts, key=lambda k: parts[k]) == "weights" and quant != "int4"
            require(parts, device, "load with quant='int4'" if weighs else "lower context= or chunk=")
        arena = Arena(device, dry=source is None)
        with strict_dispatch(strict):
            self.weights = w = load_weights(c, source or Shapes(tensor_shapes(c)), arena, o.dtype, quant, progress)
        moe = next((layer for layer in w.layers if isinstance(layer, Experts)), None)
        with on(device):  # workspaces differ
            made = o.allocate(c, arena, moe.up if moe else None, moe.shared_up if moe else None)
        self._ssm, self._conv, self._state, self._kv = made.ssm, made.conv, made.state, made.kv
        super().__init__(
            name, arena, made.io, [*made.conv.values(), *made.state.values()], vocab_size=c.vocab_size,
            context=o.context, stop_ids=c.eos_token_ids, tokenizer=tokenizer, template=template, snapshots=snapshots,
        )  # fmt: skip
        self.weight_notes = w.notes
        if w.skipped:
            more = ", ..." if len(w.skipped) > 4 else ""
            self.notes.append(
                f"skipped {len(w.skipped)} tensors (multi-token prediction): {', '.join(w.skipped[:4])}{more}"
            )
        arena.seal()
        with strict_dispatch(strict), on(device):
            self._capture(made.buffers, made.last, o.score_chunk)

    @classmethod
    def sketch(cls, config: dict, **options: object) -> Nemotron:
        """The model of a config.json without memory: every buffer is laid out and every plan recorded, none can run."""
        return cls(NemotronConfig.from_json(config), None, progress=False, **options)  # type: ignore[arg-type]

    @staticmethod
    def plan(
        config: dict, *, device: str = "cpu", dtype: object = "auto", quant: str | None = None,
        context: int | None = None, chunk: int = DEFAULT_CHUNK, snapshots: int = DEFAULT_SNAPSHOTS,
    ) -> dict[str, int]:  # fmt: skip
        """Bytes by part that a load would take, from config.json alone and by the code that allocates."""
        c = NemotronConfig.from_json(config)
        return Options.of(c, dtype, quant, context, chunk, snapshots).bytes(c, device)

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
        assert b.proj is not None and b.u is not None and b.ticket is not None
        di = c.mamba_inner
        z, xbc, dt = b.proj.columns(0, di), b.proj.columns(di, s.channels), b.proj.columns(di + s.channels, s.heads)
        y = b.y.columns(0, di)
        gemm(b.x, w.in_proj, b.proj, norm=w.norm, bias=w.in_bias, **self._at(b, rows, f"{i}.in_proj"))
        ssm(s, xbc, dt, y, conv_w=w.conv_w, conv_b=w.conv_b, conv_state=self._conv[i], a=w.a, d_skip=w.d_skip,
            dt_bias=w.dt_bias, state=self._state[i], u=b.u, ticket=b.ticket, dt_limit=c.time_step_limit, rows=rows,
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


@dataclass(frozen=True)
class Made:
    """Every buffer of a model besides its weights and snapshots."""

    ssm: SsmShape
    conv: dict[int, Tensor]
    state: dict[int, Tensor]
    kv: dict[int, KVCache]
    io: TokenIO
    buffers: Buffers
    last: Tensor


@dataclass(frozen=True)
class Options:
    """Checked options of a load."""

    dtype: str
    quant: str | None
    kv_format: str
    context: int
    chunk: int
    score_chunk: int
    snapshots: int

    @staticmethod
    def of(
        c: NemotronConfig, dtype: object, quant: str | None, context: int | None, chunk: int, snapshots: int
    ) -> Options:
        parsed = parse_dtype(c.torch_dtype if dtype in ("auto", None) else dtype)
        if parsed == "f16" and dtype in ("auto", None):
            parsed = "f32"  # the CPU kernels have no fp16; fp32 loses nothing
        limit = c.max_position_embeddings
        context = bounded("context", min(DEFAULT_CONTEXT, limit) if context is None else context, 1, limit)
        context = math.ceil(context / 16) * 16
        chunk = min(bounded("chunk", chunk, 1, 16384), context)
        score_chunk = max(1, min(chunk, SCORE_BYTES // (4 * c.vocab_size)))
        kv_format = "f32" if parsed == "f32" and quant is None else "bf16"
        _check_widths(c)
        return Options(parsed, quant, kv_format, context, chunk, score_chunk, bounded("snapshots", snapshots, 0, 64))

    def allocate(self, c: NemotronConfig, arena: Arena, up: PackedMatrix | None, shared: PackedMatrix | None) -> Made:
        mamba = [i for i, k in enumerate(c.pattern) if k == "M"]
        shape = SsmShape(c.mamba_num_heads, c.mamba_head_dim, c.n_groups, c.ssm_state_size, c.conv_kernel)
        return Made(
            shape,
            {i: arena.alloc(f"conv.{i}", (c.conv_kernel - 1, c.conv_dim), "f32", "state") for i in mamba},
            {i: arena.alloc(f"ssm.{i}", shape.state, "f32", "state") for i in mamba},
            {
                i: KVCache.empty(arena, f"kv.{i}", c.num_key_value_heads, c.head_dim, self.context, self.kv_format)
                for i, k in enumerate(c.pattern)
                if k == "*"
            },
            TokenIO.empty(arena, c.vocab_size, self.chunk, self.score_chunk, self.context),
            Buffers(c, up, shared, arena, self.chunk, self.context),
            arena.alloc("last_row", (1, c.hidden_size)),
        )

    def bytes(self, c: NemotronConfig, device: str = "cpu") -> dict[str, int]:
        """By part; nothing is taken."""
        arena = Arena(device, dry=True)
        w = load_weights(c, Shapes(tensor_shapes(c)), arena, self.dtype, self.quant, progress=False)
        moe = next((layer for layer in w.layers if isinstance(layer, Experts)), None)
        with on(device):
            made = self.allocate(c, arena, moe.up if moe else None, moe.shared_up if moe else None)
        PrefixCache(arena, [*made.conv.values(), *made.state.values()], self.snapshots)
        return arena.summary()


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").exists():
        return True
    path = folder / "tokenizer_config.json"
    # A damaged file counts as one that has a template: the error then names it.
    return path.exists() and b'"chat_template"' in path.read_bytes()


def _check_widths(c: NemotronConfig) -> None:
    """What the kernels' fixed scratch can hold."""
    inner = [c.moe_intermediate_size, c.shared_width] if "E" in c.pattern else []
    widths = [c.hidden_size, c.mamba_inner, c.num_attention_heads * c.head_dim, c.intermediate_size, *inner]
    if max(widths) > gemm_op.MAX_K:
        raise ConfigError(f"a layer is {max(widths)} wide; the kernels take at most {gemm_op.MAX_K}")
    if "*" in c.pattern and c.head_dim > MAX_HEAD_DIM:
        raise ConfigError(f"head_dim {c.head_dim} exceeds {MAX_HEAD_DIM}")
    if (
        "E" in c.pattern
        and 4 * (c.num_experts_per_tok * (c.moe_intermediate_size + 16) + c.shared_width) > MAX_ROUTED_BYTES
    ):
        raise ConfigError(
            f"{c.num_experts_per_tok} experts of width {c.moe_intermediate_size} per token exceed the kernels' scratch "
            f"of {MAX_ROUTED_BYTES} bytes"
        )
