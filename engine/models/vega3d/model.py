"""VEGA-3D (Wu et al. 2026, arXiv 2603.19235), variant A: a scene's frames once, then questions about it.

look       frames of a pass: SigLIP and the semantic projector, pooled between its products
fuse       a pass: generator features through their projector, the gate, newlines; into rows of the embedding table
fuse_code  the same with codes of world coordinates
prefill, decode, head, draw, score   the language model (Qwen2), see LanguageModel
query, mean, objects, match          grounding: hidden state of `<ground>`, means of patches, both heads

Visual tokens are ids behind the vocabulary: their embeddings lie in the rows behind the table's own, so a prompt is a
list of ids like any other, and what two questions share is found by comparing ids.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.blocks.decoder import NODES_PER_LAYER, DecoderBuffers, decoder_layer
from engine.blocks.language import LanguageModel, TokenIO
from engine.blocks.lru import Lru
from engine.blocks.prefix import KVStore
from engine.blocks.scene import (
    Frames,
    average_coordinates,
    patches_in_boxes,
    position_code,
    read_frames,
    resize,
    world_coordinates,
)
from engine.blocks.siglip import SiglipTower
from engine.blocks.siglip import workspace_bytes as siglip_bytes
from engine.blocks.weights import Recipe, Shapes
from engine.errors import CheckpointError, ConfigError, InputError
from engine.io.checkpoint import Checkpoint, Source, bf16_to_f32
from engine.io.text import Tokenizer
from engine.models.vega3d.config import OBJECTS, VegaConfig
from engine.models.vega3d.features import Files, GeneratorFeatures
from engine.models.vega3d.generator import bilinear
from engine.models.vega3d.generator_config import DitConfig, VaeConfig
from engine.models.vega3d.scene import Scene, ScenePrompt, Seen
from engine.models.vega3d.weights import Mlp, load_weights, shapes, store
from engine.ops import attention as attention_op
from engine.ops import gemm as gemm_op
from engine.ops.attention import KVCache, rope_table
from engine.ops.dispatch import strict as strict_dispatch
from engine.ops.fuse import MAX_D, Code, gated_fuse
from engine.ops.gather import Sums, gather, gather_sum
from engine.ops.gemm import gemm
from engine.ops.norm import norm
from engine.ops.sample import sample
from engine.runtime.arena import Arena, Tensor
from engine.runtime.device import on, parse_dtype
from engine.runtime.fit import require
from engine.runtime.model import bounded
from engine.runtime.plan import capture

ANSWER_ROOM = 1024  # tokens of question and answer behind a scene, by default
DEFAULT_CHUNK = 512
SCORE_BYTES = 64 << 20  # logits kept for score(), at most
HEAD_EPS = 1e-5  # of the layer norms in the grounding heads
WAN_ENV = "WAN_T2V_CKPT_DIR"
CACHE_BYTES = {"feature_cache": 1 << 30, "prefix_cache": 2 << 30}


class VegaRecipe(Recipe):
    """int4 is for what is read once per token: the language model. Towers and projectors get int8 then."""

    def choose(self, role: str) -> tuple[str, str]:
        if self.quant is not None and role == "grounding":
            return "bf16", "compared by cosine"
        if self.quant == "int4" and role != "language":
            return "i8", "int4 loses too much here"
        return super().choose(role)


class Vega3D(LanguageModel):
    """A loaded model: `scene`, `features`, `fuse`, and the verbs of a language model. See engine.load."""

    config: VegaConfig

    @classmethod
    def load(
        cls, folder: Path, *, source: Source | None = None, generator: GeneratorFeatures | None = None,
        wan: str | os.PathLike[str] | None = None, device: str = "cpu", dtype: object = "auto",
        quant: str | None = None, frames: int | None = None, context: int | None = None, chunk: int = DEFAULT_CHUNK,
        per_pass: int | None = None, coord_dtype: str = "bf16", feature_cache: int = CACHE_BYTES["feature_cache"],
        prefix_cache: int = CACHE_BYTES["prefix_cache"], strict: bool = False, progress: bool = True,
    ) -> Vega3D:  # fmt: skip
        """wan: the generator's folder; default `wan/` inside, then the folder that WAN_T2V_CKPT_DIR names. Without one,
        scenes need features=. frames: of a scene (as trained). context: tokens of KV cache, default a scene and 1024.
        chunk: prompt tokens of a prefill step. per_pass: frames that share a pass; rounded down to a divisor of frames.
        coord_dtype: 'bf16' counts voxels as the published evaluation does, 'fp32' exactly. feature_cache, prefix_cache:
        bytes of host memory for generator features and for the keys and values of scenes. source, generator: instead
        of the folder's weights.
        """
        opened = source or Checkpoint(folder)
        try:
            config = VegaConfig.from_folder(folder, opened.keys())
            tokenizer = Tokenizer.from_folder(folder) if (folder / "tokenizer.json").exists() else None
            where = None if generator is not None else _wan(folder, wan)
            return cls(
                config, opened, name=folder.name, generator=generator, wan=where, device=device, dtype=dtype,
                quant=quant, frames=frames, context=context, chunk=chunk, per_pass=per_pass, coord_dtype=coord_dtype,
                feature_cache=feature_cache, prefix_cache=prefix_cache, strict=strict, tokenizer=tokenizer,
                progress=progress,
            )  # fmt: skip
        finally:
            opened.close()

    def __init__(
        self, config: VegaConfig, source: Source | None, *, name: str = "vega3d",
        generator: GeneratorFeatures | None = None, wan: Path | None = None, device: str = "cpu",
        dtype: object = "auto", quant: str | None = None, frames: int | None = None, context: int | None = None,
        chunk: int = DEFAULT_CHUNK, per_pass: int | None = None, coord_dtype: str = "bf16", feature_cache: int = 0,
        prefix_cache: int = 0, strict: bool = False, tokenizer: Tokenizer | None = None, progress: bool = True,
    ) -> None:  # fmt: skip
        """Packs the weights and captures every plan; see `load`. source None makes a sketch."""
        c = self.config = config
        parsed = parse_dtype(c.dtype if dtype in ("auto", None) else dtype)
        recipe = VegaRecipe("f32" if parsed == "f16" and dtype in ("auto", None) else parsed, quant)
        self.frames = bounded("frames", c.frames if frames is None else frames, 1, 1024)
        wanted = bounded("per_pass", (1 if device == "cpu" else 4) if per_pass is None else per_pass, 1, 1024)
        self.per_pass = max(n for n in range(1, min(wanted, self.frames) + 1) if self.frames % n == 0)
        self.visual = self.frames * c.lines
        least = self.visual + 64
        room = min(c.language.positions, self.visual + ANSWER_ROOM)
        context = bounded("context", room if context is None else context, least, c.language.positions)
        context = -(-context // 16) * 16
        chunk = min(bounded("chunk", chunk, 1, 16384), context)
        if coord_dtype not in ("bf16", "fp32"):
            raise InputError(f"coord_dtype={coord_dtype!r} is not one of 'bf16', 'fp32'")
        for key, value in (("feature_cache", feature_cache), ("prefix_cache", prefix_cache)):
            bounded(key, value, 0, 1 << 50)
        if tokenizer is not None and tokenizer.vocab_size > c.language.vocab:
            raise ConfigError(
                f"tokenizer.json has {tokenizer.vocab_size} tokens and the embedding {c.language.vocab} rows; the "
                "files do not belong together"
            )
        _check_widths(c)
        self._kv = "f32" if recipe.dtype == "f32" and quant is None else "bf16"
        self.coord_dtype = coord_dtype
        made = partial(self._allocate, recipe=recipe, context=context, chunk=chunk, device=device)
        if source is not None:
            dry = Arena(device, dry=True)
            made(dry, Shapes(shapes(c)), progress=False)
            parts = dry.summary()
            if wan is not None:
                files = Files.of(wan)
                files.close()
                _add(parts, _generator_sketch(c, files.dit_config, files.vae_config, device, dtype, quant))
            require(parts, device, "load with quant='int8' or 'int4', or lower context= or frames=")
        arena = Arena(device, dry=source is None)
        with strict_dispatch(strict):
            io = made(arena, source or Shapes(shapes(c)), progress=progress)
        super().__init__(
            name, arena, io, [], vocab_size=c.language.vocab, context=context, stop_ids=c.language.eos,
            tokenizer=tokenizer, template=None, snapshots=0,
        )  # fmt: skip
        self.weight_notes = recipe.notes
        arena.seal()
        self.generator = generator
        if wan is not None:
            self.generator = GeneratorFeatures.load(
                wan, device=device, dtype=recipe.dtype, quant=quant and "int8", per_pass=per_pass, strict=strict,
                max_pixels=c.vision.image_size**2, progress=progress, **vars(c.tap),
            )  # fmt: skip
        if self.generator is not None:
            self._check_generator(self.generator)
        else:
            self.notes.append("no generator: scenes need features= (give wan=, the folder of Wan 2.1)")
        self._features, self._seen = Lru[np.ndarray](feature_cache), Lru[Seen](feature_cache)
        self._live, self._place = "", b""
        self._store = KVStore(self._caches, prefix_cache)
        with strict_dispatch(strict), on(device):
            self._capture()

    @classmethod
    def sketch(cls, config: dict, **options: Any) -> Vega3D:
        """The model of a config.json without memory: every buffer is laid out and every plan recorded, none can run."""
        return cls(VegaConfig.from_json(config), None, progress=False, **options)

    @classmethod
    def plan(
        cls, config: dict, *, device: str = "cpu", dtype: object = "auto", quant: str | None = None, **options: Any
    ) -> dict[str, int]:
        """Bytes by part of a load, the published generator of 1.3B included, from config.json alone."""
        c = VegaConfig.from_json(config)
        parts = dict(cls.sketch(config, device=device, dtype=dtype, quant=quant, **options).memory().parts)
        dim = {5120: DitConfig(dim=5120, ffn=13824, heads=40, layers=40)}.get(c.generative, DitConfig())
        return _add(parts, _generator_sketch(c, dim, VaeConfig(), device, dtype, quant))

    def _check_generator(self, g: GeneratorFeatures) -> None:
        if g.dit.dim != self.config.generative or g.tap.grid != (self.config.side,) * 2:
            raise ConfigError(
                f"the generator gives {g.dit.dim} channels on a grid of {g.tap.grid}; this model takes "
                f"{self.config.generative} on {(self.config.side,) * 2}"
            )

    def close(self) -> None:
        """Also closes the generator. See Model.close."""
        generator = None if self.closed else self.generator
        super().close()
        if generator is not None:
            generator.close()

    # ------------------------------------------------------------------------------------------ memory
    def _allocate(
        self, arena: Arena, source: Source, *, recipe: Recipe, context: int, chunk: int, device: str, progress: bool
    ) -> TokenIO:
        c, n, l = self.config, self.per_pass, self.config.language  # noqa: E741
        self.weights = w = load_weights(c, source, arena, recipe, n, self.visual + 1, progress)
        d, v, cells, lines = l.width, c.vision, n * c.cells, n * c.lines

        def ws(name: str, *shape: int, dtype: str = "f32") -> Tensor:
            return arena.alloc(name, shape, dtype)

        def io(name: str, *shape: int, dtype: str = "f32") -> Tensor:
            return arena.alloc(name, shape, dtype, "io")

        score = max(1, min(chunk, SCORE_BYTES // (4 * l.vocab)))
        with on(device):  # workspaces differ
            sizes = [gemm_op.workspace_bytes(m, k) for m, k in (
                (chunk, max(d, l.mlp, l.heads * l.head_dim)), (n * v.tokens, max(d, v.width)),
                (cells, max(d, c.generative)), (OBJECTS, d))]  # fmt: skip
            sizes.append(attention_op.workspace_bytes(chunk, l.heads, l.head_dim, context))
            sizes.append(siglip_bytes(v, n))
        self._ws = ws("ws", max(sizes), dtype="u8")
        # Frames to embeddings.
        self._tower = SiglipTower(arena, v, w.vision, n, self._kv, self._ws)
        self._pool = Sums.of(arena, "pool", bilinear_grid(v.side, c.side), v.tokens)
        self._hidden, self._pooled = ws("semantic.hidden", n * v.tokens, d), ws("semantic.pooled", cells, d)
        self._semantic, self._generative = io("semantic", cells, d), ws("generative", cells, d)
        self._given, self._given_hidden = io("features", cells, c.generative), ws("generative.hidden", cells, d)
        self._order, self._voxels = io("order", lines, dtype="i32"), io("voxels", cells, 3, dtype="i32")
        self._gates = io("gates", cells)
        # A row more than a scene has: of `<coord>`.
        self._rows = w.language.embed.slice(l.vocab * d, (self.visual + 1, d))
        # The language model.
        widths = DecoderBuffers.widths(d, l.heads, l.kv_heads, l.head_dim, l.mlp)
        self._b = DecoderBuffers(**{k: ws(f"language.{k}", chunk, width) for k, width in widths.items()}, ws=self._ws)
        self._last = ws("last_row", 1, d)
        self._caches = [KVCache.empty(arena, f"kv.{i}", l.kv_heads, l.head_dim, context, self._kv)
                        for i in range(l.layers)]  # fmt: skip
        self._rope = arena.alloc("rope", (context, l.head_dim), "f32", "weights")
        if not arena.dry:
            self._rope.write(rope_table(np.arange(context), l.head_dim, l.theta))
        if c.grounding:
            self._ground_io(arena)
        return TokenIO.empty(arena, l.vocab, chunk, score, context)

    def _ground_io(self, arena: Arena) -> None:
        c, d, n = self.config, self.config.language.width, self.per_pass

        def io(name: str, *shape: int, dtype: str = "f32") -> Tensor:
            return arena.alloc(f"ground.{name}", shape, dtype, "io")

        most = OBJECTS * n * c.vision.tokens
        self._members = Sums(io("offsets", OBJECTS + 1, dtype="i32"), io("rows", most, dtype="i32"),
                             io("weights", most), n * c.vision.tokens)  # fmt: skip
        self._part, self._sum = arena.alloc("ground.part", (OBJECTS, d)), io("sum", OBJECTS, d)
        self._objects, self._object_hidden = io("objects", OBJECTS, d), arena.alloc("ground.hidden", (OBJECTS, d))
        self._object_out, self._query_out = io("object_out", OBJECTS, d), io("query_out", 1, d)
        self._query, self._query_hidden = io("query", 1, d), arena.alloc("ground.query_hidden", (1, d))

    # ------------------------------------------------------------------------------------------ the plans
    def _capture(self) -> None:
        io, one = self.io, self._b.first(1)
        score = io.score_logits.shape[0]

        def decode() -> None:
            gather(self.weights.language.embed, io.sampler.token, one.x, label="embed")
            self._layers(one, None)
            self._head(one.x, io.logits)
            sample(io.logits, io.sampler)

        def prefill() -> None:
            gather(self.weights.language.embed, io.ids, self._b.x, rows=io.rows, label="embed")
            self._layers(self._b, io.rows)

        def head() -> None:
            gather(self._b.x, io.last, self._last, label="last row")
            self._head(self._last, io.logits)

        steps: dict[str, Callable[[], None]] = {
            "look": self._look, "fuse": partial(self._fuse, False), "decode": decode, "prefill": prefill, "head": head,
            "draw": lambda: sample(io.logits, io.sampler),
            "score": lambda: self._head(self._b.first(score).x, io.score_logits, io.rows),
        }  # fmt: skip
        if self.config.coded:
            steps["fuse_code"] = partial(self._fuse, True)
        if self.config.grounding:
            steps |= {"query": self._ask_query, "mean": self._mean, "objects": self._project, "match": self._match}
        for name, step in steps.items():
            self.plans[name] = capture(step, name)

    def _look(self) -> None:
        """Frames of a pass to semantic tokens. The projector's second product is linear, so pooling comes first."""
        w = self.weights.projector
        x = self._tower.look(self.per_pass)
        gemm(x, w.fc1, self._hidden, bias=w.fc1_bias, act="gelu", ws=self._ws, label="projector.0")
        gather_sum(self._hidden, self._pool, self._pooled, label="pool")
        gemm(self._pooled, w.fc2, self._semantic, bias=w.fc2_bias, ws=self._ws, label="projector.2")

    def _fuse(self, coded: bool) -> None:
        """Generator features and semantic tokens of a pass into rows of the embedding table."""
        w, g = self.weights, self.weights.generative
        gemm(self._given, g.fc1, self._given_hidden, bias=g.fc1_bias, act="gelu", ws=self._ws, label="generative.0")
        gemm(self._given_hidden, g.fc2, self._generative, bias=g.fc2_bias, ws=self._ws, label="generative.2")
        gated_fuse(self._semantic, self._generative, w.gate, self._rows, blend=self.config.blend, rho=w.rho,
                   code=Code(self._voxels, *w.codes) if coded else None, newline=w.newline, period=self.config.side,
                   order=self._order, gates=self._gates, label="fusion")  # fmt: skip

    def _layers(self, b: DecoderBuffers, rows: Tensor | None) -> None:
        c = self.config.language
        for i, layer in enumerate(self.weights.language.layers):
            decoder_layer(layer, b, self._caches[i], self.io.sampler.pos, heads=c.heads, eps=c.eps, rope=self._rope,
                          rows=rows, label=str(i))  # fmt: skip

    def _head(self, x: Tensor, logits: Tensor, rows: Tensor | None = None) -> None:
        w = self.weights.language
        gemm(x, w.lm_head, logits, norm=w.norm, eps=self.config.language.eps, rows=rows, ws=self._ws, label="lm_head")

    def _ground_head(self, w: Mlp | None, x: Tensor, hidden: Tensor, out: Tensor, label: str) -> None:
        assert w is not None
        gemm(x, w.fc1, hidden, bias=w.fc1_bias, act="relu", ws=self._ws, label=f"{label}.0")
        gemm(hidden, w.fc2, out, prologue="layer", norm=w.norm, norm_bias=w.norm_bias, eps=HEAD_EPS, bias=w.fc2_bias,
             ws=self._ws, label=f"{label}.3")  # fmt: skip

    def _ask_query(self) -> None:
        """The last position's hidden state through the query's head."""
        gather(self._b.x, self.io.last, self._last, label="last row")
        norm(self._last, self._query, kind="rms", weight=self.weights.language.norm, eps=self.config.language.eps,
             label="norm")  # fmt: skip
        self._ground_head(self.weights.query, self._query, self._query_hidden, self._query_out, "query")

    def _mean(self) -> None:
        """Adds to each object's sum what a pass of frames shows of it, between the projector's products."""
        w = self.weights.projector
        gemm(self._tower.x, w.fc1, self._hidden, bias=w.fc1_bias, act="gelu", ws=self._ws, label="projector.0")
        gather_sum(self._hidden, self._members, self._part, label="members")
        norm(self._part, self._sum, kind="none", add=self._sum, label="sum")

    def _project(self) -> None:
        w = self.weights.projector
        gemm(self._sum, w.fc2, self._objects, bias=w.fc2_bias, ws=self._ws, label="projector.2")

    def _match(self) -> None:
        self._ground_head(self.weights.objects, self._objects, self._object_hidden, self._object_out, "objects")

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
        return self._generate(self._picture(pixels), noise, seed)

    def _picture(self, pixels: np.ndarray) -> np.ndarray:
        size = self.config.vision.image_size
        return resize(pixels, (size, size))

    def _generate(self, pictures: np.ndarray, noise: np.ndarray | None, seed: int | None) -> np.ndarray:
        if self.generator is None:
            raise InputError(f"model {self.name!r} has no generator; load it with wan=, or give features=")
        seed = self.config.seed if seed is None else seed
        if noise is not None:
            return self.generator.features(pictures, noise=noise)
        key = _digest("features", pictures, repr((self.generator.tap, seed)))
        known = self._features.get(key)
        if known is None:
            known = self.generator.features(pictures, seed=seed)
            known.setflags(write=False)
            self._features.put(key, known, known.nbytes)
        return known

    def fuse(self, sem: np.ndarray, gen: np.ndarray, *, return_gates: bool = False) -> Any:
        """The gated fusion alone: f32 [M, D] of semantic tokens sem [M, D] and generator features gen [M, C].

        C as `features` gives them; they pass this model's projector. return_gates: also f32 [M], the gate of each token
        (1: semantic). Raises: InputError before any work.
        """
        c, d = self.config, self.config.language.width
        s, g = (np.asarray(a) for a in (sem, gen))
        for name, value, width in (("sem", s, d), ("gen", g, c.generative)):
            if value.dtype.kind != "f" or value.ndim != 2 or value.shape[1] != width or len(value) != len(s):
                raise InputError(f"{name} is {value.dtype} {list(value.shape)}; floats [M, {width}] are needed")
            if not np.isfinite(value).all():
                raise InputError(f"{name} holds NaN or infinity")
        cells, out, gates = self._given.shape[0], np.empty(s.shape, np.float32), np.empty(len(s), np.float32)
        with self._use():
            self._forget()
            for at in range(0, len(s), cells):
                n = min(cells, len(s) - at)
                for tensor, value in ((self._semantic, s), (self._given, g)):
                    padded = np.zeros(tensor.shape, np.float32)
                    padded[:n] = value[at : at + n]
                    tensor.write(padded)
                self._order.write(np.arange(self._order.shape[0], dtype=np.int32))
                self.plans["fuse"].replay()
                rows = self._read_rows()[: self._order.shape[0]].reshape(-1, c.side + 1, d)[:, : c.side]
                out[at : at + n], gates[at : at + n] = rows.reshape(-1, d)[:n], self._gates.read()[:n]
        return (out, gates) if return_gates else out

    # ------------------------------------------------------------------------------------------ scenes
    def scene(
        self, frames: Any, *, depth: Any = None, intrinsics: Any = None, poses: Any = None, axis_align: Any = None,
        pe: str = "auto", features: np.ndarray | None = None, noise: np.ndarray | None = None, seed: int | None = None,
        sampling: str = "uniform",
    ) -> Scene:  # fmt: skip
        """Looks at a scene once: towers, fusion and the language model's prefix. Questions then cost their own tokens.

        frames: `read_frames` tells what may be given; `frames` of them are taken by `sampling`. depth [F, h, w],
        intrinsics (of the depth camera), poses [F, 4, 4] (camera to world) and axis_align [4, 4] belong to all F frames
        given; see `world_coordinates`. pe: 'auto' adds codes of world coordinates where there are any, 'none' does not.
        features: f32 [T, cells, C] of the taken frames instead of the generator's; noise, seed: see `features`.
        Raises: InputError before any work; nothing is kept of a scene that failed.
        """
        c = self.config
        taken = read_frames(frames, self.frames, sampling)
        coords = self._coordinates(taken, depth, intrinsics, poses, axis_align)
        if pe not in ("auto", "none"):
            raise InputError(f"pe={pe!r} is not one of 'auto', 'none'")
        coded = pe == "auto" and c.coded and coords is not None
        if features is not None:
            features = np.asarray(features)
            want = (self.frames, c.cells, c.generative)
            if features.dtype.kind != "f" or features.shape != want or not np.isfinite(features).all():
                raise InputError(
                    f"features are {features.dtype} {list(features.shape)}; finite floats {list(want)} are needed"
                )
        pictures = self._picture(taken.pixels)
        given = features if features is not None else self._generate(pictures, noise, seed)
        voxels = None
        if coded:
            assert coords is not None
            cells = average_coordinates(coords, (c.side, c.side), c.cell_pixels, self.coord_dtype)
            voxels = c.voxels.of(cells, self.coord_dtype).reshape(-1, 3)
        key = _digest("scene", pictures, np.ascontiguousarray(given), b"" if voxels is None else voxels)
        with self._use():
            seen = self._seen.get(key)
            if seen is None:
                seen = self._see(pictures, given, voxels, coords is not None and c.grounding)
                self._seen.put(key, seen, seen.nbytes)
            out = Scene(self, key, taken, pictures, coords, voxels is not None, seen)
            prefix = out.prompt()
            self._enter(prefix)
            self._cache.rewind([*prefix, -1])  # all of it may be cached
            self._prefill(list(prefix))
        if c.coded and not coded:
            out.notes.append("no codes of world coordinates: this model was trained with them")
        return out

    def _coordinates(self, taken: Frames, depth: Any, intrinsics: Any, poses: Any, align: Any) -> np.ndarray | None:
        """[T, S, S, 3] world coordinates of the taken frames, or None."""
        parts = {"depth": depth, "intrinsics": intrinsics, "poses": poses}
        missing = [k for k, v in parts.items() if v is None]
        if len(missing) == 3 and align is None:
            return None
        if missing:
            raise InputError(f"world coordinates need depth, intrinsics and poses; {', '.join(missing)} is missing")
        maps, cameras = (_frames_of(k, parts[k], taken.total)[taken.indices] for k in ("depth", "poses"))
        matrix = np.asarray(intrinsics)
        if matrix.ndim == 3:
            matrix = _frames_of("intrinsics", matrix, taken.total)[taken.indices]
        size = self.config.vision.image_size
        return world_coordinates(maps, matrix, cameras, align, (size, size))

    def _see(self, pictures: np.ndarray, given: np.ndarray, voxels: np.ndarray | None, keep: bool) -> Seen:
        """Frames into embeddings. keep: also what grounding needs of them."""
        c, n, lines = self.config, self.per_pass, self._order.shape[0]
        self._forget()
        gates, tokens = [], []
        for at in range(0, self.frames, n):
            self._tower.images.write(pictures[at : at + n].astype(np.float32) / 127.5 - 1)
            self._given.write(given[at : at + n].reshape(self._given.shape).astype(np.float32))
            first = at // n * lines
            self._order.write(np.arange(first, first + lines, dtype=np.int32))
            self.plans["look"].replay()
            if keep:
                tokens.append(self._tower.x.read())
            if voxels is not None:
                self._voxels.write(voxels[at * c.cells : (at + n) * c.cells])
            self.plans["fuse" if voxels is None else "fuse_code"].replay()
            gates.append(self._gates.read())
        rows = self._rows.slice(0, (self.visual, self._rows.shape[1])).read()
        return Seen(rows, np.concatenate(gates).reshape(self.frames, c.side, c.side), tokens)

    def _read_rows(self) -> np.ndarray:
        rows = self._rows.read()
        return rows if rows.dtype == np.float32 else bf16_to_f32(rows)

    def _forget(self) -> None:
        """The scene that the rows and the cache hold is put away: they are needed for another."""
        live = self._cache.live or []
        size = next((i for i, t in enumerate(live) if t == self.vocab_size + self.visual - 1), None)
        if self._live and size is not None and self._live not in self._store:
            self._store.save(self._live, live[: size + 1])
        self._cache.clear()
        self._live = ""

    def _enter(self, tokens: list[int]) -> None:
        scene = tokens.scene if isinstance(tokens, ScenePrompt) else None
        if scene is None:
            if self._live:
                self._forget()
            return
        if self._live != scene.key:
            self._forget()
            rows = scene.seen.rows
            self._rows.slice(0, rows.shape).write(rows)
            self._cache.live = self._store.load(scene.key) or []
            self._live = scene.key
        if tokens.place is not None:  # type: ignore[attr-defined]
            self._write_place(tokens.place)  # type: ignore[attr-defined]

    # ------------------------------------------------------------------------------------------ places and objects
    def _write_place(self, centre: np.ndarray) -> None:
        """The embedding of `<coord>` with the code of a place, into the row behind a scene's."""
        c, d = self.config, self.config.language.width
        voxel = c.voxels.of(centre[None], self.coord_dtype)
        if voxel.tobytes() == self._place:
            return
        assert c.coord is not None
        live = self._cache.live or []
        at = next((i for i, t in enumerate(live) if t == self.place_id), None)
        if at is not None:  # the id means another place from here on
            self._cache.live = live[:at]
        row = self.weights.language.embed.slice(c.coord * d, (1, d)).read()
        value = (row if row.dtype == np.float32 else bf16_to_f32(row)) + position_code(voxel, d)
        store(self._rows.slice(self.visual * d, (1, d)), value)
        self._place = voxel.tobytes()

    @property
    def place_id(self) -> int:
        """Id of `<coord>` at a place."""
        return self.vocab_size + self.visual

    def _objects_of(self, scene: Scene, boxes: np.ndarray) -> np.ndarray:
        """f32 [K, D]: mean of the unfused semantic tokens of each box's patches, with the code of its centre."""
        c, v = self.config, self.config.vision
        assert scene.coords is not None
        seen = patches_in_boxes(scene.coords, boxes, (v.side, v.side), v.patch_size, coord_dtype=self.coord_dtype)
        flat = seen.reshape(len(boxes), self.frames // self.per_pass, -1)
        counts = flat.sum((1, 2))
        out = np.empty((len(boxes), c.language.width), np.float32)
        for at in range(0, len(boxes), OBJECTS):
            part = flat[at : at + OBJECTS]
            self._sum.write(np.zeros(self._sum.shape, np.float32))
            for i in np.flatnonzero(part.any((0, 2))):
                self._tower.x.write(scene.seen.tokens[i])
                members = [np.flatnonzero(row) for row in part[:, i]]
                sizes = [len(m) for m in members] + [0] * (OBJECTS - len(members))
                self._members.offsets.write(np.cumsum([0, *sizes]).astype(np.int32))
                self._members.rows.window()[: sum(sizes)] = np.concatenate(members)
                share = np.repeat(1 / np.maximum(counts[at : at + OBJECTS], 1), sizes[: len(part)])
                self._members.weights.window()[: sum(sizes)] = share
                self.plans["mean"].replay()
            self.plans["objects"].replay()
            out[at : at + len(part)] = self._objects.read()[: len(part)]
        out[counts == 0] = 0
        return out + position_code(c.voxels.of(boxes[:, :3], self.coord_dtype), c.language.width)

    def _scores(self, scene: Scene, prompt: ScenePrompt, boxes: np.ndarray) -> np.ndarray:
        """f64 [K + 1]: cosine of the prompt's query with each box, last with 'none of them'."""
        zero = self.weights.zero_target
        assert zero is not None
        with self._use():
            # Objects first: they and the prefix share nothing but the workspace.
            objects = scene.objects(boxes)
            self._enter(prompt)
            self._cache.rewind(prompt)
            self._prefill(list(prompt))
            self.plans["query"].replay()
            query = self._query_out.read().astype(np.float64)[0]
            rows = np.concatenate([objects, zero.reshape(1, -1)])
            out = []
            for at in range(0, len(rows), OBJECTS):
                part = rows[at : at + OBJECTS]
                padded = np.zeros(self._objects.shape, np.float32)
                padded[: len(part)] = part
                self._objects.write(padded)
                self.plans["match"].replay()
                out.append(self._object_out.read()[: len(part)].astype(np.float64))
        made = np.concatenate(out)
        return made @ query / (np.linalg.norm(made, axis=1) * np.linalg.norm(query))


def bilinear_grid(n: int, m: int) -> list[list[tuple[int, float]]]:
    """What each of m x m cells takes of a grid of n x n: bilinear between centres, no antialias."""
    cells, shares = bilinear(n, m)
    return [
        [(int(y) * n + int(x), float(a * b)) for y, a in zip(cells[i], shares[i]) for x, b in zip(cells[j], shares[j])]
        for i in range(m) for j in range(m)
    ]  # fmt: skip


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


def _generator_sketch(
    c: VegaConfig, dit: DitConfig, vae: VaeConfig, device: str, dtype: object, quant: str | None
) -> dict[str, int]:
    made = GeneratorFeatures.sketch(dit, vae, c.tap, device=device, dtype=dtype, quant=quant and "int8")
    return dict(made.memory().parts)


def _add(parts: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    for part, size in more.items():
        parts[part] = parts.get(part, 0) + size
    return parts


def _check_widths(c: VegaConfig) -> None:
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


def _digest(*parts: Any) -> str:
    made = hashlib.blake2b(digest_size=20)
    for part in parts:
        made.update(part.encode() if isinstance(part, str) else part)
        made.update(str(getattr(part, "shape", "")).encode())
    return made.hexdigest()
