"""Transformer layers with biases, their norms in front (ViT, Dosovitskiy et al. 2021) or behind (BERT, BART)."""

from __future__ import annotations

from dataclasses import dataclass

from engine.ops.attention import KVCache, attention
from engine.ops.gemm import PackedMatrix, gemm
from engine.ops.norm import norm
from engine.runtime.arena import Tensor


@dataclass
class TowerLayer:
    """Weights of one layer: x += out(attention(qkv(norm1(x)))); x += fc2(gelu(fc1(norm2(x)))). In a post-norm layer
    norm1 and norm2 follow those sums.

    With `query`, qkv holds keys and values alone: few tokens have a query.
    """

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
    query: PackedMatrix | None = None
    query_bias: Tensor | None = None


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
    w: TowerLayer, b: TowerBuffers, *, heads: int, eps: float, act: str = "gelu_tanh", label: str = "",
    order: Tensor | None = None, causal: bool = False, live: Tensor | None = None,
) -> None:  # fmt: skip
    """One layer, in place on b.x: five nodes. Every token of a sequence sees all of it, or what is not behind it.

    order: i32 [T], row r of the sequences lies at order[r] of b.x; default: at r. live: i32 [1], tokens of each
    sequence at run time.
    """
    tower_qkv(w, b.x, b.qkv, b.ws, eps, label, live)
    q, k, v = thirds(b.qkv)
    attention(q, k, v, b.cache, b.pos, b.mixed, heads=heads, causal=causal, order=order, rows=live, ws=b.ws,
              label=f"{label}.attention")  # fmt: skip
    tower_rest(w, b, b.x, eps, act, label, live=live)


def post_norm_layer(w: TowerLayer, b: TowerBuffers, *, heads: int, eps: float, act: str, label: str = "") -> None:
    """One layer whose norms lie behind the sums, in place on b.x: seven nodes. Every token sees its whole sequence."""
    gemm(b.x, w.qkv, b.qkv, bias=w.qkv_bias, ws=b.ws, label=f"{label}.qkv")
    q, k, v = thirds(b.qkv)
    attention(q, k, v, b.cache, b.pos, b.mixed, heads=heads, causal=False, ws=b.ws, label=f"{label}.attention")
    gemm(b.mixed, w.out, b.x, bias=w.out_bias, residual=b.x, ws=b.ws, label=f"{label}.out")
    norm(b.x, b.x, weight=w.norm1, bias=w.norm1_bias, eps=eps, label=f"{label}.norm1")
    gemm(b.x, w.fc1, b.hidden, bias=w.fc1_bias, act=act, ws=b.ws, label=f"{label}.fc1")
    gemm(b.hidden, w.fc2, b.x, bias=w.fc2_bias, residual=b.x, ws=b.ws, label=f"{label}.fc2")
    norm(b.x, b.x, weight=w.norm2, bias=w.norm2_bias, eps=eps, label=f"{label}.norm2")


def thirds(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [T, D] of qkv [T, 3D]."""
    d = qkv.shape[1] // 3
    q, k, v = (qkv.columns(i * d, d) for i in range(3))
    return q, k, v


def tower_qkv(
    w: TowerLayer, x: Tensor, qkv: Tensor, ws: Tensor, eps: float, label: str, live: Tensor | None = None
) -> None:
    """Queries, keys and values of x [T, D] into qkv [T, 3D]; where the queries' matrix is apart, the others [T, 2D]."""
    gemm(x, w.qkv, qkv, prologue="layer", norm=w.norm1, norm_bias=w.norm1_bias, eps=eps, bias=w.qkv_bias, rows=live,
         ws=ws, label=f"{label}.qkv")  # fmt: skip


def tower_rest(
    w: TowerLayer, b: TowerBuffers, stream: Tensor, eps: float, act: str, label: str, rows: int | None = None,
    live: Tensor | None = None,
) -> None:  # fmt: skip
    """What follows attention, of the first `rows` tokens: b.x = stream + out(b.mixed); b.x += mlp(b.x)."""
    n = rows or b.x.shape[0]
    x, mixed, hidden, stream = (t.slice(0, (n, t.shape[1])) for t in (b.x, b.mixed, b.hidden, stream))
    gemm(mixed, w.out, x, bias=w.out_bias, residual=stream, rows=live, ws=b.ws, label=f"{label}.out")
    gemm(x, w.fc1, hidden, prologue="layer", norm=w.norm2, norm_bias=w.norm2_bias, eps=eps, bias=w.fc1_bias, act=act,
         rows=live, ws=b.ws, label=f"{label}.fc1")  # fmt: skip
    gemm(hidden, w.fc2, x, bias=w.fc2_bias, residual=x, rows=live, ws=b.ws, label=f"{label}.fc2")
