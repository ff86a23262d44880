"""The generator as plans: frames to latents, latents to features of one block (Wan 2.1).

noise.i    the noise of one frame into place i of a pass
frame.i    one frame into place i: resize and crop, the VAE's encoder as a 2-D network, noise
features   a pass of frames through the transformer up to the tapped block, pooled before its last product
black, reference   VACE: what place 0 holds becomes the black frame, or the clip's first one, of every context

Frames are videos of one frame each: no frame sees another, so any number of them may share a pass.

VACE pads the tokens of a frame to twice their number; what is tapped are the padded rows, which are only queries. Rows
lie in halves: those of all frames of a pass, then their padding. A block of hints runs right before the block whose
output its hint is added to, so no hint is stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from engine.blocks.diffusion import NORM_EPS
from engine.models.vega3d.generator_config import DitConfig, Tap, VaeConfig
from engine.models.vega3d.generator_weights import (
    Conv,
    DitBlock,
    DitWeights,
    OneToken,
    Stage,
    Tokens,
    VaceWeights,
    VaeAttention,
    VaeBlock,
    VaeWeights,
    vae_stages,
)
from engine.ops import attention as attention_op
from engine.ops import gemm as gemm_op
from engine.ops.attention import KVCache, attention
from engine.ops.conv import conv_patches
from engine.ops.fuse import gate_heads
from engine.ops.gather import Sums, gather, gather_sum
from engine.ops.gemm import Window, gemm
from engine.ops.norm import norm
from engine.ops.rng import rng
from engine.runtime.arena import Arena, Tensor
from engine.runtime.plan import capture

NODES_PER_BLOCK = 9
VAE_NODES = {"block": 4, "down": 2, "attention": 3}


# ------------------------------------------------------------------------------------------------------ resampling
def bilinear(n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """(cells i32 [m, 2], shares f32 [m, 2]) that m samples take of n, between the centres of cells and without
    antialias; places in fp32, as torch computes them."""
    f = np.float32
    # Rounded once, as a fused multiply-add is.
    at = np.maximum((np.arange(m) + 0.5) * np.float64(f(n / m)) - 0.5, 0).astype(f)
    low = np.minimum(at.astype(np.int32), n - 1)
    share = at - low.astype(f)
    return np.stack([low, np.minimum(low + 1, n - 1)], 1), np.stack([1 - share, share], 1)


def crop_of(height: int, width: int, tap: Tap) -> tuple[np.ndarray, np.ndarray]:
    """(cells i32 [H * W, 4], shares f32 [H * W, 4]) that each pixel of the tap's size takes of a frame."""
    w, h = tap.size
    top = left = 0
    nh, nw = h, w
    if tap.crop == "cover":
        scale = max(h / height, w / width)
        nh, nw = round(height * scale), round(width * scale)
        top, left = (nh - h) // 2, (nw - w) // 2
    rows, by_row = (a[top : top + h] for a in bilinear(height, nh))
    columns, by_column = (a[left : left + w] for a in bilinear(width, nw))
    cells = rows[:, None, :, None] * width + columns[None, :, None, :]
    shares = by_row[:, None, :, None] * by_column[None, :, None, :]
    return cells.reshape(h * w, 4).astype(np.int32), shares.reshape(h * w, 4).astype(np.float32)


