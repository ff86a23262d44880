"""Episodes of the reaction task under a simulated inference clock: synchronous, asynchronous, and FASTER.

The policy really runs; how long it would take is not measured but given, so a small network on any machine shows what a
large one on a slow card does. The task does not wait: while the policy works, the ball flies on.

sync    the paddle stands still until the whole chunk is there, executes s actions, looks again.
async   the next request leaves early; the d actions that are executed meanwhile are its committed prefix.
FASTER  as async, with the horizon-aware schedule: actions leave one by one, and the first after one network call.

Action i of a chunk that was asked for at tick t is due at tick t + i + 1. Source: FASTER (arXiv 2603.19199), sections 3
and 4, and tables 2 and 4 for the times.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import reaction_task as task

from engine.blocks.policy import FlowPolicy
from engine.blocks.reaction import Reaction, asynchronous, delay, streaming, sync
from engine.blocks.schedule import HorizonSchedule

TICK = 1e3 / task.RATE  # ms
BLOCKING = ("sync", "no latency")


@dataclass(frozen=True)
class Mode:
    """One way to run a policy.

    Attributes:
        name: 'sync', 'async', 'FASTER', or 'no latency', which is sync without the wait.
        first: ms from an observation to its first action.
        step: ms between two network calls after that; only FASTER streams.
        execute: s, actions of a chunk that are executed.
    """

    name: str
    first: float
    step: float
    execute: int

    @property
    def delay(self) -> int:
        """d, committed actions of a request."""
        return 0 if self.name in BLOCKING else delay(self.first, task.RATE)

    @property
    def reaction(self) -> Reaction:
        """The paper's model of its reaction time."""
        make = {"sync": sync, "async": asynchronous, "FASTER": streaming}[self.name]
        return make(self.first, self.execute, task.RATE)


def _modes(base: float, first: float, step: float, execute: int, streamed: int) -> tuple[Mode, ...]:
    return (
        Mode("sync", base, 0.0, execute),
        Mode("async", base, 0.0, execute),
        Mode("FASTER", first, step, streamed),
    )


#: The RTX 4060 of the paper: TTFA and s from table 2; ms per call while streaming from table 4.
RTX4060 = {"pi05-tiny": _modes(303.3, 238.6, 14.0, 10, 8), "xvla-tiny": _modes(399.5, 129.2, 29.0, 12, 6)}

#: A chunk: (observation, tick, noise seed, mode, actions wanted) -> [H, 2] in metres, and ms until each is there [H].
Ask = Callable[[dict, int, int, Mode, int], tuple[np.ndarray, np.ndarray]]


def arrivals(schedule: HorizonSchedule, mode: Mode, committed: int) -> np.ndarray:
    """[H] ms after the observation at which each action is there; 0 for the `committed` ones."""
    if mode.name != "FASTER":
        out = np.full(schedule.horizon, mode.first)
    else:
        ready = schedule.at(committed).ready_step
        out = mode.first + (ready - ready[committed]) * mode.step
    out[:committed] = 0
    return out


def executed(schedule: HorizonSchedule, mode: Mode) -> int:
    """How many actions of a chunk are executed: s, or more where the last of them would come too late.

    A request begins when the one before it is done, and commits d actions, which must be there by then.
    """
    d, s = mode.delay, mode.execute
    if mode.name in BLOCKING:
        return s
    there = arrivals(schedule, mode, d)
    while there[d + s - 1] > s * TICK:
        s += 1
    return s


def policy(model: FlowPolicy) -> Ask:
    """Chunks of a loaded policy."""
    constant = HorizonSchedule.constant(model.horizon, model.schedule.steps)

    def ask(obs: dict, tick: int, seed: int, mode: Mode, wanted: int) -> tuple[np.ndarray, np.ndarray]:
        shape = model.flow.sizes[2:]
        noise = np.random.default_rng(seed).standard_normal(shape, np.float32)
        streams = mode.name == "FASTER"
        chunk = model.act(obs, noise=noise, actions=wanted if streams else None,
                          schedule=model.schedule if streams else constant)  # fmt: skip
        return chunk.actions, arrivals(model.schedule, mode, int(obs.get("delay", 0)))

    return ask


