"""Real widths, five layers (MEM*E, 16 experts): decode and prefill against transformers, turns interleaved.

Both sides load the same checkpoint; the peer runs in its own environment and process and is silent while we run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from bench.report import Report
from bench.roofs import Bandwidth, arithmetic
from bench.sources import PUBLISHED, RandomSource
from bench.timing import PARK
from bench.worker import Worker
from engine.io.checkpoint import save
from engine.models.nemotron.model import Nemotron
from engine.runtime import device

ROOT = Path(__file__).resolve().parent.parent
CONFIG = dataclasses.replace(
    PUBLISHED, vocab_size=1024, pattern="MEM*E", n_routed_experts=16, max_position_embeddings=4096
)
GATE = 2e-5
PROMPT = np.random.default_rng(1).integers(0, 1024, 512).tolist()


def write_checkpoint(folder: Path) -> None:
    source = RandomSource.nemotron(CONFIG, dtype="BF16")
    (folder / "config.json").write_text(json.dumps(CONFIG.to_json()))
    save(folder / "model.safetensors", {n: (source.info(n).dtype, source.read(n)) for n in source.keys()})  # noqa: SIM118


class Peer(Worker):
    """transformers in its own process."""

    def __init__(self, folder: Path, dtype: str) -> None:
        python = Path(os.environ.get("QUINTET_PEER_TRANSFORMERS", ROOT / ".venvs/transformers/bin/python"))
        self.out = folder / f"peer-{dtype}.safetensors"
        super().__init__(
            python, "transformers_worker.py", folder, dtype, json.dumps(PROMPT), device.threads(), self.out
        )


class Ours:
    """The engine on the same checkpoint."""

    def __init__(self, folder: Path, dtype: str, quant: str | None) -> None:
        self.model = Nemotron.load(folder, dtype=dtype, quant=quant, context=2048, snapshots=0, progress=False)
        self.bytes = sum(n.nbytes for n in self.model.plans["decode"].nodes)

    def prefill(self, n: int) -> float:
        self.model._cache.clear()
        self.model.generate(PROMPT[:2], max_new_tokens=1, ignore_eos=True)  # wakes the threads, untimed
        self.model._cache.clear()
        return self.model.generate(PROMPT[:n], max_new_tokens=1, ignore_eos=True).timing.prefill

    def decode(self, steps: int) -> float:
        replay = self.model.plans["decode"].replay
        replay()
        t0 = time.perf_counter()
        for _ in range(steps):
            replay()
        return (time.perf_counter() - t0) / steps


def main(rounds: int = 9, steps: int = 8) -> None:
    report, bandwidth = Report("slice"), Bandwidth()
    peaks = arithmetic()
    print(
        f"read bandwidth {bandwidth.measure():.1f} GB/s; peaks "
        + ", ".join(f"{k} {v:.0f}" for k, v in peaks.items())
        + " GOP/s"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder)
        ours = {
            "bf16": Ours(folder, "bf16", None),
            "int8": Ours(folder, "bf16", "int8"),
            "int4": Ours(folder, "bf16", "int4"),
        }
        peer = Peer(folder, "float32")
        peer.ask(do="logits", n=64)
        logits = _load(peer.out)
        want = _log_softmax(logits)
        quality = {}
        with Nemotron.load(folder, dtype="fp32", context=64, snapshots=0, progress=False) as exact:
            got = exact.logits(PROMPT[:64]).astype(np.float64)
        error = float(np.abs(got - logits).max() / np.abs(logits).max())
        report.data["fp32_error_vs_transformers"] = error
        print(f"gate: fp32 logits within {error:.1e} of transformers' (of the largest), limit {GATE:.0e}")
        if error > GATE:
            raise SystemExit("RED: no speed")
        for key, side in ours.items():
            got = _log_softmax(side.model.logits(PROMPT[:64]).astype(np.float64))
            kl = (np.exp(want) * (want - got)).sum(1).mean()
            quality[key] = {"mean_kl": float(kl), "same_top": float((want.argmax(1) == got.argmax(1)).mean())}
        peer.ask(do="prefill", n=128)
        peer.ask(do="decode", steps=2)
        times: dict[str, list[float]] = {k: [] for k in ("transformers fp32", *ours)}
        roof: dict[str, list[float]] = {k: [] for k in ours}
        for side in ours.values():
            side.prefill(128)
        for _ in range(rounds):
            time.sleep(PARK)
            times["transformers fp32"].append(peer.ask(do="decode", steps=2))
            for key, side in ours.items():
                time.sleep(PARK)
                roof[key].append(bandwidth.measure(1))
                times[key].append(side.decode(steps))
                roof[key].append(bandwidth.measure(1))
        peer.close()
        base = np.array(times["transformers fp32"])
        for key, side in ours.items():
            t = np.array(times[key])
            pairs = np.array(roof[key]).reshape(-1, 2).max(1)
            share = float(np.median(side.bytes / t / 1e9 / pairs))
            ms = float(np.median(t) * 1e3)
            won, rate = float(np.median(base / t)), side.bytes / ms / 1e6
            q = quality[key]
            report.add(what="decode", format=key, ms=ms, bytes=side.bytes, gb_s=rate, of_bandwidth=share,
                       vs_transformers_fp32=won, **q)  # fmt: skip
            print(
                f"decode  {key:<5} {ms:8.2f} ms  {rate:5.1f} GB/s ({share:4.0%} of the read bandwidth)  transformers "
                f"fp32 x{won:.2f}  mean KL {q['mean_kl']:.1e} same top {q['same_top']:.0%}",
                flush=True,
            )
        print(f"        transformers fp32 {np.median(base) * 1e3:.1f} ms")

        peer = Peer(folder, "bfloat16")
        peer.ask(do="prefill", n=512)
        theirs: list[float] = []
        mine: dict[str, list[float]] = {k: [] for k in ours}
        for _ in range(rounds):
            time.sleep(PARK)
            theirs.append(peer.ask(do="prefill", n=512))
            for key, side in ours.items():
                time.sleep(PARK)
                mine[key].append(side.prefill(512))
        peer.close()
        flops = 2 * 512 * _macs_per_token()
        for key, times_ in mine.items():
            won = float(np.median(np.array(theirs) / np.array(times_)))
            rate = flops / float(np.median(times_)) / 1e9
            ms, share = float(np.median(times_) * 1e3), rate / peaks["bf16" if key == "bf16" else "i8"]
            report.add(what="prefill 512", format=key, ms=ms, vs_transformers_bf16=won, gflop_s=rate, of_peak=share)
            print(
                f"prefill {key:<5} {ms:8.1f} ms  {rate:6.0f} GFLOP/s ({share:4.0%} of peak)  "
                f"transformers bf16 x{won:.2f}"
            )
        print(f"        transformers bf16 {np.median(theirs) * 1e3:.1f} ms")
    report.data |= {"peaks_gop_s": peaks, "bandwidth_gb_s": bandwidth.gb_per_s}
    print("written:", report.save())


def _load(path: Path) -> np.ndarray:
    from safetensors.numpy import load_file

    return load_file(path)["logits"].astype(np.float64)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def _macs_per_token() -> int:
    """Multiply-adds of the projections, experts and head of one prompt token (spec 6.3; the scan and attention scores
    are left out, so shares of peak are understated)."""
    c = CONFIG
    mamba = c.hidden_size * (c.mamba_inner + c.conv_dim + c.mamba_num_heads) + c.mamba_inner * c.hidden_size
    heads = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    attention = c.hidden_size * heads + c.num_attention_heads * c.head_dim * c.hidden_size
    experts = 2 * c.hidden_size * (c.num_experts_per_tok * c.moe_intermediate_size + c.shared_width)
    return sum({"M": mamba, "*": attention, "E": experts + c.hidden_size * c.n_routed_experts}[k] for k in c.pattern)
