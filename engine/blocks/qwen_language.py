"""Qwen2 (Qwen team 2024) as language part of larger models: configuration, tensors and packed decoder layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.blocks.decoder import DecoderLayer
from engine.blocks.weights import Packer, Recipe
from engine.errors import ConfigError
from engine.io.checkpoint import MappedSource
from engine.io.values import flag, integer, number, show, token_ids
from engine.ops.gemm import PackedMatrix
from engine.runtime.arena import Arena

# Every size: allowed range and default (of the published 7B model; None: needed).
_SIZES: dict[str, tuple[int, int, int | None]] = {
    "hidden_size": (8, 1 << 14, None),
    "num_hidden_layers": (1, 1024, None),
    "num_attention_heads": (1, 1 << 10, None),
    "num_key_value_heads": (1, 1 << 10, None),
    "intermediate_size": (1, 1 << 17, None),
    "vocab_size": (1, 1 << 22, None),
    "max_position_embeddings": (16, 1 << 24, 32768),
}


@dataclass(frozen=True)
class LanguageConfig:
    """Qwen2. eos: ids that end an answer. sections: rotary pairs that turn by time, row and column (mRoPE)."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    eps: float = 1e-6
    theta: float = 1e6
    positions: int = 32768
    tied: bool = False
    eos: tuple[int, ...] = ()
    sections: tuple[int, int, int] | None = None

    @staticmethod
    def from_json(o: dict[str, Any]) -> LanguageConfig:
        """From transformers' keys; ConfigError names what does not fit."""
        sizes = {}
        for key, (low, high, default) in _SIZES.items():
            if key not in o and default is None:
                raise ConfigError(f"config.json has no {key}")
            sizes[key] = integer(key, o.get(key, default), low, high)
        width, heads, kv = sizes["hidden_size"], sizes["num_attention_heads"], sizes["num_key_value_heads"]
        head_dim = integer("head_dim", o["head_dim"], 2, 4096) if o.get("head_dim") else width // heads
        if heads % kv or head_dim % 2 or (not o.get("head_dim") and width % heads):
            raise ConfigError(
                f"{width} channels, {heads} heads, {kv} kv heads: kv heads must divide heads, heads the channels, and "
                "a head be even"
            )
        if o.get("use_sliding_window"):
            raise ConfigError("use_sliding_window is set; only full attention is supported")
        if o.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"hidden_act = {show(o['hidden_act'])}; only 'silu' is supported")
        rope = o.get("rope_parameters") or {}
        theta = o.get("rope_theta", rope.get("rope_theta", 10000.0) if isinstance(rope, dict) else 10000.0)
        vocab = sizes["vocab_size"]
        scaling = o.get("rope_scaling") or rope
        sections = scaling.get("mrope_section") if isinstance(scaling, dict) else None
        if sections is not None:
            if not isinstance(sections, list) or len(sections) != 3 or not all(type(n) is int for n in sections):
                raise ConfigError(f"mrope_section = {show(sections)}; three counts are needed")
            if min(sections) < 0 or 2 * sum(sections) != head_dim:
                raise ConfigError(f"mrope_section = {show(sections)}; half of head_dim {head_dim} is their sum")
            sections = tuple(sections)
        return LanguageConfig(
            width, sizes["num_hidden_layers"], heads, kv, head_dim, sizes["intermediate_size"], vocab,
            number("rms_norm_eps", o.get("rms_norm_eps", 1e-6), 0.0, 1.0), number("rope_theta", theta, 1.0, 1e12),
            sizes["max_position_embeddings"], flag("tie_word_embeddings", o.get("tie_word_embeddings", False)),
            token_ids("eos_token_id", o.get("eos_token_id"), vocab), sections,
        )  # fmt: skip


def language_shapes(c: LanguageConfig) -> dict[str, tuple[int, ...]]:
    """Tensors of the language model (Qwen2) and their shapes."""
    d, q, kv = c.width, c.heads * c.head_dim, c.kv_heads * c.head_dim
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab, d), "model.norm.weight": (d,)}
    if not c.tied:
        out["lm_head.weight"] = (c.vocab, d)
    for i in range(c.layers):
        p = f"model.layers.{i}"
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            out[f"{p}.self_attn.{name}_proj.weight"] = (rows, d)
            out[f"{p}.self_attn.{name}_proj.bias"] = (rows,)
        out[f"{p}.self_attn.o_proj.weight"] = (d, q)
        out[f"{p}.mlp.gate_proj.weight"] = out[f"{p}.mlp.up_proj.weight"] = (c.mlp, d)
        out[f"{p}.mlp.down_proj.weight"] = (d, c.mlp)
        out[f"{p}.input_layernorm.weight"] = out[f"{p}.post_attention_layernorm.weight"] = (d,)
    return out


class QwenPacker(Packer):
    """A loader that packs decoder layers under transformers' names."""

    def __init__(self, source: MappedSource, arena: Arena, recipe: Recipe) -> None:
        super().__init__(source, arena)
        self.recipe = recipe

    def layer(self, i: int, c: LanguageConfig) -> DecoderLayer:
        """Decoder layer i of the language model."""
        p = f"model.layers.{i}"

        def product(name: str, parts: list[str], k: int) -> PackedMatrix:
            return self.matrix(f"{p}.{name}", [f"{p}.{n}.weight" for n in parts], self.recipe.format("language", k))

        qkv = [f"self_attn.{w}_proj" for w in "qkv"]
        return DecoderLayer(
            product("qkv", qkv, c.width), product("o_proj", ["self_attn.o_proj"], c.heads * c.head_dim),
            product("gate_up", ["mlp.gate_proj", "mlp.up_proj"], c.width), product("down", ["mlp.down_proj"], c.mlp),
            self.vector(f"{p}.input_layernorm.weight"), self.vector(f"{p}.post_attention_layernorm.weight"),
            self.stacked(f"{p}.qkv.bias", [f"{p}.{n}.bias" for n in qkv]),
        )  # fmt: skip
