"""Pre-norm transformer layers with biases (ViT, Dosovitskiy et al. 2021): vision towers and policy transformers."""

from __future__ import annotations

from dataclasses import dataclass

from engine.ops.attention import KVCache, attention
from engine.ops.gemm import PackedMatrix, gemm
from engine.runtime.arena import Tensor


@dataclass
class TowerLayer:
    """Weights of one layer: x += out(attention(qkv(norm1(x)))); x += fc2(gelu(fc1(norm2(x))))."""

    norm1: Tensor
    norm1_bias: Tensor
    qkv: PackedMatrix
    qkv_bias: Tensor
    out: PackedMatrix
    out_bias: Tensor
    norm2: Tensor
    norm2_bias: Tensor
    fc1: PackedMatrix
    fc1_bias: Tensor
    fc2: PackedMatrix
    fc2_bias: Tensor


@dataclass
class TowerBuffers:
    """x [T, D] of `cache.batch` equal sequences; qkv [T, 3D], mixed [T, D], hidden [T, mlp]; pos i32 [batch] zeros."""

    x: Tensor
    qkv: Tensor
    mixed: Tensor
    hidden: Tensor
    cache: KVCache
    pos: Tensor
    ws: Tensor


def tower_layer(
    w: TowerLayer, b: TowerBuffers, *, heads: int, eps: float, act: str = "gelu_tanh", label: str = "", last: int = 0
) -> None:
    """One layer, in place on b.x: five nodes. Every token of a sequence sees all of it.

    last: of a single sequence, only the first `last` tokens are wanted: the others only give their keys and values.
    """
    d = w.norm1.shape[0]
    norm1 = {"prologue": "layer", "norm": w.norm1, "norm_bias": w.norm1_bias, "eps": eps, "ws": b.ws}
    gemm(b.x, w.qkv, b.qkv, bias=w.qkv_bias, label=f"{label}.qkv", **norm1)  # type: ignore[arg-type]
    q, k, v = (b.qkv.columns(i * d, d) for i in range(3))
    attention(q, k, v, b.cache, b.pos, b.mixed, heads=heads, causal=False, ws=b.ws, label=f"{label}.attention")
    x, mixed, hidden = b.x, b.mixed, b.hidden
    if last:
        x, mixed, hidden = (t.slice(0, (last, t.shape[1])) for t in (x, mixed, hidden))
    gemm(mixed, w.out, x, bias=w.out_bias, residual=x, ws=b.ws, label=f"{label}.out")
    gemm(x, w.fc1, hidden, prologue="layer", norm=w.norm2, norm_bias=w.norm2_bias, eps=eps, bias=w.fc1_bias, act=act,
         ws=b.ws, label=f"{label}.fc1")  # fmt: skip
    gemm(hidden, w.fc2, x, bias=w.fc2_bias, residual=x, ws=b.ws, label=f"{label}.fc2")
