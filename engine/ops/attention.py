"""Grouped-query attention with an appended, packed KV cache; causal or full, rotary or not (csrc/ops/attention)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

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
    """K and V of one layer as packed panels; `ctx` positions, a multiple of 16, of `batch` sequences."""

    k: Tensor
    v: Tensor
    kv_heads: int
    d: int
    ctx: int
    format: str
    batch: int = 1

    @staticmethod
    def nbytes(kv_heads: int, d: int, ctx: int, format: str) -> tuple[int, int]:
        k = kv_heads * (ctx // 16) * _C.gemm_panel_bytes(FORMATS[format], d, 1)
        v = kv_heads * math.ceil(d / 16) * _C.gemm_panel_bytes(FORMATS[format], ctx, 1)
        return k, v

    @staticmethod
    def empty(
        arena: Arena, name: str, kv_heads: int, d: int, ctx: int, format: str, batch: int = 1, part: str = "kv"
    ) -> KVCache:
        if format not in ("f32", "bf16") or ctx % 16 or ctx < 16:
            raise InputError(f"KV cache {name!r}: format {format!r} must be f32 or bf16 and ctx {ctx} a multiple of 16")
        k, v = KVCache.nbytes(kv_heads, d, ctx, format)
        return KVCache(
            arena.alloc(f"{name}.k", (k * batch,), "u8", part),
            arena.alloc(f"{name}.v", (v * batch,), "u8", part),
            kv_heads,
            d,
            ctx,
            format,
            batch,
        )

    def sequences(self, start: int, count: int) -> KVCache:
        """Some of the sequences, in the same memory."""
        k, v = self.k.nbytes // self.batch, self.v.nbytes // self.batch
        return replace(
            self, k=self.k.slice(start * k, (count * k,)), v=self.v.slice(start * v, (count * v,)), batch=count
        )

    def first(self, count: int) -> KVCache:
        return self.sequences(0, count)

    def fits(self, check: Check) -> None:
        """InputError unless the buffers hold what the fields say."""
        check.one_of("the format of cache", self.format, ("f32", "bf16"))
        if min(self.kv_heads, self.d, self.ctx, self.batch) < 1 or self.ctx % 16:
            check.fail(f"cache has {self.kv_heads} heads of {self.d} and ctx {self.ctx}; ctx must be a multiple of 16")
        k, v = KVCache.nbytes(self.kv_heads, self.d, self.ctx, self.format)
        check.takes("cache.k", self.k, (k * self.batch,), "u8")
        check.takes("cache.v", self.v, (v * self.batch,), "u8")


@dataclass(frozen=True)
class Pads:
    """One more key and value [kv_heads*d] that sequence b sees count[b] (i32 [batch]) times: what zero rows of a padded
    window would add (their keys are all the projection's bias)."""

    k: Tensor
    v: Tensor
    count: Tensor


def rope_table(positions: np.ndarray, d: int, theta: float = 10000.0) -> np.ndarray:
    """f32 [P, d]: cosines, then sines, of position * theta^(-2i/d), i < d/2 (RoFormer, Su et al. 2021, section 3.2)."""
    angles = np.asarray(positions, np.float64)[:, None] * theta ** (-np.arange(0, d, 2, dtype=np.float64) / d)
    return np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32)


def workspace_bytes(m: int, heads: int, d: int, ctx: int) -> int:
    return _C.attention_workspace(m, heads, d, ctx)


