"""3DreamBooth: a step of guidance on a slice at real width against the published structure in plain torch and against
diffusers, and its attention against torch's; a tile of the VAE against diffusers', a training step against peft.

The slice: hidden 2048, 4 blocks, 5 latent frames of 30 x 53 cells, two references, bf16, random weights. Savings of one
block out of 54 (`dit.Savings`) are switched off, since four blocks would flatter them; a training step leaves the last
block's dead work out, as every step of a run does. Turns are interleaved, ratios are medians of pairs, and the eager
side counts only where its own attention and products run well.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.report import Report
from bench.sources import RandomSource
from bench.timing import PARK
from bench.worker import Worker
from engine.blocks.weights import Recipe
from engine.models.dreambooth3d.config import DitConfig, VaeConfig
from engine.models.dreambooth3d.dit import Denoiser, Savings, Shape
from engine.models.dreambooth3d.dit_weights import DitLoader, Subject, TimeTables
from engine.models.dreambooth3d.personalize import Personalizer, Photos, Settings
from engine.models.dreambooth3d.sampler import Sampler
from engine.models.dreambooth3d.vae import Vae
from engine.models.dreambooth3d.vae_weights import VaeLoader
from engine.models.dreambooth3d.weights import KINDS, adapter_shapes, dit_shapes, vae_shapes
from engine.ops.attention import KVCache, attention, workspace_bytes
from engine.runtime import device
from engine.runtime.arena import Arena
from engine.runtime.plan import Plan, capture

ROOT = Path(__file__).resolve().parent.parent
LAYERS, RANK, VALID = 4, 16, (40, 60)  # tokens of the negative and the positive prompt
SHAPE, BARE = Shape(5, 30, 53, 2), Shape(5, 30, 53, 0)
BAR_STEP, BAR_ATTENTION, BAR_BARE, BAR_PERSONALISATION, BAR_TILE = 2.0, 1.8, 2.0, 1.3, 1.15
TILE = (5, 16, 16)  # latent frames, rows and columns
LEAST_SDPA, LEAST_LINEAR = 130, 350  # GFLOP/s of the eager side
SIGMAS = np.array([0.8, 0.7])


def flops(s: Shape, layers: int) -> float:
    """Of both branches: products of blocks and attention, multiply-add = 2."""
    total = 0.0
    for n in VALID:
        tokens = s.image + n
        total += layers * (tokens * 2 * 12 * 2048**2 + 4 * tokens**2 * 2048)
    return total


def loaded(quant: str | None) -> tuple[Sampler, dict[str, Plan]]:
    """The slice with both adapters merged."""
    c, arena, plans = DitConfig(layers=LAYERS), Arena(), dict[str, Plan]()
    source = RandomSource(dit_shapes(c))
    loader = DitLoader(c, source, arena, Recipe("bf16", quant))
    weights = loader.load()
    denoiser = Denoiser(arena, c, weights, image=SHAPE.image, references=2 * SHAPE.cells, text=64, steps=1,
                        kv_format="bf16", savings=Savings(shared=False, dead=False))  # fmt: skip
    subject, views = (RandomSource(adapter_shapes(c, RANK, KINDS[kind])) for kind in ("subject", "views"))
    for _ in loader.adapt(Subject(subject, views)):
        pass
    return Sampler(denoiser, TimeTables(c, source), plans), plans


class Ours:
    def __init__(self, quant: str | None) -> None:
        rng = np.random.default_rng(0)
        self.sampler, self.plans = loaded(quant)
        states = (rng.standard_normal((n, 3584)).astype(np.float32) for n in VALID)
        self.texts = [self.sampler.tokens(SIGMAS, s) for s in states]
        self.noise = rng.standard_normal((SHAPE.video, 32)).astype(np.float32)
        self.sampler.place_views(rng.standard_normal((2, SHAPE.cells, 32)).astype(np.float32))

    def step(self, s: Shape) -> float:
        """Seconds of a step of guidance: a request of one step, whose schedule and texts are there."""
        t0 = time.perf_counter()
        self.sampler.sample(s, self.noise[: s.video], SIGMAS, 6.0, self.texts)
        return time.perf_counter() - t0


def attend(tokens: int) -> Plan:
    """Joint attention alone, keys and values packed on the way."""
    arena, heads, d = Arena(), 16, 128
    ctx = -(-tokens // 16) * 16
    rng = np.random.default_rng(0)
    q, k, v, out = (arena.alloc(n, (tokens, heads * d)) for n in ("q", "k", "v", "out"))
    for t in (q, k, v):
        t.write(rng.standard_normal(t.shape, np.float32))
    cache = KVCache.empty(arena, "kv", heads, d, ctx, "bf16")
    pos, ws = arena.alloc("pos", (1,), "i32"), arena.alloc("ws", (workspace_bytes(tokens, heads, d, ctx),), "u8")
    pos.write(np.zeros(1, np.int32))
    return capture(lambda: attention(q, k, v, cache, pos, out, heads=heads, causal=False, ws=ws), "attention")


def timed(call: Any) -> float:
    t0 = time.perf_counter()
    call()
    took = time.perf_counter() - t0
    time.sleep(PARK)
    return took


def pairs(ours: Any, theirs: Any, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of both sides, turn by turn."""
    taken = []
    for _ in range(rounds):
        a = ours()
        time.sleep(PARK)
        b = theirs()
        time.sleep(PARK)
        taken.append((a, b))
    a, b = np.array(taken).T
    return a, b


