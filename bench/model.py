"""nemotron-tiny: accuracy and divergence of each format beside its speed."""

from __future__ import annotations

import numpy as np

from bench import quality
from bench.report import Report

# mean KL from fp32 at most, same top-1 at least, exact answers at least
GATES = {"fp32": (0.0, 1.0, 0.95), "bf16": (1e-3, 0.99, 0.95), "int8": (2e-3, 0.98, 0.95), "int4": (1e-2, 0.96, 0.95)}
FORMATS = {"fp32": ("fp32", None), "bf16": ("bf16", None), "int8": ("bf16", "int8"), "int4": ("bf16", "int4")}


def main(problems: int = 100) -> None:
    report = Report("model")
    held = quality.held_out(problems)
    base = quality.load(dtype="fp32")
    own = quality.answers(base, held, thinking=True)
    pairs = [(prompt, new) for prompt, new, _ in own]
    for name, (dtype, quant) in FORMATS.items():
        with quality.load(quant, dtype) as model:
            on = quality.accuracy(held, quality.answers(model, held, thinking=True))["all"]
            off = quality.accuracy(held, quality.answers(model, held, thinking=False))["all"]
            kl, same = quality.divergence(base, model, pairs)
            limit = GATES[name]
            if kl > limit[0] or same < limit[1] or on < limit[2]:
                print(f"{name:<5} RED: KL {kl:.1e}, same top-1 {same:.2%}, exact {on:.1%}; no speed")
                report.add(format=name, gate="RED", mean_kl=kl, same_top=same, exact_thinking=on)
                continue
            steps: list[float] = []
            for p in held[:20]:
                steps += model.chat(p.messages, tools=p.tools, max_new_tokens=quality.ANSWER_TOKENS).timing.steps
            p50, p99 = np.percentile(steps, [50, 99]) * 1e6
            profile = sum(us for _, us in model.profile(repeats=50))
        report.add(format=name, exact_thinking=on, exact_direct=off, mean_kl=kl, same_top=same, p50_us=p50, p99_us=p99)
        print(
            f"{name:<5} exact answers {on:6.1%} thinking, {off:6.1%} direct; mean KL {kl:.1e}, same top-1 {same:.2%}; "
            f"p50 {p50:.0f} us, p99 {p99:.0f} us per token, {1e6 / p50:.0f} tokens/s ({profile:.0f} us in kernels)",
            flush=True,
        )
    base.close()
    print("written:", report.save())
