"""From a checkpoint to packed weights: names, formats and the reasons for them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from engine.errors import CheckpointError, DispatchError, InputError
from engine.io.checkpoint import MappedSource, Source, Stack, bf16_to_f32, check_finite, expect, f32_to_bf16
from engine.io.mapped import Rule
from engine.io.tensors import TensorInfo
from engine.models.nemotron.config import NemotronConfig
from engine.ops.dispatch import is_strict
from engine.ops.gemm import PackedMatrix, group_for
from engine.runtime.arena import Arena, Tensor

RULES: list[Rule] = [
    ("language_model.backbone.", ""),
    ("language_model.lm_head.", "lm_head."),
    ("backbone.", ""),
    ("model.", ""),
    (re.compile(r"(?:language_model\.)?mtp\."), None),
]
STACKS = [Stack(r"(.*experts)[.](up|down)_proj", r"\1.{e}.\2_proj.weight")]
QUANTS = (None, "int8", "int4")


@dataclass
class Mamba:
    norm: Tensor
    in_proj: PackedMatrix
    in_bias: Tensor | None
    conv_w: Tensor  # [K, channels]
    conv_b: Tensor | None
    a: Tensor  # -exp(A_log)
    d_skip: Tensor
    dt_bias: Tensor
    gated_norm: Tensor
    out_proj: PackedMatrix
    out_bias: Tensor | None


@dataclass
class Attention:
    norm: Tensor
    qkv: PackedMatrix
    qkv_bias: Tensor | None
    o_proj: PackedMatrix
    o_bias: Tensor | None


@dataclass
class Experts:
    norm: Tensor
    gate: PackedMatrix
    gate_bias: Tensor
    up: PackedMatrix
    down: PackedMatrix
    up_bias: Tensor | None
    down_bias: Tensor | None
    shared_up: PackedMatrix | None
    shared_down: PackedMatrix | None
    shared_up_bias: Tensor | None
    shared_down_bias: Tensor | None


@dataclass
class Dense:
    norm: Tensor
    up: PackedMatrix
    down: PackedMatrix
    up_bias: Tensor | None
    down_bias: Tensor | None


@dataclass
class Weights:
    embed: Tensor
    layers: list[Mamba | Attention | Experts | Dense]
    norm_f: Tensor
    lm_head: PackedMatrix
    notes: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


def mapped(source: Source) -> MappedSource:
    """The checkpoint under the names that this loader uses; `mtp.*` is hidden and listed as skipped."""
    return MappedSource(source, RULES, STACKS)


def tensor_shapes(c: NemotronConfig, expert_bias: bool | None = None) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model and its shape. Routed experts have biases or not (default: as mlp_bias says);
    transformers leaves them out even when mlp_bias is set, the published remote code does not."""
    expert_bias = c.mlp_bias if expert_bias is None else expert_bias
    d, out = c.hidden_size, {"embeddings.weight": (c.vocab_size, c.hidden_size), "norm_f.weight": (c.hidden_size,)}
    if not c.tie_word_embeddings:
        out["lm_head.weight"] = (c.vocab_size, d)

    def linear(name: str, n: int, k: int, bias: bool) -> None:
        out[f"{name}.weight"] = (n, k)
        if bias:
            out[f"{name}.bias"] = (n,)

    for i, kind in enumerate(c.pattern):
        p, m = f"layers.{i}", f"layers.{i}.mixer"
        out[f"{p}.norm.weight"] = (d,)
        if kind == "M":
            linear(f"{m}.in_proj", c.mamba_inner + c.conv_dim + c.mamba_num_heads, d, c.use_bias)
            linear(f"{m}.out_proj", d, c.mamba_inner, c.use_bias)
            out[f"{m}.conv1d.weight"] = (c.conv_dim, 1, c.conv_kernel)
            if c.use_conv_bias:
                out[f"{m}.conv1d.bias"] = (c.conv_dim,)
            out |= {f"{m}.{n}": (c.mamba_num_heads,) for n in ("A_log", "D", "dt_bias")}
            out[f"{m}.norm.weight"] = (c.mamba_inner,)
        elif kind == "*":
            q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
            for n, width in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
                linear(f"{m}.{n}", width, d, c.attention_bias)
            linear(f"{m}.o_proj", d, q, c.attention_bias)
        elif kind == "-":
            linear(f"{m}.up_proj", c.intermediate_size, d, c.mlp_bias)
            linear(f"{m}.down_proj", d, c.intermediate_size, c.mlp_bias)
        else:
            out[f"{m}.gate.weight"] = (c.n_routed_experts, d)
            out[f"{m}.gate.e_score_correction_bias"] = (c.n_routed_experts,)
            for e in range(c.n_routed_experts):
                linear(f"{m}.experts.{e}.up_proj", c.moe_intermediate_size, d, expert_bias)
                linear(f"{m}.experts.{e}.down_proj", d, c.moe_intermediate_size, expert_bias)
            if c.shared_width:
                linear(f"{m}.shared_experts.up_proj", c.shared_width, d, c.mlp_bias)
                linear(f"{m}.shared_experts.down_proj", d, c.shared_width, c.mlp_bias)
    return out


