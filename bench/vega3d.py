"""VEGA-3D: features of a frame at full size against diffusers, the gated fusion against the eager chain, and what a
second question about a scene costs.

Both sides are bf16 with random weights and the same threads; turns are interleaved, ratios are medians of pairs. The
opponent runs the VAE's encoder and the whole transformer, as the published code does to tap one block. Weights differ,
so outputs are not compared: tests hold the engine to diffusers on random checkpoints, and here bf16 is held to fp32 at
the full widths.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from bench.report import Report
from bench.roofs import Bandwidth
from bench.sources import RandomSource
from bench.timing import PARK, interleave, ratio
from bench.worker import Worker
from engine.io.text import Tokenizer
from engine.models.vega3d.config import VegaConfig
from engine.models.vega3d.features import Files, GeneratorFeatures
from engine.models.vega3d.generator_config import DitConfig, VaeConfig
from engine.models.vega3d.generator_weights import dit_shapes, vae_shapes
from engine.models.vega3d.model import Options, Vega3D
from engine.models.vega3d.weights import shapes
from engine.ops.registry import error, ops
from engine.runtime import device

ROOT = Path(__file__).resolve().parent.parent
SIZE, BLOCK = (832, 480), 20
LAYERS = 2  # of SigLIP and of the language model, where a scene is timed
BAR, BAR_FUSION, BAR_BANDWIDTH = 2.0, 4.0, 0.7
# TFLOP of a frame by count, multiply-add = 2: the encoder as a 2-D network and blocks 0 to 20, and all of both.
OURS, THEIRS = 0.99 + 2.89, 2.72 + 4.50
RMS_LIMIT, COSINE = 2e-2, 0.9995


def loaded(dtype: str, quant: str | None = None, **options: Any) -> GeneratorFeatures:
    """The 1.3B generator with random weights."""
    dit, vae = DitConfig(), VaeConfig()
    prompt = np.random.default_rng(3).standard_normal((1, dit.text_dim)).astype(np.float32)
    files = Files(dit, vae, RandomSource(dit_shapes(dit)), RandomSource(vae_shapes(vae)), prompt)
    given: dict[str, Any] = {"size": SIZE, "block": BLOCK, "max_pixels": SIZE[0] * SIZE[1]} | options
    return GeneratorFeatures.load(Path("wan-1.3b"), source=files, device="cpu", dtype=dtype, quant=quant,
                                  progress=False, **given)  # fmt: skip


def gate(kind: str) -> tuple[float, float]:
    """(relative root mean square, least cosine of a cell) of a format against fp32: full widths, three blocks, a small
    frame."""
    frame = np.random.default_rng(0).integers(0, 256, (1, 120, 160, 3), dtype=np.uint8)
    small: dict[str, Any] = {"size": (208, 160), "block": 2, "grid": (5, 6)}
    with loaded("fp32", **small) as m:
        want = m.features(frame)[0]
    with loaded("bf16", "int8" if kind == "int8" else None, **small) as m:
        got = m.features(frame)[0]
    cosines = (got * want).sum(-1) / np.linalg.norm(got, axis=-1) / np.linalg.norm(want, axis=-1)
    return error(got, want), float(cosines.min())


def tower(report: Report, kind: str, rounds: int) -> None:
    rms, cosine = gate(kind)
    limits = f"limits {RMS_LIMIT:.0e} and {COSINE}"
    print(f"{kind}: full width, 3 blocks, against fp32: rms {rms:.1e}, least cosine {cosine:.5f} ({limits})")
    if not (rms <= RMS_LIMIT and cosine >= COSINE):
        raise SystemExit(f"{kind} is outside its limits: no speed without its quality")
    start = time.perf_counter()
    frame = np.random.default_rng(1).integers(0, 256, (1, 480, 832, 3), dtype=np.uint8)
    with loaded("bf16", "int8" if kind == "int8" else None) as m:
        seconds = time.perf_counter() - start
        m.features(frame)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"  loaded in {seconds:.1f} s, peak {peak:.2f} GB, weights {m.memory().parts['weights'] / 1e9:.2f} GB")
        peer = Worker(ROOT / ".venvs/diffusers/bin/python", "wan_diffusers.py", device.threads(), "bfloat16", *SIZE)
        try:
            for verb in ("encode", "transform"):
                peer.ask(do=verb)
            ours, theirs, parts = [], [], []
            for _ in range(rounds):
                t0 = time.perf_counter()
                m.features(frame)
                ours.append(time.perf_counter() - t0)
                time.sleep(PARK)
                parts.append([peer.ask(do="encode"), peer.ask(do="transform")])
                theirs.append(sum(parts[-1]))
                time.sleep(PARK)
        finally:
            peer.close()
        nodes = {plan: sum(us for _, us in m.plans[plan].profile(1)) / 1e6 for plan in ("frame.0", "features")}
    pair = float(np.median(np.array(theirs) / np.array(ours)))
    encode, transform = np.median(np.array(parts), 0)
    tflops = OURS / float(np.median(ours))
    print(f"  one frame {SIZE[0]} x {SIZE[1]} to block {BLOCK}: ours {np.median(ours):.2f} s "
          f"(VAE {nodes['frame.0']:.2f}, transformer {nodes['features']:.2f}; {tflops:.2f} TFLOP/s), "
          f"diffusers {np.median(theirs):.2f} s (VAE {encode:.2f}, transformer {transform:.2f}): x{pair:.2f}, "
          f"bar {BAR}, of which arithmetic x{THEIRS / OURS:.2f}")  # fmt: skip
    report.add(what="features", kind=kind, rms=rms, cosine=cosine, rms_limit=RMS_LIMIT, cosine_limit=COSINE,
               load_seconds=seconds, peak_rss_gb=peak, seconds=float(np.median(ours)), vae_s=nodes["frame.0"],
               transformer_s=nodes["features"], diffusers_s=float(np.median(theirs)), diffusers_vae_s=float(encode),
               diffusers_transformer_s=float(transform), ratio=pair, bar=BAR, ratio_of_arithmetic=THEIRS / OURS,
               tflop_s=tflops, rounds=rounds)  # fmt: skip


def fusion(report: Report) -> None:
    """`gated_fuse` with code, newlines and the next norm, bf16 to bf16, against the eager chain."""
    op = ops()["fuse"]
    case = next(c for c in op.cases if c.kind == "real" and c.dims.get("next"))
    arrays = op.inputs(case, np.random.default_rng(7))
    got, want = op.run(case, arrays), op.reference(case, arrays)
    worst = max(error(got[k], want[k]) for k in want)
    assert op.torch_eager is not None and op.prepare is not None
    bandwidth = Bandwidth()
    read = bandwidth.measure()
    times = interleave({"ours": op.prepare(case, arrays), "eager": op.torch_eager(case, arrays)})
    read = (read + bandwidth.measure()) / 2
    moved = op.bytes(case) / times["ours"].median / 1e9
    faster = ratio(times["eager"], times["ours"])
    ours, eager = (times[k].median * 1e3 for k in ("ours", "eager"))
    print(f"gated_fuse [{case.m}, {case.d}]: {ours:.2f} ms, eager {eager:.0f} ms x{faster:.1f} (bar {BAR_FUSION}); "
          f"{moved:.1f} of {read:.1f} GB/s read = {moved / read:.0%} (bar {BAR_BANDWIDTH:.0%}); "
          f"error {worst:.1e}")  # fmt: skip
    report.add(what="gated_fuse", rows=case.m, width=case.d, ms=ours, ratio=faster, bar=BAR_FUSION, gb_s=moved,
               read_gb_s=read, share=moved / read, bar_share=BAR_BANDWIDTH, error=worst)  # fmt: skip


def tokenizer() -> Tokenizer:
    """Bytes and the chat's special tokens: the words of random weights do not matter."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    return Tokenizer(inner)


