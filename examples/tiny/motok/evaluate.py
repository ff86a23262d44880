"""What motok-tiny does with prompts that it was never trained on: a table, and the same as JSON.

python examples/tiny/motok/evaluate.py [--prompts 100] [--model motok-tiny] [--json FILE]

A small classifier, trained here on the synthesised motions, says which actions a motion shows; right is a motion with
exactly those of its prompt. Waypoints are taken from a synthesised motion of the same prompt, at every fourth frame.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from synthesise import ACTIONS, LONGEST, Clip, clips, held_out

import engine
from engine.blocks.motion import Constraints, Waypoints, foot_skate, recover_joints
from engine.models.motok.model import MoTok
from engine.models.motok.motion import Motion

EVERY = 4
JOINTS = {"pelvis": 0, "wrist": 20}
#: Solver and bar in centimetres of each row.
BARS = {("pelvis", "lbfgs"): 0.5, ("wrist", "lbfgs"): 0.2, ("pelvis", "project"): 1e-3, ("wrist", "project"): 1e-3}


class Classifier(nn.Module):
    """Which actions a motion shows; x [B, T, D] normalised, length [B]."""

    def __init__(self, features: int, width: int = 64) -> None:
        super().__init__()
        self.first = nn.Conv1d(features, width, 5, 2, 2)
        self.second = nn.Conv1d(width, width, 5, 2, 2)
        self.head = nn.Linear(2 * width, len(ACTIONS))

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        h = F.relu(self.second(F.relu(self.first(x.transpose(1, 2)))))
        there = (torch.arange(h.shape[2]) < (length[:, None] // 4))[:, None]
        mean = (h * there).sum(2) / there.sum(2)
        return self.head(torch.cat([mean, (h * there).amax(2)], 1))


def padded(motions: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    out = np.zeros((len(motions), LONGEST, motions[0].shape[1]), np.float32)
    for row, x in zip(out, motions):
        row[: len(x)] = x
    return torch.from_numpy(out), torch.tensor([len(x) for x in motions])


def trained_classifier(normalize: Any, count: int = 3000, steps: int = 600) -> Classifier:
    torch.manual_seed(7)
    data = clips(count, seed=99)
    x, length = padded([normalize(c.features) for c in data])
    want = torch.from_numpy(np.stack([c.script.labels for c in data])).float()
    net = Classifier(x.shape[2])
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
    for step in range(steps):
        pick = torch.randint(len(x), (64,))
        given = x[pick] + 0.15 * torch.randn(64, *x.shape[1:])  # what a decoder gets slightly wrong is no action
        loss = F.binary_cross_entropy_with_logits(net(given, length[pick]), want[pick])
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def right(net: Classifier, motions: list[np.ndarray], prompts: list[Clip]) -> float:
    """Share of the motions with exactly the actions of their prompts."""
    with torch.no_grad():
        found = net(*padded(motions)) > 0
    want = torch.from_numpy(np.stack([c.script.labels for c in prompts]))
    return float((found == want).all(1).float().mean())


def points(clip: Clip, joint: int) -> Constraints:
    """Where a joint of the prompt's synthesised motion is, at every fourth frame."""
    at = np.arange(0, len(clip.features), EVERY)
    return Constraints([Waypoints(joint, at, recover_joints(clip.features)[at, joint])], origin=(0.0, 0.0), heading=0.0)


def error(motions: list[Motion], prompts: list[Clip]) -> float:
    """Mean distance of all joints to the prompts' motions, cm."""
    each = [np.linalg.norm(m.joints - recover_joints(c.features), axis=-1).mean() for m, c in zip(motions, prompts)]
    return 100 * float(np.mean(each))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="motok-tiny")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = engine.load(args.model)
    assert isinstance(model, MoTok)
    prompts = held_out(args.prompts)
    normalize = model.statistics.normalize
    net = trained_classifier(normalize)
    rows: dict[str, Any] = {"prompts": len(prompts)}

    def say(name: str, value: float, unit: str = "", bar: str = "") -> None:
        rows[name] = value
        print(f"{name:<44}{value:10.4f} {unit:<4}{bar}", flush=True)

    def made(**more: Any) -> list[Motion]:
        given = more.pop("given", None)
        out = []
        for i, clip in enumerate(prompts):
            limits = None if given is None else points(clip, given)
            out.append(model.generate(clip.text, frames=len(clip.features), seed=i, constraints=limits, **more))
        return out  # type: ignore[return-value]

    say("classifier right on synthesised motions", right(net, [normalize(c.features) for c in prompts], prompts))
    again = [model.reconstruct(c.features) for c in prompts]
    say("reconstruction, all joints", error(again, prompts), "cm")
    say("classifier right on reconstructions", right(net, [normalize(m.features) for m in again], prompts))
    free: dict[str, list[Motion]] = {}
    for planner in ("ddm", "ar"):
        begun = time.perf_counter()
        free[planner] = made(planner=planner)
        spent = (time.perf_counter() - begun) / len(prompts) * 1e3
        found = right(net, [normalize(m.features) for m in free[planner]], prompts)
        say(f"{planner}: actions right", found, "", "bar 0.90")
        say(f"{planner}: a motion takes", spent, "ms")
    say("synthesised motions: foot skate", float(np.mean([foot_skate(recover_joints(c.features)) for c in prompts])))
    say("without waypoints: all joints", error(free["ddm"], prompts), "cm")
    say("without waypoints: foot skate", float(np.mean([foot_skate(m.joints) for m in free["ddm"]])))
    for joint, number in JOINTS.items():
        for solver in ("lbfgs", "project"):
            pulled = made(given=number, guidance={"solver": solver})
            far = [100 * m.residuals[0].mean for m in pulled]
            say(f"{joint}, {solver}: at the waypoints", float(np.mean(far)), "cm", f"bar {BARS[joint, solver]:g}")
            say(f"{joint}, {solver}: all joints", error(pulled, prompts), "cm")
            say(f"{joint}, {solver}: foot skate", float(np.mean([foot_skate(m.joints) for m in pulled])))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
