"""VEGA-3D (arXiv 2603.19235): a scene's frames once, then questions about it.

Variant A understands scenes in metres (SigLIP, Qwen2, world coordinates, boxes); variant B answers spatial questions
from pictures alone (Qwen2.5-VL).

look       frames of a pass through the semantic tower
fuse       a pass: generator features through their projector, the gate, newlines; into rows of the embedding table
fuse_code  the same with codes of world coordinates
prefill, decode, head, draw, score   the language model, see LanguageModel
query, mean, objects, match          grounding, see Grounder

Visual tokens are ids behind the vocabulary: their embeddings lie in the rows behind the table's own, so a prompt is a
list of ids like any other, and what two questions share is found by comparing ids.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.blocks.decoder import NODES_PER_LAYER, DecoderBuffers, DecoderLayer, decoder_layer
from engine.blocks.language import LanguageModel, TokenIO
from engine.blocks.lru import Lru, digest
from engine.blocks.prefix import KVStore
from engine.blocks.qwen_language import LanguageConfig
from engine.blocks.scene import Frames, average_coordinates, position_code, read_frames, world_coordinates
from engine.blocks.weights import PartRecipe, Shapes
from engine.errors import CheckpointError, ConfigError, InputError
from engine.io.checkpoint import Checkpoint, Source, bf16_to_f32
from engine.io.text import Tokenizer
from engine.models.vega3d.config import SceneConfig, SpatialConfig, VegaConfig
from engine.models.vega3d.features import Files, GeneratorFeatures
from engine.models.vega3d.generator_config import DitConfig, VaeConfig
from engine.models.vega3d.grounding import Grounder
from engine.models.vega3d.scene import Scene, ScenePrompt, Seen
from engine.models.vega3d.towers import GenerativeProjector, QwenEyes, SiglipEyes
from engine.models.vega3d.weights import load_weights, own_generator, shapes, store
from engine.ops import attention as attention_op
from engine.ops import gemm as gemm_op
from engine.ops.attention import KVCache, rope_table
from engine.ops.dispatch import strict as strict_dispatch
from engine.ops.fuse import MAX_D, Code, gated_fuse
from engine.ops.gather import gather
from engine.ops.gemm import gemm
from engine.ops.norm import norm
from engine.ops.sample import sample
from engine.runtime.arena import Arena, Tensor
from engine.runtime.device import on, parse_dtype
from engine.runtime.fit import require
from engine.runtime.model import Explanation, MemoryReport, bounded, keywords
from engine.runtime.plan import capture

ANSWER_ROOM = 1024  # tokens of question and answer behind a scene, by default
DEFAULT_CHUNK = 512
SCORE_BYTES = 64 << 20  # logits kept for score(), at most
WAN_ENV = "WAN_T2V_CKPT_DIR"
FEATURE_CACHE, PREFIX_CACHE = 1 << 30, 2 << 30  # bytes
GENERATOR_CELL = 16  # pixels of a cell of the published generators' features


@dataclass(frozen=True)
class Options:
    """Checked options of a load; see Vega3D.load."""

    device: str
    dtype: str
    quant: str | None
    frames: int
    context: int
    chunk: int
    per_pass: int
    coord_dtype: str
    feature_cache: int
    prefix_cache: int

    @staticmethod
    def of(
        c: VegaConfig, *, device: str = "cpu", dtype: object = "auto", quant: str | None = None,
        frames: int | None = None, context: int | None = None, chunk: int = DEFAULT_CHUNK, per_pass: int | None = None,
        coord_dtype: str = "bf16", feature_cache: int = FEATURE_CACHE, prefix_cache: int = PREFIX_CACHE,
    ) -> Options:  # fmt: skip
        parsed = parse_dtype(c.dtype if dtype in ("auto", None) else dtype)
        if parsed == "f16" and dtype in ("auto", None):
            parsed = "f32"  # the CPU kernels have no fp16; fp32 loses nothing
        frames = bounded("frames", c.frames if frames is None else frames, 1, 1024)
        wanted = bounded("per_pass", (1 if device == "cpu" else 4) if per_pass is None else per_pass, 1, 1024)
        per_pass = max(n for n in range(1, min(wanted, frames) + 1) if frames % n == 0)
        limit, visual = c.language.positions, frames * c.lines
        context = min(limit, visual + ANSWER_ROOM + 4 * frames) if context is None else context
        context = -(-bounded("context", context, visual + 64, limit) // 16) * 16
        chunk = min(bounded("chunk", chunk, 1, 16384), context)
        if coord_dtype not in ("bf16", "fp32"):
            raise InputError(f"coord_dtype={coord_dtype!r} is not one of 'bf16', 'fp32'")
        for key, value in (("feature_cache", feature_cache), ("prefix_cache", prefix_cache)):
            bounded(key, value, 0, 1 << 50)
        return Options(device, parsed, quant, frames, context, chunk, per_pass, coord_dtype, feature_cache,
                       prefix_cache)  # fmt: skip

    @property
    def kv_format(self) -> str:
        return "f32" if self.dtype == "f32" and self.quant is None else "bf16"


class Vega3D(LanguageModel):
    """A loaded model: `scene`, `features`, `fuse`, and the verbs of a language model. See engine.load."""

    config: SceneConfig | SpatialConfig

    @classmethod
    def load(
        cls, folder: Path, *, source: Source | None = None, generator: GeneratorFeatures | None = None,
        wan: str | os.PathLike[str] | None = None, frame_size: tuple[int, int] | None = None, device: str = "cpu",
        dtype: object = "auto", quant: str | None = None, frames: int | None = None, context: int | None = None,
        chunk: int = DEFAULT_CHUNK, per_pass: int | None = None, coord_dtype: str = "bf16",
        feature_cache: int = FEATURE_CACHE, prefix_cache: int = PREFIX_CACHE, strict: bool = False,
        progress: bool = True,
    ) -> Vega3D:  # fmt: skip
        """wan: the generator's folder; default `wan/` inside, then the folder that WAN_T2V_CKPT_DIR names. Without one,
        scenes need features=. frame_size: (width, height) of the frames, variant B only, default 640 x 480. frames: of
        a scene (as trained). context: tokens of KV cache, default a scene and 1024. chunk: prompt tokens of a prefill
        step. per_pass: frames that share a pass; rounded down to a divisor of frames. coord_dtype: 'bf16' counts voxels
        as the published evaluation does, 'fp32' exactly. feature_cache, prefix_cache: bytes of host memory for what is
        seen of scenes and for their keys and values. source, generator: instead of the folder's weights.
        """
        opened = source or Checkpoint(folder)
        try:
            config = VegaConfig.from_folder(folder, opened.keys(), frame_size)
            tokenizer = Tokenizer.from_folder(folder) if (folder / "tokenizer.json").exists() else None
            where = None if generator is not None else _wan(folder, wan)
            o = Options.of(config, device=device, dtype=dtype, quant=quant, frames=frames, context=context, chunk=chunk,
                           per_pass=per_pass, coord_dtype=coord_dtype, feature_cache=feature_cache,
                           prefix_cache=prefix_cache)  # fmt: skip
            return cls(config, opened, o, name=folder.name, generator=generator, wan=where, strict=strict,
                       tokenizer=tokenizer, progress=progress)  # fmt: skip
        finally:
            opened.close()

    def __init__(
        self, config: VegaConfig, source: Source | None, options: Options, *, name: str = "vega3d",
        generator: GeneratorFeatures | None = None, wan: Path | None = None, strict: bool = False,
        tokenizer: Tokenizer | None = None, progress: bool = True,
    ) -> None:  # fmt: skip
        """Packs the weights and captures every plan; see `load`. source None makes a sketch."""
        assert isinstance(config, SceneConfig | SpatialConfig)
        c, o = config, options
        self.config, self.options, self.visual = c, o, o.frames * c.lines
        self.generator: GeneratorFeatures | None = None
        if tokenizer is not None and tokenizer.vocab_size > c.language.vocab:
            raise ConfigError(
                f"tokenizer.json has {tokenizer.vocab_size} tokens and the embedding {c.language.vocab} rows; the "
                "files do not belong together"
            )
        _check_widths(c)
        recipe, files = PartRecipe(o.dtype, o.quant, {"grounding": "compared by cosine"}), None
        if wan is not None:
            files = Files.of(wan)
            own = own_generator(source) if source is not None else None
            files = files if own is None else replace(files, dit=own)
        try:
            grid = _features_grid(c, generator, files)
            if source is not None:
                dry = Arena(o.device, dry=True)
                self._allocate(dry, Shapes(shapes(c)), recipe, grid, progress=False)
                parts = dry.summary()
                if files is not None:
                    _add(parts, _generator_bytes(c, files.dit_config, files.vae_config, o))
                require(parts, o.device, "load with quant='int8' or 'int4', or lower context= or frames=")
            arena = Arena(o.device, dry=source is None)
            with strict_dispatch(strict):
                io = self._allocate(arena, source or Shapes(shapes(c)), recipe, grid, progress)
            super().__init__(
                name, arena, io, [], vocab_size=c.language.vocab, context=o.context, stop_ids=c.language.eos,
                tokenizer=tokenizer, template=None, snapshots=0,
            )  # fmt: skip
            self.weight_notes = recipe.notes
            arena.seal()
            self.generator = generator
            if files is not None and wan is not None:
                height, width = self._generator_frame
                self.generator = GeneratorFeatures.load(
                    wan, source=files, device=o.device, dtype=o.dtype, quant=o.quant and "int8", per_pass=o.per_pass,
                    strict=strict, max_pixels=height * width, progress=progress, **vars(c.tap),
                )  # fmt: skip
        finally:
            if files is not None:
                files.close()
        if self.generator is None:
            self.notes.append("no generator: scenes need features= (give wan=, the folder of Wan 2.1)")
        self._features, self._seen = Lru[np.ndarray](o.feature_cache), Lru[Seen](o.feature_cache)
        self._live, self._place = "", b""
        self._roped: bool | None = None  # whether the rotary table is that of a scene; None: not written
        self._store = KVStore(self._caches, o.prefix_cache)
        with strict_dispatch(strict), on(o.device):
            self._capture()
        if not arena.dry:
            self._turn(False)

    @classmethod
    def sketch(cls, config: dict, *, frame_size: tuple[int, int] | None = None, **options: Any) -> Vega3D:
        """The model of a config.json without memory: every buffer is laid out and every plan recorded, none can run."""
        c, known = VegaConfig.from_json(config, frame_size=frame_size), keywords(Options.of)
        if unknown := sorted(set(options) - known):
            raise InputError(f"VEGA-3D has no option {unknown[0]!r}; a plan takes {', '.join(sorted(known))}")
        return cls(c, None, Options.of(c, **options), progress=False)

    @classmethod
    def plan(cls, config: dict, **options: Any) -> dict[str, int]:
        """Bytes by part of a load, the published generator included, from config.json alone."""
        m = cls.sketch(config, **options)
        large = DitConfig(dim=5120, ffn=13824, heads=40, layers=40)
        dit = large if m.config.generative == large.dim else DitConfig()
        return _add(dict(m.memory().parts), _generator_bytes(m.config, dit, VaeConfig(), m.options))

    @property
    def _generator_frame(self) -> tuple[int, int]:
        """(height, width) of the frames that the generator gets."""
        c = self.config
        return c.fitted if isinstance(c, SpatialConfig) else (c.vision.image_size,) * 2

    @property
    def frames(self) -> int:
        """Of a scene."""
        return self.options.frames

    def explain(self) -> Explanation:
        """With the generator's plans and weights, under `generator.`."""
        own = super().explain()
        if self.generator is None:
            return own
        other = self.generator.explain()
        plans = {f"generator.{k}": v for k, v in other.plans.items()}
        weights = {f"generator.{k}": v for k, v in other.weights.items()}
        return Explanation(own.device, own.plans | plans, own.weights | weights, own.notes + other.notes)

    def memory(self) -> MemoryReport:
        """With the generator's."""
        parts = dict(super().memory().parts)
        return MemoryReport(parts if self.generator is None else _add(parts, dict(self.generator.memory().parts)))

    def close(self) -> None:
        """Also closes the generator. See Model.close."""
        generator = None if self.closed else self.generator
        super().close()
        if generator is not None:
            generator.close()

    # ------------------------------------------------------------------------------------------ memory
    def _allocate(
        self, arena: Arena, source: Source, recipe: PartRecipe, grid: tuple[int, int], progress: bool
    ) -> TokenIO:  # fmt: skip
        """grid: of the generator's features."""
        c, o, l = self.config, self.options, self.config.language  # noqa: E741
        n, d, kv = o.per_pass, l.width, o.kv_format
        self.weights = w = load_weights(c, source, arena, recipe, n, self.visual + 1, progress)

        def ws(name: str, *shape: int, dtype: str = "f32") -> Tensor:
            return arena.alloc(name, shape, dtype)

        def io(name: str, *shape: int, dtype: str = "f32") -> Tensor:
            return arena.alloc(name, shape, dtype, "io")

        with on(o.device):  # workspaces differ
            sizes = [gemm_op.workspace_bytes(o.chunk, max(d, l.mlp, l.heads * l.head_dim)),
                     attention_op.workspace_bytes(o.chunk, l.heads, l.head_dim, o.context),
                     GenerativeProjector.workspace(c, n)]  # fmt: skip
            if isinstance(c, SceneConfig):
                sizes += [SiglipEyes.workspace(c, n), Grounder.workspace(c)]
            else:
                sizes.append(QwenEyes.workspace(c, n))
        self._ws = ws("ws", max(sizes), dtype="u8")
        # Frames to embeddings.
        self.ground: Grounder | None = None
        self._eyes: SiglipEyes | QwenEyes
        if isinstance(c, SceneConfig):
            eyes = self._eyes = SiglipEyes(arena, c, w.vision, w.projector, n, kv, self._ws)  # type: ignore[arg-type]
            self._voxels = io("voxels", n * c.cells, 3, dtype="i32")
            if w.ground is not None:
                self.ground = Grounder(arena, c, w.ground, eyes, n, self._ws)
        else:
            self._eyes = QwenEyes(arena, c, w.vision, n, kv, self._ws)  # type: ignore[arg-type]
        self._generative = GenerativeProjector(arena, c, w.generative, grid, n, self._ws)
        self._order, self._gates = io("order", n * c.lines, dtype="i32"), io("gates", n * c.cells)
        # A row more than a scene has: of `<coord>`.
        self._rows = w.language.embed.slice(l.vocab * d, (self.visual + 1, d))
        # The language model.
        widths = DecoderBuffers.widths(d, l.heads, l.kv_heads, l.head_dim, l.mlp)
        self._b = DecoderBuffers(**{k: ws(f"language.{k}", o.chunk, m) for k, m in widths.items()}, ws=self._ws)
        self._last = ws("last_row", 1, d)
        self._caches = [KVCache.empty(arena, f"kv.{i}", l.kv_heads, l.head_dim, o.context, kv) for i in range(l.layers)]
        self._rope = io("rope", o.context, l.head_dim)
        score = max(1, min(o.chunk, SCORE_BYTES // (4 * l.vocab)))
        return TokenIO.empty(arena, l.vocab, o.chunk, score, o.context)

    # ------------------------------------------------------------------------------------------ the plans
    def _capture(self) -> None:
        io, one = self.io, self._b.first(1)
        scored = self._b.first(io.score_logits.shape[0])
        last = replace(one, x=self._last)

        def decode() -> None:
            gather(self.weights.language.embed, io.sampler.token, one.x, label="embed")
            self._layers(one)
            self._final(one)
            self._head(one.x, io.logits)
            sample(io.logits, io.sampler)

        def prefill() -> None:
            gather(self.weights.language.embed, io.ids, self._b.x, rows=io.rows, label="embed")
            self._layers(self._b, io.rows)
            self._append(self._b, io.rows)

        def position() -> None:
            """What the last layer makes of the last position: nobody reads the others'."""
            gather(self._b.x, io.last, self._last, label="last row")
            self._final(last)

        def head() -> None:
            position()
            self._head(self._last, io.logits)

        def score() -> None:
            self._final(scored, io.rows)
            self._head(scored.x, io.score_logits, io.rows)

        steps: dict[str, Callable[[], None]] = {
            "look": self._eyes.look, "fuse": partial(self._fuse, False), "decode": decode, "prefill": prefill,
            "head": head, "draw": lambda: sample(io.logits, io.sampler), "score": score,
        }  # fmt: skip
        if isinstance(self.config, SceneConfig) and self.config.coded:
            steps["fuse_code"] = partial(self._fuse, True)
        if (ground := self.ground) is not None:

            def query() -> None:
                position()
                norm(self._last, ground.hidden, kind="rms", weight=self.weights.language.norm,
                     eps=self.config.language.eps, label="norm")  # fmt: skip
                ground.query()

            steps |= {"query": query, **ground.steps()}
        for name, step in steps.items():
            self.plans[name] = capture(step, name)

    def _fuse(self, coded: bool) -> None:
        """Generator features and semantic tokens of a pass into rows of the embedding table."""
        c, w = self.config, self.weights
        self._generative.project()
        lines = isinstance(c, SceneConfig)
        gated_fuse(self._eyes.out, self._generative.out, w.fusion.gate, self._rows, blend=c.blend, rho=w.fusion.rho,
                   code=Code(self._voxels, *w.codes) if coded and w.codes else None, newline=w.newline,
                   period=c.grid[1] if lines else 0, order=self._order, gates=self._gates,
                   label="fusion")  # fmt: skip

    def _layer(self, i: int, w: DecoderLayer, b: DecoderBuffers, rows: Tensor | None) -> None:
        c = self.config.language
        decoder_layer(w, b, self._caches[i], self.io.sampler.pos, heads=c.heads, eps=c.eps, rope=self._rope, rows=rows,
                      label=str(i))  # fmt: skip

    def _layers(self, b: DecoderBuffers, rows: Tensor | None = None) -> None:
        """All but the last."""
        for i, layer in enumerate(self.weights.language.layers[:-1]):
            self._layer(i, layer, b, rows)

    def _append(self, b: DecoderBuffers, rows: Tensor | None) -> None:
        """Keys and values of the last layer: more is wanted of few positions."""
        c, w = self.config.language, self.weights.language.layers[-1]
        q, kv = c.heads * c.head_dim, 2 * c.kv_heads * c.head_dim
        assert w.qkv_bias is not None
        apart = q % 16 == 0  # rows are packed in sixteens
        matrix, bias = (w.qkv.part(q, kv), w.qkv_bias.slice(q, (kv,))) if apart else (w.qkv, w.qkv_bias)
        only = DecoderLayer(matrix, None, None, None, w.norm1, qkv_bias=bias)
        self._layer(c.layers - 1, only, b, rows)

    def _final(self, b: DecoderBuffers, rows: Tensor | None = None) -> None:
        """The last layer, whose keys and values of these rows are there already, or come with them."""
        self._layer(self.config.language.layers - 1, self.weights.language.layers[-1], b, rows)

    def _head(self, x: Tensor, logits: Tensor, rows: Tensor | None = None) -> None:
        w = self.weights.language
        gemm(x, w.lm_head, logits, norm=w.norm, eps=self.config.language.eps, rows=rows, ws=self._ws, label="lm_head")

    @property
    def node_budget(self) -> int:
        """Most nodes that a decode step may have."""
        return NODES_PER_LAYER * self.config.language.layers + 3

    # ------------------------------------------------------------------------------------------ features and fusion
    def features(self, frames: Any, *, noise: np.ndarray | None = None, seed: int | None = None) -> np.ndarray:
        """f32 [T, cells, C] of the generator for frames (`read_frames` tells what may be given), each alone.

        noise: f32 [T, z, h, w], else drawn from seed (default: the checkpoint's). Raises: InputError before any work.
        """
        pixels = frames.pixels if isinstance(frames, Frames) else read_frames(frames).pixels
        return self._generate(self._eyes.prepare(pixels)[1], noise, seed).copy()  # the kept one stays as it is

    def _generate(self, pictures: np.ndarray, noise: np.ndarray | None, seed: int | None) -> np.ndarray:
        if self.generator is None:
            raise InputError(f"model {self.name!r} has no generator; load it with wan=, or give features=")
        seed = self.config.seed if seed is None else seed
        if noise is not None:
            return self.generator.features(pictures, noise=noise)
        key = digest("features", pictures, repr((self.generator.tap, seed)))
        known = self._features.get(key)
        if known is None:
            known = self.generator.features(pictures, seed=seed)
            known.setflags(write=False)
            self._features.put(key, known, known.nbytes)
        return known

    def fuse(self, sem: np.ndarray, gen: np.ndarray, *, return_gates: bool = False) -> Any:
        """The gated fusion alone: f32 [M, D] of semantic tokens sem [M, D] and generator features gen, which pass this
        model's projector first.

        gen: [M, C]; of variant B [T, cells of the generator, C] for the M / T tokens of each of T frames. return_gates:
        also f32 [M], the gate of each token (1: semantic). Raises: InputError before any work.
        """
        c, d, n = self.config, self.config.language.width, self.options.per_pass
        s, g = np.asarray(sem), np.asarray(gen)
        spatial = isinstance(c, SpatialConfig)
        rows, cells, step = (c.cells, self._generative.cells, n) if spatial else (1, 1, n * c.cells)
        want = (len(s) // rows, cells, c.generative) if spatial else (len(s), c.generative)
        for name, value, shape in (("sem", s, (len(s), d)), ("gen", g, want)):
            if value.dtype.kind != "f" or value.shape != shape or len(s) % rows or not len(s):
                raise InputError(f"{name} is {value.dtype} {list(value.shape)}; floats {list(shape)} are needed")
            if not np.isfinite(value).all():
                raise InputError(f"{name} holds NaN or infinity")
        g = g.reshape(-1, c.generative)
        out, gates = np.empty(s.shape, np.float32), np.empty(len(s), np.float32)
        with self._use():
            self._forget()
            for at in range(0, len(s) // rows, step):
                for tensor, value, each in ((self._eyes.out, s, rows), (self._generative.given, g, cells)):
                    part = value[at * each : (at + step) * each]
                    padded = np.zeros(tensor.shape, np.float32)
                    padded[: len(part)] = part
                    tensor.write(padded)
                self._order.write(np.arange(self._order.shape[0], dtype=np.int32))
                self.plans["fuse"].replay()
                made = self._read_rows(self._order.shape[0]).reshape(-1, c.lines // c.grid[0], d)[:, : c.grid[1]]
                here = slice(at * rows, min((at + step) * rows, len(s)))
                count = here.stop - here.start
                out[here], gates[here] = made.reshape(-1, d)[:count], self._gates.read()[:count]
        return (out, gates) if return_gates else out

    # ------------------------------------------------------------------------------------------ scenes
    def scene(
        self, frames: Any, *, depth: Any = None, intrinsics: Any = None, poses: Any = None, axis_align: Any = None,
        pe: str = "auto", features: np.ndarray | None = None, noise: np.ndarray | None = None, seed: int | None = None,
        sampling: str | None = None,
    ) -> Scene:  # fmt: skip
        """Looks at a scene once: towers, fusion and the language model's prefix. Questions then cost their own tokens.

        frames: `read_frames` tells what may be given; as many as the model was loaded for are taken by `sampling`, by
        default evenly (fewer repeat). features: f32 [T, cells, C] of the taken frames instead of the generator's;
        noise, seed: see `features`. Variant A: depth [F, h, w], intrinsics (of the depth camera), poses [F, 4, 4]
        (camera to world) and axis_align [4, 4] belong to all F frames given, see `world_coordinates`; pe: 'auto' adds
        codes of world coordinates where there are any, 'none' does not.
        Raises: InputError before any work; nothing is kept of a scene that failed.
        """
        c = self.config
        taken = read_frames(frames, self.frames, sampling or "uniform")
        coords = self._coordinates(taken, depth, intrinsics, poses, axis_align)
        if pe not in ("auto", "none"):
            raise InputError(f"pe={pe!r} is not one of 'auto', 'none'")
        if features is not None:
            features = np.asarray(features)
            want = (self.frames, self._generative.cells, c.generative)
            if features.dtype.kind != "f" or features.shape != want or not np.isfinite(features).all():
                raise InputError(
                    f"features are {features.dtype} {list(features.shape)}; finite floats {list(want)} are needed"
                )
        pictures, for_generator = self._eyes.prepare(taken.pixels)
        given = features if features is not None else self._generate(for_generator, noise, seed)
        voxels, notes = None, []
        if isinstance(c, SceneConfig) and c.coded:
            if coords is not None and pe == "auto":
                cells = average_coordinates(coords, c.grid, c.cell_pixels, self.options.coord_dtype)
                voxels = c.voxels.of(cells, self.options.coord_dtype).reshape(-1, 3)
            else:
                notes.append("no codes of world coordinates: this model was trained with them")
        key = digest("scene", pictures, np.ascontiguousarray(given), b"" if voxels is None else voxels)
        with self._use():
            seen, keep = self._seen.get(key), coords is not None and self.ground is not None
            if seen is None or (keep and not seen.tokens):  # what was seen without places has nothing for boxes
                seen = self._see(pictures, given, voxels, keep)
                self._seen.put(key, seen, seen.nbytes)
            out = Scene(self, key, taken, pictures, coords, voxels is not None, seen, notes)
            prefix = out.prompt()
            self._enter(prefix)
            self._cache.rewind([*prefix, -1])  # all of it may be cached
            self._prefill(list(prefix))
        return out

    def _coordinates(self, taken: Frames, depth: Any, intrinsics: Any, poses: Any, align: Any) -> np.ndarray | None:
        """[T, S, S, 3] world coordinates of the taken frames, or None."""
        parts = {"depth": depth, "intrinsics": intrinsics, "poses": poses}
        missing = [k for k, v in parts.items() if v is None]
        if len(missing) == 3 and align is None:
            return None
        c = self.config
        if not isinstance(c, SceneConfig):
            raise InputError("this model sees pictures alone; depth, intrinsics and poses are for variant A")
        if missing:
            raise InputError(f"world coordinates need depth, intrinsics and poses; {', '.join(missing)} is missing")
        maps, cameras = (_frames_of(k, parts[k], taken.total)[taken.indices] for k in ("depth", "poses"))
        matrix = np.asarray(intrinsics)
        if matrix.ndim == 3:
            matrix = _frames_of("intrinsics", matrix, taken.total)[taken.indices]
        return world_coordinates(maps, matrix, cameras, align, (c.vision.image_size,) * 2)

    def _see(self, pictures: np.ndarray, given: np.ndarray, voxels: np.ndarray | None, keep: bool) -> Seen:
        """Frames into embeddings. keep: also what grounding needs of them."""
        c, n, lines = self.config, self.options.per_pass, self._order.shape[0]
        self._forget()
        gates, tokens, features = [], [], self._generative.given
        for at in range(0, self.frames, n):
            self._eyes.place(pictures[at : at + n])
            features.write(given[at : at + n].reshape(features.shape).astype(np.float32))
            first = at // n * lines
            self._order.write(np.arange(first, first + lines, dtype=np.int32))
            self.plans["look"].replay()
            if keep:
                tokens.append(self._eyes.tower.x.read())  # type: ignore[union-attr]
            if voxels is not None:
                self._voxels.write(voxels[at * c.cells : (at + n) * c.cells])
            self.plans["fuse" if voxels is None else "fuse_code"].replay()
            gates.append(self._gates.read())
        rows = self._rows.slice(0, (self.visual, self._rows.shape[1])).read()
        return Seen(rows, np.concatenate(gates).reshape(self.frames, *c.grid), tokens)

    def _read_rows(self, count: int) -> np.ndarray:
        rows = self._rows.slice(0, (count, self._rows.shape[1])).read()
        return rows if rows.dtype == np.float32 else bf16_to_f32(rows)

    def _forget(self) -> None:
        """The scene that the rows and the cache hold is put away: they are needed for another."""
        live, last = self._cache.live or [], self.vocab_size + self.visual - 1
        if self._live and last in live and self._live not in self._store:
            self._store.save(self._live, live[: live.index(last) + 1])
        self._cache.clear()
        self._live = ""

    def _enter(self, tokens: list[int]) -> None:
        scene = tokens.scene if isinstance(tokens, ScenePrompt) else None
        self._turn(scene is not None)
        if scene is None:
            if self._live:
                self._forget()
            return
        if self._live != scene.key:
            self._forget()
            self._rows.slice(0, scene.seen.rows.shape).write(scene.seen.rows)
            self._cache.live = self._store.load(scene.key) or []
            self._live = scene.key
        if isinstance(tokens, ScenePrompt) and tokens.place is not None:
            self._write_place(tokens.place)

    def _turn(self, scene: bool) -> None:
        """The rotary table of a text, or of a prompt with a scene in it, whose images have rows and columns."""
        c = self.config
        scene = scene and c.language.sections is not None
        if self._roped == scene:
            return
        if c.language.sections is None:
            table = rope_table(np.arange(self.context), c.language.head_dim, c.language.theta)
        else:
            places = np.repeat(np.arange(self.context)[:, None], 3, 1)
            if scene:
                places = scene_places(c.grid, Scene.layout(self), self.vocab_size, self.context)
            table = rotary_rows(c.language, places)
        self._rope.write(table)
        self._roped = scene

    # ------------------------------------------------------------------------------------------ places and objects
    @property
    def place_id(self) -> int:
        """Id of `<coord>` at a place."""
        return self.vocab_size + self.visual

    def _write_place(self, centre: np.ndarray) -> None:
        """The embedding of `<coord>` with the code of a place, into the row behind a scene's."""
        c, d = self.config, self.config.language.width
        assert isinstance(c, SceneConfig) and c.coord is not None
        voxel = c.voxels.of(centre[None], self.options.coord_dtype)
        if voxel.tobytes() == self._place:
            return
        live = self._cache.live or []
        if self.place_id in live:  # the id means another place from here on
            self._cache.live = live[: live.index(self.place_id)]
        row = self.weights.language.embed.slice(c.coord * d, (1, d)).read()
        value = (row if row.dtype == np.float32 else bf16_to_f32(row)) + position_code(voxel, d)
        store(self._rows.slice(self.visual * d, (1, d)), value)
        self._place = voxel.tobytes()

    def _objects_of(self, scene: Scene, boxes: np.ndarray) -> np.ndarray:
        assert self.ground is not None and scene.coords is not None
        return self.ground.objects(self.plans, scene.coords, scene.seen.tokens, boxes, self.options.coord_dtype)

    def _scores(self, scene: Scene, prompt: ScenePrompt, boxes: np.ndarray) -> np.ndarray:
        """f64 [K + 1]: cosine of the prompt's query with each box, last with 'none of them'."""
        assert self.ground is not None
        with self._use():
            objects = scene.objects(boxes)
            self._enter(prompt)
            self._cache.rewind(prompt)
            self._prefill(list(prompt))
            self._set(self.io.sampler.pos, len(prompt) - 1)
            self.plans["query"].replay()
            return self.ground.scores(self.plans, objects)


# ------------------------------------------------------------------------------------------------------ rotary places
def scene_places(grid: tuple[int, int], ids: Sequence[int], vocab: int, count: int) -> np.ndarray:
    """i64 [count, 3]: (time, row, column) of each position of a prompt; ids of images from `vocab` on.

    Text counts on by one in all three. An image that begins at p has p for its time, p + row and p + column, and text
    goes on behind the larger of its sides.
    """
    rows, columns = grid
    image = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 2)
    image = np.concatenate([np.zeros((len(image), 1), np.int64), image], 1)
    out, at, p = np.empty((count, 3), np.int64), 0, 0
    while at < len(ids):
        if ids[at] >= vocab:
            out[at : at + len(image)] = p + image
            at, p = at + len(image), p + max(rows, columns)
        else:
            out[at] = p
            at, p = at + 1, p + 1
    out[at:] = (p + np.arange(count - at))[:, None]
    return out


def rotary_rows(c: LanguageConfig, places: np.ndarray) -> np.ndarray:
    """f32 [n, head_dim]: cosines, then sines, of places [n, 3]; each section of pairs turns by one of the three."""
    assert c.sections is not None
    axis = np.repeat(np.arange(3), c.sections)
    turn = c.theta ** (-np.arange(0, c.head_dim, 2, dtype=np.float64) / c.head_dim)
    angle = places[:, axis] * turn
    return np.concatenate([np.cos(angle), np.sin(angle)], 1).astype(np.float32)


# ------------------------------------------------------------------------------------------------------ the generator
def _wan(folder: Path, wan: str | os.PathLike[str] | None) -> Path | None:
    """The generator's folder."""
    if wan is not None:
        path = Path(wan)
        if not path.is_dir():
            raise CheckpointError(f"wan={str(path)!r} is not a folder; give the one of Wan 2.1 with its config.json")
        return path
    named = os.environ.get(WAN_ENV)
    for path in (folder / "wan", *([Path(named)] if named else [])):
        if path.is_dir():
            return path
    return None


def _features_grid(c: VegaConfig, generator: GeneratorFeatures | None, files: Files | None) -> tuple[int, int]:
    """The grid on which features come; ConfigError where they do not fit the model."""
    dit, vae, tap = (None, None, c.tap)
    if generator is not None:
        dit, vae, tap = generator.dit, generator.vae, generator.tap
    elif files is not None:
        dit, vae = files.dit_config, files.vae_config
    step = GENERATOR_CELL if dit is None or vae is None else vae.factor * dit.patch
    grid = tap.grid or (tap.size[1] // step, tap.size[0] // step)
    if (dit is not None and dit.dim != c.generative) or (c.tap.grid is not None and grid != c.tap.grid):
        raise ConfigError(
            f"the generator gives {dit.dim if dit else c.generative} channels on a grid of {grid}; this model takes "
            f"{c.generative} on {c.tap.grid or 'any'}"
        )
    return grid


def _generator_bytes(c: VegaConfig, dit: DitConfig, vae: VaeConfig, o: Options) -> dict[str, int]:
    made = GeneratorFeatures.sketch(dit, vae, c.tap, device=o.device, dtype=o.dtype, quant=o.quant and "int8",
                                    per_pass=o.per_pass)  # fmt: skip
    return dict(made.memory().parts)


def _add(parts: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    for part, size in more.items():
        parts[part] = parts.get(part, 0) + size
    return parts


def _check_widths(c: SceneConfig | SpatialConfig) -> None:
    """What the kernels' fixed scratch can hold."""
    if c.language.width > MAX_D:
        raise ConfigError(f"hidden_size {c.language.width} exceeds what the fusion takes, {MAX_D}")
    if max(c.language.mlp, c.vision.mlp) > gemm_op.MAX_K:
        raise ConfigError(f"an MLP is {max(c.language.mlp, c.vision.mlp)} wide; the kernels take {gemm_op.MAX_K}")
    if max(c.language.head_dim, c.vision.head_dim) > attention_op.MAX_D:
        raise ConfigError(f"a head of attention is wider than {attention_op.MAX_D}")


def _frames_of(name: str, values: Any, total: int) -> np.ndarray:
    try:
        array = np.asarray(values)
    except (ValueError, TypeError) as fault:
        raise InputError(f"{name} is not an array: {str(fault)[:200]}") from fault
    if array.ndim < 1 or len(array) != total:
        raise InputError(f"{name} is {list(array.shape)}; one entry for each of the {total} frames given is needed")
    return array
