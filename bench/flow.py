"""π0.5 and X-VLA at full size, random weights, against lerobot eager: one denoising step, and the first action.

Both sides are bf16 and hold the whole model; turns are interleaved, ratios are medians of pairs. lerobot hands out a
chunk when all of its steps are done: its time to the first action is that of the chunk. Outputs are not compared here
(weights differ): tests hold the engine to lerobot on random checkpoints.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile

from bench.report import Report
from bench.roofs import Bandwidth, arithmetic
from bench.sources import RandomSource
from bench.timing import PARK
from bench.worker import Worker
from engine.blocks.observation import ModelInput
from engine.blocks.policy import FlowPolicy
from engine.models.pi05 import weights as pi05_weights
from engine.models.pi05.config import Pi05Config
from engine.models.pi05.model import Pi05
from engine.models.xvla import weights as xvla_weights
from engine.models.xvla.config import XVLAConfig
from engine.models.xvla.model import XVLA
from engine.runtime import device

ROOT = Path(__file__).resolve().parent.parent
STEPS, TEXT = 10, 48
# GFLOP of each part at full size, multiply-add = 2 (views, prefix, one step) as ours and as lerobot computes them.
ARITHMETIC = {
    "pi05": {
        "ours": lambda n: (
            220.2 * n + 3.7456 * _prefix(n) + 1.393e-4 * _prefix(n) ** 2 + 31.14 + 7.37e-3 * (_prefix(n) + 50)
        ),
        "theirs": lambda n: 660.5 + 1.058 * 3756 + STEPS * (38.7 + 11.65),
    },
    "xvla": {
        "ours": lambda n: 129.1 * n + 35.1 + 167.2,
        "theirs": lambda n: 162.3 * n + 35.1 + STEPS * 174.2,
    },
}


def _prefix(views: int) -> int:
    return 256 * views + TEXT


# Configuration, output, alpha and limit of the golden checkpoints (tests/data/faster).
GOLDEN: dict[str, tuple[dict[str, Any], str, float, float]] = {
    "pi05": ({"chunk_size": 50, "vision_num_heads": 2, "num_attention_heads": 8}, "out_has", 0.6, 5e-5),
    "xvla": ({"chunk_size": 30, "num_heads": 4, "tokenizer_max_length": 64, "max_state_dim": 20, "num_image_views": 3,
              "florence_config": {"text_config": {"encoder_attention_heads": 2}, "vision_config": {
                  "num_heads": [1, 2, 4, 8], "num_groups": [1, 2, 4, 8]}}}, "out_has_a07", 0.7, 1e-6),
}  # fmt: skip
FAMILY: dict[str, type[FlowPolicy]] = {"pi05": Pi05, "xvla": XVLA}


def gate(kind: str, quant: str | None) -> tuple[float, float]:
    """(largest error of golden actions in fp32, cosine of the timed format with them); no speed without them."""
    stated, name, alpha, limit = GOLDEN[kind]
    data = ROOT / "tests/data/faster"
    raw: dict[str, Any] = {"type": kind, "normalization_mapping": {"STATE": "IDENTITY", "ACTION": "IDENTITY"}} | stated
    arrays = NpzFile((data / f"{kind}_tiny_io.npz").open("rb"), own_fid=True, allow_pickle=False)
    with arrays as file, tempfile.TemporaryDirectory() as folder:
        io = {k: file[k] for k in file.files}
        (Path(folder) / "config.json").write_text(json.dumps(raw))
        shutil.copy(data / f"{kind}_tiny.safetensors", Path(folder) / "model.safetensors")
        images = io["images"].astype(np.float32)
        images = images if kind == "pi05" else images.transpose(0, 2, 3, 1)
        images, mask = np.concatenate([images, images[:1]]), np.array([True, True, False])
        tokens = io["tokens"][0][io["token_mask"][0]] if kind == "pi05" else io["tokens"][0]
        found = []
        for dtype, q in (("fp32", None), ("bf16", quant)):
            model = FAMILY[kind].load(Path(folder), dtype=dtype, quant=q, alpha=alpha, u0=0.9, progress=False)
            space = model.profile_of_inputs.action
            proprio = np.zeros(0, np.float32) if kind == "pi05" else space.mask(io["state"][0])
            given = ModelInput(images, mask, tokens.astype(np.int32), np.zeros(64), proprio, 0,
                               np.zeros((0, space.model_dim), np.float32), int(io.get("domain_id", 0)))  # fmt: skip
            list(model._stream(given, io["noise"][0], model.horizon, None, model.schedule))
            found.append(space.finish(model.flow.x.read()[0]))
    want = io[name][0]
    error = float(np.abs(found[0] - want).max())
    cosine = float((found[1] * want).sum() / np.linalg.norm(found[1]) / np.linalg.norm(want))
    if error > limit or cosine < 0.999:
        raise SystemExit(f"RED, no speed: golden error {error:.1e} (limit {limit:.0e}), cosine {cosine:.5f} (0.999)")
    return error, cosine


class Peer(Worker):
    """lerobot in its own process."""

    def __init__(self, kind: str) -> None:
        python = Path(os.environ.get("QUINTET_PEER_LEROBOT", ROOT / ".venvs/lerobot/bin/python"))
        super().__init__(python, "lerobot_worker.py", kind, device.threads(), STEPS)


class Ours:
    """The engine at full size."""

    def __init__(self, kind: str, quant: str | None = None) -> None:
        t0 = time.perf_counter()
        none = {"STATE": "IDENTITY", "ACTION": "IDENTITY"}
        self.model: FlowPolicy
        if kind == "pi05":
            c = Pi05Config.from_json({"type": "pi05", "normalization_mapping": none})
            source = RandomSource(pi05_weights.shapes(c), norm=0.0)
            options = Pi05.options_of(c, dtype="bf16", quant=quant, alpha=0.6, u0=0.9, max_delay=10, progress=False)
            self.model, self.size, self.tokens = Pi05(c, source, options), (c.vision.image_size,) * 2, TEXT
        else:
            x = XVLAConfig.from_json({"type": "xvla", "chunk_size": 30, "max_state_dim": 20, "num_image_views": 3,
                                      "florence_config": {}})  # fmt: skip
            options = XVLA.options_of(x, dtype="bf16", quant=quant, alpha=0.7, u0=0.9, progress=False)
            self.model = XVLA(x, RandomSource(xvla_weights.shapes(x)), options)
            self.size, self.tokens = x.vision.image_size, x.tokenizer_max_length
        self.load_s = time.perf_counter() - t0
        self.rng = np.random.default_rng(0)

    def request(self, views: int) -> ModelInput:
        profile = self.model.profile_of_inputs
        n = len(profile.views)
        images = self.rng.uniform(-1, 1, (n, *self.size, 3)).astype(np.float32)
        return ModelInput(images, np.arange(n) < views, self.rng.integers(3, 1000, self.tokens).astype(np.int32),
                          np.zeros(64), np.zeros(profile.proprio_dim, np.float32), 0,
                          np.zeros((0, profile.action.model_dim), np.float32), 0)  # fmt: skip

    def ask(self, given: ModelInput) -> Mapping[str, float]:
        """Milliseconds of a request with all its actions."""
        schedule = self.model.schedule
        noise = self.rng.standard_normal(self.model.flow.sizes[2:]).astype(np.float32)
        packets = list(self.model._stream(given, noise, schedule.horizon, None, schedule))
        assert packets[-1].chunk is not None
        return packets[-1].chunk.timing

    def steps(self, count: int) -> float:
        """Seconds per step on the last prefix."""
        plan = self.model.plans["step"]
        self.model.flow.step.write(np.zeros(1, np.int32))
        plan.replay()
        t0 = time.perf_counter()
        for _ in range(count):
            plan.replay()
        return (time.perf_counter() - t0) / count


def main(kinds: list[str], rounds: int, quant: str | None) -> None:
    """Each model in a process of its own, so that peak memory is its own."""
    if len(kinds) > 1:
        for kind in kinds:
            more = ["--quant", quant] if quant else []
            command = [sys.executable, "-m", "bench.run", "flow", kind, "--rounds", str(rounds), *more]
            subprocess.run(command, check=True, cwd=ROOT)
        return
    report, bandwidth = Report("-".join(["flow", *kinds, *([quant] if quant else [])])), Bandwidth()
    peaks = arithmetic()
    print(f"bandwidth {bandwidth.measure():.1f} GB/s; peaks " + ", ".join(f"{k} {v:.0f}" for k, v in peaks.items()))
    bandwidth.release()
    for kind in kinds:
        error, cosine = gate(kind, quant)
        report.data |= {"golden_error_fp32": error, "cosine": cosine}
        print(f"{kind}: golden actions within {error:.1e} in fp32, cosine {cosine:.6f} as timed", flush=True)
        ours = Ours(kind, quant)
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        ours.ask(ours.request(3))
        rss_acted = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"{kind}: loaded in {ours.load_s:.0f} s, {rss:.2f} GB, {rss_acted:.2f} GB after acting", flush=True)
        report.add(model=kind, what="load", quant=quant, seconds=ours.load_s, peak_rss_gb=rss_acted)
        peer = Peer(kind)
        for _ in range(2):
            peer.ask(do="step")
        pairs = []
        for _ in range(max(rounds, 5)):
            time.sleep(PARK)
            theirs = peer.ask(do="step")
            time.sleep(PARK)
            pairs.append((theirs, ours.steps(4)))
        t, o = np.array(pairs).T
        won = float(np.median(t / o))
        print(
            f"  step      lerobot {np.median(t) * 1e3:8.1f} ms, ours {np.median(o) * 1e3:8.1f} ms: x{won:.2f}",
            flush=True,
        )
        report.add(model=kind, what="step", quant=quant, ms=float(np.median(o) * 1e3),
                   lerobot_ms=float(np.median(t) * 1e3), ratio=won, rounds=len(pairs))  # fmt: skip
        for views in (3, 2):
            rows = []
            for _ in range(rounds):
                time.sleep(PARK)
                theirs = peer.ask(do="chunk", views=views) * 1e3
                time.sleep(PARK)
                given = ours.request(views)
                rows.append((theirs, (ours.ask(given), ours.ask(given))))
            base = np.array([r[0] for r in rows])
            new, same = ({k: np.array([r[1][i][k] for r in rows]) for k in ("first_ms", "last_ms")} for i in (0, 1))
            flops = ARITHMETIC[kind]
            arithmetic_ratio = flops["theirs"](views) / flops["ours"](views)
            first, chunk, again = (float(np.median(base / v)) for v in (
                new["first_ms"], new["last_ms"], same["first_ms"]))  # fmt: skip
            print(
                f"  {views} views   lerobot chunk {np.median(base):8.0f} ms; ours: first action "
                f"{np.median(new['first_ms']):7.0f} ms x{first:.2f} (arithmetic x{arithmetic_ratio:.2f}), chunk "
                f"{np.median(new['last_ms']):7.0f} ms x{chunk:.2f}, first with unchanged cameras "
                f"{np.median(same['first_ms']):7.0f} ms x{again:.2f}", flush=True,
            )  # fmt: skip
            report.add(model=kind, what=f"{views} views", quant=quant, lerobot_chunk_ms=float(np.median(base)),
                       first_ms=float(np.median(new["first_ms"])), chunk_ms=float(np.median(new["last_ms"])),
                       unchanged_first_ms=float(np.median(same["first_ms"])), ratio_first=first, ratio_chunk=chunk,
                       ratio_unchanged=again, ratio_of_arithmetic=arithmetic_ratio, rounds=rounds)  # fmt: skip
        peer.close()
        del ours
        bandwidth.measure()
        bandwidth.release()
    report.data |= {"peaks_gop_s": peaks, "bandwidth_gb_s": bandwidth.gb_per_s}
    print("written:", report.save())
