"""World coordinates to voxels and position codes, and the patches that show what is in a box.

The published evaluation of the 3D tasks holds coordinates, voxels and boxes in bfloat16; `coord_dtype="fp32"` does
not round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.blocks.scene.boxes import check_boxes
from engine.blocks.scene.geometry import check_coordinates, numbers
from engine.errors import InputError
from engine.io.tensors import bf16_to_f32, f32_to_bf16
from engine.io.values import show

COORD_DTYPES = ("bf16", "fp32")


@dataclass(frozen=True)
class Voxels:
    """Cubes that world coordinates are counted in.

    Attributes:
        low, high: metres; coordinates are clamped to them.
        size: edge of a voxel in metres.

    Raises:
        InputError: values that are not finite, high not above low, more than 32767 voxels along an axis.
    """

    low: tuple[float, float, float] = (-15.0, -15.0, -5.0)
    high: tuple[float, float, float] = (15.0, 15.0, 5.0)
    size: float = 0.1

    def __post_init__(self) -> None:
        try:
            low, high = (np.array(x, np.float64) for x in (self.low, self.high))
            size = float(self.size)
        except (ValueError, TypeError) as fault:
            raise InputError(f"voxels: {str(fault)[:200]}") from fault
        if low.shape != (3,) or high.shape != (3,) or not (np.isfinite(low) & np.isfinite(high) & (low < high)).all():
            raise InputError(f"voxels from {show(self.low)} to {show(self.high)}; three finite lows below three highs")
        if not 0 < size < np.inf or ((high - low) / size > 32766).any():
            raise InputError(f"voxels of {show(self.size)} m; at most 32767 of them along an axis")
        object.__setattr__(self, "low", tuple(low.tolist()))
        object.__setattr__(self, "high", tuple(high.tolist()))
        object.__setattr__(self, "size", size)

    @property
    def counts(self) -> tuple[int, int, int]:
        """One more than the highest index of each axis, in either dtype: what `position_tables` needs."""
        top = np.max([self.of(np.array(self.high), dtype) for dtype in COORD_DTYPES], axis=0)
        return tuple((top + 1).tolist())  # type: ignore[return-value]

    def of(self, points: Any, coord_dtype: str = "bf16") -> np.ndarray:
        """The voxel of each point.

        Clamp, subtract, divide and round half to even, each rounded to bf16 or to fp32. In bf16 an index above 256
        is even.

        Args:
            points: [..., 3] metres.
            coord_dtype: 'bf16' or 'fp32'.

        Returns:
            [..., 3] int32, at least 0.

        Raises:
            InputError: another shape or dtype, a value that is not finite.
        """
        narrow = _rounding(coord_dtype)
        points = numbers(points, (3,), "points")
        low, high = (narrow(np.array(x, np.float32)) for x in (self.low, self.high))
        inside = np.minimum(np.maximum(narrow(points), low), high)
        return np.rint(narrow(narrow(inside - low) / np.float32(self.size))).astype(np.int32)


def average_coordinates(
    coords: Any, grid: tuple[int, int] = (14, 14), patch: int = 27, coord_dtype: str = "bf16"
) -> np.ndarray:
    """Mean of the coordinates over each patch.

    Args:
        coords: [T, H, W, 3] metres; pixels beyond grid * patch, at the right and at the bottom, are left out.
        grid: (rows, columns) of patches.
        patch: edge of a patch in pixels.
        coord_dtype: 'bf16' rounds the coordinates first and the mean once, as torch's avg_pool2d of a bf16 tensor,
            which adds in fp32, row by row; 'fp32' does not round.

    Returns:
        [T, rows, columns, 3] fp32.

    Raises:
        InputError: as `check_coordinates`; patches that do not fit into the image.
    """
    narrow = _rounding(coord_dtype)
    tiles = _tiles(narrow(check_coordinates(coords)), grid, patch)
    total = np.zeros((*tiles.shape[:3], 3), np.float32)
    # One after another: numpy's own sum adds in pairs.
    for i in range(patch):
        for j in range(patch):
            total += tiles[..., i, j, :]
    return narrow(total / np.float32(patch * patch))


def patches_in_boxes(
    coords: Any,
    boxes: Any,
    grid: tuple[int, int] = (27, 27),
    patch: int = 14,
    *,
    share: float = 0.5,
    coord_dtype: str = "bf16",
) -> np.ndarray:
    """Which patches of each frame show what is in a box.

    A patch does when at least int(patch * patch * share) of its points lie in the box, faces included.

    Args:
        coords: [T, H, W, 3] metres; pixels beyond grid * patch are left out.
        boxes: [K, 6], see `check_boxes`.
        grid: (rows, columns) of patches.
        patch: edge of a patch in pixels.
        share: above 0, up to 1.
        coord_dtype: 'bf16' also rounds the boxes and their faces.

    Returns:
        [K, T, rows, columns] bool.

    Raises:
        InputError: as `check_coordinates` and `check_boxes`; patches that do not fit into the image.
    """
    narrow = _rounding(coord_dtype)
    made = narrow(check_boxes(boxes).astype(np.float32))
    if not isinstance(share, int | float) or not 0 < share <= 1:
        raise InputError(f"share = {show(share)}; above 0 and up to 1 is needed")
    tiles = _tiles(narrow(check_coordinates(coords)), grid, patch)
    points = np.ascontiguousarray(tiles).reshape(-1, patch * patch, 3)
    least, first, last = max(1, int(patch * patch * share)), points.min(1), points.max(1)
    out = np.zeros((len(made), len(points)), bool)
    for row, box in zip(out, made):
        low, high = narrow(box[:3] - box[3:] / 2), narrow(box[:3] + box[3:] / 2)
        near = np.flatnonzero(((first <= high) & (last >= low)).all(-1))
        inside = ((points[near] >= low) & (points[near] <= high)).all(-1)
        row[near] = inside.sum(-1) >= least
    return out.reshape(len(made), *tiles.shape[:3])


def position_tables(dims: int, counts: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sines and cosines of the voxel index along each axis.

    Args:
        dims: D of the model.
        counts: voxels along x, y and z (`Voxels.counts`).

    Returns:
        Three [count, D // 3] fp32: row v holds sin at even and cos at odd i of v / 10000^(2 (i // 2) / (D // 3)).

    Raises:
        InputError: D below 3, a count that is not 1 to 32767.
    """
    if not all(isinstance(n, int | np.integer) and 1 <= n <= 32767 for n in counts) or len(counts) != 3:
        raise InputError(f"counts = {show(counts)}; three integers from 1 to 32767 are needed")
    return tuple(_waves(np.arange(n), _width(dims)) for n in counts)  # type: ignore[return-value]


