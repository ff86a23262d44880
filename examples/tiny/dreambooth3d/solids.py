"""Solids with painted sides on a turntable, as a camera sees them: everything follows from a seed.

The camera looks from 25 degrees above without perspective; the background is white. A solid is an intersection of half
spaces, or a ball; its sides are painted in sectors around its axis, with a band around its foot and a top of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIZE, FINE = 40, 2  # pixels of a picture's edge; rays along a pixel's edge
VIEWS = 12  # of a full turn
ELEVATION = np.radians(25.0)
LIGHT = np.array([-0.45, -0.65, 0.62]) / np.linalg.norm([-0.45, -0.65, 0.62])  # stands with the camera
COLOURS = {
    "red": (206, 44, 40),
    "green": (52, 160, 66),
    "blue": (44, 84, 208),
    "yellow": (232, 200, 48),
    "purple": (146, 60, 172),
    "cyan": (56, 188, 204),
    "orange": (238, 130, 36),
    "black": (44, 44, 50),
}
#: By class: sides of its foot (0: a ball), whether it runs to a point, half its height.
CLASSES = {"cube": (4, False, 0.62), "wedge": (3, False, 0.6), "pillar": (6, False, 0.95), "drum": (20, False, 0.55),
           "pyramid": (4, True, 0.8), "ball": (0, False, 0.85)}  # fmt: skip


@dataclass(frozen=True)
class Solid:
    """cuts: where sectors begin, radians; paint u8-valued [sectors + 2, 3]: of the sectors, the band and the top."""

    kind: str
    colours: tuple[str, ...]
    cuts: np.ndarray
    paint: np.ndarray
    radius: float
    half: float
    band: float

    @property
    def name(self) -> str:
        """As captions have it: its first two sectors' colours."""
        return f"{self.colours[0]} and {self.colours[1]} {self.kind}"


def draw_solid(rng: np.random.Generator) -> Solid:
    kind = str(rng.choice(list(CLASSES)))
    colours = tuple(str(c) for c in rng.permutation(list(COLOURS))[:5])
    first = rng.uniform(0, 2 * np.pi)
    widths = rng.dirichlet([8, 8, 8]) * 2 * np.pi
    cuts = (first + np.concatenate([[0], np.cumsum(widths)[:2]])) % (2 * np.pi)
    paint = np.array([COLOURS[c] for c in colours], float) + rng.uniform(-12, 12, (5, 3))
    size = rng.uniform(0.9, 1.05)
    half = CLASSES[kind][2] * size * rng.uniform(0.9, 1.1)
    radius = size * (0.85 if kind == "ball" else 0.72 if kind == "pillar" else 0.88) * rng.uniform(0.94, 1.06)
    return Solid(kind, colours, cuts, np.clip(paint, 0, 255), radius, half, rng.uniform(-0.55, -0.35))


def _planes(s: Solid) -> tuple[np.ndarray, np.ndarray]:
    """Normals [P, 3] and distances [P] of the half spaces normal . x <= distance."""
    sides, pointed, _ = CLASSES[s.kind]
    at = 2 * np.pi * np.arange(sides) / sides
    flat = s.radius * np.cos(np.pi / sides)  # from the axis to a side
    slope = flat / (2 * s.half) if pointed else 0.0
    side = np.stack([np.cos(at), np.sin(at), np.full(sides, slope)], 1)
    far = np.full(sides, flat - slope * -s.half if not pointed else slope * s.half)
    ends = np.array([[0, 0, 1.0], [0, 0, -1.0]])
    return np.concatenate([side, ends]), np.concatenate([far, [s.half, s.half]])


def render(s: Solid, angles: np.ndarray) -> np.ndarray:
    """u8 [N, SIZE, SIZE, 3]: the solid turned by each of N angles, radians."""
    n = SIZE * FINE
    grid = (np.arange(n) + 0.5) / n * 2.8 - 1.4
    across, up = np.meshgrid(grid, -grid)
    right, forward = np.array([1.0, 0, 0]), np.array([0, np.cos(ELEVATION), -np.sin(ELEVATION)])
    above = np.array([0, np.sin(ELEVATION), np.cos(ELEVATION)])
    rays = across.reshape(-1, 1) * right + up.reshape(-1, 1) * above - 4 * forward
    near = np.hypot(across, up).ravel() < 1.38  # nothing is wider
    out = np.full((len(angles), n * n, 3), 255.0)
    for picture, angle in zip(out, angles):
        cos, sin = np.cos(angle), np.sin(angle)
        turn = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])  # of the camera, into the solid's frame
        o, d, light = rays[near] @ turn.T, turn @ forward, turn @ LIGHT
        t, normal = _met(s, o, d)
        hit = np.isfinite(t)
        point = o[hit] + t[hit, None] * d
        shade = 0.62 + 0.38 * np.clip(normal[hit] @ light, 0, 1)
        rows = picture[near]
        rows[hit] = shade[:, None] * s.paint[_part(s, point, normal[hit])]
        picture[near] = rows
    fine = out.reshape(len(angles), SIZE, FINE, SIZE, FINE, 3).mean((2, 4))
    return np.clip(fine.round(), 0, 255).astype(np.uint8)


def _met(s: Solid, o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances [n] along rays o + t d (inf: nowhere), normals [n, 3]."""
    if not CLASSES[s.kind][0]:
        b, c = o @ d, (o * o).sum(1) - s.radius**2
        root = b * b - c
        t = np.where(root > 0, -b - np.sqrt(np.maximum(root, 0)), np.inf)
        return t, (o + np.where(np.isfinite(t), t, 0)[:, None] * d) / s.radius
    normals, far = _planes(s)
    along = normals @ d
    room, level = far - o @ normals.T, np.abs(along) < 1e-9
    t = room / np.where(level, 1.0, along)
    enter = np.where((along < 0) & ~level, t, -np.inf)
    leave = np.where(level, np.where(room < 0, -np.inf, np.inf), np.where(along > 0, t, np.inf)).min(1)
    first = enter.max(1)
    return np.where(first < leave, first, np.inf), normals[enter.argmax(1)]


def _part(s: Solid, point: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Row of `paint` of points on the surface."""
    around = (np.arctan2(point[:, 1], point[:, 0])[:, None] - s.cuts) % (2 * np.pi)
    sector = around.argmin(1)
    top = normal[:, 2] > 0.9 if s.kind != "ball" else point[:, 2] > 0.6 * s.radius
    low = point[:, 2] < s.band * (s.half if s.kind != "ball" else s.radius)
    return np.where(top, len(s.cuts) + 1, np.where(low, len(s.cuts), sector))


def turntable(s: Solid) -> np.ndarray:
    """u8 [VIEWS, SIZE, SIZE, 3]: a full turn."""
    return render(s, 2 * np.pi * np.arange(VIEWS) / VIEWS)
