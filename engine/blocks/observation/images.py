"""Camera images to what a vision tower takes: layout, resize, range. Four published ways to resize, none like another.

The two bilinear ones differ: Pillow's averages over the source when it shrinks, torch's samples two pixels per axis.
A policy trained on one and fed by the other loses accuracy without any error, so the rule is part of the profile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.errors import InputError

MAX_SIDE = 8192
RESIZES = {
    "pad-pil": "keep the aspect, Pillow bilinear on uint8 (averages when shrinking), centred black padding",
    "pad-torch": "keep the aspect, torch bilinear on floats (no averaging), centred black padding",
    "pad-corner": "keep the aspect, torch bilinear after the range is applied, zeros to the left and on top",
    "stretch": "Pillow bicubic on uint8 to the full size, aspect not kept",
    "none": "as it comes",
}
RANGES = {"signed": "[-1, 1]", "imagenet": "ImageNet mean and deviation"}
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)


@dataclass(frozen=True)
class ImageRule:
    """How one camera image becomes pixels of the model.

    Args:
        resize: a key of `RESIZES`.
        size: (height, width); ignored by 'none'.
        range: 'signed' ([-1, 1]) or 'imagenet'.
        legacy_pad: padding of -3 instead of -1, as lerobot 0.4 made it (only 'pad-torch', for policies trained so).
        bytes_as_float: floats above 1 are taken as 0..255, as lerobot does for X-VLA; else they are refused.

    Raises:
        InputError: an unknown name or a size out of 1..8192.
    """

    resize: str
    size: tuple[int, int] = (224, 224)
    range: str = "signed"
    legacy_pad: bool = False
    bytes_as_float: bool = False

    def __post_init__(self) -> None:
        if self.resize not in RESIZES:
            raise InputError(f"resize={self.resize!r} is not known; there are {', '.join(RESIZES)}")
        if self.range not in RANGES:
            raise InputError(f"range={self.range!r} is not known; there are {', '.join(RANGES)}")
        if self.legacy_pad and self.resize != "pad-torch":
            raise InputError(f"legacy_pad belongs to resize 'pad-torch', not {self.resize!r}")
        if len(self.size) != 2 or not all(type(n) is int and 1 <= n <= MAX_SIDE for n in self.size):
            raise InputError(f"size={self.size!r} is not (height, width) of 1 to {MAX_SIDE}")

    @property
    def keeps_bytes(self) -> bool:
        """The resize works on uint8, so `apply` is `affine` of what `shape` returns."""
        return self.resize in ("pad-pil", "stretch")

    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        """(scale [3], offset [3]) fp32 with pixel = byte * scale + offset."""
        if self.range == "signed":
            return np.full(3, 2 / 255, np.float32), np.full(3, -1, np.float32)
        return 1 / (255 * _STD), -_MEAN / _STD

    def apply(self, image: Any, name: str = "image") -> np.ndarray:
        """Resize and bring into range.

        Args:
            image: uint8, or floats in [0, 1]; [H, W, 3] or [3, H, W].
            name: for messages.

        Returns:
            [height, width, 3] fp32.

        Raises:
            InputError: another dtype, shape or range; Pillow is needed and missing.
        """
        pixels = hwc(image, name)
        if self.keeps_bytes:
            return self._into_range(self.shape(pixels, name).astype(np.float32) / np.float32(255))
        unit = self._unit(pixels, name)
        if self.resize == "pad-corner":
            return _pad(self._into_range(unit), self.size, 0.0, corner=True)
        if self.resize == "pad-torch":
            # The older padding wrote -1 before [0, 1] was brought to [-1, 1].
            unit = _pad(unit, self.size, -1.0 if self.legacy_pad else 0.0, corner=False)
        return self._into_range(unit)

    def shape(self, image: Any, name: str = "image") -> np.ndarray:
        """The resized bytes alone, [height, width, 3] uint8, where `keeps_bytes`; errors as in `apply`."""
        pixels = hwc(image, name)
        if not self.keeps_bytes:
            raise InputError(f"resize {self.resize!r} works on floats; call apply()")
        if pixels.dtype != np.uint8:
            # Cut, not rounded: that is what the training data went through.
            pixels = (self._unit(pixels, name) * np.float32(255)).astype(np.uint8)
        if pixels.shape[:2] == self.size:
            return pixels
        return _stretch(pixels, self.size) if self.resize == "stretch" else _pad_pillow(pixels, self.size)

    def missing(self, size: tuple[int, int] | None = None) -> np.ndarray:
        """What stands in for a camera that is not there: black ('signed') or zeros, [height, width, 3] fp32."""
        return np.full((*(size or self.size), 3), -1 if self.range == "signed" else 0, np.float32)

    def _into_range(self, unit: np.ndarray) -> np.ndarray:
        return unit * np.float32(2) - np.float32(1) if self.range == "signed" else (unit - _MEAN) / _STD

    def _unit(self, pixels: np.ndarray, name: str) -> np.ndarray:
        if pixels.dtype == np.uint8:
            return pixels.astype(np.float32) / np.float32(255)
        unit = pixels.astype(np.float32)
        low, high = float(unit.min()), float(unit.max())
        if self.bytes_as_float and 1 < high <= 255 and low >= 0:
            return unit / np.float32(255)
        if not (low >= 0 and high <= 1):
            raise InputError(f"{name} holds floats from {low:g} to {high:g}; give uint8, or floats in [0, 1]")
        return unit


def hwc(image: Any, name: str = "image") -> np.ndarray:
    """[H, W, 3] view of an image that may be [3, H, W]; uint8 or float, 1 to 8192 pixels a side; else InputError."""
    array = np.asarray(image)
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise InputError(f"{name} is {array.dtype}; give uint8, or floats in [0, 1]")
    if array.ndim != 3 or 3 not in (array.shape[0], array.shape[2]):
        raise InputError(f"{name} has shape {list(array.shape)}; [H, W, 3] or [3, H, W] is needed")
    if array.shape[0] == 3 and array.shape[2] != 3:
        array = array.transpose(1, 2, 0)
    if not all(1 <= n <= MAX_SIDE for n in array.shape[:2]):
        raise InputError(f"{name} has shape {list(array.shape)}; 1 to {MAX_SIDE} pixels a side are allowed")
    return array


def bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize like torch's `interpolate(mode='bilinear', align_corners=False)`, without antialiasing.

    Args:
        image: [H, W, C] fp32.
        size: (height, width).

    Returns:
        [height, width, C] fp32.
    """
    for axis, count in enumerate(size):
        if count == image.shape[axis]:
            continue
        # Pixel centres are mapped onto each other; what falls before the first centre takes the first pixel.
        # torch rounds the ratio to fp32, and the fused product once.
        ratio = float(np.float32(image.shape[axis]) / np.float32(count))
        place = np.maximum(((np.arange(count) + 0.5) * ratio - 0.5).astype(np.float32), 0)
        low = place.astype(np.int64)
        part = (place - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        high = np.minimum(low + 1, image.shape[axis] - 1)
        image = image.take(low, axis) * (1 - part) + image.take(high, axis) * part
    return image


def _fit(shape: tuple[int, ...], size: tuple[int, int]) -> tuple[int, int]:
    """Largest (height, width) of the same aspect inside `size`; at least one pixel."""
    height, width = shape[:2]
    ratio = max(width / size[1], height / size[0])
    return max(1, int(height / ratio)), max(1, int(width / ratio))


def _pad(image: np.ndarray, size: tuple[int, int], value: float, corner: bool) -> np.ndarray:
    if image.shape[:2] == size:
        return image
    inner = bilinear(image, _fit(image.shape, size))
    out = np.full((*size, 3), value, np.float32)
    rows, columns = (total - n for total, n in zip(size, inner.shape[:2], strict=True))
    top, left = (rows, columns) if corner else (rows // 2, columns // 2)
    out[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
    return out


def _pad_pillow(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    pillow = _pillow()
    height, width = _fit(pixels.shape, size)
    inner = pillow.fromarray(np.ascontiguousarray(pixels)).resize((width, height), pillow.Resampling.BILINEAR)
    out = np.zeros((*size, 3), np.uint8)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    out[top : top + height, left : left + width] = np.asarray(inner)
    return out


def _stretch(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    pillow = _pillow()
    image = pillow.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((size[1], size[0]), pillow.Resampling.BICUBIC))


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as fault:
        raise InputError(
            "this policy's resize needs Pillow: pip install 'quintet-engine[robot]', or send images of its size"
        ) from fault
    return Image
