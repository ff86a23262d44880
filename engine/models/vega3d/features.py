"""The generator alone, as a feature extractor for other models: `engine.load(its folder).features(frames)`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from engine.blocks.weights import Packer, Recipe, Shapes
from engine.errors import CheckpointError, InputError
from engine.io.checkpoint import Checkpoint, MappedSource, SafetensorsFile, Source
from engine.io.values import show
from engine.models.vega3d.generator import Generator
from engine.models.vega3d.generator_config import DitConfig, Tap, VaeConfig, read_config
from engine.models.vega3d.generator_weights import (
    DitLoader,
    VaeLoader,
    canonical_dit,
    canonical_vae,
    checked,
    dit_shapes,
    vae_shapes,
)
from engine.models.vega3d.prompt import FILES as TEXT_ENCODERS
from engine.models.vega3d.prompt import empty_text, find
from engine.ops.dispatch import strict as strict_dispatch
from engine.runtime.arena import Arena
from engine.runtime.device import on, parse_dtype
from engine.runtime.fit import require
from engine.runtime.model import Model, bounded
from engine.runtime.plan import capture

MAX_PIXELS = 1920 * 1080  # of a frame that comes in
MAX_FRAMES = 4096
VAE_FILES = ("Wan2.1_VAE.safetensors", "vae/diffusion_pytorch_model.safetensors", "vae.safetensors")
PROMPT_FILE, PROMPT_KEY = "wan_prompt_embedding.safetensors", "context"


@dataclass(frozen=True)
class Files:
    """The parts of a generator: sources of its transformer and VAE, and the prompt's embedding f32 [n, text_dim]."""

    dit_config: DitConfig
    vae_config: VaeConfig
    dit: Source
    vae: Source
    prompt: np.ndarray

    @staticmethod
    def of(folder: Path) -> Files:
        """The published folder, or diffusers' with `transformer/` and `vae/`; weights as safetensors.

        Raises: ConfigError, CheckpointError (a part is missing; the message names it and what makes it).
        """
        inside = folder / "transformer" if (folder / "transformer" / "config.json").exists() else folder
        config = DitConfig.from_json(read_config(inside, "config.json"))
        vae_file = next((folder / name for name in VAE_FILES if (folder / name).exists()), None)
        if vae_file is None:
            raise CheckpointError(
                f"{folder} has no VAE ({', '.join(VAE_FILES)}); convert a .pth file that you trust with "
                "examples/convert_pickle.py"
            )
        has_config = (folder / "vae" / "config.json").exists()
        vae = VaeConfig.from_json(read_config(folder / "vae", "config.json") if has_config else {})
        text_encoder = find(folder)
        if (folder / PROMPT_FILE).exists():
            with SafetensorsFile(folder / PROMPT_FILE) as file:
                prompt = Packer(MappedSource(file), Arena(dry=True)).value(PROMPT_KEY)
        elif text_encoder is not None:
            prompt = empty_text(text_encoder)
        else:
            raise CheckpointError(
                f"{folder} has neither {PROMPT_FILE} (tensor {PROMPT_KEY!r} [1, {config.text_dim}], the text encoder's "
                f"output for an empty prompt) nor the text encoder ({', '.join(TEXT_ENCODERS)}) to make it with; "
                "convert wan_prompt_embedding.pt with examples/convert_pickle.py"
            )
        prompt = _checked_prompt(prompt, config)
        return Files(config, vae, Checkpoint(inside, "diffusion_pytorch_model"), SafetensorsFile(vae_file), prompt)

    def close(self) -> None:
        self.dit.close()
        self.vae.close()


def _checked_prompt(value: np.ndarray, c: DitConfig) -> np.ndarray:
    rows = np.array(value).reshape(-1, value.shape[-1] if value.ndim else 1)
    if rows.shape[1] != c.text_dim or not 1 <= len(rows) < c.text_len:
        raise CheckpointError(
            f"the prompt's embedding ({PROMPT_FILE}, {PROMPT_KEY!r}) is {list(value.shape)}; [n, {c.text_dim}] with "
            f"n < {c.text_len} is needed"
        )
    return rows


