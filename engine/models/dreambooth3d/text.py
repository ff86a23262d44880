"""States of prompts from Qwen2.5-VL's language part (Bai et al. 2025), cut behind its last layer but two.

prompt   a chunk of tokens through the layers

What stands in front of every prompt is run once per kind of chat, and its keys and values stay; layers whose output
nobody reads are never loaded. Positions are those of a text, so mRoPE is plain RoPE.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.blocks.decoder import NODES_PER_LAYER, DecoderBuffers, DecoderLayer, decoder_layer
from engine.blocks.lru import Lru
from engine.blocks.qwen_language import LanguageConfig, QwenPacker, language_shapes
from engine.errors import ConfigError, InputError
from engine.io.checkpoint import MappedSource, Source, expect
from engine.io.text import Tokenizer
from engine.io.values import show
from engine.models.dreambooth3d.prompt import MARK, Prompt, chat
from engine.ops import attention as attention_op
from engine.ops import gemm as gemm_op
from engine.ops.attention import KVCache, rope_table
from engine.ops.gather import gather
from engine.runtime.arena import Arena, Tensor
from engine.runtime.plan import Plan, capture

SKIPPED = 2  # layers behind the one whose output is read, as the transformer was trained
MAX_TOKENS = 1000  # of a prompt
FRAME = 512  # tokens that a chat may put around a prompt; the released ones put 113
STATE_CACHE = 256 << 20


def text_config(value: Any) -> LanguageConfig:
    """config.json of the language part alone or of the whole model; ConfigError names what does not fit."""
    if not isinstance(value, dict):
        raise ConfigError(f"text_encoder: {show(value)} is not a JSON object")
    inner = value.get("text_config")
    c = LanguageConfig.from_json(value | inner if isinstance(inner, dict) else value)
    if c.layers <= SKIPPED:
        raise ConfigError(f"text_encoder: {c.layers} layers; the output of the last but {SKIPPED} is read")
    return c


def text_shapes(c: LanguageConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that is read, under transformers' names."""
    kept = replace(c, layers=c.layers - SKIPPED, tied=True)
    return {k: v for k, v in language_shapes(kept).items() if k != "model.norm.weight"}


def canonical_text(source: Source, c: LanguageConfig) -> MappedSource:
    """The language part under transformers' names, whichever model it is part of; the rest is left out.

    Raises: CheckpointError (missing or misshapen tensors).
    """
    last = "|".join(str(c.layers - 1 - i) for i in range(SKIPPED))
    start = r"(?:model\.language_model\.|language_model\.model\.|language_model\.|model\.|)"
    view = MappedSource(source, [
        (re.compile(rf"{start}(?:norm\.|layers\.(?:{last})\.)|lm_head\.|.*visual\.|.*rotary_emb\.inv_freq$"), None),
        (re.compile(rf"{start}(?=embed_tokens\.|layers\.)"), "model."),
    ])  # fmt: skip
    expect(view, text_shapes(c))
    return view


@dataclass(frozen=True)
class TextWeights:
    embed: Tensor
    layers: list[DecoderLayer]


class TextLoader(QwenPacker):
    def load(self, c: LanguageConfig) -> TextWeights:
        embed = self.table("model.embed_tokens.weight", self.recipe.table_dtype)
        return TextWeights(embed, [self.layer(i, c) for i in range(c.layers - SKIPPED)])


@dataclass(frozen=True)
class States:
    """Of a prompt's tokens and of the few that close its turn. values f32 [n, D]; marked: whether each belongs to a
    name in brackets."""

    values: np.ndarray
    marked: tuple[bool, ...]


