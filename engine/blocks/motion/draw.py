"""Motions as pictures: a stick figure over a floor with its waypoints, as arrays, GIF or MP4."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from engine.blocks.film import check_target, pillow, save_film
from engine.blocks.motion.arrays import fps, poses, scalar
from engine.blocks.motion.constraints import Constraints
from engine.blocks.motion.rotations import axis_rotation
from engine.blocks.motion.skeleton import HUMANML3D, Skeleton
from engine.errors import InputError

MAX_SIDE = 4096
MAX_BYTES = 2 << 30
_SHARP = 2
_PAPER, _FLOOR, _TRACE, _TEXT = "#fbfaf7", "#dcd8cf", "#8a8a86", "#333333"
_LEFT, _RIGHT, _MIDDLE, _POINT, _NOW = "#d1622b", "#2b6cb0", "#3a3a3a", "#8e44ad", "#c0392b"


def draw(
    joints: Any,
    constraints: Constraints | None = None,
    *,
    skeleton: Skeleton = HUMANML3D,
    size: tuple[int, int] = (360, 480),
    turn: float = 0.6,
    title: str = "",
) -> list[np.ndarray]:
    """Draw every frame of a motion.

    The view does not move and holds the whole path. Left limbs are orange, right ones blue; waypoints are violet rings,
    those of the drawn frame are filled, with a line to the joint; the grey line on the floor is the root's path.

    Args:
        joints: [T, J, 3] metres, Y up; in the user's world if there are constraints.
        constraints: whose waypoints to draw.
        skeleton: of the joints.
        size: (height, width) in pixels, 16 to 4096.
        turn: rad that the view is turned to the figure's left, from the front.
        title: a line of text.

    Returns:
        T pictures [height, width, 3] uint8.

    Raises:
        InputError: Pillow is missing; another shape or size; a waypoint beyond the motion.
    """
    image, image_draw = _pillow()
    p = poses(joints, skeleton.joints).astype(np.float64)
    if len(size) != 2 or not all(type(n) is int and 16 <= n <= MAX_SIDE for n in size):
        raise InputError(f"size={size!r} is not (height, width) of 16 to {MAX_SIDE} pixels")
    if len(p) * size[0] * size[1] * 3 > MAX_BYTES:
        raise InputError(
            f"{len(p)} pictures of {size[0]} x {size[1]} pixels are beyond 2 GiB; make them smaller or fewer"
        )
    if constraints is not None:
        constraints.check(len(p))
    points = [] if constraints is None else [(skeleton.joint(w.joint), w) for w in constraints.waypoints]
    view = _View([p.reshape(-1, 3), *(w.positions for _, w in points)], size, scalar(turn, "turn", -1e3, 1e3))
    figure = view(p)
    targets = [(j, w.frames, view(w.positions)) for j, w in points]
    trace = view(p[:, 0] * [1, 0, 1])
    floor = image.new("RGB", (size[1] * _SHARP, size[0] * _SHARP), _PAPER)
    pen = image_draw.Draw(floor)
    for line in view.grid():
        pen.line(line, fill=_FLOOR, width=_SHARP)
    for _, _, places in targets:
        for place in places:
            _ring(pen, place, 3 * _SHARP, _POINT)
    colours = [_colour(name) for name in skeleton.names]
    order = np.argsort(figure[..., 2], axis=1)
    out = []
    for t, pose in enumerate(figure):
        picture = floor.copy()
        pen = image_draw.Draw(picture)
        _line(pen, trace[: t + 1], _TRACE, _SHARP)
        for j, frames, places in targets:
            for place in places[frames == t]:
                _line(pen, np.stack([place, pose[j]]), _NOW, _SHARP)
                _ring(pen, place, 5 * _SHARP, _NOW, _NOW)
        # What is nearer is drawn later.
        for j in order[t]:
            if j:
                _line(pen, pose[[j, skeleton.parents[j]]], colours[j], 3 * _SHARP)
        for place in pose:
            _ring(pen, place, 2 * _SHARP, _TEXT, _TEXT)
        picture = picture.resize((size[1], size[0]), image.Resampling.BOX)
        image_draw.Draw(picture).text((6, 4), f"{title}  {t}/{len(p) - 1}".strip(), fill=_TEXT)
        out.append(np.asarray(picture))
    return out


def save_animation(
    joints: Any,
    path: str | os.PathLike[str],
    constraints: Constraints | None = None,
    *,
    rate: float = 20.0,
    **look: Any,
) -> Path:
    """Draw a motion into a .gif or .mp4 file.

    Args:
        joints: as in `draw`.
        path: its suffix decides; .mp4 needs the package av. A GIF shows at most 25 frames a second.
        constraints: as in `draw`.
        rate: frames a second of the motion.
        look: skeleton, size, turn, title of `draw`.

    Raises:
        InputError: as `draw`; another suffix, a missing package, a file that cannot be written.
    """
    target, rate = check_target(path), fps(rate, "rate")  # before the work of drawing
    return save_film(draw(joints, constraints, **look), target, rate, colours=64)


class _View:
    """World [..., 3] to (x, y, depth) in sharp pixels: parallel, from slightly above."""

    def __init__(self, points: list[np.ndarray], size: tuple[int, int], turn: float):
        self.axes = axis_rotation(np.array(0.3), 0) @ axis_rotation(np.array(-turn), 1)
        cloud = np.concatenate(points)
        # Onto the floor too, so that it is seen under jumps.
        cloud = np.concatenate([cloud, cloud * [1, 0, 1]])
        self.low, self.high = cloud.min(0), cloud.max(0)
        flat = cloud @ self.axes.T
        low, high = flat.min(0)[:2], flat.max(0)[:2]
        height, width = (n * _SHARP for n in size)
        margin = 0.08
        room = np.array([width, height]) * (1 - 2 * margin)
        self.zoom = float((room / np.maximum(high - low, 0.5)).min())
        self.middle = (low + high) / 2
        self.centre = np.array([width, height]) / 2

    def __call__(self, points: np.ndarray) -> np.ndarray:
        seen = points @ self.axes.T
        out = np.empty_like(seen)
        out[..., :2] = self.centre + (seen[..., :2] - self.middle) * self.zoom * [1, -1]
        out[..., 2] = seen[..., 2]
        return out

    def grid(self) -> list[list[tuple[float, float]]]:
        """Lines of a floor of half metres under everything."""
        (x0, _, z0), (x1, _, z1) = np.floor(self.low * 2) / 2, np.ceil(self.high * 2) / 2
        # Long ways get a coarser floor.
        step = 0.5 * max(1, round(max(x1 - x0, z1 - z0) / 10))
        xs, zs = np.arange(x0, x1 + step, step), np.arange(z0, z1 + step, step)
        ends = [((x, zs[0]), (x, zs[-1])) for x in xs] + [((xs[0], z), (xs[-1], z)) for z in zs]
        lines = self(np.array([[(x, 0.0, z) for x, z in pair] for pair in ends]))
        return [[(float(x), float(y)) for x, y, _ in line] for line in lines]


def _colour(name: str) -> str:
    side = name[:1].lower() if len(name) == 2 or name[1:2] == "_" or name.endswith("Mrot") else ""
    return {"l": _LEFT, "r": _RIGHT}.get(side, _MIDDLE)


def _line(pen: Any, places: np.ndarray, colour: str, width: int) -> None:
    if len(places) > 1:
        pen.line([(float(x), float(y)) for x, y, _ in places], fill=colour, width=width, joint="curve")


def _ring(pen: Any, place: np.ndarray, radius: float, colour: str, fill: str | None = None) -> None:
    x, y = float(place[0]), float(place[1])
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, fill=fill, width=_SHARP)


def _pillow() -> tuple[Any, Any]:
    image = pillow()
    from PIL import ImageDraw

    return image, ImageDraw
