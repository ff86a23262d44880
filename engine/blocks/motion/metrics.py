"""How well a motion follows its waypoints, and how natural it moves, without a learned judge.

All take metres. Source: OmniControl (errors), GMD (foot skate).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.blocks.motion.arrays import floats, fps, scalar
from engine.blocks.motion.skeleton import HUMANML3D, Skeleton
from engine.errors import InputError


@dataclass(frozen=True)
class ControlError:
    """Distances to waypoints, over all motions of a batch.

    A keyframe is a frame with waypoints; its error is the mean distance of its constrained joints.

    Attributes:
        average: mean error of the keyframes, m.
        max: largest distance of one joint, m.
        location: share of keyframes with an error above the limit.
        trajectory: share of motions with such a keyframe.
        joints: (name, mean distance in m, largest in m) of each constrained joint.
    """

    average: float
    max: float
    location: float
    trajectory: float
    joints: tuple[tuple[str, float, float], ...]


def control_error(
    joints: Any, target: Any, mask: Any, *, limit: float = 0.5, skeleton: Skeleton = HUMANML3D
) -> ControlError:
    """Compare motions with their targets.

    Args:
        joints: [T, J, 3] or [B, T, J, 3] metres.
        target: of the same shape; what is masked out is not looked at.
        mask: [T, J] or [B, T, J] bool.
        limit: metres; published tables have 0.5.
        skeleton: for names.

    Raises:
        InputError: shapes that do not fit, an empty mask, a value that is not finite.
    """
    p = floats(joints, (None, skeleton.joints, 3), "joints").astype(np.float64)
    keep, wanted = np.asarray(mask), np.asarray(target)
    if p.ndim not in (3, 4) or keep.dtype != np.bool_ or keep.shape != p.shape[:-1] or wanted.shape != p.shape:
        raise InputError(
            f"joints {list(p.shape)}, target {list(wanted.shape)} and mask {keep.dtype} {list(keep.shape)} do not fit; "
            "[T, J, 3], [T, J, 3] and bool [T, J] are needed, or with a batch before them"
        )
    if not keep.any():
        raise InputError("the mask is empty: there is no waypoint to compare with")
    limit = scalar(limit, "limit", 0, 1e6)
    wanted = floats(np.where(keep[..., None], wanted, 0), (3,), "target").astype(np.float64)
    p, wanted, keep = (x.reshape(-1, *x.shape[-n:]) for x, n in ((p, 3), (wanted, 3), (keep, 2)))
    far = np.where(keep, np.linalg.norm(p - wanted, axis=-1), 0)
    count = keep.sum(-1)
    key = count > 0
    error = far.sum(-1) / np.maximum(count, 1)
    missed = key & (error > limit)
    constrained = key.any(-1)
    each = tuple(
        (name, float(far[..., j][keep[..., j]].mean()), float(far[..., j].max()))
        for j, name in enumerate(skeleton.names)
        if keep[..., j].any()
    )
    return ControlError(
        float(error[key].mean()),
        float(far.max()),
        float(missed.sum() / key.sum()),
        float(missed.any(-1)[constrained].mean()),
        each,
    )


def foot_skate(joints: Any, rate: float = 20.0, *, skeleton: Skeleton = HUMANML3D) -> np.ndarray:
    """Share of the steps between frames in which a foot slides along the floor.

    A foot does when it is below 5 cm in both frames and moves along the floor faster than 0.5 m/s, both then and on
    average over five steps (zeros beyond the ends).

    Args:
        joints: [..., T, J, 3] metres with the floor at y = 0, T >= 2.
        rate: frames a second.
        skeleton: which of the joints are feet.

    Returns:
        [...] fp64 in [0, 1].
    """
    p = _moving(joints, skeleton, 2)[..., list(skeleton.skating), :]
    speed = np.linalg.norm(np.diff(p[..., [0, 2]], axis=-3), axis=-1) * fps(rate)
    low = p[..., 1] < 0.05
    padded = np.pad(speed, [(0, 0)] * (speed.ndim - 2) + [(2, 2), (0, 0)])
    average = np.lib.stride_tricks.sliding_window_view(padded, 5, axis=-2).mean(-1)
    sliding = low[..., 1:, :] & low[..., :-1, :] & (speed > 0.5) & (average > 0.5)
    return sliding.any(-1).mean(-1)


def jerk(joints: Any, rate: float = 20.0, *, skeleton: Skeleton = HUMANML3D) -> np.ndarray:
    """Mean length of the third derivative of positions, [...] fp64 m/s^3, of joints [..., T, J, 3] metres, T >= 4."""
    p = _moving(joints, skeleton, 4)
    return np.linalg.norm(np.diff(p, 3, axis=-3), axis=-1).mean((-1, -2)) * fps(rate) ** 3


def _moving(joints: Any, skeleton: Skeleton, least: int) -> np.ndarray:
    p = floats(joints, (None, skeleton.joints, 3), "joints").astype(np.float64)
    if p.shape[-3] < least:
        raise InputError(f"joints has {p.shape[-3]} frames; at least {least} are needed")
    return p
