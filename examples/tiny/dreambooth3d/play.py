"""Personalises on six views of a solid that nothing was trained on, and films it turning: a contact sheet, an mp4 and
how well it shows the solid, beside the adapter of views alone and the optimisation alone.

./run demo dreambooth3d [--subject 0] [--steps 300] [--only-both] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from clips import draw, turned
from view_exam import ARMS, MOTION, PHOTOS, TRAINING, film, marks, subjects_of

import engine
from engine.errors import EngineError
from engine.models.dreambooth3d.model import DreamBooth3D

ROOT = Path(__file__).resolve().parents[3]
ZOOM, EACH, LINE = 2, 2, 16  # of a pixel; every so many frames; pixels of a line of text


def sheet(rows: list[tuple[str, np.ndarray]], path: Path) -> None:
    """Rows of pictures u8 [N, S, S, 3], each under what it is."""
    from PIL import Image, ImageDraw

    edge = rows[0][1].shape[1] * ZOOM
    out = Image.new("RGB", (edge * max(len(p) for _, p in rows), (edge + LINE) * len(rows)), "white")
    pen = ImageDraw.Draw(out)
    for i, (said, pictures) in enumerate(rows):
        strip = np.concatenate(list(pictures), 1).repeat(ZOOM, 0).repeat(ZOOM, 1)
        out.paste(Image.fromarray(strip), (0, i * (edge + LINE) + LINE))
        pen.text((4, i * (edge + LINE) + 2), said, "black")
    out.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dreambooth3d-tiny")
    parser.add_argument("--subject", type=int, default=0, help="number of a held-out solid")
    parser.add_argument("--steps", type=int, default=TRAINING["steps"], help="of the personalisation")
    parser.add_argument("--only-both", action="store_true", help="leave out the two arms of the ablation")
    parser.add_argument("--out", type=Path, default=ROOT / "build/demo-dreambooth3d")
    args = parser.parse_args()
    try:
        with engine.load(args.model, dtype="f32") as model:
            assert isinstance(model, DreamBooth3D)
            print(model)
            shown = draw(0, args.subject, held_out=True)
            print(f"subject {args.subject}: a {shown.solid.name}, {len(PHOTOS)} photos of it")
            args.out.mkdir(parents=True, exist_ok=True)
            rows = [("its photos", shown.views[list(PHOTOS)])]
            for arm in ("both",) if args.only_both else ARMS[::-1]:
                folder = args.out / "subjects" / arm
                shutil.rmtree(folder, ignore_errors=True)  # of the last time
                start = time.perf_counter()
                subject = subjects_of(model, shown, folder.parent, [arm], steps=args.steps)[arm]
                trained = time.perf_counter() - start
                video = film(model, shown, subject)
                m = marks(video.frames, shown)
                said = f"{arm}: colours {m.similarity:.2f}, unseen sides {m.consistency:.1f} dB"
                print(f"{said} (personalised in {trained:.1f} s, filmed in {sum(video.stages.values()) / 1e3:.1f} s)")
                rows.append((said, video.frames[::EACH]))
                if arm == "both":
                    video.save(args.out / "turn.mp4", fps=8)
            rows.append(("how it turns", shown.views[turned(0, MOTION)][::EACH]))
            sheet(rows, args.out / "sheet.png")
            print(f"film: {args.out / 'turn.mp4'}; contact sheet: {args.out / 'sheet.png'}")
    except EngineError as fault:
        sys.exit(f"dreambooth3d: {fault}")


if __name__ == "__main__":
    main()
