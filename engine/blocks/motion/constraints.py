"""Waypoints: where joints should be at given frames, in the user's world, checked before anything is computed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.blocks.motion.arrays import MAX_FRAMES, floats, poses
from engine.blocks.motion.pose import StartPose, forwards
from engine.blocks.motion.skeleton import HUMANML3D, Skeleton
from engine.errors import InputError
from engine.io.files import parse_json, read_bytes
from engine.io.values import show

MAX_ITEMS = 1024
MAX_POINTS = 1_000_000
MAX_BYTES = 64 << 20
#: Metres from the origin.
MAX_REACH = 1e4
_KEYS = ("waypoints", "origin", "heading")
_ITEM_KEYS = ("joint", "frames", "positions")


@dataclass(frozen=True, eq=False)
class Waypoints:
    """Positions of one joint at some frames.

    Attributes:
        joint: name or index.
        frames: [n] int64, each once, at the frame rate of the model.
        positions: [n, 3] fp64 metres in the user's world, Y up, the floor at y = 0; one [3] for one frame.

    Raises:
        InputError: another shape, a negative, repeated or too late frame, a position that is not finite or farther
            than 10 km.
    """

    joint: int | str
    frames: np.ndarray
    positions: np.ndarray

    def __post_init__(self) -> None:
        where = f"waypoints of {str(self.joint)[:80]!r}"
        frames, positions = _points(self.frames, self.positions, where)
        object.__setattr__(self, "frames", frames)
        object.__setattr__(self, "positions", positions)

    def __len__(self) -> int:
        return len(self.frames)


@dataclass(frozen=True)
class Residual:
    """How far a motion stays from one item of waypoints.

    Attributes:
        joint: its name.
        count: number of waypoints.
        mean, max: distances in metres.
        worst: frame of the largest.
    """

    joint: str
    count: int
    mean: float
    max: float
    worst: int

    def __str__(self) -> str:
        return (
            f"{self.joint}: {self.count} waypoints, mean {self.mean:.4f} m, max {self.max:.4f} m (frame {self.worst})"
        )


class Constraints:
    """Waypoints of a motion, and where the motion starts.

    The model's motions start at the origin facing +Z. The start pose that connects this to the user's world is given,
    or read from frame 0: its x and z from a waypoint of the root there, its heading from waypoints of both hips and
    both shoulders there; else the world's own origin and +Z. A root waypoint of frame 0 that is elsewhere than a given
    `origin` cannot be met, and shows in `residuals`.

    Args:
        waypoints: items; a joint may occur in several, a (joint, frame) only once.
        skeleton: of the model.
        origin: (x, z) metres of the root at frame 0, in the user's world.
        heading: of frame 0, rad about +Y, 0 is +Z, pi / 2 is +X.

    Raises:
        InputError: an unknown joint, a (joint, frame) that occurs twice, more than 1024 items or a million points.
    """

    def __init__(
        self,
        waypoints: Sequence[Waypoints],
        skeleton: Skeleton = HUMANML3D,
        *,
        origin: Sequence[float] | None = None,
        heading: float | None = None,
    ):
        if not isinstance(waypoints, list | tuple) or not all(isinstance(w, Waypoints) for w in waypoints):
            raise InputError("waypoints is not a list of Waypoints; Constraints.from_json reads lists of objects")
        if len(waypoints) > MAX_ITEMS or sum(map(len, waypoints)) > MAX_POINTS:
            raise InputError(f"more than {MAX_ITEMS} items of waypoints or {MAX_POINTS} waypoints; leave some out")
        self.waypoints, self.skeleton = tuple(waypoints), skeleton
        self._joints = []
        first: dict[tuple[int, int], int] = {}
        for i, item in enumerate(self.waypoints):
            try:
                joint = skeleton.joint(item.joint)
            except InputError as fault:
                raise InputError(f"waypoints[{i}]: {fault}") from None
            self._joints.append(joint)
            for frame in item.frames.tolist():
                before = first.setdefault((joint, frame), i)
                if before != i:
                    raise InputError(
                        f"waypoints[{i}]: {skeleton.names[joint]} at frame {frame} is also in waypoints[{before}]; "
                        "remove one"
                    )
        self.start = StartPose(
            self._origin() if origin is None else tuple(origin),  # type: ignore[arg-type]
            self._heading() if heading is None else heading,
        )
        self._given = (origin is not None, heading is not None)

    @classmethod
    def from_json(cls, source: Any, skeleton: Skeleton = HUMANML3D) -> Constraints:
        """Read {"waypoints": [{"joint": .., "frames": [..], "positions": [[x, y, z], ..]}, ..]}, or the list alone.

        The object may also have "origin": [x, z] and "heading": rad.

        Args:
            source: JSON text (str, bytes), or what it parses to.
            skeleton: of the model.

        Raises:
            InputError: not JSON, an unknown or missing key, or a value as in `Waypoints`; the message names the item.
        """
        if isinstance(source, str | bytes | bytearray):
            data = source.encode() if isinstance(source, str) else bytes(source)
            if len(data) > MAX_BYTES:
                raise InputError(f"constraints are longer than {MAX_BYTES} bytes; leave some out")
            source = parse_json(data, "constraints", InputError, unique=True)
        whole = {"waypoints": source} if isinstance(source, list) else source
        if not isinstance(whole, dict):
            raise InputError(f"constraints are {show(source)}; an object with 'waypoints' or a list is needed")
        _keys(whole, _KEYS, ("waypoints",), "constraints")
        items = whole["waypoints"]
        if not isinstance(items, list) or len(items) > MAX_ITEMS:
            raise InputError(f"waypoints is not a list of at most {MAX_ITEMS} objects")
        made = [_item(item, f"waypoints[{i}]", skeleton) for i, item in enumerate(items)]
        origin, heading = whole.get("origin"), whole.get("heading")
        if origin is not None and (not isinstance(origin, list) or len(origin) != 2):
            raise InputError(f"origin = {show(origin)}; [x, z] is needed")
        return cls(made, skeleton, origin=origin, heading=heading)

    @classmethod
    def read(cls, path: str | os.PathLike[str], skeleton: Skeleton = HUMANML3D) -> Constraints:
        """`from_json` of a file of at most 64 MiB."""
        return cls.from_json(read_bytes(Path(path), limit=MAX_BYTES, error=InputError), skeleton)

    @classmethod
    def dense(
        cls,
        target: Any,
        mask: Any,
        skeleton: Skeleton = HUMANML3D,
        *,
        origin: Sequence[float] | None = None,
        heading: float | None = None,
    ) -> Constraints:
        """From targets [T, J, 3] m in the user's world where mask [T, J] is true; what is masked out may be NaN."""
        keep = np.asarray(mask)
        if keep.dtype != np.bool_ or keep.ndim != 2 or keep.shape[1] != skeleton.joints:
            raise InputError(f"mask is {keep.dtype} {list(keep.shape)}; bool [T, {skeleton.joints}] is needed")
        values = np.asarray(target)
        if values.shape != (*keep.shape, 3):
            raise InputError(f"target has shape {list(values.shape)}; {[*keep.shape, 3]} is needed, as mask has")
        items = [
            Waypoints(skeleton.names[j], frames, values[frames, j])
            for j in range(skeleton.joints)
            if len(frames := np.flatnonzero(keep[:, j]))
        ]
        return cls(items, skeleton, origin=origin, heading=heading)

    def to_json(self) -> str:
        """The way back of `from_json`; a start pose that was not given is left out."""
        out: dict[str, Any] = {
            "waypoints": [
                {
                    "joint": self.skeleton.names[joint],
                    "frames": item.frames.tolist(),
                    "positions": item.positions.tolist(),
                }
                for joint, item in zip(self._joints, self.waypoints)
            ]
        }
        out |= {"origin": list(self.start.origin)} if self._given[0] else {}
        out |= {"heading": self.start.heading} if self._given[1] else {}
        return json.dumps(out)

    def __len__(self) -> int:
        """Number of waypoints."""
        return sum(map(len, self.waypoints))

    @property
    def joints(self) -> tuple[int, ...]:
        """Joints that have waypoints, in order."""
        return tuple(sorted({j for j, item in zip(self._joints, self.waypoints) if len(item)}))

    @property
    def frames(self) -> int:
        """One more than the last frame of any waypoint; 0 without waypoints."""
        return max((int(item.frames.max()) + 1 for item in self.waypoints if len(item)), default=0)

    def check(self, frames: int) -> None:
        """Every waypoint lies within `frames` frames.

        Raises:
            InputError: one does not; the message names it.
        """
        if type(frames) is not int or not 1 <= frames <= MAX_FRAMES:
            raise InputError(f"frames = {show(frames)}; an integer from 1 to {MAX_FRAMES} is needed")
        for i, (joint, item) in enumerate(zip(self._joints, self.waypoints)):
            late = np.flatnonzero(item.frames >= frames)
            if len(late):
                raise InputError(
                    f"waypoints[{i}].frames[{late[0]}] = {item.frames[late[0]]} ({self.skeleton.names[joint]}) is "
                    f"beyond the motion, whose frames are 0 to {frames - 1}; make it longer or the waypoint earlier"
                )

    def target(self, frames: int) -> tuple[np.ndarray, np.ndarray]:
        """What a motion of `frames` frames is held to, in the model's frame.

        Returns:
            target [T, J, 3] fp32 metres, 0 where there is no waypoint; mask [T, J] bool.

        Raises:
            InputError: as `check`.
        """
        self.check(frames)
        target = np.zeros((frames, self.skeleton.joints, 3), np.float32)
        mask = np.zeros(target.shape[:2], bool)
        for joint, item in zip(self._joints, self.waypoints):
            target[item.frames, joint] = self.start.to_model(item.positions)
            mask[item.frames, joint] = True
        return target, mask

    def to_world(self, joints: Any) -> np.ndarray:
        """A motion [T, J, 3] of the model, in metres, to the user's world; fp32."""
        return self.start.to_world(poses(joints, self.skeleton.joints)).astype(np.float32)

    def residuals(self, joints: Any) -> list[Residual]:
        """How far a motion is from each item that has waypoints.

        Args:
            joints: [T, J, 3] metres in the user's world.

        Raises:
            InputError: as `check`.
        """
        p = poses(joints, self.skeleton.joints).astype(np.float64)
        self.check(len(p))
        out = []
        for joint, item in zip(self._joints, self.waypoints):
            if len(item):
                far = np.linalg.norm(p[item.frames, joint] - item.positions, axis=-1)
                worst = int(far.argmax())
                name = self.skeleton.names[joint]
                out.append(Residual(name, len(far), float(far.mean()), float(far[worst]), int(item.frames[worst])))
        return out

    def _first(self, joint: int) -> np.ndarray | None:
        for j, item in zip(self._joints, self.waypoints):
            at = np.flatnonzero(item.frames == 0)
            if j == joint and len(at):
                return item.positions[at[0]]
        return None

    def _origin(self) -> tuple[float, float]:
        root = self._first(0)
        return (0.0, 0.0) if root is None else (float(root[0]), float(root[2]))

    def _heading(self) -> float:
        pose = np.zeros((self.skeleton.joints, 3))
        for joint in self.skeleton.facing:
            place = self._first(joint)
            if place is None:
                return 0.0
            pose[joint] = place
        forward = forwards(pose, self.skeleton)
        return math.atan2(forward[0], forward[2]) if math.hypot(forward[0], forward[2]) > 1e-6 else 0.0

    def __repr__(self) -> str:
        names = ", ".join(self.skeleton.names[j] for j in self.joints)
        return f"Constraints({len(self)} waypoints of {names or 'nothing'}, {self.start})"


