"""What is asked of videos of a subject: whether they show it, and the same thing from every side.

The paper's ablation at small scale, on solids that nothing was trained on: the adapter of views alone (one view), the
optimisation alone (no views), and both.

python examples/tiny/dreambooth3d/view_exam.py [--subjects 20] [--model dreambooth3d-tiny]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from clips import Shown, draw, turned
from solids import VIEWS

import engine
from engine.models.dreambooth3d.model import DreamBooth3D
from engine.models.dreambooth3d.video import Video

PHOTOS = (0, 2, 4, 6, 8, 10)  # of a turn's views: the six that are taken
REFERENCES = (0, 3, 6, 9)  # four, shown beside
MOTION = "turning left"
ARMS = ("views", "optimisation", "both")
HOW = {"steps": 20, "guidance": 1.0, "shift": 3.0}  # chosen, as TRAINING, on other solids than those of the exam
TRAINING = {"steps": 300, "lr": 1e-3, "dtype": "f32"}
BINS = 6  # of a colour's channel


@dataclass(frozen=True)
class Marks:
    """similarity: of colours, 0 to 1 (their histograms' common part). consistency: PSNR, dB, of pictures from sides
    that neither photos nor references show."""

    similarity: float
    consistency: float


def psnr(square: float) -> float:
    """dB of a mean square of u8 values."""
    return float(10 * np.log10(255**2 / max(square, 1e-9)))


def mean_marks(found: Sequence[Marks]) -> dict[str, float]:
    return {k: float(np.mean([getattr(m, k) for m in found])) for k in ("similarity", "consistency")}


def histogram(pictures: np.ndarray) -> np.ndarray:
    """Share of each colour in what is not the white background, u8 [N, S, S, 3]."""
    flat = pictures.reshape(-1, 3)
    flat = flat[flat.min(1) < 235].astype(int) * BINS // 256
    counts = np.bincount(flat @ [BINS * BINS, BINS, 1], minlength=BINS**3)
    return counts / max(1, counts.sum())


def marks(video: np.ndarray, shown: Shown) -> Marks:
    """Of a turn u8 [T, S, S, 3]. Where it begins is the model's choice: the turn that fits best is the one compared
    with, all of its pictures together; those from sides that were photographed do not count."""
    truth = shown.views.astype(float)
    squares = []
    for first in range(VIEWS):
        at = turned(first, MOTION, len(video))
        off = ((video - truth[at]) ** 2).mean((1, 2, 3))
        squares.append((off.mean(), off[~np.isin(at, (*PHOTOS, *REFERENCES))].mean()))
    unseen = min(squares)[1]
    common = np.minimum(histogram(video), histogram(shown.views)).sum()
    return Marks(float(common), psnr(unseen))


def subjects_of(
    model: DreamBooth3D, shown: Shown, folder: Path, arms: Sequence[str] = ARMS, **training: Any
) -> dict[str, Any]:
    """The subject of each arm, personalised where it needs that."""
    photos, references = [shown.views[i] for i in PHOTOS], [shown.views[i] for i in REFERENCES]
    name, out = f"rhs {shown.solid.kind}", {}
    for arm in arms:
        if arm == "views":
            out[arm] = model.subject(None, references[:1])
            continue
        given = references if arm == "both" else []
        made = model.personalize(photos, given, folder / arm, name=name, side=shown.views.shape[1],
                                 **{**TRAINING, **training})  # fmt: skip
        out[arm] = model.subject(made, given)
    return out


def film(model: DreamBooth3D, shown: Shown, subject: Any, **how: Any) -> Video:
    given = {**HOW, "seed": 1, **how}
    made = model.generate(f"A video of a [rhs {shown.solid.kind}] {MOTION}.", subject, text_lora="all", **given)
    assert isinstance(made, Video)
    return made


def examine(model: DreamBooth3D, index: int, *, arms: Sequence[str] = ARMS, seed: int = 0) -> dict[str, Marks]:
    """Marks of each arm on solid `index` of those held out."""
    shown = draw(seed, index, held_out=True)
    with tempfile.TemporaryDirectory() as folder:
        subjects = subjects_of(model, shown, Path(folder), arms)
        return {arm: marks(film(model, shown, s).frames, shown) for arm, s in subjects.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dreambooth3d-tiny")
    parser.add_argument("--subjects", type=int, default=20)
    args = parser.parse_args()
    start, found = time.perf_counter(), []
    with engine.load(args.model, dtype="f32") as model:
        assert isinstance(model, DreamBooth3D)
        for i in range(args.subjects):
            found.append(examine(model, i))
            told = ", ".join(f"{arm} {m.similarity:.3f} {m.consistency:.2f} dB" for arm, m in found[-1].items())
            print(f"[{time.perf_counter() - start:.0f} s] {i}: {told}", flush=True)
    print(json.dumps({arm: mean_marks([f[arm] for f in found]) for arm in ARMS}, indent=2))


if __name__ == "__main__":
    main()
