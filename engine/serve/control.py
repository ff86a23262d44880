"""Buffers of a control loop that executes one chunk while the next is inferred. No clock, no threads, no network.

A chunk of H actions begins with d committed ones, which the robot executes while the chunk is inferred, and gives s
more. The last d of these are the committed ones of the next chunk. Source: FASTER, section 4 (streaming client).

>>> buffers = ControlBuffers(execute=4, horizon=50)
>>> request = buffers.request()            # when not None: observe, send delay, prefix and ticket
>>> buffers.push(request, [0], [[0.1]])    # as packets arrive
>>> buffers.tick().action                  # once per control period
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.errors import DeadlineError, InputError

ON_MISS = ("hold", "none", "raise")


class DelayEstimate:
    """Ticks that pass between a request and its first action, from the last requests; single spikes are left out.

    Args:
        margin: ticks added for jitter.
        window: requests that count; the largest fifth of them is ignored.
    """

    def __init__(self, margin: int = 0, window: int = 10):
        self._margin = margin
        self._first = 0
        self._warm = False
        self._ticks: deque[int] = deque(maxlen=window)

    def add(self, ticks: int) -> None:
        """One measurement; the very first may hold a warm-up and counts only until there is another."""
        if self._warm:
            self._ticks.append(ticks)
        else:
            self._warm, self._first = True, ticks

    @property
    def value(self) -> int:
        """Delay to ask for; the margin alone before anything was measured."""
        if not self._ticks:
            return self._first + self._margin
        order = sorted(self._ticks)
        return order[math.ceil(0.8 * len(order)) - 1] + self._margin


@dataclass(frozen=True, eq=False)
class ChunkRequest:
    """What the next request carries; also the ticket that its packets come back with.

    Attributes:
        episode: changes with every reset.
        number: counts requests of the episode, from 0.
        delay: d; 0 for the first of an episode.
        prefix: [d, A] fp32, the committed actions, robot units; None where d is 0.
        actions: s, after which the server may stop.
    """

    episode: int
    number: int
    delay: int
    prefix: np.ndarray | None
    actions: int


@dataclass(frozen=True, eq=False)
class Tick:
    """What to do in one control period.

    Attributes:
        action: [A] fp32, robot units; None: nothing to execute.
        missed: the action that was due has not arrived.
        index: place in its chunk; -1 where missed.
        number: the chunk's request; -1 where missed.
    """

    action: np.ndarray | None
    missed: bool
    index: int = -1
    number: int = -1


@dataclass(eq=False)
class _Chunk:
    """Actions of one request: rows[i] is chunk index delay + i, None until it arrives; `count` of them are executed."""

    request: ChunkRequest
    count: int
    sent_at: int
    rows: list[np.ndarray | None] = field(default_factory=list)
    consumed: int = 0
    started: bool = False

    def __post_init__(self) -> None:
        self.rows = [None] * self.count

    @property
    def complete(self) -> bool:
        return all(row is not None for row in self.rows[: self.count])

    def cut(self) -> None:
        """Nothing more will come: execute the unbroken head of what is there."""
        self.count = next((i for i, row in enumerate(self.rows[: self.count]) if row is None), self.count)


class ControlBuffers:
    """The two buffers *current* and *next*. Not thread-safe: hold one lock around every call.

    Args:
        execute: s, actions executed of each chunk.
        horizon: H of the policy; delay + execute must not exceed it.
        delay: committed actions; None measures them in consumed ticks.
        max_delay: most that the policy was trained for.
        margin: ticks added to a measured delay.
        on_miss: 'hold' repeats the last action, 'none' gives None, 'raise' raises DeadlineError.

    Raises:
        InputError: a value out of range.

    Attributes:
        misses, stale: ticks without their action, packets of an earlier episode or an abandoned request.
    """

    def __init__(
        self,
        execute: int,
        horizon: int,
        *,
        delay: int | None = None,
        max_delay: int = 10,
        margin: int = 0,
        on_miss: str = "hold",
    ):
        lowest = {"execute": (execute, 1), "horizon": (horizon, 1), "max_delay": (max_delay, 0), "margin": (margin, 0)}
        for name, (value, low) in lowest.items():
            if type(value) is not int or value < low:
                raise InputError(f"{name}={value!r} is not an integer of at least {low}")
        if delay is not None and (type(delay) is not int or not 0 <= delay <= max_delay):
            raise InputError(f"delay={delay!r} is not an integer in [0, {max_delay}]")
        if execute + (delay or 0) > horizon:
            raise InputError(f"execute {execute} + delay {delay or 0} exceed the horizon of {horizon}; execute fewer")
        if delay is not None and delay > execute:
            raise InputError(f"delay {delay} exceeds execute {execute}: there are not that many actions to commit")
        if on_miss not in ON_MISS:
            raise InputError(f"on_miss={on_miss!r} is not known; there are {', '.join(ON_MISS)}")
        self.execute, self.horizon, self.on_miss = execute, horizon, on_miss
        self._fixed, self._max_delay = delay, min(max_delay, execute, horizon - execute)
        self._estimate = DelayEstimate(margin)
        self.misses = self.stale = 0
        self._episode = -1
        self.reset()

    def reset(self) -> int:
        """Begin an episode: buffers empty, packets on their way become stale. Returns its id."""
        self._episode += 1
        self._number = 0
        self._ticks = 0
        self._current: _Chunk | None = None
        self._next: _Chunk | None = None
        self._last: np.ndarray | None = None
        return self._episode

    @property
    def delay(self) -> int:
        """Committed actions of the next request: given, or measured."""
        return self._fixed if self._fixed is not None else min(self._estimate.value, self._max_delay)

    def request(self) -> ChunkRequest | None:
        """The next request if it is time, else None. After it, send it at once: its delay counts from this tick.

        The first of an episode goes out immediately. Later ones wait until the current chunk has all its s actions, and
        no more than `delay` of them are left. If fewer are left, because actions came late, the prefix is still the
        last `delay`: some of it has been executed, and the places of the two chunks line up.
        """
        current = self._current
        if current is None:
            self._current = self._new(0, None)
            return self._current.request
        if self._next is not None or not current.complete:
            return None
        delay = min(self.delay, current.count)
        if current.count - current.consumed > delay:
            return None
        rows = [row for row in current.rows[current.count - delay : current.count] if row is not None]
        self._next = self._new(delay, np.stack(rows) if rows else None)
        request = self._next.request
        self._swap()
        return request

    def push(self, request: ChunkRequest, indices: Sequence[int] | np.ndarray, actions: Any) -> bool:
        """Take a packet: actions [k, A] at chunk places `indices` [k]. False: stale, dropped.

        Raises:
            InputError: another number of indices than actions.
        """
        chunk = self._find(request)
        if chunk is None:
            self.stale += 1
            return False
        rows = np.asarray(actions, np.float32)
        if rows.ndim != 2 or len(rows) != len(indices):
            raise InputError(f"{len(indices)} indices for actions of shape {list(rows.shape)}")
        for index, row in zip(indices, rows, strict=True):
            place = int(index) - request.delay
            # A streamed action is final; what a later frame says about it, or beyond s, is not executed.
            if 0 <= place < chunk.count and chunk.rows[place] is None:
                if not chunk.started:
                    chunk.started = True
                    self._estimate.add(self._ticks - chunk.sent_at)
                chunk.rows[place] = row.copy()
        return True

    def finish(self, request: ChunkRequest) -> None:
        """Nothing more comes for this request (final packet, or an error): what is missing will not be waited for."""
        chunk = self._find(request)
        if chunk is None:
            return
        chunk.cut()
        if chunk.count == 0:  # nothing arrived: ask again
            if chunk is self._next:
                self._next = None
            else:
                self._current, self._next = self._next, None
        self._swap()

    def tick(self) -> Tick:
        """One control period: the action that is due, or what `on_miss` says.

        Raises:
            DeadlineError: it is missing and `on_miss` is 'raise'.
        """
        self._swap()
        self._ticks += 1
        chunk = self._current
        row = chunk.rows[chunk.consumed] if chunk is not None and chunk.consumed < chunk.count else None
        if chunk is None or row is None:
            return self._miss()
        made = Tick(row, False, chunk.request.delay + chunk.consumed, chunk.request.number)
        chunk.consumed += 1
        self._last = row
        self._swap()
        return made

    def _miss(self) -> Tick:
        self.misses += 1
        if self.on_miss == "raise":
            raise DeadlineError("the action of this tick has not arrived; raise delay, or execute more of each chunk")
        return Tick(self._last if self.on_miss == "hold" else None, True)

    def _new(self, delay: int, prefix: np.ndarray | None) -> _Chunk:
        request = ChunkRequest(self._episode, self._number, delay, prefix, self.execute)
        self._number += 1
        return _Chunk(request, self.execute, self._ticks)

    def _find(self, request: ChunkRequest) -> _Chunk | None:
        return next((c for c in (self._current, self._next) if c is not None and c.request is request), None)

    def _swap(self) -> None:
        current = self._current
        if current is not None and current.consumed >= current.count and self._next is not None:
            self._current, self._next = self._next, None
