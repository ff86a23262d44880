"""Rotations of end-effector action spaces: six numbers, matrices, axis times angle."""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.errors import InputError


def matrix_to_rot6d(matrix: Any) -> np.ndarray:
    """The first two columns of rotation matrices [..., 3, 3], one after the other: [..., 6] fp64."""
    m = _floats(matrix, (3, 3))
    return np.concatenate([m[..., 0], m[..., 1]], axis=-1)


def rot6d_to_matrix(rot6d: Any) -> np.ndarray:
    """[..., 6] to rotation matrices [..., 3, 3] fp64 by Gram-Schmidt, divisors raised by 1e-6 as in X-VLA."""
    a = _floats(rot6d, (6,))
    first = _unit(a[..., :3])
    second = _unit(a[..., 3:] - (first * a[..., 3:]).sum(-1, keepdims=True) * first)
    return np.stack([first, second, np.cross(first, second)], axis=-1)


def matrix_to_axis_angle(matrix: Any) -> np.ndarray:
    """Rotation matrices [..., 3, 3] to axis * angle, [..., 3] fp64, angle in [0, pi] radians."""
    m = _floats(matrix, (3, 3))
    flat = m.reshape(-1, 3, 3)
    x, y, z = flat[:, :, 0], flat[:, :, 1], flat[:, :, 2]
    # The quaternion (x, y, z, w) is the main eigenvector of this symmetric matrix, stable at every angle.
    k = np.empty((len(flat), 4, 4))
    k[:, 0, 0] = x[:, 0] - y[:, 1] - z[:, 2]
    k[:, 1, 1] = y[:, 1] - x[:, 0] - z[:, 2]
    k[:, 2, 2] = z[:, 2] - x[:, 0] - y[:, 1]
    k[:, 3, 3] = x[:, 0] + y[:, 1] + z[:, 2]
    k[:, 0, 1] = k[:, 1, 0] = y[:, 0] + x[:, 1]
    k[:, 0, 2] = k[:, 2, 0] = z[:, 0] + x[:, 2]
    k[:, 1, 2] = k[:, 2, 1] = z[:, 1] + y[:, 2]
    k[:, 0, 3] = k[:, 3, 0] = y[:, 2] - z[:, 1]
    k[:, 1, 3] = k[:, 3, 1] = z[:, 0] - x[:, 2]
    k[:, 2, 3] = k[:, 3, 2] = x[:, 1] - y[:, 0]
    q = np.linalg.eigh(k)[1][:, :, -1]
    q = np.where(q[:, 3:] < 0, -q, q)
    sine = np.linalg.norm(q[:, :3], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(sine, q[:, 3:])
    out = np.where(sine > 1e-12, q[:, :3] / np.maximum(sine, 1e-12), 0) * angle
    return out.reshape(*m.shape[:-2], 3)


def libero_proprio(position: Any, rotation: Any) -> np.ndarray:
    """Proprioception of X-VLA in LIBERO: position [3] m, rot6d of rotation [3, 3], 0, ten zeros; [20] fp32."""
    return np.concatenate([_floats(position, (3,)), matrix_to_rot6d(rotation), np.zeros(11)]).astype(np.float32)


def libero_action(actions: Any) -> np.ndarray:
    """X-VLA's ee6d actions [..., 20] to LIBERO's [..., 7] fp32: xyz m, axis * angle rad, gripper +-1 (cut at 0.5)."""
    a = _floats(actions, (20,))
    gripper = np.where(a[..., 9:10] > 0.5, 1.0, -1.0)
    turn = matrix_to_axis_angle(rot6d_to_matrix(a[..., 3:9]))
    return np.concatenate([a[..., :3], turn, gripper], axis=-1).astype(np.float32)


def _unit(a: np.ndarray) -> np.ndarray:
    return a / (np.linalg.norm(a, axis=-1, keepdims=True) + 1e-6)


def _floats(values: Any, tail: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.shape[-len(tail) :] != tail or not np.isfinite(array).all():
        raise InputError(
            f"shape {list(array.shape)} or a value that is not finite; finite [..., {', '.join(map(str, tail))}]"
        )
    return array