def questions(report: Report, kind: str) -> None:
    """A scene of 32 frames at full width, two layers of each tower: the first question, a second, and the second with
    nothing kept."""
    config = {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944,
              "num_hidden_layers": LAYERS, "vocab_size": 8192, "rope_theta": 1e6,
              "vision_config": {"num_hidden_layers": LAYERS}}  # fmt: skip
    c = VegaConfig.from_json(config)
    quant = "int8" if kind == "int8" else None
    rng = np.random.default_rng(5)
    frames = rng.integers(0, 256, (32, 120, 160, 3), dtype=np.uint8)
    features = rng.standard_normal((32, c.cells, c.generative)).astype(np.float32)
    with Vega3D(c, RandomSource(shapes(c)), Options.of(c, dtype="bf16", quant=quant), tokenizer=tokenizer(),
                progress=False) as m:  # fmt: skip
        m.warmup()
        t0 = time.perf_counter()
        scene = m.scene(frames, features=features)
        looked = time.perf_counter() - t0

        def ask(text: str) -> tuple[float, int, np.ndarray]:
            t0 = time.perf_counter()
            answer = scene.ask(text, max_new_tokens=1)
            return time.perf_counter() - t0, answer.prompt_tokens - answer.reused_tokens, m.io.logits.read()[0]

        first, _, _ = ask("How many chairs stand at the table?")
        warm, new, want = ask("What is left of the door?")
        m._cache.clear()
        cold, all_of, got = ask("What is left of the door?")
    worst, same = error(want, got), bool(want.argmax() == got.argmax())
    total = looked + first
    print(f"scene of 32 frames, full width, {LAYERS} layers, {kind}: looked at in {looked:.1f} s, first question "
          f"{first * 1e3:.0f} ms; second {warm * 1e3:.0f} ms for {new} of {all_of} tokens, cold {cold:.1f} s: "
          f"x{cold / warm:.0f}; logits within {worst:.1e} of the cold ones, same top: {same}")  # fmt: skip
    if not (worst <= 2e-2 and same):
        raise SystemExit("a warm question differs from a cold one")
    report.add(what="questions", kind=kind, layers=LAYERS, look_s=looked, first_s=first, first_total_s=total,
               second_s=warm, cold_s=cold, tokens=new, prompt=all_of, error=worst, same_top=same)  # fmt: skip


def main(kinds: list[str], rounds: int) -> None:
    report = Report("vega3d")
    fusion(report)
    for kind in kinds:
        questions(report, kind)
        tower(report, kind, rounds)
    print("written:", report.save())
