"""Heads that tell which box a description means, on a language model that is no longer trained (ScanRefer's task)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from arms import Arm, Streams
from tokenizers import Tokenizer
from torch import Tensor
from words import HEAD, TAIL, pieces

from engine.blocks.qwen_language import LanguageConfig
from engine.blocks.qwen_reference import language
from engine.blocks.scene import Voxels
from engine.models.vega3d.reference import ground_scores, object_features, projector
from engine.models.vega3d.scene import TASKS
from engine.models.vega3d.weights import HEADS
from examples.tiny.fitting import train

Weights = dict[str, Tensor]
TEMPERATURE = 0.07  # of the contrast between boxes (InfoNCE)


def begin(width: int, generator: torch.Generator) -> Weights:
    out = {}
    for head in HEADS:
        for i in (0, 3):
            out[f"{head}.{i}.weight"] = torch.randn(width, width, generator=generator) * width**-0.5
            out[f"{head}.{i}.bias"] = torch.zeros(width)
        out[f"{head}.2.weight"], out[f"{head}.2.bias"] = torch.ones(width), torch.zeros(width)
    out["ground_head_zero_target"] = torch.randn(width, generator=generator)
    return out


def prompt_of(tok: Tokenizer, name: str) -> list[int]:
    """What follows the frames, up to `<ground>`."""
    return pieces(tok, "\n", TASKS["scanrefer"].format(description=f"The {name}."), *TAIL, "<ground>")


def objects_of(w: Weights, s: Streams, room: int, data: dict[str, Any], voxels: Voxels) -> Tensor:
    """[K, D] of a room's boxes."""
    members = torch.from_numpy(data["members"][room])
    encoded = projector(w, "model.mm_projector", s.semantic[room].float()).unflatten(0, (members.shape[1], -1))
    return object_features(encoded, members, torch.from_numpy(voxels.of(data["boxes"][room][:, :3])))


def train_heads(
    w: Weights, c: LanguageConfig, tok: Tokenizer, data: dict[str, Any], s: Streams, voxels: Voxels, steps: int,
    seed: int,
) -> Weights:  # fmt: skip
    """The heads, and the table of embeddings with a trained row for `<ground>`."""
    g = torch.Generator().manual_seed(seed)
    heads = begin(c.width, g)
    row = w["model.embed_tokens.weight"][tok.token_to_id("<ground>")].clone()
    for value in (*heads.values(), row):
        value.requires_grad_()
    arm = Arm("token_gated", w)

    def loss(step: int) -> Tensor:
        rooms = torch.randint(len(data["names"]), (16,), generator=g)
        asked = [int(torch.randint(len(data["names"][r]), (1,), generator=g)) for r in rooms]
        # Every name is as many tokens, so the prompts of a batch are equally long.
        ids = torch.tensor([prompt_of(tok, data["names"][r][k]) for r, k in zip(rooms, asked)])
        with torch.no_grad():
            head = F.embedding(torch.tensor(pieces(tok, *HEAD)), w["model.embed_tokens.weight"])
            text = F.embedding(ids[:, :-1], w["model.embed_tokens.weight"])
            x = torch.cat([head.expand(len(ids), -1, -1), arm.tokens(s, rooms), text], 1)
        x = torch.cat([x, row.expand(len(ids), 1, -1)], 1)
        with torch.autocast("cpu", torch.bfloat16):
            h = language(w, c, x)[:, -1].float()
        losses = []
        for r, k, query in zip(rooms, asked, h):
            # Somewhat often the box is not among those given.
            there, boxes = k, objects_of(w, s, int(r), data, voxels)
            if torch.rand((), generator=g) < 0.15:
                boxes, there = torch.cat([boxes[:k], boxes[k + 1 :]]), len(boxes) - 1
            scores = ground_scores(heads, boxes, query) / TEMPERATURE
            losses.append(F.cross_entropy(scores[None], torch.tensor([there])))
        return torch.stack(losses).mean()

    train("grounding heads", [*heads.values(), row], loss, steps, 2e-3)
    table = w["model.embed_tokens.weight"].clone()
    table[tok.token_to_id("<ground>")] = row.detach()
    return {k: v.detach() for k, v in heads.items()} | {"model.embed_tokens.weight": table}
