"""The transformer as plans: states of prompts to tokens, and a sampling step with both branches of guidance.

glyphs     what a byte-level encoder says of quoted texts, into token space
read       states of a prompt's tokens, into token space
refine     those through the text refiner at one noise level, behind the glyphs
views.*    what steps need of the references alone: queries, keys and values of block 0, where nothing of a step has
           reached them; or, of references that see nothing but references, keys and values of every block
step.*     one step of a shape: both branches through every block, and the sampler's update
kept.*     the same with the keys and values of the references that a step before has left

Tokens lie as [references | video | text]: no padding, so attention needs no mask, products of a stream are products of
a range of rows, and keys and values of references can stay where they are. The prompts' tokens are refined for every
step ahead, since nothing but the time changes them.

Guidance and Euler's step are the gate of the last product: x += (1 - g) ds v_without, then x += g ds v_with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np

from engine.errors import InputError
from engine.models.dreambooth3d.config import DitConfig
from engine.models.dreambooth3d.dit_weights import PARTS, DitWeights, Linear
from engine.models.dreambooth3d.schedule import rotation_angles
from engine.models.dreambooth3d.weights import GLYPH_EPS
from engine.ops import attention as attention_op
from engine.ops import gemm as gemm_op
from engine.ops.attention import KVCache, attention
from engine.ops.gather import gather
from engine.ops.gemm import Modulation, gemm
from engine.ops.norm import norm
from engine.runtime.arena import Arena, Tensor

SHIFT1, SCALE1, GATE1, SHIFT2, SCALE2, GATE2 = range(PARTS)
NODES_PER_STREAM, REFINER_NODES = 5, 5


@dataclass(frozen=True)
class Shape:
    """Of a request: latent frames, rows and columns of cells, references, branches of guidance (1 or 2), tokens of a
    subject's name that have weights of their own. seen: which of the references' cells, counted over all of them, are
    there; None: all."""

    frames: int
    rows: int
    columns: int
    views: int = 0
    branches: int = 2
    named: int = 0
    seen: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """Of its plans."""
        guided = "" if self.branches == 2 else ".unguided"
        named = f".{self.named}" if self.named else ""
        seen = "" if self.seen is None else f".of{self.shown}"
        return f"{self.frames}x{self.rows}x{self.columns}.{self.views}{guided}{named}{seen}"

    @property
    def cells(self) -> int:
        return self.rows * self.columns

    @property
    def video(self) -> int:
        """Tokens of the video."""
        return self.frames * self.cells

    @property
    def image(self) -> int:
        """Tokens of video and references."""
        return self.video + self.shown

    @property
    def shown(self) -> int:
        """Tokens of references."""
        return self.views * self.cells if self.seen is None else len(self.seen)


@dataclass(frozen=True)
class Savings:
    """Exact savings, each of which a test switches off.

    shared: block 0 multiplies the video once for both branches and the references once per subject. dead: the last
    block leaves out what only feeds references and text.
    """

    shared: bool = True
    dead: bool = True


@dataclass(frozen=True)
class _Rows:
    """A stream's range of rows, its weights in this block, and where its modulation lies."""

    name: str
    at: int
    count: int
    table: Tensor
    column: int
    live: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        return x.rows(self.at, self.count)

    def modulation(self, d: int, **parts: int) -> Modulation:
        return Modulation(self.table, None, **{k: self.column + part * d for k, part in parts.items()})


