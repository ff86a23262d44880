"""nemotron-tiny on the emulated device beside the CPU: `python -m tests.emu.whole --quant int4`, one JSON line.

CUDA nodes run on the emulator and Triton nodes in the interpreter, in plan order: TRITON_INTERPRET=1 must be set.
"""

from __future__ import annotations

import argparse
import json
import sys

import engine
from engine.ops.registry import error
from engine.runtime import cuda

from .driver import EmulatedCuda

PROMPT = "What is 612 - 247? Think step by step, then answer with the number."


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quant")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--build", default="plain")
    parser.add_argument("--audit", action="store_true")
    args = parser.parse_args()
    options = {"quant": args.quant, "dtype": args.dtype, "context": 256, "chunk": args.chunk, "snapshots": 1}

    def run(device: str) -> dict:
        with engine.load("nemotron-tiny", device=device, **options) as m:
            prompt = m.tokenize(PROMPT)
            tokens = m.generate(prompt, max_new_tokens=16, ignore_eos=True).tokens
            drawn = m.generate(prompt, max_new_tokens=16, ignore_eos=True, temperature=0.8, top_p=0.9, seed=5).tokens
            out = {"tokens": tokens, "drawn": drawn, "logits": m.logits([*prompt, *tokens])}
            if device != "cpu":
                out["prefill"] = [n.impl for n in m.plans["prefill"].nodes]
                out["decode"] = [n.impl for n in m.plans["decode"].nodes]
                if args.audit:
                    audit = m.plans["decode"].audit(m.arena, budget=m.node_budget, replays=2)
                    out["audit"] = audit.problems
            return out

    cpu = run("cpu")
    with cuda.use(EmulatedCuda(args.build)):
        gpu = run("cuda")
    found = {
        "tokens": gpu["tokens"],
        "same_tokens": cpu["tokens"] == gpu["tokens"],
        "same_drawn": cpu["drawn"] == gpu["drawn"],
        "error": error(gpu["logits"], cpu["logits"]),
        "audit": gpu.get("audit"),
        "prefill": sorted(set(gpu["prefill"])),
        "decode": sorted(set(gpu["decode"])),
    }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
