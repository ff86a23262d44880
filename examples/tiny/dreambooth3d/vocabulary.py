"""The tokenizer, a language model of the captions, and its states as the engine reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from clips import captions
from tokenizers import Tokenizer
from torch import Tensor

from engine.blocks.qwen_language import LanguageConfig, language_shapes
from engine.blocks.qwen_reference import decoded, language
from engine.models.dreambooth3d.prompt import MARK, chat
from engine.models.dreambooth3d.text import SKIPPED
from examples.tiny.fitting import train
from examples.tiny.tokens import train_tokenizer

Weights = dict[str, Tensor]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB = 512
LANGUAGE = LanguageConfig(64, 3, 4, 2, 16, 96, VOCAB, positions=1024, tied=True)


def tokenizer() -> Tokenizer:
    chats = [chat("", kind) for kind in ("video", "image")] * 40
    return train_tokenizer([*captions(), *chats, *["rhs"] * 40], SPECIAL, VOCAB)


def split(tok: Tokenizer, prompt: str, kind: str) -> tuple[list[int], int]:
    """Ids of a chat, and how many stand in front of the prompt."""
    ids, mark = (tok.encode(text, add_special_tokens=False).ids for text in (chat(prompt, kind), MARK))
    first = next(i for i in range(len(ids)) if ids[i : i + len(mark)] == mark)
    return ids, first + len(mark)


def train_language(tok: Tokenizer, steps: int, seed: int) -> Weights:
    """Reads captions in their chats, next token by next token."""
    g = torch.Generator().manual_seed(seed)
    w = {}
    for name, shape in language_shapes(LANGUAGE).items():
        norm = len(shape) == 1 and name.endswith("weight")
        w[name] = torch.ones(shape) if norm else torch.randn(shape, generator=g) * shape[-1] ** -0.5
        if len(shape) == 1 and not norm:
            w[name].zero_()
        w[name].requires_grad_()
    texts = captions()

    def loss(step: int) -> Tensor:
        kind = ("video", "image")[step % 2]
        found: list[list[int]] = []
        while len(found) < 16:  # as many tokens as the first
            ids, _ = split(tok, texts[int(torch.randint(len(texts), (1,), generator=g))], kind)
            if not found or len(ids) == len(found[0]):
                found.append(ids)
        ids = torch.tensor(found)
        h = language(w, LANGUAGE, F.embedding(ids[:, :-1], w["model.embed_tokens.weight"]))
        logits = F.linear(h, w["model.embed_tokens.weight"])
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    train("language model", w.values(), loss, steps, 2e-3)
    return {k: v.detach() for k, v in w.items()}


@torch.no_grad()
def states(w: Weights, tok: Tokenizer, prompts: Sequence[str], kind: str) -> list[Tensor]:
    """Of each prompt, f32 [n, D] behind the layer that the transformer reads."""
    out = []
    for prompt in prompts:
        ids, first = split(tok, prompt, kind)
        x = F.embedding(torch.tensor(ids), w["model.embed_tokens.weight"])
        out.append(decoded(w, LANGUAGE, x, layers=LANGUAGE.layers - SKIPPED)[first:])
    return out
