"""Where a motion starts: between the user's world and the frame of the model, whose motions start at the origin."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.blocks.motion.arrays import FAR, floats, poses, scalar
from engine.blocks.motion.rotations import yaw
from engine.blocks.motion.skeleton import HUMANML3D, Skeleton
from engine.errors import InputError


@dataclass(frozen=True)
class StartPose:
    """The root of frame 0 in the user's world, Y up; heights are the same in both.

    Attributes:
        origin: (x, z) of the root.
        heading: where it faces, rad about +Y: 0 is +Z, pi / 2 is +X.

    Raises:
        InputError: not finite.
    """

    origin: tuple[float, float] = (0.0, 0.0)
    heading: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.origin, tuple | list | np.ndarray) or len(self.origin) != 2:
            raise InputError(f"origin = {str(self.origin)[:80]}; (x, z) is needed")
        checked = tuple(scalar(v, f"origin[{i}]", -FAR, FAR) for i, v in enumerate(self.origin))
        object.__setattr__(self, "origin", checked)
        object.__setattr__(self, "heading", scalar(self.heading, "heading", -1e3, 1e3))

    @classmethod
    def of(cls, joints: Any, skeleton: Skeleton = HUMANML3D) -> StartPose:
        """That of a motion [T, J, 3].

        Raises:
            InputError: another shape; hips and shoulders of frame 0 do not tell where it faces.
        """
        first = poses(joints, skeleton.joints)[0].astype(np.float64)
        forward = forwards(first, skeleton)
        if math.hypot(forward[0], forward[2]) < 1e-6:
            raise InputError(
                "frame 0 faces nowhere: its hips and shoulders lie above each other; start the motion at another frame"
            )
        return cls((float(first[0, 0]), float(first[0, 2])), math.atan2(forward[0], forward[2]))

    def to_model(self, points: Any) -> np.ndarray:
        """World [..., 3] to the model's frame, fp64."""
        moved = floats(points, (3,), "points") - self._offset
        return moved @ yaw(self.heading)

    def to_world(self, points: Any) -> np.ndarray:
        """The model's frame [..., 3] to the world, fp64."""
        return floats(points, (3,), "points") @ yaw(self.heading).T + self._offset

    @property
    def _offset(self) -> np.ndarray:
        return np.array([self.origin[0], 0.0, self.origin[1]])


def forwards(positions: np.ndarray, skeleton: Skeleton) -> np.ndarray:
    """Where poses [..., J, 3] face: [..., 3], level; shorter than one where the pose is tilted, 0 if undefined."""
    right_hip, left_hip, right_shoulder, left_shoulder = (positions[..., j, :] for j in skeleton.facing)
    across = (right_hip - left_hip) + (right_shoulder - left_shoulder)
    norm = np.linalg.norm(across, axis=-1, keepdims=True)
    across = np.where(norm > 1e-12, across / np.maximum(norm, 1e-12), 0)
    return np.stack([across[..., 2], np.zeros_like(across[..., 0]), -across[..., 0]], axis=-1)