class PromptEncoder:
    """Prompts of up to `tokens` tokens, `chunk` of them a pass."""

    def __init__(
        self, arena: Arena, c: LanguageConfig, w: TextWeights, tokenizer: Tokenizer | None, plans: dict[str, Plan], *,
        tokens: int = MAX_TOKENS, chunk: int = 128, kv_format: str = "f32",
    ) -> None:  # fmt: skip
        self.c, self._w, self._tokenizer, self._plans = c, w, tokenizer, plans
        self.tokens, self.chunk = tokens, chunk
        ctx = -(-(tokens + FRAME) // 16) * 16
        sizes = [gemm_op.workspace_bytes(chunk, max(c.width, c.mlp, c.heads * c.head_dim)),
                 attention_op.workspace_bytes(chunk, c.heads, c.head_dim, ctx)]  # fmt: skip
        ws = arena.alloc("text.ws", (max(sizes),), "u8")
        widths = DecoderBuffers.widths(c.width, c.heads, c.kv_heads, c.head_dim, c.mlp)
        self._b = DecoderBuffers(**{k: arena.alloc(f"text.{k}", (chunk, n)) for k, n in widths.items()}, ws=ws)
        self._caches = [KVCache.empty(arena, f"text.kv.{i}", c.kv_heads, c.head_dim, ctx, kv_format)
                        for i in range(len(w.layers))]  # fmt: skip
        self._ids, self._rows, self._pos = (
            arena.alloc(f"text.{n}", (size,), "i32", "io") for n, size in (("ids", chunk), ("rows", 1), ("pos", 1))
        )
        self._rope = arena.alloc("text.rope", (ctx, c.head_dim), "f32", "weights")
        if not arena.dry:
            self._rope.write(rope_table(np.arange(ctx), c.head_dim, c.theta))
        self._prefix: list[int] = []  # whose keys and values are there
        self._states = Lru[States](STATE_CACHE)

    def step(self) -> None:
        """What the plan of a chunk records."""
        gather(self._w.embed, self._ids, self._b.x, rows=self._rows, label="embed")
        for i, layer in enumerate(self._w.layers):
            decoder_layer(layer, self._b, self._caches[i], self._pos, heads=self.c.heads, eps=self.c.eps,
                          rope=self._rope, rows=self._rows, label=f"text.{i}")  # fmt: skip

    @property
    def node_budget(self) -> int:
        return 1 + NODES_PER_LAYER * len(self._w.layers)

    def __call__(self, prompt: Prompt, kind: str = "video") -> States:
        """States of a prompt. kind: 'video' to generate, 'image' to personalise.

        Raises: InputError (too many tokens, a text that runs into its frame, no tokenizer).
        """
        key = f"{kind}|{prompt.spans}|{prompt.text}"
        if (found := self._states.get(key)) is None:
            prefix, own = self.split(prompt.text, kind)
            values = self.run(prefix, own)
            marks = prompt.marked(self._tokenizer.offsets(prompt.text)) if prompt.spans and self._tokenizer else []
            found = States(values, tuple(marks[: len(own)]) + (False,) * (len(own) - len(marks)))
            self._states.put(key, found, values.nbytes)
        return found

    def split(self, text: str, kind: str) -> tuple[list[int], list[int]]:
        """Token ids in front of a prompt, and of the prompt with what closes its turn."""
        if self._tokenizer is None:
            raise InputError("there is no tokenizer.json for the text encoder; add it to the tokenizer's folder")
        ids, mark = self._tokenizer.encode(chat(text, kind)), self._tokenizer.encode(MARK)
        ends = [i + len(mark) for i in range(len(ids)) if ids[i : i + len(mark)] == mark]
        if not ends or len(ends) > 1:
            raise InputError(
                f"prompt {show(text)} runs into the chat around it; leave out leading line breaks and special tokens"
            )
        closing = len(self._tokenizer.encode(chat("", kind))) - ends[0] - len(self._tokenizer.encode(" "))
        count = len(ids) - ends[0] - closing
        if count > self.tokens or len(ids) > self._rope.shape[0]:
            raise InputError(f"the prompt has {count} tokens; {self.tokens} is the limit: shorten it")
        return ids[: ends[0]], ids[ends[0] :]

    def run(self, prefix: list[int], own: list[int]) -> np.ndarray:
        """f32 [len(own), D] behind a prefix, which is run where it is not the last one's."""
        if prefix != self._prefix:
            self._prefix = []
            self._chunks(prefix, 0)
            self._prefix = list(prefix)
        return np.concatenate(self._chunks(own, len(prefix)))

    def _chunks(self, ids: list[int], at: int) -> list[np.ndarray]:
        if "prompt" not in self._plans:
            self._plans["prompt"] = capture(self.step, "prompt")
        out = []
        for first in range(0, len(ids), self.chunk):
            part = ids[first : first + self.chunk]
            self._ids.slice(0, (len(part),)).write(np.array(part, np.int32))
            self._rows.write(np.array([len(part)], np.int32))
            self._pos.write(np.array([at + first], np.int32))
            self._plans["prompt"].replay()
            out.append(self._b.x.rows(0, len(part)).read())
        return out
