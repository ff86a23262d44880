"""Rooms with solids on the floor, and a camera that turns and walks past them: colours, depth and which solid is where.

Everything follows from a seed. The world's z axis points up; cameras look as OpenCV's do (x right, y down, z forward).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIZE, FRAMES = 96, 4  # pixels of a side, pictures of a room
FOCAL = SIZE / 2 / np.tan(np.radians(37))
LOW, HIGH = np.array([-3.2, -0.5, 0.0]), np.array([3.2, 5.2, 2.8])  # metres, of the room
LIGHT = np.array([-0.48, -0.58, 0.66])
COLOURS = {"red": (205, 40, 35), "green": (45, 160, 60), "blue": (45, 80, 210), "yellow": (225, 200, 45),
           "purple": (150, 55, 170), "cyan": (50, 190, 200)}  # fmt: skip
SHAPES = ("ball", "cube", "cone", "pillar")
LEAST_PIXELS, LEAST_SHARE = 60, 0.35  # of a solid, to count as seen in a picture


@dataclass(frozen=True)
class Solid:
    """x, y, radius: metres; turn: radians, of a cube."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    turn: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def height(self) -> float:
        return self.radius * {"ball": 2.0, "cube": 1.7, "cone": 2.4, "pillar": 2.6}[self.shape]

    @property
    def box(self) -> np.ndarray:
        """f64 [6]: centre and edges of a box around it."""
        side = 2 * self.radius * (0.85 * 2**0.5 if self.shape == "cube" else 0.75 if self.shape == "pillar" else 1.0)
        return np.array([self.x, self.y, self.height / 2, side, side, self.height])


@dataclass(frozen=True)
class Room:
    """Solids of distinct colours; paint: of left, right and far wall, floor, its other tiles and ceiling, 0 to 255."""

    solids: tuple[Solid, ...]
    paint: np.ndarray
    poses: np.ndarray

    @property
    def middle(self) -> np.ndarray:
        """Where the camera stands half-way, [3]."""
        return self.poses[:, :3, 3].mean(0)

    @property
    def distances(self) -> np.ndarray:
        """From there to the middle of each solid, metres."""
        return np.linalg.norm([np.array([s.x, s.y, s.height / 2]) - self.middle for s in self.solids], axis=1)

    def bearings(self, pose: np.ndarray | None = None) -> np.ndarray:
        """Of each solid, degrees clockwise from straight ahead of the room, as seen from half-way or from a pose."""
        at = self.middle if pose is None else pose[:3, 3]
        return np.degrees([np.arctan2(s.x - at[0], s.y - at[1]) for s in self.solids])


@dataclass(frozen=True)
class Views:
    """What the camera took of a room. rgb [T, S, S, 3] uint8, depth [T, S, S] uint16 millimetres, which [T, S, S] int8
    (the solid of each pixel, -1: none), whole [T, K]: pixels that each solid would cover alone."""

    room: Room
    rgb: np.ndarray
    depth: np.ndarray
    which: np.ndarray
    whole: np.ndarray

    @property
    def poses(self) -> np.ndarray:
        """f64 [T, 4, 4], camera to world."""
        return self.room.poses

    @property
    def intrinsics(self) -> np.ndarray:
        """f64 [3, 3]: a pixel's middle is at its whole number."""
        return np.array([[FOCAL, 0, SIZE / 2 - 0.5], [0, FOCAL, SIZE / 2 - 0.5], [0, 0, 1]])

    @property
    def boxes(self) -> np.ndarray:
        """f64 [K, 6] of the solids."""
        return np.stack([s.box for s in self.room.solids])

    @property
    def seen(self) -> np.ndarray:
        """bool [T, K]: whether enough of a solid is in a picture to call it seen."""
        pixels = np.stack([(self.which == k).sum((1, 2)) for k in range(len(self.room.solids))], 1)
        return (pixels >= LEAST_PIXELS) & (pixels >= LEAST_SHARE * self.whole)


# ---- the room -------------------------------------------------------------------------------------------------------


def pose_of(x: float, y: float, z: float, yaw: float, pitch: float) -> np.ndarray:
    """[4, 4] of a camera that looks along +y, turned right by yaw and down by pitch, radians."""
    forward = np.array([np.sin(yaw) * np.cos(pitch), np.cos(yaw) * np.cos(pitch), -np.sin(pitch)])
    right = np.array([np.cos(yaw), -np.sin(yaw), 0.0])
    out = np.eye(4)
    out[:3, :3] = np.stack([right, np.cross(forward, right), forward], 1)
    out[:3, 3] = x, y, z
    return out


