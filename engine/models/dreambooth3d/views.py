"""Photos of a subject as the transformer sees them: on white, centred, at the size of a video or of a training square.

The released tools: an object on white in a square of 512 pixels, at most 0.7 of it wide, the square shrunk onto white;
at generation scaled to cover the video's frame, so that a square loses its top and bottom in a wide one.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.blocks.scene.frames import IMAGES, check_total, pillow
from engine.errors import InputError
from engine.io.values import show

SQUARE = 512  # pixels of a prepared view, and of a training photo
SHARE = 0.7  # of the square that an object may take
SHRINK = 0.5  # of the square itself, by default
MAX_VIEWS = 8
WHITE, NEAR_WHITE = 1.0, 0.98


@dataclass(frozen=True)
class View:
    """pixels f32 [H, W, 3] in [0, 1]; box: (top, left, bottom, right) of the object, if it is known."""

    pixels: np.ndarray
    box: tuple[int, int, int, int] | None = None


def read_views(given: Sequence[Any], *, shrink: float = SHRINK) -> list[View]:
    """1 to 8 views in the order of their times. Each: a path, a Pillow image or an array u8 [H, W, 3 or 4], or (image,
    mask) with a mask [H, W] of the object. What has a mask is prepared; what has none is taken as it is.

    Raises: InputError (how many, no picture, an empty mask, shapes or dtypes that do not fit).
    """
    if isinstance(given, str | os.PathLike) or not 1 <= len(given) <= MAX_VIEWS:
        raise InputError(f"1 to {MAX_VIEWS} reference views are needed, as a list")
    if not 0 < shrink <= 1:
        raise InputError(f"shrink={shrink!r} is not in (0, 1]")
    return [_view(f"view {i + 1}", one, shrink) for i, one in enumerate(given)]


def _view(name: str, given: Any, shrink: float) -> View:
    image, mask = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    pixels = _pixels(name, image)
    if mask is None and pixels.shape[2] == 4:
        mask = pixels[..., 3]
    if mask is None:
        return View(pixels[..., :3], _box(pixels[..., :3].min(-1) < NEAR_WHITE))
    alpha = np.asarray(mask)
    if alpha.shape != pixels.shape[:2] or alpha.dtype.kind not in "bfu":
        raise InputError(f"{name}: a mask {alpha.dtype}{list(alpha.shape)} for {list(pixels.shape[:2])} pixels")
    alpha = alpha.astype(np.float32) / (255 if alpha.dtype == np.uint8 else 1)
    if not np.isfinite(alpha).all() or alpha.min() < 0 or alpha.max() > 1:
        raise InputError(f"{name}: the mask must lie in [0, 1], or be u8 or bool")
    box = _box(alpha > 0.5)
    if box is None:
        raise InputError(f"{name}: the mask is empty; it must show where the object is")
    return _prepared(pixels[..., :3] * alpha[..., None] + WHITE * (1 - alpha[..., None]), box, shrink)


def _pixels(name: str, image: Any) -> np.ndarray:
    """f32 [H, W, 3 or 4] in [0, 1]."""
    if isinstance(image, str | os.PathLike):
        module, path = pillow(), Path(image)
        from PIL import ImageOps

        try:
            with module.open(path, formats=sorted(set(IMAGES.values()))) as file:
                check_total(1, file.size)
                image = ImageOps.exif_transpose(file).convert("RGBA" if file.has_transparency_data else "RGB")
        except (OSError, ValueError, SyntaxError, EOFError, module.DecompressionBombError) as fault:
            raise InputError(f"{name}: {path} cannot be read as a picture: {fault}") from fault
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (3, 4) or not array.size:
        raise InputError(f"{name}: {show(type(image).__name__)} of {array.dtype}{list(array.shape)}; u8 [H, W, 3 or 4]")
    return array.astype(np.float32) / 255


def _box(inside: np.ndarray) -> tuple[int, int, int, int] | None:
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if not len(rows):
        return None
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def _prepared(pixels: np.ndarray, box: tuple[int, int, int, int], shrink: float) -> View:
    """A square centred on the object, which takes at most SHARE of it, shrunk onto white."""
    height, width = pixels.shape[:2]
    top, left, bottom, right = box
    factor = max(SHARE * SQUARE / max(bottom - top, right - left), SQUARE / min(height, width))
    scaled = resized(pixels, max(SQUARE, round(height * factor)), max(SQUARE, round(width * factor)))
    centre = (factor * (top + bottom) / 2, factor * (left + right) / 2)
    first = [int(np.clip(round(c - SQUARE / 2), 0, n - SQUARE)) for c, n in zip(centre, scaled.shape[:2])]
    square = scaled[first[0] : first[0] + SQUARE, first[1] : first[1] + SQUARE]
    side = round(SQUARE * shrink)
    at = (SQUARE - side) // 2
    out = np.full((SQUARE, SQUARE, 3), WHITE, np.float32)
    out[at : at + side, at : at + side] = resized(square, side, side)
    return View(np.clip(out, 0, 1), _box(out.min(-1) < NEAR_WHITE))


def covering(view: View, height: int, width: int, *, name: str = "a view") -> np.ndarray:
    """f32 [height, width, 3] in [-1, 1]: scaled to cover the frame, and cut to it; warns where the object is cut."""
    h, w = view.pixels.shape[:2]
    # As released: the side that fits exactly, the other rounded down.
    if height / h >= width / w:
        size, scale = (height, max(width, int(w * height / h))), height / h
    else:
        size, scale = (max(height, int(h * width / w)), width), width / w
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    if view.box is not None:
        y0, x0, y1, x1 = (scale * b for b in view.box)
        if y0 < top - 1 or x0 < left - 1 or y1 > top + height + 1 or x1 > left + width + 1:
            warnings.warn(
                f"{name}: the object reaches beyond the {width} x {height} frame and is cut; prepare the view with a "
                "smaller shrink=, or choose another aspect",
                stacklevel=2,
            )
    out = resized(view.pixels, *size)[top : top + height, left : left + width]
    return np.clip(2 * out - 1, -1, 1)


def seen_cells(view: View, height: int, width: int, cell: int, margin: int) -> np.ndarray:
    """i64: cells of the frame, by row and column, within `margin` cells of the object, and those of its border."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `covering` has told, or will
        pixels = covering(view, height, width)
    grid = (height // cell, width // cell)
    inside = (pixels.min(-1) < 2 * NEAR_WHITE - 1).reshape(grid[0], cell, grid[1], cell).any((1, 3))
    keep = np.zeros(grid, bool)
    if (box := _box(inside)) is not None:
        keep[max(0, box[0] - margin) : box[2] + margin, max(0, box[1] - margin) : box[3] + margin] = True
    keep[[0, -1]] = True
    keep[:, [0, -1]] = True
    return np.flatnonzero(keep)


def square(pixels: np.ndarray, side: int = SQUARE) -> np.ndarray:
    """f32 [side, side, 3] in [-1, 1] of a photo [H, W, 3] in [0, 1]: its short side scaled, its middle cut out."""
    h, w = pixels.shape[:2]
    size = (side, max(side, int(w * side / h))) if h <= w else (max(side, int(h * side / w)), side)
    out = resized(pixels, *size)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return np.clip(2 * out[top : top + side, left : left + side] - 1, -1, 1)


def resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic with antialias, channel by channel in fp32: no value is rounded to eight bits on the way."""
    if pixels.shape[:2] == (height, width):
        return pixels
    image = pillow()

    def scaled(channel: np.ndarray) -> np.ndarray:
        whole = image.fromarray(np.ascontiguousarray(channel, np.float32))
        return np.asarray(whole.resize((width, height), image.BICUBIC))

    return np.stack([scaled(pixels[..., c]) for c in range(pixels.shape[2])], -1)
