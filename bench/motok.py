"""MoTok at full size, random weights: a guided request, the denoising loop and guidance against plain torch.

Turns are interleaved, ratios are medians of pairs. The opponent (bench/peers/motok_eager.py) runs in a process of its
own, on the same weights, waypoints and draws. Both sides compute the text's feature in every request: ours forgets the
one it keeps. No speed without the golden values, an opponent that makes our motion, and a motion near that of fp32.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bench.motok_case import (
    CASE,
    FRAMES,
    JOINTS,
    PROMPT,
    Golden,
    Words,
    flops,
    normal,
    waypoints,
    write_weights,
)
from bench.report import Report
from bench.roofs import Bandwidth, arithmetic
from bench.timing import PARK
from bench.worker import Worker
from engine.blocks.motion import HUMANML3D_STATISTICS
from engine.io.checkpoint import Source
from engine.io.writer import save
from engine.models.motok.config import MoTokConfig
from engine.models.motok.layout import open_source
from engine.models.motok.model import MoTok, load_options
from engine.models.motok.motion import Motion
from engine.ops.guide import JointTargets, guide, workspace_bytes
from engine.runtime import device
from engine.runtime.arena import Arena

#: dtype, quant, format of the opponent of equal precision.
KINDS = {"fp32": ("fp32", None, "fp32"), "bf16": ("bf16", None, "bf16"), "int8": ("bf16", "int8", "bf16")}
#: Bars: a guided request against equal precision, against the fp32 opponent; the loop; its rate against matmul.
BARS = {"fp32": (1.5, None, 1.1, 1.0), "bf16": (1.7, 3.0, 1.1, 0.8), "int8": (None, 4.0, None, None)}
EVALUATION_BAR, SHARE_BAR = 600.0, 0.01
NEAR = {"fp32": 1e-4, "bf16": 3e-2, "int8": 6e-2}  # rms of a motion after 27 steps; int8 is not in the specification
#: What the opponent must reach to count: ms of a denoise (a tenth more is "about"), of an evaluation.
IDLE, ABOUT, EVALUATION_MS = {"fp32": 96.0, "bf16": 52.0}, 1.1, 1.4
SEED, SEEDS = 1, 3


class Peer(Worker):
    """Plain torch, in the environment of this process."""

    def __init__(self, dtype: str, folder: Path) -> None:
        super().__init__(Path(sys.executable), "motok_eager.py", device.threads(), dtype, folder)
        self.dtype = dtype


def model_of(c: MoTokConfig, source: Source, dtype: str, quant: str | None = None) -> MoTok:
    return MoTok(c, load_options("full", source, dtype=dtype, quant=quant), source, Words())  # type: ignore[arg-type]


def gate() -> float:
    """Error of the golden motion (specification 15.3) in fp32; SystemExit where it is too large, or a token differs."""
    c = MoTokConfig.humanml3d()
    m, size = model_of(c, Golden(c), "fp32"), (64, c.features)
    want = [831, 358, 445, 673, 110, 602, 684, 471, 810, 110, 282, 58, 943, 588, 781, 252]
    found = m.encode(m.statistics.denormalize(normal("input.x", *size)))
    if found.tolist() != want:
        raise SystemExit(f"RED, no speed: golden tokens are {found.tolist()}, not {want}")
    m.decode(np.array(want), noise=normal("input.noise", *size).astype(np.float32))
    x = m._denoiser.b.x.slice(0, size).read().astype(np.float64).reshape(-1)
    first, last = [-0.1585649503, -1.2277739, -0.9771427276, 1.571429097], -2.077407963
    total, squares = -920.7307577, 19436.5777
    rms = np.sqrt(squares / x.size)
    error = max(*np.abs(x[:4] - first) / rms, abs(x[-1] - last) / rms, abs(x.sum() - total) / (rms * x.size),
                abs((x**2).sum() / squares - 1))  # fmt: skip
    if error > NEAR["fp32"]:
        raise SystemExit(f"RED, no speed: golden motion differs by {error:.1e} (limit {NEAR['fp32']:.0e})")
    return float(error)


def most_held_gb() -> float:
    """Most memory that this process had so far. ru_maxrss would be no less than that of the process that began it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9


