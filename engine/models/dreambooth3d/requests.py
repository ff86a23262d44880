"""What callers may ask for: options of a load and arguments of `generate`, checked before any work, with the error that
names it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.errors import InputError
from engine.io.values import show
from engine.models.dreambooth3d.config import DitConfig, VaeConfig
from engine.models.dreambooth3d.dit import Shape
from engine.models.dreambooth3d.prompt import Prompt, read_prompt
from engine.models.dreambooth3d.schedule import BASES, bucket, computed_steps, given_levels, latent_frames, noise_levels
from engine.models.dreambooth3d.subject import Subject
from engine.models.dreambooth3d.text import MAX_TOKENS
from engine.models.dreambooth3d.tiles import Tiling
from engine.models.dreambooth3d.views import MAX_VIEWS, seen_cells
from engine.runtime.device import parse_dtype
from engine.runtime.model import bounded

TEXT_LORA = ("off", "all", "span")
MAX_SEEDS = 64
ASPECT = (16, 9)


@dataclass(frozen=True)
class Options:
    """Checked options of a load; see DreamBooth3D.load."""

    device: str
    dtype: str
    quant: str | None
    frames: int
    size: tuple[int, int]
    views: int
    steps: int
    text: int
    keep: int
    spans: bool
    tiling: Tiling

    @staticmethod
    def of(
        c: DitConfig, v: VaeConfig, *, device: str = "cpu", dtype: object = "auto", quant: str | None = None,
        frames: int | None = None, size: tuple[int, int] | None = None, views: int = 4, steps: int = 50,
        text: int = 256, keep: int = 0, spans: bool = False, tile: int = 256, overlap: float = 0.125,
    ) -> Options:  # fmt: skip
        frames, size = c.sample_frames if frames is None else frames, c.sample_size if size is None else size
        latent_frames(frames, v.temporal)
        height, width = bucket(*ASPECT[::-1], c.resolution) if size is None else _size(size, v.spatial)
        return Options(
            device, parse_dtype("bf16" if dtype in ("auto", None) else dtype), quant,
            bounded("frames", frames, 1, 1 << 12), (height, width), bounded("views", views, 0, MAX_VIEWS),
            bounded("steps", steps, 1, 1000), bounded("text", text, 1, MAX_TOKENS + 256), bounded("keep", keep, 0, 2),
            bool(spans), Tiling(tile, overlap).checked(v.spatial),
        )  # fmt: skip

    @property
    def kv(self) -> str:
        return "f32" if self.dtype == "f32" and self.quant is None else "bf16"


@dataclass(frozen=True)
class Request:
    """A checked request."""

    prompt: Prompt
    negative: Prompt
    shape: Shape
    sigmas: np.ndarray
    guidance: float
    seeds: list[int]
    noise: np.ndarray | None
    text_lora: str
    refresh: int
    one_way: bool
    computed: tuple[bool, ...]


@dataclass(frozen=True)
class Requests:
    """Checks what a model is asked. text: whether it has a text encoder."""

    config: DitConfig
    vae: VaeConfig
    options: Options
    text: bool

    def needs_text(self) -> None:
        """InputError without a text encoder."""
        if not self.text:
            raise InputError("this checkpoint has no text encoder; add text_encoder/ with its tokenizer.json")

    def job(
        self, prompt: Any, subject: Subject | None, *, negative_prompt: Any, frames: Any, aspect: Any, resolution: Any,
        size: Any, steps: Any, guidance: Any, shift: Any, seed: Any, text_lora: str, refresh: Any, one_way: bool | None,
        prune: Any, step_cache: Any, timesteps: Any, noise: Any, parallel: str | None,
    ) -> Request:  # fmt: skip
        """See `DreamBooth3D.generate`."""
        c, v, o = self.config, self.vae, self.options
        asked = read_prompt(prompt, needs_span=subject is not None and subject.mode != "views")
        self.needs_text()
        if text_lora not in TEXT_LORA:
            raise InputError(f"text_lora={show(text_lora)} is not one of {', '.join(TEXT_LORA)}")
        if text_lora == "span" and not o.spans:
            raise InputError("text_lora='span' needs weights of its own; load with spans=True")
        if not isinstance(guidance, int | float) or not 0 <= guidance <= 100:
            raise InputError(f"guidance={show(guidance)} is not in [0, 100]")
        if resolution is not None and resolution not in BASES:
            raise InputError(f"resolution={show(resolution)} is not one of {', '.join(BASES)}")
        shift = c.shift if shift is None else shift
        if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 < shift <= 100:
            raise InputError(f"shift={show(shift)} is not in (0, 100]")
        sigmas = (
            noise_levels(bounded("steps", steps, 1, o.steps), shift) if timesteps is None else given_levels(timesteps)
        )
        steps = bounded("steps", len(sigmas) - 1, 1, o.steps)
        cache = bounded("step_cache", step_cache, 1, 1000) if step_cache is not None else 1
        refresh = bounded("refresh", refresh, 1, 1000)
        if size is None and aspect is None and resolution is None:
            size = c.sample_size
        if size is None:
            height, width = _bucket(ASPECT if aspect is None else aspect, resolution or c.resolution)
        else:
            height, width = _size(size, v.spatial)
        count = latent_frames(c.sample_frames if frames is None else frames, v.temporal)
        views = 0 if subject is None else len(subject.views)
        shape = Shape(count, height // v.spatial, width // v.spatial, views, 1 if guidance == 1 else 2)
        if prune is not None and subject is not None:
            margin = bounded("prune", prune, 0, 1 << 12)
            chosen = [seen_cells(view, height, width, v.spatial, margin) + i * shape.cells
                      for i, view in enumerate(subject.views)]  # fmt: skip
            shape = replace(shape, seen=tuple(np.concatenate([*chosen, np.zeros(0, np.int64)]).tolist()))
        seeds = list(seed) if isinstance(seed, Sequence) and not isinstance(seed, str) else [seed]
        if not 1 <= len(seeds) <= MAX_SEEDS or any(type(s) is not int or not 0 <= s < 1 << 63 for s in seeds):
            raise InputError(f"seed={show(seed)}; one or up to {MAX_SEEDS} integers in [0, 2^63) are needed")
        given = None
        if noise is not None:
            given = np.asarray(noise, np.float32)
            want = (c.channels, count, shape.rows, shape.columns)
            if given.shape != want or not np.isfinite(given).all():
                raise InputError(f"noise {list(given.shape)}; finite values {list(want)} are needed")
            if len(seeds) > 1:
                raise InputError("noise= is of one video; give one seed")
        way = bool(views) and (subject is not None and subject.one_way if one_way is None else one_way)
        kept = 1 if way else shape.branches if views and refresh > 1 else 0
        if kept > o.keep:
            raise InputError(f"references that are kept between steps need room for their keys; load with keep={kept}")
        if parallel not in (None, "guidance"):
            raise InputError(f"parallel={show(parallel)} is not None or 'guidance'")
        if parallel and shape.branches != 2:
            raise InputError("parallel='guidance' shares two branches, and guidance=1 runs one")
        computed = tuple(computed_steps(steps, cache)) if cache > 1 else ()
        return Request(asked, read_prompt(negative_prompt), shape, sigmas, float(guidance), seeds, given, text_lora,
                    1 if way else refresh, way, computed)  # fmt: skip


def _size(value: Any, cell: int) -> tuple[int, int]:
    """(height, width) in pixels."""
    if not isinstance(value, Sequence) or len(value) != 2:
        raise InputError(f"size={show(value)} is not (height, width)")
    height, width = (bounded("size", n, cell, 1 << 13) for n in value)
    if height % cell or width % cell:
        raise InputError(f"size={show(value)}: multiples of {cell} pixels are needed")
    return height, width


def _bucket(aspect: Any, resolution: str) -> tuple[int, int]:
    parts = aspect.split(":") if isinstance(aspect, str) else aspect
    try:
        width, height = (float(n) for n in parts)
    except (TypeError, ValueError) as fault:
        raise InputError(f"aspect={show(aspect)} is not 'W:H' or (W, H)") from fault
    return bucket(height, width, resolution)
