"""States of quoted texts from ByT5's encoder (Xue et al. 2022), fine-tuned on glyphs (Liu et al. 2024).

A few dozen bytes once per prompt, and only where a prompt quotes something: numpy in fp32, its matrices read when they
are needed and kept nowhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.blocks.diffusion import gelu_tanh
from engine.blocks.weights import Packer
from engine.errors import ConfigError
from engine.io.checkpoint import MappedSource, Source, expect
from engine.io.values import choice, integer, number, show
from engine.runtime.arena import Arena

OFFSET, END = 3, 1  # ids of bytes begin here; what closes a text
MAX_BYTES = 256


@dataclass(frozen=True)
class GlyphConfig:
    """A T5 encoder. buckets, distance: of relative positions, whose share of the scores every layer has in common."""

    width: int = 1472
    layers: int = 12
    heads: int = 6
    head_dim: int = 64
    mlp: int = 3584
    vocab: int = 384
    buckets: int = 32
    distance: int = 128
    eps: float = 1e-6

    @staticmethod
    def from_json(value: Any) -> GlyphConfig:
        """config.json of transformers; ConfigError names what does not fit."""
        if not isinstance(value, dict):
            raise ConfigError(f"text_encoder_2: {show(value)} is not a JSON object")
        choice("feed_forward_proj", value.get("feed_forward_proj", "gated-gelu"), ("gated-gelu",))
        d = GlyphConfig()

        def read(key: str, default: int, low: int = 1) -> int:
            return integer(key, value.get(key, default), low, 1 << 20)

        return GlyphConfig(
            read("d_model", d.width), read("num_layers", d.layers), read("num_heads", d.heads),
            read("d_kv", d.head_dim), read("d_ff", d.mlp), read("vocab_size", d.vocab, OFFSET + 256),
            read("relative_attention_num_buckets", d.buckets, 4),
            read("relative_attention_max_distance", d.distance, 2),
            number("layer_norm_epsilon", value.get("layer_norm_epsilon", d.eps), 0.0, 1.0),
        )  # fmt: skip


def glyph_shapes(c: GlyphConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that is read, under transformers' names."""
    inner = c.heads * c.head_dim
    out: dict[str, tuple[int, ...]] = {
        "shared.weight": (c.vocab, c.width),
        "encoder.final_layer_norm.weight": (c.width,),
    }
    for i in range(c.layers):
        p, q = (f"encoder.block.{i}.layer.{j}" for j in range(2))
        for name in "qkv":
            out[f"{p}.SelfAttention.{name}.weight"] = (inner, c.width)
        out[f"{p}.SelfAttention.o.weight"] = (c.width, inner)
        for name in ("wi_0", "wi_1"):
            out[f"{q}.DenseReluDense.{name}.weight"] = (c.mlp, c.width)
        out[f"{q}.DenseReluDense.wo.weight"] = (c.width, c.mlp)
        out[f"{p}.layer_norm.weight"] = out[f"{q}.layer_norm.weight"] = (c.width,)
    out["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (c.buckets, c.heads)
    return out


def canonical_glyphs(source: Source, c: GlyphConfig) -> MappedSource:
    """The encoder under transformers' names, also where a converted file of Glyph-SDXL-v2 has them behind its own.

    Raises: CheckpointError (missing or misshapen tensors).
    """
    twice = any(key.endswith("shared.weight") for key in source.keys())  # noqa: SIM118  the table may have two names
    view = MappedSource(source, [
        (re.compile(r".*encoder\.embed_tokens\.weight$"), None if twice else "shared.weight"),
        (re.compile(r"(?:module\.)?text_tower\.(?=encoder\.|shared\.)"), ""),
        (re.compile(r"(?!(?:module\.)?(?:text_tower\.)?(?:encoder|shared)\.)"), None),
    ])  # fmt: skip
    expect(view, glyph_shapes(c))
    return view


def buckets_of(distances: np.ndarray, c: GlyphConfig) -> np.ndarray:
    """Bucket of key place less query place: half of them for either side, of which half are single places, the rest
    grow with the logarithm."""
    half = c.buckets // 2
    exact, away = half // 2, np.abs(distances)
    far = exact + np.log(np.maximum(away, 1) / exact) / np.log(c.distance / exact) * (half - exact)
    return np.where(distances > 0, half, 0) + np.where(away < exact, away, np.minimum(far.astype(np.int64), half - 1))


class GlyphEncoder(Packer):
    """`encoder(text)`: f32 [n, width] of a text's bytes and its end, at most MAX_BYTES of them."""

    def __init__(self, c: GlyphConfig, source: MappedSource) -> None:
        super().__init__(source, Arena(dry=True))
        self.c = c

    def __call__(self, text: str) -> np.ndarray:
        c = self.c
        ids = [*(b + OFFSET for b in text.encode("utf-8")[: MAX_BYTES - 1]), END]
        n = len(ids)
        x = self.value("shared.weight")[ids]
        places = np.arange(n)
        table = self.value("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        bias = table[buckets_of(places[None] - places[:, None], c)].transpose(2, 0, 1)
        for i in range(c.layers):
            p, q = (f"encoder.block.{i}.layer.{j}" for j in range(2))
            h = self._rms(x, f"{p}.layer_norm")
            query, key, value = (
                (h @ self.value(f"{p}.SelfAttention.{m}.weight").T).reshape(n, c.heads, c.head_dim).transpose(1, 0, 2)
                for m in "qkv"
            )
            scores = query @ key.transpose(0, 2, 1) + bias  # not scaled: the model was made so
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = (scores / scores.sum(-1, keepdims=True)) @ value
            x = x + mixed.transpose(1, 0, 2).reshape(n, -1) @ self.value(f"{p}.SelfAttention.o.weight").T
            h = self._rms(x, f"{q}.layer_norm")
            gate, up = (h @ self.value(f"{q}.DenseReluDense.wi_{j}.weight").T for j in range(2))
            x = x + (gelu_tanh(gate) * up) @ self.value(f"{q}.DenseReluDense.wo.weight").T
        return self._rms(x, "encoder.final_layer_norm")

    def _rms(self, x: np.ndarray, name: str) -> np.ndarray:
        scale = np.sqrt(np.square(x).mean(-1, keepdims=True, dtype=np.float32) + np.float32(self.c.eps))
        return x / scale * self.value(f"{name}.weight")