def draw_room(rng: np.random.Generator) -> Room:
    """Three or four solids that do not touch, seen by a camera that turns by some 30 degrees to either side."""
    way = rng.choice([-1.0, 1.0])
    sweep, step = way * np.radians(rng.uniform(11, 17)), way * rng.uniform(0.05, 0.3)
    x, z, pitch, heading = (
        rng.uniform(-0.3, 0.3),
        rng.uniform(1.3, 1.6),
        rng.uniform(0.2, 0.28),
        rng.uniform(-0.06, 0.06),
    )
    poses = np.stack([pose_of(x + step * t, 0.0, z, heading + sweep * t, pitch) for t in np.linspace(-1, 1, FRAMES)])
    colours = rng.permutation(list(COLOURS))
    solids: list[Solid] = []
    count = int(rng.integers(3, 5))
    for _ in range(200):
        if len(solids) == count:
            break
        bearing, far = np.radians(rng.uniform(-44, 44)), rng.uniform(1.7, 4.1)
        s = Solid(str(rng.choice(SHAPES)), str(colours[len(solids)]), float(x + far * np.sin(bearing)),
                  float(far * np.cos(bearing)), rng.uniform(0.36, 0.5), rng.uniform(0, np.pi / 2))  # fmt: skip
        apart = all(np.hypot(s.x - o.x, s.y - o.y) > 1.2 * (s.radius + o.radius) + 0.1 for o in solids)
        inside = LOW[0] + 0.6 < s.x < HIGH[0] - 0.6 and s.y < HIGH[1] - 0.6
        if apart and inside:
            solids.append(s)
    grey = rng.uniform(105, 200, (6, 1)) + rng.uniform(-14, 14, (6, 3))
    return Room(tuple(solids), grey, poses)


# ---- the camera -----------------------------------------------------------------------------------------------------


def _ball(o: np.ndarray, d: np.ndarray, s: Solid) -> tuple[np.ndarray, np.ndarray]:
    """Distances and normals where rays from o [3] (from the solid's foot) along d [n, 3] meet it; inf: nowhere."""
    c = o - [0, 0, s.radius]
    b, q = d @ c, c @ c - s.radius**2
    a = (d * d).sum(1)
    root = b * b - a * q
    t = np.where(root > 0, (-b - np.sqrt(np.maximum(root, 0))) / a, np.inf)
    return t, c + np.where(np.isfinite(t), t, 0)[:, None] * d


def _cube(o: np.ndarray, d: np.ndarray, s: Solid) -> tuple[np.ndarray, np.ndarray]:
    half = 0.85 * s.radius
    cos, sin = np.cos(s.turn), np.sin(s.turn)
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    p, v = (o - [0, 0, half]) @ turn, d @ turn
    v = np.where(np.abs(v) < 1e-9, 1e-9, v)
    near, far = np.minimum((-half - p) / v, (half - p) / v), np.maximum((-half - p) / v, (half - p) / v)
    axis, t = near.argmax(1), near.max(1)
    normal = np.zeros_like(v)
    at = np.arange(len(v)), axis
    normal[at] = -np.sign(v[at])
    return np.where(t < far.min(1), t, np.inf), normal @ turn.T


def _round(o: np.ndarray, d: np.ndarray, s: Solid) -> tuple[np.ndarray, np.ndarray]:
    """A cone or a cylinder on the floor."""
    cone, h = s.shape == "cone", s.height
    r = s.radius if cone else 0.75 * s.radius
    k = (r / h) ** 2 if cone else 0.0
    top = h - o[2]  # the cone's radius at height z is sqrt(k) * (h - z)
    a = d[:, 0] ** 2 + d[:, 1] ** 2 - k * d[:, 2] ** 2
    b = d[:, :2] @ o[:2] + k * d[:, 2] * top
    c = o[0] ** 2 + o[1] ** 2 - (k * top**2 if cone else r * r)
    root = b * b - a * c
    a = np.where(np.abs(a) < 1e-9, 1e-9, a)
    t = np.full(len(d), np.inf)
    for sign in (1, -1):
        u = (-b + sign * np.sqrt(np.maximum(root, 0))) / a
        z = o[2] + u * d[:, 2]
        t = np.where((root > 0) & (u > 0) & (z >= 0) & (z <= h) & (u < t), u, t)
    at = o + np.where(np.isfinite(t), t, 0)[:, None] * d
    normal = np.stack([at[:, 0], at[:, 1], np.full(len(d), k**0.5 * r if cone else 0.0)], 1)
    if not cone:
        u = top / np.where(np.abs(d[:, 2]) < 1e-9, 1e-9, d[:, 2])
        at = o + u[:, None] * d
        lid = (u > 0) & (at[:, 0] ** 2 + at[:, 1] ** 2 <= r * r) & (u < t)
        t = np.where(lid, u, t)
        normal[lid] = 0, 0, 1
    return t, normal


