"""Horizon-aware flow sampling: which action is denoised how far at each step, and when it may leave.

A chunk of H actions is integrated in N network calls. Each action i has a flow time of its own: it *hits* zero when the
global time rho falls to u_i, so the first actions are finished after one call and the last after all N. The constant
schedule of ordinary flow sampling is u0 = 0. Time 1 is noise, time 0 the clean action. Source: FASTER, section 3.
"""

from __future__ import annotations

import functools
import math
import numbers
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from engine.errors import InputError, ScheduleWarning

#: A network call for the reference samplers: (x [H, A], tau [H]) -> velocity or clean action, [H, A].
Net = Callable[[np.ndarray, np.ndarray], np.ndarray]

MAX_HORIZON = 4096
MAX_STEPS = 1000
# Two roundings of fp32 at most; a time below it is the zero that it stands for, and the action is finished.
_ZERO = 1e-6


@dataclass(frozen=True)
class HorizonSchedule:
    """The schedule of one policy, for every delay.

    alpha and u0 must be those of the training; no published checkpoint stores them.

    Args:
        horizon: H, actions of a chunk, 1 to 4096.
        steps: N, network calls of a chunk, 1 to 1000.
        alpha: exponent in [0, 1]; smaller refines the middle of the chunk longer, 0 is the constant schedule.
        u0: hit time of the first action, in [0, 1); 0 is the constant schedule. At u0 >= (N - 1) / N the first action
            needs one call.
        ready_threshold: an action leaves when its flow time is below this, in [0, 1); 0 waits for exactly clean.

    Raises:
        InputError: a value out of these ranges.
    """

    horizon: int
    steps: int = 10
    alpha: float = 0.6
    u0: float = 0.9
    ready_threshold: float = 0.01

    def __post_init__(self) -> None:
        for name, high in (("horizon", MAX_HORIZON), ("steps", MAX_STEPS)):
            object.__setattr__(self, name, _integer(name, getattr(self, name), 1, high))
        for name in ("alpha", "u0", "ready_threshold"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(float(value)):
                raise InputError(f"{name}={value!r} is not a finite number")
            object.__setattr__(self, name, float(value))
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha={self.alpha:g} is outside [0, 1]; the published policies use 0.6 or 0.7")
        if not 0 <= self.u0 < 1:
            raise InputError(
                f"u0={self.u0:g} is outside [0, 1); 1 would divide by zero, the published policies use 0.9"
            )
        if not 0 <= self.ready_threshold < 1:
            raise InputError(f"ready_threshold={self.ready_threshold:g} is outside [0, 1); 0.01 is the published value")

    @classmethod
    def constant(cls, horizon: int, steps: int = 10) -> HorizonSchedule:
        """Ordinary flow sampling: every action has the global time."""
        return cls(horizon, steps, alpha=0.0, u0=0.0)

    @property
    def is_constant(self) -> bool:
        """All actions are finished together, by the last step."""
        return self.u0 == 0 or self.alpha == 0

    def replace(self, **changes: float) -> HorizonSchedule:
        """A copy with other values, checked again."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def at(self, delay: int = 0) -> ScheduleTable:
        """The table for a chunk whose first `delay` actions are committed already; kept for the delays used last.

        Raises:
            InputError: `delay` is not an integer in [0, horizon).
        """
        return _table(self, _integer("delay", delay, 0, self.horizon - 1))

    def __str__(self) -> str:
        kind = "constant" if self.is_constant else f"horizon-aware, alpha {self.alpha:g}, u0 {self.u0:g}"
        return f"{kind}: {self.horizon} actions in {self.steps} steps, ready below {self.ready_threshold:g}"


@dataclass(frozen=True, eq=False)
class ScheduleTable:
    """A schedule worked out for one delay. Arrays are read-only; steps count from 1.

    Attributes:
        schedule, delay: what it was made from.
        hit: [H] fp64, global time at which each action is finished; u0 for the committed ones, which it does not move.
        tau: [N + 1, H] fp32, flow time of each action before step 1, ..., after step N. 0 for committed actions.
        delta: [N, H] fp32, tau[j + 1] - tau[j]: what one step integrates, never positive.
        ready_step: [H] int32, the step after which an action leaves; 0 for committed ones. Never falls with i.
        values: [U] fp32, the distinct flow times that the network sees, rising.
        rows: [N, H] int32, values[rows] == tau[:N]: the row of each token in a table made once per distinct time.
    """

    schedule: HorizonSchedule
    delay: int
    hit: np.ndarray
    tau: np.ndarray
    delta: np.ndarray
    ready_step: np.ndarray
    values: np.ndarray
    rows: np.ndarray

    @property
    def valid(self) -> int:
        """Actions that this chunk adds: H - delay."""
        return self.schedule.horizon - self.delay

    def emitted(self, step: int) -> np.ndarray:
        """Indices [k] int64 that leave after `step` (1..N), rising; may be empty."""
        step = _integer("step", step, 1, self.schedule.steps)
        return np.flatnonzero(self.ready_step == step)

    def steps_for(self, actions: int | None = None) -> int:
        """Network calls until `actions` (all, if None) have left: known before the first call.

        Raises:
            InputError: not an integer in [1, H - delay].
        """
        return int(self.ready_step[self.delay + self._count(actions) - 1])

    def packets(self, actions: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """(step, indices) of every step that emits something, the last cut so that exactly `actions` leave."""
        count = self._count(actions)
        for step in range(1, self.steps_for(count) + 1):
            indices = self.emitted(step)
            indices = indices[indices < self.delay + count]
            if len(indices):
                yield step, indices

    def _count(self, actions: int | None) -> int:
        if actions is None:
            return self.valid
        if isinstance(actions, bool) or not isinstance(actions, numbers.Integral) or not 1 <= actions <= self.valid:
            raise InputError(
                f"actions={actions!r} is not an integer in [1, {self.valid}]: a chunk of {self.schedule.horizon} with "
                f"{self.delay} committed has {self.valid} to give"
            )
        return int(actions)


@functools.lru_cache(maxsize=64)
def _table(schedule: HorizonSchedule, delay: int) -> ScheduleTable:
    h, n = schedule.horizon, schedule.steps
    place = np.maximum(np.arange(h) - delay, 0) / max(h - 1 - delay, 1)
    hit = (1.0 - place**schedule.alpha) * schedule.u0
    rho = 1.0 - np.arange(n + 1) / n
    tau = np.clip((rho[:, None] - hit) / (1.0 - hit), 0.0, 1.0)
    tau[tau < _ZERO] = 0.0
    tau[:, :delay] = 0.0
    tau32 = tau.astype(np.float32)
    ready = (tau32[1:] < np.float32(schedule.ready_threshold)) | (tau32[1:] == 0)
    ready_step = (np.argmax(ready, axis=0) + 1).astype(np.int32)
    ready_step[:delay] = 0
    values, rows = np.unique(tau32[:n], return_inverse=True)
    arrays = (hit, tau32, np.diff(tau32, axis=0), ready_step, values, rows.reshape(n, h).astype(np.int32))
    for array in arrays:
        array.flags.writeable = False
    return ScheduleTable(schedule, delay, *arrays)


def euler(net: Net, noise: np.ndarray, table: ScheduleTable, prefix: np.ndarray | None = None) -> np.ndarray:
    """Reference sampler for networks that predict a velocity: x += delta * v, the prefix written before every call.

    Args:
        net: velocity of (x [H, A], tau [H] fp32).
        noise: [H, A] float, the start; its dtype is the dtype of the computation.
        table: schedule and delay d.
        prefix: [d, A], the committed actions in model space; needed where d > 0.

    Returns:
        [N, H, A]: x after every step. Action i leaves with the value [ready_step[i] - 1, i].

    Raises:
        InputError: shapes that do not fit the table.
    """
    x, prefix = _start(noise, table, prefix)
    trace = np.empty((table.schedule.steps, *x.shape), x.dtype)
    for j in range(table.schedule.steps):
        x[: table.delay] = prefix
        x += table.delta[j][:, None].astype(x.dtype) * net(x.copy(), table.tau[j])
        trace[j] = x
    return trace


def renoise(net: Net, noise: np.ndarray, table: ScheduleTable, prefix: np.ndarray | None = None) -> np.ndarray:
    """Reference sampler for networks that predict the clean action: x = noise * tau + a * (1 - tau), noise kept.

    Finished actions stay as they are and are fed back clean. Arguments and errors as in `euler`.

    Returns:
        [N, H, A]: the predictions a after every step, the prefix in its first rows.
    """
    noise, prefix = _start(noise, table, prefix)
    a = np.zeros_like(noise)
    a[: table.delay] = prefix
    trace = np.empty((table.schedule.steps, *a.shape), a.dtype)
    for j in range(table.schedule.steps):
        tau = table.tau[j][:, None].astype(a.dtype)
        a = np.where(tau > 0, net(noise * tau + a * (1 - tau), table.tau[j]), a)
        trace[j] = a
    return trace


def implied(net: Net, noise: np.ndarray, table: ScheduleTable, prefix: np.ndarray | None = None) -> np.ndarray:
    """Reference sampler: Euler steps on the velocity (x - a) / tau that a predicted clean action a implies.

    The alternative to `renoise`: the same where a flow ends in one step, another path in between. Arguments, result and
    errors as in `euler`.
    """
    x, prefix = _start(noise, table, prefix)
    x[: table.delay] = prefix
    trace = np.empty((table.schedule.steps, *x.shape), x.dtype)
    for j in range(table.schedule.steps):
        now, then = (table.tau[k][:, None].astype(x.dtype) for k in (j, j + 1))
        kept = then / np.where(now > 0, now, 1)
        a = net(x.copy(), table.tau[j])
        x = np.where(now > 0, kept * x + (1 - kept) * a, x)
        trace[j] = x
    return trace


def warn_untrained(asked: HorizonSchedule, trained: HorizonSchedule | None) -> bool:
    """Warn (`ScheduleWarning`) where a checkpoint runs a schedule that it is not known to be trained for.

    Args:
        asked: the schedule that will run.
        trained: that of the training, or None if nobody said.

    Returns:
        Whether it warned. Constant schedules never do: every flow policy was trained for them.
    """
    if asked.is_constant:
        return False
    if trained is None:
        found = "nothing says which schedule this checkpoint was trained for (alpha and u0 are not in its files)"
    elif (trained.alpha, trained.u0) != (asked.alpha, asked.u0):
        found = f"this checkpoint was trained for alpha {trained.alpha:g}, u0 {trained.u0:g}"
    else:
        return False
    warnings.warn(
        f"sampling with alpha {asked.alpha:g}, u0 {asked.u0:g}, but {found}; actions may be worse. Put the values of "
        "the training into faster.json, or pass the constant schedule",
        ScheduleWarning,
        stacklevel=2,
    )
    return True


def _start(noise: np.ndarray, table: ScheduleTable, prefix: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """A copy of the noise, and the prefix as [d, A] of its dtype."""
    noise = np.array(noise)
    horizon, delay = table.schedule.horizon, table.delay
    if noise.dtype.kind != "f" or noise.ndim != 2 or noise.shape[0] != horizon:
        raise InputError(f"noise is {noise.dtype} {list(noise.shape)}; floats [{horizon}, A] are needed")
    prefix = np.zeros((0, noise.shape[1])) if prefix is None else np.asarray(prefix)
    if prefix.shape != (delay, noise.shape[1]):
        raise InputError(f"prefix is {list(prefix.shape)}; delay {delay} needs [{delay}, {noise.shape[1]}]")
    return noise, prefix.astype(noise.dtype)


def _integer(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
        raise InputError(f"{name}={value!r} is not an integer in [{low}, {high}]")
    return int(value)
