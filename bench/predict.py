"""Predicted times of a recorded CUDA step on cards that are not here. Predictions, never measurements.

A launch takes 1.5 us, plus the longer of its bytes over the bandwidth and its operations over the peak. The bandwidth
is capped by what the resident blocks keep in flight (Little's law, `LATENCY`), wave by wave, so too few blocks or a
short last wave cost time. Registers and shared memory, which bound the resident blocks, come from the compiled kernels.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.sources import PUBLISHED
from engine.models import family
from engine.models.nemotron.config import NemotronConfig
from engine.runtime import cuda
from engine.runtime.cards import CARDS, Card, card
from engine.runtime.plan import NodeInfo

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests/evidence/resources.json"
PREDICTED = ROOT / "bench/predicted.json"  # what README.md shows
NODE = 1.5e-6  # s between kernels of a graph without overlap (anchors: 0.8 to 2 us)
LATENCY = 800e-9  # s from a load to its data under load
ARCH = {86: "86", 89: "89", 90: "90a", 120: "120a"}


@dataclass(frozen=True)
class Kernel:
    """A launch with what bounds its residence. flight: bytes that a thread has under way."""

    label: str
    name: str
    grid: int
    threads: int
    shared: int
    registers: int
    nbytes: int
    flops: int
    flight: int


def blocks_per_sm(card: Card, threads: int, registers: int, shared: int) -> int:
    """Occupancy by the limits of one SM; registers are given out in eights per thread."""
    warps = math.ceil(threads / 32)
    by_registers = card.registers // (math.ceil(registers / 8) * 8 * 32 * warps)
    by_shared = card.shared // (shared + 1024)  # the system takes 1 KiB of every block
    return min(card.blocks, card.threads // (32 * warps), by_registers, by_shared)


def seconds(k: Kernel, card: Card) -> float:
    """Of one launch, gap included."""
    per_sm = blocks_per_sm(card, k.threads, k.registers, k.shared)
    if per_sm < 1:
        raise ValueError(
            f"{k.name}: {k.registers} registers and {k.shared} bytes of shared memory do not fit {card.name}"
        )
    left, at_once, memory = k.grid, card.sms * per_sm, 0.0
    while left > 0:
        here = min(left, at_once)
        waves = left // at_once if here == at_once else 1
        rate = min(card.bandwidth, here * k.threads * k.flight / LATENCY)
        memory += waves * here * k.nbytes / k.grid / rate
        left -= waves * here
    busy = min(1.0, k.grid / card.sms)
    return NODE + max(memory, k.flops / (card.fp32 * busy))


OPERATIONS = 4  # per byte: two products and sums, of 4-bit weights; wider ones need fewer

# Bytes of weights or state that one thread has under way: what its kernel loads before it works on them.
FLIGHT = {"gemm_kernel": 128, "moe_up_kernel": 128, "moe_down_kernel": 64, "moe_route_kernel": 64, "ssm_kernel": 128,
          "split_bf16_kernel": 128, "split_f32_kernel": 16, "combine_kernel": 32, "gather_kernel": 16,
          "score_kernel": 16, "draw_kernel": 16}  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    card: Card
    quant: str
    context: int
    kernels: list[tuple[Kernel, float]]  # with seconds

    @property
    def seconds(self) -> float:
        return sum(s for _, s in self.kernels)

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes for k, _ in self.kernels)

    @property
    def floor(self) -> float:
        """Every byte once at the vendor's bandwidth, nothing else."""
        return self.nbytes / self.card.bandwidth

    def by_kernel(self) -> dict[str, dict[str, float]]:
        """Launches, microseconds and megabytes of each kernel in a step."""
        out: dict[str, dict[str, float]] = {}
        for k, s in self.kernels:
            row = out.setdefault(k.name, {"launches": 0, "us": 0.0, "mb": 0.0})
            row["launches"] += 1
            row["us"] += s * 1e6
            row["mb"] += k.nbytes / 1e6
        return {name: {k: round(v, 3) for k, v in row.items()} for name, row in out.items()}

    def summary(self) -> dict[str, Any]:
        return {"card": self.card.name, "quant": self.quant, "context": self.context, "launches": len(self.kernels),
                "ms": round(self.seconds * 1e3, 4), "floor_ms": round(self.floor * 1e3, 4),
                "kernels": self.by_kernel()}  # fmt: skip


