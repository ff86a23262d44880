"""Trains vega3d-tiny from nothing: VAE, generator, semantic tower, language model, fusion, grounding heads.

./run train vega3d                  # two quiet cores: see the README for the time
./run train vega3d --arms           # also the arms that the README compares
python examples/tiny/vega3d/train.py --out FOLDER --scale 0.02    # a quick try

What every stage trains is kept in --work and not made again; delete the folder to begin anew.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import language
import towers
from arms import ARMS, Arm, Streams, examine, lines
from cells import SIDE, WIDTH, Cells, described
from files import write
from grounding import train_heads
from language import Asked, Batch, Reader
from questions import SPATIAL, exam, interval
from room_data import sample
from rooms import COLOURS, FRAMES, HIGH, LOW, SHAPES
from tokenizers import Tokenizer
from words import vocabulary

from engine.blocks.qwen_language import LanguageConfig
from engine.blocks.scene import Voxels, average_coordinates, patches_in_boxes, world_coordinates
from examples.tiny.fitting import kept

Weights = dict[str, Tensor]
ROOT = Path(__file__).resolve().parents[3]
SEED, ROOMS, HELD_OUT, EACH = 0, 6000, 700, 250
STEPS = {"vae": 400, "generator": 1500, "eyes": 1200, "language": 2200, "align": 1000, "questions": 400, "heads": 300}
VOXELS = Voxels(tuple(LOW), tuple(HIGH), 0.1)


def language_config(vocab: int) -> LanguageConfig:
    return LanguageConfig(128, 4, 4, 2, 32, 384, vocab, theta=1e4, tied=True)


# ---- data -----------------------------------------------------------------------------------------------------------


def one_room(held_out: bool, index: int) -> dict[str, Any]:
    """What training keeps of a room."""
    s = sample(SEED, held_out, index)
    v = s.scene
    colour, shape = towers.names_of(v.which, np.array([list(COLOURS).index(o.colour) for o in v.room.solids]),
                                    np.array([SHAPES.index(o.shape) for o in v.room.solids]))  # fmt: skip
    size = v.rgb.shape[1]
    coords = world_coordinates(v.depth, v.intrinsics, v.poses, size=(size, size))
    voxels = VOXELS.of(average_coordinates(coords, (SIDE, SIDE), size // SIDE))
    return {"rgb": v.rgb, "colour": colour, "shape": shape, "cells": Cells.of(v), "questions": s.questions,
            "voxels": voxels.reshape(-1, 3).astype(np.int16), "boxes": v.boxes,
            "members": patches_in_boxes(coords, v.boxes, (SIDE, SIDE), size // SIDE).reshape(len(v.boxes), FRAMES, -1),
            "names": [o.name for o in v.room.solids]}  # fmt: skip


def draw(held_out: bool, count: int) -> dict[str, Any]:
    """Pictures [N, S, S, 3], names of their pixels [N, S, S], and of every room the rest."""
    with ProcessPoolExecutor(torch.get_num_threads()) as pool:
        made = list(pool.map(partial(one_room, held_out), range(count), chunksize=32))
    joined = {k: torch.from_numpy(np.concatenate([r[k] for r in made])) for k in ("rgb", "colour", "shape")}
    cells = [torch.from_numpy(np.stack([getattr(r["cells"], k) for r in made]))
             for k in ("colour", "shape", "across", "far")]  # fmt: skip
    rest = {k: [r[k] for r in made] for k in ("questions", "boxes", "members", "names")}
    return joined | rest | {"cells": cells, "voxels": torch.from_numpy(np.stack([r["voxels"] for r in made]))}


# ---- stages ---------------------------------------------------------------------------------------------------------


def train_language(tok: Tokenizer, rooms: list[Asked], cells: list[Tensor], steps: int) -> Weights:
    """The language model on rooms that are told to it, with the `table` of what visual tokens should tell and a
    `newline`."""
    c, g = language_config(tok.get_vocab_size()), torch.Generator().manual_seed(SEED)
    w = language.begin(c, g)
    table = (torch.randn(WIDTH, c.width, generator=g) * c.width**-0.5).requires_grad_()
    newline = (torch.randn(c.width, generator=g) * c.width**-0.5).requires_grad_()
    reader = Reader(w, c, tok, FRAMES * SIDE * (SIDE + 1))
    rng = np.random.default_rng(SEED)

    def loss(step: int) -> Tensor:
        at = rng.integers(0, len(rooms), 16)
        batch = Batch.of([(rooms[i], rooms[i].chosen(rng)) for i in at], reader.prefix)
        told = described(*(part[torch.from_numpy(at)] for part in cells)) @ table
        return reader.loss(lines(told, newline), batch)

    towers.train("language model", [*w.values(), table, newline], loss, steps, 2e-3)
    return {k: v.detach() for k, v in (w | {"table": table, "newline": newline}).items()}


def train_arm(
    name: str, tok: Tokenizer, told: Weights, data: dict[str, Any], s: Streams, test: dict[str, Any],
    held_out: Streams, steps: Callable[[str], int], papers: list[np.ndarray],
) -> tuple[Weights, dict[str, Any]]:  # fmt: skip
    """An arm's weights, and what it answered to the exam: (kind, whether right) by question."""
    c = language_config(tok.get_vocab_size())
    w = {k: v.clone().requires_grad_() for k, v in told.items() if k not in ("table", "newline")}
    reader = Reader(w, c, tok, FRAMES * SIDE * (SIDE + 1))
    arm = Arm.begin(name, c.width, told["newline"], SEED)
    target = described(*data["cells"]) @ told["table"]
    arm.align(s, target, 1.0 + 4.0 * (data["cells"][0] > 0), steps("align"), SEED)
    arm.tune(reader, s, [Asked.of(tok, q) for q in data["questions"]], steps("questions"), SEED)
    answers = examine(arm, reader, held_out, [Asked.of(tok, q) for q in test["questions"]], papers)
    return {k: v.detach() for k, v in (w | arm.w).items()}, {"answers": answers}


