"""3DreamBooth's claim and the price of its approximations, on dreambooth3d-tiny and solids that it never saw.

The ablation of the paper (views' adapter alone, optimisation alone, both), and each approximation against the exact
video of the same subject and seed: its share of the time, its distance, and whether it still shows the subject. Times
are this small model's, where references are a third of the tokens and a step is mostly short products.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import engine
from bench.report import Report
from engine.models.dreambooth3d.model import DreamBooth3D

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples/tiny/dreambooth3d"))

from clips import draw
from view_exam import ARMS, Marks, examine, film, marks, mean_marks, psnr, subjects_of

#: By name: what `generate` is asked for, and whether the subject was trained so.
APPROXIMATIONS: dict[str, tuple[dict[str, Any], bool]] = {
    "refresh=2": ({"refresh": 2}, False),
    "refresh=4": ({"refresh": 4}, False),
    "prune=0": ({"prune": 0}, False),
    "step_cache=2": ({"step_cache": 2}, False),
    "step_cache=4": ({"step_cache": 4}, False),
    "steps=10": ({"steps": 10}, False),
    "timesteps of 4 steps": ({"timesteps": (1000.0, 900.0, 750.0, 500.0)}, False),
    "one_way, not trained so": ({"one_way": True}, False),
    "one_way, trained so": ({"one_way": True}, True),
}
ROUNDS = 5  # pairs that a time is the median of


def ablation(report: Report, model: DreamBooth3D, subjects: int) -> None:
    found = [examine(model, i) for i in range(subjects)]
    for arm in ARMS:
        row = mean_marks([f[arm] for f in found])
        beaten = sum(f["both"].consistency > f[arm].consistency for f in found)
        print(f"{arm}: colours {row['similarity']:.3f}, unseen sides {row['consistency']:.2f} dB "
              f"(both better from there on {beaten} of {subjects})")  # fmt: skip
        report.add(what="ablation", arm=arm, subjects=subjects, both_better=beaten, **row)


def approximations(report: Report, model: DreamBooth3D, subjects: int) -> None:
    rows: dict[str, list[tuple[float, float, float, Marks]]] = {name: [] for name in ("exact", *APPROXIMATIONS)}
    for i in range(subjects):
        shown = draw(0, i, held_out=True)
        with tempfile.TemporaryDirectory() as folder:
            made = {one_way: subjects_of(model, shown, Path(folder) / str(one_way), ["both"], one_way=one_way)["both"]
                    for one_way in (False, True)}  # fmt: skip
            exact = film(model, shown, made[False])
            rows["exact"].append((1.0, 0.0, float("inf"), marks(exact.frames, shown)))
            for name, (how, trained) in APPROXIMATIONS.items():
                ratios = []
                for _ in range(ROUNDS):
                    plain = film(model, shown, made[False])
                    video = film(model, shown, made[trained], **how)
                    ratios.append(plain.stages["sample"] / video.stages["sample"])
                off = np.linalg.norm(video.latent - exact.latent) / np.linalg.norm(exact.latent)
                square = np.square(video.frames.astype(float) - exact.frames).mean()
                rows[name].append((float(np.median(ratios)), float(off), psnr(square), marks(video.frames, shown)))
    for name, each in rows.items():
        speed, off, near = (float(np.median([r[k] for r in each])) for k in range(3))
        kept = mean_marks([r[3] for r in each])
        print(f"{name}: x{speed:.2f} of the exact sampler's speed, latent within {off:.2f}, {near:.1f} dB of it; "
              f"colours {kept['similarity']:.3f}, unseen sides {kept['consistency']:.2f} dB")  # fmt: skip
        report.add(what="approximation", name=name, subjects=subjects, speed=speed, latent=off,
                   psnr=None if np.isinf(near) else near, **kept)  # fmt: skip


def main(subjects: int) -> None:
    report = Report("subjects")
    with engine.load("dreambooth3d-tiny", dtype="f32", keep=2, progress=False) as model:
        assert isinstance(model, DreamBooth3D)
        ablation(report, model, subjects)
        approximations(report, model, max(2, subjects // 5))
    print("written:", report.save())
