"""The diffusion decoder as a plan: every sampled step, and guidance inside it (sections 3.2 and 3.4).

A step is one product for all modulations, four nodes per block, head, and the update that guidance is part of. Nothing
in it depends on what the host knows only later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.models.motok.config import Guidance, MoTokConfig
from engine.models.motok.convs import ConvBuffers, Stream
from engine.models.motok.schedule import updates
from engine.models.motok.weights import DenoiserWeights
from engine.ops.gemm import Modulation, Taps, gemm
from engine.ops.guide import JointTargets, guide
from engine.ops.guide import workspace_bytes as guide_bytes
from engine.ops.norm import norm
from engine.runtime.arena import Arena, Tensor

EPS = 1e-6
NODES_PER_BLOCK = 4
NODES_PER_STEP = 5  # beside the blocks: condition, modulations, first product, head, update
SOLVERS = {"lbfgs": "lbfgs", "lbfgs_last": "lbfgs", "gd": "descent", "project": "project"}


def solver_steps(g: Guidance, sampled: int) -> list[int]:
    """Steps of the solver at each sampled step, index 0 the last that is sampled. `max_evals` is kept by counting the
    most evaluations that each may take."""
    descent = g.solver == "gd"
    each = 1 if descent else g.max_iter * 5 // 4 + 1
    left, out = g.max_evals, [0] * sampled
    for k in reversed(range(sampled)):
        out[k] = g.gd_iters if descent else g.calls(k)
        if g.max_evals:
            out[k] = min(out[k], left // each)
            left -= out[k] * each
    return out


class DenoiserBuffers:
    """Workspace of the steps; x holds the noise before, the motion after."""

    def __init__(self, arena: Arena, c: MoTokConfig, modulations: int, table: str, convs: ConvBuffers) -> None:
        t, d, w = c.max_tokens * c.rate, c.features, c.denoiser.width
        self.x = arena.alloc("motion", (t, d), "f32", "io")
        self.mean = arena.alloc("motion.mean", (t, d))
        self.x0 = arena.alloc("motion.clean", (t, d))
        self.noise = None
        if c.diffusion.sampler == "ddpm":
            self.noise = arena.alloc("step_noise", (len(c.diffusion.timesteps), t, d), "f32", "io")
        self.u, self.hidden = arena.alloc("denoiser.u", (t, w)), arena.alloc("denoiser.hidden", (t, w))
        self.condition, self.active = arena.alloc("denoiser.condition", (t, w)), arena.alloc("denoiser.active", (t, w))
        self.modulations = arena.alloc("modulations", (t, modulations), table)
        self.frame = arena.alloc("frame_numbers", (t,), "i32", "io")
        pad = c.denoiser.kernel // 2
        self.smooth = Stream.empty(arena, "denoiser.smooth", t, w, max(pad, 1), convs.zeros)
        self.pad, self.ws = pad, convs.ws


@dataclass(frozen=True)
class GuidanceBuffers:
    """Targets of up to J joints, and what each step reports: loss before and after, evaluations, coordinates."""

    joints: Tensor  # i32 [1, J]
    at: Tensor  # f32 [1, T, J, 3]
    mask: Tensor  # f32 [1, T, J]
    stats: Tensor  # f32 [S, 1, 4]
    ws: Tensor

    @staticmethod
    def empty(arena: Arena, c: MoTokConfig, precise: bool) -> GuidanceBuffers:
        t, j, steps = c.max_tokens * c.rate, c.joints, len(c.diffusion.timesteps)
        return GuidanceBuffers(
            arena.alloc("targets.joints", (1, j), "i32", "io"), arena.alloc("targets.at", (1, t, j, 3), "f32", "io"),
            arena.alloc("targets.mask", (1, t, j), "f32", "io"),
            arena.alloc("targets.stats", (steps, 1, 4), "f32", "io"),
            arena.alloc("guide.ws", (guide_bytes(1, t, j, precise),), "u8"),
        )  # fmt: skip

    def targets(self, t: int, slots: int, step: int, mean: Tensor, std: Tensor) -> JointTargets:
        return JointTargets(
            self.joints.slice(0, (1, slots)), self.at.slice(0, (1, t, slots, 3)), self.mask.slice(0, (1, t, slots)),
            mean, std, self.stats.slice(4 * step, (1, 4)), self.ws,
        )  # fmt: skip


class Denoiser:
    """Records the sampled steps of a motion of t frames."""

    def __init__(
        self, c: MoTokConfig, w: DenoiserWeights, b: DenoiserBuffers, pull: GuidanceBuffers, mean: Tensor, std: Tensor,
        precise: bool,
    ) -> None:  # fmt: skip
        self.c, self.w, self.b, self.pull, self.mean, self.std = c, w, b, pull, mean, std
        self.precise, self.updates = precise, updates(c.diffusion)

    def _rows(self, x: Tensor, t: int) -> Tensor:
        return x.slice(0, (t, x.shape[1]))

    def sample(self, t: int, slots: int, g: Guidance | None) -> None:
        """From noise in b.x to the motion there; guided to `slots` joints by `g`."""
        if self.b.pad:
            self.b.smooth.close(t, "smooth")
        steps = solver_steps(g, len(self.updates)) if g else []
        for k in reversed(range(len(self.updates))):
            self.estimate(t, k)
            if g is None or (steps[k] == 0 and g.solver != "project"):
                self.update(t, k)
            else:
                self.pulled(t, k, slots, g, steps[k])

    def estimate(self, t: int, k: int) -> None:
        """The clean motion in b.x0 from the noisy one in b.x, at sampled step k."""
        w, b, name = self.w, self.b, f"{k}"
        width, ws = self.c.denoiser.width, self.b.ws
        u, hidden, active = (self._rows(x, t) for x in (b.u, b.hidden, b.active))
        table, frame = self._rows(b.modulations, t), b.frame.slice(0, (t,))
        time = w.times.slice(k * width, (width,))
        norm(self._rows(b.condition, t), active, kind="none", add=time, act="silu", label=f"{name}.condition")
        gemm(active, w.modulation.w, table, bias=w.modulation.bias, ws=ws, label=f"{name}.modulations")
        gemm(self._rows(b.x, t), w.first.w, u, bias=w.first.bias, ws=ws, label=f"{name}.first")
        for i, block in enumerate(w.blocks):
            at = 3 * width * i
            if block.conv is not None and block.conv_norm is not None:
                norm(u, b.smooth.rows(t), weight=block.conv_norm.weight, bias=block.conv_norm.bias, eps=EPS, act="silu",
                     label=f"{name}.{i}.norm")  # fmt: skip
                gemm(b.smooth.around(t, b.pad), block.conv.w, u, taps=Taps(self.c.denoiser.kernel),
                     bias=block.conv.bias, residual=u, ws=ws, label=f"{name}.{i}.conv")  # fmt: skip
            gemm(u, block.fc1.w, hidden, prologue="layer", norm=block.norm.weight, norm_bias=block.norm.bias, eps=EPS,
                 modulation=Modulation(table, frame, scale=at + width, shift=at), bias=block.fc1.bias, act="silu",
                 ws=ws, label=f"{name}.{i}.fc1")  # fmt: skip
            gemm(hidden, block.fc2.w, u, bias=block.fc2.bias, residual=u,
                 modulation=Modulation(table, frame, gate=at + 2 * width), ws=ws, label=f"{name}.{i}.fc2")  # fmt: skip
        at = 3 * width * len(w.blocks)
        gemm(u, w.last.w, self._rows(b.x0, t), prologue="layer", eps=EPS, bias=w.last.bias,
             modulation=Modulation(table, frame, scale=at + width, shift=at), ws=ws, label=f"{name}.head")  # fmt: skip

    def _noise(self, t: int, k: int) -> dict[str, Any]:
        b, sigma = self.b, self.updates[k].sigma
        if b.noise is None or not sigma:
            return {}
        size = self.c.features
        return {"sigma": sigma, "noise": b.noise.slice(k * t * size, (t, size))}

    def update(self, t: int, k: int) -> None:
        """The sampler's step: b.x of step k - 1."""
        step = self.updates[k]
        guide(self._rows(self.b.x0, t), self._rows(self.b.x, t), a=step.clean, b=step.state, label=f"{k}.update",
              **self._noise(t, k))  # fmt: skip

    def pulled(self, t: int, k: int, slots: int, g: Guidance, steps: int) -> None:
        """Guidance and the sampler's step."""
        step, b = self.updates[k], self.b
        x, x0, mean = (self._rows(v, t) for v in (b.x, b.x0, b.mean))
        solve: dict[str, Any] = {
            "solver": SOLVERS[g.solver], "targets": self.pull.targets(t, slots, k, self.mean, self.std), "steps": steps,
            "eta": g.eta, "max_iter": g.max_iter, "history": g.history, "metres": self.c.scale, "precise": self.precise,
        }  # fmt: skip
        if g.on == "x0":
            guide(x0, x, a=step.clean, b=step.state, label=f"{k}.update", **self._noise(t, k), **solve)
            return
        # On the posterior mean: that is made first, then pulled, and noise comes last.
        guide(x0, x, a=step.clean, b=step.state, label=f"{k}.update")
        guide(x, mean, label=f"{k}.pull", **self._noise(t, k), **solve)
        norm(mean, x, kind="none", label=f"{k}.next")
