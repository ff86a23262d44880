"""3DreamBooth on the emulated device beside the CPU: `python -m tests.emu.subject WHAT`, one JSON line.

CUDA nodes run on the emulator and Triton nodes in the interpreter, in plan order: TRITON_INTERPRET=1 must be set. A
whole request is the transformer's steps and the VAE's tiles, each executed here alone.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

import numpy as np
from _dreambooth import CONFIG, Tiny, VaeTiny, as_rows, det, joint, states

from engine.models.dreambooth3d.config import VaeConfig
from engine.models.dreambooth3d.dit import Shape
from engine.models.dreambooth3d.schedule import noise_levels
from engine.models.dreambooth3d.tiles import Tiling
from engine.runtime import cuda
from engine.runtime.device import on

from .beside import problems, tell
from .driver import EmulatedCuda

SHAPE = Shape(2, 2, 3, 2)  # latent frames, rows, columns, views; both branches of guidance
DIT = replace(CONFIG, layers=2, glyph_dim=0)
VAE = VaeConfig((8, 8, 16), 1, 4, spatial=4, temporal=2)


def steps(device: str, dtype: str) -> tuple[Any, np.ndarray]:
    """Texts, references, a step that runs them and one that keeps them: the clean latent."""
    tiny = Tiny(c=DIT, subject=joint(), dtype=dtype, kept=2, image=24, references=12, text=12, steps=2, device=device)
    tiny.sampler.place_views(np.stack([as_rows(det(f"view{i}", (8, 2, 3), 1)) for i in range(SHAPE.views)]))
    sigmas = noise_levels(2, 5.0)
    texts = [tiny.sampler.tokens(sigmas, states(row).numpy()) for row in ("uncond", "cond")]
    clean = tiny.sampler.sample(SHAPE, as_rows(det("noise", (8, 2, 2, 3), 1)), sigmas, 6.0, texts, refresh=2)
    assert clean is not None
    return tiny, clean


def tile(device: str, dtype: str) -> tuple[Any, np.ndarray]:
    """Pixels of a latent, and the moments of a picture."""
    tiny = VaeTiny(VAE, Tiling(0), frames=2, rows=3, columns=4, dtype=dtype, device=device)
    pixels = tiny.tiles.decode(np.ascontiguousarray(det("latent", (2, 3, 4, 4), 1).numpy()))
    moments = tiny.tiles.encode(np.clip(det("picture", (1, 12, 16, 3), 0.5).numpy(), -1, 1))
    return tiny, np.concatenate([np.ravel(p) for p in (pixels, *moments)])


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("steps", "tile"))
    parser.add_argument("--dtype", default="f32")
    args = parser.parse_args()
    run = {"steps": steps, "tile": tile}[args.what]
    _, cpu = run("cpu", args.dtype)
    with cuda.use(EmulatedCuda()), on("cuda"):
        m, gpu = run("cuda", args.dtype)
        audit = problems(m)
    tell(m, gpu, cpu, audit)
    return 0


if __name__ == "__main__":
    sys.exit(main())
