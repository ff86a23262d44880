"""From a checkpoint of X-VLA to one set of names: every published layout looks the same behind `canonical`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from engine.blocks.transformer import TowerLayer
from engine.blocks.weights import Packer, Recipe
from engine.io.checkpoint import MappedSource, Source, TensorInfo, expect
from engine.io.mapped import Rule
from engine.models.xvla.config import LANGUAGE, POLICY, POSITION_OFFSET, PROJECTOR, VISION, XVLAConfig
from engine.ops.gemm import PackedMatrix
from engine.runtime.arena import Arena, Tensor

_ANY = r"(?:model\.)?"  # lerobot writes this prefix, the authors do not
_SHARED = f"{LANGUAGE}shared.weight"
_TABLE = f"{PROJECTOR}visual_temporal_embed.pos_idx_to_embed"
_PROJECTION = f"{PROJECTOR}image_projection.weight"
_EMBED = re.compile(_ANY + r"vlm\.language_model\.(?:model\.)?encoder\.embed_tokens\.weight$")
_UNUSED = re.compile(_ANY + r"vlm\.language_model\.(?:final_logits_bias$|lm_head\.|(?:model\.)?decoder\.)")
_BLOCK = _ANY + r"(vlm\.vision_tower\.blocks\.\d+\.\d+\.(?:spatial|channel)_block\.)"
# Florence-2 as the authors carry it in their own code, and lerobot before 0.6.
_OLD: list[Rule] = [
    (re.compile(_ANY + r"(vlm\.vision_tower\.convs\.\d+\.)proj\."), r"\1conv."),
    (re.compile(_BLOCK + r"(conv[12])\.fn\.dw\."), r"\1\2."),
    (re.compile(_BLOCK + r"(?:window|channel)_attn\.norm\."), r"\1norm1."),
    (re.compile(_BLOCK + r"((?:window|channel)_attn)\.fn\."), r"\1\2."),
    (re.compile(_BLOCK + r"ffn\.norm\."), r"\1norm2."),
    (re.compile(_BLOCK + r"ffn\.fn\.net\."), r"\1ffn."),
    (re.compile(_ANY + r"vlm\.image_proj_norm\."), f"{PROJECTOR}image_proj_norm."),
    (re.compile(_ANY + r"vlm\.image_pos_embed\."), f"{PROJECTOR}image_position_embed."),
    (re.compile(_ANY + r"vlm\.visual_temporal_embed\."), f"{PROJECTOR}visual_temporal_embed."),
    (re.compile(_ANY + r"vlm\.image_projection$"), _PROJECTION),
    (re.compile(_ANY + r"vlm\.language_model\.model\."), LANGUAGE),
]


class CanonicalSource(MappedSource):
    """A renamed view in which the image projection is [out, in], also where the file has it the other way round."""

    def _turned(self, name: str) -> bool:
        return name == _PROJECTION and self.stored(name)[0].endswith("vlm.image_projection")

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and bytes, after the turn."""
        info = super().info(name)
        return TensorInfo(name, info.dtype, info.shape[::-1], info.nbytes) if self._turned(name) else info

    def read(self, name: str) -> np.ndarray:
        """Read-only array (see `Source.read`); a view, of other strides where it is turned."""
        return super().read(name).T if self._turned(name) else super().read(name)


def canonical(source: Source) -> CanonicalSource:
    """The checkpoint under lerobot's names without their prefix `model.`; tensors that nothing reads are `skipped`.

    Understood: lerobot 0.6 (`model.` in front of every name); the authors' own layout of Florence-2, with or without
    that prefix, whose image projection is transposed; the token embedding as `shared`, as the encoder's
    `embed_tokens`, or both (they are tied); left-overs of Florence-2's decoder.

    Raises:
        CheckpointError: two stored tensors have one canonical name.
    """
    names = {re.sub(_ANY + r"(vlm\.language_model\.)(?:model\.)?(shared\.weight)$", r"\1\2", k) for k in source.keys()}  # noqa: SIM118
    rules: list[Rule] = [(_UNUSED, None), (_EMBED, None if _SHARED in names else _SHARED), *_OLD, ("model.", "")]
    return CanonicalSource(source, rules)


