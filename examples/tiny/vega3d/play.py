"""Looks at a room once, then answers questions about it; frames, answers and the fusion's gates as one picture.

./run demo vega3d [--room 0] [--ask QUESTION ...] [--frames FOLDER|VIDEO] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import engine
from engine.errors import EngineError, InputError
from engine.models.vega3d.model import Vega3D
from engine.models.vega3d.scene import Scene

ROOT = Path(__file__).resolve().parents[3]
ZOOM, LINE = 3, 15  # pixels of a pixel, and of a line of text


def drawn(room: int) -> Any:
    """A held-out room with the questions about it."""
    from room_data import dataset

    return next(iter(dataset(0, 1, held_out=True, start=room)))


def heat(gates: np.ndarray) -> np.ndarray:
    """[..., 3] uint8 of [...] values: dark where the generator is believed, bright where the semantic tower is."""
    low, high = gates.min(), gates.max()
    v = (gates - low) / max(high - low, 1e-6)
    return (255 * np.stack([v, np.clip(1.6 * v - 0.4, 0, 1), 0.35 + 0.3 * (1 - v)], -1)).astype(np.uint8)


def picture(scene: Scene, lines: list[str], path: Path) -> None:
    """Frames above their gates, and what was said."""
    from PIL import Image, ImageDraw

    size = scene.pictures.shape[1]
    cell = size // scene.gates.shape[1]
    gates = heat(scene.gates).repeat(cell, 1).repeat(cell, 2)
    gates = np.pad(gates, ((0, 0), (0, size - gates.shape[1]), (0, size - gates.shape[2]), (0, 0)))
    strip = np.concatenate([np.concatenate(list(row), 1) for row in (scene.pictures, gates)])
    strip = strip.repeat(ZOOM, 0).repeat(ZOOM, 1)
    out = Image.new("RGB", (strip.shape[1], strip.shape[0] + LINE * len(lines) + 12), "white")
    out.paste(Image.fromarray(strip))
    pen = ImageDraw.Draw(out)
    for i, line in enumerate(lines):
        pen.text((6, strip.shape[0] + 6 + LINE * i), line, "black")
    out.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vega3d-tiny")
    parser.add_argument("--room", type=int, default=0, help="number of a held-out room")
    parser.add_argument("--frames", help="a folder of images or a video instead of a room")
    parser.add_argument("--ask", nargs="*", default=[], help="questions; default: those that the room comes with")
    parser.add_argument("--quant", choices=["int8", "int4"])
    parser.add_argument("--out", type=Path, default=ROOT / "build/demo-vega3d")
    args = parser.parse_args()
    try:
        with engine.load(args.model, quant=args.quant) as m:
            assert isinstance(m, Vega3D)
            print(m)
            sample, given = None, {}
            frames: Any = args.frames
            if frames is None:
                sample = drawn(args.room)
                s = sample.scene
                frames = s.rgb
                given = {"depth": s.depth, "intrinsics": s.intrinsics, "poses": s.poses}
            elif not args.ask:
                raise InputError("--frames needs --ask: no questions come with your own pictures")
            asked = [(q, None) for q in args.ask] or [(q.text, q.answer) for q in sample.questions]  # type: ignore[union-attr]
            start = time.perf_counter()
            scene = m.scene(frames, **given)
            print(f"looked at {len(scene.pictures)} frames in {1e3 * (time.perf_counter() - start):.0f} ms: {scene!r}")
            lines, right = [], 0
            for question, truth in asked:
                start = time.perf_counter()
                answer = scene.ask(question, max_new_tokens=8)
                ms = 1e3 * (time.perf_counter() - start)
                known = "" if truth is None else "  right" if answer.text == truth else f"  wrong: {truth}"
                right += answer.text == truth
                own = answer.prompt_tokens - answer.reused_tokens
                lines.append(f"{question}  {answer.text}{known}")
                print(f"  {lines[-1]}   ({own} new tokens, {ms:.1f} ms)")
            if sample is not None:
                if not args.ask:
                    print(f"{right} of {len(asked)} right")
                solid = sample.scene.room.solids[0]
                said = f"the {solid.name}."
                try:
                    found = scene.ground(said, sample.scene.boxes)
                    lines.append(f"{said}  box {found.index}" + ("  right" if found.index == 0 else "  wrong: 0"))
                    print(f"  {lines[-1]} of {len(sample.scene.boxes)}, cosine {found.scores[found.index]:.2f}")
                except InputError as fault:
                    print(f"  grounding: {fault}")
            g = scene.gates
            print(f"gates (1: semantic): mean {g.mean():.2f}, from {g.min():.2f} to {g.max():.2f}")
            args.out.mkdir(parents=True, exist_ok=True)
            picture(scene, lines, args.out / "scene.png")
            print(f"frames, gates and answers: {args.out / 'scene.png'}")
    except EngineError as fault:
        sys.exit(f"vega3d: {fault}")
    except ImportError:
        sys.exit("vega3d: the picture needs Pillow: pip install 'quintet-engine[scene]'")


if __name__ == "__main__":
    main()
