"""How fast a policy reacts, from its latencies: a model of three ways to run it, and what each of them needs.

An event happens at a random moment between two observations. With trigger interval I and latency L the robot begins to
act on it after L plus what is left of the interval, uniform in [L, L + I]. Source: FASTER, section 3.1, tables 2, 3, 7.

All times are milliseconds, all rates Hz.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import InputError

MAX_MS = 1e7


@dataclass(frozen=True)
class Reaction:
    """Reaction time of one mode, uniform in [low, high] ms.

    Attributes:
        name: for tables and plots.
        low: latency until the first action, in ms.
        high: low plus the trigger interval, in ms.
    """

    name: str
    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= MAX_MS:
            raise InputError(f"{self.name}: reaction from {self.low:g} to {self.high:g} ms; 0 <= low < high is needed")

    @property
    def interval(self) -> float:
        """Trigger interval in ms."""
        return self.high - self.low

    @property
    def mean(self) -> float:
        """Expected reaction time in ms."""
        return (self.low + self.high) / 2

    @property
    def variance(self) -> float:
        """In ms^2."""
        return self.interval**2 / 12

    def quantile(self, q: float) -> float:
        """Reaction time in ms that a share q in [0, 1] of events does not exceed."""
        if not 0 <= q <= 1:
            raise InputError(f"q={q!r} is outside [0, 1]")
        return self.low + q * self.interval

    def beats(self, other: Reaction) -> float:
        """P(self < other) for independent events, in closed form."""
        # The survival of `other` is 1 before c, falls linearly to 0 at e, and is integrated over [a, b] piece by piece.
        a, b, c, e = self.low, self.high, other.low, other.high
        flat = max(0.0, min(b, c) - a)
        left, right = min(max(a, c), e), min(max(b, c), e)
        slope = ((e - left) ** 2 - (e - right) ** 2) / (2 * (e - c))
        return (flat + slope) / (b - a)

    def __str__(self) -> str:
        return f"{self.name}: U({self.low:.1f}, {self.high:.1f}) ms, mean {self.mean:.1f}"


def sync(latency: float, execute: int, rate: float = 30.0) -> Reaction:
    """The robot stands still while the policy works: observations come every latency + s / rate."""
    return Reaction("sync", latency, 2 * latency + _busy(latency, execute, rate))


def asynchronous(latency: float, execute: int, rate: float = 30.0) -> Reaction:
    """Inference runs beside execution: observations come every s / rate."""
    return Reaction("async", latency, latency + _busy(latency, execute, rate))


def streaming(first: float, execute: int, rate: float = 30.0) -> Reaction:
    """As `asynchronous`, but the first action leaves after `first` ms: FASTER."""
    return Reaction("FASTER", first, first + _busy(first, execute, rate))


def min_execute(done: float, rate: float = 30.0) -> int:
    """s_min: fewest actions per chunk that keep up, if all of them are there `done` ms after the observation."""
    return max(1, math.ceil(_ticks(done, rate)))


def delay(first: float, rate: float = 30.0, margin: int = 0) -> int:
    """d: actions that are executed before the first of a request arrives, plus `margin` for jitter."""
    if type(margin) is not int or margin < 0:
        raise InputError(f"margin={margin!r} is not an integer of at least 0")
    # An arrival exactly on a tick is in time for it.
    return max(0, math.ceil(_ticks(first, rate)) - 1) + margin


def due(index: int, rate: float = 30.0) -> float:
    """When action `index` of a chunk is executed, in ms after its observation."""
    return (index + 1) * 1e3 / _rate(rate)


def stalls(arrival: Sequence[float], committed: int, execute: int, rate: float = 30.0) -> list[int]:
    """Places of the chunk whose action comes after it is due; empty: the robot never waits.

    Args:
        arrival: [H] ms after the observation for each action; those of committed ones are not looked at.
        committed: d.
        execute: s.
        rate: of the control loop.

    Raises:
        InputError: d + s exceed the chunk.
    """
    if committed < 0 or execute < 1 or committed + execute > len(arrival):
        raise InputError(f"delay {committed} + execute {execute} do not fit a chunk of {len(arrival)} actions")
    return [i for i in range(committed, committed + execute) if not arrival[i] <= due(i, rate)]


def plot(modes: Sequence[Reaction], path: str | os.PathLike[str], title: str = "Reaction time") -> None:
    """Draw the cumulative distributions into an image file (format by its suffix).

    Raises:
        InputError: nothing to draw, or the package matplotlib is missing.
    """
    if not modes:
        raise InputError("no mode to plot")
    figure_class = _matplotlib()
    figure = figure_class(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    end = 1.05 * max(mode.high for mode in modes)
    for mode in modes:
        (line,) = axes.plot([0, mode.low, mode.high, end], [0, 0, 1, 1], label=str(mode))
        axes.axvline(mode.mean, color=line.get_color(), linestyle=":", linewidth=1)
    axes.set(xlabel="ms after the event", ylabel="share of events that the robot reacts to", title=title, xlim=(0, end))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path)


def _busy(latency: float, execute: int, rate: float) -> float:
    """Duration in ms of executing s actions."""
    if not 0 <= latency <= MAX_MS:
        raise InputError(f"latency={latency!r} is not a number of milliseconds from 0 to {MAX_MS:g}")
    if type(execute) is not int or execute < 1:
        raise InputError(f"execute={execute!r} is not an integer of at least 1")
    return execute * 1e3 / _rate(rate)


def _ticks(ms: float, rate: float) -> float:
    if not 0 <= ms <= MAX_MS:
        raise InputError(f"{ms!r} is not a number of milliseconds from 0 to {MAX_MS:g}")
    ticks = ms * _rate(rate) / 1e3
    # 100 ms at 30 Hz are 3 ticks, not 3.0000000000000004.
    return float(round(ticks)) if abs(ticks - round(ticks)) < 1e-9 else ticks


def _rate(rate: float) -> float:
    if not 0 < rate <= 1e6:
        raise InputError(f"rate={rate!r} is not a number of Hz above 0")
    return rate


def _matplotlib() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as fault:
        raise InputError("plots need the package matplotlib: pip install 'quintet-engine[plot]'") from fault
    return Figure