def expert(flight: task.Balls, schedule: HorizonSchedule) -> Ask:
    """Chunks of the expert, who sees the true ball but lives under the same clock: what a perfect policy reaches."""

    def ask(obs: dict, tick: int, seed: int, mode: Mode, wanted: int) -> tuple[np.ndarray, np.ndarray]:
        d, target = int(obs.get("delay", 0)), flight.known(np.array([float(tick)]))
        prefix = np.reshape(obs.get("action_prefix", []), (d, 2))
        begin = prefix[-1] if d else np.asarray(obs["observation.state"], np.float64)
        chunk = np.concatenate([prefix, task.plan(begin[None], target, schedule.horizon - d)[0]])
        return chunk, arrivals(schedule, mode, d)

    return ask


@dataclass
class Chunk:
    """origin: the tick before its action 0; born: the tick of its observation; committed: d of its request; actions
    [H, 2]; there [H]: the time in ms at which each may be executed."""

    origin: int
    born: int
    committed: int
    actions: np.ndarray
    there: np.ndarray


@dataclass
class Episode:
    """won; miss: cm from the paddle's edge to the ball, 0 where it was met; reaction: ms from the turn to the first
    action that was decided after it, infinite if there was none; requests; stalls: ticks without an action that was
    due; track [ticks, 2]: where the paddle was."""

    won: bool
    miss: float
    reaction: float
    requests: int
    stalls: int
    track: np.ndarray = field(repr=False)


def play(ask: Ask, schedule: HorizonSchedule, mode: Mode, flight: task.Balls, seed: int) -> Episode:
    """One episode: flight is one ball, and `seed` decides the noise of the requests."""
    d, s, arrival = mode.delay, executed(schedule, mode), float(flight.arrival[0])
    position = np.zeros(2)
    command, track = position, [position]
    now: Chunk | None = None
    coming: Chunk | None = None
    requests = stalls = 0
    reaction = math.inf
    for tick in range(math.ceil(arrival)):
        # What the policy is asked at this tick.
        if coming is None and (now is None or tick >= now.origin + now.committed + s - d):
            views = task.render(flight, np.array([float(tick)]), position[None])[0]
            obs = task.observation(views, position)
            committed = 0
            if now is not None and d:
                at = tick - now.origin
                obs |= {"delay": d, "action_prefix": now.actions[at : at + d]}
                committed = d
            actions, there = ask(obs, tick, seed * 1000 + requests, mode, s)
            requests += 1
            # Without a prefix the chunk begins when its first action is there.
            begin = tick if committed else tick + max(math.ceil(there[0] / TICK), 1) - 1
            coming = Chunk(begin, tick, committed, actions, tick * TICK + there)
        # What the paddle does until the next tick.
        if coming is not None and tick >= coming.origin + coming.committed:
            now, coming = coming, None
        if now is not None:
            row = tick - now.origin
            last = now.committed + s if coming is None or d == 0 else len(now.actions)
            if row < min(last, len(now.actions)) and now.there[row] <= (tick + 1) * TICK + 1e-6:
                command = now.actions[row]
                if now.born >= flight.turn[0] and math.isinf(reaction):
                    reaction = (tick + 1 - flight.turn[0]) * TICK
            elif mode.name not in BLOCKING:
                stalls += 1
        position = task.follow(position, command)
        track.append(position)
    part = arrival - math.floor(arrival)
    final = track[-1] if part == 0 else track[-2] + (track[-1] - track[-2]) * part
    beyond = np.abs(final - flight.hits[0]).max() - task.HALF_WIDTH
    won = bool(task.intercepted(final, flight.hits[0]))
    return Episode(won, 100 * max(float(beyond), 0.0), reaction, requests, stalls, np.array(track))


def oracle(flight: task.Balls) -> Episode:
    """The expert with no latency: it sees the true ball at every tick."""
    position, track = np.zeros(2), [np.zeros(2)]
    for tick in range(math.ceil(float(flight.arrival[0]))):
        position = task.follow(position, flight.known(np.array([float(tick)]))[0])
        track.append(position)
    won = bool(task.intercepted(position, flight.hits[0]))
    return Episode(won, 0.0, task.VISIBLE * TICK, 0, 0, np.array(track))


def flights(count: int, seed: int) -> list[task.Balls]:
    """The balls of `count` episodes, the same for every mode."""
    made = task.balls(count, np.random.default_rng(seed))
    return [made[i : i + 1] for i in range(count)]


def wilson(won: int, count: int) -> tuple[float, float]:
    """95 % interval of a rate (Wilson's score interval)."""
    z = 1.959964
    p, n = won / count, count
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))
