"""A flow policy on the emulated device beside the CPU: `python -m tests.emu.policy pi05 FOLDER`, one JSON line.

CUDA nodes run on the emulator and Triton nodes in the interpreter, in plan order: TRITON_INTERPRET=1 must be set.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from engine.blocks.observation import ModelInput
from engine.blocks.schedule import HorizonSchedule
from engine.models import FAMILIES
from engine.ops.registry import error
from engine.runtime import cuda

from .driver import EmulatedCuda


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--quant")
    parser.add_argument("--audit", action="store_true")
    args = parser.parse_args()
    module, name = FAMILIES[args.kind]
    family = getattr(importlib.import_module(module), name)

    def request(model: Any, views: int) -> ModelInput:
        profile, c, r = model.profile_of_inputs, model.config, np.random.default_rng(views)
        size = c.vision.image_size if isinstance(c.vision.image_size, tuple) else (c.vision.image_size,) * 2
        vocab = c.vocab_size if args.kind == "pi05" else c.language.vocab_size
        length = 7 if args.kind == "pi05" else c.tokenizer_max_length
        n, width = len(profile.views), profile.action.model_dim
        return ModelInput(
            r.uniform(-1, 1, (n, *size, 3)).astype(np.float32), np.arange(n) < views,
            r.integers(3, vocab, length).astype(np.int32), np.zeros(64),
            r.standard_normal(profile.proprio_dim).astype(np.float32),
            1, r.standard_normal((1, width)).astype(np.float32), 0,
        )  # fmt: skip

    def run(device: str) -> tuple[Any, list[np.ndarray], list[list[int]]]:
        config = family.config_of(args.folder)
        schedule = HorizonSchedule(config.horizon, config.steps)
        model = family.load(args.folder, device=device, dtype=args.dtype, quant=args.quant, schedule=schedule,
                            progress=False)  # fmt: skip
        states, left = [], []
        for views in (2, 1):
            noise = np.random.default_rng(9).standard_normal(model.flow.sizes[2:]).astype(np.float32)
            packets = list(model._stream(request(model, views), noise, schedule.at(1).valid, None, schedule))
            states += [model.flow.x.read()[0], packets[-1].chunk.actions]
            left += [p.indices.tolist() for p in packets]
        return model, states, left

    _, cpu, cpu_left = run("cpu")
    with cuda.use(EmulatedCuda()):
        model, gpu, gpu_left = run("cuda")
        step = model.plans["step"]
        audit = step.audit(model.arena, budget=None, replays=1).problems if args.audit else None
    print(json.dumps({
        "error": max(error(a, b) for a, b in zip(gpu, cpu)),
        "same_rows": cpu_left == gpu_left,
        "kinds": {name: sorted({n.impl for n in plan.nodes}) for name, plan in model.plans.items()},
        "nodes": len(step),
        "audit": audit,
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
