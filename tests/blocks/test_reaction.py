"""The model of reaction time, against the published tables."""

from __future__ import annotations

import numpy as np
import pytest

from engine.blocks.reaction import Reaction, asynchronous, delay, due, min_execute, plot, stalls, streaming, sync
from engine.errors import InputError

# Latency, s, first action, s of FASTER. Source: FASTER, table 2; 30 Hz.
RUNS = {
    "pi0.5 4090": (80.0, 3, 62.1, 3),
    "pi0.5 4060": (303.3, 10, 238.6, 8),
    "X-VLA 4090": (113.7, 4, 44.8, 2),
    "X-VLA 4060": (399.5, 12, 129.2, 6),
}
MEANS = {
    "pi0.5 4090": "170.0 130.0 112.1",
    "pi0.5 4060": "621.6 470.0 371.9",
    "X-VLA 4090": "237.2 180.4 78.1",
    "X-VLA 4060": "799.2 599.5 229.2",
}
# P(async < sync), P(FASTER < sync), P(FASTER < async); table 3.
WINS = {
    "pi0.5 4090": ".72 .81 .66",
    "pi0.5 4060": ".74 .88 .77",
    "X-VLA 4090": ".73 1 1",
    "X-VLA 4060": ".75 1 1",
}
# Table 7.
INTERVALS = {
    "pi0.5 4090": "80.0-260.0 80.0-180.0 62.1-162.1",
    "pi0.5 4060": "303.3-939.9 303.3-636.6 238.6-505.3",
    "X-VLA 4090": "113.7-360.7 113.7-247.0 44.8-111.5",
    "X-VLA 4060": "399.5-1199.0 399.5-799.5 129.2-329.2",
}


def modes(run):
    latency, s, first, s_streaming = RUNS[run]
    return sync(latency, s), asynchronous(latency, s), streaming(first, s_streaming)


def close(printed, value):
    """`value` rounds to what is printed; both neighbours where it lies in the middle."""
    digits = len(printed.partition(".")[2])
    return abs(float(printed) - value) <= 0.5 * 10**-digits + 1e-9


@pytest.mark.parametrize("run", RUNS)
def test_expected_reaction(run):
    for printed, mode in zip(MEANS[run].split(), modes(run), strict=True):
        assert close(printed, mode.mean), (printed, mode)


@pytest.mark.parametrize("run", RUNS)
def test_win_probabilities(run):
    s, a, f = modes(run)
    for printed, value in zip(WINS[run].split(), (a.beats(s), f.beats(s), f.beats(a)), strict=True):
        assert close(printed, value), (printed, value)


@pytest.mark.parametrize("run", RUNS)
def test_intervals(run):
    for printed, mode in zip(INTERVALS[run].split(), modes(run), strict=True):
        low, high = printed.split("-")
        assert close(low, mode.low) and close(high, mode.high), (printed, mode)


def test_fewest_actions():
    assert [min_execute(RUNS[run][0]) for run in RUNS] == [3, 10, 4, 12]
    # FASTER: when the last executed action is there; table 4 and what follows from its steps.
    assert [min_execute(77.1), min_execute(52.0), min_execute(186.8)] == [3, 2, 6]
    assert min_execute(100.0) == 3 and min_execute(100.1) == 4 and min_execute(0) == 1


def test_worked_example():
    s, a, f = modes("pi0.5 4090")
    assert (f.beats(a), f.beats(s), a.beats(s)) == pytest.approx((0.6630, 0.8128, 0.7222), abs=5e-5)
    assert a.variance == pytest.approx(100**2 / 12) and a.quantile(0.9) == pytest.approx(170)
    assert str(f) == "FASTER: U(62.1, 162.1) ms, mean 112.1"


def test_probability_against_integration():
    r = np.random.default_rng(0)
    for _ in range(200):
        a, c = r.uniform(0, 100, 2)
        x, y = Reaction("x", a, a + r.uniform(1, 100)), Reaction("y", c, c + r.uniform(1, 100))
        grid = x.low + (np.arange(20_000) + 0.5) / 20_000 * x.interval
        survival = np.clip((y.high - grid) / y.interval, 0, 1)
        assert x.beats(y) == pytest.approx(survival.mean(), abs=1e-6)
        assert x.beats(y) + y.beats(x) == pytest.approx(1)


def test_delay():
    assert [delay(t) for t in (0, 20, 33.4, 62.1, 80, 238.6)] == [0, 0, 1, 1, 2, 7]
    assert delay(100.0) == 2, "exactly on a tick is in time"
    assert delay(62.1, margin=1) == 2


def test_no_stall_condition():
    assert [due(i) for i in (1, 2, 3)] == pytest.approx([66.7, 100, 133.3], abs=0.05)
    arrival = [0, 62.1, 70.2, 77.1, 90, 200]
    assert stalls(arrival, 1, 3) == [] and stalls(arrival, 0, 1) == [] and stalls([50, *arrival[1:]], 0, 2) == [0]
    assert stalls([0, 0, 0, 0, 90, 250], 4, 2) == [5]
    assert stalls([0, float("nan")], 1, 1) == [1]


@pytest.mark.parametrize(
    "call",
    [
        lambda: sync(-1, 3), lambda: sync(80, 0), lambda: sync(80, 3, 0), lambda: sync(float("nan"), 3),
        lambda: sync(80, 3.0), lambda: stalls([0, 1], 1, 2), lambda: Reaction("x", 2, 2), lambda: min_execute(-1),
        lambda: delay(1, margin=-1), lambda: Reaction("x", 0, 1).quantile(1.1), lambda: plot([], "x.png"),
    ],
)  # fmt: skip
def test_bad_values(call):
    with pytest.raises(InputError):
        call()


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "reaction.svg"
    plot(modes("pi0.5 4090"), path)
    assert "<svg" in path.read_text()[:2000]
