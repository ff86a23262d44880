"""MoTok as one would write it in torch: eager modules, guidance by autograd inside torch's L-BFGS. Its own process.

    python bench/peers/motok_eager.py THREADS fp32|bf16 FOLDER

FOLDER: weights and the draws of one request (bench/motok_case.py). Reads a JSON object per line ({"do": verb, ...}),
answers with {"seconds": ...} and what the verb found. Conv1d, Linear and LayerNorm as the paper draws them; torch's
fused attention, both passes of the planner's guidance as one batch, no padding. Guidance is fp32 in either format.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.motok_case import CASE, FRAMES, IDS, waypoints
from engine.io.checkpoint import SafetensorsFile
from engine.models.motok.config import MoTokConfig
from engine.models.motok.layout import open_source
from engine.models.motok.planner_reference import KEPT, ClipTower, DDMPlanner
from engine.models.motok.schedule import masked_counts
from engine.models.motok.tokenizer_reference import Tokenizer, schedule


def attention(m: Any, x: Tensor, causal: bool = False) -> Tensor:
    qkv = F.linear(x, m.in_proj_weight, m.in_proj_bias).unflatten(-1, (3, m.heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(*qkv.unbind(0), is_causal=causal)
    return m.out_proj(mixed.transpose(1, 2).flatten(2))


class Eager:
    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.c, self.dtype = MoTokConfig.humanml3d(), dtype
        source = open_source(folder)

        def tensor(name: str) -> Tensor:
            return torch.from_numpy(np.array(source.read(name), np.float32))

        def loaded(module: nn.Module, prefix: str) -> Any:
            names = {n.removeprefix(prefix) for n in source.keys()}  # noqa: SIM118 - a Source is no dict
            state = module.state_dict()
            module.load_state_dict({n: tensor(prefix + n) if n in names else state[n] for n in state})
            return module.to(dtype).requires_grad_(False).eval()

        self.tokenizer = loaded(Tokenizer(self.c), "")
        self.ddm, self.clip = loaded(DDMPlanner(self.c), "ddm."), loaded(ClipTower(self.c.clip), "clip.")
        self.mean, self.std = tensor("stats.mean"), tensor("stats.std")
        self.hint_mean, self.hint_std = (tensor(f"stats.hint_{n}").view(-1, 3) for n in ("mean", "std"))
        source.close()
        with SafetensorsFile(folder / CASE) as case:
            draws = {n: torch.from_numpy(np.array(case.read(n))) for n in case.keys()}  # noqa: SIM118
        self.uniforms, self.noise = draws["uniforms"], draws["noise"][None]
        self.coins = [bool(x) for x in draws["coins"]]
        self.tokens = draws["tokens"].long()[None]  # of the engine in fp32
        target, mask = waypoints().target(FRAMES)
        self.target, self.mask = torch.from_numpy(target), torch.from_numpy(mask)[..., None].float()
        self.count = float(3 * self.mask.sum())
        self.steps = schedule(self.c.diffusion)
        self.compiled: Any = None

    # ---- guidance, as InterControl has it
    def positions(self, x: Tensor) -> Tensor:
        """Joints [T, J, 3] of a normalised motion x [T, D] (recover_from_ric of HumanML3D)."""
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
        return torch.cat([torch.stack([px, m[:, 3], pz], -1)[:, None], others], 1)

    def loss(self, x: Tensor) -> Tensor:
        """Mean square of the constrained coordinates."""
        return (self.mask * (self.positions(x) - self.target)).square().sum() / self.count

    def pull(self, x: Tensor, k: int) -> tuple[Tensor, int]:
        g, evals = self.c.guidance, 0
        with torch.inference_mode(False), torch.enable_grad():
            place = x.clone().requires_grad_(True)
            optimizer = torch.optim.LBFGS([place], lr=1, max_iter=g.max_iter, history_size=g.history,
                                          line_search_fn="strong_wolfe")  # fmt: skip

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

    # ---- the stages
    def feature(self) -> Tensor:
        x = self.clip.token_embedding(torch.tensor([IDS])) + self.clip.positional_embedding[: len(IDS)]
        for block in self.clip.transformer.resblocks:
            x = x + attention(block.attn, block.ln_1(x), True)
            x = x + block.mlp(block.ln_2(x))
        return self.clip.ln_final(x[:, -1]) @ self.clip.text_projection

    def hints(self) -> Tensor:
        given = (self.mask * ((self.target - self.hint_mean) / self.hint_std)).view(1, FRAMES, -1)
        return self.ddm.traj_encoder(given.to(self.dtype))

    def plan(self, text: Tensor, traj: Tensor) -> Tensor:
        """Tokens [1, N] in a few passes, the most certain first; both conditions, a coin drops one."""
        c, m, d = self.c, self.ddm, self.c.ddm
        n = traj.shape[1]
        ids = torch.full((n,), m.mask)
        scores = torch.zeros(n)
        first, none = m.cond_emb(text), m.cond_emb(torch.zeros_like(text))
        where = m.position_enc.pe[:n, 0] + traj
        less = m.position_enc.pe[None, :n, 0]
        for i, count in enumerate(masked_counts(n, d.steps)):
            masked = torch.zeros(n, dtype=torch.bool)
            masked[scores.argsort(stable=True)[:count]] = True
            ids = ids.masked_fill(masked, m.mask)
            drop = self.coins[i]
            x = m.input_process.poseEmbedding(m.token_emb(ids)) + torch.cat([where, less if drop else where])
            x = torch.cat([torch.stack([first, first if drop else none]), x], 1)
            for layer in m.seqTransEncoder.layers:
                x = layer.norm1(x + attention(layer.self_attn, x))
                x = layer.norm2(x + layer.linear2(F.gelu(layer.linear1(x))))
            cond, uncond = m.output_process(x[:, 1:]).float().unbind(0)
            logits = uncond + d.cfg * (cond - uncond)
            floor = logits.topk(c.topk).values[:, -1:]
            mass = (logits.masked_fill(logits < floor, -torch.inf) / d.temperature).softmax(-1).cumsum(-1)
            new = (mass <= self.uniforms[i][:, None] * mass[:, -1:]).sum(-1)
            ids = torch.where(masked, new, ids)
            chance = logits.softmax(-1).gather(-1, new[:, None])[:, 0]
            scores = torch.where(masked, chance, KEPT)
        return ids[None]

    def denoise(self, tokens: Tensor, guided: bool, predict: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Any]]:
        """Tokens to a normalised motion [1, T, D]."""
        s, x = self.tokenizer.condition(tokens), self.noise
        evals, spent, denoising = 0, 0.0, 0.0
        for k in reversed(range(len(self.steps.timesteps))):
            t0 = time.perf_counter()
            clean = predict(x.to(self.dtype), self.steps.timesteps[k], s).float()
            t1 = time.perf_counter()
            denoising += t1 - t0
            if guided:
                pulled, n = self.pull(clean[0], k)
                clean, evals = pulled[None], evals + n
                spent += time.perf_counter() - t1
            x = float(self.steps.a[k]) * clean + float(self.steps.b[k]) * x
        return x, {"guidance": spent, "evals": evals, "denoise": denoising / len(self.steps.timesteps)}

    # ---- verbs
    def request(self) -> dict[str, Any]:
        """Text and waypoints to joints; seconds by stage."""
        stages = {}

        def timed(name: str, call: Callable[[], Any]) -> Any:
            t0 = time.perf_counter()
            out = call()
            stages[name] = time.perf_counter() - t0
            return out

        text = timed("text", self.feature)
        traj = timed("trajectory", self.hints)
        tokens = timed("planner", lambda: self.plan(text, traj))
        x, found = timed("decoder", lambda: self.denoise(tokens, True, self.tokenizer.denoiser))
        timed("output", lambda: self.positions(x[0]))
        return {**found, "stages": stages}

    def answer(self) -> dict[str, Any]:
        """What it makes of the request, to be compared: its own tokens; of the engine's tokens the motion without
        guidance, and with it the evaluations and the mean distance to the waypoints."""
        tokens = self.plan(self.feature(), self.hints())[0]
        plain, _ = self.denoise(self.tokens, False, self.tokenizer.denoiser)
        pulled, found = self.denoise(self.tokens, True, self.tokenizer.denoiser)
        far = (self.mask * (self.positions(pulled[0]) - self.target)).norm(dim=-1)
        return {"tokens": tokens.tolist(), "motion": plain[0].tolist(), "evals": found["evals"],
                "metres": float(far.sum() / self.mask.sum())}  # fmt: skip

    def loop(self, compiled: bool = False) -> dict[str, Any]:
        """The denoising loop alone; {"failed": why} where torch.compile fails."""
        predict = self.tokenizer.denoiser
        if compiled:
            if self.compiled is None:
                try:
                    self.compiled = torch.compile(predict)
                    self.denoise(self.tokens, False, self.compiled)
                except Exception as fault:  # torch.compile raises many types
                    self.compiled = None
                    return {"failed": f"{type(fault).__name__}: {str(fault).splitlines()[0][:200]}"}
            predict = self.compiled
        return self.denoise(self.tokens, False, predict)[1]

    def evaluations(self, count: int, solver: bool) -> dict[str, Any]:
        """At least `count` evaluations with their gradient on one thread, bare or inside L-BFGS; seconds of each."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            done, x = 0, self.noise[0]
            with torch.inference_mode(False), torch.enable_grad():
                place = x.clone().requires_grad_(True)
                t0 = time.perf_counter()
                while done < count:
                    if solver:
                        done += self.pull(x, 0)[1]
                        continue
                    place.grad = None
                    self.loss(place).backward()
                    done += 1
                return {"each": (time.perf_counter() - t0) / done}
        finally:
            torch.set_num_threads(threads)

    def matmul(self) -> dict[str, Any]:
        """torch.matmul's best rate of a few square products, GFLOP/s."""
        best = 0.0
        for n in (1024, 2048, 3072):
            a, b = (torch.randn(n, n).to(self.dtype) for _ in range(2))
            for _ in range(4):
                t0 = time.perf_counter()
                a @ b
                best = max(best, 2 * n**3 / (time.perf_counter() - t0) / 1e9)
        return {"gflops": best}


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    peer = Eager(Path(sys.argv[3]), {"fp32": torch.float32, "bf16": torch.bfloat16}[sys.argv[2]])
    print(json.dumps({"seconds": 0}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        verb = command.pop("do")
        with torch.inference_mode():
            t0 = time.perf_counter()
            found = getattr(peer, verb)(**command) or {}
        print(json.dumps({"seconds": time.perf_counter() - t0, **found}), flush=True)


if __name__ == "__main__":
    main()
