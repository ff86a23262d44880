"""Decoder layers with RMS norms, rotary grouped-query attention and a gated MLP (LLaMA, Touvron et al. 2023; Qwen2;
Gemma)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.ops.attention import KVCache, attention
from engine.ops.gemm import Modulation, PackedMatrix, gemm
from engine.runtime.arena import Tensor

NODES_PER_LAYER = 5


@dataclass
class DecoderLayer:
    """Weights of one layer: x += o_proj(attention(qkv(rms(x)))); x += down(act(gate(rms(x))) * up(rms(x))).

    norm1, norm2: None where they are folded into the products behind them, or are a modulation. A layer of which
    nothing but keys and values is read has no other matrices, and mostly no queries in qkv.
    """

    qkv: PackedMatrix
    o_proj: PackedMatrix | None
    gate_up: PackedMatrix | None
    down: PackedMatrix | None
    norm1: Tensor | None = None
    norm2: Tensor | None = None
    qkv_bias: Tensor | None = None
    o_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


@dataclass
class DecoderBuffers:
    """Workspace: the stream x [M, D], qkv [M, (heads + 2 kv_heads) * d], mixed [M, heads * d], gate_up [M, 2 mlp]."""

    x: Tensor
    qkv: Tensor
    mixed: Tensor
    gate_up: Tensor
    ws: Tensor

    @staticmethod
    def widths(d: int, heads: int, kv_heads: int, head_dim: int, mlp: int) -> dict[str, int]:
        """Columns of each buffer."""
        q = heads * head_dim
        return {"x": d, "qkv": q + 2 * kv_heads * head_dim, "mixed": q, "gate_up": 2 * mlp}

    def first(self, m: int) -> DecoderBuffers:
        """The same memory, seen as m rows."""
        x, qkv, mixed, gate_up = (t.slice(0, (m, t.shape[1])) for t in (self.x, self.qkv, self.mixed, self.gate_up))
        return DecoderBuffers(x, qkv, mixed, gate_up, self.ws)


@dataclass(frozen=True)
class Modulations:
    """Of an adaptive layer: scale and shift in front of qkv and of gate_up, and gates behind o_proj and down."""

    attention: Modulation
    attention_gate: Modulation
    mlp: Modulation
    mlp_gate: Modulation


def decoder_layer(
    w: DecoderLayer, b: DecoderBuffers, cache: KVCache, pos: Tensor, *, heads: int, eps: float, rope: Tensor,
    act: str = "silu", causal: bool = True, rows: Tensor | None = None, modulations: Modulations | None = None,
    label: str = "",
) -> None:  # fmt: skip
    """One layer, in place on b.x: five nodes, or two where only keys and values are read.

    pos: i32 [batch], tokens that the cache holds already; rope: f32 [ctx, d]; rows: i32 [1], live rows at run time.
    """
    common: dict[str, Any] = {"heads": heads, "causal": causal, "rope": rope, "rows": rows, "ws": b.ws}
    if w.o_proj is None:
        kv = cache.kv_heads * cache.d
        k, v = (b.qkv.columns(heads * cache.d + i * kv, kv) for i in range(2))
        out = b.qkv if w.qkv.n == b.qkv.shape[1] else b.qkv.columns(heads * cache.d, 2 * kv)
        gemm(b.x, w.qkv, out, prologue="rms", norm=w.norm1, eps=eps, bias=w.qkv_bias, rows=rows, ws=b.ws,
             label=f"{label}.kv")  # fmt: skip
        attention(None, k, v, cache, pos, None, label=f"{label}.append", **common)
        return

    def mix(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        attention(q, k, v, cache, pos, out, label=f"{label}.attention", **common)

    gated_layer(w, b, mix, heads * cache.d, eps=eps, act=act, rows=rows, modulations=modulations, label=label)


def gated_layer(
    w: DecoderLayer, b: DecoderBuffers, mix: Callable[[Tensor, Tensor, Tensor, Tensor], None], q: int, *, eps: float,
    act: str = "silu", rows: Tensor | None = None, modulations: Modulations | None = None, label: str = "",
) -> None:  # fmt: skip
    """One layer around whatever `mix` makes of queries [M, q], keys and values, into its last argument [M, q]."""
    assert w.o_proj is not None and w.gate_up is not None and w.down is not None
    ws, mod, kv = b.ws, modulations, (b.qkv.shape[1] - q) // 2
    gemm(b.x, w.qkv, b.qkv, prologue="rms", norm=w.norm1, eps=eps, bias=w.qkv_bias, rows=rows, ws=ws,
         modulation=mod.attention if mod else None, label=f"{label}.qkv")  # fmt: skip
    mix(b.qkv.columns(0, q), b.qkv.columns(q, kv), b.qkv.columns(q + kv, kv), b.mixed)
    gemm(b.mixed, w.o_proj, b.x, bias=w.o_bias, residual=b.x, modulation=mod.attention_gate if mod else None,
         rows=rows, ws=ws, label=f"{label}.o_proj")  # fmt: skip
    gemm(b.x, w.gate_up, b.gate_up, prologue="rms", norm=w.norm2, eps=eps, bias=w.gate_up_bias, rows=rows, ws=ws,
         modulation=mod.mlp if mod else None, label=f"{label}.gate_up")  # fmt: skip
    half = b.gate_up.shape[1] // 2
    gemm(b.gate_up.columns(0, half), w.down, b.x, prologue="glu", gate=b.gate_up.columns(half, half), pro_act=act,
         bias=w.down_bias, residual=b.x, modulation=mod.mlp_gate if mod else None, rows=rows, ws=ws,
         label=f"{label}.down")  # fmt: skip
