"""A small 3DreamBooth on the emulated device beside the CPU: `python -m tests.emu.subjects`, one JSON line.

CUDA nodes run on the emulator and Triton nodes in the interpreter, in plan order: TRITON_INTERPRET=1 must be set.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from _dreambooth import picture, write_adapters, write_checkpoint

import engine
from engine.ops.registry import error
from engine.runtime import cuda

from .beside import problems
from .driver import EmulatedCuda

SIZE = (32, 32)
LOAD: dict[str, Any] = {"frames": 5, "size": SIZE, "steps": 2, "text": 48, "tile": 32, "overlap": 0.0, "views": 1,
                        "keep": 2, "spans": True, "progress": False}  # fmt: skip
ASK: dict[str, Any] = {"frames": 5, "size": SIZE, "steps": 2, "negative_prompt": "bad", "seed": 1}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--quant")
    parser.add_argument("--audit", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        base, trained = write_checkpoint(Path(home) / "base"), write_adapters(Path(home) / "subject")

        def run(device: str) -> tuple[Any, np.ndarray]:
            """Latents of each kind of step, behind the VAE's encoder and those of texts, and decoded frames."""
            m = engine.load(base, device=device, dtype=args.dtype, quant=args.quant, **LOAD)
            subject = m.subject(trained, [picture(0)])
            made = [
                m.generate('A [mug] "x"', subject, text_lora="span", **ASK),
                m.generate("A [mug]", subject, one_way=True, **ASK),
                m.generate("A [mug]", subject, refresh=2, **ASK),
                m.generate("A mug", guidance=1.0, **ASK),
            ]
            return m, np.concatenate([*(v.latent.ravel() for v in made), made[0].frames.ravel() / 255])

        _, cpu = run("cpu")
        with cuda.use(EmulatedCuda()):
            m, gpu = run("cuda")
            audit = problems(m) if args.audit else None
        print(json.dumps({
            "error": error(gpu, cpu), "kinds": sorted({n.impl for plan in m.plans.values() for n in plan.nodes}),
            "plans": {k: len(p) for k, p in m.plans.items()}, "audit": audit,
        }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
