"""VEGA-3D on the emulated device beside the CPU: `python -m tests.emu.scene WHAT`, one JSON line.

CUDA nodes run on the emulator and Triton nodes in the interpreter, in plan order: TRITON_INTERPRET=1 must be set.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
from _vega import VACE, geometry, pictures, random_generator, random_model, random_spatial

from engine.runtime import cuda

from .beside import problems, tell
from .driver import EmulatedCuda


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("features", "vace", "prompt", "questions", "spatial"))
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--audit", action="store_true")
    args = parser.parse_args()

    def features(device: str):
        other = {"vace": {"dit": VACE}, "prompt": {"tokens": 3}}.get(args.what, {})
        m = random_generator(device, args.dtype, per_pass=2, **other)
        return m, m.features(np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8), seed=5)

    def questions(device: str):
        """Embeddings, gates, the logits behind four tokens of an answer, and the scores of boxes."""
        m = random_model(device=device, dtype=args.dtype, generator=None, frames=2, per_pass=2, chunk=32)
        given = np.random.default_rng(1).standard_normal((2, 9, m.config.generative)).astype(np.float32)
        scene = m.scene(pictures(2), **geometry(2), features=given)
        scene.ask("where?", max_new_tokens=4)
        found = scene.ground("a cube", np.array([[0.5, 0.2, 1.5, 1.5, 1.5, 2.0], [0, 0, 1, 4, 4, 4]]))
        parts = (m._read_rows(m.visual), scene.gates, m.io.logits.read(), found.scores)
        return m, np.concatenate([np.ravel(p).astype(np.float32) for p in parts])

    def spatial(device: str):
        """Variant B: embeddings, gates, and the logits behind four tokens of an answer."""
        m = random_spatial(device=device, dtype=args.dtype, frames=2, per_pass=2, chunk=32, generator=None,
                           config={"generative_vision_tower_size": "48*32"})  # fmt: skip
        given = np.random.default_rng(1).standard_normal((2, 6, m.config.generative)).astype(np.float32)
        scene = m.scene(pictures(2), features=given)
        scene.ask("where?", max_new_tokens=4)
        parts = (m._read_rows(m.visual), scene.gates, m.io.logits.read())
        return m, np.concatenate([np.ravel(p).astype(np.float32) for p in parts])

    run = {"questions": questions, "spatial": spatial}.get(args.what, features)
    _, cpu = run("cpu")
    with cuda.use(EmulatedCuda()):
        m, gpu = run("cuda")
        audit = problems(m) if args.audit else None
    tell(m, gpu, cpu, audit)
    return 0


if __name__ == "__main__":
    sys.exit(main())