def footprint(kind: str, folder: Path) -> dict[str, float]:
    """Seconds of a load from files in the page cache and peak memory after it and after a request; in a new process."""
    ours = Ours(kind, folder, warm=False)
    loaded = most_held_gb()
    ours.request()
    return {"seconds": ours.load_s, "peak_rss_gb": loaded, "peak_rss_acted_gb": most_held_gb()}


class Ours:
    def __init__(self, kind: str, folder: Path, warm: bool = True) -> None:
        dtype, quant, _ = KINDS[kind]
        t0 = time.perf_counter()
        with open_source(folder) as source:
            self.model = model_of(MoTokConfig.humanml3d(), source, dtype, quant)
        self.load_s = time.perf_counter() - t0
        m = self.model
        self.given = waypoints()
        self.noise = np.random.default_rng(1).standard_normal((FRAMES, m.config.features)).astype(np.float32)
        if not warm:
            return
        self.loop_plan = m.recorded(f"loop_{FRAMES}", lambda: m._denoiser.sample(FRAMES, 0, None))
        for _ in range(2):
            self.request()
            self.loop()

    def make(self, seed: int = SEED) -> Motion:
        made = self.model.generate(PROMPT, frames=FRAMES, constraints=self.given, seed=seed)
        assert isinstance(made, Motion)
        return made

    def request(self) -> tuple[float, Motion]:
        self.model._features.clear()  # the opponent keeps no feature either
        t0 = time.perf_counter()
        made = self.make()
        return time.perf_counter() - t0, made

    def loop(self) -> float:
        m = self.model
        m._denoiser.b.x.slice(0, self.noise.shape).write(self.noise)
        t0 = time.perf_counter()
        self.loop_plan.replay()
        return time.perf_counter() - t0

    def motion(self, tokens: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Normalised features without guidance."""
        self.model.decode(tokens, noise=noise)
        return self.model._denoiser.b.x.slice(0, noise.shape).read()

    def tokens(self) -> np.ndarray:
        """Of a few requests, [SEEDS, N]."""
        return np.stack([self.make(seed).tokens for seed in range(SEEDS)])

    def shares(self) -> dict[str, float]:
        """Milliseconds of a guided decode by kind of node."""
        m = self.model
        plan = m.decode_plan(FRAMES, len(JOINTS), m.config.guidance)
        out: dict[str, float] = {}
        for node, us in plan.profile(3):
            parts = node.label.split(".")
            kind = parts[-1] if parts[0].isdigit() else "outside"
            out[kind] = out.get(kind, 0.0) + us / 1e3
        return out


def write_case(ours: Ours, folder: Path) -> tuple[Motion, np.ndarray]:
    """The draws of the request for the opponent; our answer and the noise that it began with."""
    m, c = ours.model, ours.model.config
    made, n, steps = ours.make(), FRAMES // c.rate, c.ddm.steps
    m.noise_plan(FRAMES).replay()  # seed and offset are still those of the request
    noise = m._denoiser.b.x.slice(0, ours.noise.shape).read().copy()
    uniforms = m.draw(SEED, 0, "tokens", "uniform", steps * n).reshape(steps, n)
    save(folder / CASE, {"uniforms": ("F32", uniforms), "coins": ("F32", m.coins(SEED, 0, steps).astype(np.float32)),
                         "noise": ("F32", noise), "tokens": ("F32", made.tokens.astype(np.float32))})  # fmt: skip
    return made, noise


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """rms of a - b relative to b."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def agree(report: Report, peer: Peer, made: Motion, plain: np.ndarray) -> None:
    """Whether the opponent makes what we make in fp32; SystemExit where the fp32 one does not."""
    answer = peer.tell(do="answer")
    same = float(np.mean(np.array(answer["tokens"]) == made.tokens))
    away = distance(np.array(answer["motion"], np.float32), plain)
    far = float(np.average([r.mean for r in made.residuals], weights=[r.count for r in made.residuals]))
    print(f"opponent {peer.dtype} against our fp32: {same:.0%} of the tokens, motion {away:.1e}; guided: evaluations "
          f"{answer['evals']} (ours {made.evaluations}), waypoints missed by {answer['metres'] * 1e3:.2f} mm "
          f"(ours {far * 1e3:.2f})", flush=True)  # fmt: skip
    report.add(what="agreement", opponent=peer.dtype, tokens=same, rms=away, evals=answer["evals"],
               our_evals=made.evaluations, mm=answer["metres"] * 1e3, our_mm=far * 1e3)  # fmt: skip
    if peer.dtype == "fp32" and away > NEAR["fp32"]:
        raise SystemExit(f"RED, no speed: the opponent makes another motion ({away:.1e}; limit {NEAR['fp32']:.0e})")


def evaluator(precise: bool, steps: int = 2000) -> Callable[[], float]:
    """Microseconds of a loss and gradient with a step of descent, on this thread: what more steps take."""
    arena, s = Arena(), HUMANML3D_STATISTICS
    rng, k = np.random.default_rng(0), len(JOINTS)
    target, mask = waypoints().target(FRAMES)
    joints = list(waypoints().joints)

    def put(name: str, value: np.ndarray, dtype: str = "f32") -> Any:
        out = arena.alloc(name, value.shape, dtype)
        out.write(value)
        return out

    x = put("x", rng.standard_normal((FRAMES, len(s.mean))).astype(np.float32))
    targets = JointTargets(
        put("joints", np.array([joints], np.int32), "i32"), put("at", target[None][:, :, joints]),
        put("mask", mask[None][:, :, joints].astype(np.float32)), put("mean", s.mean), put("std", s.std),
        put("stats", np.zeros((1, 4), np.float32)),
        arena.alloc("ws", (workspace_bytes(1, FRAMES, k, precise),), "u8"),
    )  # fmt: skip

    def took(n: int) -> float:
        t0 = time.perf_counter()
        guide(x, solver="descent", targets=targets, steps=n, eta=1e-9, precise=precise)
        return time.perf_counter() - t0

    return lambda: (-took(steps) + took(2 * steps)) / steps * 1e6


def verdict(value: float, bar: float | None, more: bool = True) -> str:
    if bar is None:
        return ""
    by, met = abs(value / bar - 1), value >= bar if more else value <= bar
    return f"   bar {bar:g}: {'met' if met else 'MISSED'} by {by:.0%}"


def guidance_row(report: Report, peer: Peer, rounds: int) -> None:
    """Loss and gradient on one core."""
    threads = device.threads()
    device.set_threads(1)
    calls: dict[str, Callable[[], float]] = {
        "bare": lambda: peer.tell(do="evaluations", count=200, solver=False)["each"] * 1e6,
        "inside": lambda: peer.tell(do="evaluations", count=200, solver=True)["each"] * 1e6,
        "single": evaluator(False), "double": evaluator(True),
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(max(rounds, 5) + 1):
        for name, call in calls.items():
            time.sleep(PARK)
            took = call()
            if i:  # the first warms up
                times[name].append(took)
    device.set_threads(threads)
    us = {name: float(np.median(v)) for name, v in times.items()}

    def ratio(theirs: str, mine: str) -> float:
        return float(np.median(np.array(times[theirs]) / np.array(times[mine])))

    won, solved, double = ratio("bare", "single"), ratio("inside", "single"), ratio("bare", "double")
    counts = us["bare"] <= EVALUATION_MS * 1e3
    print(f"guidance, one core, T {FRAMES}, {len(JOINTS)} joints: loss and gradient {us['single']:.2f} us (fp64 "
          f"{us['double']:.2f}); autograd {us['bare']:.0f} us x{won:.0f}{verdict(won, EVALUATION_BAR)} (fp64 "
          f"x{double:.0f}); inside torch's L-BFGS {us['inside']:.0f} us x{solved:.0f}; it must reach "
          f"{EVALUATION_MS:g} ms: {'it counts' if counts else 'TOO SLOW to count'}", flush=True)  # fmt: skip
    report.add(what="evaluation", us=us["single"], precise_us=us["double"], autograd_us=us["bare"],
               lbfgs_us=us["inside"], ratio=won, ratio_precise=double, ratio_lbfgs=solved, bar=EVALUATION_BAR,
               counts=counts, rounds=len(times["bare"]))  # fmt: skip


def request_row(report: Report, kind: str, ours: Ours, plain: Peer, equal: Peer, rounds: int) -> None:
    """Text and waypoints to a motion."""
    contestants = {"plain": plain} if equal is plain else {"plain": plain, "equal": equal}
    for peer in contestants.values():
        peer.ask(do="request")
    asked: dict[str, list[dict[str, Any]]] = {n: [] for n in contestants}
    answers = []
    for _ in range(rounds):
        for name, peer in contestants.items():
            time.sleep(PARK)
            asked[name].append(peer.tell(do="request"))
        time.sleep(PARK)
        answers.append(ours.request())
    asked.setdefault("equal", asked["plain"])
    mine = np.array([a[0] for a in answers])
    second = float(np.median(mine))
    ratio, took = {}, {}
    for name, rows in asked.items():
        seconds = np.array([r["seconds"] for r in rows])
        ratio[name], took[name] = float(np.median(seconds / mine)), float(np.median(seconds))
    stages = {k: float(np.median([a[1].stages[k] for a in answers])) for k in answers[0][1].stages}
    theirs = {k: float(np.median([r["stages"][k] for r in asked["equal"]])) * 1e3 for k in stages}
    spent = {k: float(np.median([r[k] for r in asked["equal"]])) for k in ("denoise", "guidance", "evals")}
    parts = ours.shares()
    pulled = parts.get("update", 0.0) + parts.get("pull", 0.0)
    share, peer_share = pulled / (second * 1e3), spent["guidance"] / took["equal"]
    denoise, each = spent["denoise"] * 1e3, spent["guidance"] / spent["evals"] * 1e3
    counts = denoise <= ABOUT * IDLE[equal.dtype] and each <= EVALUATION_MS
    against = ""
    if equal is not plain:
        against = f"; eager fp32 {took['plain']:.3f} s x{ratio['plain']:.2f}{verdict(ratio['plain'], BARS[kind][1])}"
    print(f"  guided request   ours {second:6.3f} s; eager {equal.dtype} {took['equal']:6.3f} s x{ratio['equal']:.2f}"
          f"{verdict(ratio['equal'], BARS[kind][0])}{against}")  # fmt: skip
    print(f"    opponent: a denoise {denoise:.1f} ms (must reach about {IDLE[equal.dtype]:g}), an evaluation "
          f"{each:.2f} ms (must reach {EVALUATION_MS:g}): "
          f"{'it counts' if counts else 'TOO SLOW to count'}")  # fmt: skip
    print("    stages, ms (opponent): " + ", ".join(f"{k} {v:.1f} ({theirs[k]:.1f})" for k, v in stages.items()))
    print(f"    guidance {pulled:.1f} ms = {share:.2%} of the request"
          f"{verdict(share, SHARE_BAR if kind == 'fp32' else None, False)}; of the opponent's {peer_share:.0%}, "
          f"{spent['evals']:.0f} evaluations (ours {answers[0][1].evaluations})")  # fmt: skip
    nodes = sorted(parts.items(), key=lambda x: -x[1])
    print("    nodes, ms: " + ", ".join(f"{k} {v:.1f}" for k, v in nodes), flush=True)
    report.add(what="request", kind=kind, seconds=second, eager_s=took["equal"], ratio=ratio["equal"],
               eager_fp32_s=took["plain"], ratio_fp32=ratio["plain"], bar=BARS[kind][0], bar_fp32=BARS[kind][1],
               stages_ms=stages, eager_stages_ms=theirs, nodes_ms=parts, guidance_share=share,
               eager_denoise_ms=denoise, eager_evaluation_ms=each, eager_guidance_share=peer_share, counts=counts,
               rounds=rounds)  # fmt: skip


def loop_row(report: Report, kind: str, ours: Ours, peer: Peer, rounds: int) -> None:
    """The denoising loop alone, against the faster of eager and compiled torch; its rate against torch.matmul."""
    steps, roof = len(ours.model.config.diffusion.timesteps), 0.0
    failed = peer.tell(do="loop", compiled=True).get("failed")  # compiles
    calls: dict[str, Callable[[], float]] = {
        "ours": ours.loop,
        "eager": lambda: steps * peer.tell(do="loop")["denoise"],
    }
    if failed is None:
        calls["compiled"] = lambda: steps * peer.tell(do="loop", compiled=True)["denoise"]
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            time.sleep(PARK)
            took = call()
            if i:  # the first warms up
                times[name].append(took)
        time.sleep(PARK)
        roof = max(roof, peer.tell(do="matmul")["gflops"])
    medians = {name: float(np.median(v)) for name, v in times.items()}
    best = min((n for n in medians if n != "ours"), key=medians.__getitem__)
    won = float(np.median(np.array(times[best]) / np.array(times["ours"])))
    nominal, done = (steps * f / medians["ours"] / 1e9 for f in flops(ours.model.config))
    compiled = f"torch.compile failed ({failed})" if failed else f"compiled {medians['compiled']:.3f} s"
    print(f"  denoising loop   ours {medians['ours']:6.3f} s; eager {peer.dtype} {medians['eager']:.3f} s, {compiled}; "
          f"x{won:.2f} of the faster{verdict(won, BARS[kind][2])}")  # fmt: skip
    print(f"    {flops(ours.model.config)[0] / 1e9:.2f} GFLOP nominal a step: {nominal:.0f} GFLOP/s ({done:.0f} of "
          f"what is computed); torch.matmul's best {peer.dtype} {roof:.0f}: x{nominal / roof:.2f}"
          f"{verdict(nominal / roof, BARS[kind][3])}", flush=True)  # fmt: skip
    report.add(what="loop", kind=kind, seconds=medians["ours"], ratio=won, opponent=best, gflop_s=nominal,
               computed_gflop_s=done, matmul_gflop_s=roof, eager_s=medians["eager"],
               compiled_s=medians.get("compiled"), compile_failed=failed, bar=BARS[kind][2], bar_rate=BARS[kind][3],
               rounds=rounds)  # fmt: skip


def main(kinds: list[str] | None = None, rounds: int = 5) -> None:
    report, bandwidth = Report("-".join(["motok", *(kinds or [])])), Bandwidth()
    golden = gate()
    print(f"golden tokens equal, golden motion within {golden:.1e}; read bandwidth {bandwidth.measure():.1f} GB/s",
          flush=True)  # fmt: skip
    bandwidth.release()
    report.add(what="golden", error=golden)
    peers: dict[str, Peer] = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a run that is stopped leaves no weights behind
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_weights(MoTokConfig.humanml3d(), folder)
        try:
            exact = Ours("fp32", folder)
            made, noise = write_case(exact, folder)
            tokens, plain = exact.tokens(), exact.motion(made.tokens, noise)
            del exact

            def peer_of(dtype: str) -> Peer:
                if dtype not in peers:
                    peers[dtype] = Peer(dtype, folder)
                    agree(report, peers[dtype], made, plain)
                return peers[dtype]

            guidance_row(report, peer_of("fp32"), rounds)
            for kind in kinds or list(KINDS):
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    load = pool.submit(footprint, kind, folder).result()
                ours = Ours(kind, folder)
                near = distance(ours.motion(made.tokens, noise), plain)
                same = float(np.mean(ours.tokens() == tokens))
                print(f"{kind}: loaded in {load['seconds']:.1f} s, peak {load['peak_rss_gb']:.2f} GB, "
                      f"{load['peak_rss_acted_gb']:.2f} GB after a request; against fp32: motion {near:.1e} (limit "
                      f"{NEAR[kind]:.0e}), {same:.0%} of the tokens", flush=True)  # fmt: skip
                red = {"gate": "RED"} if near > NEAR[kind] else {}
                report.add(what="load", kind=kind, **load, gb=ours.model.memory().total / 1e9, rms_to_fp32=near,
                           tokens_as_fp32=same, **red)  # fmt: skip
                if red:
                    print(f"{kind}: RED, no speed")
                    continue
                equal = peer_of(KINDS[kind][2])
                request_row(report, kind, ours, peer_of("fp32"), equal, rounds)
                loop_row(report, kind, ours, equal, rounds)
                del ours
                print(f"  read bandwidth {bandwidth.measure():.1f} GB/s", flush=True)
                bandwidth.release()
        finally:
            for peer in peers.values():
                peer.close()
    report.data |= {"peaks_gop_s": arithmetic(), "bandwidth_gb_s": bandwidth.gb_per_s}
    print("written:", report.save())
