"""A small reaction task: a ball flies towards the robot, changes direction once, and a paddle must be there.

One tick is one control period (30 Hz). The ball waits, then flies for `FLIGHT` ticks to the plane of the paddle. At a
random moment it turns towards another place of that plane, far enough that the paddle must move at once; nobody can
know when or where before it happens. The paddle follows commanded positions with limited speed. An episode is won if
the ball meets the paddle. Everything depends on the seeds alone.

Two cameras look along z (top) and along y (side), both turned so that the ball flies down the image. A policy here sees
one frame per view, so a frame holds three exposures: now in red, 2 ticks ago in green, 4 ticks ago in blue.

Units: metres, ticks. Shapes: n episodes or samples, H actions of a chunk; positions are (y, z).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

RATE = 30.0  # Hz
FLIGHT = 50  # ticks from the start to the plane of the paddle
DISTANCE = 1.5  # m, from the start to the plane of the paddle
HALF_WIDTH = 0.1  # m, of the paddle, in y and z
SPEED = 0.045  # m per tick, the fastest that the paddle moves along an axis
REACH = 0.45  # m, the farthest that the ball arrives from the centre
TURN = (0.25, 0.45)  # m, how far a turn moves the place of arrival, along the axis that it moves more
REMAINING = (18.0, 30.0)  # ticks between the turn and the arrival
WAIT = (5.0, 35.0)  # ticks before the ball starts
VISIBLE = 2  # ticks from a turn, or from the start, until the exposures show it

CAMERAS = ("observation.images.top", "observation.images.side")
PROMPT = "intercept the ball"
SIZE = 56  # pixels
EXPOSURES = (0, 2, 4)  # ticks ago: red, green, blue
_SPAN = 0.6  # m, from the centre of the image to its left and right edge
_DEPTH = (1.62, -0.08)  # m, from the paddle's plane, of the upper and the lower edge
_BLUR = 1.3  # pixels, deviation of a ball
_WALLS = ((0.08, 0.08, 0.22), (0.08, 0.2, 0.08))  # what is behind, RGB; tells the views apart


@dataclass(frozen=True)
class Balls:
    """What decides the flights of n balls.

    wait [n]: tick at which the ball starts; turn [n]: tick at which it turns. start, aims [n, 2]: where it starts, and
    where it would arrive before the turn. hits [n, 2]: where it arrives.
    """

    wait: np.ndarray
    turn: np.ndarray
    start: np.ndarray
    aims: np.ndarray
    hits: np.ndarray

    def __len__(self) -> int:
        return len(self.wait)

    def __getitem__(self, which: object) -> Balls:
        return Balls(*(getattr(self, f.name)[which] for f in fields(self)))

    @property
    def arrival(self) -> np.ndarray:
        """[n], in ticks."""
        return self.wait + FLIGHT

    def at(self, tick: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distance from the plane [n] (negative behind it) and position [n, 2] at ticks [n]."""
        flown = np.clip(tick - self.wait, 0, FLIGHT + 4)
        until = self.turn - self.wait
        corner = self.start + (self.aims - self.start) * (until / FLIGHT)[:, None]
        first = self.start + (self.aims - self.start) * (flown / FLIGHT)[:, None]
        second = corner + (self.hits - corner) * ((flown - until) / (FLIGHT - until))[:, None]
        return DISTANCE * (1 - flown / FLIGHT), np.where((flown < until)[:, None], first, second)

    def known(self, tick: np.ndarray) -> np.ndarray:
        """Where the ball will arrive as far as one can see at ticks [n]: [n, 2], the centre before it flies."""
        target = np.where((tick >= self.turn + VISIBLE)[:, None], self.hits, self.aims)
        return np.where((tick >= self.wait + VISIBLE)[:, None], target, 0.0)


def balls(n: int, rng: np.random.Generator) -> Balls:
    """n random flights."""
    wait = rng.uniform(*WAIT, n)
    aims, hits = rng.uniform(-REACH, REACH, (n, 2)), np.empty((n, 2))
    todo = np.arange(n)
    while len(todo):
        hits[todo] = rng.uniform(-REACH, REACH, (len(todo), 2))
        moved = np.abs(hits[todo] - aims[todo]).max(1)
        todo = todo[(moved < TURN[0]) | (moved > TURN[1])]
    return Balls(wait, wait + FLIGHT - rng.uniform(*REMAINING, n), rng.uniform(-0.3, 0.3, (n, 2)), aims, hits)


def follow(position: np.ndarray, command: np.ndarray) -> np.ndarray:
    """Where the paddle is one tick later, [..., 2]."""
    return position + np.clip(command - position, -SPEED, SPEED)


def plan(position: np.ndarray, target: np.ndarray, ticks: int) -> np.ndarray:
    """The expert's commands [n, ticks, 2]: straight to the target [n, 2] at full speed, then stay."""
    ramp = SPEED * np.arange(1, ticks + 1)[None, :, None]
    return position[:, None] + np.clip((target - position)[:, None], -ramp, ramp)