def report(arms: dict[str, list[tuple[str, bool]]]) -> dict[str, Any]:
    """Of every arm's answers shares by kind and in all, with their intervals; prints them."""
    out: dict[str, Any] = {}
    for name, answers in arms.items():
        right, asked = sum(good for _, good in answers), len(answers)
        kinds = {k: np.mean([good for kind, good in answers if kind == k]).item() for k in SPATIAL}
        out[name] = {"right": right, "asked": asked, "interval": interval(right, asked), "kinds": kinds}
        low, high = out[name]["interval"]
        print(f"{name:12} {100 * right / asked:5.1f} % [{100 * low:.1f}, {100 * high:.1f}] of {asked}  "
              + "  ".join(f"{k} {100 * v:.1f}" for k, v in kinds.items()), flush=True)  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "engine/zoo/vega3d-tiny")
    parser.add_argument("--work", type=Path, default=ROOT / "build/vega3d-tiny")
    parser.add_argument("--arms", action="store_true", help="train and compare every arm")
    parser.add_argument("--scale", type=float, default=1.0, help="share of all steps and rooms, for a try")
    args = parser.parse_args()
    if not 0 < args.scale <= 1:
        parser.error("--scale must be in (0, 1]")
    args.work.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    def steps(name: str) -> int:
        return max(2, round(STEPS[name] * args.scale))

    each = max(2, round(EACH * args.scale))
    data, test = draw(False, max(96, round(ROOMS * args.scale))), draw(True, max(64, round(HELD_OUT * args.scale)))
    print(f"== rooms: {time.perf_counter() - start:.0f} s", flush=True)
    tok = vocabulary(f"{q.text} {q.answer}" for asked in data["questions"][:500] for q in asked)
    rooms = [Asked.of(tok, q) for q in data["questions"]]
    vae_w, about = kept(args.work, "vae", lambda: towers.train_vae(data["rgb"], steps("vae"), SEED))
    vae = replace(towers.VAE, mean=tuple(about["mean"]), std=tuple(about["std"]))
    prompt = torch.randn(1, towers.DIT.text_dim, generator=torch.Generator().manual_seed(SEED))
    latents = [towers.encode(vae_w, vae, d["rgb"]) for d in (data, test)]
    dit_w, _ = kept(args.work, "generator",
                    lambda: (towers.train_generator(latents[0], prompt, steps("generator"), SEED), {}))  # fmt: skip
    named = data["rgb"], data["colour"], data["shape"]
    eyes_w, _ = kept(args.work, "semantic", lambda: (towers.train_eyes(*named, steps("eyes"), SEED), {}))

    def streams(d: dict[str, Any], z: Tensor) -> Streams:
        return Streams(towers.rooms(towers.semantic(eyes_w, d["rgb"])),
                       towers.rooms(towers.generative(dit_w, z, prompt, SEED)), d["voxels"])  # fmt: skip

    seen, unseen = (streams(d, z) for d, z in zip((data, test), latents))
    told, _ = kept(args.work, "language", lambda: (train_language(tok, rooms, data["cells"], steps("language")), {}))
    papers = exam([[q.kind for q in asked] for asked in test["questions"]], each)
    answers, weights = {}, {}
    for name in ARMS if args.arms else ("token_gated",):
        make = partial(train_arm, name, tok, told, data, seen, test, unseen, steps, papers)
        made, about = kept(args.work, f"arm-{name}", make)
        answers[name] = about["answers"]
        weights = made if name == "token_gated" else weights
    (args.work / "arms.json").write_text(json.dumps(report(answers), indent=2) + "\n")
    c = language_config(tok.get_vocab_size())
    heads, _ = kept(args.work, "heads",
                    lambda: (train_heads(weights, c, tok, data, seen, VOXELS, steps("heads"), SEED), {}))  # fmt: skip
    write(args.out, c, tok, weights | eyes_w | heads, (vae, vae_w), dit_w, prompt, VOXELS)
    print(f"{args.out}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
