"""What a request gives: a motion, how well it meets its waypoints, and the files it can be saved as."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.blocks.motion import (
    Bvh,
    Constraints,
    Residual,
    Skeleton,
    StartPose,
    bvh_from_features,
    bvh_from_joints,
    resample,
    save_animation,
    save_glb,
)
from engine.blocks.motion.bvh import write_bytes
from engine.errors import InputError

FORMATS = (".npy", ".bvh", ".glb", ".gif", ".mp4")


@dataclass(frozen=True, eq=False)
class Motion:
    """A motion in the user's world.

    Attributes:
        joints: [T, J, 3] fp32 metres, Y up.
        features: [T, D] fp32 as the data set has them, denormalised; from the origin, in the data set's unit.
        tokens: [N] int32.
        fps: frames a second.
        text: of the request; None without.
        constraints: its waypoints; None without.
        residuals: how far the motion stays from each item of them; of what cannot be reached it says how much is
            missing.
        evaluations: of the guidance's loss and gradient, over all steps.
        stages: milliseconds of each stage: text, trajectory, planner, decoder, output.
        start: where the features' origin lies in the user's world.
    """

    joints: np.ndarray
    features: np.ndarray
    tokens: np.ndarray
    fps: float
    skeleton: Skeleton
    start: StartPose
    scale: float
    text: str | None = None
    constraints: Constraints | None = None
    residuals: Sequence[Residual] = ()
    evaluations: int = 0
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def frames(self) -> int:
        return len(self.joints)

    def resampled(self, fps: float) -> np.ndarray:
        """Joints [T', J, 3] at another frame rate, linear between frames (30 and 60 are what physics and games ask)."""
        return resample(self.joints, self.fps, fps)

    def bvh(self, mode: str = "pos", *, fps: float | None = None, scale: float = 100.0) -> Bvh:
        """The motion as BVH, by default in centimetres.

        mode: 'pos' from positions, right after guidance; 'rot' from the features of rotations, which guidance leaves
        as they are. fps: another frame rate, rotations on the arc.

        Raises:
            InputError: another mode.
        """
        if mode == "pos":
            out = bvh_from_joints(self.joints, self.skeleton, rate=self.fps, scale=scale)
        elif mode == "rot":
            start = StartPose(
                (self.start.origin[0] / self.scale, self.start.origin[1] / self.scale), self.start.heading
            )
            out = bvh_from_features(self.features, self.skeleton, rate=self.fps, scale=scale * self.scale, start=start)
        else:
            raise InputError(f"mode={mode!r} is not 'pos' (from positions) or 'rot' (from rotations)")
        return out if fps is None else out.resample(fps)

    def save_npy(self, path: str | Path) -> Path:
        """Joints [T, J, 3], fp32 metres."""
        return _array(path, self.joints)

    def save_features(self, path: str | Path) -> Path:
        """Features [T, D], fp32, denormalised."""
        return _array(path, self.features)

    def save_bvh(self, path: str | Path, mode: str = "pos", **more: Any) -> Path:
        """See `bvh`."""
        return self.bvh(mode, **more).save(path)

    def save_glb(self, path: str | Path, *, fps: float | None = None) -> Path:
        """glTF 2.0 with a skinned figure, metres."""
        return save_glb(self.bvh(fps=fps, scale=1.0), path)

    def save_animation(self, path: str | Path, **look: Any) -> Path:
        """The skeleton with its waypoints as .gif or .mp4; see `engine.blocks.motion.draw` for size, turn, title."""
        return save_animation(self.joints, path, self.constraints, rate=self.fps, skeleton=self.skeleton, **look)

    def save(self, path: str | Path) -> Path:
        """By the suffix: .npy (joints), .bvh, .glb, .gif or .mp4.

        Raises:
            InputError: another suffix, a missing package, a file that cannot be written.
        """
        writers: dict[str, Callable[[str | Path], Path]] = {
            ".npy": self.save_npy, ".bvh": self.save_bvh, ".glb": self.save_glb, ".gif": self.save_animation,
            ".mp4": self.save_animation,
        }  # fmt: skip
        suffix = Path(path).suffix.lower()
        if suffix not in writers:
            raise InputError(f"{path}: a motion is saved as {', '.join(FORMATS)}")
        return writers[suffix](path)

    def __repr__(self) -> str:
        text = f"{self.text[:40]!r}, " if self.text else ""
        far = f", {max(r.max for r in self.residuals) * 100:.2f} cm off at most" if self.residuals else ""
        return f"<Motion {text}{self.frames} frames at {self.fps:g} fps, {len(self.tokens)} tokens{far}>"


def _array(path: str | Path, array: np.ndarray) -> Path:
    data = io.BytesIO()
    np.save(data, array, allow_pickle=False)
    return write_bytes(path, data.getvalue())
