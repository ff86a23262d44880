"""Philox 4x32-10: one stream of random numbers with the same bits on every backend (csrc/base/philox.h)."""

from __future__ import annotations

import numpy as np

from engine.ops.checks import Check
from engine.ops.dispatch import call
from engine.ops.registry import Arrays, Case, Op, cases, guarded, register
from engine.runtime.arena import Tensor, as_tensor

KINDS = {"bits": 0, "uniform": 1, "normal": 2}


def rng(out: Tensor, seed: Tensor, offset: Tensor, *, stream: int = 0, kind: str = "normal", label: str = "") -> None:
    """Fills out: u32 bits (as i32), uniform f32 in [0,1) or standard normal f32. seed, offset: u64 [1] in memory."""
    check = Check("rng", label)
    check.one_of("kind", kind, KINDS)
    check.takes("out", out, tuple(out.shape), "i32" if kind == "bits" else "f32")
    check.takes("seed", seed, (1,), "u64")
    check.takes("offset", offset, (1,), "u64")
    call("rng", label, nbytes=out.nbytes, out=out, n=int(np.prod(out.shape)), seed=seed,
         offset=offset, stream=stream, kind=KINDS[kind])  # fmt: skip


def philox_torch(n: int, seed: int, offset: int = 0, stream: int = 0):
    """n 32-bit words as torch int64: the reference of every backend (Salmon et al., SC'11, Philox4x32-10)."""
    import torch

    mask = 0xFFFFFFFF

    def mulhilo(a: int, b):
        # 32x32 -> 64 bit without overflow: split b into halves.
        low = a * (b & 0xFFFF)
        high = a * (b >> 16) + (low >> 16)
        return (high >> 16) & mask, ((high << 16) | (low & 0xFFFF)) & mask

    blocks = (n + 3) // 4
    x = [
        torch.arange(blocks, dtype=torch.int64),
        *(torch.full((blocks,), v & mask, dtype=torch.int64) for v in (offset, offset >> 32, stream)),
    ]
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        h0, l0 = mulhilo(0xD2511F53, x[0])
        h1, l1 = mulhilo(0xCD9E8D57, x[2])
        x = [h1 ^ x[1] ^ k0, l1, h0 ^ x[3] ^ k1, l0]
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return torch.stack(x, 1).reshape(-1)[:n]


def _inputs(c: Case, r: np.random.Generator) -> Arrays:
    return {"seed": r.integers(0, 2**63, 1, dtype=np.uint64), "offset": r.integers(0, 2**40, 1, dtype=np.uint64)}


def _reference(c: Case, a: Arrays) -> Arrays:
    import torch

    n = (c.n + 1) // 2 * 2
    bits = philox_torch(n, int(a["seed"][0]), int(a["offset"][0]), 3)
    if c.draw == "bits":
        out = bits.to(torch.float64)
    elif c.draw == "uniform":
        out = (bits >> 8).double() * 2.0**-24
    else:
        pair = bits.reshape(-1, 2).double()
        radius = (-2 * ((pair[:, 0] + 0.5) * 2.0**-32).log()).sqrt()
        angle = pair[:, 1] * 2.0**-32 * 2 * torch.pi
        out = torch.stack([radius * angle.cos(), radius * angle.sin()], 1).reshape(-1)
    return {"out": out[: c.n].numpy()}


def _run(c: Case, a: Arrays) -> Arrays:
    out = guarded(c.n, dtype="i32" if c.draw == "bits" else "f32")
    rng(as_tensor(out), as_tensor(a["seed"]), as_tensor(a["offset"]), stream=3, kind=c.draw)
    return {"out": out.view(np.uint32) if c.draw == "bits" else out}


def _prepare(c: Case, a: Arrays):
    out = as_tensor(np.zeros(c.n, np.int32 if c.draw == "bits" else np.float32))
    seed, offset = as_tensor(a["seed"]), as_tensor(a["offset"])
    return lambda: rng(out, seed, offset, kind=c.draw)


def _torch(c: Case, a: Arrays):
    import torch

    return (lambda: torch.randn(c.n)) if c.draw == "normal" else (lambda: torch.rand(c.n))


register(
    Op(
        name="rng",
        cases=[
            *cases(
                "tiny",
                *(
                    {"n": n, "draw": k, "dtype": d}
                    for k, d in (("bits", "exact"), ("uniform", "exact"), ("normal", "f32"))
                    for n in (4, 1000)
                ),
            ),
            *cases(
                "odd",
                *(
                    {"n": n, "draw": k, "dtype": d}
                    for k, d in (("bits", "exact"), ("normal", "f32"))
                    for n in (1, 4099, 9001)
                ),
            ),
            *cases("real", {"n": 1 << 20, "draw": "normal", "dtype": "f32"}),
        ],
        inputs=_inputs,
        reference=_reference,
        run=_run,
        prepare=_prepare,
        torch_eager=_torch,
        tolerance={"exact": 0.0, "f32": 1e-7},
        bytes=lambda c: 4 * c.n,
        flops=lambda c: 30 * c.n,
        absent={},
    )
)