def eager(report: Report, quant: str | None, rounds: int) -> None:
    """Attention alone, then the step, against the published structure."""
    peer = Worker(ROOT / ".venv/bin/python", "hunyuan_eager.py", device.threads(), LAYERS, SHAPE.frames, SHAPE.rows,
                  SHAPE.columns, SHAPE.views, RANK)  # fmt: skip
    try:
        tokens = SHAPE.image + VALID[1]
        work, product = 4 * tokens**2 * 2048 / 1e9, 2 * SHAPE.image * 2048 * 8192 / 1e9
        if quant is None:
            plan = attend(tokens)
            plan.replay()
            a, b = pairs(lambda: timed(plan.replay), lambda: peer.ask(do="sdpa"), max(rounds, 5))
            faster = float(np.median(b / a))
            print(f"attention of {tokens} tokens: ours {np.median(a):.2f} s ({work / np.median(a):.0f} GFLOP/s), torch "
                  f"{np.median(b):.2f} s ({work / np.median(b):.0f}): x{faster:.2f}, bar {BAR_ATTENTION}")  # fmt: skip
            report.add(what="attention", tokens=tokens, seconds=float(np.median(a)), gflop_s=work / float(np.median(a)),
                       torch_s=float(np.median(b)), torch_gflop_s=work / float(np.median(b)), ratio=faster,
                       bar=BAR_ATTENTION, rounds=len(a))  # fmt: skip
        ours = Ours(quant)
        for s in (SHAPE, BARE):
            ours.step(s)
        sdpa, linear = work / peer.ask(do="sdpa"), product / peer.ask(do="linear")
        a, b = pairs(lambda: ours.step(SHAPE), lambda: peer.ask(do="step"), rounds)
        sdpa, linear = max(sdpa, work / peer.ask(do="sdpa")), max(linear, product / peer.ask(do="linear"))
    finally:
        peer.close()
    faster, kind, tera = float(np.median(b / a)), quant or "bf16", flops(SHAPE, LAYERS) / 1e12
    counts = sdpa >= LEAST_SDPA and linear >= LEAST_LINEAR
    print(f"step of {LAYERS} blocks, {SHAPE.image} tokens and two texts, {kind}: ours {np.median(a):.1f} s "
          f"({tera / np.median(a) * 1e3:.0f} GFLOP/s), published structure {np.median(b):.1f} s: x{faster:.2f}, bar "
          f"{BAR_STEP}; its attention {sdpa:.0f} and products {linear:.0f} GFLOP/s: "
          f"{'counts' if counts else 'does not count'}")  # fmt: skip
    report.add(what="step", kind=kind, layers=LAYERS, tokens=SHAPE.image, seconds=float(np.median(a)),
               gflop_s=tera * 1e3 / float(np.median(a)), eager_s=float(np.median(b)), ratio=faster, bar=BAR_STEP,
               eager_sdpa_gflop_s=sdpa, eager_linear_gflop_s=linear, counts=counts, rounds=rounds)  # fmt: skip
    bare(report, ours, kind, rounds)


