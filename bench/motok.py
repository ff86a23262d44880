"""MoTok at full size, random weights: a guided request, the denoising loop and guidance against plain torch.

Turns are interleaved, ratios are medians of pairs. The opponent (bench/peers/motok_eager.py) runs in a process of its
own, in the same format. No speed without the golden motion and, for other formats, a motion near that of fp32.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import Report
from bench.roofs import Bandwidth, arithmetic
from bench.sources import RandomSource
from bench.timing import PARK
from bench.worker import Worker
from engine.blocks.motion import HUMANML3D_STATISTICS, Constraints, Waypoints
from engine.models.motok.config import MoTokConfig
from engine.models.motok.model import MoTok, load_options
from engine.models.motok.motion import Motion
from engine.models.motok.weights import shapes
from engine.ops.guide import JointTargets, guide, workspace_bytes
from engine.runtime import device
from engine.runtime.arena import Arena

ROOT = Path(__file__).resolve().parent.parent
FRAMES, EVERY, JOINTS = 196, 4, ("pelvis", "l_wrist", "r_foot")
PROMPT = "a person walks forward with energy, then waves"
#: dtype, quant, format of the opponent of equal precision.
KINDS = {"fp32": ("fp32", None, "fp32"), "bf16": ("bf16", None, "bf16"), "int8": ("bf16", "int8", "bf16")}
#: Bars: a guided request against equal precision, against the fp32 opponent; the loop; its rate against matmul.
BARS = {"fp32": (1.5, None, 1.1, 1.0), "bf16": (1.7, 3.0, 1.1, 0.8), "int8": (None, 4.0, None, None)}
NEAR = {"fp32": 1e-4, "bf16": 3e-2, "int8": 6e-2}  # rms of a motion after 27 steps
IDLE = {"fp32": 96.0, "bf16": 52.0}  # ms of a denoise that the opponent must reach
EVALUATION_MS = 1.4


class Random(RandomSource):
    """Random weights that keep activations near one, and the statistics of the data set."""

    def read(self, name: str) -> np.ndarray:
        s = HUMANML3D_STATISTICS
        given = {
            "stats.mean": s.mean,
            "stats.std": s.std,
            "stats.hint_mean": s.joint_mean,
            "stats.hint_std": s.joint_std,
        }
        if name in given:
            return np.ascontiguousarray(given[name].reshape(-1))
        shape = self.info(name).shape
        if len(shape) == 1 and name.endswith("weight"):
            return (1 + 0.1 * np.random.default_rng(len(name)).standard_normal(shape)).astype(np.float32)
        return super().read(name)


class Words:
    """CLIP's ids of the prompt; its vocabulary is not part of the engine."""

    vocab_size = 49408

    def encode(self, text: str, ctx: int = 77) -> list[int]:
        return [49406, 320, 2533, 8192, 2342, 593, 3131, 267, 1594, 4160, 49407][:ctx]


class Peer(Worker):
    """Plain torch, in the environment of this process."""

    def __init__(self, dtype: str) -> None:
        super().__init__(Path(sys.executable), "motok_eager.py", device.threads(), dtype)


def waypoints(model: MoTok) -> Constraints:
    at, rng = np.arange(0, FRAMES, EVERY), np.random.default_rng(3)
    path = np.cumsum(0.03 * rng.standard_normal((len(at), 3)), 0) * [1, 0, 1] + [0, 0.9, 0]
    return Constraints([Waypoints(j, at, path + 0.3 * i) for i, j in enumerate(JOINTS)], model.skeleton)


def flops(c: MoTokConfig) -> float:
    """Of one denoise of FRAMES frames, multiply-add = 2, as the paper's module computes it."""
    d = c.denoiser
    block = d.kernel * d.width**2 + 2 * d.width**2 + 3 * d.width**2
    return 2.0 * FRAMES * (2 * c.features * d.width + d.blocks * block + 2 * d.width**2)


def gate() -> float:
    """Error of the golden motion (specification 15.3) in fp32; SystemExit where it is too large."""
    sys.path.insert(0, str(ROOT / "tests/models"))
    from _motok import filled, normal
    from _motok_engine import engine_of, source_of

    from engine.models.motok.tokenizer_reference import Tokenizer

    c = MoTokConfig.humanml3d()
    m = engine_of(c, source_of(c, tokenizer=filled(Tokenizer(c))))
    tokens = np.array([831, 358, 445, 673, 110, 602, 684, 471, 810, 110, 282, 58, 943, 588, 781, 252], np.int32)
    made = m.decode(tokens, noise=normal("input.noise", 1, 64, 263)[0].float().numpy())
    x = m.statistics.normalize(made.features).astype(np.float64).reshape(-1)
    want, scale = [-0.1585649503, -1.2277739, -0.9771427276, 1.571429097], np.sqrt(19436.5777 / x.size)
    error = max(np.abs(x[:4] - want).max() / scale, abs((x**2).sum() / 19436.5777 - 1))
    if error > NEAR["fp32"]:
        raise SystemExit(f"RED, no speed: golden motion differs by {error:.1e} (limit {NEAR['fp32']:.0e})")
    return float(error)


