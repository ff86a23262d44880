"""A person who walks forward, then waves, along waypoints: with and without guidance, as BVH and film.

./run demo motok [--text TEXT] [--frames 120] [--constraints FILE.json] [--planner ddm|ar] [--seed 0] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import engine
from engine.blocks.motion import Constraints, Waypoints, foot_skate, save_animation
from engine.errors import EngineError, InputError
from engine.models.motok.model import MoTok
from engine.models.motok.motion import Motion

ROOT = Path(__file__).resolve().parents[3]
FRAMES = 140
#: name, guidance
WAYS: tuple[tuple[str, dict | bool], ...] = (
    ("planner alone", False),
    ("lbfgs", {"solver": "lbfgs"}),
    ("project", {"solver": "project"}),
)


def path(frames: int) -> Constraints:
    """A curve for the pelvis that ends half-way, and the left hand up at the end."""
    at = np.arange(0, frames // 2, 10)
    s = at / 20
    pelvis = np.stack([0.12 * s**2, np.full(len(at), 0.88), 0.8 * s], 1)
    end = pelvis[-1]
    hand = np.array([[end[0] + 0.5, 1.25, end[2] + 0.35]])
    return Constraints([Waypoints("pelvis", at, pelvis), Waypoints("l_wrist", np.array([frames - 15]), hand)])


def line(name: str, m: Motion) -> str:
    far = "  ".join(f"{r.joint} {100 * r.mean:7.3f} cm (worst {100 * r.max:.3f})" for r in m.residuals)
    stages = ", ".join(f"{k} {v:.1f}" for k, v in m.stages.items())
    skate = float(foot_skate(m.joints))
    return f"{name:<14} {far}   foot skate {skate:.3f}   {m.evaluations:4d} evaluations   ms: {stages}"


def film(m: Motion, folder: Path, title: str) -> Path | None:
    """mp4 where av is there, else a GIF; None without Pillow."""
    for suffix in (".mp4", ".gif"):
        try:
            return save_animation(m.joints, folder / f"{title}{suffix}", m.constraints, rate=m.fps, title=title)
        except InputError:
            continue
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="motok-tiny")
    parser.add_argument("--text", default="a person walks forward, then waves")
    parser.add_argument("--frames", type=int)
    parser.add_argument(
        "--constraints", type=Path, help="JSON file; default: a curve for the pelvis, a place for a hand"
    )
    parser.add_argument("--planner", choices=["ddm", "ar"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "build/demo-motok")
    args = parser.parse_args()
    try:
        model = engine.load(args.model)
        assert isinstance(model, MoTok)
        given = Constraints.read(args.constraints, model.skeleton) if args.constraints else path(args.frames or FRAMES)
        frames = args.frames or (None if args.constraints else FRAMES)
        print(f"{model!r}\n{args.text!r}, {given!r}\n")
        for name, guidance in WAYS:
            for _ in range(2):  # the first request of a length records its plans
                m = model.generate(args.text, frames=frames, constraints=given, planner=args.planner, seed=args.seed,
                                   guidance=guidance)  # fmt: skip
            assert isinstance(m, Motion)
            print(line(name, m))
            stem = name.replace(" ", "-")
            m.save(args.out / f"{stem}.bvh")
            drawn = film(m, args.out, stem)
            if drawn is None:
                print("no film: it needs Pillow (pip install 'quintet-engine[motion]')")
        m.save(args.out / f"{stem}.glb")
        m.save(args.out / f"{stem}.npy")
        print(f"\nwritten: {', '.join(sorted(p.name for p in args.out.iterdir()))} in {args.out}")
    except EngineError as error:
        sys.exit(f"motok: {error}")


if __name__ == "__main__":
    main()