def _shade(colour: np.ndarray, normal: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Lambert's law, and a lamp beside the camera that reaches a few metres."""
    length = np.maximum(np.linalg.norm(normal, axis=1), 1e-9)
    sun = np.maximum(normal @ LIGHT / length, 0)
    return colour * (0.42 + 0.5 * sun + 0.3 / (1 + 0.15 * t * t))[:, None]


def render(room: Room) -> Views:
    """Every picture of a room."""
    v, u = np.mgrid[:SIZE, :SIZE].reshape(2, -1)
    camera = np.stack([(u + 0.5 - SIZE / 2) / FOCAL, (v + 0.5 - SIZE / 2) / FOCAL, np.ones(SIZE * SIZE)], 1)
    rgb = np.empty((FRAMES, SIZE * SIZE, 3))
    depth = np.empty((FRAMES, SIZE * SIZE))
    which = np.full((FRAMES, SIZE * SIZE), -1, np.int8)
    whole = np.zeros((FRAMES, len(room.solids)), np.int64)
    for f, pose in enumerate(room.poses):
        o, d = pose[:3, 3], camera @ pose[:3, :3].T
        rgb[f], depth[f] = _walls(room, o, d)
        for k, s in enumerate(room.solids):
            at = _around(s, pose)
            if not len(at):
                continue
            t, normal = {"ball": _ball, "cube": _cube}.get(s.shape, _round)(o - [s.x, s.y, 0], d[at], s)
            whole[f, k] = np.isfinite(t).sum()
            near = t < depth[f, at]
            at = at[near]
            depth[f, at], which[f, at] = t[near], k
            rgb[f, at] = _shade(np.array(COLOURS[s.colour], float), normal[near], t[near])
    shape = (FRAMES, SIZE, SIZE)
    return Views(room, np.clip(rgb + 0.5, 0, 255).astype(np.uint8).reshape(*shape, 3),
                 np.rint(1000 * depth).astype(np.uint16).reshape(shape), which.reshape(shape), whole)  # fmt: skip


def _walls(room: Room, o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colours and depth of the empty room; d has depth 1."""
    safe = np.where(np.abs(d) < 1e-9, 1e-9, d)
    t = np.where(safe > 0, (HIGH - o) / safe, (LOW - o) / safe)
    axis, t = t.argmin(1), t.min(1)
    at = o + t[:, None] * d
    normal = np.zeros_like(d)
    normal[np.arange(len(d)), axis] = -np.sign(d[np.arange(len(d)), axis])
    tile = (np.floor(2 * at[:, 0]) + np.floor(2 * at[:, 1])) % 2 == 0
    paint = np.where(axis == 0, np.where(d[:, 0] < 0, 0, 1),
                     np.where(axis == 1, 2, np.where(d[:, 2] > 0, 5, np.where(tile, 3, 4))))  # fmt: skip
    return _shade(room.paint[paint], normal, t), t


def _around(s: Solid, pose: np.ndarray) -> np.ndarray:
    """Pixels [n] of a rectangle that holds all of a solid."""
    reach = np.array([s.x, s.y, s.height / 2])
    x, y, z = (reach - pose[:3, 3]) @ pose[:3, :3]
    r = np.linalg.norm([s.radius * 1.21, s.height / 2])
    if z < r:
        return np.empty(0, np.int64)
    half = 1.15 * FOCAL * r / (z - r)
    edge = np.clip([x / z * FOCAL - half, x / z * FOCAL + half, y / z * FOCAL - half, y / z * FOCAL + half],
                   -SIZE / 2, SIZE / 2)  # fmt: skip
    left, right, top, bottom = (edge + SIZE / 2).astype(int)
    return (np.arange(top, bottom)[:, None] * SIZE + np.arange(left, right)).ravel()