class Ours:
    def __init__(self, kind: str) -> None:
        dtype, quant, _ = KINDS[kind]
        c = MoTokConfig.humanml3d()
        source = Random(shapes(c, ("ddm", "clip")))
        t0 = time.perf_counter()
        options = load_options("full", source, dtype=dtype, quant=quant)
        self.model = MoTok(c, options, source, Words())  # type: ignore[arg-type]
        self.load_s = time.perf_counter() - t0
        self.given = waypoints(self.model)
        m = self.model
        self.loop_plan = m.recorded("loop", lambda: m._denoiser.sample(FRAMES, 0, None))
        self.noise = np.random.default_rng(1).standard_normal((FRAMES, c.features)).astype(np.float32)
        for _ in range(2):
            self.request()
            self.loop()

    def request(self) -> tuple[float, dict[str, float]]:
        self.model._features.clear()  # a request pays for its text
        t0 = time.perf_counter()
        made = self.model.generate(PROMPT, frames=FRAMES, constraints=self.given, seed=1)
        took = time.perf_counter() - t0
        assert isinstance(made, Motion)
        return took, made.stages

    def loop(self) -> float:
        m = self.model
        m._denoiser.b.x.slice(0, self.noise.shape).write(self.noise)
        t0 = time.perf_counter()
        self.loop_plan.replay()
        return time.perf_counter() - t0

    def motion(self) -> np.ndarray:
        """Normalised features of fixed tokens and noise."""
        m = self.model
        ids = (np.arange(FRAMES // m.config.rate) * 37 % m.config.codes).astype(np.int32)
        return m.statistics.normalize(m.decode(ids, noise=self.noise).features)

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


def evaluation_us(precise: bool, joints: int = 3, steps: int = 2000) -> float:
    """Microseconds of a loss and gradient with a step of descent, on this thread."""
    arena, d = Arena(), 263
    rng = np.random.default_rng(0)

    def put(name: str, value: np.ndarray, dtype: str = "f32") -> Any:
        out = arena.alloc(name, value.shape, dtype)
        out.write(value)
        return out

    s = HUMANML3D_STATISTICS
    x = put("x", rng.standard_normal((FRAMES, d)).astype(np.float32))
    targets = JointTargets(
        put("joints", np.array([[0, 20, 11]], np.int32)[:, :joints], "i32"),
        put("at", rng.standard_normal((1, FRAMES, joints, 3)).astype(np.float32)),
        put("mask", np.ones((1, FRAMES, joints), np.float32)), put("mean", s.mean), put("std", s.std),
        put("stats", np.zeros((1, 4), np.float32)),
        arena.alloc("ws", (workspace_bytes(1, FRAMES, joints, precise),), "u8"),
    )  # fmt: skip
    times = []
    for n in (steps, 2 * steps) * 5:
        t0 = time.perf_counter()
        guide(x, solver="descent", targets=targets, steps=n, eta=1e-9, precise=precise)
        times.append((n, time.perf_counter() - t0))
    short = np.median([t for n, t in times if n == steps])
    return float((np.median([t for n, t in times if n != steps]) - short) / steps * 1e6)


def verdict(value: float, bar: float | None, more: bool = True) -> str:
    if bar is None:
        return ""
    met = value >= bar if more else value <= bar
    return f"   bar {bar:g}: {'met' if met else f'missed by {abs(value / bar - 1):.0%}'}"


def guidance_row(report: Report, peer: Peer) -> None:
    """Loss and gradient on one core, ours by steps of descent."""
    threads = device.threads()
    device.set_threads(1)
    bare, inside = (peer.tell(do="evaluations", count=300, solver=s)["each"] * 1e6 for s in (False, True))
    single, double = evaluation_us(False), evaluation_us(True)
    device.set_threads(threads)
    won, solved = bare / single, inside / single
    print(f"guidance, one core, T {FRAMES}, 3 joints: ours {single:.2f} us (fp64 {double:.2f}), autograd {bare:.0f} us "
          f"x{won:.0f}{verdict(won, 600)}; in torch's L-BFGS {inside:.0f} us x{solved:.0f}", flush=True)  # fmt: skip
    report.add(what="evaluation", us=single, precise_us=double, autograd_us=bare, lbfgs_us=inside, ratio=won,
               ratio_lbfgs=solved)  # fmt: skip


def request_row(report: Report, kind: str, ours: Ours, plain: Peer, equal: Peer, rounds: int) -> None:
    """Text and waypoints to a motion."""
    same = KINDS[kind][2]
    contestants = {"plain": plain} if equal is plain else {"plain": plain, "equal": equal}
    for peer in contestants.values():
        peer.ask(do="request")
    asked: dict[str, list[dict[str, float]]] = {n: [] for n in contestants}
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
    stages = {k: float(np.median([a[1][k] for a in answers])) for k in answers[0][1]}
    theirs = {k: float(np.median([r[k] for r in asked["equal"]])) for k in ("denoise", "guidance", "planner", "evals")}
    denoise, each = theirs["denoise"] * 1e3, theirs["guidance"] / theirs["evals"] * 1e3
    parts = ours.shares()
    share = parts["update"] / (second * 1e3)
    print(f"  guided request   ours {second:6.3f} s; eager {same} {took['equal']:6.3f} s x{ratio['equal']:.2f}"
          f"{verdict(ratio['equal'], BARS[kind][0])}; eager fp32 {took['plain']:.3f} s x{ratio['plain']:.2f}"
          f"{verdict(ratio['plain'], BARS[kind][1])}")  # fmt: skip
    pulled = theirs["guidance"] / took["equal"]
    print(f"    opponent: a denoise {denoise:.1f} ms (idle it must reach {IDLE[same]:g}), an evaluation {each:.2f} ms "
          f"(must reach {EVALUATION_MS:g}), guidance {pulled:.0%} of the request")  # fmt: skip
    print("    stages, ms: " + ", ".join(f"{k} {v:.1f}" for k, v in stages.items()))
    print(f"    guidance {parts['update']:.1f} ms = {share:.2%} of the request"
          f"{verdict(share, 0.01 if kind == 'fp32' else None, False)}")  # fmt: skip
    print(
        "    nodes, ms: " + ", ".join(f"{k} {v:.1f}" for k, v in sorted(parts.items(), key=lambda x: -x[1])), flush=True
    )
    report.add(what="request", kind=kind, seconds=second, eager_s=took["equal"], ratio=ratio["equal"],
               eager_fp32_s=took["plain"], ratio_fp32=ratio["plain"], stages_ms=stages, nodes_ms=parts,
               guidance_share=share, eager_denoise_ms=denoise, eager_evaluation_ms=each,
               eager_guidance_share=pulled, rounds=rounds)  # fmt: skip


def loop_row(report: Report, kind: str, ours: Ours, peer: Peer, rounds: int) -> None:
    """The denoising loop alone, against the faster of eager and compiled torch."""
    same, steps = KINDS[kind][2], len(ours.model.config.diffusion.timesteps)
    calls: dict[str, Any] = {"ours": ours.loop}
    for name in ("eager", "compiled"):
        calls[name] = lambda c=name == "compiled": steps * peer.tell(do="loop", compiled=c)["denoise"]
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):  # the first warms up
        for name, call in calls.items():
            time.sleep(PARK)
            times[name].append(call())
    medians = {name: float(np.median(v[1:])) for name, v in times.items()}
    best = min(("eager", "compiled"), key=medians.__getitem__)
    won = float(np.median(np.array(times[best][1:]) / np.array(times["ours"][1:])))
    rate = steps * flops(ours.model.config) / medians["ours"] / 1e9
    roof = peer.tell(do="matmul")["gflops"]
    print(f"  denoising loop   ours {medians['ours']:6.3f} s; eager {medians['eager']:.3f} s, compiled "
          f"{medians['compiled']:.3f} s; x{won:.2f} of the faster{verdict(won, BARS[kind][2])}")  # fmt: skip
    print(f"    rate {rate:.0f} GFLOP/s, torch.matmul's best {same} {roof:.0f}: {rate / roof:.2f}"
          f"{verdict(rate / roof, BARS[kind][3])}", flush=True)  # fmt: skip
    report.add(what="loop", kind=kind, seconds=medians["ours"], ratio=won, opponent=best, gflop_s=rate,
               matmul_gflop_s=roof, eager_s=medians["eager"], compiled_s=medians["compiled"])  # fmt: skip


def main(kinds: list[str] | None = None, rounds: int = 5) -> None:
    report, bandwidth = Report("motok"), Bandwidth()
    golden = gate()
    print(f"golden motion: error {golden:.1e}; read bandwidth {bandwidth.measure():.1f} GB/s", flush=True)
    report.add(what="golden", error=golden)
    plain = Peer("fp32")
    peers = {"fp32": plain}
    guidance_row(report, plain)
    exact = Ours("fp32").motion()
    for kind in kinds or list(KINDS):
        ours = Ours(kind)
        near = float(np.linalg.norm(ours.motion() - exact) / np.linalg.norm(exact))
        if near > NEAR[kind]:
            print(f"{kind}: RED, no speed: a motion differs from fp32 by {near:.1e} (limit {NEAR[kind]:.0e})")
            report.add(what="load", kind=kind, rms_to_fp32=near, gate="RED")
            continue
        same = KINDS[kind][2]
        if same not in peers:
            peers[same] = Peer(same)
        size = ours.model.memory().total / 1e9
        print(
            f"{kind}: loaded in {ours.load_s:.1f} s, {size:.2f} GB, a motion differs from fp32 by {near:.1e}",
            flush=True,
        )
        report.add(what="load", kind=kind, seconds=ours.load_s, gb=size, rms_to_fp32=near)
        request_row(report, kind, ours, plain, peers[same], rounds)
        loop_row(report, kind, ours, peers[same], rounds)
        bandwidth.measure()
        bandwidth.release()
        del ours
    for peer in peers.values():
        peer.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    report.data |= {"peaks_gop_s": arithmetic(), "bandwidth_gb_s": bandwidth.gb_per_s, "peak_rss_gb": peak}
    print("written:", report.save())
