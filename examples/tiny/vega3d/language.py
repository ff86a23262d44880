"""The language model (Qwen2) in batches: many questions about a room share its visual tokens, as a scene's do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from questions import KINDS, Question
from tokenizers import Tokenizer
from torch import Tensor
from words import HEAD, chat, pieces

from engine.models.vega3d.config import LanguageConfig
from engine.models.vega3d.reference import heads_of, rotate
from engine.models.vega3d.weights import language_shapes

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


def hidden(w: Weights, c: LanguageConfig, x: Tensor, places: Tensor, mask: Tensor) -> Tensor:
    """Embeddings [B, L, D] at places [L] under a mask bool [L, L] (what each row sees) to [B, L, D]."""
    turn = c.theta ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
    angle = places.double()[:, None] * turn
    share = c.heads // c.kv_heads

    def norm(name: str, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], w[name], c.eps)

    for i in range(c.layers):
        p = f"model.layers.{i}"
        h = norm(f"{p}.input_layernorm.weight", x)
        q, k, v = (heads_of(F.linear(h, w[f"{p}.self_attn.{n}_proj.weight"], w[f"{p}.self_attn.{n}_proj.bias"]), m)
                   for n, m in (("q", c.heads), ("k", c.kv_heads), ("v", c.kv_heads)))  # fmt: skip
        k, v = rotate(k, angle).repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        mixed = F.scaled_dot_product_attention(rotate(q, angle), k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = x + F.linear(mixed, w[f"{p}.self_attn.o_proj.weight"])
        h = norm(f"{p}.post_attention_layernorm.weight", x)
        h = F.silu(F.linear(h, w[f"{p}.mlp.gate_proj.weight"])) * F.linear(h, w[f"{p}.mlp.up_proj.weight"])
        x = x + F.linear(h, w[f"{p}.mlp.down_proj.weight"])
    return norm("model.norm.weight", x)


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
    -100; places, mask: see `hidden`."""

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
        self.w, self.c, self.tok = w, c, tok
        self.head = torch.tensor(pieces(tok, *HEAD))
        self.prefix = len(self.head) + visual

    def logits(self, tokens: Tensor, batch: Batch) -> Tensor:
        """[B, K, Q, vocab] of visual tokens [B, visual, D]."""
        table, (b, k, q) = self.w["model.embed_tokens.weight"], batch.ids.shape
        text = F.embedding(batch.ids.flatten(1), table)
        head = F.embedding(self.head, table).expand(b, -1, -1)
        with torch.autocast("cpu", torch.bfloat16):
            h = hidden(self.w, self.c, torch.cat([head, tokens, text], 1), batch.places, batch.mask)
            return F.linear(h[:, self.prefix :], table).unflatten(1, (k, q))

    def loss(self, tokens: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(self.logits(tokens, batch).float().flatten(0, 2), batch.target.flatten())

    @torch.no_grad()
    def right(self, tokens: Tensor, batch: Batch) -> Tensor:
        """bool [B, K]: whether the whole answer is the most probable one, token by token."""
        told = self.logits(tokens, batch).argmax(-1)
        return ((told == batch.target) | (batch.target < 0)).all(-1)


def accuracy(
    reader: Reader, rooms: Sequence[Asked], tokens: Callable[[np.ndarray], Tensor], per: int = 16
) -> dict[str, tuple[int, int]]:
    """(right, asked) by kind of every question of the rooms."""
    out: dict[str, tuple[int, int]] = {}
    for start in range(0, len(rooms), per):
        at = np.arange(start, min(start + per, len(rooms)))
        most = max(len(rooms[i].ids) for i in at)
        # Questions are asked again where a room has fewer; only the first time counts.
        chosen = [np.arange(most) % len(rooms[i].ids) for i in at]
        right = reader.right(tokens(at), Batch.of([(rooms[i], c) for i, c in zip(at, chosen)], reader.prefix))
        for i, row in zip(at, right.tolist()):
            for kind, good in zip(rooms[i].kinds, row):
                have = out.get(kind, (0, 0))
                out[kind] = have[0] + good, have[1] + 1
    return out
