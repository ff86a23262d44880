"""Causal grouped-query attention with an appended, packed KV cache (csrc/ops/attention)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from engine import _C
from engine.errors import InputError
from engine.ops.checks import Check
from engine.ops.dispatch import call, many_rows
from engine.ops.gemm import FORMATS, power_of_two
from engine.ops.registry import Arrays, Case, GuardedArena, Op, cases, guarded, register
from engine.runtime.arena import Arena, Tensor, as_tensor
from engine.runtime.program import Program

MAX_D = 1024  # a task keeps its rows of q and out in per-thread scratch


@dataclass(frozen=True)
class KVCache:
    """K and V of one layer as packed panels; `ctx` positions, a multiple of 16."""

    k: Tensor
    v: Tensor
    kv_heads: int
    d: int
    ctx: int
    format: str

    @staticmethod
    def nbytes(kv_heads: int, d: int, ctx: int, format: str) -> tuple[int, int]:
        k = kv_heads * (ctx // 16) * _C.gemm_panel_bytes(FORMATS[format], d, 1)
        v = kv_heads * math.ceil(d / 16) * _C.gemm_panel_bytes(FORMATS[format], ctx, 1)
        return k, v

    @staticmethod
    def empty(arena: Arena, name: str, kv_heads: int, d: int, ctx: int, format: str) -> KVCache:
        if format not in ("f32", "bf16") or ctx % 16 or ctx < 16:
            raise InputError(f"KV cache {name!r}: format {format!r} must be f32 or bf16 and ctx {ctx} a multiple of 16")
        k, v = KVCache.nbytes(kv_heads, d, ctx, format)
        return KVCache(
            arena.alloc(f"{name}.k", (k,), "u8", "kv"),
            arena.alloc(f"{name}.v", (v,), "u8", "kv"),
            kv_heads,
            d,
            ctx,
            format,
        )

    def fits(self, check: Check) -> None:
        """InputError unless the buffers hold what the fields say."""
        check.one_of("the format of cache", self.format, ("f32", "bf16"))
        if min(self.kv_heads, self.d, self.ctx) < 1 or self.ctx % 16:
            check.fail(f"cache has {self.kv_heads} heads of {self.d} and ctx {self.ctx}; ctx must be a multiple of 16")
        k, v = KVCache.nbytes(self.kv_heads, self.d, self.ctx, self.format)
        check.takes("cache.k", self.k, (k,), "u8")
        check.takes("cache.v", self.v, (v,), "u8")


def workspace_bytes(m: int, heads: int, d: int, ctx: int) -> int:
    return _C.attention_workspace(m, heads, d, ctx)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: KVCache,
    pos: Tensor,
    out: Tensor,
    *,
    heads: int,
    scale: float | None = None,
    rows: Tensor | None = None,
    ws: Tensor,
    label: str = "",
) -> None:
    """Appends k, v [T, kv_heads*d] at position pos (i32 [1], in memory), then out [T, heads*d] = attention of q.

    All f32. scale defaults to 1/sqrt(d). rows (i32 [1]) replaces T. ws: workspace_bytes(). pos + T beyond ctx writes
    nothing: the caller bounds the context.
    """
    check, d = Check("attention", label), cache.d
    cache.fits(check)
    check.need(d <= MAX_D, f"heads are {d} wide; the limit is {MAX_D}")
    if heads < 1 or heads % cache.kv_heads:
        check.fail(f"{heads} heads are not a multiple of {cache.kv_heads} kv heads")
    check.takes("q", q, (None, heads * d), strided=True)
    t = q.shape[0]
    check.takes("k", k, (t, cache.kv_heads * d), strided=True)
    check.takes("v", v, (t, cache.kv_heads * d), strided=True)
    check.need(k.ld == v.ld, f"rows of k lie {k.ld} apart and rows of v {v.ld}; they must be the same")
    check.takes("pos", pos, (1,), "i32")
    check.takes("out", out, (t, heads * d), strided=True)
    check.may_take("rows", rows, (1,), "i32")
    check.room(ws, workspace_bytes(t, heads, d, cache.ctx))
    factor = scale if scale is not None else d**-0.5

    def programs() -> list[Program]:
        share, size = heads // cache.kv_heads, 4 if cache.format == "f32" else 2
        k_panel, v_panel = (_C.gemm_panel_bytes(FORMATS[cache.format], n, 1) for n in (d, cache.ctx))
        common = {"CTX": cache.ctx, "D": d, "FORMAT": FORMATS[cache.format]}
        bd = max(16, power_of_two(d))
        write = Program(
            "attention.append",
            (-(-t // 16), cache.kv_heads, 1),
            {"k": k, "v": v, "k_cache": cache.k, "v_cache": cache.v, "pos": pos, "live": rows, "m": t, "ldkv": k.ld},
            {**common, "K_PANEL": k_panel // size, "V_PANEL": v_panel // size, "BT": 16, "BD": bd},
        )
        if cache.format == "f32":  # products in fp32 hold their whole depth in registers: short slices
            wide = bd > 64
            blocks, warps, stages = {"BM": 16 if wide else 32, "BN": 32 if wide else 64, "BK": min(32, bd)}, 4, 1
        elif bd <= 128:
            bm = max(16, min(64, power_of_two(t * share)))
            blocks, warps, stages = {"BM": bm, "BN": 64, "BK": bd}, 4, 2
        else:
            blocks, warps, stages = {"BM": 16, "BN": 32, "BK": 64}, 4 if bd <= 256 else 8, 1
        read = Program(
            "attention.causal",
            (-(-t * share // blocks["BM"]), cache.kv_heads, 1),
            {"q": q, "k_cache": cache.k, "v_cache": cache.v, "pos": pos, "out": out, "live": rows, "m": t,
             "ldq": q.ld, "ldo": out.ld, "scale": float(factor)},
            {**common, "SHARE": share, "K_PANEL": k_panel // 4, "V_PANEL": v_panel // 4, "BD": bd, **blocks},
            warps,
            stages,
        )  # fmt: skip
        return [write, read]

    call("attention", label, nbytes=0, programs=programs if many_rows(t) else None, q=q, k=k, v=v, ldq=q.ld, ldkv=k.ld,
         k_cache=cache.k, v_cache=cache.v, format=FORMATS[cache.format], ctx=cache.ctx,
         pos=pos, out=out, ldo=out.ld, ws=ws, rows=rows, m=t,
         heads=heads, kv_heads=cache.kv_heads, d=d, scale=factor)  # fmt: skip


# ---------------------------------------------------------------------------------------------------- contract


def _inputs(c: Case, rng: np.random.Generator) -> Arrays:
    n = c.past + c.t
    f = np.float32
    return {
        "q": rng.standard_normal((n, c.h * c.d)).astype(f),
        "k": rng.standard_normal((n, c.kv * c.d)).astype(f),
        "v": rng.standard_normal((n, c.kv * c.d)).astype(f),
    }


def _heads(c: Case, a: Arrays):
    import torch

    n = c.past + c.t
    q, k, v = (torch.from_numpy(a[x]).reshape(n, -1, c.d).transpose(0, 1) for x in "qkv")
    return q[:, c.past :], k, v


def _reference(c: Case, a: Arrays) -> Arrays:
    import torch

    q, k, v = _heads(c, a)
    if c.dtype == "bf16":  # operands as the kernel rounds them
        q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    q, k, v = q.double(), k.double().repeat_interleave(c.h // c.kv, 0), v.double().repeat_interleave(c.h // c.kv, 0)
    s = q @ k.transpose(1, 2) * c.d**-0.5
    mask = torch.arange(c.past + c.t)[None, :] > torch.arange(c.past, c.past + c.t)[:, None]
    o = s.masked_fill(mask, float("-inf")).softmax(-1) @ v
    return {"out": o.transpose(0, 1).reshape(c.t, -1).numpy()}


def _call(c: Case, a: Arrays, out: np.ndarray):
    arena = GuardedArena()
    ctx = (c.past + c.t + 15) // 16 * 16
    cache = KVCache.empty(arena, "kv", c.kv, c.d, ctx, c.dtype)
    for part in (cache.k, cache.v):  # what was never appended must not be read
        part.numpy()[...] = 0xFF
    pos = arena.alloc("pos", (1,), "i32", "io")
    ws = arena.alloc("ws", (workspace_bytes(c.past + c.t, c.h, c.d, ctx),), "u8")
    t = {k: as_tensor(v) for k, v in a.items()}

    def run(start: int, count: int, dst: Tensor) -> None:
        q, k, v = (t[x].slice(start * t[x].shape[1], (count, t[x].shape[1])) for x in "qkv")
        pos.numpy()[0] = start
        attention(q, k, v, cache, pos, dst, heads=c.h, ws=ws)

    done = 0
    while done < c.past:  # in uneven pieces, so that appends start at every offset
        n = min(c.past - done, 37)
        run(done, n, as_tensor(np.zeros((n, c.h * c.d), np.float32)))
        done += n
    dst = as_tensor(out)
    return lambda: run(c.past, c.t, dst)


def _run(c: Case, a: Arrays) -> Arrays:
    out = guarded(c.t, c.h * c.d)
    _call(c, a, out)()
    return {"out": out}


def _torch(c: Case, a: Arrays):
    import torch

    q, k, v = (x[None].to(torch.float32 if c.dtype == "f32" else torch.bfloat16) for x in _heads(c, a))
    mask = torch.arange(c.past + c.t)[None, :] <= torch.arange(c.past, c.past + c.t)[:, None]
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def _flops(c: Case) -> int:
    return 4 * c.h * c.d * sum(c.past + t + 1 for t in range(c.t))


register(
    Op(
        name="attention",
        cases=[
            *cases(
                "tiny",
                *(
                    {"t": t, "past": p, "h": 8, "kv": 2, "d": 16, "dtype": f}
                    for f in ("f32", "bf16")
                    for t, p in ((1, 0), (1, 5), (3, 0), (16, 0), (33, 40), (5, 129))
                ),
            ),
            *cases(
                "odd",
                *(
                    {"t": t, "past": p, "h": h, "kv": kv, "d": d, "dtype": f}
                    for f in ("f32", "bf16")
                    for t, p, h, kv, d in (
                        (2, 3, 3, 1, 13),
                        (1, 2100, 4, 2, 20),
                        (131, 7, 6, 3, 12),
                        (4, 1023, 2, 2, 40),
                    )
                ),
            ),
            *cases(
                "real",
                *({"t": t, "past": p, "h": 32, "kv": 2, "d": 128, "dtype": "bf16"} for t, p in ((1, 1024), (512, 0))),
            ),
        ],
        inputs=_inputs,
        reference=_reference,
        run=_run,
        prepare=lambda c, a: _call(c, a, np.zeros((c.t, c.h * c.d), np.float32)),
        torch_eager=_torch,
        # bf16: probabilities are rounded to bf16 before the product with V
        tolerance={"f32": 5e-6, "bf16": 3e-3},
        bytes=lambda c: (2 if c.dtype == "bf16" else 4) * 2 * c.kv * c.d * (c.past + c.t) + 8 * c.t * c.h * c.d,
        flops=_flops,
    )
)
