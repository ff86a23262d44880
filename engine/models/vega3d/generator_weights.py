"""From a checkpoint of the generator to packed, folded weights: only what reaches the features is kept.

What does not depend on the frame is worked out here, in fp64: the timestep's modulations go into the products behind
them, a text of one token becomes one gate per head.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from engine.blocks.diffusion import gelu_tanh, silu, time_sinusoid
from engine.blocks.weights import Packer, Recipe
from engine.errors import CheckpointError
from engine.io.checkpoint import MappedSource, Source, expect
from engine.io.mapped import Rule
from engine.models.vega3d.generator_config import DitConfig, Tap, VaeConfig
from engine.models.vega3d.schedule import noise_level, rotation_angles
from engine.ops.attention import KVCache, Pads
from engine.ops.gemm import PackedMatrix
from engine.runtime.arena import Arena, Tensor

_COMFY: list[Rule] = [("model.diffusion_model.", ""), ("generative_encoder.tower.model.", "")]
_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", r"to_out\.0": "o", "norm_q": "norm_q", "norm_k": "norm_k"}


def _dit_rules(keys: list[str]) -> list[Rule]:
    """diffusers' names to the original ones; norm2 and norm3 change places."""
    if not any("condition_embedder." in key for key in keys):
        return _COMFY
    embed = "condition_embedder."
    rules: list[Rule] = [
        (re.compile(rf"{embed}(text|time)_embedder\.linear_1\."), r"\1_embedding.0."),
        (re.compile(rf"{embed}(text|time)_embedder\.linear_2\."), r"\1_embedding.2."),
        (f"{embed}time_proj.", "time_projection.1."),
        (re.compile("scale_shift_table$"), "head.modulation"),
        ("proj_out.", "head.head."),
    ]
    parts = {r"scale_shift_table$": "modulation", r"norm2\.": "norm3.", r"ffn\.net\.0\.proj\.": "ffn.0.",
             r"ffn\.net\.2\.": "ffn.2.", r"proj_in\.": "before_proj.", r"proj_out\.": "after_proj."}  # fmt: skip
    for one, name in (("attn1", "self_attn"), ("attn2", "cross_attn")):
        parts |= {rf"{one}\.{theirs}\.": f"{name}.{ours}." for theirs, ours in _ATTENTION.items()}
    for theirs, ours in parts.items():
        rules.append((re.compile(rf"((?:vace_)?blocks\.\d+)\.{theirs}"), rf"\1.{ours}"))
    return rules


_VAE_UNUSED: list[Rule] = [(re.compile(r"decoder\.|conv2\.|post_quant_conv\.|.*time_conv\."), None)]
_BLOCK = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}


def _vae_rules(keys: list[str]) -> list[Rule]:
    if "encoder.conv_in.weight" not in keys:
        return _VAE_UNUSED
    rules = [*_VAE_UNUSED, ("encoder.conv_in.", "encoder.conv1."), ("quant_conv.", "conv1."),
             ("encoder.norm_out.", "encoder.head.0."), ("encoder.conv_out.", "encoder.head.2."),
             ("encoder.mid_block.attentions.0.", "encoder.middle.1.")]  # fmt: skip
    for theirs, ours in (*_BLOCK.items(), ("conv_shortcut", "shortcut")):
        rules.append((re.compile(rf"encoder\.down_blocks\.(\d+)\.{theirs}\."), rf"encoder.downsamples.\1.{ours}."))
        for i, at in ((0, 0), (1, 2)):
            rules.append((f"encoder.mid_block.resnets.{i}.{theirs}.", f"encoder.middle.{at}.{ours}."))
    rules.append(("encoder.down_blocks.", "encoder.downsamples."))
    return rules


def canonical_dit(source: Source) -> MappedSource:
    """The transformer under its original names; original files, diffusers' and ComfyUI's look the same behind it."""
    return MappedSource(source, _dit_rules(list(source.keys())))


def canonical_vae(source: Source) -> MappedSource:
    """The VAE's encoder under its original names; decoder and convolutions in time are `skipped`."""
    return MappedSource(source, _vae_rules(list(source.keys())))


