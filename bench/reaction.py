"""The reaction task with pi05-tiny and xvla-tiny: how often the ball is caught under sync, async and FASTER.

The same checkpoint runs in all modes, the same balls and the same noise; the clock is simulated with the latencies of
the paper's RTX 4060 (FASTER, arXiv 2603.19199, tables 2 and 4). `no latency` has its answer at once and asks every 4
ticks: what its eyes and its training are good for. Nothing here is a speed of this machine.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples/tiny/reaction"))

import reaction_episodes as episodes

import engine
from bench.report import Report
from engine.blocks.policy import FlowPolicy

SEED = 20_260_001  # no trainer has seen these balls
IDEAL = episodes.Mode("no latency", 0.0, 0.0, 4)


def main(names: Sequence[str] = (), count: int = 200) -> None:
    report = Report("reaction")
    flights = episodes.flights(count, SEED)
    won = sum(episodes.oracle(f).won for f in flights)
    report.add(model="oracle", mode="no latency", caught=won, episodes=count, interval=episodes.wilson(won, count))
    print(f"oracle: {won}/{count}")
    for name in names or episodes.RTX4060:
        with engine.load(name, progress=False) as model:
            assert isinstance(model, FlowPolicy)
            ask = episodes.policy(model)
            for mode in (*episodes.RTX4060[name], IDEAL):
                played = [episodes.play(ask, model.schedule, mode, f, SEED + i) for i, f in enumerate(flights)]
                caught, n = sum(e.won for e in played), len(played)
                low, high = episodes.wilson(caught, n)
                reactions = [e.reaction for e in played if np.isfinite(e.reaction)]
                by = [episodes.expert(f, model.schedule) for f in flights]
                ideal = sum(episodes.play(e, model.schedule, mode, f, 0).won for e, f in zip(by, flights))
                report.add(
                    model=name, mode=mode.name, caught=caught, episodes=n, rate=caught / n, interval=(low, high),
                    expert=ideal,
                    ttfa_ms=mode.first, delay=mode.delay, execute=mode.execute,
                    executed=episodes.executed(model.schedule, mode), reacted=len(reactions),
                    reaction_ms=float(np.mean(reactions)), requests=float(np.mean([e.requests for e in played])),
                    stalls=sum(e.stalls for e in played), schedule=str(model.schedule), seed=SEED,
                    caught_each="".join(".x"[e.won] for e in played),
                )  # fmt: skip
                print(f"{name:<10} {mode.name:<10} caught {caught:>3}/{n}, {caught / n:.1%} ({low:.1%} to {high:.1%}), "
                      f"reaction {np.mean(reactions):.0f} ms; expert {ideal}/{count}", flush=True)  # fmt: skip
    print("written:", report.save())
