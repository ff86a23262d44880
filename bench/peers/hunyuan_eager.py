"""HunyuanVideo-1.5 with 3DreamBooth's reference branch as published, in plain torch: bf16, adapters beside the weights.

python hunyuan_eager.py THREADS LAYERS FRAMES ROWS COLUMNS REFERENCES RANK

As the published code runs it: both rows of guidance as one batch, texts padded to 1,985 slots in every product, both
adapters multiplied in every adapted layer whatever their scale, LayerNorm, modulation and RoPE in fp32. Attention sees
valid tokens only, row by row, as a kernel for ragged batches does. A line of JSON asks, {"do": "step" | "sdpa" |
"linear"}; a line answers with the seconds. Knows nothing of `engine`.
"""

from __future__ import annotations

import json
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, MLP, SLOTS, CHANNELS = 2048, 16, 8192, 1985, 65
VALID = (40, 60)  # tokens of the negative and the positive prompt


def matrix(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns, dtype=torch.bfloat16) / columns**0.5, requires_grad=False)


class Adapted:
    """A product with low-rank changes beside it, all of which run."""

    def __init__(self, rows: int, columns: int, rank: int, names: tuple[str, ...]) -> None:
        self.w, self.b = matrix(rows, columns), torch.zeros(rows, dtype=torch.bfloat16)
        self.low = {n: (matrix(rank, columns), matrix(rows, rank)) for n in names}

    def __call__(self, x: Tensor, on: str) -> Tensor:
        out = F.linear(x, self.w, self.b)
        for name, (a, b) in self.low.items():
            out = out + F.linear(F.linear(x, a), b) * (1.0 if name == on else 0.0)
        return out


class Stream:
    """Weights of the image side or of the text side of a block."""

    def __init__(self, rank: int, names: tuple[str, ...]) -> None:
        d = WIDTH
        self.mod = matrix(6 * d, d)
        self.q, self.k, self.v, self.out = (Adapted(d, d, rank, names) for _ in range(4))
        self.fc1, self.fc2 = Adapted(MLP, d, rank, names), Adapted(d, MLP, rank, names)
        self.norm = torch.ones(d // HEADS)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, L, H, dh], neighbouring channels a pair."""
    x32 = x.float()
    turned = torch.stack([-x32[..., 1::2], x32[..., ::2]], -1).flatten(-2)
    return (x32 * cos + turned * sin).to(x.dtype)


class Slice:
    def __init__(self, layers: int, frames: int, rows: int, columns: int, references: int, rank: int) -> None:
        torch.manual_seed(0)
        both, own = ("subject", "views"), ("subject",)
        self.embed = Adapted(WIDTH, CHANNELS, rank, both)
        self.blocks = [(Stream(rank, both), Stream(rank, own)) for _ in range(layers)]
        self.last_mod, self.last = matrix(2 * WIDTH, WIDTH), matrix(32, WIDTH)
        self.video, self.cells = frames * rows * columns, rows * columns
        self.refs = references * self.cells
        self.latent = torch.randn(2, self.video, CHANNELS, dtype=torch.bfloat16)
        self.views = torch.randn(2, self.refs, CHANNELS, dtype=torch.bfloat16)
        self.text = torch.randn(2, SLOTS, WIDTH, dtype=torch.bfloat16)
        angles = torch.rand(1, self.video + self.refs, 1, WIDTH // HEADS // 2).repeat_interleave(2, -1)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.vec, self.still = (torch.randn(2, WIDTH, dtype=torch.bfloat16) for _ in range(2))

    def project(self, w: Stream, x: Tensor, mod: tuple[Tensor, ...], on: str, angles: slice | None):
        y = (F.layer_norm(x.float(), (WIDTH,), eps=1e-6) * (1 + mod[1]) + mod[0]).to(torch.bfloat16)
        q, k, v = (f(y, on).unflatten(-1, (HEADS, -1)) for f in (w.q, w.k, w.v))
        q, k = rms(q, w.norm), rms(k, w.norm)
        if angles is not None:
            q, k = (rotate(t, self.cos[:, angles], self.sin[:, angles]) for t in (q, k))
        return q, k, v

    def finish(self, w: Stream, x: Tensor, mixed: Tensor, mod: tuple[Tensor, ...], on: str) -> Tensor:
        x = x + w.out(mixed, on) * mod[2].to(x.dtype)
        y = (F.layer_norm(x.float(), (WIDTH,), eps=1e-6) * (1 + mod[4]) + mod[3]).to(torch.bfloat16)
        return x + w.fc2(F.gelu(w.fc1(y, on), approximate="tanh"), on) * mod[5].to(x.dtype)

    def attend(self, parts: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        """Over the valid tokens of each row, back into padded streams."""
        sizes = [p[0].shape[1] for p in parts]
        q, k, v = (torch.cat(t, 1) for t in zip(*parts))
        out = torch.zeros_like(q)
        for row, valid in enumerate(VALID):
            n = sum(sizes[:-1]) + valid
            one = (t[row : row + 1, :n].transpose(1, 2) for t in (q, k, v))
            out[row, :n] = F.scaled_dot_product_attention(*one)[0].transpose(0, 1)
        return list(out.flatten(2).split(sizes, 1))

    def step(self) -> Tensor:
        video, text = self.embed(self.latent, "subject"), self.text
        views = self.embed(self.views, "views") if self.refs else None
        here, there = slice(0, self.video), slice(self.video, self.video + self.refs)
        for image, words in self.blocks:
            mods = [F.linear(F.silu(v), w.mod).float()[:, None].chunk(6, -1)
                    for v, w in ((self.vec, image), (self.still, image), (self.vec, words))]  # fmt: skip
            parts = [self.project(image, video, mods[0], "subject", here)]
            if views is not None:
                parts.append(self.project(image, views, mods[1], "views", there))
            parts.append(self.project(words, text, mods[2], "", None))
            mixed = self.attend(parts)
            video = self.finish(image, video, mixed[0], mods[0], "subject")
            if views is not None:
                views = self.finish(image, views, mixed[1], mods[1], "views")
            text = self.finish(words, text, mixed[-1], mods[2], "")
        shift, scale = F.linear(F.silu(self.vec), self.last_mod).float()[:, None].chunk(2, -1)
        y = (F.layer_norm(video.float(), (WIDTH,), eps=1e-6) * (1 + scale) + shift).to(torch.bfloat16)
        without, with_ = F.linear(y, self.last).float()
        return without + 6.0 * (with_ - without)

    def sdpa(self) -> Tensor:
        n = self.video + self.refs + VALID[1]
        q, k, v = torch.randn(3, 1, HEADS, n, WIDTH // HEADS, dtype=torch.bfloat16)
        t0 = time.perf_counter()
        F.scaled_dot_product_attention(q, k, v)
        self.took = time.perf_counter() - t0
        return q

    def linear(self) -> None:
        w = self.blocks[0][0].fc1.w
        x = torch.randn(self.video + self.refs, WIDTH, dtype=torch.bfloat16)
        t0 = time.perf_counter()
        F.linear(x, w)
        self.took = time.perf_counter() - t0


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    model = Slice(*(int(n) for n in sys.argv[2:]))
    print(json.dumps({"seconds": 0}), flush=True)
    for line in sys.stdin:
        verb = json.loads(line)["do"]
        model.took = 0.0
        with torch.inference_mode():
            t0 = time.perf_counter()
            getattr(model, verb)()
            whole = time.perf_counter() - t0
        print(json.dumps({"seconds": model.took or whole}), flush=True)


if __name__ == "__main__":
    main()
