"""Checks of arrays that users hand in."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np

from engine.errors import InputError

MAX_FRAMES = 100_000
#: Farther than this from the origin, in metres or the unit of a file, is damage and not a pose.
FAR = 1e6


def floats(values: Any, tail: tuple[int | None, ...], what: str) -> np.ndarray:
    """Finite floats [..., *tail], fp32 and fp64 as they are, else fp64; None in `tail` is any size.

    Raises:
        InputError: another type or shape, a value that is not finite or beyond 1e6, too many frames.
    """
    try:
        array = np.asarray(values)
    except (ValueError, TypeError) as fault:
        raise InputError(f"{what} is not an array: {str(fault)[:200]}") from fault
    wanted = ", ".join(["...", *("any" if n is None else str(n) for n in tail)])
    if array.dtype.kind not in "fiu" or array.ndim < len(tail):
        raise InputError(f"{what} is {array.dtype} {list(array.shape)}; numbers [{wanted}] are needed")
    shape = array.shape[array.ndim - len(tail) :]
    if any(n is not None and n != got for n, got in zip(tail, shape)):
        raise InputError(f"{what} has shape {list(array.shape)}; [{wanted}] is needed")
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    # Written so that NaN fails.
    if not (np.abs(array) <= FAR).all():
        place = tuple(int(i) for i in np.argwhere(~(np.abs(array) <= FAR))[0])
        raise InputError(f"{what}{list(place)} is {array[place]}; finite numbers of at most {FAR:g} are needed")
    return array


def poses(values: Any, joints: int | None, what: str = "joints", least: int = 1) -> np.ndarray:
    """One motion [T, J, 3] as `floats`, with `least` to 100,000 frames."""
    array = floats(values, (None, joints, 3), what)
    if array.ndim != 3 or not least <= len(array) <= MAX_FRAMES:
        raise InputError(
            f"{what} has shape {list(array.shape)}; [T, J, 3] with {least} to {MAX_FRAMES} frames is needed"
        )
    return array


def scalar(value: Any, what: str, low: float, high: float) -> float:
    """A finite number in [low, high].

    Raises:
        InputError: anything else, true and false included.
    """
    plain = isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)
    if not plain or not math.isfinite(float(value)) or not low <= float(value) <= high:
        raise InputError(f"{what} = {str(value)[:80]}; a number from {low:g} to {high:g} is needed")
    return float(value)


def fps(value: Any, what: str = "fps") -> float:
    """Frames a second, 0.1 to 1000."""
    return scalar(value, what, 0.1, 1000)