def position_code(voxels: Any, dims: int) -> np.ndarray:
    """Codes of voxels [..., 3]: x, y and z of `position_tables` one behind the other, then zeros; [..., D] fp32."""
    index = np.asarray(voxels)
    width = _width(dims)
    if index.dtype.kind not in "iu" or index.ndim < 1 or index.shape[-1] != 3 or (index < 0).any():
        raise InputError(f"voxels is {index.dtype} {list(index.shape)}; integers [..., 3] of at least 0 are needed")
    out = np.zeros((*index.shape[:-1], dims), np.float32)
    out[..., : 3 * width] = _waves(index, width).reshape(*index.shape[:-1], 3 * width)
    return out


def _waves(index: np.ndarray, width: int) -> np.ndarray:
    i = np.arange(width)
    angle = index[..., None] / 10000.0 ** (2 * (i // 2) / width)
    return np.where(i % 2, np.cos(angle), np.sin(angle)).astype(np.float32)


def _width(dims: Any) -> int:
    if not isinstance(dims, int | np.integer) or not 3 <= dims <= 1 << 20:
        raise InputError(f"dims = {show(dims)}; an integer of at least 3 is needed")
    return int(dims) // 3


def _rounding(coord_dtype: Any) -> Any:
    if coord_dtype not in COORD_DTYPES:
        raise InputError(f"coord_dtype = {show(coord_dtype)}; one of {', '.join(COORD_DTYPES)} is needed")
    return (lambda x: bf16_to_f32(f32_to_bf16(x))) if coord_dtype == "bf16" else (lambda x: x)


def _tiles(points: np.ndarray, grid: Any, patch: Any) -> np.ndarray:
    """[T, rows, columns, patch, patch, 3], a view where numpy can."""
    if not isinstance(patch, int) or patch < 1 or len(grid) != 2 or not all(isinstance(n, int) and n > 0 for n in grid):
        raise InputError(f"grid = {show(grid)}, patch = {show(patch)}; positive integers (rows, columns) and an edge")
    rows, columns = grid
    if rows * patch > points.shape[1] or columns * patch > points.shape[2]:
        raise InputError(
            f"{rows} x {columns} patches of {patch} pixels do not fit into coords of {points.shape[1]} x "
            f"{points.shape[2]} pixels; resize them first"
        )
    used = points[:, : rows * patch, : columns * patch]
    return used.reshape(len(points), rows, patch, columns, patch, 3).swapaxes(2, 3)
