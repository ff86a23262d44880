"""Timing of a request by stages, and its deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from engine.errors import DeadlineError

SMOOTHING = 0.2  # of the measured stage times that deadlines are judged by
DOUBT = 0.9  # what is left of such a time once it has refused a request: refused work measures nothing


@dataclass
class Timing:
    """Milliseconds of one request since it began: T_first, T_s, T_H, and each stage by itself."""

    first: float | None = None
    enough: float | None = None
    last: float | None = None
    stages: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, float]:
        """For a server's answer: `<stage>_ms`, `first_ms`, `enough_ms`, `last_ms`."""
        out = {f"{k}_ms": v for k, v in self.stages.items()}
        marks = {"first_ms": self.first, "enough_ms": self.enough, "last_ms": self.last}
        return out | {k: v for k, v in marks.items() if v is not None}


class Clock:
    """Stages of the request that runs, what they usually take, and its deadline."""

    def __init__(self, model: str, now: Callable[[], float] = time.perf_counter) -> None:
        self._model, self.now = model, now
        self.usual: dict[str, float] = {}
        self.begin(None)

    def begin(self, deadline_ms: float | None, spent: float = 0.0) -> None:
        """`spent`: milliseconds that preprocessing took already; they count."""
        self.start, self.timing = self.now() - spent / 1e3, Timing()
        if spent:
            self.timing.stages["preprocess"] = spent
        self.deadline = deadline_ms

    @property
    def elapsed(self) -> float:
        return (self.now() - self.start) * 1e3

    @contextmanager
    def stage(self, name: str, kind: str | None = None, ahead: int = 1) -> Iterator[None]:
        """Measures; DeadlineError if the deadline would pass before the stage ends, or has passed when it ends.

        kind: of the work, where a stage of this name is not always the same amount; ahead: so many such stages are
        needed before the first action.
        """
        kind = kind or name
        usual = self.usual.get(kind, 0.0)
        times = "" if ahead == 1 else f", {ahead} times,"
        try:
            self.promise(ahead * usual, f"{name} usually takes{times}")
        except DeadlineError:
            self.usual[kind] = DOUBT * usual  # or one slow moment would refuse every request from now on
            raise
        before = self.elapsed
        yield
        took = self.elapsed - before
        if self.timing.first is None:  # later, a device works while whoever took the first action does
            usual = self.usual.get(kind, took)
            self.usual[kind] = usual + SMOOTHING * (took - usual)
        if name == "step":
            self.timing.steps.append(took)
        else:
            self.timing.stages[name] = self.timing.stages.get(name, 0.0) + took
        self.promise(0.0, f"{name} took {took:.1f} ms")

    def promise(self, ahead: float, why: str) -> None:
        """DeadlineError unless `ahead` more milliseconds fit."""
        if self.deadline is not None and self.timing.first is None and self.elapsed + ahead > self.deadline:
            more = f"{why} {ahead:.1f} ms" if ahead else why
            raise DeadlineError(
                f"model {self._model!r} has no action within {self.deadline:g} ms: {self.elapsed:.1f} ms have passed "
                f"and {more}; allow more time, load fewer views, or use a horizon-aware schedule"
            )
