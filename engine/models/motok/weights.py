"""From the files of a MoTok checkpoint (layout.py) to packed weights.

Folded at load, all exact up to rounding: codes into the decoder's first convolution, the condition's embedding into its
last, token tables of the discrete planner, the embeddings of the sampled timesteps, and nearest upsampling with the
convolution behind it (every output frame sees two different input frames, not three).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np

from engine.blocks.transformer import TowerLayer
from engine.blocks.weights import Packer, Recipe
from engine.io.checkpoint import MappedSource, Source
from engine.models.motok.config import MoTokConfig
from engine.models.motok.layout import ar_blocks, checked, parts_of
from engine.ops.gemm import PackedMatrix
from engine.runtime.arena import Arena, Tensor


# ------------------------------------------------------------------------------------------------------ packed
@dataclass
class Linear:
    """A product and its bias; columns of a convolution lie tap after tap."""

    w: PackedMatrix
    bias: Tensor | None


@dataclass
class Affine:
    """Weight and bias of a layer norm."""

    weight: Tensor
    bias: Tensor


@dataclass
class Residual:
    """x + conv2(relu(conv1(relu(x)))), conv1 of three taps `dilation` apart."""

    conv1: Linear
    conv2: Linear
    dilation: int


@dataclass
class EncoderWeights:
    """Convolutions that halve time; per stage the halving one and its residual blocks."""

    first: Linear
    stages: list[tuple[Linear, list[Residual]]]
    last: Linear


@dataclass
class Doubling:
    """Nearest upsampling and the convolution behind it: frame 2i from frames i - 1 and i, 2i + 1 from i and i + 1."""

    even: Linear
    odd: Linear


@dataclass
class DecoderWeights:
    """Codes to the condition of every frame: table [K, 3, width] holds codes times the first convolution; `last` ends
    in the denoiser's embedding of the condition, without its bias."""

    table: Tensor
    bias: Tensor
    stages: list[tuple[list[Residual], Doubling]]
    hidden: Linear
    last: Linear


@dataclass
class Block:
    """One block of the denoiser; without a temporal convolution where its kernel is 0."""

    conv_norm: Affine | None
    conv: Linear | None
    norm: Affine
    fc1: Linear
    fc2: Linear


@dataclass
class DenoiserWeights:
    """times [S, width]: embedding of every sampled timestep, with the bias of the condition. modulation: shift, scale
    and gate of each block, then shift and scale of the last norm, one after another."""

    first: Linear
    times: Tensor
    modulation: Linear
    blocks: list[Block]
    last: Linear


@dataclass
class PlannerWeights:
    """tokens [K + 2, dim]; positions [N, dim]. head_in, head_norm: in front of the last product. Layers of the discrete
    planner have their norms behind the sums, those of the autoregressive one in front."""

    tokens: Tensor
    positions: Tensor
    condition: Linear
    layers: list[TowerLayer]
    head_in: Linear | None
    head_norm: Affine
    head: Linear
    trajectory: EncoderWeights


@dataclass
class TextWeights:
    tokens: Tensor
    positions: Tensor
    layers: list[TowerLayer]
    norm: Affine
    projection: PackedMatrix


@dataclass
class Weights:
    encoder: EncoderWeights
    codes: Tensor
    norms: Tensor
    decoder: DecoderWeights
    denoiser: DenoiserWeights
    ddm: PlannerWeights | None
    ar: PlannerWeights | None
    text: TextWeights | None
    mean: Tensor
    std: Tensor
    hint_mean: np.ndarray  # [3 * J], metres; read on the host
    hint_std: np.ndarray
    notes: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


def position_waves(rows: int, width: int) -> np.ndarray:
    """f32 [rows, width]: sines and cosines of positions in turn (Vaswani et al. 2017, section 3.5)."""
    angle = np.arange(rows)[:, None] * 10_000.0 ** (-np.arange(0, width, 2) / width)
    return np.stack([np.sin(angle), np.cos(angle)], -1).reshape(rows, width).astype(np.float32)