def attention(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    cache: KVCache,
    pos: Tensor,
    out: Tensor | None,
    *,
    heads: int,
    scale: float | None = None,
    rows: Tensor | None = None,
    ws: Tensor,
    label: str = "",
    causal: bool = True,
    rope: Tensor | None = None,
    offsets: Tensor | None = None,
    longest: int | None = None,
    order: Tensor | None = None,
    pads: Pads | None = None,
    queries: int | None = None,
) -> None:
    """Appends k, v [T, kv_heads*d] at position pos (i32 [batch], in memory), then out [T, heads*d] = attention of q.

    All f32. scale defaults to 1/sqrt(d). rows (i32 [1]) replaces the rows of each sequence. ws: workspace_bytes().
    pos + rows beyond ctx writes nothing: the caller bounds the context.
    A cache of `batch` sequences takes T / batch rows of each, one sequence after the other; or, with offsets (i32
    [batch+1]), rows offsets[b]..offsets[b+1], at most `longest`. order (i32 [T]): row r lies at order[r] of q, k,
    v and out. Without q and out, k and v are only appended; without k and v, every row of q sees the pos positions (one
    at least) that the cache holds (causal=False, no rope). causal=False: every row sees all of its sequence. rope f32
    [ctx, d] (rope_table) turns q and k by their positions. queries: only the first that many rows of a sequence ask;
    rows of out behind them are left alone.
    """
    check, d = Check("attention", label), cache.d
    cache.fits(check)
    check.need(d <= MAX_D, f"heads are {d} wide; the limit is {MAX_D}")
    if heads < 1 or heads % cache.kv_heads:
        check.fail(f"{heads} heads are not a multiple of {cache.kv_heads} kv heads")
    check.need((q is None) == (out is None), "q and out belong together; without both, k and v are only appended")
    check.need((k is None) == (v is None), "k and v belong together; without both, q reads the cache as it is")
    if k is not None and v is not None:
        check.takes("k", k, (None, cache.kv_heads * d), strided=True)
        check.takes("v", v, (k.shape[0], cache.kv_heads * d), strided=True)
        check.need(k.ld == v.ld, f"rows of k lie {k.ld} apart and rows of v {v.ld}; they must be the same")
        t = k.shape[0]
    else:
        check.may_take("q", q, (None, heads * d), strided=True)
        check.need(q is not None, "neither q nor k is given")
        check.need(not causal and rope is None, "without k and v, rows have no positions: causal=False and no rope")
        t = q.shape[0] if q is not None else 0
    check.may_take("q", q, (t, heads * d), strided=True)
    batch = cache.batch
    check.takes("pos", pos, (batch,), "i32")
    check.may_take("out", out, (t, heads * d), strided=True)
    check.may_take("rows", rows, (1,), "i32")
    check.may_take("offsets", offsets, (batch + 1,), "i32")
    check.may_take("order", order, (t,), "i32")
    check.may_take("rope", rope, (cache.ctx, d))
    check.need((offsets is None) == (longest is None), "offsets and longest belong together")
    check.need(longest is None or 0 < longest <= cache.ctx, f"longest={longest} does not fit ctx = {cache.ctx}")
    check.need(offsets is None or rows is None, "rows and offsets exclude each other")
    check.need(offsets is not None or t % batch == 0, f"{t} rows are not a multiple of {batch} sequences")
    check.need(rope is None or d % 2 == 0, f"rope turns pairs of channels; heads are {d} wide")
    if pads is not None:
        check.takes("pads.k", pads.k, (cache.kv_heads * d,))
        check.takes("pads.v", pads.v, (cache.kv_heads * d,))
        check.takes("pads.count", pads.count, (batch,), "i32")
        check.need(rope is None, "pads and rope exclude each other: the extra key has no position")
    m = longest if longest is not None else t // batch
    check.need(queries is None or 0 < queries <= max(m, 1), f"queries={queries} of at most {m} rows")
    asked = m if queries is None else queries
    check.room(ws, workspace_bytes(m, heads, d, cache.ctx))
    factor = scale if scale is not None else d**-0.5
    # The C++ kernel of few rows knows what decoding needs; the rest runs as programs for any number of rows.
    plain = (
        causal
        and q is not None
        and batch == 1
        and queries is None
        and all(x is None for x in (rope, offsets, order, pads))
    )

    def programs() -> list[Program]:
        share, size = heads // cache.kv_heads, 4 if cache.format == "f32" else 2
        k_panel, v_panel = (_C.gemm_panel_bytes(FORMATS[cache.format], n, 1) for n in (d, cache.ctx))
        common = {"CTX": cache.ctx, "D": d, "FORMAT": FORMATS[cache.format]}
        where = {"pos": pos, "live": rows, "m": m, "offsets": offsets, "order": order, "rope": rope}
        bd = max(16, power_of_two(d))
        write = [] if k is None else [Program(
            "attention.append",
            (-(-m // 16), cache.kv_heads, batch),
            {"k": k, "v": v, "k_cache": cache.k, "v_cache": cache.v, "ldkv": k.ld, **where},
            {**common, "K_PANEL": k_panel // size, "V_PANEL": v_panel // size, "BT": 16, "BD": bd},
        )]  # fmt: skip
        if q is None or out is None:
            return write
        if cache.format == "f32":  # products in fp32 hold their whole depth in registers: short slices
            wide = bd >= 64  # 64 in registers spill on sm_80
            blocks, warps, stages = {"BM": 16 if wide else 32, "BN": 32 if wide else 64, "BK": min(32, bd)}, 4, 1
        elif bd <= 128:
            bm = max(16, min(64, power_of_two(asked * share)))
            blocks, warps, stages = {"BM": bm, "BN": 64, "BK": bd}, 4, 2
        else:
            blocks, warps, stages = {"BM": 16, "BN": 32, "BK": 64}, 4 if bd <= 256 else 8, 1
        read = Program(
            "attention.attend",
            (-(-asked * share // blocks["BM"]), cache.kv_heads, batch),
            {"q": q, "k_cache": cache.k, "v_cache": cache.v, "out": out, "ldq": q.ld, "ldo": out.ld,
             "scale": float(factor), "pad_k": pads.k if pads else None, "pad_v": pads.v if pads else None,
             "pads": pads.count if pads else None, "queries": asked, **where},
            {**common, "SHARE": share, "K_PANEL": k_panel // 4, "V_PANEL": v_panel // 4, "CAUSAL": int(causal),
             "APPENDED": int(k is not None), "BD": bd, **blocks},
            warps,
            stages,
        )  # fmt: skip
        return [*write, read]

    call("attention", label, nbytes=0, programs=programs if many_rows(t) or not plain else None, q=q, k=k,
         v=v, ldq=q.ld if q else 0, ldkv=k.ld if k else 0,
         k_cache=cache.k, v_cache=cache.v, format=FORMATS[cache.format], ctx=cache.ctx,
         pos=pos, out=out, ldo=out.ld if out else 0, ws=ws, rows=rows, m=m,
         heads=heads, kv_heads=cache.kv_heads, d=d, scale=factor, causal=int(causal), rope=rope, batch=batch,
         offsets=offsets, order=order, pad_k=pads.k if pads else None, pad_v=pads.v if pads else None,
         pads=pads.count if pads else None, queries=queries or 0)  # fmt: skip


# ---------------------------------------------------------------------------------------------------- contract


def _inputs(c: Case, rng: np.random.Generator) -> Arrays:
    if "lens" in c.dims:
        return _many_inputs(c, rng)
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

    if "lens" in c.dims:
        return _many_reference(c, a)
    q, k, v = _heads(c, a)
    if c.dtype == "bf16":  # operands as the kernel rounds them
        q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    q, k, v = q.double(), k.double().repeat_interleave(c.h // c.kv, 0), v.double().repeat_interleave(c.h // c.kv, 0)
    s = q @ k.transpose(1, 2) * c.d**-0.5
    mask = torch.arange(c.past + c.t)[None, :] > torch.arange(c.past, c.past + c.t)[:, None]
    o = s.masked_fill(mask, float("-inf")).softmax(-1) @ v
    return {"out": o.transpose(0, 1).reshape(c.t, -1).numpy()}


# Several sequences. lens, pasts: new and cached rows of each, as text ("3+5"); full, rope, pads, order: switches; held:
# new rows have no keys and see the cached ones;
# even: rows without offsets.
def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split("+")]


def _many_inputs(c: Case, rng: np.random.Generator) -> Arrays:
    lens, pasts, f = _numbers(c.lens), _numbers(c.pasts), np.float32
    t, past = sum(lens), sum(pasts)
    out = {"q": rng.standard_normal((t, c.h * c.d)).astype(f)}
    out |= {x: rng.standard_normal((t, c.kv * c.d)).astype(f) for x in "kv"}
    out |= {f"past_{x}": rng.standard_normal((past, c.kv * c.d)).astype(f) for x in "kv"}
    if c.dims.get("order"):
        out["order"] = rng.permutation(t).astype(np.int32)
    if c.dims.get("pads"):
        out |= {f"pad_{x}": rng.standard_normal(c.kv * c.d).astype(f) for x in "kv"}
        out["pads"] = rng.integers(0, 9, len(lens)).astype(np.int32)
        out["pads"][0] = 0
    return out


def _ctx(c: Case) -> int:
    return max(-(-(n + p) // 16) * 16 for n, p in zip(_numbers(c.lens), _numbers(c.pasts)))


def _many_reference(c: Case, a: Arrays) -> Arrays:
    import torch

    def turned(x, first: int):  # [T, heads, d] at positions first..
        if not c.dims.get("rope"):
            return x
        table = torch.from_numpy(rope_table(np.arange(first, first + len(x)), c.d)).double()
        cos, sin = table[:, None, : c.d // 2], table[:, None, c.d // 2 :]
        one, two = x[..., : c.d // 2], x[..., c.d // 2 :]
        return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)

    t = {k: torch.from_numpy(v).double() for k, v in a.items() if v.dtype == np.float32}
    order = torch.from_numpy(a["order"]).long() if "order" in a else torch.arange(len(a["q"]))
    rounded = (lambda x: x.bfloat16().double()) if c.dtype == "bf16" else (lambda x: x)
    out = torch.empty_like(t["q"])
    at = before = 0
    for i, (n, past) in enumerate(zip(_numbers(c.lens), _numbers(c.pasts))):
        rows, share = order[at : at + n], c.h // c.kv
        q = rounded(turned(t["q"][rows].reshape(n, c.h, c.d), past))
        own = rows[:0] if c.dims.get("held") else rows  # whose keys and values are seen
        k = torch.cat([t["past_k"][before : before + past], t["k"][own]]).reshape(-1, c.kv, c.d)
        k = rounded(turned(k, 0)).repeat_interleave(share, 1)
        v = torch.cat([t["past_v"][before : before + past], t["v"][own]]).reshape(-1, c.kv, c.d)
        v = rounded(v).repeat_interleave(share, 1)
        s = torch.einsum("qhd,khd->hqk", q, k) * c.d**-0.5
        if not c.dims.get("full"):
            s = s.masked_fill(torch.arange(past + n)[None, :] > torch.arange(past, past + n)[:, None], float("-inf"))
        if "pads" in a:  # as that many more keys
            count = int(a["pads"][i])
            pk = t["pad_k"].reshape(c.kv, c.d).repeat_interleave(share, 0)
            pv = t["pad_v"].reshape(c.kv, c.d).repeat_interleave(share, 0)
            raw = t["q"][rows].reshape(n, c.h, c.d)
            s = torch.cat([s, torch.einsum("qhd,hd->hq", raw, pk)[..., None].expand(-1, -1, count) * c.d**-0.5], -1)
            v = torch.cat([v, pv.expand(count, c.h, c.d)])
        out[rows] = torch.einsum("hqk,khd->qhd", s.softmax(-1), v).flatten(1)
        at, before = at + n, before + past
    return {"out": out[: c.dims.get("queries")].numpy()}


def _many_call(c: Case, a: Arrays, out: np.ndarray):
    lens, pasts = _numbers(c.lens), _numbers(c.pasts)
    batch, ctx, arena = len(lens), _ctx(c), GuardedArena()
    cache = KVCache.empty(arena, "kv", c.kv, c.d, ctx, c.dtype, batch)
    for part in (cache.k, cache.v):
        part.numpy()[...] = 0xFF
    t = {k: as_tensor(v) for k, v in a.items()}
    pos = arena.alloc("pos", (batch,), "i32", "io")
    ws = arena.alloc("ws", (workspace_bytes(max(*lens, *pasts), c.h, c.d, ctx),), "u8")
    rope = as_tensor(rope_table(np.arange(ctx), c.d)) if c.dims.get("rope") else None
    pads = Pads(t["pad_k"], t["pad_v"], t["pads"]) if "pads" in t else None
    common = {"heads": c.h, "ws": ws, "rope": rope, "causal": not c.dims.get("full")}

    def uneven(counts: list[int]) -> dict:
        ends = as_tensor(np.cumsum([0, *counts]).astype(np.int32))
        return {"offsets": ends, "longest": max(counts)}

    if sum(pasts):
        zeros = as_tensor(np.zeros((sum(pasts), c.h * c.d), np.float32))
        nowhere = as_tensor(np.zeros_like(zeros.numpy()))
        attention(zeros, t["past_k"], t["past_v"], cache, pos, nowhere, **common, **uneven(pasts))
    dst, rest = as_tensor(out), {} if c.dims.get("even") else uneven(lens)

    def run() -> None:
        pos.numpy()[:] = pasts
        k, v = (None, None) if c.dims.get("held") else (t["k"], t["v"])
        attention(t["q"], k, v, cache, pos, dst, order=t.get("order"), pads=pads, queries=c.dims.get("queries"),
                  **common, **rest)  # fmt: skip

    return run


def _call(c: Case, a: Arrays, out: np.ndarray):
    if "lens" in c.dims:
        return _many_call(c, a, out)
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


def _rows(c: Case) -> int:
    return sum(_numbers(c.lens)) if "lens" in c.dims else c.t


def _run(c: Case, a: Arrays) -> Arrays:
    out = guarded(_rows(c), c.h * c.d)
    _call(c, a, out)()
    return {"out": out[: c.dims.get("queries")]}


def _torch(c: Case, a: Arrays):
    import torch

    if "lens" in c.dims:  # as one sequence of them all
        n, dtype = _rows(c), torch.float32 if c.dtype == "f32" else torch.bfloat16
        q, k, v = (torch.from_numpy(a[x]).reshape(1, n, -1, c.d).transpose(1, 2).to(dtype) for x in "qkv")
        return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    q, k, v = (x[None].to(torch.float32 if c.dtype == "f32" else torch.bfloat16) for x in _heads(c, a))
    mask = torch.arange(c.past + c.t)[None, :] <= torch.arange(c.past, c.past + c.t)[:, None]
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def _bytes(c: Case) -> int:
    seen = c.past + c.t if "past" in c.dims else _rows(c) + sum(_numbers(c.pasts))
    return (2 if c.dtype == "bf16" else 4) * 2 * c.kv * c.d * seen + 8 * _rows(c) * c.h * c.d


def _flops(c: Case) -> int:
    if "lens" in c.dims:
        return 4 * c.h * c.d * sum(n * (n + p) for n, p in zip(_numbers(c.lens), _numbers(c.pasts)))
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
                "tiny",
                *(
                    {"lens": n, "pasts": p, "h": h, "kv": kv, "d": d, "dtype": f, **switches, "programs": 1}
                    for f in ("f32", "bf16")
                    for n, p, h, kv, d, switches in (
                        ("20+20", "0+0", 4, 4, 16, {"full": 1, "even": 1}),
                        ("5+5+5", "30+17+0", 8, 1, 32, {"full": 1, "even": 1, "rope": 1}),
                        ("37", "0", 8, 1, 16, {"full": 1, "rope": 1}),
                        ("52", "0", 4, 4, 16, {"full": 1, "rope": 1, "queries": 21}),
                        ("3", "60", 4, 2, 32, {"full": 1, "queries": 2}),
                        ("36+24+16", "0+0+0", 2, 2, 16, {"full": 1, "order": 1, "pads": 1}),
                        ("3+18", "16+1", 4, 2, 20, {"rope": 1}),
                        ("20+20", "13+7", 4, 2, 16, {"full": 1, "even": 1, "held": 1}),
                        ("3+18", "16+1", 4, 2, 20, {"full": 1, "held": 1, "pads": 1}),
                    )
                ),
            ),
            *cases(
                "odd",
                *(
                    {"lens": n, "pasts": p, "h": h, "kv": kv, "d": d, "dtype": f, **switches, "programs": 1}
                    for f in ("f32", "bf16")
                    for n, p, h, kv, d, switches in (
                        ("1+0+130", "3+2+5", 3, 3, 9, {"full": 1, "order": 1}),
                        ("1", "300", 2, 1, 6, {"full": 1, "rope": 1}),
                        ("1", "300", 2, 1, 6, {"full": 1, "held": 1}),
                        ("2+0+9", "300+1+5", 3, 3, 9, {"full": 1, "held": 1}),
                        ("2+7", "0+0", 2, 2, 13, {"full": 1, "pads": 1}),
                    )
                ),
            ),
            *cases(
                "real",
                {"lens": "256+256+256", "pasts": "0+0+0", "h": 16, "kv": 16, "d": 72, "dtype": "bf16", "full": 1},
                {"lens": "50", "pasts": "816", "h": 8, "kv": 1, "d": 256, "dtype": "bf16", "full": 1, "rope": 1},
                *({"t": t, "past": p, "h": 32, "kv": 2, "d": 128, "dtype": "bf16"} for t, p in ((1, 1024), (512, 0))),
                {"lens": "2048", "pasts": "0", "h": 16, "kv": 16, "d": 128, "dtype": "bf16", "full": 1},
            ),
        ],
        inputs=_inputs,
        reference=_reference,
        run=_run,
        prepare=lambda c, a: _call(c, a, np.zeros((_rows(c), c.h * c.d), np.float32)),
        torch_eager=_torch,
        # bf16: probabilities are rounded to bf16 before the product with V
        tolerance={"f32": 5e-6, "bf16": 3e-3},
        bytes=_bytes,
        flops=_flops,
    )
)
