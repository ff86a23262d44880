"""What vega3d-tiny as shipped answers to 1,000 questions about rooms that it was never trained on, by the engine.

python examples/tiny/vega3d/room_exam.py [--model vega3d-tiny] [--each 250] [--quant int8]
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from questions import SPATIAL, exam, interval
from room_data import Sample, dataset

import engine
from engine.models.vega3d.model import Vega3D

HELD_OUT = 700  # rooms


def asked(each: int, rooms: int = HELD_OUT) -> Iterator[tuple[Sample, list[int]]]:
    """Held-out rooms with the places of the questions that the exam takes from them."""
    samples = list(dataset(0, rooms, held_out=True))
    for sample, mine in zip(samples, exam([[q.kind for q in s.questions] for s in samples], each)):
        if len(mine):
            yield sample, mine.tolist()


def examine(model: Vega3D, each: int, rooms: int = HELD_OUT) -> dict[str, tuple[int, int]]:
    """(right, asked) by kind; pictures alone are given."""
    right, total = Counter(), Counter()
    for sample, mine in asked(each, rooms):
        scene = model.scene(sample.scene.rgb)
        for q in (sample.questions[i] for i in mine):
            total[q.kind] += 1
            right[q.kind] += scene.ask(q.text, max_new_tokens=8).text == q.answer
    return {k: (right[k], total[k]) for k in SPATIAL}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vega3d-tiny")
    parser.add_argument("--each", type=int, default=250, help="questions of each kind")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quant", choices=["int8", "int4"])
    args = parser.parse_args()
    with engine.load(args.model, dtype=args.dtype, quant=args.quant) as model:
        assert isinstance(model, Vega3D)
        found = examine(model, args.each)
    right, total = (sum(v[i] for v in found.values()) for i in (0, 1))
    low, high = interval(right, total)
    print(f"{100 * right / total:.1f} % [{100 * low:.1f}, {100 * high:.1f}] of {total}: "
          + ", ".join(f"{k} {100 * a / n:.1f} %" for k, (a, n) in found.items()))  # fmt: skip


if __name__ == "__main__":
    main()
