"""Pictures as a film: GIF, or H.264 in MP4. A file is whole or not there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import InputError

#: GIF counts in hundredths of a second, and browsers slow down what is faster than 50 frames a second.
GIF_FPS = 25.0


def check_target(path: str | os.PathLike[str]) -> Path:
    """The path of a film. Raises: InputError for another suffix than .gif and .mp4, and a package that is missing."""
    target = Path(path)
    suffix = target.suffix.lower()
    if suffix not in (".gif", ".mp4"):
        raise InputError(f"{target}: an animation is .gif or .mp4")
    if suffix == ".mp4":
        _av()
    else:
        pillow()
    return target


def save_film(
    pictures: Sequence[np.ndarray], path: str | os.PathLike[str], rate: float, *, crf: int | None = None,
    colours: int = 256,
) -> Path:  # fmt: skip
    """Writes pictures uint8 [H, W, 3] of one size, `rate` a second, as .gif (at most GIF_FPS) or .mp4.

    crf: of H.264, less is finer; default the encoder's. colours: of a GIF.
    Raises: InputError (see `check_target`; a file that cannot be written: what was there before stays).
    """
    target = check_target(path)
    draft = target.with_name(f".{target.stem}.{secrets.token_hex(6)}{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix.lower() == ".gif":
            _gif(pictures, draft, rate, colours)
        else:
            _mp4(pictures, draft, rate, crf)
        draft.replace(target)
    except OSError as fault:
        raise InputError(f"{target} cannot be written: {fault.strerror or fault}; check space and rights") from fault
    finally:
        draft.unlink(missing_ok=True)
    return target


def _gif(pictures: Sequence[np.ndarray], target: Path, rate: float, colours: int) -> None:
    image = pillow()
    shown = min(rate, GIF_FPS)
    count = int(np.floor((len(pictures) - 1) * shown / rate + 1e-6)) + 1
    index = np.minimum(np.floor(np.arange(count) * rate / shown + 0.5).astype(int), len(pictures) - 1)
    frames = [image.fromarray(pictures[i]).quantize(colours) for i in index.tolist()]
    # Hundredths are shared out so that the whole lasts as long as the film.
    ends = np.round(np.arange(1, len(frames) + 1) * 100 / shown)
    duration = (np.diff(ends, prepend=0) * 10).astype(int).tolist()
    frames[0].save(target, save_all=True, append_images=frames[1:], duration=duration, loop=0)


def _mp4(pictures: Sequence[np.ndarray], target: Path, rate: float, crf: int | None) -> None:
    av = _av()
    # H.264 keeps colours for squares of four pixels.
    odd = [(0, n % 2) for n in pictures[0].shape[:2]]
    try:
        with av.open(str(target), "w") as container:
            options = {} if crf is None else {"crf": str(crf)}
            stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1000), options=options)
            stream.height, stream.width = (n + more for n, (_, more) in zip(pictures[0].shape, odd))
            stream.pix_fmt = "yuv420p"
            for picture in pictures:
                even = np.ascontiguousarray(np.pad(picture, [*odd, (0, 0)], mode="edge"))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
            container.mux(stream.encode())
    except (av.error.FFmpegError, ValueError) as fault:
        raise InputError(f"{target}: this av cannot write H.264 ({str(fault)[:200]}); write a .gif") from fault


def pillow() -> Any:
    """PIL.Image. Raises: InputError where Pillow is missing."""
    try:
        from PIL import Image
    except ImportError as fault:
        raise InputError("pictures need Pillow: pip install 'quintet-engine[robot]'") from fault
    return Image


def _av() -> Any:
    try:
        import av
    except ImportError as fault:
        raise InputError(".mp4 needs the package av: pip install av, or write a .gif") from fault
    return av