# ------------------------------------------------------------------------------------------------------ shapes
def dit_shapes(c: DitConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the transformer under its original name."""
    d = c.dim
    out: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        out[f"{name}.weight"], out[f"{name}.bias"] = (rows, columns), (rows,)

    out["patch_embedding.weight"], out["patch_embedding.bias"] = (d, c.channels, 1, c.patch, c.patch), (d,)
    linear("text_embedding.0", d, c.text_dim)
    linear("text_embedding.2", d, d)
    linear("time_embedding.0", d, c.freq_dim)
    linear("time_embedding.2", d, d)
    linear("time_projection.1", 6 * d, d)
    linear("head.head", c.channels * c.patch * c.patch, d)
    out["head.modulation"] = (1, 2, d)
    names = [f"blocks.{i}" for i in range(c.layers)] + [f"vace_blocks.{i}" for i in range(len(c.vace_layers))]
    for name in names:
        out[f"{name}.modulation"] = (1, 6, d)
        out[f"{name}.norm3.weight"] = out[f"{name}.norm3.bias"] = (d,)
        for one in ("self_attn", "cross_attn"):
            for which in "qkvo":
                linear(f"{name}.{one}.{which}", d, d)
            out[f"{name}.{one}.norm_q.weight"] = out[f"{name}.{one}.norm_k.weight"] = (d,)
        linear(f"{name}.ffn.0", c.ffn, d)
        linear(f"{name}.ffn.2", d, c.ffn)
        if name.startswith("vace"):
            linear(f"{name}.after_proj", d, d)
    if c.vace_layers:
        linear("vace_blocks.0.before_proj", d, d)
        out["vace_patch_embedding.weight"] = (d, c.vace_channels, 1, c.patch, c.patch)
        out["vace_patch_embedding.bias"] = (d,)
    return out


@dataclass(frozen=True)
class Stage:
    """A part of the VAE's encoder. kind: block, down or attention; cin, cout: channels; level: halvings before it."""

    name: str
    kind: str
    cin: int
    cout: int
    level: int


def vae_stages(c: VaeConfig) -> list[Stage]:
    """Between the first convolution and the head, in order."""
    out: list[Stage] = []
    at, widths = c.widths[0], c.widths
    for i, width in enumerate(widths):
        for _ in range(c.blocks):
            out.append(Stage(f"encoder.downsamples.{len(out)}", "block", at, width, i))
            at = width
        if i + 1 < len(widths):
            out.append(Stage(f"encoder.downsamples.{len(out)}", "down", width, width, i))
    last = len(widths) - 1
    kinds = ("block", "attention", "block")
    return out + [Stage(f"encoder.middle.{i}", kind, at, at, last) for i, kind in enumerate(kinds)]


def vae_shapes(c: VaeConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the encoder that one frame needs, under its original name."""
    out: dict[str, tuple[int, ...]] = {}

    def conv(name: str, cout: int, cin: int, *kernel: int) -> None:
        out[f"{name}.weight"], out[f"{name}.bias"] = (cout, cin, *kernel), (cout,)

    conv("encoder.conv1", c.widths[0], 3, 3, 3, 3)
    for s in vae_stages(c):
        if s.kind == "block":
            out[f"{s.name}.residual.0.gamma"], out[f"{s.name}.residual.3.gamma"] = (s.cin, 1, 1, 1), (s.cout, 1, 1, 1)
            conv(f"{s.name}.residual.2", s.cout, s.cin, 3, 3, 3)
            conv(f"{s.name}.residual.6", s.cout, s.cout, 3, 3, 3)
            if s.cin != s.cout:
                conv(f"{s.name}.shortcut", s.cout, s.cin, 1, 1, 1)
        elif s.kind == "down":
            conv(f"{s.name}.resample.1", s.cout, s.cin, 3, 3)
        else:
            out[f"{s.name}.norm.gamma"] = (s.cin, 1, 1)
            conv(f"{s.name}.to_qkv", 3 * s.cin, s.cin, 1, 1)
            conv(f"{s.name}.proj", s.cin, s.cin, 1, 1)
    top = c.widths[-1]
    out["encoder.head.0.gamma"] = (top, 1, 1, 1)
    conv("encoder.head.2", 2 * c.z, top, 3, 3, 3)
    conv("conv1", 2 * c.z, 2 * c.z, 1, 1, 1)
    return out


# ------------------------------------------------------------------------------------------------------ packed
@dataclass
class Conv:
    """Weights [N, size * size * C], columns (ky, kx, c), and bias [N]."""

    w: PackedMatrix
    bias: Tensor


@dataclass
class VaeBlock:
    norm1: Tensor
    conv1: Conv
    norm2: Tensor
    conv2: Conv
    shortcut: Conv | None


@dataclass
class VaeAttention:
    norm: Tensor
    qkv: Conv
    out: Conv


@dataclass
class VaeWeights:
    """The encoder on one frame; `parts` as vae_stages lists them, a halving being its convolution. The head gives
    alpha / sigma * (mu - mean) / std."""

    first: Conv
    parts: list[VaeBlock | VaeAttention | Conv]
    norm: Tensor
    head: Conv


@dataclass
class OneToken:
    """A text of one token is a gate per head: see `gate_heads`."""

    dk: Tensor
    u: Tensor
    base: Tensor


@dataclass
class Tokens:
    """A longer text: keys and values [n, d] that the cache is to be filled with, those of padding, and what is around
    the attention to them. norm: of the query, the keys' weight in it."""

    cache: KVCache
    pads: Pads
    norm: Tensor
    out: PackedMatrix
    keys: np.ndarray
    values: np.ndarray


@dataclass
class DitBlock:
    """A block with the modulations of its timestep folded in, rotary pairs as halves of a head.

    apart: the matrix of the queries and its bias, where qkv holds keys and values alone. after: the product that makes
    a hint of this block's output.
    """

    qkv: PackedMatrix
    qkv_bias: Tensor
    norm_q: Tensor
    norm_k: Tensor
    out: PackedMatrix
    out_bias: Tensor
    query: PackedMatrix
    query_bias: Tensor
    text: OneToken | Tokens
    text_bias: Tensor | None
    fc1: PackedMatrix
    fc1_bias: Tensor
    fc2: PackedMatrix
    fc2_bias: Tensor
    apart: tuple[PackedMatrix, Tensor] | None = None
    after: tuple[PackedMatrix, Tensor] | None = None


@dataclass
class VaceWeights:
    """Hints by the block that they are added behind. Latents come in units of sigma, without noise.

    reference: from the patches of a frame in the first channels, as the projection in front of the first block gives
    them, with the bias of an empty mask; of a full one where that frame is black. frame: from the patches of the frame
    itself, no bias.
    """

    blocks: dict[int, DitBlock]
    reference: PackedMatrix
    reference_bias: Tensor
    black_bias: Tensor
    frame: PackedMatrix


@dataclass
class DitWeights:
    patch: PackedMatrix  # columns (y, x, channel), times sigma: latents are in its units
    patch_bias: Tensor
    rope: Tensor  # f32 [cells, head_dim]
    blocks: list[DitBlock]
    pads: int  # how often the padding key is seen
    text: int  # tokens of the prompt
    vace: VaceWeights | None = None


class VaeLoader(Packer):
    def __init__(self, c: VaeConfig, source: MappedSource, arena: Arena, recipe: Recipe) -> None:
        super().__init__(source, arena)
        self.c, self.recipe = c, recipe

    def conv(self, name: str) -> Conv:
        """A convolution; of one in time the tap that meets the only frame."""
        shape = self.source.info(f"{name}.weight").shape
        width = math.prod(shape[1:2] + shape[-2:])

        def columns(w: np.ndarray) -> np.ndarray:
            return (w[:, :, -1] if w.ndim == 5 else w).transpose(0, 2, 3, 1).reshape(w.shape[0], -1)

        format = self.recipe.format("vae", width)
        weight = self.matrix(name, [f"{name}.weight"], format, fn=columns, width=width, rows=shape[0])
        return Conv(weight, self.vector(f"{name}.bias"))

    def gamma(self, name: str) -> Tensor:
        return self.vector(f"{name}.gamma", (self.source.info(f"{name}.gamma").shape[0],))

    def part(self, s: Stage) -> VaeBlock | VaeAttention | Conv:
        if s.kind == "down":
            return self.conv(f"{s.name}.resample.1")
        if s.kind == "attention":
            return VaeAttention(
                self.gamma(f"{s.name}.norm"), self.conv(f"{s.name}.to_qkv"), self.conv(f"{s.name}.proj")
            )
        return VaeBlock(
            self.gamma(f"{s.name}.residual.0"), self.conv(f"{s.name}.residual.2"), self.gamma(f"{s.name}.residual.3"),
            self.conv(f"{s.name}.residual.6"), self.conv(f"{s.name}.shortcut") if s.cin != s.cout else None,
        )  # fmt: skip

    def load(self, tap: Tap) -> VaeWeights:
        c = self.c
        _, alpha, sigma = noise_level(tap.timestep, tap.shift)
        top, scale = c.widths[-1], alpha / sigma / np.asarray(c.std, np.float64)

        def fold() -> tuple[np.ndarray, np.ndarray]:
            """The head, the product behind it, and the normalisation as one convolution."""
            w = self.value("encoder.head.2.weight")[:, :, -1].astype(np.float64)
            b = self.value("encoder.head.2.bias").astype(np.float64)
            q = self.value("conv1.weight").reshape(2 * c.z, -1)[: c.z].astype(np.float64)
            qb = self.value("conv1.bias")[: c.z].astype(np.float64)
            folded = np.einsum("zo,oiyx->zyxi", q, w) * scale[:, None, None, None]
            return folded.reshape(c.z, -1), (q @ b + qb - np.asarray(c.mean)) * scale

        head = PackedMatrix.empty(self.arena, "encoder.head", c.z, 9 * top, self.recipe.dtype)
        weight, bias = fold() if not self.arena.dry else (None, None)
        if weight is not None and head.fill(weight.astype(np.float32)):
            raise CheckpointError("encoder.head.2 and conv1 of the VAE give values that are not finite")
        return VaeWeights(
            self.conv("encoder.conv1"), [self.part(s) for s in vae_stages(c)], self.gamma("encoder.head.0"),
            Conv(head, self.put("encoder.head.bias", (c.z,), lambda: bias)),  # type: ignore[arg-type, return-value]
        )  # fmt: skip


class DitLoader(Packer):
    def __init__(
        self, c: DitConfig, tap: Tap, source: MappedSource, arena: Arena, recipe: Recipe, kv_format: str = "f32"
    ) -> None:
        super().__init__(source, arena)
        self.c, self.tap, self.recipe, self.kv_format = c, tap, recipe, kv_format
        # Neighbouring channels are a pair; the kernels turn channel i and i + half.
        pairs = np.arange(c.head_dim).reshape(-1, 2).T.reshape(-1)
        self.order = (np.arange(c.heads)[:, None] * c.head_dim + pairs).reshape(-1)

    def exact(self, name: str) -> np.ndarray:
        return self.value(name).astype(np.float64)

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.exact(f"{name}.weight").T + self.exact(f"{name}.bias")

    def modulations(self) -> np.ndarray:
        """f64 [6, d] of the timestep."""
        timestep, _, _ = noise_level(self.tap.timestep, self.tap.shift)
        e = self.linear(
            "time_embedding.2", silu(self.linear("time_embedding.0", time_sinusoid(timestep, self.c.freq_dim)))
        )
        return self.linear("time_projection.1", silu(e)).reshape(6, self.c.dim)

    def context(self, prompt: np.ndarray) -> np.ndarray:
        """f64 [n + 1, d]: the prompt's tokens, and what a row of padding becomes."""
        rows = np.concatenate([prompt.astype(np.float64), np.zeros((1, self.c.text_dim))])
        return self.linear("text_embedding.2", gelu_tanh(self.linear("text_embedding.0", rows)))

    def fold(self, name: str, e0: np.ndarray, context: np.ndarray) -> dict[str, np.ndarray]:
        """Everything of a block that the plan reads, f64."""
        c, d = self.c, self.c.dim
        own, other = f"{name}.self_attn", f"{name}.cross_attn"
        sh1, sc1, g1, sh2, sc2, g2 = self.exact(f"{name}.modulation")[0] + e0
        weights, biases = [], []
        for which in "qkv":
            w, b = self.exact(f"{own}.{which}.weight"), self.exact(f"{own}.{which}.bias")
            order = slice(None) if which == "v" else self.order
            weights.append((w * (1 + sc1))[order])
            biases.append((w @ sh1 + b)[order])
        q, o = self.exact(f"{other}.q.weight"), self.exact(f"{other}.o.weight")
        keys, values = self.linear(f"{other}.k", context), self.linear(f"{other}.v", context)
        keys *= (np.square(keys).mean(1, keepdims=True) + c.eps) ** -0.5
        norms = self.exact(f"{other}.norm_k.weight") * self.exact(f"{other}.norm_q.weight")
        bias = self.exact(f"{other}.o.bias")
        if len(context) == 2:
            difference = (values[0] - values[1]).reshape(c.heads, -1)
            text = {"dk": (keys[0] - keys[1]) * norms * c.head_dim**-0.5, "base": o @ values[1] + bias,
                    "u": np.einsum("dhi,hi->hd", o.reshape(d, c.heads, -1), difference)}  # fmt: skip
        else:
            text = {"keys": keys[:-1], "values": values[:-1], "pad_k": keys[-1], "pad_v": values[-1],
                    "text_norm": norms, "text_out": o, "text_bias": bias}  # fmt: skip
        fc1, fc2 = self.exact(f"{name}.ffn.0.weight"), self.exact(f"{name}.ffn.2.weight")
        return {
            "qkv": np.concatenate(weights), "qkv_bias": np.concatenate(biases),
            "norm_q": self.exact(f"{own}.norm_q.weight")[self.order],
            "norm_k": self.exact(f"{own}.norm_k.weight")[self.order],
            "out": self.exact(f"{own}.o.weight") * g1[:, None], "out_bias": self.exact(f"{own}.o.bias") * g1,
            "query": q * self.exact(f"{name}.norm3.weight"),
            "query_bias": q @ self.exact(f"{name}.norm3.bias") + self.exact(f"{other}.q.bias"),
            "fc1": fc1 * (1 + sc2), "fc1_bias": fc1 @ sh2 + self.exact(f"{name}.ffn.0.bias"),
            "fc2": fc2 * g2[:, None], "fc2_bias": self.exact(f"{name}.ffn.2.bias") * g2,
        } | text  # fmt: skip

    def packed(self, label: str, n: int, k: int, value: np.ndarray | None) -> PackedMatrix:
        """A matrix [n, k] worked out here; None where the arena is dry."""
        out = PackedMatrix.empty(self.arena, label, n, k, self.recipe.format("generator", k))
        if value is not None and out.fill(value.astype(np.float32)):
            raise CheckpointError(f"{label} of the generator holds values that are not finite or too large")
        return out

    def block(self, name: str, e0: np.ndarray, context: np.ndarray) -> DitBlock:
        c, d, ffn = self.c, self.c.dim, self.c.ffn
        folded = {} if self.arena.dry else self.fold(name, e0, context)
        split = c.kind == "vace"  # half of the rows have queries alone

        def matrix(part: str, n: int, k: int, rows: slice = slice(None), at: str = "") -> PackedMatrix:
            return self.packed(f"{name}.{at or part}", n, k, folded[part][rows] if folded else None)

        def vector(part: str, *shape: int, rows: slice = slice(None), at: str = "") -> Tensor:
            return self.put(f"{name}.{at or part}", shape, lambda: folded[part][rows])

        kv = slice(d if split else 0, None)
        own = {"rows": slice(0, d), "at": "own"}
        after = None
        if name.startswith("vace"):
            scale = self.tap.context_scale
            weight, bias = (None, None) if self.arena.dry else (
                self.exact(f"{name}.after_proj.{part}") * scale for part in ("weight", "bias"))  # fmt: skip
            after = (self.packed(f"{name}.after", d, d, weight), self.put(f"{name}.after_bias", (d,), lambda: bias))  # type: ignore[arg-type, return-value]
        text: OneToken | Tokens
        if len(context) == 2:
            text = OneToken(vector("dk", d), vector("u", c.heads, d), vector("base", d))
        else:
            n, zero = len(context) - 1, np.zeros((0, d))
            cache = KVCache.empty(self.arena, f"{name}.text", c.heads, c.head_dim, -(-n // 16) * 16, self.kv_format)
            count = self.arena.alloc(f"{name}.pads", (1,), "i32", "weights")
            if not self.arena.dry:
                count.write(np.array([c.text_len - n], np.int32))
            text = Tokens(cache, Pads(vector("pad_k", d), vector("pad_v", d), count), vector("text_norm", d),
                          matrix("text_out", d, d), folded.get("keys", zero), folded.get("values", zero))  # fmt: skip
        return DitBlock(
            matrix("qkv", (2 if split else 3) * d, d, kv), vector("qkv_bias", (2 if split else 3) * d, rows=kv),
            vector("norm_q", d), vector("norm_k", d), matrix("out", d, d), vector("out_bias", d),
            matrix("query", d, d), vector("query_bias", d), text,
            None if len(context) == 2 else vector("text_bias", d), matrix("fc1", ffn, d), vector("fc1_bias", ffn),
            matrix("fc2", d, ffn), vector("fc2_bias", d),
            (matrix("qkv", d, d, **own), vector("qkv_bias", d, rows=slice(0, d), at="own_bias")) if split else None,  # type: ignore[arg-type]
            after,
        )  # fmt: skip

    def vace(self, blocks: dict[int, DitBlock]) -> VaceWeights:
        """What is around the blocks of hints, with the projection in front of the first one folded into the patches."""
        c, z, d = self.c, self.c.channels, self.c.dim
        _, alpha, sigma = noise_level(self.tap.timestep, self.tap.shift)
        parts: dict[str, np.ndarray] = {}
        if not self.arena.dry:
            before, bias = self.exact("vace_blocks.0.before_proj.weight"), self.exact("vace_blocks.0.before_proj.bias")
            w = self.exact("vace_patch_embedding.weight")[:, :, 0].transpose(0, 2, 3, 1)
            empty = before @ self.exact("vace_patch_embedding.bias") + bias
            parts = {"reference": before @ w[..., :z].reshape(d, -1) * (sigma / alpha), "reference_bias": empty,
                     "black_bias": empty + before @ w[..., 2 * z :].sum((1, 2, 3)),
                     "frame": before @ w[..., z : 2 * z].reshape(d, -1) * (sigma / alpha)}  # fmt: skip
        width = z * c.patch**2

        def matrix(part: str) -> PackedMatrix:
            return self.packed(f"vace.{part}", d, width, parts.get(part))

        return VaceWeights(
            blocks, matrix("reference"), self.put("vace.reference_bias", (d,), lambda: parts["reference_bias"]),
            self.put("vace.black_bias", (d,), lambda: parts["black_bias"]), matrix("frame"),
        )  # fmt: skip

    def load(self, prompt: np.ndarray, rows: int, columns: int) -> Iterator[DitWeights | None]:
        """Yields None after each block, then the weights. prompt f32 [n, text_dim]."""
        c = self.c
        dry = self.arena.dry
        e0 = np.zeros((6, c.dim)) if dry else self.modulations()
        context = np.zeros((len(prompt) + 1, c.dim)) if dry else self.context(prompt)
        blocks, hints = [], {}
        for i in range(self.tap.block + 1):
            blocks.append(self.block(f"blocks.{i}", e0, context))
            if i in c.vace_layers:
                hints[i] = self.block(f"vace_blocks.{c.vace_layers.index(i)}", e0, context)
            yield None
        angles, sigma = rotation_angles(rows, columns, c.head_dim), noise_level(self.tap.timestep, self.tap.shift)[2]
        name = "patch_embedding.weight"
        yield DitWeights(
            self.matrix("patch_embedding", [name], self.recipe.dtype, width=c.channels * c.patch**2, rows=c.dim,
                        fn=lambda w: w[:, :, 0].transpose(0, 2, 3, 1) * sigma),
            self.vector("patch_embedding.bias"),
            self.put("rope", (rows * columns, c.head_dim), lambda: np.concatenate([np.cos(angles), np.sin(angles)], 1)),
            blocks, c.text_len - len(prompt), len(prompt), self.vace(hints) if c.kind == "vace" else None,
        )  # fmt: skip


def checked(view: MappedSource, shapes: dict[str, tuple[int, ...]]) -> MappedSource:
    """The view, once every tensor is there in its shape and no other is.

    Raises:
        CheckpointError: lists the first misshapen, missing and unknown tensors.
    """
    expect(view, shapes)
    return view