def checked(config: XVLAConfig, source: Source) -> CanonicalSource:
    """`canonical(source)`, once every tensor of the configuration is there in its shape and no other is.

    The table of frame embeddings may be absent: it is a constant.

    Raises:
        CheckpointError: lists the first misshapen, missing and unknown tensors.
    """
    view = canonical(source)
    expect(view, shapes(config), optional=[_TABLE])
    return view


def shapes(config: XVLAConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model under its canonical name, and its shape; all are float."""
    v, t, p = config.vision, config.language, config.policy
    out: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        out[f"{name}.weight"], out[f"{name}.bias"] = (rows, columns), (rows,)

    def norm(name: str, width: int) -> None:
        out[f"{name}.weight"] = out[f"{name}.bias"] = (width,)

    def per_domain(name: str, inputs: int, outputs: int) -> None:
        out[f"{name}.fc.weight"] = (config.num_domains, inputs * outputs)
        out[f"{name}.bias.weight"] = (config.num_domains, outputs)

    for s, width in enumerate(v.dims):
        before = v.dims[s - 1] if s else 3
        out[f"{VISION}convs.{s}.conv.weight"] = (width, before, v.kernels[s], v.kernels[s])
        out[f"{VISION}convs.{s}.conv.bias"] = (width,)
        norm(f"{VISION}convs.{s}.norm", before if s else width)
        for b in range(v.depths[s]):
            for kind, attention in (("spatial_block", "window_attn"), ("channel_block", "channel_attn")):
                q = f"{VISION}blocks.{s}.{b}.{kind}"
                for i in (1, 2):
                    out[f"{q}.conv{i}.weight"], out[f"{q}.conv{i}.bias"] = (width, 1, 3, 3), (width,)
                    norm(f"{q}.norm{i}", width)
                linear(f"{q}.{attention}.qkv", 3 * width, width)
                linear(f"{q}.{attention}.proj", width, width)
                linear(f"{q}.ffn.fc1", v.mlp[s], width)
                linear(f"{q}.ffn.fc2", width, v.mlp[s])
    last = v.dims[-1]
    out[_PROJECTION] = (t.width, last)
    norm(f"{PROJECTOR}image_proj_norm", t.width)
    out[f"{PROJECTOR}image_position_embed.row_embeddings.weight"] = (v.positions, last // 2)
    out[f"{PROJECTOR}image_position_embed.column_embeddings.weight"] = (v.positions, last - last // 2)
    out[_TABLE] = (v.temporal, last)

    out[_SHARED] = (t.vocab_size, t.width)
    out[f"{LANGUAGE}encoder.embed_positions.weight"] = (t.positions + POSITION_OFFSET, t.width)
    norm(f"{LANGUAGE}encoder.layernorm_embedding", t.width)
    for i in range(t.depth):
        q = f"{LANGUAGE}encoder.layers.{i}"
        for which in ("q", "k", "v", "out"):
            linear(f"{q}.self_attn.{which}_proj", t.width, t.width)
        norm(f"{q}.self_attn_layer_norm", t.width)
        linear(f"{q}.fc1", t.mlp, t.width)
        linear(f"{q}.fc2", t.width, t.mlp)
        norm(f"{q}.final_layer_norm", t.width)

    out[f"{POLICY}pos_emb"] = (1, config.max_len_seq, p.width)
    for i in range(p.depth):
        q = f"{POLICY}blocks.{i}"
        norm(f"{q}.norm1", p.width)
        norm(f"{q}.norm2", p.width)
        linear(f"{q}.attn.qkv", 3 * p.width, p.width)
        linear(f"{q}.attn.proj", p.width, p.width)
        linear(f"{q}.mlp.fc1", p.mlp, p.width)
        linear(f"{q}.mlp.fc2", p.width, p.mlp)
    for which in ("vlm_proj", "aux_visual_proj"):
        if config.hetero_proj:
            per_domain(f"{POLICY}{which}", t.width, p.width)
        else:
            linear(f"{POLICY}{which}", p.width, t.width)
    norm(f"{POLICY}norm", p.width)
    per_domain(f"{POLICY}action_encoder", config.action_dim + config.proprio_dim + config.dim_time, p.width)
    per_domain(f"{POLICY}action_decoder", p.width, config.action_dim)
    if config.len_soft_prompts:
        out[f"{POLICY}soft_prompt_hub.weight"] = (config.num_domains, config.len_soft_prompts * p.width)
    return out


# ------------------------------------------------------------------------------------------------------ packed
@dataclass
class Block:
    """One DaViT block: x += conv1(x); x += attention(norm1(x)); x += conv2(x); x += ffn(norm2(x))."""

    conv1: Tensor  # [9, C]
    conv1_bias: Tensor
    norm1: Tensor
    norm1_bias: Tensor
    qkv: PackedMatrix
    qkv_bias: Tensor
    proj: PackedMatrix
    proj_bias: Tensor
    conv2: Tensor
    conv2_bias: Tensor
    norm2: Tensor
    norm2_bias: Tensor
    fc1: PackedMatrix
    fc1_bias: Tensor
    fc2: PackedMatrix
    fc2_bias: Tensor


@dataclass
class Stage:
    """A stage of DaViT; the norm of its entry lies behind the convolution in the first stage, before it in others."""

    conv: PackedMatrix  # columns (y, x, channel)
    conv_bias: Tensor
    norm: Tensor
    norm_bias: Tensor
    spatial: list[Block]
    channel: list[Block]


@dataclass
class PerDomain:
    """Linear layers of every domain, and the slot that holds the one in use."""

    all: PackedMatrix
    biases: Tensor  # [domains, out]
    one: PackedMatrix
    bias: Tensor  # [out]

    def choose(self, domain: int) -> None:
        """Puts a domain into the slot."""
        n, width = self.all.matrix_bytes, self.bias.shape[0]
        self.one.data.copy_from(self.all.data.slice(domain * n, (n,)))
        self.bias.copy_from(self.biases.slice(domain * width, (width,)))


@dataclass
class Weights:
    """The packed model."""

    stages: list[Stage]
    projection: PackedMatrix
    projected_positions: Tensor  # [views * cells, language width]: what positions add behind the projection
    projection_norm: Tensor
    projection_norm_bias: Tensor
    embed: Tensor
    positions: Tensor  # [tokens + text, language width]
    embed_norm: Tensor
    embed_norm_bias: Tensor
    encoder: list[TowerLayer]
    vlm_proj: PerDomain | tuple[PackedMatrix, Tensor]
    aux_proj: PerDomain | tuple[PackedMatrix, Tensor]
    sequence: Tensor  # [horizon + context, width]: learned positions
    action_positions: Tensor  # [batch * horizon, width]
    blocks: list[TowerLayer]
    norm: Tensor
    norm_bias: Tensor
    action_encoder: PerDomain
    action_decoder: PerDomain
    soft_prompts: Tensor | None  # [domains, prompts * width]
    notes: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


class Loader(Packer):
    def __init__(self, config: XVLAConfig, source: MappedSource, arena: Arena, recipe: Recipe) -> None:
        super().__init__(source, arena)
        self.c, self.recipe = config, recipe

    def affine(self, name: str) -> tuple[Tensor, Tensor]:
        return self.vector(f"{name}.weight"), self.vector(f"{name}.bias")

    def linear(self, name: str, role: str) -> tuple[PackedMatrix, Tensor]:
        k = self.source.info(f"{name}.weight").shape[1]
        return self.matrix(name, [f"{name}.weight"], self.recipe.format(role, k)), self.vector(f"{name}.bias")

    def block(self, name: str, attention: str) -> Block:
        c = self.source.info(f"{name}.conv1.weight").shape[0]

        def taps(i: int) -> tuple[Tensor, Tensor]:
            weight = self.vector(f"{name}.conv{i}.weight", (9, c), lambda w: w.reshape(c, 9).T)
            return weight, self.vector(f"{name}.conv{i}.bias")

        return Block(
            *taps(1), *self.affine(f"{name}.norm1"), *self.linear(f"{name}.{attention}.qkv", "vision"),
            *self.linear(f"{name}.{attention}.proj", "vision"), *taps(2), *self.affine(f"{name}.norm2"),
            *self.linear(f"{name}.ffn.fc1", "vision"), *self.linear(f"{name}.ffn.fc2", "vision"),
        )  # fmt: skip

    def stage(self, s: int) -> Stage:
        v = self.c.vision
        conv = f"{VISION}convs.{s}.conv"
        columns = v.kernels[s] ** 2 * (v.dims[s - 1] if s else 3)
        pairs = [f"{VISION}blocks.{s}.{b}" for b in range(v.depths[s])]
        return Stage(
            self.matrix(conv, [f"{conv}.weight"], self.recipe.format("convolution", columns), width=columns,
                        fn=lambda w: w.transpose(0, 2, 3, 1)),
            self.vector(f"{conv}.bias"), *self.affine(f"{VISION}convs.{s}.norm"),
            [self.block(f"{p}.spatial_block", "window_attn") for p in pairs],
            [self.block(f"{p}.channel_block", "channel_attn") for p in pairs],
        )  # fmt: skip

    def encoder_layer(self, i: int) -> TowerLayer:
        """One BART layer; its norms lie behind the sums."""
        p = f"{LANGUAGE}encoder.layers.{i}"
        names = [f"{p}.self_attn.{w}_proj" for w in "qkv"]
        return TowerLayer(
            *self.affine(f"{p}.self_attn_layer_norm"),
            self.matrix(f"{p}.qkv", [f"{n}.weight" for n in names],
                        self.recipe.format("language", self.c.language.width)),
            self.stacked(f"{p}.qkv.bias", [f"{n}.bias" for n in names]),
            *self.linear(f"{p}.self_attn.out_proj", "language"), *self.affine(f"{p}.final_layer_norm"),
            *self.linear(f"{p}.fc1", "language"), *self.linear(f"{p}.fc2", "language"),
        )  # fmt: skip

    def policy_layer(self, i: int) -> TowerLayer:
        """Of the last block only actions have a query; the first is part of the prefix whole."""
        p, d = f"{POLICY}blocks.{i}", self.c.policy.width
        qkv, fmt = f"{p}.attn.qkv", self.recipe.format("policy", d)

        def rows(part: str, first: int, count: int) -> tuple[PackedMatrix, Tensor]:
            end, bias = first + count, f"{qkv}.bias"
            return (
                self.matrix(f"{qkv}.{part}", [f"{qkv}.weight"], fmt, fn=lambda w: w[first:end], rows=count),
                self.put(f"{bias}.{part}", (count,), lambda: self.value(bias)[first:end]),
            )

        split = 0 < i == self.c.policy.depth - 1
        weight, bias = rows("kv", d, 2 * d) if split else self.linear(qkv, "policy")
        query = rows("q", 0, d) if split else (None, None)
        return TowerLayer(
            *self.affine(f"{p}.norm1"), weight, bias, *self.linear(f"{p}.attn.proj", "policy"),
            *self.affine(f"{p}.norm2"), *self.linear(f"{p}.mlp.fc1", "policy"), *self.linear(f"{p}.mlp.fc2", "policy"),
            *query,
        )  # fmt: skip

    def per_domain(self, name: str, inputs: int, outputs: int) -> PerDomain:
        weight, n = f"{POLICY}{name}.fc.weight", self.c.num_domains
        fmt = self.recipe.dtype
        stack = PackedMatrix.empty(self.arena, weight, outputs, inputs, fmt, n)
        if not self.arena.dry:
            value = self.value(weight).reshape(n, inputs, outputs)
            for d in range(n):
                stack.fill(np.ascontiguousarray(value[d].T), index=d)
        one = PackedMatrix.empty(self.arena, f"{weight}.one", outputs, inputs, fmt)
        bias = self.arena.alloc(f"{POLICY}{name}.bias.one", (outputs,), "f32", "weights")
        return PerDomain(stack, self.vector(f"{POLICY}{name}.bias.weight"), one, bias)

    def projection(self, name: str) -> PerDomain | tuple[PackedMatrix, Tensor]:
        if self.c.hetero_proj:
            return self.per_domain(name, self.c.language.width, self.c.policy.width)
        return self.linear(f"{POLICY}{name}", "policy")

    def projected_positions(self) -> Tensor:
        """Positions and the frame embedding are added before a linear map: their image is a constant."""
        v, c = self.c.vision, self.c
        rows, columns = v.grids[-1]
        last = v.dims[-1]

        def make() -> np.ndarray:
            table = f"{PROJECTOR}image_position_embed."
            column = self.value(f"{table}column_embeddings.weight")[None, :columns].repeat(rows, 0)
            row = self.value(f"{table}row_embeddings.weight")[:rows, None].repeat(columns, 1)
            place = np.concatenate([column, row], -1).reshape(rows * columns, last).astype(np.float64)
            frame = np.zeros(last)
            frame[1 : last // 2 * 2 : 2] = 1  # the cosines of frame 0, where the file has no table
            if _TABLE in self.source.keys():  # noqa: SIM118
                frame = self.value(_TABLE)[0].astype(np.float64)
            return np.tile((place + frame) @ self.value(_PROJECTION).astype(np.float64).T, (c.num_views, 1))

        return self.put("projected_positions", (c.num_views * rows * columns, c.language.width), make)

    def load(self, batch: int, progress: bool) -> Weights:
        c, t, p = self.c, self.c.language, self.c.policy
        bar = tqdm(total=len(c.vision.dims) + t.depth + p.depth + 1, desc="loading", unit="part",
                   disable=not progress, delay=1.0, leave=False)  # fmt: skip

        def each(make: Any, count: int) -> list[Any]:
            out = []
            for i in range(count):
                out.append(make(i))
                bar.update()
            return out

        first, text = POSITION_OFFSET, c.vision.tokens + c.tokenizer_max_length
        positions, sequence = f"{LANGUAGE}encoder.embed_positions.weight", f"{POLICY}pos_emb"
        width = c.action_dim + c.proprio_dim + c.dim_time
        learned = (c.horizon + c.context, p.width)
        with bar:
            out = Weights(
                each(self.stage, len(c.vision.dims)),
                self.matrix(_PROJECTION, [_PROJECTION], self.recipe.format("vision", c.vision.dims[-1])),
                self.projected_positions(), *self.affine(f"{PROJECTOR}image_proj_norm"),
                self.table(_SHARED, self.recipe.table_dtype),
                self.put(positions, (text, t.width), lambda: self.value(positions)[first : first + text]),
                *self.affine(f"{LANGUAGE}encoder.layernorm_embedding"), each(self.encoder_layer, t.depth),
                self.projection("vlm_proj"), self.projection("aux_visual_proj"),
                self.put(sequence, learned, lambda: self.value(sequence)[0, : learned[0]]),
                self.put("action_positions", (batch * c.horizon, p.width),
                         lambda: np.tile(self.value(sequence)[0, : c.horizon], (batch, 1))),
                each(self.policy_layer, p.depth), *self.affine(f"{POLICY}norm"),
                self.per_domain("action_encoder", width, p.width),
                self.per_domain("action_decoder", p.width, c.action_dim),
                self.vector(f"{POLICY}soft_prompt_hub.weight") if c.len_soft_prompts else None,
                self.recipe.notes, self.source.skipped,
            )  # fmt: skip
            bar.update()
        return out


def load_weights(
    config: XVLAConfig, source: Source, arena: Arena, dtype: str, quant: str | None, batch: int, progress: bool = True
) -> Weights:
    """Checks every name and shape first, then packs.

    Raises: CheckpointError (missing, extra or misshapen tensors, unsupported dtype, NaN), InputError (quant, dtype).
    """
    recipe = Recipe(dtype, quant)
    return Loader(config, checked(config, source), arena, recipe).load(batch, progress)