def bare(report: Report, ours: Ours, kind: str, rounds: int) -> None:
    """The slice without references against diffusers."""
    peer = Worker(ROOT / ".venvs/diffusers/bin/python", "hunyuan_diffusers.py", device.threads(), LAYERS, BARE.frames,
                  BARE.rows, BARE.columns)  # fmt: skip
    try:
        peer.ask(do="transform")
        a, b = pairs(lambda: ours.step(BARE), lambda: peer.ask(do="transform"), rounds)
    finally:
        peer.close()
    faster = float(np.median(b / a))
    print(f"without references, {kind}: ours {np.median(a):.1f} s, diffusers {np.median(b):.1f} s: x{faster:.2f}, bar "
          f"{BAR_BARE}")  # fmt: skip
    report.add(what="step without references", kind=kind, layers=LAYERS, tokens=BARE.image, seconds=float(np.median(a)),
               diffusers_s=float(np.median(b)), ratio=faster, bar=BAR_BARE, rounds=rounds)  # fmt: skip


def personalisation(report: Report, rounds: int) -> None:
    """A training step on a photo of 512 pixels beside two references, against the published loop with peft."""
    c, rng, side, tokens = DitConfig(layers=LAYERS), np.random.default_rng(0), 32, 15
    shape = (3, c.channels, side, side)
    photos = Photos(rng.standard_normal(shape, np.float32), np.abs(rng.standard_normal(shape, np.float32)),
                    rng.standard_normal((SHAPE.views, *shape[1:]), np.float32),
                    rng.standard_normal((tokens, c.text_dim), np.float32))  # fmt: skip
    adapter = RandomSource(adapter_shapes(c, RANK, KINDS["views"]))
    ours = Personalizer(c, RandomSource(dit_shapes(c)), photos, Settings(rank=RANK), adapter)
    torch.set_num_threads(device.threads())
    peer = Worker(ROOT / ".venvs/diffusers/bin/python", "hunyuan_peft.py", device.threads(), LAYERS, SHAPE.views)
    try:
        ours.step()
        peer.ask(do="step")
        a, b = pairs(lambda: timed(ours.step), lambda: peer.ask(do="step"), max(rounds, 5))
    finally:
        peer.close()
    faster = float(np.median(b / a))
    print(f"a step of personalisation, {LAYERS} blocks: ours {np.median(a):.2f} s, peft {np.median(b):.2f} s: "
          f"x{faster:.2f}, bar {BAR_PERSONALISATION}")  # fmt: skip
    report.add(what="personalisation", kind="bf16", layers=LAYERS, seconds=float(np.median(a)),
               peft_s=float(np.median(b)), ratio=faster, bar=BAR_PERSONALISATION, rounds=len(a))  # fmt: skip


def decoding(report: Report, rounds: int) -> None:
    """A tile of the VAE's decoder at full size against diffusers'."""
    c, arena, (frames, rows, columns) = VaeConfig(), Arena(), TILE
    loader = VaeLoader(c, RandomSource(vae_shapes(c)), arena, Recipe("bf16", None))
    vae = Vae(arena, c, loader.encoder(), loader.decoder(), frames=frames, rows=rows, columns=columns, kv_format="bf16")
    vae.place_tile(rows, columns)
    vae.latent.write(np.random.default_rng(0).standard_normal(vae.latent.shape, np.float32))
    plan = capture(vae.decode(frames, rows, columns), "decode")
    peer = Worker(ROOT / ".venvs/diffusers/bin/python", "hunyuan_vae.py", device.threads(), *TILE)
    try:
        plan.replay()
        peer.ask(do="decode")
        a, b = pairs(lambda: timed(plan.replay), lambda: peer.ask(do="decode"), rounds)
    finally:
        peer.close()
    faster = float(np.median(b / a))
    print(f"VAE, a tile of {frames} latent frames of {rows} x {columns}, decoded in bf16: ours {np.median(a):.1f} s, "
          f"diffusers {np.median(b):.1f} s: x{faster:.2f}, bar {BAR_TILE}")  # fmt: skip
    report.add(what="vae tile", kind="bf16", tile=list(TILE), seconds=float(np.median(a)),
               diffusers_s=float(np.median(b)), ratio=faster, bar=BAR_TILE, rounds=len(a))  # fmt: skip


def main(kinds: list[str], rounds: int) -> None:
    report = Report("dreambooth3d")
    decoding(report, rounds)
    personalisation(report, rounds)
    for kind in kinds:
        eager(report, None if kind == "bf16" else kind, rounds)
    print("written:", report.save())
