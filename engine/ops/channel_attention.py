"""Attention between the channels of a group, over all tokens (csrc/ops/channel_attention; DaViT, section 3.3)."""

from __future__ import annotations

import numpy as np

from engine.ops.checks import Check
from engine.ops.dispatch import call
from engine.ops.registry import Arrays, Case, Op, cases, guarded, register
from engine.runtime.arena import Tensor, as_tensor

MAX_D = 64


def channel_attention(
    qkv: Tensor, out: Tensor, *, groups: int, batch: int = 1, scale: float | None = None, label: str = ""
) -> None:
    """out [B*N, C] = softmax(scale * q^T k) v per group of C / groups channels (at most 64), summed over the N tokens
    of each of `batch` grids. qkv [B*N, 3*C]: q, k, v side by side, all f32. scale defaults to 1 / sqrt(N).
    """
    check = Check("channel_attention", label)
    check.takes("qkv", qkv, (None, None), strided=True)
    total, width = qkv.shape
    check.need(0 < batch <= total and total % batch == 0, f"{total} rows are not a multiple of {batch} grids")
    if groups < 1 or width % (3 * groups) or width // (3 * groups) > MAX_D:
        check.fail(f"{width} columns are not q, k and v of {groups} groups of at most {MAX_D} channels")
    check.takes("out", out, (total, width // 3), strided=True)
    check.apart("out", out, qkv=qkv)
    tokens = total // batch
    call("channel_attention", label, nbytes=0, qkv=qkv, ldq=qkv.ld, out=out, ldo=out.ld, batch=batch, tokens=tokens,
         groups=groups, d=width // (3 * groups), scale=scale if scale is not None else tokens**-0.5)  # fmt: skip


def _inputs(c: Case, rng: np.random.Generator) -> Arrays:
    # loud: logits whose exponentials overflow unless the largest is taken off
    return {"qkv": c.dims.get("loud", 1) * rng.standard_normal((c.b * c.n, 3 * c.g * c.d)).astype(np.float32)}


def _reference(c: Case, a: Arrays) -> Arrays:
    import torch

    q, k, v = torch.from_numpy(a["qkv"]).double().reshape(c.b, c.n, 3, c.g, c.d).unbind(2)
    s = torch.einsum("bngi,bngj->bgij", q, k) * c.n**-0.5
    return {"out": torch.einsum("bgij,bngj->bngi", s.softmax(-1), v).reshape(c.b * c.n, -1).numpy()}


def _call(c: Case, a: Arrays, out: np.ndarray):
    return lambda: channel_attention(as_tensor(a["qkv"]), as_tensor(out), groups=c.g, batch=c.b)


def _run(c: Case, a: Arrays) -> Arrays:
    out = guarded(c.b * c.n, c.g * c.d)
    _call(c, a, out)()
    return {"out": out}


def _torch(c: Case, a: Arrays):
    import torch

    q, k, v = torch.from_numpy(a["qkv"]).reshape(c.b, c.n, 3, c.g, c.d).permute(2, 0, 3, 4, 1)
    return lambda: (q @ k.transpose(-1, -2) * c.n**-0.5).softmax(-1) @ v


register(
    Op(
        name="channel_attention",
        cases=[
            *cases(
                "tiny",
                {"b": 1, "n": 16, "g": 2, "d": 32},
                {"b": 3, "n": 49, "g": 4, "d": 8},
                {"b": 2, "n": 5, "g": 1, "d": 64},
            ),
            *cases(
                "odd",
                {"b": 1, "n": 1, "g": 3, "d": 5},
                {"b": 2, "n": 100, "g": 2, "d": 33},
                {"b": 1, "n": 40, "g": 1, "d": 16, "loud": 12},
            ),
            *cases("real", {"b": 3, "n": 196, "g": 32, "d": 32}),
        ],
        inputs=_inputs,
        reference=_reference,
        run=_run,
        prepare=lambda c, a: _call(c, a, np.zeros((c.b * c.n, c.g * c.d), np.float32)),
        torch_eager=_torch,
        tolerance={"f32": 2e-6},
        bytes=lambda c: 16 * c.b * c.n * c.g * c.d,
        flops=lambda c: 4 * c.b * c.n * c.g * c.d * c.d,
        absent={"triton": "32 x 32 logits per group: a block of threads holds them"},
    )
)  # fmt: skip
