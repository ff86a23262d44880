"""A motion model on the emulated device beside the CPU: `python -m tests.emu.motion`, one JSON line.

CUDA nodes run on the emulator and Triton nodes in the interpreter, in plan order: TRITON_INTERPRET=1 must be set.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import numpy as np
from _motok import filled
from _motok_engine import PREFIXES, engine_of, source_of, waypoints
from _motok_tiny import tiny

from engine.models.motok.reference import MoTokReference
from engine.ops.registry import error
from engine.runtime import cuda

from .beside import problems
from .driver import EmulatedCuda


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--quant")
    parser.add_argument("--audit", action="store_true")
    args = parser.parse_args()
    # Three sampled steps: what a step does, it does in each.
    config = tiny(diffusion={"timesteps": [0, 120, 700]}, guidance={"n_last": 2, "threshold": 2})
    reference = MoTokReference(config)
    source = source_of(config, **{p: filled(getattr(reference, p), prefix) for p, prefix in PREFIXES.items()})

    def run(device: str) -> tuple[Any, dict[str, np.ndarray]]:
        m = engine_of(config, source, args.dtype, args.quant, device)
        given = waypoints(m, 40)
        masked = m.generate("walk", frames=40, constraints=given, seed=3)
        one = m.generate("wave", frames=32, planner="ar", constraints=None, seed=4)
        both = m.generate("sit", frames=40, planner="ar", constraints=given, seed=5, guidance={"solver": "project"})
        assert not isinstance(masked, list) and not isinstance(one, list) and not isinstance(both, list)
        # Two motions may part where tokens do: joints are compared for given tokens.
        told = m.decode(np.arange(10) * 3, constraints=given, seed=6)
        return m, {
            "tokens": np.concatenate([masked.tokens, one.tokens, both.tokens]), "found": m.encode(told.features),
            "noise": m._denoiser.b.x.read()[:0], "joints": told.joints, "features": told.features,
        }  # fmt: skip

    _, cpu = run("cpu")
    with cuda.use(EmulatedCuda()):
        m, gpu = run("cuda")
        audit = problems(m) if args.audit else None
    print(json.dumps({
        "same_tokens": bool(np.array_equal(cpu["tokens"], gpu["tokens"])),
        "same_codes": bool(np.array_equal(cpu["found"], gpu["found"])),
        "error": max(error(gpu[k], cpu[k]) for k in ("joints", "features")),
        "kinds": sorted({n.impl for plan in m.plans.values() for n in plan.nodes}),
        "plans": sorted(m.plans), "audit": audit,
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
