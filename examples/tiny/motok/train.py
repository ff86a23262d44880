"""Trains motok-tiny from nothing: tokenizer with its diffusion decoder, then both planners and the text tower.

./run train motok                 # two quiet cores: see the README for the time
python examples/tiny/motok/train.py --out FOLDER --tokenizer 200 --planners 200    # a quick try

Gu et al. 2026 (arXiv 2603.19227), sections 3.2, 3.3 and 4.1, at small sizes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from synthesise import Clip, clips

from engine.blocks.motion import HUMANML3D, FeatureStatistics, recover_joints
from engine.io.checkpoint import f32_to_bf16, save
from engine.io.text.clip import FILE, ClipTokenizer
from engine.models.motok.config import MoTokConfig
from engine.models.motok.planner_reference import hint
from engine.models.motok.reference import MoTokReference
from engine.models.motok.schedule import alpha_bars

ROOT = Path(__file__).resolve().parents[3]
SEED, CLIPS = 0, 8000
CROP, COMMIT, DECAY = 64, 0.02, 0.99
ROOT_WEIGHT = 12.0
MERGES = 180
POOL = (0, 10, 11, 15, 20, 21)  # joints that waypoints are given for: pelvis, feet, head, wrists
DERIVED = ("position_enc.pe", "pos_embed.embed")  # what a loader makes from the sizes
CONFIG = {
    "dataset": "humanml3d", "width": 64, "depth": 2, "latent": 96, "codes": 256,
    "denoiser": {"blocks": 4, "width": 128, "kernel": 5, "t_embed": 64},
    "ddm": {"dim": 128, "layers": 4, "heads": 4, "ff": 192, "code_dim": 96},
    "ar": {"dim": 96, "layers_base": 3, "heads": 6, "ff": 192},
    "clip": {"width": 96, "layers": 2, "heads": 6, "ctx": 32, "ff": 192, "embed": 96},
}  # fmt: skip


# ---- words ----------------------------------------------------------------------------------------------------------


def merges_of(texts: list[str], count: int) -> list[tuple[str, str]]:
    """The pairs that byte-pair encoding joins first (Sennrich et al. 2016); the words are ASCII letters and commas."""
    words = Counter(word for text in texts for word in text.replace(",", " , ").split())
    split = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    out: list[tuple[str, str]] = []
    while len(out) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, n in words.items():
            for pair in zip(split[word], split[word][1:]):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))
        out.append(best)
        for parts in split.values():
            i = 0
            while i + 1 < len(parts):
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = ["".join(best)]
                i += 1
    return out


def write_words(folder: Path, texts: list[str]) -> ClipTokenizer:
    lines = ["#version: motok-tiny", *(" ".join(pair) for pair in merges_of(texts, MERGES)), ""]
    (folder / FILE).write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
    return ClipTokenizer.from_folder(folder)


# ---- data -----------------------------------------------------------------------------------------------------------


def statistics_of(data: list[Clip]) -> FeatureStatistics:
    """Means of every feature, one deviation per group of them, as the data set has it."""
    rows = np.concatenate([c.features for c in data]).astype(np.float64)
    std, spread = np.empty(rows.shape[1]), rows.std(0)
    for group in HUMANML3D.layout:
        std[group] = max(float(spread[group].mean()), 1e-3)
    joints = np.concatenate([recover_joints(c.features) for c in data[::8]])
    return FeatureStatistics(rows.mean(0), std, joints.mean(0), np.maximum(joints.std(0), 0.05))


@dataclass
class Data:
    """Clips by length: features [n, T, D] normalised, joints [n, T, J, 3] metres, text ids [n, ctx]."""

    features: dict[int, Tensor]
    joints: dict[int, Tensor]
    texts: dict[int, Tensor]

    @staticmethod
    def of(data: list[Clip], stats: FeatureStatistics, words: ClipTokenizer, ctx: int) -> Data:
        by: dict[int, list[Clip]] = {}
        for clip in data:
            by.setdefault(len(clip.features), []).append(clip)

        def text(clip: Clip) -> np.ndarray:
            ids = words.encode(clip.text, ctx)
            return np.array(ids + [0] * (ctx - len(ids)))

        def stacked(make, kind) -> dict[int, Tensor]:
            return {n: torch.from_numpy(np.stack([make(c) for c in group]).astype(kind)) for n, group in by.items()}

        return Data(stacked(lambda c: stats.normalize(c.features), np.float32),
                    stacked(lambda c: recover_joints(c.features), np.float32), stacked(text, np.int64))  # fmt: skip

    def lengths(self, generator: torch.Generator, least: int = 0) -> Iterator[int]:
        """Lengths as often as there are clips of them."""
        sizes = [n for n in sorted(self.features) if n >= least]
        weights = torch.tensor([float(len(self.features[n])) for n in sizes])
        while True:
            yield sizes[int(torch.multinomial(weights, 1, generator=generator))]


def rate_of(step: int, steps: int, top: float) -> float:
    """Warm-up, then a cosine."""
    return top * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))


# ---- tokenizer ------------------------------------------------------------------------------------------------------


class MovingCodebook:
    """Codes as moving averages of what is mapped to them; those that nothing is mapped to begin anew."""

    def __init__(self, codebook: Tensor, generator: torch.Generator) -> None:
        self.codes, self.generator = codebook, generator
        self.count, self.sum = torch.ones(len(codebook)), codebook.clone()
        self.begun = False

    def update(self, h: Tensor, ids: Tensor) -> None:
        """h [M, D], ids [M]."""
        if not self.begun:  # from the data
            pick = torch.randint(len(h), (len(self.codes),), generator=self.generator)
            self.sum.copy_(h[pick] + 0.01 * torch.randn(self.sum.shape, generator=self.generator))
            self.begun = True
        else:
            hot = F.one_hot(ids, len(self.codes)).float()
            self.count.mul_(DECAY).add_(hot.sum(0), alpha=1 - DECAY)
            self.sum.mul_(DECAY).add_(hot.T @ h, alpha=1 - DECAY)
            dead = self.count < 0.3
            pick = torch.randint(len(h), (int(dead.sum()),), generator=self.generator)
            self.sum[dead], self.count[dead] = h[pick], 1.0
        self.codes.copy_(self.sum / self.count[:, None])


def train_tokenizer(model: MoTokReference, data: Data, steps: int, batch: int = 40) -> None:
    """Smooth-L1 on the clean motion from any noise, and commitment to the codes (eq. 2 to 6)."""
    t, generator = model.tokenizer, torch.Generator().manual_seed(SEED + 1)
    bars = torch.from_numpy(alpha_bars(model.config.diffusion)).float()
    book = MovingCodebook(t.quantizer.codebook, generator)
    # Errors of the root's turn and way add up over frames; those of a joint do not.
    weight = torch.ones(model.config.features)
    weight[:3] = ROOT_WEIGHT
    weight /= weight.mean()
    optimizer = torch.optim.AdamW(t.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    lengths, begun = data.lengths(generator, CROP), time.time()
    for step in range(steps):
        crops = []
        for _ in range(5):
            x = data.features[next(lengths)]
            pick = torch.randint(len(x), (batch // 5,), generator=generator)
            at = int(torch.randint((x.shape[1] - CROP) // 4 + 1, (1,), generator=generator)) * 4
            crops.append(x[pick, at : at + CROP])
        x0 = torch.cat(crops)
        h = t.encoder(x0)
        with torch.no_grad():
            ids = t.quantizer(h)
        q = t.quantizer.codebook[ids]
        s = t.decoder(h + (q - h).detach())
        when = torch.randint(len(bars), (len(x0),), generator=generator)
        bar = bars[when][:, None, None]
        noisy = bar.sqrt() * x0 + (1 - bar).sqrt() * torch.randn(x0.shape, generator=generator)
        guess = t.denoiser(noisy, when, s)
        loss = (weight * F.smooth_l1_loss(guess, x0, reduction="none")).mean()
        total = loss + COMMIT * F.mse_loss(h, q)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(t.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate_of(step, steps, 1.5e-3)
        optimizer.step()
        with torch.no_grad():
            book.update(h.detach().flatten(0, 1), ids.flatten())
        if step % 100 == 0 or step == steps - 1:
            used = len(ids.unique())
            print(
                f"tokenizer {step:5d}  loss {loss.item():.4f}  codes in batch {used:3d}  {time.time() - begun:6.0f} s",
                flush=True,
            )


# ---- planners -------------------------------------------------------------------------------------------------------


def some_waypoints(count: int, frames: int, generator: torch.Generator) -> Tensor:
    """[count, T, J] bool: one to three joints at one, two or five frames, a quarter of them, or all."""
    mask = torch.zeros(count, frames, HUMANML3D.joints, dtype=torch.bool)
    for row in mask:
        joints = torch.randperm(len(POOL), generator=generator)[: 1 + int(torch.randint(3, (1,), generator=generator))]
        dense = (1, 2, 5, frames // 4, frames)[int(torch.randint(5, (1,), generator=generator))]
        at = torch.randperm(frames, generator=generator)[:dense]
        row[at[:, None], torch.tensor(POOL)[joints][None]] = True
    return mask


def train_planners(model: MoTokReference, data: Data, stats: FeatureStatistics, steps: int, batch: int = 48) -> None:
    """Masked tokens for one, the next token for the other, on one text feature (section 3.3)."""
    c, generator = model.config, torch.Generator().manual_seed(SEED + 2)
    mean, std = (torch.from_numpy(np.array(x)).flatten() for x in (stats.joint_mean, stats.joint_std))
    with torch.no_grad():
        tokens = {
            n: torch.cat([model.tokenizer.encode(part) for part in x.split(64)]) for n, x in data.features.items()
        }
    parts = [*model.ddm.parameters(), *model.ar.parameters(), *model.clip.parameters()]
    optimizer = torch.optim.AdamW(parts, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    lengths, begun = data.lengths(generator), time.time()

    def chance(p: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) < p

    for step in range(steps):
        frames = next(lengths)
        ids_all = tokens[frames]
        pick = torch.randint(len(ids_all), (batch,), generator=generator)
        ids, words = ids_all[pick], data.texts[frames][pick]
        n = ids.shape[1]
        text = model.clip(words[:, : int(words.argmax(1).max()) + 1])
        text = text.masked_fill(chance(0.1, batch)[:, None], 0.0)
        trajectories: list[Tensor | None] = [None, None]
        if step % 2:
            mask = some_waypoints(batch, frames, generator)
            hints = hint(c, data.joints[frames][pick], mask, mean, std)
            keep = ~chance(0.1, batch)[:, None, None]
            trajectories = [p.traj_encoder(hints) * keep for p in (model.ddm, model.ar)]
        # Masked: the share that is hidden is drawn as sampling goes through it.
        share = torch.cos(torch.rand(batch, 1, generator=generator) * math.pi / 2)
        order = torch.rand(batch, n, generator=generator).argsort(1).argsort(1)
        hidden = order < (share * n).round().clamp(min=1)
        noise = torch.randint(c.codes, ids.shape, generator=generator)
        seen = torch.where(chance(0.1, batch, n), noise, ids).masked_fill(hidden, model.ddm.mask)
        masked = F.cross_entropy(model.ddm(seen, text, trajectories[0])[hidden], ids[hidden], label_smoothing=0.02)
        # Next: END follows the last.
        seen = torch.where(chance(0.2, batch, n), noise, ids)
        logits = model.ar(seen, text, trajectories[1])
        want = torch.cat([ids, torch.full((batch, 1), model.ar.end)], 1)
        following = F.cross_entropy(logits.flatten(0, 1), want.flatten(), label_smoothing=0.02)
        optimizer.zero_grad(set_to_none=True)
        (masked + following).backward()
        torch.nn.utils.clip_grad_norm_(parts, 1.0)
        optimizer.param_groups[0]["lr"] = rate_of(step, steps, 1.2e-3)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"planners {step:5d}  masked {masked.item():.3f}  next {following.item():.3f}  "
                  f"{time.time() - begun:6.0f} s", flush=True)  # fmt: skip


# ---- files ----------------------------------------------------------------------------------------------------------


def write(folder: Path, model: MoTokReference, stats: FeatureStatistics) -> None:
    """The layout that the engine loads, in bf16."""
    files = {"tokenizer": model.tokenizer, "planner_ddm": model.ddm, "planner_ar": model.ar, "clip_text": model.clip}
    for stem, module in files.items():
        tensors = {k: v.detach().float().contiguous().numpy() for k, v in module.state_dict().items()
                   if not k.endswith(DERIVED)}  # fmt: skip
        save(folder / f"{stem}.safetensors", {k: ("BF16", f32_to_bf16(v)) for k, v in tensors.items()})
    numbers = {"mean": stats.mean, "std": stats.std, "hint_mean": stats.joint_mean, "hint_std": stats.joint_std}
    save(folder / "stats.safetensors", {k: ("F32", np.ascontiguousarray(v.reshape(-1))) for k, v in numbers.items()})
    (folder / "config.json").write_text(json.dumps(model.config.to_json(), indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "engine/zoo/motok-tiny")
    parser.add_argument("--tokenizer", type=int, default=2800, help="steps")
    parser.add_argument("--planners", type=int, default=4800, help="steps")
    parser.add_argument("--clips", type=int, default=CLIPS)
    args = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    args.out.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    data = clips(args.clips, SEED)
    stats = statistics_of(data)
    words = write_words(args.out, [c.text for c in data])
    config = MoTokConfig.from_json({**CONFIG, "clip": {**CONFIG["clip"], "vocab": words.vocab_size}})
    model = MoTokReference(config).float()
    size = sum(v.numel() for k, v in model.state_dict().items() if not k.endswith(DERIVED))
    print(f"{len(data)} clips in {time.time() - begun:.0f} s, {size / 1e6:.2f} M values, vocabulary {words.vocab_size}")
    sets = Data.of(data, stats, words, config.clip.ctx)
    train_tokenizer(model, sets, args.tokenizer)
    train_planners(model, sets, stats, args.planners)
    write(args.out, model, stats)
    total = sum(p.stat().st_size for p in args.out.iterdir())
    print(f"written: {args.out}, {total / 1e6:.2f} MB, {(time.time() - begun) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
