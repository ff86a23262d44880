"""From a checkpoint to packed weights: names, formats and the reasons for them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from engine.blocks.weights import Packer, Recipe
from engine.io.checkpoint import MappedSource, Source, Stack, expect
from engine.io.mapped import Rule
from engine.models.nemotron.config import NemotronConfig
from engine.ops.gemm import PackedMatrix
from engine.runtime.arena import Arena, Tensor

RULES: list[Rule] = [
    ("language_model.backbone.", ""),
    ("language_model.lm_head.", "lm_head."),
    ("backbone.", ""),
    ("model.", ""),
    (re.compile(r"(?:language_model\.)?mtp\."), None),
]
STACKS = [Stack(r"(.*experts)[.](up|down)_proj", r"\1.{e}.\2_proj.weight")]


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


class NemotronRecipe(Recipe):
    """int4 keeps 8 bits where NVIDIA's ablation is most sensitive: attention, Mamba layers right in front of
    attention, the head. Router, convolution and SSM parameters are fp32 everywhere.
    """

    def __init__(self, c: NemotronConfig, dtype: str, quant: str | None) -> None:
        super().__init__(dtype, quant)
        self._before_attention = {i for i, k in enumerate(c.pattern[:-1]) if k == "M" and c.pattern[i + 1] == "*"}

    def mamba(self, k: int, layer: int) -> str:
        return self.format("mamba before attention" if layer in self._before_attention else "mamba", k)

    def choose(self, role: str) -> tuple[str, str]:
        if self.quant == "int4" and role in ("attention", "lm_head"):
            return "i8", "8 bits: most sensitive"
        if self.quant == "int4" and role == "mamba before attention":
            return "i8", "8 bits: feeds attention"
        return super().choose(role)


class Loader(Packer):
    """The layers of a checkpoint, in order."""

    def __init__(
        self, c: NemotronConfig, source: MappedSource, arena: Arena, recipe: NemotronRecipe, progress: bool
    ) -> None:
        super().__init__(source, arena)
        self.c, self.recipe = c, recipe
        self.expert_bias = _has_expert_bias(c, source)
        self.bar = tqdm(
            total=len(c.pattern) + 2, desc="loading", unit="layer", disable=not progress, delay=1.0, leave=False
        )

    def mamba(self, i: int) -> Mamba:
        c, m = self.c, f"layers.{i}.mixer"
        return Mamba(
            norm=self.vector(f"layers.{i}.norm.weight"),
            in_proj=self.matrix(f"{m}.in_proj", [f"{m}.in_proj.weight"], self.recipe.mamba(c.hidden_size, i)),
            in_bias=self.optional(f"{m}.in_proj.bias", c.use_bias),
            conv_w=self.vector(f"{m}.conv1d.weight", (c.conv_kernel, c.conv_dim), lambda w: w[:, 0].T),
            conv_b=self.optional(f"{m}.conv1d.bias", c.use_conv_bias),
            a=self.vector(f"{m}.A_log", fn=lambda w: -np.exp(w)),
            d_skip=self.vector(f"{m}.D"),
            dt_bias=self.vector(f"{m}.dt_bias"),
            gated_norm=self.vector(f"{m}.norm.weight"),
            out_proj=self.matrix(f"{m}.out_proj", [f"{m}.out_proj.weight"], self.recipe.mamba(c.mamba_inner, i)),
            out_bias=self.optional(f"{m}.out_proj.bias", c.use_bias),
        )

    def attention(self, i: int) -> Attention:
        c, m = self.c, f"layers.{i}.mixer"
        names = [f"{m}.{n}_proj" for n in "qkv"]
        return Attention(
            norm=self.vector(f"layers.{i}.norm.weight"),
            qkv=self.matrix(f"{m}.qkv", [f"{n}.weight" for n in names], self.recipe.format("attention", c.hidden_size)),
            qkv_bias=self.stacked(f"{m}.qkv.bias", [f"{n}.bias" for n in names]) if c.attention_bias else None,
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
            return packed, self.stacked(
                f"{m}.experts.{which}.bias", [f"{x}.bias" for x in names]
            ) if self.expert_bias else None

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

    def load(self) -> Weights:
        c = self.c
        kinds: dict[str, Any] = {"M": self.mamba, "*": self.attention, "E": self.experts, "-": self.dense}
        with self.bar:
            embed = self.table("embeddings.weight", self.recipe.table_dtype)
            self.bar.update()
            layers: list[Mamba | Attention | Experts | Dense] = []
            for i, kind in enumerate(c.pattern):
                layers.append(kinds[kind](i))
                self.bar.update()
            head = "embeddings.weight" if c.tie_word_embeddings else "lm_head.weight"
            lm_head = self.matrix("lm_head", [head], self.recipe.format("lm_head", c.hidden_size))
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
    recipe = NemotronRecipe(c, dtype, quant)
    view = mapped(source)
    ignore = ["lm_head.weight"] if c.tie_word_embeddings else []
    expect(view, tensor_shapes(c, _has_expert_bias(c, view)), ignore=ignore)
    return Loader(c, view, arena, recipe, progress).load()