def launches(config: dict, quant: str | None, context: int) -> list[tuple[NodeInfo, list[dict]]]:
    """Nodes of the decode step at full size and what each launches, recorded without memory or device."""
    from tests.emu.driver import EmulatedCuda, kernel_name

    driver = EmulatedCuda()
    with cuda.use(driver):
        model = family("nemotron_h").sketch(config, quant=quant, context=context, chunk=8, device="cuda")
        driver.only_trace(True)
        try:
            out = []
            for info, call in zip(model.plans["decode"].nodes, model.plans["decode"].calls, strict=True):
                driver.clear_launches()
                call()
                out.append((info, [x | {"kernel": kernel_name(driver.path, x["kernel"])} for x in driver.launches()]))
            return out
        finally:
            driver.only_trace(False)


def predict(config: dict, card: Card, quant: str | None, context: int) -> Prediction:
    """Of one decoded token with `context` tokens in the cache, drawn greedily: filters take further passes."""
    c = NemotronConfig.from_json(config)
    kv_bytes = context * c.num_key_value_heads * c.head_dim * 2 * 2  # bf16 K and V of a layer
    golden, kernels = json.loads(GOLDEN.read_text()), []
    for info, launched in launches(config, quant, math.ceil(context / 1024) * 1024):
        nbytes = kv_bytes if info.op == "attention" else info.nbytes
        for i, x in enumerate(launched):
            short = x["kernel"].split("<")[0]
            grid = math.prod(x["grid"])
            if short == "split_bf16_kernel":  # blocks beyond the context leave at once
                grid = min(grid, c.num_key_value_heads * math.ceil(context / 128))
            row = golden[f"{info.op.split('_')[0]}/cuda/{x['kernel']}/sm_{ARCH[card.sm]}"]
            share = nbytes if i == 0 else c.vocab_size * 4 if short == "draw_kernel" else 0
            kernel = Kernel(info.label, x["kernel"], grid, math.prod(x["block"]), x["shared"], row["registers"],
                            share, OPERATIONS * share, FLIGHT[short])  # fmt: skip
            kernels.append((kernel, seconds(kernel, card)))
    return Prediction(card, quant or c.torch_dtype, context, kernels)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="./run bench predict", description=__doc__)
    parser.add_argument("cards", nargs="*", default=list(CARDS))
    parser.add_argument("--ctx", type=int, default=1024)
    parser.add_argument("--quant", default="int4")
    parser.add_argument(
        "--write", action="store_true", help=f"keep all cards in {PREDICTED.name}, which README.md shows"
    )
    args = parser.parse_args(argv)
    found = [predict(PUBLISHED.to_json(), card(name), args.quant, args.ctx).summary() for name in args.cards]
    for p in found:
        print(f"\npredicted, not measured: {p['card']}, {p['quant']}, context {p['context']}, {p['launches']} launches")
        for name, k in p["kernels"].items():
            rate = k["mb"] / k["us"] * 1e3
            print(f"  {name:<24} x{k['launches']:<4} {k['us']:8.1f} us {k['mb']:9.1f} MB {rate:7.0f} GB/s")
        print(f"  step {p['ms']:.3f} ms, {1e3 / p['ms']:.0f} tokens/s; floor {p['floor_ms']:.3f} ms, "
              f"x{p['ms'] / p['floor_ms']:.3f}")  # fmt: skip
    if args.write:
        PREDICTED.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
