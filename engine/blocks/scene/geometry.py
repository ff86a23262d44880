"""Depth maps and camera poses to world coordinates of pixels.

Metres; a camera looks along its +Z, x to the right, y down, as the depth maps of ScanNet have it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.blocks.observation.images import MAX_SIDE
from engine.blocks.scene.boxes import FAR
from engine.blocks.scene.frames import MAX_FRAMES, check_total
from engine.blocks.scene.resizing import center_window
from engine.errors import InputError
from engine.io.values import show

#: Metres; floats above this are millimetres by mistake.
MAX_DEPTH = 1000.0
RULES = ("resize", "center_crop")


def nearest_index(count: int, source: int) -> np.ndarray:
    """[count] int64: which of `source` pixels each of `count` takes, as OpenCV's INTER_NEAREST."""
    # OpenCV inverts the ratio of the new size to the old; source / count differs from that in the last bit.
    return np.minimum(np.floor(np.arange(count) * (1.0 / (count / source))).astype(np.int64), source - 1)


def world_coordinates(
    depth: Any,
    intrinsics: Any,
    poses: Any,
    axis_align: Any = None,
    size: tuple[int, int] = (384, 384),
    rule: str = "resize",
) -> np.ndarray:
    """The point of the world that each pixel shows.

    Only the pixels that the nearest resize keeps are computed. Depth 0 (not measured) gives the camera's centre, as
    in the published evaluation.

    Args:
        depth: [T, h, w]: integers are millimetres, floats metres.
        intrinsics: [3, 3] or [4, 4], or one for each frame, of the depth camera at this h and w, in pixels.
        poses: [T, 4, 4] from camera to world.
        axis_align: [4, 4] applied after the poses; default: none.
        size: (H, W) of the result.
        rule: 'resize' to the size, aspect not kept, or 'center_crop', which keeps the height (see `center_crop`).

    Returns:
        [T, H, W, 3] fp32 metres.

    Raises:
        InputError: shapes or counts that do not fit, a depth that is negative, not finite or above 1000 m, intrinsics
            or a pose that are not finite or cannot be inverted, an unknown rule, a result of more than 2^28 pixels.
    """
    metres, scale = _depth(depth)
    frames, height, width = metres.shape
    focal = _intrinsics(intrinsics, frames)
    matrices = _matrices(poses, "poses")
    if len(matrices) != frames:
        raise InputError(f"poses has {len(matrices)} matrices for {frames} depth maps; one for each is needed")
    if axis_align is not None:
        matrices = _matrices([axis_align], "axis_align")[0] @ matrices
    rows, columns = _kept((height, width), size, rule)
    check_total(frames, size)
    m = matrices.astype(np.float32)[:, None, None]
    fx, fy, cx, cy = (focal[:, i, None, None] for i in range(4))
    z = metres[:, rows[:, None], columns].astype(np.float32) / scale
    x = (columns.astype(np.float32) - cx) * z / fx
    y = (rows.astype(np.float32)[:, None] - cy) * z / fy
    point = [m[..., i, 0] * x + m[..., i, 1] * y + m[..., i, 2] * z + m[..., i, 3] for i in range(4)]
    return np.stack(point[:3], axis=-1) / point[3][..., None]


def resize_coordinates(coords: Any, size: tuple[int, int] = (384, 384), rule: str = "resize") -> np.ndarray:
    """World coordinates [T, h, w, 3] that a user has, resized like those of `world_coordinates`; fp32."""
    points = check_coordinates(coords)
    rows, columns = _kept(points.shape[1:3], size, rule)
    check_total(len(points), size)
    return points[:, rows[:, None], columns]


def check_coordinates(coords: Any, frames: int | None = None, size: tuple[int, int] | None = None) -> np.ndarray:
    """World coordinates as [T, H, W, 3] fp32, finite, for `frames` frames of `size` where given; else InputError."""
    points = numbers(coords, (None, None, 3), "coords")
    if points.ndim != 4 or not 1 <= len(points) <= MAX_FRAMES or not all(1 <= n <= MAX_SIDE for n in points.shape[1:3]):
        raise InputError(f"coords has shape {list(points.shape)}; [T, H, W, 3] is needed")
    if frames is not None and len(points) != frames:
        raise InputError(f"coords has {len(points)} frames; there are {frames} pictures")
    if size is not None and points.shape[1:3] != tuple(size):
        raise InputError(f"coords is {points.shape[1]} x {points.shape[2]} pixels; {size[0]} x {size[1]} are needed")
    return points


def numbers(values: Any, tail: tuple[int | None, ...], what: str) -> np.ndarray:
    """Finite fp32 [..., *tail] of at most 1e6."""
    try:
        array = np.asarray(values)
    except (ValueError, TypeError) as fault:
        raise InputError(f"{what} is not an array: {str(fault)[:200]}") from fault
    shape = array.shape[max(array.ndim - len(tail), 0) :]
    fits = len(shape) == len(tail) and all(n is None or n == got for n, got in zip(tail, shape))
    if array.dtype.kind not in "fiu" or not fits:
        raise InputError(f"{what} is {array.dtype} {list(array.shape)}; numbers [..., {str(list(tail))[1:-1]}]")
    # Written so that NaN fails.
    good = np.abs(array) <= FAR
    if not good.all():
        place = tuple(int(i) for i in np.argwhere(~good)[0])
        raise InputError(f"{what}{list(place)} is {array[place]}; finite metres of at most {FAR:g} are needed")
    return array.astype(np.float32)


