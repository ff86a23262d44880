"""One personalisation step of 3DreamBooth as published, with peft: `python hunyuan_peft.py THREADS LAYERS REFERENCES`.

bf16 autocast over bf16 weights; two peft adapters in every adapted layer, both of which run, their scales set around
each stream's call; texts padded to 556 slots in every product; AdamW over both adapters. A line of JSON asks, {"do":
"step"}; a line answers with the seconds. Knows nothing of `engine`.
"""

from __future__ import annotations

import json
import sys
import time

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

WIDTH, HEADS, MLP, CHANNELS, RANK = 2048, 16, 8192, 65, 16
SIDE, SLOTS, VALID = 32, 556, 15  # cells of a photo's side; text slots, and tokens in them


class Stream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mod = nn.Linear(WIDTH, 6 * WIDTH)
        self.q, self.k, self.v, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(WIDTH, MLP), nn.Linear(MLP, WIDTH)
        self.q_norm, self.k_norm = (nn.Parameter(torch.ones(WIDTH // HEADS)) for _ in range(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.img, self.txt = Stream(), Stream()


class Transformer(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.img_in = nn.Linear(CHANNELS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.last_mod, self.last = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 32)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight.to(x.dtype)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    x32 = x.float()
    turned = torch.stack([-x32[..., 1::2], x32[..., ::2]], -1).flatten(-2)
    return (x32 * angles.cos() + turned * angles.sin()).to(x.dtype)


class Training:
    def __init__(self, layers: int, references: int) -> None:
        torch.manual_seed(0)
        with torch.device("meta"):
            model = Transformer(layers)
        self.model = model.to_empty(device="cpu").to(torch.bfloat16)
        for p in self.model.parameters():
            p.data.normal_(0, 0.02)
        for name, streams in (("subject", "img|txt"), ("views", "img")):
            targets = rf"img_in|.*\.({streams})\.(q|k|v|proj|fc1|fc2)"
            inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=32, target_modules=targets), self.model, name)
        self.layers = [m for m in self.model.modules() if isinstance(m, LoraLayer)]
        for layer in self.layers:
            layer.set_adapter([n for n in ("subject", "views") if n in layer.lora_A])
        trained = []
        for name, p in self.model.named_parameters():
            p.requires_grad_("lora_" in name)
            if p.requires_grad:
                p.data = p.data.to(torch.bfloat16)
                trained.append(p)
        self.trained = trained
        self.optimiser = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01)
        n = SIDE * SIDE
        self.photo = torch.randn(1, n, CHANNELS, dtype=torch.bfloat16)
        self.views = [torch.randn(1, n, CHANNELS, dtype=torch.bfloat16) for _ in range(references)]
        self.text = torch.randn(1, SLOTS, WIDTH, dtype=torch.bfloat16)
        self.angles = torch.rand(1, n, 1, WIDTH // HEADS // 2).repeat_interleave(2, -1)
        self.vec, self.still = (torch.randn(1, WIDTH, dtype=torch.bfloat16) for _ in range(2))
        self.target = torch.randn(1, n, 32)

    def use(self, on: str) -> None:
        """Scales around a call, as the published code sets them."""
        for layer in self.layers:
            for name in layer.scaling:
                layer.scaling[name] = 1.0 if name == on else 0.0

    def project(self, w: Stream, x: Tensor, mod: tuple[Tensor, ...], on: str, turn: bool):
        self.use(on)
        y = F.layer_norm(x.float(), (WIDTH,), eps=1e-6) * (1 + mod[1]) + mod[0]
        q, k, v = (f(y).unflatten(-1, (HEADS, -1)) for f in (w.q, w.k, w.v))
        q, k = rms(q, w.q_norm), rms(k, w.k_norm)
        return (rotate(q, self.angles), rotate(k, self.angles), v) if turn else (q, k, v)

    def finish(self, w: Stream, x: Tensor, mixed: Tensor, mod: tuple[Tensor, ...], on: str) -> Tensor:
        self.use(on)
        x = x + w.proj(mixed) * mod[2]
        y = F.layer_norm(x.float(), (WIDTH,), eps=1e-6) * (1 + mod[4]) + mod[3]
        return x + w.fc2(F.gelu(w.fc1(y), approximate="tanh")) * mod[5]

    def forward(self) -> Tensor:
        self.use("subject")
        video, text = self.model.img_in(self.photo), self.text
        self.use("views")
        views = [self.model.img_in(v) for v in self.views]
        for block in self.model.blocks:
            mods = [w.mod(F.silu(v)).float()[:, None].chunk(6, -1)
                    for v, w in ((self.vec, block.img), (self.still, block.img), (self.vec, block.txt))]  # fmt: skip
            parts = [self.project(block.img, video, mods[0], "subject", True)]
            parts += [self.project(block.img, v, mods[1], "views", True) for v in views]
            parts.append(self.project(block.txt, text, mods[2], "subject", False))
            sizes = [p[0].shape[1] for p in parts]
            n = sum(sizes[:-1]) + VALID
            q, k, v = (torch.cat(t, 1)[:, :n].transpose(1, 2) for t in zip(*parts))
            seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            mixed = F.pad(seen, (0, 0, 0, SLOTS - VALID)).split(sizes, 1)
            video = self.finish(block.img, video, mixed[0], mods[0], "subject")
            views = [self.finish(block.img, v, m, mods[1], "views") for v, m in zip(views, mixed[1:-1])]
            text = self.finish(block.txt, text, mixed[-1], mods[2], "subject")
        shift, scale = self.model.last_mod(F.silu(self.vec)).float()[:, None].chunk(2, -1)
        return self.model.last(F.layer_norm(video.float(), (WIDTH,), eps=1e-6) * (1 + scale) + shift)

    def step(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.mse_loss(self.forward().float(), self.target)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.trained if p.grad is not None], 1.0)
        self.optimiser.step()


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    training = Training(int(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps({"seconds": 0}), flush=True)
    for _ in sys.stdin:
        t0 = time.perf_counter()
        training.step()
        print(json.dumps({"seconds": time.perf_counter() - t0}), flush=True)


if __name__ == "__main__":
    main()