class Recipe:
    """Which format each role gets.

    int4 keeps 8 bits where NVIDIA's ablation is most sensitive (spec 3.6): attention, Mamba layers right in front of
    attention, the head. Router, convolution and SSM parameters are fp32 everywhere.
    """

    def __init__(self, c: NemotronConfig, dtype: str, quant: str | None) -> None:
        if quant not in QUANTS:
            raise InputError(f"quant={quant!r} is not one of None, 'int8', 'int4'")
        if dtype not in ("f32", "bf16"):
            raise InputError(f"dtype {dtype!r} is not supported for weights on a CPU; use float32 or bfloat16")
        self.dtype, self.quant = dtype, quant
        self._before_attention = {i for i, k in enumerate(c.pattern[:-1]) if k == "M" and c.pattern[i + 1] == "*"}
        self.notes: dict[str, str] = {}

    def format(self, role: str, k: int, layer: int = -1) -> str:
        if self.quant is None:
            chosen, why = self.dtype, "as asked"
        elif self.quant == "int8":
            chosen, why = "i8", "as asked"
        elif role in ("attention", "lm_head"):
            chosen, why = "i8", "8 bits: most sensitive"
        elif role == "mamba" and layer in self._before_attention:
            chosen, why = "i8", "8 bits: feeds attention"
        else:
            chosen, why = "i4", "as asked"
        if chosen in ("i8", "i4"):
            group = group_for(k)
            if group is None:
                chosen, why = "bf16", f"K = {k} is not a multiple of 32"
                if is_strict():
                    raise DispatchError(
                        f"{role} weights of width {k} cannot be quantised in groups of 32; load with strict=False"
                    )
            else:
                why += f", group {group}"
        name = role if role != "mamba" or layer not in self._before_attention else "mamba before attention"
        self.notes[f"{name} (K={k})"] = f"{chosen} ({why})"
        return chosen


