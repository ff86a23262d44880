"""A generator of features on the emulated device beside the CPU: `python -m tests.emu.scene`, one JSON line.

CUDA nodes run on the emulator and Triton nodes in the interpreter, in plan order: TRITON_INTERPRET=1 must be set.
"""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np
from _vega import random_generator

from engine.ops.registry import error
from engine.runtime import cuda

from .beside import problems
from .driver import EmulatedCuda


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--audit", action="store_true")
    args = parser.parse_args()
    frames = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)

    def run(device: str):
        m = random_generator(device, args.dtype, per_pass=2)
        return m, m.features(frames, seed=5)

    _, cpu = run("cpu")
    with cuda.use(EmulatedCuda()):
        m, gpu = run("cuda")
        audit = problems(m) if args.audit else None
    print(json.dumps({
        "error": error(gpu, cpu), "kinds": sorted({n.impl for plan in m.plans.values() for n in plan.nodes}),
        "audit": audit,
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