class GeneratorFeatures(Model):
    """Features of single frames from a video generator: `features`, `explain`, `memory`. See engine.load."""

    @classmethod
    def load(
        cls, folder: Path, *, source: Files | None = None, device: str = "cpu", dtype: object = "auto",
        quant: str | None = None, size: tuple[int, int] = (1280, 720), timestep: int = 300, shift: float = 5.0,
        block: int = -1, crop: str = "cover", grid: tuple[int, int] | None = (14, 14), context_scale: float = 1.0,
        per_pass: int | None = None, max_pixels: int = MAX_PIXELS, strict: bool = False, progress: bool = True,
    ) -> GeneratorFeatures:  # fmt: skip
        """size, timestep, shift, block, crop, grid, context_scale: see `Tap`; they belong to what was trained on the
        features.

        dtype: float32 or bfloat16 ('auto'). quant: 'int8' or 'int4' for the transformer's products. per_pass: frames
        that share a pass through the transformer, default 1 on a CPU and 4 on a GPU. max_pixels: of the largest frame.
        """
        files = source or Files.of(folder)
        try:
            tap = Tap(size, timestep, shift, block, crop, grid, context_scale)
            return cls(files, tap.checked(files.dit_config, files.vae_config), name=folder.name, device=device,
                       dtype=dtype, quant=quant, per_pass=per_pass, max_pixels=max_pixels, strict=strict,
                       progress=progress)  # fmt: skip
        finally:
            files.close()

    def __init__(
        self, files: Files, tap: Tap, *, name: str, device: str, dtype: object, quant: str | None, per_pass: int | None,
        max_pixels: int, strict: bool, progress: bool, dry: bool = False,
    ) -> None:  # fmt: skip
        parsed = parse_dtype("bf16" if dtype in ("auto", None) else dtype)
        if per_pass is None:
            per_pass = 1 if device == "cpu" else 4
        bounded("per_pass", per_pass, 1, 64)
        bounded("max_pixels", max_pixels, 1, 1 << 26)
        self.tap, self.dit, self.vae = tap, files.dit_config, files.vae_config
        recipe, kv = Recipe(parsed, quant), "f32" if parsed == "f32" and quant is None else "bf16"
        self._max_pixels = max_pixels
        if not dry:
            arena = Arena(device, dry=True)
            dit, vae = MappedSource(Shapes(dit_shapes(self.dit))), MappedSource(Shapes(vae_shapes(self.vae)))
            with on(device):
                self._build(dit, vae, files.prompt, arena, recipe, kv, per_pass, False)
            require(arena.summary(), device, "lower size= or per_pass=")
        dit = checked(canonical_dit(files.dit), dit_shapes(self.dit))
        vae = checked(canonical_vae(files.vae), vae_shapes(self.vae))
        arena = Arena(device, dry=dry)
        with strict_dispatch(strict), on(device):
            self._generator = self._build(dit, vae, files.prompt, arena, recipe, kv, per_pass, progress)
        super().__init__(name, arena)
        self.weight_notes = recipe.notes
        arena.seal()
        with strict_dispatch(strict), on(device):
            for plan, step in self._generator.steps().items():
                self.plans[plan] = capture(step, plan)
            if not dry:
                self._generator.fill()
        if "black" in self.plans and not dry:
            self._place(0, np.zeros((2, 2, 3), np.float32))
            self.plans["frame.0"].replay()
            self.plans["black"].replay()

    def _build(
        self, dit: MappedSource, vae: MappedSource, prompt: np.ndarray, arena: Arena, recipe: Recipe, kv: str,
        per_pass: int, progress: bool,
    ) -> Generator:  # fmt: skip
        step = self.vae.factor * self.dit.patch
        rows, columns = self.tap.size[1] // step, self.tap.size[0] // step
        first = VaeLoader(self.vae, vae, arena, Recipe(recipe.dtype, None)).load(self.tap)
        parts = DitLoader(self.dit, self.tap, dit, arena, recipe, kv).load(prompt, rows, columns)
        bar = tqdm(parts, total=self.tap.block + 2, desc="loading", unit="block", disable=not progress, delay=1.0,
                   leave=False)  # fmt: skip
        weights = next(w for w in bar if w is not None)
        return Generator(arena, self.vae, self.dit, self.tap, first, weights, pixels=self._max_pixels,
                         per_pass=per_pass, kv_format=kv)  # fmt: skip

    @classmethod
    def sketch(
        cls, dit: DitConfig, vae: VaeConfig, tap: Tap, *, device: str = "cpu", dtype: object = "auto",
        quant: str | None = None, per_pass: int | None = None,
    ) -> GeneratorFeatures:  # fmt: skip
        """The model of configurations without memory: buffers are laid out and plans recorded, none can run."""
        shapes = Shapes(dit_shapes(dit)), Shapes(vae_shapes(vae))
        files = Files(dit, vae, *shapes, np.zeros((1, dit.text_dim), np.float32))
        return cls(files, tap.checked(dit, vae), name="sketch", device=device, dtype=dtype, quant=quant, strict=False,
                   per_pass=per_pass, max_pixels=MAX_PIXELS, progress=False, dry=True)  # fmt: skip

    @classmethod
    def plan(
        cls, config: dict, *, device: str = "cpu", dtype: object = "auto", quant: str | None = None
    ) -> dict[str, int]:
        """Bytes by part of a load with the published VAE and default options, from the transformer's config alone."""
        sketch = cls.sketch(DitConfig.from_json(config), VaeConfig(), Tap(), device=device, dtype=dtype, quant=quant)
        return dict(sketch.memory().parts)

    @property
    def node_budgets(self) -> dict[str, int]:
        """Most nodes of each plan on a CPU."""
        budgets = self._generator.node_budgets
        return {name: budgets.get(name.split(".")[0], 1) for name in self.plans}

    def features(
        self, frames: np.ndarray, *, noise: np.ndarray | None = None, seed: int = 0, progress: bool = False
    ) -> np.ndarray:
        """f32 [T, cells, C]: of each frame alone, cells row by row (the tap's grid, or the transformer's own). VACE
        also sees the first frame beside each.

        frames: [T, H, W, 3], uint8 or floats in [-1, 1]. noise: f32 [T, z, h, w], standard normal, of the latents; else
        drawn from `seed`, the same for the same place in the clip. Raises: InputError before any work.
        """
        clip, given = _frames(frames, self._max_pixels), None
        g = self._generator
        if noise is not None:
            given = np.asarray(noise, np.float32)
            want = (len(clip), self.vae.z, *g.latent)
            if given.shape != want or not np.isfinite(given).all():
                raise InputError(f"noise is {list(given.shape)}; finite values {list(want)} are needed")
        elif isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
            raise InputError(f"seed={seed!r} is not an integer in [0, 2^64)")
        out = np.empty((len(clip), g.cells, self.dit.dim), np.float32)
        with self._use():
            if "reference" in self.plans:
                self._place(0, clip[0])
                self.plans["frame.0"].replay()
                self.plans["reference"].replay()
            for at in tqdm(range(0, len(clip), g.per_pass), desc="features", disable=not progress, leave=False):
                part = clip[at : at + g.per_pass]
                for i, frame in enumerate(part):
                    self._place(i, frame)
                    if given is not None:
                        g.place_noise(i, given[at + i])
                    else:
                        g.place_seed(seed, at + i)
                        self.plans[f"noise.{i}"].replay()
                    self.plans[f"frame.{i}"].replay()
                self.plans["features"].replay()
                out[at : at + len(part)] = g.out.read().reshape(g.per_pass, g.cells, -1)[: len(part)]
        return out

    def _place(self, i: int, frame: np.ndarray) -> None:
        self._generator.place(i, frame.astype(np.float32) / 127.5 - 1 if frame.dtype == np.uint8 else frame)


def _frames(frames: object, max_pixels: int) -> np.ndarray:
    try:
        clip = np.asarray(frames)
    except ValueError:
        raise InputError("frames differ in size; bring them to one size [T, H, W, 3]") from None
    if clip.ndim != 4 or clip.shape[-1] != 3 or 0 in clip.shape:
        raise InputError(f"frames are {list(clip.shape)}; [T, H, W, 3] is needed")
    if len(clip) > MAX_FRAMES or clip.shape[1] * clip.shape[2] > max_pixels:
        raise InputError(
            f"{len(clip)} frames of {clip.shape[2]} x {clip.shape[1]}; at most {MAX_FRAMES} frames of {max_pixels} "
            "pixels (max_pixels= at load) are possible"
        )
    if clip.dtype == np.uint8:
        return clip
    if clip.dtype.kind != "f" or not np.isfinite(clip).all() or np.abs(clip).max() > 1:
        raise InputError(f"frames of {show(str(clip.dtype))} must be uint8, or finite floats in [-1, 1]")
    return clip