def _taps(w: np.ndarray) -> np.ndarray:
    """[out, in, taps] -> [out, taps * in]."""
    return w.transpose(0, 2, 1)


def _present(bias: Tensor | None) -> Tensor:
    assert bias is not None
    return bias


class Loader(Packer):
    """Packs a checked source; a role decides the format of its products."""

    def __init__(self, config: MoTokConfig, source: MappedSource, arena: Arena, recipe: Recipe) -> None:
        super().__init__(source, arena)
        self.c, self.recipe = config, recipe

    def format(self, role: str, k: int) -> str:
        # Codes are chosen in fp32 whatever the format: the same motion has the same tokens.
        return "f32" if role == "encoder" else self.recipe.format(role, k)

    def linear(self, name: str, role: str, bias: bool = True) -> Linear:
        shape = self.source.info(f"{name}.weight").shape
        if len(shape) == 3:
            return self.conv(name, role)
        w = self.matrix(name, [f"{name}.weight"], self.format(role, shape[1]))
        return Linear(w, self.vector(f"{name}.bias") if bias else None)

    def conv(self, name: str, role: str) -> Linear:
        _, channels, taps = self.source.info(f"{name}.weight").shape
        return Linear(self._made(name, f"{name}.weight", taps * channels, role, _taps), self.vector(f"{name}.bias"))

    def _made(
        self, name: str, tensor: str, width: int, role: str, fn: Callable[[np.ndarray], np.ndarray]
    ) -> PackedMatrix:
        rows = self.source.info(tensor).shape[0]
        return self.matrix(name, [tensor], self.format(role, width), fn=fn, width=width, rows=rows)

    def affine(self, name: str) -> Affine:
        return Affine(self.vector(f"{name}.weight"), self.vector(f"{name}.bias"))

    # ---- tokenizer
    def residuals(self, name: str, role: str) -> list[Residual]:
        c = self.c
        return [
            Residual(self.conv(f"{name}.model.{i}.conv1", role), self.conv(f"{name}.model.{i}.conv2", role),
                     c.dilation_growth ** (c.depth - 1 - i))
            for i in range(c.depth)
        ]  # fmt: skip

    def encoder(self, name: str, role: str) -> EncoderWeights:
        n = self.c.down_t
        return EncoderWeights(
            self.conv(f"{name}.model.0", role),
            [(self.conv(f"{name}.model.{i + 2}.0", role), self.residuals(f"{name}.model.{i + 2}.1", role))
             for i in range(n)],
            self.conv(f"{name}.model.{n + 2}", role),
        )  # fmt: skip

    def doubling(self, name: str) -> Doubling:
        weight, width = f"{name}.weight", 2 * self.c.width
        bias = self.vector(f"{name}.bias")

        def even(w: np.ndarray) -> np.ndarray:
            return _taps(np.stack([w[..., 0], w[..., 1] + w[..., 2]], -1))

        def odd(w: np.ndarray) -> np.ndarray:
            return _taps(np.stack([w[..., 0] + w[..., 1], w[..., 2]], -1))

        return Doubling(Linear(self._made(f"{name}.even", weight, width, "decoder", even), bias),
                        Linear(self._made(f"{name}.odd", weight, width, "decoder", odd), bias))  # fmt: skip

    def decoder(self) -> DecoderWeights:
        c, n = self.c, self.c.down_t

        def table() -> np.ndarray:
            codes, w = self.value("quantizer.codebook"), self.value("decoder.model.0.weight")
            return np.einsum("kd,odj->kjo", codes.astype(np.float64), w.astype(np.float64), optimize=True)

        tail = f"decoder.model.{n + 4}"

        def embedded(w: np.ndarray) -> np.ndarray:
            condition = self.value("denoiser.cond_embed.weight").astype(np.float64)
            return np.einsum("ol,lij->oji", condition, w.astype(np.float64), optimize=True)

        last = self.matrix("condition", [f"{tail}.weight"], self.format("decoder", 3 * c.width), fn=embedded,
                           width=3 * c.width, rows=c.denoiser.width)  # fmt: skip
        return DecoderWeights(
            self.put("decoder.table", (c.codes, 3, c.width), table), self.vector("decoder.model.0.bias"),
            [(self.residuals(f"decoder.model.{i + 2}.0", "decoder"), self.doubling(f"decoder.model.{i + 2}.2"))
             for i in range(n)],
            self.conv(f"decoder.model.{n + 2}", "decoder"), Linear(last, None),
        )  # fmt: skip

    def denoiser(self) -> DenoiserWeights:
        c, d = self.c, self.c.denoiser
        steps = c.diffusion.timesteps

        def times() -> np.ndarray:
            """TE(t) + b_c + W_c b, what does not depend on the frame; b: of the decoder's last convolution."""
            value = lambda name: self.value(name).astype(np.float64)  # noqa: E731
            p = "denoiser.time_embed.mlp"
            rate = 10_000.0 ** (-np.arange(d.t_embed // 2) / (d.t_embed // 2))
            angle = np.array(steps)[:, None] * rate
            h = np.concatenate([np.cos(angle), np.sin(angle)], -1) @ value(f"{p}.0.weight").T + value(f"{p}.0.bias")
            out = (h / (1 + np.exp(-h))) @ value(f"{p}.2.weight").T + value(f"{p}.2.bias")
            tail = value(f"decoder.model.{c.down_t + 4}.bias")
            return out + value("denoiser.cond_embed.bias") + value("denoiser.cond_embed.weight") @ tail

        names = [f"denoiser.blocks.{i}.mlp_block.adaLN_modulation.1" for i in range(d.blocks)]
        names.append("denoiser.final_layer.adaLN_modulation.1")
        modulation = self.matrix("modulation", [f"{n}.weight" for n in names], self.format("denoiser", d.width))
        return DenoiserWeights(
            self.linear("denoiser.input_proj", "denoiser"), self.put("times", (len(steps), d.width), times),
            Linear(modulation, self.stacked("modulation.bias", [f"{n}.bias" for n in names])),
            [self.block(f"denoiser.blocks.{i}") for i in range(d.blocks)],
            self.linear("denoiser.final_layer.linear", "denoiser"),
        )  # fmt: skip

    def block(self, name: str) -> Block:
        conv = bool(self.c.denoiser.kernel)
        return Block(
            self.affine(f"{name}.conv_norm") if conv else None, self.conv(f"{name}.conv", "denoiser") if conv else None,
            self.affine(f"{name}.mlp_block.in_ln"), self.linear(f"{name}.mlp_block.mlp.0", "denoiser"),
            self.linear(f"{name}.mlp_block.mlp.2", "denoiser"),
        )  # fmt: skip

    # ---- transformers
    def tower_layer(self, norm1: str, qkv: Linear, out: str, norm2: str, fc1: str, fc2: str, role: str) -> TowerLayer:
        first, second = self.affine(norm1), self.affine(norm2)
        products = (qkv, *(self.linear(name, role) for name in (out, fc1, fc2)))
        (q, qb), (o, ob), (up, upb), (down, downb) = ((x.w, _present(x.bias)) for x in products)
        return TowerLayer(first.weight, first.bias, q, qb, o, ob, second.weight, second.bias, up, upb, down, downb)

    def packed(self, name: str, role: str) -> Linear:
        weight = f"{name}.in_proj_weight"
        w = self.matrix(weight, [weight], self.format(role, self.source.info(weight).shape[1]))
        return Linear(w, self.vector(f"{name}.in_proj_bias"))

    def ddm(self) -> PlannerWeights:
        c, p = self.c, self.c.ddm

        def tokens() -> np.ndarray:
            w = self.value("ddm.input_process.poseEmbedding.weight").astype(np.float64)
            table = self.value("ddm.token_emb.weight").astype(np.float64)
            return table @ w.T + self.value("ddm.input_process.poseEmbedding.bias")

        def layer(i: int) -> TowerLayer:
            n = f"ddm.seqTransEncoder.layers.{i}"
            return self.tower_layer(f"{n}.norm1", self.packed(f"{n}.self_attn", "planner"), f"{n}.self_attn.out_proj",
                                    f"{n}.norm2", f"{n}.linear1", f"{n}.linear2", "planner")  # fmt: skip

        return PlannerWeights(
            self.put("ddm.tokens", (c.codes + 2, p.dim), tokens),
            self.put("ddm.positions", (c.max_tokens, p.dim), lambda: position_waves(c.max_tokens, p.dim)),
            self.linear("ddm.cond_emb", "planner"), [layer(i) for i in range(p.layers)],
            self.linear("ddm.output_process.dense", "planner"), self.affine("ddm.output_process.LayerNorm"),
            self.linear("ddm.output_process.poseFinal", "planner"),
            self.encoder("ddm.traj_encoder", "trajectory"),
        )  # fmt: skip

    def ar(self) -> PlannerWeights:
        c, a = self.c, self.c.ar

        def layer(n: str) -> TowerLayer:
            parts = [f"{n}.attn.{x}" for x in ("query", "key", "value")]
            qkv = self.matrix(f"{n}.qkv", [f"{x}.weight" for x in parts], self.format("planner", a.dim))
            bias = self.stacked(f"{n}.qkv.bias", [f"{x}.bias" for x in parts])
            return self.tower_layer(f"{n}.ln1", Linear(qkv, bias), f"{n}.attn.proj", f"{n}.ln2", f"{n}.mlp.0",
                                    f"{n}.mlp.2", "planner")  # fmt: skip

        return PlannerWeights(
            self.table("ar.trans_base.tok_emb.weight", "f32"),
            self.put("ar.positions", (a.block, a.dim), lambda: position_waves(a.block, a.dim)),
            self.linear("ar.trans_base.cond_emb", "planner"), [layer(name) for name in ar_blocks(c)], None,
            self.affine("ar.trans_head.ln_f"), self.linear("ar.trans_head.head", "planner", bias=False),
            self.encoder("ar.traj_encoder", "trajectory"),
        )  # fmt: skip

    # ---- text
    def text(self) -> TextWeights:
        t = self.c.clip

        def layer(i: int) -> TowerLayer:
            n = f"clip.transformer.resblocks.{i}"
            return self.tower_layer(f"{n}.ln_1", self.packed(f"{n}.attn", "text"), f"{n}.attn.out_proj", f"{n}.ln_2",
                                    f"{n}.mlp.c_fc", f"{n}.mlp.c_proj", "text")  # fmt: skip

        name = "clip.text_projection"
        return TextWeights(
            self.table("clip.token_embedding.weight", self.recipe.table_dtype),
            self.vector("clip.positional_embedding"), [layer(i) for i in range(t.layers)],
            self.affine("clip.ln_final"),
            self.matrix(name, [name], self.format("text", t.width), fn=lambda w: w.T, width=t.width, rows=t.embed),
        )  # fmt: skip

    def load(self, parts: Collection[str]) -> Weights:
        names = ("stats.hint_mean", "stats.hint_std")
        mean, std = (np.zeros(3 * self.c.joints) if self.arena.dry else self.value(n).astype(np.float64) for n in names)

        def norms() -> np.ndarray:
            return np.square(self.value("quantizer.codebook").astype(np.float64)).sum(1)

        return Weights(
            self.encoder("encoder", "encoder"), self.vector("quantizer.codebook"),
            self.put("codebook.norms", (self.c.codes,), norms), self.decoder(), self.denoiser(),
            self.ddm() if "ddm" in parts else None, self.ar() if "ar" in parts else None,
            self.text() if "clip" in parts else None, self.vector("stats.mean"), self.vector("stats.std"), mean, std,
            self.recipe.notes, self.source.skipped,
        )  # fmt: skip


def load_weights(config: MoTokConfig, source: Source, arena: Arena, dtype: str, quant: str | None) -> Weights:
    """Checks every name and shape first, then packs.

    Raises: CheckpointError (missing, extra or misshapen tensors, unsupported dtype, NaN), InputError (quant, dtype).
    """
    view = checked(config, source)
    return Loader(config, view, arena, Recipe(dtype, quant)).load(parts_of(view))
