"""From a checkpoint of the transformer and its adapters to packed weights: a set each for video, views and text.

Adapters are merged in fp32 and rounded once; another subject fills the same memory from the checkpoint again. What
depends on the time alone is worked out on the host, once per schedule: its matrices, a third of the checkpoint, are
never packed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from engine.blocks.diffusion import silu, time_sinusoid
from engine.blocks.weights import Packer, Recipe
from engine.errors import CheckpointError
from engine.io.checkpoint import MappedSource, Source
from engine.models.dreambooth3d.config import DitConfig
from engine.models.dreambooth3d.weights import EMBED
from engine.ops.gemm import PackedMatrix
from engine.runtime.arena import Arena, Tensor

STREAMS = ("video", "views", "text", "named")  # named: a prompt's tokens of a subject's name
_KIND = {"video": "img", "views": "img", "text": "txt", "named": "txt"}  # of a stream's base weights
PARTS = 6  # of a block's modulation: shift, scale, gate of attention, then of the MLP
_REFINER = "txt_in.individual_token_refiner.blocks"


@dataclass(frozen=True)
class Subject:
    """Adapters under official names. text: whether the subject's works on every text token; it always does on those of
    the subject's name, where they are a stream of their own. scale: of its change of video tokens."""

    subject: Source | None = None
    views: Source | None = None
    text: bool = False
    scale: float = 1.0

    def of(self, stream: str) -> tuple[Source | None, float]:
        """The adapter of a stream's weights, and its scale."""
        if stream == "views":
            return self.views, 1.0
        if stream == "text":
            return (self.subject if self.text else None), 1.0
        return self.subject, 1.0 if stream == "named" else self.scale


@dataclass(frozen=True)
class Linear:
    w: PackedMatrix
    bias: Tensor


@dataclass(frozen=True)
class StreamBlock:
    """Weights of one stream in a block. qkv [3D, D], rotary pairs as halves of a head; norm [2D]: of queries' and keys'
    heads."""

    qkv: Linear
    norm: Tensor
    out: Linear
    fc1: Linear
    fc2: Linear


@dataclass(frozen=True)
class RefinerBlock:
    """norms: weight and bias [D] each; qkv [3D, D]."""

    norm1: tuple[Tensor, Tensor]
    qkv: Linear
    out: Linear
    norm2: tuple[Tensor, Tensor]
    fc1: Linear
    fc2: Linear


@dataclass(frozen=True)
class GlyphWeights:
    """Of what a byte-level encoder says of quoted texts: a norm and three products, the last bias with the type of such
    tokens."""

    norm: tuple[Tensor, Tensor]
    layers: tuple[Linear, Linear, Linear]


@dataclass(frozen=True)
class DitWeights:
    """embed: of the latent's channels, by stream. kind [D]: the type of prompt tokens. glyphs: None where no
    quoted texts are read."""

    embed: dict[str, Linear]
    blocks: list[dict[str, StreamBlock]]
    last: Linear
    states: Linear
    refiner: list[RefinerBlock]
    kind: Tensor
    glyphs: GlyphWeights | None


@dataclass(frozen=True)
class _Fill:
    """A matrix that an adapter changes: rows of `names`, one behind the other."""

    stream: str
    matrix: PackedMatrix
    names: tuple[str, ...]
    columns: int
    turned: int = 0  # how many of the names are products of rotary pairs


