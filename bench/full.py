"""The published configuration at int4 with weights from a lazily generated source: load, generate, peak memory."""

from __future__ import annotations

import resource
import time

import numpy as np

from bench.report import Report
from bench.roofs import Bandwidth
from bench.sources import PUBLISHED, RandomSource
from engine.models.nemotron.model import Nemotron


def peak_rss() -> float:
    """GB, of this process since it started."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main(quant: str = "int4", tokens: int = 32, context: int = 2048) -> None:
    report, bandwidth = Report("full"), Bandwidth()
    print(f"read bandwidth {bandwidth.measure():.1f} GB/s")
    bandwidth.release()  # its gigabyte would count as ours
    t0 = time.perf_counter()
    model = Nemotron(
        PUBLISHED,
        RandomSource.nemotron(PUBLISHED),
        name="nemotron-cascade-2 (random weights)",
        quant=quant,
        context=context,
        snapshots=1,
    )
    loaded = time.perf_counter() - t0
    print(f"{model!r}\nloaded in {loaded:.0f} s\n{model.memory()}")
    prompt = np.random.default_rng(0).integers(20, 131072, 128).tolist()
    result = model.generate(prompt, max_new_tokens=tokens, ignore_eos=True)
    rss = peak_rss()
    t = result.timing
    moved = sum(n.nbytes for n in model.plans["decode"].nodes)
    p50, p99 = t.percentile(50), t.percentile(99)
    rate = moved / np.median(t.steps) / 1e9
    report.add(
        quant=quant, load_s=loaded, prompt=len(prompt), prefill_s=t.prefill, tokens_per_s=t.tokens_per_second,
        p50_ms=p50, p99_ms=p99, bytes_per_token=moved, gb_s=rate, peak_rss_gb=rss,
    )  # fmt: skip
    print(
        f"prompt of {len(prompt)} tokens in {t.prefill:.2f} s; {len(result.tokens)} new at {t.tokens_per_second:.2f}/s"
    )
    print(f"p50 {p50:.1f} ms, {moved / 1e9:.2f} GB per token, {rate:.1f} GB/s; peak RSS {rss:.2f} GB")
    model.close()
    print(f"read bandwidth {bandwidth.measure():.1f} GB/s")
    report.data["bandwidth_gb_s"] = bandwidth.gb_per_s
    print("written:", report.save())