def _depth(values: Any) -> tuple[np.ndarray, np.float32]:
    """[T, h, w] and what its values are divided by to be metres."""
    try:
        depth = np.asarray(values)
    except (ValueError, TypeError) as fault:
        raise InputError(f"depth is not an array: {str(fault)[:200]}") from fault
    if depth.dtype.kind not in "fiu" or depth.ndim != 3 or not 1 <= len(depth) <= MAX_FRAMES:
        raise InputError(
            f"depth is {depth.dtype} {list(depth.shape)}; [T, h, w] in millimetres (integers) or metres (floats), "
            f"1 to {MAX_FRAMES} maps, is needed"
        )
    if not all(1 <= n <= MAX_SIDE for n in depth.shape[1:]):
        raise InputError(f"depth has shape {list(depth.shape)}; 1 to {MAX_SIDE} pixels a side are allowed")
    scale = np.float32(1 if depth.dtype.kind == "f" else 1000)
    good = (depth >= 0) & (depth <= MAX_DEPTH * float(scale))
    if not good.all():
        t, v, u = (int(i) for i in np.argwhere(~good)[0])
        raise InputError(
            f"depth[{t}][{v}][{u}] is {depth[t, v, u]} in {depth.dtype}; floats are metres, integers millimetres, from "
            f"0 (not measured) to {MAX_DEPTH:g} m"
        )
    return depth, scale


def _intrinsics(values: Any, frames: int) -> np.ndarray:
    """[T or 1, 4] fp32: fx, fy, cx, cy."""
    matrix = numbers(values, (None, None), "intrinsics")
    if matrix.shape[-2:] not in ((3, 3), (4, 4)) or matrix.shape[:-2] not in ((), (1,), (frames,)):
        raise InputError(
            f"intrinsics has shape {list(matrix.shape)}; [3, 3] or [4, 4], or one for each of {frames} frames"
        )
    matrix = matrix.reshape(-1, *matrix.shape[-2:])
    fx, fy, cx, cy = matrix[:, 0, 0], matrix[:, 1, 1], matrix[:, 0, 2], matrix[:, 1, 2]
    if not ((fx > 0) & (fy > 0)).all():
        raise InputError(
            "intrinsics have a focal length that is not positive; fx is [0][0] and fy is [1][1], in pixels"
        )
    if (np.abs(matrix[:, 0, 1]) > 1e-3 * fx).any():
        raise InputError("intrinsics have skew, which is not modelled; rectify the depth maps")
    return np.stack([fx, fy, cx, cy], axis=-1)


def _matrices(values: Any, what: str) -> np.ndarray:
    """[T, 4, 4] fp64 that move points and can be inverted."""
    try:
        matrix = np.asarray(values, np.float64)
    except (ValueError, TypeError) as fault:
        raise InputError(f"{what} is not an array of numbers: {str(fault)[:200]}") from fault
    if matrix.ndim != 3 or matrix.shape[1:] != (4, 4):
        raise InputError(f"{what} has shape {list(matrix.shape)}; [T, 4, 4] is needed ([4, 4] for axis_align)")
    bad = np.flatnonzero(~(np.abs(matrix) <= FAR).all((1, 2)))
    if len(bad):
        raise InputError(f"{what}[{bad[0]}] is not finite; a camera that lost track has no pose, leave its frame out")
    bad = np.flatnonzero((np.abs(matrix[:, 3] - [0, 0, 0, 1]) > 1e-4).any(-1))
    if len(bad):
        raise InputError(f"{what}[{bad[0]}] ends in {matrix[bad[0], 3].tolist()}; 0, 0, 0, 1 is needed (transposed?)")
    bad = np.flatnonzero(~(np.linalg.cond(matrix[:, :3, :3]) < 1e4))
    if len(bad):
        raise InputError(f"{what}[{bad[0]}] is singular; a rotation in its first three rows and columns is needed")
    return matrix


def _kept(source: tuple[int, ...], size: Any, rule: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the source that a nearest resize keeps."""
    if len(size) != 2 or not all(isinstance(n, int | np.integer) and 1 <= n <= MAX_SIDE for n in size):
        raise InputError(f"size = {show(size)}; (height, width) of 1 to {MAX_SIDE} is needed")
    if rule not in RULES:
        raise InputError(f"rule = {show(rule)}; one of {', '.join(RULES)} is needed")
    if rule == "resize":
        return nearest_index(size[0], source[0]), nearest_index(size[1], source[1])
    if size[0] != size[1]:
        raise InputError(f"center_crop makes squares, not {size[0]} x {size[1]}")
    width, left = center_window(source[0], source[1], size[0])
    return nearest_index(size[0], source[0]), nearest_index(width, source[1])[left : left + size[0]]
