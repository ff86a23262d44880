"""Pictures of a scene: arrays, images, a folder or a video to uint8 frames, and which of them to take."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.blocks.observation.images import MAX_SIDE, hwc
from engine.errors import InputError
from engine.io.values import show

#: Frames that are kept, and their pixels together (0.8 GB of uint8).
MAX_FRAMES = 1024
MAX_PIXELS = 1 << 28
#: Frames of a video or images of a folder that the kept ones are chosen from.
MAX_LISTED = 1_000_000
IMAGES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP"}
# Formats that hold their own pictures; playlists, which name other files and addresses, are not among them.
_CONTAINERS = "mov,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif"


@dataclass(frozen=True, eq=False)
class Frames:
    """Frames of a scene.

    Attributes:
        pixels: [T, H, W, 3] uint8 RGB.
        indices: [T] int64: which frames of the source they are; for its depth maps and poses.
        total: frames of the source.
    """

    pixels: np.ndarray
    indices: np.ndarray
    total: int


def uniform(total: int, count: int) -> np.ndarray:
    """`count` indices spread over `total` frames, first and last included, rounded down; they repeat if there are
    fewer frames. [count] int64."""
    _counts(total, count)
    return np.linspace(0, total - 1, count).astype(np.int64)


def at_most(total: int, count: int) -> np.ndarray:
    """All frames if there are fewer than `count`, else as `uniform`. [min(total, count)] int64."""
    _counts(total, count)
    return np.arange(total) if total < count else uniform(total, count)


SAMPLINGS: dict[str, Callable[[int, int], np.ndarray]] = {"uniform": uniform, "at_most": at_most}


def read_frames(source: Any, count: int | None = None, sampling: str = "uniform") -> Frames:
    """Frames of a scene from what a user has. Only the frames that are taken are converted or decoded.

    Args:
        source: an array [T, H, W, 3] or [T, 3, H, W]; a list of arrays, images or image files; a folder of images
            (by name, numbers as numbers: frame_2 before frame_10); an image; a video. uint8, or floats in [0, 1],
            which are rounded to the nearest of 256 levels. Files are turned as their orientation tag says.
        count: how many to take; None: all.
        sampling: a key of `SAMPLINGS`.

    Returns:
        Frames of one size.

    Raises:
        InputError: no such file or another type, dtype, range or size of frame; frames of different sizes; an empty
            or damaged file; more than 1024 frames or 2^28 pixels; Pillow or av is needed and missing.
    """
    if sampling not in SAMPLINGS:
        raise InputError(f"sampling = {show(sampling)}; one of {', '.join(SAMPLINGS)} is needed")
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if not path.is_dir() and path.suffix.lower() not in IMAGES:
            return _video(path, count, sampling)
        items: Any = _folder(path) if path.is_dir() else [path]
    elif isinstance(source, Sequence) and not isinstance(source, bytes):
        items = source
    elif hasattr(source, "convert") and hasattr(source, "mode"):
        items = [source]
    else:
        items = _array(source)
    indices = _indices(len(items), count, sampling)
    return Frames(
        _stack(((int(i), _frame(items[i], int(i))) for i in np.unique(indices)), indices), indices, len(items)
    )


def _counts(total: int, count: int) -> None:
    if not isinstance(total, int | np.integer) or not 1 <= total <= MAX_LISTED:
        raise InputError(f"{show(total)} frames to choose from; 1 to {MAX_LISTED} are needed")
    if not isinstance(count, int | np.integer) or isinstance(count, bool) or not 1 <= count <= MAX_FRAMES:
        raise InputError(f"count = {show(count)}; 1 to {MAX_FRAMES} frames may be taken")


def _indices(total: int, count: int | None, sampling: str) -> np.ndarray:
    if count is None and not 1 <= total <= MAX_FRAMES:
        raise InputError(f"the source has {total} frames; 1 to {MAX_FRAMES} can be taken at once, give count")
    return SAMPLINGS[sampling](total, total if count is None else count)


def check_total(frames: int, size: tuple[int, ...]) -> None:
    """`frames` frames of (height, width) are within the limits, else InputError."""
    if not 1 <= frames <= MAX_FRAMES or frames * size[0] * size[1] > MAX_PIXELS:
        raise InputError(
            f"{frames} frames of {size[0]} x {size[1]} pixels; at most {MAX_FRAMES} frames and {MAX_PIXELS} pixels are "
            "allowed, take fewer or smaller ones"
        )


def _stack(made: Iterator[tuple[int, np.ndarray]], indices: np.ndarray) -> np.ndarray:
    """Frames that come once each and in order, to [T, H, W, 3] in the order and number of `indices`."""
    out = None
    first = 0
    for i, pixels in made:
        if out is None:
            check_total(len(indices), pixels.shape)
            out, first = np.empty((len(indices), *pixels.shape), np.uint8), i
        if pixels.shape != out.shape[1:]:
            sizes = " and ".join(f"{h} x {w}" for h, w in (out.shape[1:3], pixels.shape[:2]))
            raise InputError(f"frames {first} and {i} have {sizes} pixels; frames of one size are needed")
        out[indices == i] = pixels
    if out is None:
        raise InputError("there are no frames")
    return out


def _array(source: Any) -> np.ndarray:
    try:
        array = np.asarray(source)
    except (ValueError, TypeError) as fault:
        raise InputError(f"frames are not an array: {str(fault)[:200]}") from fault
    if array.ndim != 4:
        raise InputError(
            f"frames is {array.dtype} {list(array.shape)}; [T, H, W, 3], a list of images, a folder or a video"
        )
    return array


def _frame(item: Any, i: int) -> np.ndarray:
    """[H, W, 3] uint8 of an array, an image or an image file."""
    name = f"frame {i}"
    if isinstance(item, str | os.PathLike):
        return _image_file(Path(item))
    if hasattr(item, "convert") and hasattr(item, "mode"):
        return _rgb(item, name)
    try:
        pixels = hwc(item, name)
    except (ValueError, TypeError) as fault:
        raise fault if isinstance(fault, InputError) else InputError(f"{name} is not an array: {fault}") from fault
    if pixels.dtype == np.uint8:
        return pixels
    # Written so that NaN fails.
    if not ((pixels >= 0) & (pixels <= 1)).all():
        low, high = float(np.min(pixels)), float(np.max(pixels))
        raise InputError(f"{name} holds floats from {low:g} to {high:g}; give uint8, or floats in [0, 1]")
    return np.rint(pixels.astype(np.float32) * np.float32(255)).astype(np.uint8)


def _rgb(image: Any, name: str) -> np.ndarray:
    if image.mode.startswith(("I", "F")):
        raise InputError(f"{name} is a picture of mode {image.mode}: a depth map? Keep those apart from the pictures")
    if max(image.size) > MAX_SIDE:
        raise InputError(f"{name} has {image.size[1]} x {image.size[0]} pixels; at most {MAX_SIDE} a side are allowed")
    return np.asarray(image.convert("RGB"))


def _folder(path: Path) -> list[Path]:
    try:
        names = [p for p in path.iterdir() if p.suffix.lower() in IMAGES and not p.name.startswith(".")]
    except OSError as fault:
        raise InputError(f"{path} cannot be read: {fault.strerror or fault}") from fault
    if not 1 <= len(names) <= MAX_LISTED:
        raise InputError(f"{path} holds {len(names)} images ({', '.join(IMAGES)}); 1 to {MAX_LISTED} are needed")
    return sorted(names, key=_natural)


def _natural(path: Path) -> tuple[list[tuple[str, int]], str]:
    parts = re.findall(r"([^0-9]*)([0-9]*)", path.name.casefold())
    return [(text, int(digits or 0)) for text, digits in parts], path.name


def _image_file(path: Path) -> np.ndarray:
    image_module = pillow()
    from PIL import ImageOps

    try:
        with image_module.open(path, formats=sorted(set(IMAGES.values()))) as image:
            check_total(1, image.size)
            return _rgb(ImageOps.exif_transpose(image), str(path))
    # Pillow's readers raise all of these on damaged files.
    except (OSError, SyntaxError, ValueError, EOFError, image_module.DecompressionBombError) as fault:
        if isinstance(fault, InputError):
            raise
        raise InputError(f"{path} cannot be read as an image ({str(fault)[:200]}); replace or remove it") from fault


class _Missing(Exception):
    """A wanted frame did not come out of the decoder."""


def _video(path: Path, count: int | None, sampling: str) -> Frames:
    if not path.is_file():
        raise InputError(f"{path} is missing, or neither a file nor a folder; give images or a video")
    av = _av()
    try:
        with _opened(av, path) as (film, stream):
            times, keys = _times(film, stream)
            indices = _indices(len(times), count, sampling)
            check_total(len(indices), (stream.height, stream.width))
        wanted, missing = np.unique(indices).tolist(), ""
        # Some containers cannot be searched; those are decoded from the start.
        for decoded in (_by_time, _in_order) if keys else (_in_order,):
            with (
                _opened(av, path) as (film, stream),
                contextlib.closing(decoded(film, stream, times, keys, wanted)) as made,
            ):
                try:
                    return Frames(_stack(((i, _turned(frame)) for i, frame in made), indices), indices, len(times))
                except _Missing as fault:
                    missing = str(fault)
        raise InputError(
            f"{path}: frame {missing} of {len(times)} cannot be decoded; the file is damaged, convert it again"
        )
    except (av.error.FFmpegError, OSError) as fault:
        raise InputError(
            f"{path} cannot be read as a video ({str(fault)[:200]}); convert it again, for example to MP4, or give a "
            "folder of images"
        ) from fault


@contextlib.contextmanager
def _opened(av: Any, path: Path) -> Iterator[tuple[Any, Any]]:
    with path.open("rb") as handle, av.open(handle, options={"format_whitelist": _CONTAINERS}) as film:
        if not film.streams.video:
            raise InputError(f"{path} has no video in it; give a video, or a folder of images")
        stream = film.streams.video[0]
        stream.thread_type = "AUTO"
        yield film, stream


def _times(film: Any, stream: Any) -> tuple[list[Any], list[Any]]:
    """When each frame is shown, in order, and the keyframes' times. Reads the container, decodes nothing.

    Without usable times: positions, and no keyframes.
    """
    packets = []
    for packet in film.demux(stream):
        if packet.size and not packet.is_discard:
            packets.append((packet.pts, packet.is_keyframe))
            if len(packets) > MAX_LISTED:
                raise InputError(f"{film.name} has more than {MAX_LISTED} frames; cut it")
    if not packets:
        raise InputError(f"{film.name} holds no frames; record or convert it again")
    times = [pts for pts, _ in packets]
    usable = None not in times and len(set(times)) == len(times)
    # Frames that are stored in another order than shown, while no time says so: AVI counts as they are stored.
    if not usable or (times == sorted(times) and getattr(stream.codec_context, "has_b_frames", True)):
        return list(range(len(times))), []
    return sorted(times), sorted(pts for pts, key in packets if key)


def _by_time(
    film: Any, stream: Any, times: list[Any], keys: list[Any], wanted: list[int]
) -> Generator[tuple[int, Any]]:
    """(index, frame) of each wanted frame, decoding from a keyframe before some of them to the last of those."""
    groups: dict[Any, dict[Any, int]] = {}
    for i in wanted:
        key = keys[max(0, int(np.searchsorted(keys, times[i], side="right")) - 1)]
        groups.setdefault(key, {})[times[i]] = i
    for key, left in groups.items():
        film.seek(key, stream=stream)
        for frame in film.decode(stream):
            i = left.pop(frame.pts, -1)
            if i >= 0:
                yield i, frame
            if not left:
                break
        if left:
            raise _Missing(min(left.values()))


def _in_order(film: Any, stream: Any, times: Any, keys: Any, wanted: list[int]) -> Generator[tuple[int, Any]]:
    """(index, frame) of each wanted frame, decoding from the start to the last of them."""
    place = -1
    for place, frame in enumerate(film.decode(stream)):
        if place in wanted:
            yield place, frame
        if place == wanted[-1]:
            return
    raise _Missing(min(i for i in wanted if i > place))


def _turned(frame: Any) -> np.ndarray:
    """[H, W, 3] uint8, turned as the container says."""
    pixels = frame.to_ndarray(format="rgb24")
    quarters = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, quarters)) if quarters else pixels


def pillow() -> Any:
    """PIL.Image, else InputError that says how to get it."""
    try:
        from PIL import Image
    except ImportError as fault:
        raise InputError("images need Pillow: pip install 'quintet-engine[scene]', or give arrays") from fault
    return Image


def _av() -> Any:
    try:
        import av
    except ImportError as fault:
        raise InputError(
            "videos need the package av: pip install 'quintet-engine[scene]', or give a folder of images"
        ) from fault
    return av
