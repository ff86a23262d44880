"""Kernels of other libraries as opponents of bench/gpu.py, where they are installed. They may do less work than the op;
what is left out is said here, in their favour."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from engine.ops.registry import Arrays, Case, Op


def peers(op: Op, case: Case, arrays: Arrays) -> dict[str, Callable[[], Any]]:
    """Calls by library; one that is missing or refuses the shape is left out, with a line on stderr."""
    out: dict[str, Callable[[], Any]] = {}
    for name, make in PEERS.get(op.name, {}).items():
        try:
            call = make(case)
            call()
            out[name] = call
        except ImportError:
            continue
        except Exception as fault:  # other people's code raises many types
            print(f"  {name}: {type(fault).__name__}: {str(fault).splitlines()[:1]}", file=sys.stderr)
    return out


def _flashinfer(c: Case) -> Callable[[], Any]:
    """bf16 attention over a contiguous cache; without the append."""
    import flashinfer
    import torch

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")

    k, v = normal(c.past + c.t, c.kv, c.d), normal(c.past + c.t, c.kv, c.d)
    q = normal(c.t, c.h, c.d)
    if c.t == 1:
        return lambda: flashinfer.single_decode_with_kv_cache(q[0], k, v)
    return lambda: flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True)


def _fla(c: Case) -> Callable[[], Any]:
    """The scan alone, in bf16: decay and input are given; without convolution, softplus and the skip."""
    import torch
    from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(1, c.t, *shape, dtype=torch.bfloat16, device="cuda")

    q, k, v = normal(c.h, c.n), normal(c.h, c.n), normal(c.h, c.p)
    g = -torch.rand(1, c.t, c.h, device="cuda")
    scan = fused_recurrent_simple_gla if c.t == 1 else chunk_simple_gla
    return lambda: scan(q, k, v, g, scale=1.0)


def _vllm(c: Case) -> Callable[[], Any]:
    """The routed experts in bf16, gated by SiLU as vllm has them: half of the up-projection's width each."""
    import torch
    from vllm.model_executor.layers.fused_moe import fused_experts

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device="cuda") / shape[-1] ** 0.5

    inner = c.i // 2
    x, up, down = normal(c.t, c.d), normal(c.e, 2 * inner, c.d), normal(c.e, c.d, inner)
    weights, ids = torch.rand(c.t, c.e, device="cuda").topk(c.k)
    return lambda: fused_experts(x, up, down, weights, ids.to(torch.int32))


PEERS: dict[str, dict[str, Callable[[Case], Callable[[], Any]]]] = {
    "attention": {"flashinfer": _flashinfer},
    "ssm": {"fla": _fla},
    "moe": {"vllm": _vllm},
}
