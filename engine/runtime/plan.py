"""One step = one static plan: recorded once, replayed in one call.

On a CPU the plan is a tape of kernel entries that C++ walks with the GIL released; on CUDA the same recorded nodes are
launched into a CUDA graph (engine/runtime/cuda.py). Whatever changes between replays lives in arena memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine import _C
from engine.errors import PlanError
from engine.runtime import arena as _arena
from engine.runtime import cuda, device
from engine.runtime.arena import Arena
from engine.runtime.program import Program


@dataclass(frozen=True)
class NodeInfo:
    """One recorded kernel: what it is, which implementation runs, and why faster ones do not."""

    label: str
    op: str
    impl: str
    rejected: tuple[tuple[str, str], ...] = ()
    nbytes: int = 0


@dataclass
class Audit:
    """What `Plan.audit` found; `problems` is empty for a static step."""

    nodes: int
    allocations: int
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


class Plan:
    """A recorded step. `replay()` is the only call per step."""

    def __init__(self, name: str, target: str = "cpu") -> None:
        self.name = name
        self.device = target
        self.nodes: list[NodeInfo] = []
        self._tape: Any = _C.Tape() if target == "cpu" else cuda.tape(target)
        self.calls: list[Callable[[], None]] = []  # the nodes as single calls
        self._owners: dict[int, object] = {}
        self.step: Callable[[], None] | None = None  # what was captured, for the audit
        self.isa = device.isa_name()

    def __len__(self) -> int:
        return len(self.nodes)

    def __repr__(self) -> str:
        return f"Plan({self.name!r}, {len(self)} nodes)"

    def record(self, op: int, isa: int, info: NodeInfo, values: dict) -> None:
        self._tape.push(op, isa, info.label, values)
        if self.device == "cpu":
            self.calls.append(lambda: _C.run(op, isa, values))
        else:
            self.calls.append(lambda: cuda.run(op, values, self.device))
        self.nodes.append(info)

    def record_program(self, program: Program, info: NodeInfo) -> None:
        self._tape.push_program(info.label, program)
        self.calls.append(lambda: cuda.run_program(program, self.device))
        self.nodes.append(info)

    def keep(self, owners: Iterable[object]) -> None:
        """Holds the memory that recorded addresses point into."""
        self._owners.update((id(o), o) for o in owners)

    def finish(self) -> Plan:
        if self.device != "cpu":
            self._tape.capture()
        # Bound once: a replay then costs one attribute load and one call.
        self.replay = self._tape.replay  # type: ignore[method-assign]
        return self

    def replay(self) -> None:
        """Runs the step once."""
        self._tape.replay()

    def start(self) -> None:
        """Queues a replay, to be ended by `wait`. A CPU runs nothing beside its caller: there it begins with `wait`."""
        if self.device != "cpu":
            self._tape.start()

    def wait(self) -> None:
        """Until the oldest replay that was started is done; later ones may be running."""
        (self.replay if self.device == "cpu" else self._tape.wait)()

    def drain(self) -> None:
        """Ends all replays that were started."""
        if self.device != "cpu":
            self._tape.drain()

    def eager(self) -> None:
        """The same kernels with the same arguments, one call each: what `replay` must equal bit for bit."""
        for call in self.calls:
            call()

    def profile(self, repeats: int = 20) -> list[tuple[NodeInfo, float]]:
        """Median microseconds per node over `repeats` replays (each replay advances the state it works on)."""
        times = np.array([self._tape.replay_timed() for _ in range(repeats)])
        return list(zip(self.nodes, (np.median(times, axis=0) / 1e3).tolist()))

    def signature(self) -> list[tuple]:
        """Op, ISA and bound arguments of every node: equal for two captures of a static step."""
        return [self._tape.node(i) for i in range(len(self))]

    def audit(self, arena: Arena, budget: int | None = None, replays: int = 16) -> Audit:
        """Proves the step static: node budget, a second capture binds the same arguments, no allocation, replay equal
        to eager bit for bit. State buffers are restored afterwards.
        """
        result = Audit(len(self), 0)
        if budget is not None and len(self) > budget:
            result.problems.append(f"{len(self)} nodes, budget {budget}")
        buffers = arena.mutable()
        saved = {k: t.read() for k, t in buffers.items()}

        def restore() -> None:
            for k, t in buffers.items():
                t.write(saved[k])

        if self.step is not None:
            with device.on(self.device), device.use_isa(self.isa):
                again = capture(self.step, self.name)
            if again.signature() != self.signature():
                result.problems.append("a second capture binds other arguments")
        self.replay()
        replayed = {k: t.read() for k, t in buffers.items()}
        restore()
        self.eager()
        for k, t in buffers.items():
            if not np.array_equal(t.read().reshape(-1).view(np.uint8), replayed[k].reshape(-1).view(np.uint8)):
                result.problems.append(f"replay and eager differ in buffer {k!r}")
        restore()
        replayed.clear()
        self.replay()
        _heap_in_use()  # the first call allocates for itself
        taken, grown = arena.allocations, 0
        # A driver may take memory of its own now and then: on a device only what grows every time counts.
        for _ in range(1 if self.device == "cpu" else 4):
            heap = _heap_in_use()
            for _ in range(replays):
                self.replay()
            grown = _heap_in_use() - heap
            if grown <= 0:
                break
        result.allocations = arena.allocations - taken + (grown > 0)
        if result.allocations:
            result.problems.append(
                f"{grown} bytes of heap and {arena.allocations - taken} buffers taken in {replays} replays"
            )
        restore()
        return result


class _MallInfo(ctypes.Structure):
    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(n, ctypes.c_size_t) for n in _names.split()]


_mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)  # glibc >= 2.33
if _mallinfo is not None:
    _mallinfo.restype = _MallInfo


def _heap_in_use() -> int:
    if _mallinfo is None:
        return 0
    info = _mallinfo()
    return info.uordblks + info.hblkhd


def current() -> Plan | None:
    """The plan being captured on this thread."""
    return getattr(_arena._capturing, "plan", None)


@contextmanager
def _recording(plan: Plan) -> Iterator[None]:
    state = _arena._capturing
    if getattr(state, "plan", None) is not None:
        raise PlanError(f"plan {plan.name!r} is captured inside plan {state.plan.name!r}")
    state.plan, state.depth = plan, 1
    try:
        yield
    finally:
        state.plan, state.depth = None, 0


def capture(step: Callable[[], None], name: str = "step") -> Plan:
    """Records every op that `step()` calls; nothing runs. Allocating inside `step` raises PlanError.

    The plan belongs to the device of `device.on(...)`: a tape on a CPU, a CUDA graph on CUDA.
    """
    plan = Plan(name, device.target())
    with _recording(plan):
        step()
    plan.step = step
    return plan.finish()
