"""What every model offers besides its own verbs: explain, memory, profile, warmup, close, one caller at a time."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from engine.errors import BusyError, ClosedError, InputError
from engine.runtime import device
from engine.runtime.arena import Arena
from engine.runtime.plan import NodeInfo, Plan


@dataclass
class Explanation:
    """Which implementation runs each node, how weights are stored and why, and what was left out."""

    device: str
    plans: dict[str, list[NodeInfo]]
    weights: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        out = [f"runs on {self.device}"]
        for name, nodes in self.plans.items():
            out.append(f"plan {name}: {len(nodes)} nodes")
            groups: dict[tuple, list[str]] = {}
            for n in nodes:
                groups.setdefault((n.op, n.impl, n.rejected), []).append(n.label)
            for (op, impl, rejected), labels in groups.items():
                why = "; ".join(f"{name}: {reason}" for name, reason in rejected)
                out.append(
                    f"  {op:<11} {impl:<11} x{len(labels):<4} (not {why})"
                    if why
                    else f"  {op:<11} {impl:<11} x{len(labels)}"
                )
        out.append("weights:")
        out += [f"  {name:<32} {how}" for name, how in self.weights.items()]
        return "\n".join(out + self.notes)


@dataclass
class MemoryReport:
    """Bytes by part (weights, state, kv, workspace, io), all taken at load."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        rows = [f"{name:<10} {size / 1e6:12.2f} MB" for name, size in (*self.parts.items(), ("total", self.total))]
        return "\n".join(rows)


def keywords(call: Callable[..., Any], *internal: str) -> frozenset[str]:
    """Names of the keyword-only arguments of `call`, without those that callers here give."""
    found = inspect.signature(call).parameters.values()
    return frozenset(p.name for p in found if p.kind is p.KEYWORD_ONLY and p.name not in internal)


def bounded(name: str, value: object, low: int, high: int) -> int:
    """An integer option of a load in [low, high]; else InputError."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{name}={value!r} is not an integer in [{low}, {high}]")
    return value


class Model:
    """Base of every model: owns an arena and named plans."""

    def __init__(self, name: str, arena: Arena) -> None:
        self.name = name
        self.arena = arena
        self.plans: dict[str, Plan] = {}
        self.weight_notes: dict[str, str] = {}
        self.notes: list[str] = []
        self.closed = False
        self._lock = threading.Lock()
        self._open: weakref.WeakSet[Any] = weakref.WeakSet()  # streams that may hold the lock

    @classmethod
    def load_options(cls) -> frozenset[str]:
        """Names of the options that `engine.load` takes for this kind of model."""
        return keywords(cls.load, "source")  # type: ignore[attr-defined]

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.closed:
            return f"<{type(self).__name__} {self.name!r} closed>"
        plans = ", ".join(f"{n} {len(p)} nodes" for n, p in self.plans.items())
        size = self.memory().total / 1e6
        return f"<{type(self).__name__} {self.name!r} on {self.device_name}, {size:.1f} MB, plans: {plans}>"

    @property
    def device_name(self) -> str:
        target = self.arena.device
        return f"cpu/{device.isa_name()} x{device.threads()}" if target == "cpu" else target

    @contextmanager
    def _use(self) -> Iterator[None]:
        """One caller at a time: a model has one state."""
        if self.closed:
            raise ClosedError(f"model {self.name!r} is closed; load it again")
        if not self._lock.acquire(blocking=False):
            raise BusyError(
                f"model {self.name!r} is generating for another caller; wait, close its stream, or load a second model"
            )
        try:
            yield
        finally:
            self._lock.release()

    def explain(self) -> Explanation:
        return Explanation(self.device_name, {n: p.nodes for n, p in self.plans.items()}, self.weight_notes, self.notes)

    def memory(self) -> MemoryReport:
        return MemoryReport(self.arena.summary())

    def warmup(self) -> None:
        """Touches every page that a step uses."""

    def close(self) -> None:
        """Frees plans and memory; later calls raise ClosedError. Closing twice is fine; open streams end.

        Raises: BusyError while another thread is inside a call.
        """
        busy = f"model {self.name!r} is working for another thread; close it after that"
        for stream in list(self.__dict__.get("_open", ())):
            try:
                stream.close()
            except ValueError:  # the generator is running, on another thread
                raise BusyError(busy) from None
        if not self._lock.acquire(blocking=False):
            raise BusyError(busy)
        try:
            self.closed = True
            for name in set(vars(self)) - {"name", "closed", "_lock"}:
                delattr(self, name)
        finally:
            self._lock.release()

    def __getattr__(self, name: str) -> Any:
        # Only reached for what is not there: after close() that is everything.
        if self.__dict__.get("closed"):
            raise ClosedError(f"model {self.name!r} is closed; load it again")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