class DitLoader(Packer):
    """Packs a checkpoint under official names (canonical_dit); `adapt` merges adapters into it."""

    def __init__(
        self, c: DitConfig, source: Source, arena: Arena, recipe: Recipe, *, views: bool = True, named: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(MappedSource(source), arena)
        self.c, self.recipe = c, recipe
        left_out = {"views": not views, "named": not named}
        self.streams = tuple(s for s in STREAMS if not left_out.get(s))
        self._fills: list[_Fill] = []
        # Neighbouring channels are a pair; the kernels turn channel i and i + half.
        pairs = np.arange(c.head_dim).reshape(-1, 2).T.reshape(-1)
        self._order = (np.arange(c.heads)[:, None] * c.head_dim + pairs).reshape(-1)

    # ------------------------------------------------------------------------------------------ parts
    def _changed(
        self, stream: str, label: str, names: Sequence[str], rows: int, columns: int, turned: int = 0
    ) -> Linear:
        """A product that adapters change, filled by `adapt`. Of its weights the first `columns` are used."""
        matrix = PackedMatrix.empty(self.arena, label, rows, columns, self.recipe.format(stream, columns))
        self._fills.append(_Fill(stream, matrix, tuple(names), columns, turned))

        def bias() -> np.ndarray:
            parts = [self.value(f"{n}.bias") for n in names]
            return np.concatenate([b[self._order] if i < turned else b for i, b in enumerate(parts)])

        return Linear(matrix, self.put(f"{label}.bias", (rows,), bias))

    def _block(self, i: int, stream: str) -> StreamBlock:
        c, d, p = self.c, self.c.width, f"double_blocks.{i}.{_KIND[stream]}"

        def part(name: str, rows: int, columns: int) -> Linear:
            return self._changed(stream, f"{i}.{stream}.{name}", [f"{p}_{name}"], rows, columns)

        pair = self._order[: c.head_dim]

        def heads() -> np.ndarray:
            return np.concatenate([np.tile(self.value(f"{p}_attn_{n}_norm.weight")[pair], c.heads) for n in "qk"])

        qkv = self._changed(stream, f"{i}.{stream}.qkv", [f"{p}_attn_{n}" for n in "qkv"], 3 * d, d, turned=2)
        return StreamBlock(qkv, self.put(f"{i}.{stream}.norm", (2 * d,), heads), part("attn_proj", d, d),
                           part("mlp.fc1", c.mlp, d), part("mlp.fc2", d, c.mlp))  # fmt: skip

    def _linear(self, name: str) -> Linear:
        """A product that no adapter changes."""
        columns = self.source.info(f"{name}.weight").shape[1]
        weight = self.matrix(name, [f"{name}.weight"], self.recipe.format("text", columns))
        return Linear(weight, self.vector(f"{name}.bias"))

    def _affine(self, name: str) -> tuple[Tensor, Tensor]:
        return self.vector(f"{name}.weight"), self.vector(f"{name}.bias")

    def _refiner(self, i: int) -> RefinerBlock:
        p = f"{_REFINER}.{i}"
        return RefinerBlock(self._affine(f"{p}.norm1"), self._linear(f"{p}.self_attn_qkv"),
                            self._linear(f"{p}.self_attn_proj"), self._affine(f"{p}.norm2"),
                            self._linear(f"{p}.mlp.fc1"), self._linear(f"{p}.mlp.fc2"))  # fmt: skip

    def _type(self, label: str, row: int, bias: str = "") -> Tensor:
        """A row of the token types, on top of a bias."""

        def make() -> np.ndarray:
            own = self.value("cond_type_embedding.weight")[row]
            return own + self.value(bias) if bias else own

        return self.put(label, (self.c.width,), make)

    # ------------------------------------------------------------------------------------------ the whole
    def load(self) -> DitWeights:
        """Lays everything out; what adapters change is filled by `adapt`."""
        c, d = self.c, self.c.width
        image = [s for s in self.streams if _KIND[s] == "img"]
        embed = {s: self._changed(s, f"embed.{s}", [EMBED], d, c.channels) for s in image}
        blocks = [{s: self._block(i, s) for s in self.streams} for i in range(c.layers)]
        return DitWeights(
            embed, blocks, self._linear("final_layer.linear"), self._linear("txt_in.input_embedder"),
            [self._refiner(i) for i in range(c.refiner_layers)], self._type("txt_in.type", 0),
            self._glyphs() if c.glyph_dim else None,
        )  # fmt: skip

    def _glyphs(self) -> GlyphWeights:
        one, two, three = (self._linear(f"byt5_in.fc{i}") for i in (1, 2, 3))
        last = Linear(three.w, self._type("byt5_in.type", 1, "byt5_in.fc3.bias"))
        return GlyphWeights(self._affine("byt5_in.layernorm"), (one, two, last))

    def adapt(self, subject: Subject, streams: Sequence[str] = STREAMS) -> Iterator[None]:
        """Fills the matrices of these streams: W + B A of the adapter of each. Yields after each matrix."""
        for f in self._fills:
            if f.stream not in streams:
                continue
            adapter, scale = subject.of(f.stream)
            row = 0
            for i, name in enumerate(f.names):
                part = self._merged(name, f.columns, adapter, scale, i < f.turned)
                if f.matrix.fill(part, row):
                    raise CheckpointError(
                        f"{name!r}, with its adapter, holds NaN, infinity, or values too large for this format"
                    )
                row += len(part)
                self.source.release(f"{name}.weight")
            yield

    def _merged(self, name: str, columns: int, adapter: Source | None, scale: float, turned: bool) -> np.ndarray:
        """[N, columns] of W + scale B A."""
        low = f"{name}.lora_A.weight"
        if adapter is None or low not in adapter.keys():  # noqa: SIM118
            raw = self.source.read(f"{name}.weight")
            raw = raw.reshape(len(raw), -1)[:, :columns]
            return np.ascontiguousarray(raw[self._order] if turned else raw)
        held = Packer(MappedSource(adapter), self.arena)
        a, b = (held.value(f"{name}.lora_{m}.weight") for m in "AB")
        base = self.value(f"{name}.weight")
        value = base.reshape(len(base), -1)[:, :columns]
        value = value + np.float32(scale) * (b.reshape(len(b), -1) @ a.reshape(len(a), -1)[:, :columns])
        return np.ascontiguousarray(value[self._order] if turned else value)


class TimeTables(Packer):
    """What depends on the time: modulations of every block by noise level, gates of the text refiner by prompt.

    Reads the checkpoint whenever it is asked; f32.
    """

    def __init__(self, c: DitConfig, source: Source) -> None:
        super().__init__(MappedSource(source), Arena(dry=True))
        self.c = c

    def _linear(self, name: str, *xs: np.ndarray) -> list[np.ndarray]:
        """A product of each; a product of several at once would round a row by what is beside it."""
        w, b = self.value(f"{name}.weight"), self.value(f"{name}.bias")
        self.source.release(f"{name}.weight")
        return [x @ w.T + b for x in xs]

    def _embedded(self, name: str, *sigmas: np.ndarray) -> list[np.ndarray]:
        """f32 [n, D] of noise levels."""
        waves = [np.stack([time_sinusoid(1000.0 * float(t), self.c.freq_dim, np.float32) for t in s]) for s in sigmas]
        return self._linear(f"{name}.mlp.2", *(silu(x) for x in self._linear(f"{name}.mlp.0", *waves)))

    def modulations(self, sigmas: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each block the parts of video and text at n noise levels [n, 2, 6, D] and those of references [6, D], at
        level 0; then shift and scale of the end [n, 2, D], and at level 0 [2, D]."""
        c, n = self.c, len(sigmas)
        levels = [silu(v) for v in self._embedded("time_in", sigmas, np.zeros(1))]
        for i in range(c.layers):
            image, still = self._linear(f"double_blocks.{i}.img_mod.linear", *levels)
            (text,) = self._linear(f"double_blocks.{i}.txt_mod.linear", levels[0])
            yield np.stack([image, text], 1).reshape(n, 2, PARTS, c.width), still.reshape(PARTS, c.width)
        end, still = self._linear("final_layer.adaLN_modulation.1", *levels)
        yield end.reshape(n, 2, c.width), still.reshape(2, c.width)

    def gates(self, sigmas: np.ndarray, states: np.ndarray) -> np.ndarray:
        """[n, refiner layers, 2, D]: gates behind attention and MLP for a prompt's states [m, text_dim]."""
        c = self.c
        (pooled,) = self._linear("txt_in.c_embedder.linear_1", states.mean(0, dtype=np.float32)[None])
        (text,) = self._linear("txt_in.c_embedder.linear_2", silu(pooled))
        (time,) = self._embedded("txt_in.t_embedder", sigmas)
        vec = silu(time + text)
        parts = [self._linear(f"{_REFINER}.{i}.adaLN_modulation.1", vec)[0] for i in range(c.refiner_layers)]
        return np.stack(parts, 1).reshape(len(sigmas), c.refiner_layers, 2, c.width)
