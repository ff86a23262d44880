"""MoTok as one would write it in torch: eager modules, guidance by autograd inside torch's L-BFGS. Its own process.

    python bench/peers/motok_eager.py THREADS fp32|bf16

Reads a JSON object per line ({"do": verb, ...}), answers with {"seconds": ...} and what the verb found. The modules are
those that the engine is held to: Conv1d, Linear and LayerNorm as the paper draws them, nothing recomputed that is known
before (token table, text feature of a request, condition of a decode). Guidance is fp32 in either format.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engine.models.motok.config import MoTokConfig
from engine.models.motok.planner_reference import sample_ddm
from engine.models.motok.reference import MoTokReference
from engine.models.motok.tokenizer_reference import schedule

FRAMES, EVERY, JOINTS = 196, 4, (0, 20, 11)
TEXT = [49406, 320, 2533, 8192, 2342, 593, 3131, 267, 1594, 4160, 49407]


class Eager:
    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.c, self.dtype = MoTokConfig.humanml3d(), dtype
        self.model = MoTokReference(self.c).to(dtype).requires_grad_(False).eval()
        del self.model.ar
        self.steps = schedule(self.c.diffusion)
        self.mean, self.std = torch.zeros(self.c.features), torch.full((self.c.features,), 0.1)
        self.mean[3], self.std[0], self.std[1:3] = 0.9, 0.0128, 0.0169
        at = torch.arange(0, FRAMES, EVERY)
        self.mask = torch.zeros(FRAMES, self.c.joints, 1)
        self.mask[at[:, None], torch.tensor(JOINTS)[None]] = 1
        self.target = 0.5 * torch.randn(FRAMES, self.c.joints, 3)
        self.count = float(3 * self.mask.sum())
        self.compiled: Any = None
        self.tokens = torch.randint(0, self.c.codes, (1, FRAMES // self.c.rate))

    # ---- guidance, as InterControl has it
    def loss(self, x: Tensor) -> Tensor:
        """Mean square of the constrained coordinates of x [T, D], normalised."""
        m = x * self.std + self.mean
        zero = torch.zeros_like(m[:1, 0])
        angle = 2 * torch.cat([zero, m[:-1, 0].cumsum(0)])
        cos, sin = angle.cos(), angle.sin()
        vx, vz = torch.cat([zero, m[:-1, 1]]), torch.cat([zero, m[:-1, 2]])
        px, pz = (vx * cos - vz * sin).cumsum(0), (vx * sin + vz * cos).cumsum(0)
        ric = m[:, 4:67].view(-1, 21, 3)
        c, s = cos[:, None], sin[:, None]
        others = torch.stack([ric[..., 0] * c - ric[..., 2] * s + px[:, None], ric[..., 1],
                              ric[..., 0] * s + ric[..., 2] * c + pz[:, None]], -1)  # fmt: skip
        joints = torch.cat([torch.stack([px, m[:, 3], pz], -1)[:, None], others], 1)
        return (self.mask * (joints - self.target)).square().sum() / self.count

    def pull(self, x: Tensor, k: int) -> tuple[Tensor, int]:
        g, evals = self.c.guidance, 0
        with torch.enable_grad():
            place = x.clone().requires_grad_(True)
            optimizer = torch.optim.LBFGS([place], lr=1, max_iter=4, history_size=10, line_search_fn="strong_wolfe")

            def closure() -> Tensor:
                nonlocal evals
                evals += 1
                optimizer.zero_grad()
                loss = self.loss(place)
                loss.backward()
                return loss

            for _ in range(g.calls(k)):
                optimizer.step(closure)  # type: ignore[arg-type]
        return place.detach(), evals

    # ---- verbs
    def sample(self, guided: bool, compiled: bool = False) -> dict:
        """Tokens to a motion."""
        predict = self.compiled if compiled else self.model.tokenizer.denoiser
        s = self.model.tokenizer.condition(self.tokens)
        x = torch.randn(1, FRAMES, self.c.features)
        evals, spent, denoising = 0, 0.0, 0.0
        for k in reversed(range(len(self.steps.timesteps))):
            t0 = time.perf_counter()
            clean = predict(x.to(self.dtype), self.steps.timesteps[k], s).float()  # type: ignore[misc]
            t1 = time.perf_counter()
            denoising += t1 - t0
            if guided:
                pulled, n = self.pull(clean[0], k)
                clean, evals = pulled[None], evals + n
                spent += time.perf_counter() - t1
            x = float(self.steps.a[k]) * clean + float(self.steps.b[k]) * x
        return {"guidance": spent, "evals": evals, "denoise": denoising / len(self.steps.timesteps)}

    def request(self) -> dict:
        """Text and waypoints to a motion."""
        text = self.model.clip(torch.tensor([TEXT]))
        hints = torch.randn(1, FRAMES, 66) * self.mask.repeat(1, 1, 3).view(1, FRAMES, 66)
        traj = self.model.ddm.traj_encoder(hints.to(self.dtype))
        n, steps = FRAMES // self.c.rate, self.c.ddm.steps
        coins = torch.arange(steps)[None] % 2 == 0
        t0 = time.perf_counter()
        self.tokens = sample_ddm(self.model.ddm, self.c, [n], torch.rand(1, steps, n), text, traj, coins)
        planner = time.perf_counter() - t0
        return {**self.sample(True), "planner": planner}

    def loop(self, compiled: bool = False) -> dict:
        """The denoising loop alone."""
        if compiled and self.compiled is None:
            self.compiled = torch.compile(self.model.tokenizer.denoiser)
            self.sample(False, True)
        return self.sample(False, compiled)

    def evaluations(self, count: int, solver: bool) -> dict:
        """`count` evaluations with their gradient on one thread, bare or inside L-BFGS."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            x = torch.randn(FRAMES, self.c.features)
            with torch.enable_grad():
                t0, done = time.perf_counter(), 0
                while done < count:
                    if solver:
                        done += self.pull(x, 0)[1]
                        continue
                    place = x.clone().requires_grad_(True)
                    self.loss(place).backward()
                    done += 1
                return {"each": (time.perf_counter() - t0) / done}
        finally:
            torch.set_num_threads(threads)

    def matmul(self) -> dict:
        """torch.matmul's best rate, GFLOP/s."""
        best = 0.0
        for n in (1024, 2048, 3072):
            a, b = (torch.randn(n, n).to(self.dtype) for _ in range(2))
            for _ in range(6):
                t0 = time.perf_counter()
                a @ b
                best = max(best, 2 * n**3 / (time.perf_counter() - t0) / 1e9)
        return {"gflops": best}


def main() -> None:
    threads, dtype = int(sys.argv[1]), {"fp32": torch.float32, "bf16": torch.bfloat16}[sys.argv[2]]
    torch.set_num_threads(threads)
    peer = Eager(dtype)
    print(json.dumps({"seconds": 0}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        verb = command.pop("do")
        with torch.no_grad():
            t0 = time.perf_counter()
            found = getattr(peer, verb)(**command) or {}
        print(json.dumps({"seconds": time.perf_counter() - t0, **found}), flush=True)


if __name__ == "__main__":
    main()
