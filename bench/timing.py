"""Fair timing on a shared machine: turns are interleaved, figures are medians of pair ratios."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

PARK = 0.03  # seconds between turns: OpenMP workers of the other side spin for some milliseconds before they sleep


@dataclass(frozen=True)
class Times:
    """Seconds per call of one contestant, one entry per round."""

    seconds: np.ndarray

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def row(self) -> dict[str, float]:
        p50, p99 = np.percentile(self.seconds, [50, 99])
        return {"p50_us": float(p50 * 1e6), "p99_us": float(p99 * 1e6), "min_us": float(self.seconds.min() * 1e6)}


def once(call: Callable[[], object], repeats: int) -> float:
    t0 = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - t0) / repeats


def interleave(
    calls: Mapping[str, Callable[[], object]], rounds: int = 15, turn: float = 0.02, limit: float = 20.0, least: int = 5
) -> dict[str, Times]:
    """Each round gives every contestant a turn of about `turn` seconds; `least` rounds, then up to `limit` seconds."""
    repeats = {}
    for name, call in calls.items():
        first = once(call, 1)
        time.sleep(PARK)
        # A long first call is estimate enough; a short one is mostly warm-up.
        repeats[name] = 1 if first > 0.2 else max(1, int(turn / max(once(call, 2), 1e-7)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for n in range(rounds):
        for name, call in calls.items():
            time.sleep(PARK)
            if repeats[name] > 1:
                call()  # wakes this side's threads, untimed
            seconds[name].append(once(call, repeats[name]))
        if n >= least - 1 and time.perf_counter() - start > limit:
            break
    return {name: Times(np.array(s)) for name, s in seconds.items()}


def ratio(opponent: Times, ours: Times) -> float:
    """How many times faster we are: the median of the rounds' ratios."""
    return float(np.median(opponent.seconds / ours.seconds))
