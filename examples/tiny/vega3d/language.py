"""The language model (Qwen2) in batches: many questions about a room share its visual tokens, as a scene's do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from questions import KINDS, Question
from tokenizers import Tokenizer
from torch import Tensor
from words import HEAD, chat, pieces

from engine.blocks.qwen_language import LanguageConfig, language_shapes
from engine.blocks.qwen_reference import language, text_angles

Weights = dict[str, Tensor]
ASKED = 8  # questions of a room in a step
#: How often a kind is asked, as a share.
SHARES = dict(zip(KINDS, (0.23, 0.25, 0.17, 0.15, 0.08, 0.12)))


def begin(c: LanguageConfig, generator: torch.Generator) -> Weights:
    """Weights to train: matrices by their fan-in, what is added to the stream smaller the deeper the model."""
    out = {}
    for name, shape in language_shapes(c).items():
        if "norm" in name:
            value = torch.ones(shape)
        elif len(shape) == 1:
            value = torch.zeros(shape)
        else:
            value = torch.randn(shape, generator=generator) * shape[1] ** -0.5
            if "o_proj" in name or "down_proj" in name:
                value *= (2 * c.layers) ** -0.5
        out[name] = value.requires_grad_()
    return out


# ---- questions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """Questions of a room: kinds, ids of what follows the frames, and how many of each are the answer."""

    kinds: list[str]
    ids: list[list[int]]
    answers: list[int]

    @staticmethod
    def of(tok: Tokenizer, questions: Sequence[Question]) -> Asked:
        pairs = [chat(tok, q) for q in questions]
        return Asked([q.kind for q in questions], [p[0] for p in pairs], [p[1] for p in pairs])

    def chosen(self, rng: np.random.Generator) -> np.ndarray:
        """ASKED of them, kinds in their shares."""
        weight = np.array([SHARES[k] / self.kinds.count(k) for k in self.kinds])
        return rng.choice(len(weight), ASKED, p=weight / weight.sum())


@dataclass(frozen=True)
class Batch:
    """ids [B, K, Q] with zeros behind each question; target [B, K, Q]: the next id where it is part of an answer, else
    -100; places [L] in the text, mask bool [L, L] of what each place sees."""

    ids: Tensor
    target: Tensor
    places: Tensor
    mask: Tensor

    @staticmethod
    def of(rooms: Sequence[tuple[Asked, np.ndarray]], prefix: int) -> Batch:
        count = len(rooms[0][1])
        longest = max(len(asked.ids[i]) for asked, chosen in rooms for i in chosen)
        ids = np.zeros((len(rooms), count, longest), np.int64)
        target = np.full_like(ids, -100)
        for row, goal, (asked, chosen) in zip(ids, target, rooms):
            for j, i in enumerate(chosen):
                n, answer = len(asked.ids[i]), asked.answers[i]
                row[j, :n] = asked.ids[i]
                goal[j, n - answer - 1 : n - 1] = asked.ids[i][n - answer :]
        total = prefix + count * longest
        at = torch.arange(total)
        owner = torch.where(at < prefix, -1, (at - prefix) // longest)
        places = torch.where(at < prefix, at, prefix + (at - prefix) % longest)
        mask = (places[:, None] >= places) & ((owner == -1) | (owner == owner[:, None]))
        return Batch(torch.from_numpy(ids), torch.from_numpy(target), places, mask)


class Reader:
    """A language model with what every question begins with. visual: rows that a room has."""

    def __init__(self, w: Weights, c: LanguageConfig, tok: Tokenizer, visual: int) -> None:
        self.w, self.c = w, c
        self.head = torch.tensor(pieces(tok, *HEAD))
        self.prefix = len(self.head) + visual

    def logits(self, tokens: Tensor, batch: Batch) -> Tensor:
        """[B, K, Q, vocab] of visual tokens [B, visual, D]."""
        table, (b, k, q) = self.w["model.embed_tokens.weight"], batch.ids.shape
        text = F.embedding(batch.ids.flatten(1), table)
        head = F.embedding(self.head, table).expand(b, -1, -1)
        with torch.autocast("cpu", torch.bfloat16):
            angle = text_angles(self.c, batch.places)
            h = language(self.w, self.c, torch.cat([head, tokens, text], 1), angle, batch.mask)
            return F.linear(h[:, self.prefix :], table).unflatten(1, (k, q))

    def loss(self, tokens: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(self.logits(tokens, batch).float().flatten(0, 2), batch.target.flatten())

    @torch.no_grad()
    def right(self, tokens: Tensor, batch: Batch) -> Tensor:
        """bool [B, K]: whether the whole answer is the most probable one, token by token."""
        told = self.logits(tokens, batch).argmax(-1)
        return ((told == batch.target) | (batch.target < 0)).all(-1)
