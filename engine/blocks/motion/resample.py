"""Motions at another frame rate."""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.blocks.motion.arrays import MAX_FRAMES, floats, fps
from engine.blocks.motion.rotations import from_quaternion, slerp, to_quaternion
from engine.errors import InputError


def moments(frames: int, rate: float, to: float) -> tuple[np.ndarray, np.ndarray]:
    """Where the frames of the new rate lie among the old ones.

    Args:
        frames: T of the motion.
        rate, to: its frames a second, and the wanted ones.

    Returns:
        index [n] int64 of the frame before (at most T - 2 for T > 1), share [n] fp64 in [0, 1] of the frame after it.
        The first frame stays; the last is there where its moment is one of the new rate.

    Raises:
        InputError: a rate out of 0.1 to 1000, no frames, or more than 100,000 of them.
    """
    ratio = fps(rate, "fps") / fps(to, "to")
    # A last frame that lies there but for rounding is there.
    count = int(np.floor((frames - 1) / ratio + 1e-6)) + 1
    if frames < 1 or count > MAX_FRAMES:
        raise InputError(f"{frames} frames at {rate:g} fps make {count} at {to:g}; 1 to {MAX_FRAMES} are allowed")
    place = np.minimum(np.arange(count) * ratio, frames - 1)
    index = np.clip(np.floor(place + 1e-9).astype(np.int64), 0, max(frames - 2, 0))
    return index, np.clip(place - index, 0, 1)


def resample(values: Any, rate: float, to: float) -> np.ndarray:
    """Positions [T, ...] at `to` frames a second, linear in between; of the dtype of the values.

    Between frames the bones of turning limbs come out shorter; `Bvh.resample` keeps them.

    Raises:
        InputError: as `moments`; a value that is not finite.
    """
    x = floats(values, (), "values")
    if x.ndim < 1:
        raise InputError("values has no frames; [T, ...] is needed")
    index, share = moments(len(x), rate, to)
    after = np.minimum(index + 1, len(x) - 1)
    s = share.reshape(-1, *[1] * (x.ndim - 1))
    return (x[index] * (1 - s) + x[after] * s).astype(x.dtype)


def resample_rotations(matrices: Any, rate: float, to: float) -> np.ndarray:
    """Rotations [T, ..., 3, 3] at `to` frames a second, on the arc between two frames; fp64.

    Raises:
        InputError: as `moments`; another shape.
    """
    m = floats(matrices, (3, 3), "matrices")
    if m.ndim < 3:
        raise InputError(f"matrices has shape {list(m.shape)}; [T, ..., 3, 3] is needed")
    q = to_quaternion(m)
    index, share = moments(len(q), rate, to)
    after = np.minimum(index + 1, len(q) - 1)
    s = np.broadcast_to(share.reshape(-1, *[1] * (q.ndim - 2)), (len(share), *q.shape[1:-1]))
    return from_quaternion(slerp(q[index], q[after], s))
