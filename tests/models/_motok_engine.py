"""MoTok engines made of the references' tensors, without files."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from _motok import DERIVED, filled, statistics, uniform
from _source import Tensors
from torch import nn

from engine.blocks.motion import Constraints, Waypoints
from engine.models.motok.config import MoTokConfig
from engine.models.motok.model import MoTok, load_options
from engine.models.motok.planner_reference import hint, sample_ar, sample_ddm
from engine.models.motok.reference import MoTokReference

PREFIXES = {"tokenizer": "", "ddm": "ddm.", "ar": "ar.", "clip": "clip."}


class Letters:
    """A text tokenizer with a code for every letter."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str, ctx: int = 77) -> list[int]:
        letters = [ord(x) % (self.vocab_size - 2) for x in text][: ctx - 2]
        return [self.vocab_size - 2, *letters, self.vocab_size - 1]


def stats(joints: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    mean, std = statistics(joints)
    stretch = torch.ones_like(mean)
    stretch[1 : 4 + 3 * (joints - 1)] = 1 / scale
    return {
        "stats.mean": (mean * stretch).float().numpy(), "stats.std": (std * stretch).float().numpy(),
        "stats.hint_mean": (0.1 * uniform("stats.hint_mean", 3 * joints)).float().numpy(),
        "stats.hint_std": (1 + 0.1 * uniform("stats.hint_std", 3 * joints)).float().numpy(),
    }  # fmt: skip


def source_of(c: MoTokConfig, **modules: nn.Module) -> Tensors:
    """The tensors of the references' parts, by the names of `PREFIXES`."""
    out = stats(c.joints, c.scale)
    for part, module in modules.items():
        for key, tensor in module.state_dict().items():
            if not key.endswith(DERIVED):
                out[PREFIXES[part] + key] = np.ascontiguousarray(tensor.float().numpy())
    return Tensors(out)


def engine_of(
    c: MoTokConfig, source: Any, dtype: str = "fp32", quant: str | None = None, device: str = "cpu", **options: Any
) -> MoTok:
    checked = load_options("test", source, device=device, dtype=dtype, quant=quant, **options)
    return MoTok(c, checked, source, Letters(c.clip.vocab))  # type: ignore[arg-type]


def both(c: MoTokConfig, dtype: str = "fp32", quant: str | None = None) -> tuple[MoTokReference, MoTok]:
    """A reference in fp64 and an engine with its weights, which fp32 holds exactly."""
    reference = MoTokReference(c)
    for part, prefix in PREFIXES.items():
        filled(getattr(reference, part), prefix)
    reference.float().double()
    for planner in (reference.ddm, reference.ar):  # the position tables stay what the formula says
        fresh = type(planner)(c).double()
        for name, buffer in fresh.named_buffers():
            if name.endswith(DERIVED):
                planner.get_buffer(name).copy_(buffer)
    return reference, engine_of(c, source_of(c, **{p: getattr(reference, p) for p in PREFIXES}), dtype, quant)


def waypoints(m: MoTok, frames: int = 64) -> Constraints:
    """The pelvis on a line, a hand at two places."""
    at = np.arange(0, frames, 3)
    path = np.stack([at / frames, np.full(len(at), 0.9), 2 * at / frames], 1)
    hand = np.array([[0.3, 1.0, 0.5], [0.6, 1.2, 1.3]])
    return Constraints([Waypoints(0, at, path), Waypoints(m.skeleton.joints - 2, np.array([10, frames - 20]), hand)],
                       m.skeleton)  # fmt: skip


def planned(
    reference: MoTokReference, m: MoTok, planner: str, text: str | None, given: Constraints | None, seed: int,
    frames: int | None, sample: int = 0,
) -> np.ndarray:  # fmt: skip
    """Tokens as the reference draws them from the engine's random numbers."""
    c = m.config
    n = frames // c.rate if frames else c.max_tokens
    feature = reference.clip(torch.tensor([m.words.encode(text, c.clip.ctx)])) if text else None  # type: ignore[union-attr]
    traj = None
    if given is not None:
        assert frames is not None
        target, mask = given.target(frames)
        hints = hint(c, torch.from_numpy(target).double()[None], torch.from_numpy(mask)[None],
                     torch.from_numpy(m.weights.hint_mean), torch.from_numpy(m.weights.hint_std))  # fmt: skip
        traj = getattr(reference, planner).traj_encoder(hints)
    steps = c.ddm.steps if planner == "ddm" else n
    count = steps * n if planner == "ddm" else n
    uniforms = torch.from_numpy(m.draw(seed, sample, "tokens", "uniform", count)).double()
    coins = torch.from_numpy(m.coins(seed, sample, steps))[None]
    if planner == "ddm":
        return sample_ddm(reference.ddm, c, [n], uniforms.view(1, steps, n), feature, traj, coins)[0].numpy()
    ids = sample_ar(reference.ar, c, uniforms[None], [n] if frames else None, feature, traj, coins)[0].numpy()
    return ids[ids < c.codes]