def _keys(data: dict[Any, Any], known: Sequence[str], needed: Sequence[str], where: str) -> None:
    for key in data:
        if key not in known:
            raise InputError(f"{where}: unknown key {show(key)}; the keys are {', '.join(known)}")
    for key in needed:
        if key not in data:
            raise InputError(f"{where}: {key!r} is missing")


def _item(data: Any, where: str, skeleton: Skeleton) -> Waypoints:
    if not isinstance(data, dict):
        raise InputError(f"{where} is {show(data)}; an object with {', '.join(_ITEM_KEYS)} is needed")
    _keys(data, _ITEM_KEYS, _ITEM_KEYS, where)
    try:
        joint = skeleton.names[skeleton.joint(data["joint"])]
    except InputError as fault:
        raise InputError(f"{where}: {fault}") from None
    for key in ("frames", "positions"):
        if not isinstance(data[key], list):
            raise InputError(f"{where}.{key} is {show(data[key])}; a list is needed")
    frames, positions = _points(data["frames"], data["positions"], where)
    return Waypoints(joint, frames, positions)


def _points(frames: Any, positions: Any, where: str) -> tuple[np.ndarray, np.ndarray]:
    for key, values in (("frames", frames), ("positions", positions)):
        if isinstance(values, list | tuple) and len(values) > MAX_FRAMES:
            raise InputError(f"{where}.{key} has {len(values)} entries; at most {MAX_FRAMES} are allowed")
    if isinstance(frames, list | tuple):
        for i, frame in enumerate(frames):
            # numpy would turn 1.0, true and "1" into 1.
            whole = isinstance(frame, int | np.integer) and not isinstance(frame, bool)
            if not whole or not 0 <= int(frame) < MAX_FRAMES:
                raise InputError(
                    f"{where}.frames[{i}] = {show(frame)}; an integer from 0 to {MAX_FRAMES - 1} is needed"
                )
        frames = np.array(frames, np.int64)
    frames = np.atleast_1d(np.asarray(frames))
    if frames.ndim != 1 or frames.dtype.kind not in "iu" or not 1 <= len(frames) <= MAX_FRAMES:
        raise InputError(
            f"{where}.frames is {frames.dtype} {list(frames.shape)}; 1 to {MAX_FRAMES} integers are needed"
        )
    bad = np.flatnonzero((frames < 0) | (frames >= MAX_FRAMES))
    if len(bad):
        raise InputError(
            f"{where}.frames[{bad[0]}] = {frames[bad[0]]}; an integer from 0 to {MAX_FRAMES - 1} is needed"
        )
    frames = frames.astype(np.int64)
    order = np.argsort(frames, kind="stable")
    twice = np.flatnonzero(np.diff(frames[order]) == 0)
    if len(twice):
        i = order[twice[0] + 1]
        raise InputError(f"{where}.frames[{i}] = {frames[i]} is there twice; remove one")
    if isinstance(positions, list) and any(not isinstance(p, list | tuple | np.ndarray) for p in positions):
        positions = [positions]
    array = floats(np.atleast_2d(_plain(positions, where)), (3,), f"{where}.positions").astype(np.float64)
    if array.shape != (len(frames), 3):
        raise InputError(
            f"{where}.positions has shape {list(array.shape)}; {len(frames)} frames need {[len(frames), 3]}"
        )
    far = np.argwhere(~(np.abs(array) <= MAX_REACH))
    if len(far):
        i, k = far[0]
        raise InputError(f"{where}.positions[{i}][{k}] = {array[i, k]:g}; at most {MAX_REACH:g} m are allowed")
    return frames, array


def _plain(positions: Any, where: str) -> np.ndarray:
    if isinstance(positions, list | tuple):
        for i, row in enumerate(positions):
            for k, value in enumerate(row if isinstance(row, list | tuple) else ()):
                if isinstance(value, bool) or not isinstance(value, int | float | np.number):
                    raise InputError(f"{where}.positions[{i}][{k}] = {show(value)}; a number is needed")
    try:
        return np.asarray(positions, np.float64)
    except (ValueError, TypeError, OverflowError) as fault:
        raise InputError(f"{where}.positions is not a list of [x, y, z]: {str(fault)[:200]}") from None
