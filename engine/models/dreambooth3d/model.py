"""3DreamBooth (arXiv 2603.18524) on HunyuanVideo-1.5: a subject from its photos, and videos of it from every side.

prompt              a chunk of a prompt's tokens through the language model
glyphs, read, refine   texts into tokens of the transformer
views.*, alone.*    what steps need of the references
step.*, kept.*      a step of a shape, both branches of guidance and the sampler's update
encode.*, decode.*  a tile of the VAE

A plan is recorded when a request of its shape first comes. Adapters are merged into the weights; another subject fills
the same memory from the checkpoint again, which stays open until `close`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from engine.blocks.lru import Lru, digest
from engine.blocks.qwen_language import LanguageConfig
from engine.blocks.weights import PartRecipe
from engine.errors import CancelledError, InputError
from engine.io.checkpoint import Source
from engine.io.values import show
from engine.models.dreambooth3d.config import DitConfig, VaeConfig
from engine.models.dreambooth3d.dit import Denoiser, Shape
from engine.models.dreambooth3d.dit_weights import DitLoader, TimeTables
from engine.models.dreambooth3d.dit_weights import Subject as Merged
from engine.models.dreambooth3d.files import Files, open_adapter
from engine.models.dreambooth3d.glyphs import GlyphEncoder
from engine.models.dreambooth3d.parallel import Share, guidance_share
from engine.models.dreambooth3d.prompt import Prompt, read_prompt
from engine.models.dreambooth3d.requests import Options, Request, Requests
from engine.models.dreambooth3d.sampler import Sampler
from engine.models.dreambooth3d.subject import Subject, read_subject
from engine.models.dreambooth3d.text import PromptEncoder, States, TextLoader
from engine.models.dreambooth3d.tiles import Tiles
from engine.models.dreambooth3d.vae import Vae
from engine.models.dreambooth3d.vae_weights import VaeLoader
from engine.models.dreambooth3d.video import Video
from engine.models.dreambooth3d.views import SHRINK, SQUARE, View, covering, read_views, square
from engine.ops.dispatch import strict as strict_dispatch
from engine.runtime.arena import Arena
from engine.runtime.device import on
from engine.runtime.fit import require
from engine.runtime.model import Model, keywords

NEGATIVE = ("Aerial view, aerial view, overexposed, low quality, deformation, a poor composition, bad hands, bad "
            "teeth, bad eyes, bad limbs, distortion")  # fmt: skip
LATENT_CACHE = 1 << 28  # bytes of latents of views
PUBLISHED_TEXT = LanguageConfig(3584, 28, 28, 4, 128, 18944, 152064, sections=(16, 24, 24))  # Qwen2.5-VL 7B


class DreamBooth3D(Model):
    """A loaded 3DreamBooth: `personalize`, `subject`, `generate`, `explain`, `memory`. See engine.load."""

    @classmethod
    def load(
        cls, folder: Path, *, source: Files | None = None, variant: str | None = None, device: str = "cpu",
        dtype: object = "auto", quant: str | None = None, frames: int | None = None,
        size: tuple[int, int] | None = None, views: int = 4, steps: int = 50, text: int = 256, keep: int = 0,
        spans: bool = False, tile: int = 256, overlap: float = 0.125, strict: bool = False, progress: bool = True,
    ) -> DreamBooth3D:  # fmt: skip
        """From the released folder (`transformer/<variant>/`, `vae/`, `text_encoder/llm/`, `3dapter/`) or diffusers'.

        variant: of several transformers. Limits of requests, which memory is laid out for: frames (4n + 1), size
        (height, width) in pixels, default as `generate` has them (any other of as many pixels will do whose edges are
        no longer than the longer one here, or than a tile), views, steps, text (tokens of a prompt). keep: sets of the
        references' keys and values that every block keeps, 1 for one_way, 2 for refresh. spans: weights of their own
        for a subject's name, for text_lora='span'. tile, overlap: of the VAE's tiles, in pixels and as a share; tile 0:
        none. quant: 'int8', or 'int4' for the language model with int8 for the transformer.

        Raises: ConfigError, CheckpointError, TokenizerError, InputError, MemoryPlanError; before any work.
        """
        files = source or Files.of(folder, variant)
        try:
            o = Options.of(files.dit_config, files.vae_config, device=device, dtype=dtype, quant=quant, frames=frames,
                           size=size, views=views, steps=steps, text=text, keep=keep, spans=spans, tile=tile,
                           overlap=overlap)  # fmt: skip
            dry = cls(
                Files.sketch(files.dit_config, files.vae_config, files.text_config), o, name=folder.name, dry=True
            )
            advice = "load with quant='int8', or lower frames=, size=, views= or steps="
            require(dry.arena.summary(), o.device, advice)
            return cls(files, o, name=folder.name, strict=strict, progress=progress)
        except BaseException:
            files.close()
            raise

    @classmethod
    def sketch(cls, config: dict, **options: Any) -> DreamBooth3D:
        """The model of a transformer's config.json without memory, beside the published VAE and text encoder: every
        buffer is laid out, plans can be recorded, none can run."""
        known = keywords(Options.of)
        if unknown := sorted(set(options) - known):
            raise InputError(f"3DreamBooth has no option {unknown[0]!r}; a plan takes {', '.join(sorted(known))}")
        c, v = DitConfig.from_json(config), VaeConfig()
        v = replace(v, z=c.channels)
        files = Files.sketch(c, v, replace(PUBLISHED_TEXT, width=c.text_dim))
        return cls(files, Options.of(c, v, **options), name="dreambooth3d", dry=True)

    @classmethod
    def plan(cls, config: dict, **options: Any) -> dict[str, int]:
        """Bytes by part that a load would take, from config.json alone and by the code that allocates."""
        return cls.sketch(config, **options).arena.summary()

    def __init__(
        self, files: Files, options: Options, *, name: str, strict: bool = False, progress: bool = False,
        dry: bool = False,
    ) -> None:  # fmt: skip
        self.config, self.vae_config, self.options, self._strict = files.dit_config, files.vae_config, options, strict
        self._files = files
        self.requests = Requests(self.config, self.vae_config, options, files.text is not None)
        arena, recipe = Arena(options.device, dry=dry), PartRecipe(options.dtype, options.quant, {"vae": "pixels"})
        super().__init__(name, arena)
        self.weight_notes = recipe.notes
        with self._context():
            self._build(arena, files, recipe, progress)
        arena.seal()
        self._latents = Lru[np.ndarray](LATENT_CACHE)
        self._live: dict[str, tuple[Source | None, float]] = {}  # what each stream's weights hold
        self._shown = ""  # the views that are placed
        self._glyphs = None
        if files.glyphs is not None and files.glyph_config is not None:
            self._glyphs = GlyphEncoder(files.glyph_config, files.glyphs)
        if self._prompts is None:
            self.notes.append("no text encoder: prompts need one in text_encoder/")
        if not dry:
            with self._context():
                self._adapt(None, "off", progress)

    @contextmanager
    def _context(self) -> Iterator[None]:
        with strict_dispatch(self._strict), on(self.options.device):
            yield

    def _build(self, arena: Arena, files: Files, recipe: PartRecipe, progress: bool) -> None:
        o, c, v = self.options, self.config, self.vae_config
        height, width = o.size
        cells = height * width // v.spatial**2
        image = (((o.frames - 1) // v.temporal + 1) + o.views) * cells
        bar = tqdm(total=3, desc=f"load {self.name}", disable=not progress, leave=False)
        self._loader = DitLoader(c, files.dit, arena, recipe, views=o.views > 0, named=o.spans)
        self._denoiser = Denoiser(arena, c, self._loader.load(), image=image, references=o.views * cells, text=o.text,
                                  steps=o.steps, kv_format=o.kv, kept=o.keep)  # fmt: skip
        bar.update()
        vae = VaeLoader(v, files.vae, arena, recipe)
        edge = o.tiling.pixels // v.spatial
        rows, columns = height // v.spatial, width // v.spatial
        if edge:
            rows = columns = min(edge, max(rows, columns))
        self._vae = Vae(arena, v, vae.encoder(), vae.decoder(), frames=(o.frames - 1) // v.temporal + 1, rows=rows,
                        columns=columns, kv_format=o.kv)  # fmt: skip
        bar.update()
        self._tiles = Tiles(self._vae, o.tiling, self.plans)
        self._prompts: PromptEncoder | None = None
        if files.text is not None and files.text_config is not None:
            text = TextLoader(files.text, arena, recipe).load(files.text_config)
            self._prompts = PromptEncoder(arena, files.text_config, text, files.tokenizer, self.plans, kv_format=o.kv)
        self._sampler = Sampler(self._denoiser, TimeTables(c, files.dit), self.plans)
        bar.close()

    def close(self) -> None:
        """Also closes the checkpoint. See Model.close."""
        files = None if self.closed else self._files
        super().close()
        if files is not None:
            files.close()

    # ------------------------------------------------------------------------------------------ subjects
    def subject(
        self, adapters: str | os.PathLike[str] | None = None, references: Sequence[Any] = (), *, shrink: float = SHRINK
    ) -> Subject:  # fmt: skip
        """A subject to generate: what is given decides how.

        Args:
            adapters: a folder that `personalize` left, a released subject's, or one file. None: the adapter of views
                that came with the base, for a single reference.
            references: views in the order of their times, the minimal set that the subject was trained beside: paths,
                Pillow images or uint8 [H, W, 3 or 4], or (image, mask). None of them: the subject's adapter alone.
            shrink: what a view with a mask is shrunk to on its white square.

        Raises: InputError, CheckpointError; each names the view or the file.
        """
        if len(references) > self.options.views:
            raise InputError(f"{len(references)} views; this load has room for {self.options.views} (views= at load)")
        with self._use():
            return read_subject(self.config, adapters, references, self._files.views, shrink)

    def _adapt(self, subject: Subject | None, text_lora: str, progress: bool = False) -> None:
        """Fills the streams whose weights are another subject's."""
        made = Merged()
        if subject is not None:
            made = Merged(subject.adapter, subject.views_adapter, text_lora == "all", subject.scale)
        wanted = {s: made.of(s) for s in self._loader.streams if s != "named" or text_lora == "span"}
        if subject is None or not subject.views:
            wanted.pop("views", None)  # nobody runs them
        streams = [s for s, what in wanted.items() if self._live.get(s) != what]
        for s in streams:
            self._live.pop(s, None)
        for _ in tqdm(self._loader.adapt(made, streams), desc="weights", disable=not progress, leave=False):
            pass
        if streams:
            self._live |= {s: wanted[s] for s in streams}
            self._sampler.forget_subject()

    # ------------------------------------------------------------------------------------------ videos
    def generate(
        self, prompt: str, subject: Subject | None = None, *, negative_prompt: str = NEGATIVE,
        frames: int | None = None, aspect: str | tuple[int, int] | None = None, resolution: str | None = None,
        size: tuple[int, int] | None = None,
        steps: int = 50, guidance: float = 6.0, shift: float | None = None, seed: int | Sequence[int] = 42,
        text_lora: str = "off", refresh: int = 1, one_way: bool | None = None, prune: int | None = None,
        step_cache: int | None = None, timesteps: Sequence[float] | None = None, noise: Any = None,
        parallel: str | None = None,
        callback: Callable[[int, int, np.ndarray], object] | None = None, progress: bool = False,
    ) -> Video | list[Video]:  # fmt: skip
        """A video of a prompt, and of a subject that the prompt names in brackets: `A [rhs plushie] on a desk`.

        Args:
            prompt, negative_prompt: what is quoted with double quotes is to be written in the picture.
            subject: of `subject`; None: a video of the prompt alone.
            frames: 4n + 1, default 49 or what the transformer's configuration says (sample_frames).
            aspect, resolution: 'W:H' or (W, H), default 16:9, and '720p' or '480p', default the transformer's; size:
                (height, width) in pixels instead of both, default the configuration's sample_size, if it has one.
            steps, guidance, shift: of the noise schedule; guidance 1 runs the prompt alone; shift None: the
                transformer's own.
            seed: 0 <= seed < 2^63; noise is the released bf16 draw of torch. Several: a video each.
            text_lora: whether the subject's adapter works on the prompt: 'off' (as released), 'all', or 'span', on the
                name in brackets alone.
            refresh: run the references in every such step alone; beyond 1 an approximation.
            prune: keep of the references what lies within so many cells of 16 pixels around the object, and the frame's
                border: an approximation; None: all of them.
            step_cache: run, of the steps in the middle, every so many, and repeat the last velocity in the others: an
                approximation (`schedule.computed_steps`).
            timesteps: that fall within (0, 1000], instead of steps and shift: of checkpoints distilled to a few.
            one_way: references that see only themselves run once; default: as the subject was trained.
            noise: f32 [z, T, h, w] instead of the seed's.
            parallel: 'guidance': this process runs one branch, and one that makes the same request the other; see
                parallel.guidance_share.
            callback: called behind every step with its number, the number of steps and the latent [T, h, w, z]; where
                it returns False, the work ends with CancelledError.

        Raises: InputError (a value that cannot be used, named), CancelledError, BusyError, ClosedError.
        """
        job = self.requests.job(
            prompt, subject, negative_prompt=negative_prompt, frames=frames, aspect=aspect, resolution=resolution,
            size=size, steps=steps, guidance=guidance, shift=shift, seed=seed, text_lora=text_lora, refresh=refresh,
            one_way=one_way, prune=prune, step_cache=step_cache, timesteps=timesteps, noise=noise, parallel=parallel,
        )  # fmt: skip
        self._fits(job.shape)
        share = guidance_share() if parallel else None
        with self._use(), self._context():
            made = [self._make(job, subject, s, share, callback, progress) for s in job.seeds]
        return made[0] if not isinstance(seed, Sequence) else made

    def _fits(self, s: Shape) -> None:
        """InputError unless what was laid out holds a request's shape, tile by tile."""
        self._denoiser.fits(s)
        limit, *edges = self._vae.limits
        rows, columns = map(min, (s.rows, s.columns), edges) if self.options.tiling.pixels else (s.rows, s.columns)
        self._vae.fits(s.frames, rows, columns, limit)

    def _make(
        self, job: Request, subject: Subject | None, seed: int, share: Share | None,
        callback: Callable[[int, int, np.ndarray], object] | None, progress: bool,
    ) -> Video:  # fmt: skip
        v, s, stages = self.vae_config, job.shape, {}
        clock = time.perf_counter()

        def lap(name: str) -> None:
            nonlocal clock
            now = time.perf_counter()
            stages[name], clock = 1e3 * (now - clock), now

        texts, marked = self._texts(job)
        if any(marked):
            s = replace(s, named=sum(marked))
        lap("text")
        self._adapt(subject, job.text_lora)
        lap("weights")
        self._show(subject, s, seed)
        lap("views")
        noise = _rows(job.noise if job.noise is not None else released_noise(seed, self.config.channels, s))
        lap("noise")
        steps = len(job.sigmas) - 1
        bar = tqdm(total=steps, desc=self.name, disable=not progress, leave=False)

        def each(i: int, latent: np.ndarray) -> bool:
            bar.update()
            shaped = latent.reshape(s.frames, s.rows, s.columns, -1)
            return callback is None or callback(i, steps, shaped) is not False

        clean = self._sampler.sample(s, noise, job.sigmas, job.guidance, texts, refresh=job.refresh,
                                     one_way=job.one_way, marked=marked if s.named else (), share=share,
                                     computed=job.computed, each=each)  # fmt: skip
        bar.close()
        if clean is None:
            raise CancelledError(f"the callback ended the work on {job.prompt.text!r}")
        lap("sample")
        latent = clean.reshape(s.frames, s.rows, s.columns, -1)
        pixels = self._tiles.decode(latent)
        lap("decode")
        frames = (255 * np.clip(pixels / 2 + 0.5, 0, 1)).astype(np.uint8)
        assert frames.shape[0] == (s.frames - 1) * v.temporal + 1
        return Video(frames, latent, job.prompt.text, seed, stages)

    def _states(self, prompt: Prompt, kind: str = "video") -> States:
        assert self._prompts is not None
        return self._prompts(prompt, kind)

    def _texts(self, job: Request) -> tuple[list[np.ndarray], list[bool]]:
        """Refined tokens of each branch, and which of the last one's belong to a subject's name."""
        out, marked = [], []
        for prompt in (job.negative, job.prompt)[2 - job.shape.branches :]:
            if prompt.glyphs and self._glyphs is None:
                raise InputError(
                    f"the prompt quotes {show(prompt.quoted[0])}, to be written, and there is no glyph encoder "
                    "(text_encoder_2/); add it, or leave out the quotes"
                )
            glyphs = self._glyphs(prompt.glyphs) if prompt.glyphs and self._glyphs is not None else None
            states = self._states(prompt)
            out.append(self._sampler.tokens(job.sigmas, states.values, glyphs))
            quoted = 0 if glyphs is None else len(glyphs)
            marked = [False] * quoted + list(states.marked) if job.text_lora == "span" else []
        return out, marked

    def _show(self, subject: Subject | None, s: Shape, seed: int) -> None:
        """Places the latents of a subject's views, where they are not there."""
        if subject is None or not subject.views:
            return
        cell = self.vae_config.spatial
        draw = f"{seed}" if subject.mode == "views" else ""  # a posterior's sample there, its mean otherwise
        key = digest(subject.views_digest, f"{s.rows}x{s.columns}", draw)
        if key == self._shown:
            return
        if (found := self._latents.get(key)) is None:
            made = []
            for i, view in enumerate(subject.views):
                mean, deviation = self._tiles.encode(
                    covering(view, s.rows * cell, s.columns * cell, name=f"view {i + 1}")[None]
                )
                if draw:
                    mean = mean + deviation * np.random.default_rng([seed, i]).standard_normal(mean.shape, np.float32)
                made.append(mean.reshape(-1, mean.shape[-1]))
            found = np.stack(made)
            self._latents.put(key, found, found.nbytes)
        self._sampler.place_views(found)
        self._shown = key

    # ------------------------------------------------------------------------------------------ personalisation
    def personalize(
        self, photos: Sequence[Any], references: Sequence[Any], folder: str | os.PathLike[str], *,
        name: str = "rhs object", side: int = SQUARE, resume: bool = False, save_every: int = 50,
        on_step: Callable[[int, float], object] | None = None, preview_every: int = 0,
        preview: dict[str, Any] | None = None, shrink: float = SHRINK,
        views_adapter: str | os.PathLike[str] | None = None, **settings: Any,
    ) -> Path:  # fmt: skip
        """Trains a subject's adapters on single frames; returns the folder that `subject` takes.

        Args:
            photos: of the subject from all around (some 30), as `subject` takes views; their middle square is used.
            references: the few views that it will be shown beside, in the order of their times; none: it is optimised
                alone, and shown without.
            folder: for checkpoints and the state of the run.
            name: identifier and class, as prompts will name it: 'rhs plushie'.
            side: of the square in pixels.
            resume: go on from the state in the folder. save_every: steps between states.
            on_step: called with the number of steps done and the loss; where it returns False the run stops, saved.
            preview_every, preview: steps between videos in folder/previews, and arguments of `generate` for them.
            views_adapter: pre-trained file of the references' adapter, default the base's.
            settings: fields of `personalize.Settings`: steps, rank, lr, seed, one_way, dtype, ...

        Raises: InputError, CheckpointError, MemoryPlanError (before any work; a full disk: what was there stays),
        BusyError.
        """
        from engine.models.dreambooth3d.personalize import Personalizer, Photos, Settings, memory_plan

        known = set(Settings.__dataclass_fields__)
        if unknown := sorted(set(settings) - known):
            raise InputError(f"a run has no setting {unknown[0]!r}; it takes {', '.join(sorted(known))}")
        self.requests.needs_text()
        chosen = Settings(**{"dtype": self.options.dtype} | settings).checked()
        cell = self.vae_config.spatial
        if type(side) is not int or not cell <= side <= 4096 or side % cell:
            raise InputError(f"side={side!r}: a multiple of {cell} pixels, at most 4096")
        if not 1 <= len(photos) <= 4096:
            raise InputError(f"{len(photos)} photos; 1 to 4096 are needed")
        prompt = read_prompt(f"A video of a [{name}].")
        shots = [read_views([p], shrink=1.0)[0] for p in photos]
        views = read_views(references, shrink=shrink) if len(references) else []
        if views_adapter is not None and not views:
            raise InputError("views_adapter= is for references; give references=, or leave out views_adapter")
        if preview_every:
            self._checked_preview(
                f"A video of a [{name}].",
                Subject("joint" if views else "subject", name, None, None, tuple(views), one_way=chosen.one_way),
                preview or {},
            )
        where = Path(views_adapter) if views_adapter is not None else self._files.views
        pretrained = None if where is None else open_adapter(where, self.config)[1]
        tokens = (1 + len(views)) * (side // cell) ** 2
        require(memory_plan(self.config, chosen, tokens), "cpu", "take a smaller side=, or close other models")
        with self._use(), self._context():
            moments = [self._square(v, side) for v in shots]
            clean = [self._square(v, side)[0] for v in views]
            given = Photos(np.concatenate([m for m, _ in moments]), np.concatenate([d for _, d in moments]),
                           np.concatenate(clean) if clean else np.zeros((0, *moments[0][0].shape[1:]), np.float32),
                           self._states(replace(prompt, spans=()), "image").values)  # fmt: skip
        run = Personalizer(self.config, self._files.dit, given, chosen, pretrained)

        def step(done: int, loss: float) -> bool:
            go_on = on_step is None or on_step(done, loss) is not False
            if preview_every and done % preview_every == 0:
                subject = self.subject(run.export(Path(folder)), references, shrink=shrink)
                made = self.generate(prompt=f"A video of a [{name}].", subject=subject, **(preview or {}))
                assert isinstance(made, Video)
                made.save(Path(folder) / "previews" / f"{done}.gif")
            return go_on

        return run.run(folder, save_every=save_every, resume=resume, on_step=step)

    def _checked_preview(self, prompt: str, subject: Subject, given: dict[str, Any]) -> None:
        """InputError where `generate` would refuse a preview: before the run, not in its middle."""
        known = signature(self.generate).parameters
        if unknown := sorted(set(given) - set(known) | {"prompt", "subject"} & set(given)):
            raise InputError(f"preview= has no option {unknown[0]!r}; it takes those of generate")
        wanted = keywords(Requests.job)
        asked = {k: given.get(k, p.default) for k, p in known.items() if k in wanted}
        self._fits(self.requests.job(prompt, subject, **asked).shape)

    def _square(self, view: View, side: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation [1, z, h, w] of a photo's latent."""
        mean, deviation = (x[0].transpose(2, 0, 1)[None] for x in self._tiles.encode(square(view.pixels, side)[None]))
        return np.ascontiguousarray(mean), np.ascontiguousarray(deviation)


def released_noise(seed: int, channels: int, s: Shape) -> np.ndarray:
    """f32 [z, T, h, w] as the released pipeline draws it: bf16, by torch on the host.

    Raises: InputError where torch is missing.
    """
    try:
        import torch
    except ImportError as fault:
        raise InputError("noise of a seed is torch's: pip install torch, or give noise=") from fault
    shape = (1, channels, s.frames, s.rows, s.columns)
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.bfloat16)
    return drawn[0].float().numpy()


def _rows(noise: np.ndarray) -> np.ndarray:
    """[z, T, h, w] as rows of cells."""
    return np.ascontiguousarray(noise.reshape(len(noise), -1).T)
