"""What prompts become: Qwen2.5-VL's language part as a plan, ByT5's encoder, spans of names, limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _dreambooth import as_source
from _dreambooth import text_weights as weights
from _dreambooth import tokenizer as tiny_tokenizer
from torch import Tensor

from engine.blocks.qwen_language import LanguageConfig
from engine.blocks.qwen_reference import decoded
from engine.blocks.weights import Recipe
from engine.errors import CheckpointError, ConfigError, InputError
from engine.io.text import Tokenizer
from engine.models.dreambooth3d.glyphs import GlyphConfig, GlyphEncoder, buckets_of, canonical_glyphs, glyph_shapes
from engine.models.dreambooth3d.prompt import chat, read_prompt
from engine.models.dreambooth3d.text import (
    SKIPPED,
    PromptEncoder,
    TextLoader,
    canonical_text,
    text_config,
    text_shapes,
)
from engine.runtime.arena import Arena
from engine.runtime.plan import Plan

SMALL = LanguageConfig(32, 4, 4, 2, 8, 48, 300)


def tokenizer() -> Tokenizer:
    return Tokenizer(tiny_tokenizer())


class Tiny:
    def __init__(self, c: LanguageConfig = SMALL, *, dtype: str = "f32", chunk: int = 16, tokens: int = 64) -> None:
        self.w, self.arena, self.plans = weights(text_shapes(c)), Arena(), dict[str, Plan]()
        packed = TextLoader(canonical_text(as_source(self.w), c), self.arena, Recipe(dtype, None)).load(c)
        self.encoder = PromptEncoder(self.arena, c, packed, tokenizer(), self.plans, tokens=tokens, chunk=chunk,
                                     kv_format=dtype)  # fmt: skip


@pytest.mark.parametrize(
    "c",
    [SMALL, LanguageConfig(48, 3, 6, 3, 8, 40, 300, theta=1e4), LanguageConfig(32, 5, 2, 1, 16, 64, 300, eps=1e-5),
     LanguageConfig(24, 4, 3, 3, 8, 30, 300), LanguageConfig(64, 6, 8, 2, 8, 96, 270, sections=(1, 1, 2))],
    ids=lambda c: f"{c.width}x{c.layers}",
)  # fmt: skip
def test_states(c: LanguageConfig) -> None:
    """The whole chat through the plain layers, cut behind the last but two; prefixes of both kinds in turn."""
    tiny = Tiny(c)
    for kind in ("video", "image", "video"):
        for text in ("A mug.", "A mug on a desk, seen from afar"):
            got = tiny.encoder(read_prompt(text), kind).values
            ids = tokenizer().encode(chat(text, kind))
            x = tiny.w["model.embed_tokens.weight"][ids]
            want = decoded(tiny.w, c, x, layers=c.layers - SKIPPED)[-len(got) :]
            assert len(got) == len(text) + len(tokenizer().encode("<|im_end|>\n<|im_start|>assistant\n"))
            np.testing.assert_allclose(got, want.numpy(), atol=1e-5 * float(want.abs().max()))


def test_prefixes_and_results_are_kept() -> None:
    tiny, other = Tiny(), Tiny(chunk=200)
    one = tiny.encoder(read_prompt("A mug."))
    assert tiny.encoder(read_prompt("A mug.")) is one
    ran: list[int] = []
    replay = tiny.plans["prompt"].replay
    tiny.plans["prompt"].replay = lambda: (ran.append(1), replay())[1]  # type: ignore[method-assign]
    second = tiny.encoder(read_prompt("A plate.")).values
    assert len(ran) == -(-len(second) // 16)  # chunks of its own tokens alone
    np.testing.assert_allclose(second, other.encoder(read_prompt("A plate.")).values, atol=1e-6, rtol=1e-5)


def test_rounded_weights() -> None:
    got, want = (Tiny(dtype=d).encoder(read_prompt("A mug.")).values for d in ("bf16", "f32"))
    assert np.linalg.norm(got - want) <= 2e-2 * np.linalg.norm(want)


def test_names_are_marked() -> None:
    prompt = read_prompt("See a [red mug] here")
    states = Tiny().encoder(prompt)
    assert "".join(c for c, m in zip(prompt.text, states.marked) if m) == "red mug"
    assert len(states.marked) == len(states.values) and not any(states.marked[len(prompt.text) :])


def test_a_pass_is_static() -> None:
    tiny = Tiny()
    tiny.encoder(read_prompt("A mug."))
    audit = tiny.plans["prompt"].audit(tiny.arena, tiny.encoder.node_budget)
    assert audit.ok, audit.problems


def test_wrong_prompts() -> None:
    with pytest.raises(InputError, match="70 tokens; 64 is the limit"):
        Tiny().encoder(read_prompt("x" * 70))
    with pytest.raises(InputError, match="runs into the chat"):
        Tiny().encoder(read_prompt("a <|im_start|>user\n b"))


def test_layouts() -> None:
    """The language part alone, inside the whole model, and beside what is never read."""
    plain = weights(text_shapes(SMALL))
    more = plain | {"model.norm.weight": torch.ones(32), "lm_head.weight": torch.ones(300, 32),
                    "model.layers.3.mlp.up_proj.weight": torch.ones(48, 32), "visual.patch": torch.ones(1)}  # fmt: skip
    for prefix in ("model.", "model.language_model.", "language_model.", "language_model.model.", ""):
        renamed = {k.replace("model.", prefix, 1) if k.startswith("model.") else k: v for k, v in more.items()}
        view = canonical_text(as_source(renamed), SMALL)
        assert set(view.keys()) == set(plain)
    with pytest.raises(CheckpointError, match=r"layers\.1"):
        canonical_text(as_source({k: v for k, v in plain.items() if "layers.1.mlp.up" not in k}), SMALL)


def test_configurations() -> None:
    flat = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 48, "vocab_size": 300, "rope_theta": 1e6}  # fmt: skip
    assert text_config(flat) == text_config({"text_config": flat, "hidden_size": 1}) == SMALL
    for wrong in ([], flat | {"num_hidden_layers": 2}, flat | {"use_sliding_window": True}):
        with pytest.raises(ConfigError):
            text_config(wrong)


# ---- quoted texts ----------------------------------------------------------------------------------------------------


def glyph_reference(w: dict[str, Tensor], c: GlyphConfig, text: str) -> Tensor:
    """T5's encoder from its paper, in torch."""
    x = w["shared.weight"][[b + 3 for b in text.encode()] + [1]]
    n = len(x)
    bias = w["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    place = torch.arange(n)
    bias = bias[torch.from_numpy(buckets_of((place[None] - place[:, None]).numpy(), c))].permute(2, 0, 1)
    for i in range(c.layers):
        p = f"encoder.block.{i}.layer"
        h = torch.nn.functional.rms_norm(x, (c.width,), w[f"{p}.0.layer_norm.weight"], c.eps)
        q, k, v = (
            (h @ w[f"{p}.0.SelfAttention.{m}.weight"].T).unflatten(1, (c.heads, -1)).transpose(0, 1) for m in "qkv"
        )
        mixed = ((q @ k.transpose(1, 2) + bias).softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + mixed @ w[f"{p}.0.SelfAttention.o.weight"].T
        h = torch.nn.functional.rms_norm(x, (c.width,), w[f"{p}.1.layer_norm.weight"], c.eps)
        gate, up = (h @ w[f"{p}.1.DenseReluDense.wi_{j}.weight"].T for j in range(2))
        h = torch.nn.functional.gelu(gate, approximate="tanh") * up
        x = x + h @ w[f"{p}.1.DenseReluDense.wo.weight"].T
    return torch.nn.functional.rms_norm(x, (c.width,), w["encoder.final_layer_norm.weight"], c.eps)


@pytest.mark.parametrize("prefix", ["", "module.text_tower."])
@pytest.mark.parametrize("text", ['Text "OPEN". ', 'Text "été 東京". Text "2". ', "x" * 400])
def test_glyphs(prefix: str, text: str) -> None:
    c = GlyphConfig(24, 3, 2, 8, 40)
    w = weights(glyph_shapes(c))
    given = {prefix + k: v for k, v in w.items()} | ({"module.other": torch.ones(1)} if prefix else {})
    got = GlyphEncoder(c, canonical_glyphs(as_source(given), c))(text)
    want = glyph_reference(w, c, text.encode()[:255].decode("utf-8", "ignore"))
    np.testing.assert_allclose(got, want.numpy(), atol=1e-5 * float(want.abs().max()))


def test_glyph_configurations() -> None:
    assert GlyphConfig.from_json({}) == GlyphConfig()
    for wrong in ([], {"feed_forward_proj": "relu"}, {"vocab_size": 100}):
        with pytest.raises(ConfigError):
            GlyphConfig.from_json(wrong)
