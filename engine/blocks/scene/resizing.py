"""How frames of a scene are resized and cut, the ways that published models were trained with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from engine.blocks.observation.images import ImageRule
from engine.blocks.scene.frames import check_total, pillow
from engine.errors import InputError


def resize(frames: Any, size: tuple[int, int]) -> np.ndarray:
    """Pillow's bicubic on bytes (averages when shrinking), aspect not kept: [T, h, w, 3] to [T, *size, 3] uint8."""
    pixels = check_frames(frames)
    rule = ImageRule("stretch", tuple(size))  # type: ignore[arg-type]
    check_total(len(pixels), rule.size)
    if pixels.shape[1:3] == rule.size:
        return pixels
    pillow()
    out = np.empty((len(pixels), *rule.size, 3), np.uint8)
    for to, frame in zip(out, pixels):
        to[...] = rule.shape(frame)
    return out


def center_crop(frames: Any, size: int = 384, aspect: tuple[int, int] | None = None) -> np.ndarray:
    """`resize` to the height `size`, then the middle square.

    Args:
        frames: [T, h, w, 3] uint8.
        size: of the square.
        aspect: (height, width) whose aspect the resize takes; default: the frames' own. With depth maps the published
            rule takes theirs, so that pictures and coordinates are cut alike.

    Returns:
        [T, size, size, 3] uint8.

    Raises:
        InputError: upright frames, a size out of 1..8192.
    """
    pixels = check_frames(frames)
    height, width = aspect or pixels.shape[1:3]
    width, left = center_window(height, width, size)
    return resize(pixels, (size, width))[:, :, left : left + size]


def center_window(height: int, width: int, size: int) -> tuple[int, int]:
    """Of `center_crop`: the width of the resized frame and the first column that is kept."""
    wide = int(width * (size / height))
    if wide < size:
        raise InputError(f"center_crop of frames of {height} x {width} pixels: wider than high is needed; use 'resize'")
    return wide, (wide - size) // 2


def fit_width(frames: Any, width: int = 518, patch: int = 14, merge: int = 2) -> np.ndarray:
    """To a width and a height of whole patches, for towers that merge `merge` x `merge` patches.

    The height follows the aspect and is rounded to patches; of one above the width the middle is kept; rows and
    columns of patches that do not fill a merge are cut at the right and at the bottom.

    Args:
        frames: [T, h, w, 3] uint8.
        width, patch: pixels.
        merge: patches.

    Returns:
        [T, H, W, 3] uint8, H and W multiples of patch * merge.

    Raises:
        InputError: nothing is left of the height, a width out of 1..8192.
    """
    pixels = check_frames(frames)
    height = round(pixels.shape[1] * (width / pixels.shape[2]) / patch) * patch
    kept = [n // patch // merge * merge * patch for n in (min(height, width), width)]
    if 0 in kept:
        raise InputError(f"frames of {pixels.shape[1]} x {pixels.shape[2]} pixels are too flat for patches of {patch}")
    top = max(0, (height - width) // 2)
    return np.ascontiguousarray(resize(pixels, (height, width))[:, top : top + kept[0], : kept[1]])


def smart_resize(
    height: int, width: int, factor: int = 28, min_pixels: int = 256 * 28 * 28, max_pixels: int = 1_605_632
) -> tuple[int, int]:
    """(height, width) in multiples of `factor`, aspect about kept, with min_pixels to max_pixels pixels.

    Source: `smart_resize` of transformers.

    Raises:
        InputError: sides that are not positive or differ by more than 200 times.
    """
    if min(height, width, factor) < 1 or max(height, width) > 200 * min(height, width):
        raise InputError(f"an image of {height} x {width} pixels has no side, or one 200 times the other")
    rows, columns = (round(n / factor) * factor for n in (height, width))
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(factor, math.floor(n / shrink / factor) * factor) for n in (height, width))
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(n * grow / factor) * factor for n in (height, width))
    return rows, columns


def check_frames(frames: Any) -> np.ndarray:
    """[T, H, W, 3] uint8 as it is, else InputError."""
    pixels = frames if isinstance(frames, np.ndarray) else np.asarray(frames)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise InputError(f"frames is {pixels.dtype} {list(pixels.shape)}; uint8 [T, H, W, 3] is needed (read_frames)")
    check_total(len(pixels), pixels.shape[1:3])
    return pixels