def averages(rows: int, columns: int, grid: tuple[int, int]) -> list[list[tuple[int, float]]]:
    """Means of a grid over windows that cover it and may overlap by a cell (adaptive average pooling)."""

    def spans(n: int, m: int) -> list[range]:
        return [range(i * n // m, -(-(i + 1) * n // m)) for i in range(m)]

    return [[(y * columns + x, 1 / (len(ys) * len(xs))) for y in ys for x in xs]
            for ys in spans(rows, grid[0]) for xs in spans(columns, grid[1])]  # fmt: skip


class Generator:
    """Buffers and plans of a tower: frames in `images`, features in `out`.

    images f32 [n, pixels, 3] in [-1, 1], of which a frame of the size last told fills the first; noise f32 [n, cells,
    z], standard normal; out f32 [n * grid, dim]; n is `per_pass`. Latents are in units of sigma: noise is just added.
    """

    def __init__(
        self, arena: Arena, vae: VaeConfig, dit: DitConfig, tap: Tap, vae_weights: VaeWeights, weights: DitWeights, *,
        pixels: int, per_pass: int, kv_format: str,
    ) -> None:  # fmt: skip
        self.vae, self.dit, self.tap, self.per_pass = vae, dit, tap, per_pass
        self._vae_weights, self._weights = vae_weights, weights
        (w, h), d, n = tap.size, dit.dim, per_pass
        self._size = (h, w)
        self.latent = (h // vae.factor, w // vae.factor)
        self.rows, self.columns = (s // dit.patch for s in self.latent)
        self.tokens = self.rows * self.columns
        self.cells = tap.grid[0] * tap.grid[1] if tap.grid else self.tokens
        half = "bf16" if kv_format == "bf16" else "f32"
        self._stages = vae_stages(vae)
        levels = [(h >> i, w >> i) for i in range(len(vae.mult))]
        self._levels = levels

        def cells(level: int, border: int = 0) -> int:
            return (levels[level][0] + border) * (levels[level][1] + border)

        def ws(name: str, *shape: int, dtype: str = "f32") -> Tensor:
            return arena.alloc(f"generator.{name}", shape, dtype)

        self.images = arena.alloc("generator.images", (n, pixels, 3), "f32", "io")
        self.noise = arena.alloc("generator.noise", (n, self.latent[0] * self.latent[1], vae.z), "f32", "io")
        self._crop = Sums(
            arena.alloc("generator.crop.offsets", (h * w + 1,), "i32", "io"),
            arena.alloc("generator.crop.cells", (4 * h * w,), "i32", "io"),
            arena.alloc("generator.crop.shares", (4 * h * w,), "f32", "io"), pixels,
        )  # fmt: skip
        if not arena.dry:
            self._crop.offsets.write(np.arange(0, 4 * h * w + 1, 4, dtype=np.int32))
        self._frame = (0, 0)
        self._seed = {k: arena.alloc(f"generator.{k}", (1,), "u64", "io") for k in ("seed", "frame")}
        # Streams, hidden values and bordered copies of every level share memory; of the latter convolutions read all.
        wide = max(cells(s.level) * max(s.cin, s.cout) for s in self._stages)
        self._a, self._b = ws("vae.a", wide), ws("vae.b", max(wide, 3 * cells(0)))
        top = max(3 * s.cin * cells(s.level) for s in self._stages if s.kind == "attention")
        self._h = ws("vae.h", max(wide, 27 * cells(0), top))
        self._padded = ws("vae.padded", max(cells(s.level, 2) * max(s.cin, s.cout) for s in self._stages), dtype=half)
        last = self._stages[-1]
        ctx = -(-cells(last.level) // 16) * 16
        self._vae_kv = KVCache.empty(arena, "generator.vae.kv", 1, last.cin, ctx, kv_format, 1, "workspace")
        self._latents = ws("latents", n * self.latent[0] * self.latent[1], vae.z)
        vace = weights.vace is not None
        self._half = n * self.tokens
        m = self._half * (2 if vace else 1)
        self._x, self._qkv, self._mixed = ws("x", m, d), ws("qkv", m, 3 * d), ws("mixed", m, d)
        self._hidden = ws("hidden", m, dit.ffn)
        self._patches = ws("patches", self._half, dit.channels * dit.patch**2)
        if vace:
            self._clean = ws("clean", n * self.latent[0] * self.latent[1], vae.z)
            self._hints = ws("hints", m, d)
            self._given = {k: arena.alloc(f"generator.{k}", (self.tokens, d), "f32", "state")
                           for k in ("reference", "black")}  # fmt: skip
            self._none = arena.alloc("generator.none", (self._half,), "i32", "weights")
            self._seen = arena.alloc("generator.seen", (n,), "i32", "weights")
            if not arena.dry:
                self._none.write(np.full(self._half, -1, np.int32))
                self._seen.write(np.full(n, self.tokens, np.int32))
        if weights.text > 1:
            self._text = [arena.alloc(f"generator.text.{k}", (weights.text, d), "f32", "io") for k in "kv"]
            self._text_pos = arena.alloc("generator.text.pos", (1,), "i32", "weights")
            if not arena.dry:
                self._text_pos.write(np.array([weights.text], np.int32))
        self.out = arena.alloc("generator.out", (n * self.cells, d), "f32", "io")
        self._zero = arena.alloc("generator.zero", (n,), "i32", "io")
        ctx = -(-self.tokens // 16) * 16
        self._kv = KVCache.empty(arena, "generator.kv", dit.heads, dit.head_dim, ctx, kv_format, n, "workspace")
        self._rope = arena.alloc("generator.rope", (ctx, dit.head_dim), "f32", "weights")
        if not arena.dry:
            self._rope.slice(0, weights.rope.shape).copy_from(weights.rope)
        self._pool: Sums | None = None
        if tap.grid is not None and tap.grid != (self.rows, self.columns):
            matrix = averages(self.rows, self.columns, tap.grid)
            self._pool = Sums.of(arena, "generator.pool", matrix, self.tokens)
            self._pooled = ws("pooled", n * self.cells, dit.ffn)
            if vace:
                self._pooled_hints = ws("pooled_hints", n * self.cells, d)
        direct = half == "bf16" and vae_weights.head.w.format == "bf16"
        sizes = [gemm_op.workspace_bytes(cells(s.level), 9 * max(s.cin, s.cout), direct=direct) for s in self._stages]
        sizes += [gemm_op.workspace_bytes(cells(s.level), s.cin) for s in self._stages]
        sizes += [gemm_op.workspace_bytes(m, max(d, dit.ffn)), gemm_op.workspace_bytes(cells(0), 27)]
        sizes += [attention_op.workspace_bytes(k.ctx, k.kv_heads, k.d, k.ctx) for k in (self._kv, self._vae_kv)]
        if isinstance(text := weights.blocks[0].text, Tokens):
            sizes.append(attention_op.workspace_bytes(m, dit.heads, dit.head_dim, text.cache.ctx))
        self._ws = ws("ws", max(sizes), dtype="u8")

    def steps(self) -> dict[str, Callable[[], None]]:
        """What each plan records."""
        out: dict[str, Callable[[], None]] = {f"frame.{i}": partial(self._encode, i) for i in range(self.per_pass)}
        out |= {f"noise.{i}": partial(self._draw, i) for i in range(self.per_pass)}
        if self._weights.vace is not None:
            out |= {"reference": partial(self._refer, "reference"), "black": partial(self._refer, "black")}
        return out | {"features": self._features}

    def fill(self) -> None:
        """Once, at load: keys and values of a text of several tokens."""
        for block in [*self._weights.blocks, *(self._weights.vace.blocks.values() if self._weights.vace else ())]:
            if isinstance(text := block.text, Tokens):
                for buffer, value in zip(self._text, (text.keys, text.values)):
                    buffer.write(value.astype(np.float32))
                k, v = self._text
                capture(partial(attention, None, k, v, text.cache, self._zero.slice(0, (1,)), None,
                                heads=self.dit.heads, causal=False, ws=self._ws), "text").replay()  # fmt: skip
                text.keys = text.values = np.zeros((0, self.dit.dim))

    # ------------------------------------------------------------------------------------------ what a caller gives
    def place(self, i: int, frame: np.ndarray) -> None:
        """frame f32 [H, W, 3] in [-1, 1] to place i of a pass; all frames of a pass have one size."""
        height, width = frame.shape[:2]
        if (height, width) != self._frame:
            cells, shares = crop_of(height, width, self.tap)
            self._frame = (0, 0)  # neither, until both are written
            self._crop.rows.write(cells.reshape(-1))
            self._crop.weights.write(shares.reshape(-1))
            self._frame = (height, width)
        self.images.slice(i * math.prod(self.images.shape[1:]), (height * width, 3)).write(
            np.ascontiguousarray(frame.reshape(-1, 3), np.float32)
        )

    def place_noise(self, i: int, noise: np.ndarray) -> None:
        """noise f32 [z, h, w] of the frame at place i."""
        rows = np.ascontiguousarray(noise.reshape(self.vae.z, -1).T, np.float32)
        self.noise.slice(i * rows.size, rows.shape).write(rows)

    def place_seed(self, seed: int, frame: int) -> None:
        """What `noise.i` draws next: the noise of a frame of a seed, whatever pass and place it has."""
        self._seed["seed"].write(np.array([seed], np.uint64))
        self._seed["frame"].write(np.array([frame], np.uint64))

    @property
    def node_budgets(self) -> dict[str, int]:
        """Most nodes of a frame's plan and of the features'."""
        vae = 5 + sum(VAE_NODES[s.kind] + (s.kind == "block" and s.cin != s.cout) for s in self._stages)
        w = self._weights
        each = NODES_PER_BLOCK + (2 if w.text > 1 else 0) + (2 if w.vace else 0)
        hints = (each + 1) * len(w.vace.blocks) + 4 * self.per_pass + 4 if w.vace else 0
        return {"frame": vae + (w.vace is not None), "features": 2 + each * (self.tap.block + 1) + 2 + hints,
                "reference": 2, "black": 2}  # fmt: skip

    # ------------------------------------------------------------------------------------------ frames to latents
    def _draw(self, place: int) -> None:
        shape = self.noise.shape[1:]
        rng(self.noise.slice(place * math.prod(shape), shape), self._seed["seed"], self._seed["frame"],
            label=f"noise.{place}")  # fmt: skip

    def _encode(self, place: int) -> None:
        w, (height, width) = self._vae_weights, self._size
        image = self._b.slice(0, (height * width, 3))
        frame = self.images.slice(place * math.prod(self.images.shape[1:]), self.images.shape[1:])
        gather_sum(frame, self._crop, image, label="crop")
        patches = self._h.slice(0, (height * width, 27))
        conv_patches(image.slice(0, (1, height, width, 3)), patches, size=3, stride=1, pad=1, label="vae.patches")
        x = self._a.slice(0, (height * width, w.first.w.n))
        gemm(patches, w.first.w, x, bias=w.first.bias, ws=self._ws, label="vae.first")
        for stage, part in zip(self._stages, w.parts):
            if isinstance(part, VaeBlock):
                x = self._block(x, stage, part)
            elif isinstance(part, VaeAttention):
                self._attend(x, stage, part)
            else:
                x = self._halve(x, stage, part)
        cells = self.latent[0] * self.latent[1]
        z = self._latents.slice(place * cells * self.vae.z, (cells, self.vae.z))
        noise = self.noise.slice(place * cells * self.vae.z, (cells, self.vae.z))
        padded = self._normed(x, w.norm, len(self._levels) - 1, "vae.head.norm")
        if self._weights.vace is None:
            self._conv(padded, w.head, z, len(self._levels) - 1, "vae.head", residual=noise)
            return
        clean = self._clean.slice(place * cells * self.vae.z, (cells, self.vae.z))
        self._conv(padded, w.head, clean, len(self._levels) - 1, "vae.head")
        norm(clean, z, kind="none", add=noise, label="noised")

    def _normed(self, x: Tensor, gamma: Tensor | None, level: int, label: str) -> Tensor:
        """silu(rms(x) * gamma), or x as it is, in a border of zeros."""
        height, width = self._levels[level]
        out = self._padded.slice(0, ((height + 2) * (width + 2), x.shape[1]))
        if gamma is None:
            norm(x, out, kind="none", width=width, label=label)
        else:
            norm(x, out, kind="rms", weight=gamma, eps=NORM_EPS, act="silu", width=width, label=label)
        return out

    def _conv(
        self, padded: Tensor, conv: Conv, out: Tensor, level: int, label: str, residual: Tensor | None = None,
        stride: int = 1,
    ) -> None:  # fmt: skip
        """3 x 3 over a bordered grid; with a stride the border on the left and at the top is left out."""
        width = self._levels[level][1]
        line, first = width + 2, 0 if stride == 1 else width + 3
        x = padded.slice(first * padded.shape[1], (padded.shape[0] - first, padded.shape[1]))
        gemm(x, conv.w, out, bias=conv.bias, residual=residual, taps=Window(3, width // stride, line, stride),
             ws=self._ws, label=label)  # fmt: skip

    def _other(self, x: Tensor, rows: int, width: int) -> Tensor:
        """The stream buffer that x is not in."""
        return (self._b if x.address == self._a.address else self._a).slice(0, (rows, width))

    def _block(self, x: Tensor, s: Stage, w: VaeBlock) -> Tensor:
        hidden = self._h.slice(0, (x.shape[0], s.cout))
        self._conv(self._normed(x, w.norm1, s.level, f"vae.{s.name}.norm1"), w.conv1, hidden, s.level,
                   f"vae.{s.name}.conv1")  # fmt: skip
        if w.shortcut is not None:
            out = self._other(x, x.shape[0], s.cout)
            gemm(x, w.shortcut.w, out, bias=w.shortcut.bias, ws=self._ws, label=f"vae.{s.name}.shortcut")
            x = out
        self._conv(self._normed(hidden, w.norm2, s.level, f"vae.{s.name}.norm2"), w.conv2, x, s.level,
                   f"vae.{s.name}.conv2", residual=x)  # fmt: skip
        return x

    def _halve(self, x: Tensor, s: Stage, w: Conv) -> Tensor:
        out = self._other(x, math.prod(self._levels[s.level + 1]), s.cout)
        self._conv(self._normed(x, None, s.level, f"vae.{s.name}.pad"), w, out, s.level, f"vae.{s.name}", stride=2)
        return out

    def _attend(self, x: Tensor, s: Stage, w: VaeAttention) -> None:
        d = s.cin
        qkv, mixed = self._h.slice(0, (x.shape[0], 3 * d)), self._other(x, x.shape[0], d)
        gemm(x, w.qkv.w, qkv, prologue="rms", norm=w.norm, eps=NORM_EPS, bias=w.qkv.bias, ws=self._ws,
             label=f"vae.{s.name}.qkv")  # fmt: skip
        q, k, v = (qkv.columns(i * d, d) for i in range(3))
        attention(q, k, v, self._vae_kv, self._zero.slice(0, (1,)), mixed, heads=1, causal=False, ws=self._ws,
                  label=f"vae.{s.name}")  # fmt: skip
        gemm(mixed, w.out.w, x, bias=w.out.bias, residual=x, ws=self._ws, label=f"vae.{s.name}.out")

    # ------------------------------------------------------------------------------------------ latents to features
    def _patched(self, latents: Tensor, n: int) -> Tensor:
        """Patches [n * tokens, z * p * p] of n frames."""
        (height, width), out = self.latent, self._patches.slice(0, (n * self.tokens, self._patches.shape[1]))
        conv_patches(latents.slice(0, (n, height, width, self.vae.z)), out, size=self.dit.patch,
                     stride=self.dit.patch, label="patches")  # fmt: skip
        return out

    def _refer(self, which: str) -> None:
        w = self._weights.vace
        assert w is not None
        bias = w.reference_bias if which == "reference" else w.black_bias
        gemm(self._patched(self._clean, 1), w.reference, self._given[which], bias=bias, ws=self._ws, label=which)

    def _features(self) -> None:
        w, n, last = self._weights, self.per_pass, len(self._weights.blocks) - 1
        x = self._x.slice(0, (self._half, self.dit.dim))
        gemm(self._patched(self._latents, n), w.patch, x, bias=w.patch_bias, ws=self._ws, label="patch")
        if w.vace is not None:
            self._begin_hints(w.vace, x)
        for i, block in enumerate(w.blocks):
            hint = None if w.vace is None else w.vace.blocks.get(i)
            if hint is not None:
                hints = self._hint(i, hint, tail=i == last)
            hidden, stream = self._transform(str(i), block, self._x, tail=i == last)
            if i < last:
                self._close(str(i), block, hidden, stream)
            else:
                self._tap(str(i), block, hidden, stream, self.out)
            if hint is not None and hint.after is not None:
                out, (after, bias) = self._x if i < last else self.out, hint.after
                gemm(hints, after, out, bias=bias, residual=out, ws=self._ws, label=f"hint.{i}")

    def _hint(self, i: int, w: DitBlock, *, tail: bool) -> Tensor:
        """What a hint is made of: the rows that the tapped block pools, or all."""
        hidden, stream = self._transform(f"hint.{i}", w, self._hints, tail=tail)
        if not tail or self._pool is None:
            self._close(f"hint.{i}", w, hidden, stream)
            return stream
        self._tap(f"hint.{i}", w, hidden, stream, self._pooled_hints)
        return self._pooled_hints

    def _begin_hints(self, w: VaceWeights, x: Tensor) -> None:
        """No padding row has a value yet; hints start from the context, and from the frame's own tokens."""
        d, size, half = self.dit.dim, self.tokens, self._half
        text = self._weights.blocks[0].fc2_bias  # any table with rows of this width
        gather(text.slice(0, (1, d)), self._none, self._x.slice(half * d, (half, d)), label="padding")
        patches = self._patched(self._clean, self.per_pass)
        for i in range(self.per_pass):
            at = i * size
            norm(x.slice(at * d, (size, d)), self._hints.slice(at * d, (size, d)), kind="none",
                 add=self._given["reference"], label="reference")  # fmt: skip
            gemm(patches.slice(at * patches.shape[1], (size, patches.shape[1])), w.frame,
                 self._hints.slice((half + at) * d, (size, d)), residual=self._given["black"], ws=self._ws,
                 label="context")  # fmt: skip

    def _transform(self, label: str, w: DitBlock, x: Tensor, *, tail: bool) -> tuple[Tensor, Tensor]:
        """A block up to its last product: (hidden values, stream). tail: nothing behind it reads a frame's own rows, if
        there are padded ones."""
        c, ws = self.dit, self._ws

        def live(t: Tensor) -> Tensor:
            part = self._half if tail and w.apart else 0
            return t.slice(part * t.shape[1], (t.shape[0] - part, t.shape[1]))

        self._mix(label, w, x, tail)
        x, mixed, hidden = live(x), live(self._mixed), live(self._hidden)
        gemm(mixed, w.out, x, bias=w.out_bias, residual=x, ws=ws, label=f"{label}.out")
        gemm(x, w.query, mixed, prologue="layer", eps=c.eps, bias=w.query_bias, ws=ws, label=f"{label}.query")
        if isinstance(text := w.text, OneToken):
            gate_heads(mixed, text.dk, text.u, text.base, x, x, bias=math.log(self._weights.pads), eps=c.eps,
                       label=f"{label}.text")  # fmt: skip
        else:
            seen = live(self._qkv).columns(0, c.dim)
            norm(mixed, mixed, kind="rms", weight=text.norm, eps=c.eps, label=f"{label}.norm_text")
            attention(mixed, None, None, text.cache, self._text_pos, seen, heads=c.heads, causal=False,
                      pads=text.pads, ws=ws, label=f"{label}.text")  # fmt: skip
            gemm(seen, text.out, x, bias=w.text_bias, residual=x, ws=ws, label=f"{label}.text_out")
        gemm(x, w.fc1, hidden, prologue="layer", eps=c.eps, bias=w.fc1_bias, act="gelu_tanh", ws=ws,
             label=f"{label}.fc1")  # fmt: skip
        return hidden, x

    def _mix(self, label: str, w: DitBlock, x: Tensor, tail: bool) -> None:
        """Attention of a block, into `_mixed`."""
        c, ws, d, half = self.dit, self._ws, self.dit.dim, self._half
        common: dict[str, Any] = {"heads": c.heads, "causal": False, "ws": ws}
        own = self._qkv.slice(0, (half, 3 * d))
        q, k, v = (own.columns(j * d, d) for j in range(3))
        if w.apart is None:
            gemm(x, w.qkv, own, prologue="layer", eps=c.eps, bias=w.qkv_bias, ws=ws, label=f"{label}.qkv")
            norm(q, q, kind="rms", weight=w.norm_q, eps=c.eps, label=f"{label}.norm_q")
            norm(k, k, kind="rms", weight=w.norm_k, eps=c.eps, label=f"{label}.norm_k")
            attention(q, k, v, self._kv, self._zero, self._mixed, rope=self._rope, label=f"{label}.attention", **common)
            return
        first = half if tail else 0
        rows = self._qkv.slice(first * 3 * d, (2 * half - first, 3 * d)).columns(0, d)
        asked = x.slice(first * d, (2 * half - first, d))
        matrix, bias = w.apart
        gemm(asked, matrix, rows, prologue="layer", eps=c.eps, bias=bias, ws=ws, label=f"{label}.q")
        gemm(x.slice(0, (half, d)), w.qkv, own.columns(d, 2 * d), prologue="layer", eps=c.eps, bias=w.qkv_bias, ws=ws,
             label=f"{label}.kv")  # fmt: skip
        norm(rows, rows, kind="rms", weight=w.norm_q, eps=c.eps, label=f"{label}.norm_q")
        norm(k, k, kind="rms", weight=w.norm_k, eps=c.eps, label=f"{label}.norm_k")
        mixed = self._mixed.slice(0, (half, d))
        attention(None if tail else q, k, v, self._kv, self._zero, None if tail else mixed, rope=self._rope,
                  label=f"{label}.attention", **common)  # fmt: skip
        padded = self._qkv.slice(half * 3 * d, (half, 3 * d)).columns(0, d)
        attention(padded, None, None, self._kv, self._seen, self._mixed.slice(half * d, (half, d)),
                  label=f"{label}.padded", **common)  # fmt: skip

    def _close(self, label: str, w: DitBlock, hidden: Tensor, stream: Tensor) -> None:
        gemm(hidden, w.fc2, stream, bias=w.fc2_bias, residual=stream, ws=self._ws, label=f"{label}.fc2")

    def _tap(self, label: str, w: DitBlock, hidden: Tensor, stream: Tensor, out: Tensor) -> None:
        """The last product of the tapped block, behind the means: they commute."""
        if self._pool is not None:
            few = self._mixed.slice(0, self.out.shape)
            gather_sum(stream, self._pool, few, label=f"{label}.pool")
            gather_sum(hidden, self._pool, self._pooled, label=f"{label}.pool_hidden")
            hidden, stream = self._pooled, few
        gemm(hidden, w.fc2, out, bias=w.fc2_bias, residual=stream, ws=self._ws, label=f"{label}.fc2")