class Shapes:
    """The tensors of a config without their contents: what a dry arena needs to lay out a model."""

    def __init__(self, c: NemotronConfig) -> None:
        self._shapes = tensor_shapes(c)

    def keys(self) -> list[str]:
        return list(self._shapes)

    def info(self, name: str) -> TensorInfo:
        shape = self._shapes[name]
        return TensorInfo(name, "BF16", shape, 2 * math.prod(shape))

    def read(self, name: str) -> np.ndarray:
        raise CheckpointError(f"tensor {name!r} has a shape and no contents: the model is a sketch")

    def release(self, name: str) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is open."""


class Loader:
    """Reads, checks and packs one tensor after another; the source may drop each one's pages right after."""

    def __init__(self, c: NemotronConfig, source: MappedSource, arena: Arena, recipe: Recipe, progress: bool) -> None:
        self.c, self.source, self.arena, self.recipe = c, source, arena, recipe
        self.expert_bias = _has_expert_bias(c, source)
        self.bar = tqdm(
            total=len(c.pattern) + 2, desc="loading", unit="layer", disable=not progress, delay=1.0, leave=False
        )

    def vector(self, name: str, shape: tuple[int, ...] | None = None, fn=None) -> Tensor:
        info = self.source.info(name)
        if self.arena.dry:
            return self.arena.alloc(name, shape or info.shape, "f32", "weights")
        raw = self.source.read(name)
        value = bf16_to_f32(raw) if info.dtype == "BF16" else np.asarray(raw, np.float32)
        check_finite(name, value)
        if fn is not None:
            with np.errstate(over="ignore"):
                value = fn(value)
            check_finite(name, value)
        value = value.reshape(shape or value.shape)
        out = self.arena.alloc(name, value.shape, "f32", "weights")
        out.write(value)
        return out

    def optional(self, name: str, wanted: bool) -> Tensor | None:
        return self.vector(name) if wanted else None

    def stacked(self, name: str, names: list[str], wanted: bool) -> Tensor | None:
        """Several bias vectors as one buffer."""
        if not wanted:
            return None
        if self.arena.dry:
            return self.arena.alloc(name, (sum(self.source.info(n).shape[0] for n in names),), "f32", "weights")
        parts = [self.source.read(n) for n in names]
        parts = [bf16_to_f32(p) if p.dtype == np.uint16 else np.asarray(p, np.float32) for p in parts]
        value = np.concatenate(parts)
        check_finite(name, value)
        out = self.arena.alloc(name, value.shape, "f32", "weights")
        out.write(value)
        return out

    def matrix(self, name: str, names: list[str], format: str, count: int = 1) -> PackedMatrix:
        """count = 1: the rows of `names` one after another; else one matrix per name."""
        infos = [self.source.info(n) for n in names]
        rows = sum(i.shape[0] for i in infos) // count
        out = PackedMatrix.empty(self.arena, name, rows, infos[0].shape[1], format, count)
        if self.arena.dry:
            return out
        row = 0
        for e, (n, info) in enumerate(zip(names, infos)):
            if info.dtype not in ("F32", "BF16", "F16"):
                raise CheckpointError(f"tensor {n!r} is {info.dtype}; this loader reads F32, BF16 and F16 weights")
            bad = out.fill(self.source.read(n), *((row, 0) if count == 1 else (0, e)))
            if bad:
                raise CheckpointError(
                    f"tensor {n!r} holds NaN, infinity, or values too large for this format; check the checkpoint"
                )
            row += info.shape[0]
            self.source.release(n)
        return out

    def mamba(self, i: int) -> Mamba:
        c, m = self.c, f"layers.{i}.mixer"
        return Mamba(
            norm=self.vector(f"layers.{i}.norm.weight"),
            in_proj=self.matrix(f"{m}.in_proj", [f"{m}.in_proj.weight"], self.recipe.format("mamba", c.hidden_size, i)),
            in_bias=self.optional(f"{m}.in_proj.bias", c.use_bias),
            conv_w=self.vector(f"{m}.conv1d.weight", (c.conv_kernel, c.conv_dim), lambda w: w[:, 0].T),
            conv_b=self.optional(f"{m}.conv1d.bias", c.use_conv_bias),
            a=self.vector(f"{m}.A_log", fn=lambda w: -np.exp(w)),
            d_skip=self.vector(f"{m}.D"),
            dt_bias=self.vector(f"{m}.dt_bias"),
            gated_norm=self.vector(f"{m}.norm.weight"),
            out_proj=self.matrix(
                f"{m}.out_proj", [f"{m}.out_proj.weight"], self.recipe.format("mamba", c.mamba_inner, i)
            ),
            out_bias=self.optional(f"{m}.out_proj.bias", c.use_bias),
        )

    def attention(self, i: int) -> Attention:
        c, m = self.c, f"layers.{i}.mixer"
        names = [f"{m}.{n}_proj" for n in "qkv"]
        return Attention(
            norm=self.vector(f"layers.{i}.norm.weight"),
            qkv=self.matrix(f"{m}.qkv", [f"{n}.weight" for n in names], self.recipe.format("attention", c.hidden_size)),
            qkv_bias=self.stacked(f"{m}.qkv.bias", [f"{n}.bias" for n in names], c.attention_bias),
            o_proj=self.matrix(f"{m}.o_proj", [f"{m}.o_proj.weight"],
                               self.recipe.format("attention", c.num_attention_heads * c.head_dim)),
            o_bias=self.optional(f"{m}.o_proj.bias", c.attention_bias),
        )  # fmt: skip

    def experts(self, i: int) -> Experts:
        c, m, n = self.c, f"layers.{i}.mixer", self.c.n_routed_experts

        def stack(which: str, k: int) -> tuple[PackedMatrix, Tensor | None]:
            names = [f"{m}.experts.{e}.{which}_proj" for e in range(n)]
            packed = self.matrix(
                f"{m}.experts.{which}", [f"{x}.weight" for x in names], self.recipe.format("experts", k), n
            )
            return packed, self.stacked(f"{m}.experts.{which}.bias", [f"{x}.bias" for x in names], self.expert_bias)

        def shared(which: str, k: int) -> tuple[PackedMatrix | None, Tensor | None]:
            if not c.shared_width:
                return None, None
            name = f"{m}.shared_experts.{which}_proj"
            packed = self.matrix(name, [f"{name}.weight"], self.recipe.format("shared expert", k))
            return packed, self.optional(f"{name}.bias", c.mlp_bias)

        gate = self.matrix(f"{m}.gate", [f"{m}.gate.weight"], "f32")
        up, up_bias = stack("up", c.hidden_size)
        down, down_bias = stack("down", c.moe_intermediate_size)
        sup, sup_bias = shared("up", c.hidden_size)
        sdown, sdown_bias = shared("down", c.shared_width)
        return Experts(self.vector(f"layers.{i}.norm.weight"), gate, self.vector(f"{m}.gate.e_score_correction_bias"),
                       up, down, up_bias, down_bias, sup, sdown, sup_bias, sdown_bias)  # fmt: skip

    def dense(self, i: int) -> Dense:
        c, m = self.c, f"layers.{i}.mixer"
        up, down = f"{m}.up_proj", f"{m}.down_proj"
        return Dense(
            norm=self.vector(f"layers.{i}.norm.weight"),
            up=self.matrix(up, [f"{up}.weight"], self.recipe.format("mlp", c.hidden_size)),
            down=self.matrix(down, [f"{down}.weight"], self.recipe.format("mlp", c.intermediate_size)),
            up_bias=self.optional(f"{up}.bias", c.mlp_bias),
            down_bias=self.optional(f"{down}.bias", c.mlp_bias),
        )

    def embedding(self) -> Tensor:
        name, dtype = "embeddings.weight", "f32" if self.recipe.dtype == "f32" and not self.recipe.quant else "bf16"
        info = self.source.info(name)
        out = self.arena.alloc(name, info.shape, dtype, "weights")
        if self.arena.dry:
            return out
        raw = self.source.read(name)
        for r in range(0, info.shape[0], 4096):  # in pieces: the table may be larger than what is free
            rows = raw[r : r + 4096]
            check_finite(name, rows, info.dtype)
            if info.dtype == "BF16":
                value = rows if dtype == "bf16" else bf16_to_f32(rows)
            else:
                f32 = np.ascontiguousarray(rows, np.float32)
                value = f32 if dtype == "f32" else f32_to_bf16(f32)
            out.slice(r * info.shape[1], value.shape).write(value)
        return out

    def load(self) -> Weights:
        c = self.c
        kinds: dict[str, Any] = {"M": self.mamba, "*": self.attention, "E": self.experts, "-": self.dense}
        with self.bar:
            embed = self.embedding()
            self.bar.update()
            layers: list[Mamba | Attention | Experts | Dense] = []
            for i, kind in enumerate(c.pattern):
                layers.append(kinds[kind](i))
                self.bar.update()
            head = "embeddings.weight" if c.tie_word_embeddings else "lm_head.weight"
            lm_head = self.matrix("lm_head", [head], self.recipe.format("lm_head", c.hidden_size))
            self.source.release("embeddings.weight")
            norm_f = self.vector("norm_f.weight")
            self.bar.update()
        return Weights(embed, layers, norm_f, lm_head, self.recipe.notes, self.source.skipped)


def _has_expert_bias(c: NemotronConfig, source: MappedSource) -> bool:
    """Decided by the first routed expert; `expect` then holds all of them to it."""
    if not c.mlp_bias or "E" not in c.pattern:
        return False
    return f"layers.{c.pattern.index('E')}.mixer.experts.0.up_proj.bias" in set(source.keys())


def load_weights(
    c: NemotronConfig, source: Source, arena: Arena, dtype: str, quant: str | None, progress: bool = True
) -> Weights:
    """Checks every name and shape first, then packs.

    Raises: CheckpointError (missing, extra or misshapen tensors, unsupported dtype, NaN), InputError (quant, dtype).
    """
    recipe = Recipe(c, dtype, quant)
    view = mapped(source)
    ignore = ["lm_head.weight"] if c.tie_word_embeddings else []
    expect(view, tensor_shapes(c, _has_expert_bias(c, view)), ignore=ignore)
    return Loader(c, view, arena, recipe, progress).load()
