"""Axis-aligned boxes (cx, cy, cz, sx, sy, sz) in metres: centre and full size along each axis of the world."""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.errors import InputError

#: Boxes of one scene or one answer.
MAX_BOXES = 4096
#: Metres; farther from the origin or larger than this is damage.
FAR = 1e6


def check_boxes(values: Any, what: str = "boxes", *, least: int = 0, limit: int = MAX_BOXES) -> np.ndarray:
    """Boxes as [K, 6] fp64.

    Args:
        values: [K, 6], one box [6], or an empty list.
        what: for messages.
        least, limit: how many there may be.

    Raises:
        InputError: another shape, too few or too many, a value that is not finite or beyond 1e6, a size that is not
            positive.
    """
    try:
        boxes = np.asarray(values)
    except (ValueError, TypeError) as fault:
        raise InputError(f"{what} is not an array: {str(fault)[:200]}") from fault
    if boxes.size == 0 and boxes.ndim <= 2:
        boxes = np.zeros((0, 6))
    boxes = np.atleast_2d(boxes)
    if boxes.dtype.kind not in "fiu" or boxes.ndim != 2 or boxes.shape[1] != 6:
        raise InputError(
            f"{what} is {boxes.dtype} {list(boxes.shape)}; numbers [K, 6] (cx, cy, cz, sx, sy, sz) are needed"
        )
    if not least <= len(boxes) <= limit:
        raise InputError(f"{what} has {len(boxes)} boxes; {least} to {limit} are allowed")
    boxes = boxes.astype(np.float64)
    # Written so that NaN fails.
    bad = np.argwhere(~(np.abs(boxes) <= FAR))
    if len(bad):
        k, i = bad[0]
        raise InputError(f"{what}[{k}][{i}] is {boxes[k, i]}; finite metres of at most {FAR:g} are needed")
    bad = np.argwhere(~(boxes[:, 3:] > 0))
    if len(bad):
        k, i = bad[0]
        raise InputError(
            f"{what}[{k}] has size {boxes[k, 3:].tolist()} m; a size is positive along every axis (is this min and "
            "max? boxes_from_corners converts)"
        )
    return boxes


def corners(boxes: Any) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest corner of boxes [K, 6]: two [K, 3] fp64; errors as in `check_boxes`."""
    made = check_boxes(boxes)
    return made[:, :3] - made[:, 3:] / 2, made[:, :3] + made[:, 3:] / 2


def boxes_from_corners(low: Any, high: Any) -> np.ndarray:
    """The way back of `corners`: two [K, 3] (or [3]) to [K, 6] fp64; high above low, else InputError."""
    try:
        a, b = (np.atleast_2d(np.asarray(x, np.float64)) for x in (low, high))
    except (ValueError, TypeError) as fault:
        raise InputError(f"corners are not arrays of numbers: {str(fault)[:200]}") from fault
    if a.shape != b.shape or a.ndim != 2 or a.shape[1] != 3:
        raise InputError(f"corners have shapes {list(a.shape)} and {list(b.shape)}; two [K, 3] are needed")
    bad = np.argwhere(~(a < b))
    if len(bad):
        k, i = bad[0]
        raise InputError(f"box {k} has low {a[k].tolist()} and high {b[k].tolist()}; axis {i} has no extent")
    return check_boxes(np.concatenate([(a + b) / 2, b - a], axis=1))


def iou(a: Any, b: Any) -> np.ndarray:
    """Volume of the intersection over that of the union, each box of `a` with each of `b`.

    Args:
        a: [K, 6].
        b: [L, 6].

    Returns:
        [K, L] fp64 in [0, 1].

    Raises:
        InputError: as `check_boxes`.
    """
    a, b = check_boxes(a, "a"), check_boxes(b, "b")
    return _overlap(a[:, None], b[None])


def paired_iou(a: Any, b: Any) -> np.ndarray:
    """`iou` of each box of `a` with the one of `b` at its place: [K, 6] and [K, 6] to [K]; any number of boxes."""
    a, b = (check_boxes(x, name, limit=np.iinfo(np.int32).max) for x, name in ((a, "a"), (b, "b")))
    if len(a) != len(b):
        raise InputError(f"{len(a)} boxes cannot be paired with {len(b)}")
    return _overlap(a, b)


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    low = np.maximum(a[..., :3] - a[..., 3:] / 2, b[..., :3] - b[..., 3:] / 2)
    high = np.minimum(a[..., :3] + a[..., 3:] / 2, b[..., :3] + b[..., 3:] / 2)
    common = np.maximum(high - low, 0).prod(-1)
    return common / (a[..., 3:].prod(-1) + b[..., 3:].prod(-1) - common)