class Denoiser:
    """Buffers for up to `image` tokens of video and references, `text` tokens of a prompt and `steps` steps.

    latent f32 [video, channels], rows by frame, row and column: noise before, the clean latent behind the last step.
    views f32 [references * cells, channels]: clean latents of the references.
    """

    def __init__(
        self, arena: Arena, c: DitConfig, w: DitWeights, *, image: int, references: int, text: int, steps: int,
        kv_format: str, savings: Savings = Savings(), kept: int = 0,
    ) -> None:  # fmt: skip
        """references: tokens of those among `image`, at most. kept: sets of the references' keys and values that every
        block keeps: 0, 1 (references that see only references) or 2 (of each branch)."""
        self.c, self._w, self.savings, self.kept = c, w, savings, kept
        self.image, self.references, self.text, self.steps = image, references, text, steps
        d, rows = c.width, image + text
        ctx = -(-rows // 16) * 16
        half = "bf16" if kv_format == "bf16" else "f32"

        def ws(name: str, *shape: int, dtype: str = "f32") -> Tensor:
            return arena.alloc(f"dit.{name}", shape, dtype)

        def io(name: str, *shape: int, dtype: str = "f32") -> Tensor:
            return arena.alloc(f"dit.{name}", shape, dtype, "io")

        self.latent, self._next = io("latent", image, c.channels), ws("next", image, c.channels)
        self.views = io("views", max(references, 1), c.channels)
        self._x, self._qkv, self._mixed = ws("x", rows, d), ws("qkv", rows, 3 * d), ws("mixed", rows, d)
        self._first = arena.alloc("dit.first", (rows, 3 * d), "f32", "state") if savings.shared else self._qkv
        self._hidden = ws("hidden", max(image, text), c.mlp, dtype=half)
        names = [f".{j}.{i}" for j in range(kept) for i in range(c.layers)] or [""]
        part = "state" if kept else "workspace"
        self._kv = [KVCache.empty(arena, f"dit.kv{n}", c.heads, c.head_dim, ctx, kv_format, 1, part) for n in names]
        self._rope = io("rope", ctx, c.head_dim)
        self._zero = arena.alloc("dit.zero", (1,), "i32", "weights")
        # Modulations: of every step, of this step, and of the references, whose time is always 0. In rows of D values.
        self._lines = c.layers * 2 * PARTS + 2 + 2  # of the end, then how far a branch moves the latent
        self._table = io("modulations", steps * self._lines, d)
        self._now = ws("now", self._lines, d)
        self._still = io("still", (c.layers * PARTS), d)
        self._row = io("row", self._lines, dtype="i32")
        # Texts: tokens of every step by branch, and how many they are.
        self._tokens = [io(f"tokens.{b}", steps * text, d) for b in range(2)]
        self._token = io("token", text, dtype="i32")
        self._words = [io(f"words.{b}", 1, dtype="i32") for b in range(2)]  # tokens of the text
        self._live = [io(f"live.{b}", 1, dtype="i32") for b in range(2)]  # of those, what has no weights of its own
        self._asking = [io(f"asking.{b}", 1, dtype="i32") for b in range(2)]  # and of the video
        self._seen = [io(f"seen.{b}", 1, dtype="i32") for b in range(2)]  # and of the references
        self._behind = io("behind", 1, dtype="i32")  # tokens of references
        # The text refiner: states [text, text_dim] or glyphs [text, glyph_dim] to tokens.
        self.states = io("states", text, c.text_dim)
        self.glyphs = io("glyph_states", text, c.glyph_dim) if c.glyph_dim else None
        self.count, self._gates = io("count", 1, dtype="i32"), io("gates", 1, 2 * c.refiner_layers * d)
        self._base, self.refined = io("base", text, d), io("refined", text, d)
        self._text_kv = KVCache.empty(arena, "dit.text.kv", c.heads, c.head_dim, -(-text // 16) * 16, kv_format, 1,
                                      "workspace")  # fmt: skip
        wide = w.glyphs.layers[0].w.n if w.glyphs else 0
        self._glyph = [ws(f"glyph.{i}", text, wide) for i in range(2 * bool(wide))]
        sizes = [gemm_op.workspace_bytes(max(image, text), d), gemm_op.workspace_bytes(text, max(c.mlp, wide)),
                 gemm_op.workspace_bytes(text, max(c.text_dim, c.glyph_dim)),
                 gemm_op.workspace_bytes(image, c.mlp, direct=half == "bf16" and w.last.w.format == "bf16"),
                 attention_op.workspace_bytes(rows, c.heads, c.head_dim, ctx)]  # fmt: skip
        self._ws = ws("ws", max(sizes), dtype="u8")

    # ------------------------------------------------------------------------------------------ what a caller gives
    def place_shape(self, s: Shape) -> None:
        """Positions of a request's tokens."""
        self.fits(s)
        c, half = self.c, self.c.head_dim // 2
        angles = [rotation_angles(n, s.rows, s.columns, c.axes, c.theta) for n in (s.views, s.frames)]
        if s.seen is not None:
            angles[0] = angles[0][list(s.seen)]
        table = np.zeros(self._rope.shape, np.float32)
        table[:, :half] = 1  # a text has no positions
        turned = np.concatenate(angles)
        table[: s.image] = np.concatenate([np.cos(turned), np.sin(turned)], 1)
        self._rope.write(table)
        self._behind.write(np.array([s.shown], np.int32))

    def fits(self, s: Shape) -> None:
        """InputError unless the buffers hold the shape."""
        if min(s.frames, s.rows, s.columns) < 1 or s.branches not in (1, 2) or min(s.views, s.named) < 0:
            raise InputError(f"{s} is no shape of a request")
        if s.seen is not None and not all(0 <= i < s.views * s.cells for i in s.seen):
            raise InputError(f"cells beyond the {s.views * s.cells} of {s.views} references are to be seen")
        if s.image > self.image or s.shown > self.references:
            raise InputError(
                f"{s.image} tokens, {s.shown} of them of references, exceed what was laid out at load "
                f"({self.image}, {self.references}); load with larger limits"
            )
        if s.named and "named" not in self._w.blocks[0]:
            raise InputError("a subject's name has no weights of its own; load with spans=True")

    def place_schedule(self, steps: int, parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        """Modulations as TimeTables gives them, of the noise level of each step and of level 0."""
        d = self.c.width
        if not 1 <= steps <= self.steps:
            raise InputError(f"steps={steps!r}; this load has room for 1 to {self.steps} (steps= at load)")
        value = np.zeros((steps, self._lines, d), np.float32)
        for i, (part, still) in enumerate(parts):
            at = 2 * PARTS * i
            lines = part.reshape(steps, -1, d)
            value[:, at : at + lines.shape[1]] = lines
            if i < self.c.layers:
                self._still.rows(PARTS * i, PARTS).write(still)
        self._table.slice(0, (steps * self._lines, d)).write(value.reshape(-1, d))

    def place_moves(self, sigmas: np.ndarray, guidance: float, branches: int) -> None:
        """How far each branch moves the latent in each step, into the table of a schedule that is placed already."""
        d, n = self.c.width, len(sigmas) - 1
        ds = np.diff(np.asarray(sigmas, np.float64))
        shares = (1.0 - guidance, guidance) if branches == 2 else (0.0, 1.0)
        for i in range(n):
            line = self._table.rows(i * self._lines + self._lines - 2, 2)
            line.write(np.repeat(np.array([share * ds[i] for share in shares], np.float32)[:, None], d, 1))

    def place_text(self, branch: int, tokens: np.ndarray, s: Shape) -> None:
        """tokens f32 [steps, n, D] of a prompt, refined for each step; of the prompt that is asked for, those of a
        subject's name come first."""
        n = tokens.shape[1]
        for i, step in enumerate(tokens):
            self._tokens[branch].rows(i * self.text, n).write(step)
        own = s.named if branch else 0
        for buffer, count in ((self._words, n), (self._live, n - own), (self._asking, s.video + n),
                              (self._seen, s.image + n)):  # fmt: skip
            buffer[branch].write(np.array([count], np.int32))

    def place_step(self, i: int) -> None:
        """Which step the next replay is."""
        self._row.write(np.arange(self._lines, dtype=np.int32) + i * self._lines)
        self._token.write(np.arange(self.text, dtype=np.int32) + i * self.text)

    def place_gates(self, gates: np.ndarray) -> None:
        """f32 [refiner layers, 2, D] of a prompt at one noise level."""
        self._gates.write(np.ascontiguousarray(gates.reshape(1, -1), np.float32))

    # ------------------------------------------------------------------------------------------ texts
    def text_steps(self) -> dict[str, Callable[[], None]]:
        """What the plans of texts record; `count` holds how many rows are live."""
        glyphs = {"glyphs": self._read_glyphs} if self._w.glyphs else {}
        return glyphs | {"read": self._read, "refine": self._refine}

    def _read_glyphs(self) -> None:
        assert self._w.glyphs is not None and self.glyphs is not None
        w, (a, b) = self._w.glyphs, self._glyph
        one, two, three = w.layers
        gemm(self.glyphs, one.w, a, prologue="layer", norm=w.norm[0], norm_bias=w.norm[1], eps=GLYPH_EPS,
             bias=one.bias, act="gelu", rows=self.count, ws=self._ws, label="glyphs.fc1")  # fmt: skip
        gemm(a, two.w, b, bias=two.bias, act="gelu", rows=self.count, ws=self._ws, label="glyphs.fc2")
        gemm(b, three.w, self.refined, bias=three.bias, rows=self.count, ws=self._ws, label="glyphs.fc3")

    def _read(self) -> None:
        gemm(self.states, self._w.states.w, self._base, bias=self._w.states.bias, rows=self.count, ws=self._ws,
             label="read")  # fmt: skip

    def _refine(self) -> None:
        c, d, n = self.c, self.c.width, self.text
        x, qkv, mixed = (t.slice(0, (n, t.shape[1])) for t in (self._x, self._qkv, self._mixed))
        hidden = self._hidden.slice(0, (n, c.mlp))
        q, k, v = (qkv.columns(i * d, d) for i in range(3))
        source = self._base
        for i, w in enumerate(self._w.refiner):
            gates = [Modulation(self._gates, None, gate=(2 * i + j) * d) for j in range(2)]
            label = f"refine.{i}"
            self._product(source, w.qkv, qkv, label, "qkv", self.count, w.norm1)
            attention(q, k, v, self._text_kv, self._zero, mixed, heads=c.heads, causal=False, rows=self.count,
                      ws=self._ws, label=f"{label}.attention")  # fmt: skip
            self._product(mixed, w.out, x, label, "out", self.count, residual=source, modulation=gates[0])
            self._product(x, w.fc1, hidden, label, "fc1", self.count, w.norm2, act="silu")
            self._product(hidden, w.fc2, x, label, "fc2", self.count, residual=x, modulation=gates[1])
            source = x
        norm(x, self.refined, kind="none", add=self._w.kind, rows=self.count, label="refine.type")

    def _product(
        self, x: Tensor, w: Linear, out: Tensor, label: str, name: str, rows: Tensor | None,
        affine: tuple[Tensor, Tensor] | None = None, *, residual: Tensor | None = None,
        modulation: Modulation | None = None, act: str = "none",
    ) -> None:  # fmt: skip
        """A product, behind a layer norm where it has a weight or a modulation that scales."""
        normed = affine is not None or (modulation is not None and modulation.norms)
        gemm(x, w.w, out, bias=w.bias, act=act, residual=residual, prologue="layer" if normed else None, eps=self.c.eps,
             norm=affine[0] if affine else None, norm_bias=affine[1] if affine else None, modulation=modulation,
             rows=rows, ws=self._ws, label=f"{label}.{name}")  # fmt: skip

    # ------------------------------------------------------------------------------------------ a step
    def step(self, s: Shape, *, kept: bool = False, branch: int | None = None) -> Callable[[], None]:
        """What the plan of a shape's step records. kept: with the references' keys and values that are there. branch:
        of guidance, that one alone."""
        self.fits(s)
        return partial(self._step, s, kept, range(2 - s.branches, 2) if branch is None else range(branch, branch + 1))

    def keep_views(self, s: Shape, *, alone: bool = False) -> Callable[[], None]:
        """What the plan of a subject's references records, behind `place_shape` and before the first step. alone: keys
        and values of every block, of references that see nothing else."""
        self.fits(s)
        return partial(self._keep_alone if alone else self._keep_first, s)

    def _keep_first(self, s: Shape) -> None:
        rows = self._streams(s, 0, 0)[0]
        self._embed(rows, self.views)
        self._project(rows, 0, self._first)

    def _keep_alone(self, s: Shape) -> None:
        c, d = self.c, self.c.width
        self._embed(self._streams(s, 0, 0)[0], self.views)
        for i in range(c.layers):
            rows, last = self._streams(s, i, 0)[0], i == c.layers - 1
            self._project(rows, i, self._qkv, asks=not (last and self._apart))
            q, k, v = (rows.of(self._qkv).columns(j * d, d) for j in range(3))
            self._mix(i, 0, None if last else q, k, v, self._zero, rows.of(self._mixed))
            if self.kept == 2:  # each branch looks into a set of its own
                self._mix(i, 1, None, k, v, self._zero, rows.of(self._mixed))
            if not last:
                self._finish(rows, i)

    def _streams(self, s: Shape, block: int, branch: int) -> list[_Rows]:
        """References if there are any, video, text that has weights of its own, and the other text."""
        d, at = self.c.width, 2 * PARTS * block * self.c.width
        now, still = (t.slice(0, (1, math.prod(t.shape))) for t in (self._now, self._still))
        out = [_Rows("views", 0, s.shown, still, PARTS * block * d)] if s.shown else []
        out.append(_Rows("video", s.shown, s.video, now, at))
        own = s.named if branch else 0
        if own:
            out.append(_Rows("named", s.image, own, now, at + PARTS * d))
        return [*out, _Rows("text", s.image + own, self.text - own, now, at + PARTS * d, self._live[branch])]

    def _step(self, s: Shape, kept: bool, branches: range) -> None:
        c, w, d = self.c, self._w, self.c.width
        gather(self._table, self._row, self._now, label="modulations")
        latent, moved = (t.slice(0, (s.video, c.channels)) for t in (self.latent, self._next))
        end = 2 * PARTS * c.layers * d
        for branch in branches:
            label, first, last = ("without", "with")[branch], branch == branches[0], branch == branches[-1]
            self._branch(s, branch, latent, kept, first)
            given, out = latent if first else moved, latent if last else moved
            now = self._now.slice(0, (1, math.prod(self._now.shape)))
            move = Modulation(now, None, shift=end, scale=end + d, gate=end + (2 + branch) * d)
            self._product(self._x.rows(s.shown, s.video), w.last, out, label, "last", None, residual=given,
                          modulation=move)  # fmt: skip

    def _branch(self, s: Shape, branch: int, latent: Tensor, kept: bool, first: bool) -> None:
        """The streams behind the last block. first: no other branch has run in this step."""
        words = self._x.rows(s.image, self.text)
        gather(self._tokens[branch], self._token, words, rows=self._words[branch], label="text")
        for rows in self._streams(s, 0, branch):
            if rows.name == "video" or (rows.name == "views" and not kept):
                self._embed(rows, latent if rows.name == "video" else self.views)
        for i in range(self.c.layers):
            self._block(s, i, branch, kept, first)

    def _embed(self, rows: _Rows, latent: Tensor) -> None:
        given = latent.slice(0, (rows.count, self.c.channels))
        self._product(given, self._w.embed[rows.name], rows.of(self._x), "embed", rows.name, None)

    @property
    def _apart(self) -> bool:
        """Whether keys and values can be multiplied without queries: they are whole panels."""
        return self.c.width % 16 == 0

    def _project(self, rows: _Rows, i: int, qkv: Tensor, *, asks: bool = True) -> None:
        """Queries, keys and values of a stream, normed. Without asks, keys and values alone."""
        d, w, name = self.c.width, self._w.blocks[i][rows.name], f"{i}.{rows.name}"
        first = 0 if asks else d
        out = rows.of(qkv).columns(first, 3 * d - first)
        product = w.qkv if asks else Linear(w.qkv.w.part(d, 2 * d), w.qkv.bias.slice(d, (2 * d,)))
        self._product(rows.of(self._x), product, out, name, "qkv", rows.live,
                      modulation=rows.modulation(d, shift=SHIFT1, scale=SCALE1))  # fmt: skip
        heads = rows.of(qkv).columns(first, 2 * d - first)
        norm(heads, heads, kind="rms", weight=w.norm.slice(first, (2 * d - first,)), eps=self.c.eps,
             group=self.c.head_dim, rows=rows.live, label=f"{name}.heads")  # fmt: skip

    def _mix(
        self, i: int, branch: int, q: Tensor | None, k: Tensor, v: Tensor, pos: Tensor, out: Tensor,
        live: Tensor | None = None, queries: int | None = None,
    ) -> None:  # fmt: skip
        """Attention of rows from position `pos` on, to everything up to them."""
        cache = self._kv[(branch % self.kept) * self.c.layers + i if self.kept else 0]
        label = f"{i}.{'append' if q is None else 'attention'}"
        attention(q, k, v, cache, pos, None if q is None else out, heads=self.c.heads, causal=False, rope=self._rope,
                  rows=live, queries=queries, ws=self._ws, label=label)  # fmt: skip

    def _block(self, s: Shape, i: int, branch: int, kept: bool, first: bool) -> None:
        d, last = self.c.width, i == self.c.layers - 1 and self.savings.dead
        shared = i == 0 and self.savings.shared
        qkv = self._first if shared else self._qkv
        streams = [r for r in self._streams(s, i, branch) if not (kept and r.name == "views")]
        for rows in streams:
            # The other branch, and the subject's plan, have left theirs.
            known = shared and (rows.name == "views" or (rows.name == "video" and not first))
            if not known:
                self._project(rows, i, qkv, asks=not (last and self._apart and rows.name != "video"))
        views = s.shown

        def parts(first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
            rows = qkv.rows(first, count)
            return rows.columns(0, d), rows.columns(d, d), rows.columns(2 * d, d)

        if (last or kept) and views:
            if not kept:
                _, k, v = parts(0, views)
                self._mix(i, branch, None, k, v, self._zero, self._mixed)
            count = s.video + self.text
            self._mix(i, branch, *parts(views, count), self._behind, self._mixed.rows(views, count),
                      self._asking[branch], s.video if last else None)  # fmt: skip
        else:
            count = s.image + self.text
            self._mix(i, branch, *parts(0, count), self._zero, self._mixed.rows(0, count), self._seen[branch],
                      s.video if last else None)  # fmt: skip
        for rows in streams:
            if rows.name == "video" or not last:
                self._finish(rows, i)

    def _finish(self, rows: _Rows, i: int) -> None:
        """What follows attention in a block."""
        c, d, w, name = self.c, self.c.width, self._w.blocks[i][rows.name], f"{i}.{rows.name}"
        x, hidden = rows.of(self._x), self._hidden.slice(0, (rows.count, c.mlp))
        self._product(rows.of(self._mixed), w.out, x, name, "out", rows.live, residual=x,
                      modulation=rows.modulation(d, gate=GATE1))  # fmt: skip
        self._product(x, w.fc1, hidden, name, "fc1", rows.live, act="gelu_tanh",
                      modulation=rows.modulation(d, shift=SHIFT2, scale=SCALE2))  # fmt: skip
        self._product(hidden, w.fc2, x, name, "fc2", rows.live, residual=x,
                      modulation=rows.modulation(d, gate=GATE2))  # fmt: skip

    def node_budget(self, s: Shape) -> int:
        """Most nodes of a step of this shape on a CPU."""
        streams = (3 if s.shown else 2) + bool(s.named)
        return 1 + s.branches * (streams + self.c.layers * (NODES_PER_STREAM * streams + 1) + 2)
