"""Rotations of bones: matrices act on column vectors; quaternions are (x, y, z, w); angles are radians."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_TINY = 1e-12


def yaw(angle: np.ndarray | float) -> np.ndarray:
    """Rotation about +Y: [...] rad to [..., 3, 3]; +Z turns towards +X."""
    return axis_rotation(np.asarray(angle, np.float64), 1)


def axis_rotation(angle: np.ndarray, axis: int) -> np.ndarray:
    """Rotation about axis 0, 1 or 2: [...] rad to [..., 3, 3] fp64."""
    i, j = (axis + 1) % 3, (axis + 2) % 3
    out = np.zeros((*angle.shape, 3, 3))
    out[..., axis, axis] = 1
    out[..., i, i] = out[..., j, j] = np.cos(angle)
    out[..., j, i] = np.sin(angle)
    out[..., i, j] = -out[..., j, i]
    return out


def matrix_to_6d(matrix: np.ndarray) -> np.ndarray:
    """The first two columns of [..., 3, 3], one after the other: [..., 6]."""
    return np.concatenate([matrix[..., 0], matrix[..., 1]], axis=-1)


def matrix_from_6d(six: np.ndarray) -> np.ndarray:
    """[..., 6] to rotation matrices [..., 3, 3]: x = a, z = x x b, y = z x x, each of length one.

    A pair that spans no plane gives some rotation, never NaN. Source: HumanML3D.
    """
    x, b = unit(six[..., :3], (1, 0, 0)), six[..., 3:]
    z = np.cross(x, b)
    z = np.where(_norm(z) > _TINY, z, _across(x))
    z = unit(z, (0, 0, 1))
    return np.stack([x, np.cross(z, x), z], axis=-1)


def between(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The shortest rotation that turns unit vectors [..., 3] into others: [..., 3, 3].

    Opposite vectors turn about an axis across them that depends on nothing but the source.
    """
    middle = source + target
    middle = unit(np.where(_norm(middle) > 1e-7, middle, _across(source)), (1, 0, 0))
    # Two half turns, about the source and about the middle: a rotation for any input, however the middle is rounded.
    return _half_turn(middle) @ _half_turn(source)


def unit(vectors: np.ndarray, otherwise: Sequence[float]) -> np.ndarray:
    """[..., 3] scaled to length one; vectors of no length become `otherwise`."""
    norm = _norm(vectors)
    return np.where(norm > _TINY, vectors / np.maximum(norm, _TINY), np.asarray(otherwise, vectors.dtype))


def from_euler(angles: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """R = R[axes[0]] R[axes[1]] ...: [..., n] rad to [..., 3, 3]; the identity for n = 0."""
    out = np.broadcast_to(np.eye(3), (*angles.shape[:-1], 3, 3))
    for k, axis in enumerate(axes):
        out = out @ axis_rotation(angles[..., k], axis)
    return np.ascontiguousarray(out)


def to_euler(matrix: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """The way back of `from_euler` for three different axes: [..., 3, 3] to [..., 3] rad, the second up to pi/2."""
    i, j, k = axes
    sign = 1.0 if (j - i) % 3 == 1 else -1.0
    first = np.arctan2(-sign * matrix[..., j, k], matrix[..., k, k])
    # With the first turn undone the other two are read from entries that stay defined at the poles.
    rest = axis_rotation(first, i).swapaxes(-1, -2) @ matrix
    second = np.arctan2(sign * rest[..., i, k], rest[..., k, k])
    third = np.arctan2(sign * rest[..., j, i], rest[..., j, j])
    return np.stack([first, second, third], axis=-1)


def to_quaternion(matrix: np.ndarray) -> np.ndarray:
    """Rotation matrices [..., 3, 3] to unit quaternions [..., 4] with w >= 0."""
    m = np.asarray(matrix, np.float64)
    x, y, z = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    # Row k is 4 q[k] q; the row with the largest diagonal loses no digits.
    products = np.empty((*m.shape[:-2], 4, 4))
    diagonal = (1 + x - y - z, 1 - x + y - z, 1 - x - y + z, 1 + x + y + z)
    for a in range(4):
        products[..., a, a] = diagonal[a]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        c = 3 - a - b
        products[..., a, b] = products[..., b, a] = m[..., a, b] + m[..., b, a]
        turn = m[..., b, a] - m[..., a, b] if (a, b) != (0, 2) else m[..., 0, 2] - m[..., 2, 0]
        products[..., c, 3] = products[..., 3, c] = turn
    best = np.argmax(np.stack(diagonal, axis=-1), axis=-1)
    q = np.take_along_axis(products, best[..., None, None], axis=-2)[..., 0, :]
    q = q / np.linalg.norm(q, axis=-1, keepdims=True)
    return np.where(q[..., 3:] < 0, -q, q)


def from_quaternion(quaternion: np.ndarray) -> np.ndarray:
    """Unit quaternions [..., 4] to rotation matrices [..., 3, 3]."""
    x, y, z, w = np.moveaxis(np.asarray(quaternion, np.float64), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def slerp(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Unit quaternions [..., 4] between two, the short way round; share [...] in [0, 1]."""
    dot = (first * second).sum(-1, keepdims=True)
    second = np.where(dot < 0, -second, second)
    angle = np.arccos(np.clip(np.abs(dot), 0, 1))
    sine, s = np.sin(angle), share[..., None]
    # Close together the arc is its chord.
    near = sine < 1e-6
    safe = np.where(near, 1, sine)
    a = np.where(near, 1 - s, np.sin((1 - s) * angle) / safe)
    b = np.where(near, s, np.sin(s * angle) / safe)
    out = a * first + b * second
    return out / np.linalg.norm(out, axis=-1, keepdims=True)


def continuous(quaternions: np.ndarray) -> np.ndarray:
    """[T, ..., 4] with signs such that neighbours in time are close: q and -q are the same rotation."""
    dots = (quaternions[1:] * quaternions[:-1]).sum(-1)
    flips = np.cumprod(np.where(dots < 0, -1.0, 1.0), axis=0)
    return np.concatenate([quaternions[:1], quaternions[1:] * flips[..., None]])


def _norm(vectors: np.ndarray) -> np.ndarray:
    return np.sqrt((vectors * vectors).sum(-1, keepdims=True))


def _half_turn(axis: np.ndarray) -> np.ndarray:
    return 2 * axis[..., :, None] * axis[..., None, :] - np.eye(3)


def _across(vectors: np.ndarray) -> np.ndarray:
    """Some vector at a right angle to each unit vector [..., 3]."""
    other = np.where(np.abs(vectors[..., :1]) < 0.8, np.array([1.0, 0, 0]), np.array([0, 1.0, 0]))
    return np.cross(vectors, other)
