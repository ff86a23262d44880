"""A generated video: frames, and how they came about."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine.blocks.film import pillow, save_film
from engine.errors import InputError

FPS = 24.0
CRF = 25  # of H.264, as released


@dataclass(frozen=True)
class Video:
    """frames uint8 [F, H, W, 3]; latent f32 [T, h, w, z], clean, in the sampler's scale; stages: milliseconds."""

    frames: np.ndarray
    latent: np.ndarray
    prompt: str
    seed: int
    stages: Mapping[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        count, height, width, _ = self.frames.shape
        return f"<Video of {count} frames, {width} x {height}, seed {self.seed}: {self.prompt!r}>"

    def save(self, path: str | os.PathLike[str], *, fps: float = FPS) -> Path:
        """Writes .mp4 (H.264), .gif, or, without a suffix, a new folder of PNG files; whole or not at all.

        Raises: InputError (another suffix, a package that is missing, a folder that is there, no space or rights).
        """
        if not 0.1 <= fps <= 1000:
            raise InputError(f"fps={fps!r} is not in [0.1, 1000]")
        target = Path(path)
        if target.suffix:
            return save_film(list(self.frames), target, fps, crf=CRF)
        image = pillow()
        if target.exists():
            raise InputError(f"{target} is there already; frames go into a new folder")
        draft = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
        try:
            draft.mkdir(parents=True)
            for i, frame in enumerate(self.frames):
                image.fromarray(frame).save(draft / f"{i:04d}.png")
            draft.rename(target)
        except OSError as fault:
            raise InputError(
                f"{target} cannot be written: {fault.strerror or fault}; check space and rights"
            ) from fault
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return target