def intercepted(position: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """[n] bool: the paddle at [n, 2] covers where the ball arrives."""
    return (np.abs(position - hits) <= HALF_WIDTH).all(-1)


# ---- cameras ----------------------------------------------------------------------------------------------------


def _columns(lateral: np.ndarray) -> np.ndarray:
    return (lateral / _SPAN + 1) * (SIZE / 2) - 0.5


def _rows(depth: np.ndarray) -> np.ndarray:
    return (_DEPTH[0] - depth) / (_DEPTH[0] - _DEPTH[1]) * SIZE - 0.5


_PIXELS = np.arange(SIZE, dtype=np.float32)


def _blob(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """[n] places to [n, SIZE, SIZE] fp32; Gaussians are products of a row and a column."""
    parts = (np.exp(-0.5 * ((_PIXELS - x[:, None].astype(np.float32)) / _BLUR) ** 2) for x in (rows, columns))
    row, column = parts
    return row[:, :, None] * column[:, None, :]


def render(flights: Balls, tick: np.ndarray, paddle: np.ndarray) -> np.ndarray:
    """Both views at ticks [n] with the paddle at [n, 2]: [n, 2, SIZE, SIZE, 3] uint8, cameras as in `CAMERAS`."""
    seen = [flights.at(tick - ago) for ago in EXPOSURES]
    out = np.empty((len(flights), 2, SIZE, SIZE, 3), np.float32)
    bar = np.clip(1.5 - np.abs(_PIXELS - _rows(np.float64(-0.02))) / 1.5, 0, 1)
    for view in range(2):
        wide = HALF_WIDTH / _SPAN * SIZE / 2
        across = np.clip(wide + 0.5 - np.abs(_PIXELS - _columns(paddle[:, view])[:, None]), 0, 1)
        for channel, (depth, place) in enumerate(seen):
            background = _WALLS[view][channel] + 0.6 * bar[None, :, None] * across[:, None, :]
            ball = _blob(_rows(depth), _columns(place[:, view]))
            out[:, view, :, :, channel] = background + (1 - background) * ball
    return (out * 255 + 0.5).astype(np.uint8)


def observation(views: np.ndarray, paddle: np.ndarray) -> dict[str, object]:
    """What the policy is given: views [2, SIZE, SIZE, 3] uint8, the state (y, z) in metres, the prompt."""
    return dict(zip(CAMERAS, views, strict=True)) | {"observation.state": paddle.astype(np.float32), "task": PROMPT}


# ---- demonstrations ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """n moments of demonstrations, each with k continuations.

    views [n, 2, SIZE, SIZE, 3] uint8, state [n, 2], delay [n, k] ints, actions [n, k, H, 2] commands in metres: the
    first `delay` of them were decided before the moment was seen, the others by what it shows.
    """

    views: np.ndarray
    state: np.ndarray
    delay: np.ndarray
    actions: np.ndarray


def samples(n: int, horizon: int, max_delay: int, rng: np.random.Generator, draws: int = 1) -> Samples:
    """Random moments of random demonstrations; delays are uniform in 0..max_delay.

    A demonstrator with a reaction time (0 to 25 ticks) brings the paddle to where it is, sometimes it is just anywhere.
    The actions that were committed before the moment follow what was known that long before, so that a policy learns to
    correct them: with an expert that knows at once, the committed actions would give the answer away.
    """
    flights = balls(n, rng)
    tick = np.floor(rng.uniform(0, flights.arrival))
    lag = rng.integers(0, 26, n)
    position = np.zeros((n, 2))
    for ago in range(int(tick.max()), 0, -1):
        moved = follow(position, flights.known(tick - ago - lag))
        position = np.where((tick >= ago)[:, None], moved, position)
    # Where a policy may get to by mistake.
    anywhere = np.where((rng.random(n) < 0.3)[:, None], rng.uniform(-REACH, REACH, (n, 2)), position)
    position = anywhere + rng.normal(0, 0.005, (n, 2))
    delay = rng.integers(0, max_delay + 1, (n, draws))
    actions = np.empty((n, draws, horizon, 2))
    for k in range(draws):
        old = rng.integers(0, 26, n)
        wrong, place = rng.normal(0, 0.02, (n, 2)), position
        target = flights.known(tick)
        committed = np.empty((n, max_delay, 2))
        for i in range(max_delay):
            place = follow(place, flights.known(np.minimum(tick, tick + i + 1 - old)) + wrong)
            committed[:, i] = place
        for d in range(max_delay + 1):
            rows = delay[:, k] == d
            begin = committed[rows, d - 1] if d else position[rows]
            actions[rows, k, :d] = committed[rows, :d]
            actions[rows, k, d:] = plan(begin, target[rows], horizon - d)
    return Samples(render(flights, tick, position), position, delay, actions)
