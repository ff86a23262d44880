"""Top-k routed experts of two matrices and one shared expert, as three nodes (csrc/ops/moe)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine import _C
from engine.ops.checks import Check, Shape
from engine.ops.dispatch import call, many_rows
from engine.ops.gemm import (
    ACTS,
    FORMATS,
    Activations,
    PackedMatrix,
    activate,
    group_for,
    matmul_program,
    part,
    power_of_two,
    quantised_activations,
    rms_norm,
    row_programs,
    tile,
)
from engine.ops.gemm import workspace_bytes as gemm_workspace
from engine.ops.registry import Arrays, Case, GuardedArena, Op, cases, guarded, register
from engine.runtime.arena import Arena, Tensor, as_tensor
from engine.runtime.program import Program

SCRATCH_BYTES = 3 << 20  # of each thread's scratch, for packed rows (moe_down, T = 1)
MAX_EXPERTS = 65536  # scores of one token lie in per-thread scratch


@dataclass(frozen=True)
class Routing:
    """What the router leaves in memory for m tokens: ids and weights [T, top_k]; offsets [E+1] and order [T*top_k]
    list the pairs by expert (used for T > 1)."""

    ids: Tensor
    weights: Tensor
    offsets: Tensor
    order: Tensor
    logits: Tensor
    ticket: Tensor  # i32 [1], zero between launches
    experts: int
    top_k: int

    @staticmethod
    def empty(arena: Arena, name: str, m: int, experts: int, top_k: int) -> Routing:
        return Routing(
            arena.alloc(f"{name}.ids", (m, top_k), "i32"),
            arena.alloc(f"{name}.weights", (m, top_k)),
            arena.alloc(f"{name}.offsets", (experts + 1,), "i32"),
            arena.alloc(f"{name}.order", (m * top_k,), "i32"),
            arena.alloc(f"{name}.logits", (m, experts)),
            arena.alloc(f"{name}.ticket", (1,), "i32", "io"),
            experts,
            top_k,
        )

    def fits(self, check: Check, m: int) -> None:
        """InputError unless the buffers hold m tokens."""
        if not 1 <= self.top_k <= self.experts <= MAX_EXPERTS:
            check.fail(f"top_k {self.top_k} of {self.experts} experts; need 1 <= top_k <= experts <= {MAX_EXPERTS}")
        check.takes("ids", self.ids, (m, self.top_k), "i32")
        check.takes("weights", self.weights, (m, self.top_k))
        check.takes("offsets", self.offsets, (self.experts + 1,), "i32")
        check.takes("order", self.order, (m * self.top_k,), "i32", longer=True)
        check.takes("logits", self.logits, (m, self.experts))
        check.takes("ticket", self.ticket, (1,), "i32")


def _shared_fits(check: Check, name: str, w: PackedMatrix | None, hs: Tensor | None, n: int, k: int) -> None:
    check.need((w is None) == (hs is None), f"{name} and hs belong together; pass both or neither")
    if w is not None:
        w.fits(check, name, n, k)


def _bias_shapes(experts: int, n: int) -> list[Shape]:
    return [(experts, n), (experts * n,)]


# ------------------------------------------------------------------------------------------------- Triton programs


def _grouped(
    a: Activations,
    w: PackedMatrix,
    out: Tensor,
    routing: Routing,
    table_at: int,
    ws: Tensor,
    *,
    up: bool,
    bias: Tensor | None,
    act: str,
) -> list[Program]:
    """The tile table at byte table_at of ws, and the product of all pairs with the matrices of their experts."""
    pairs, experts = routing.ids.shape[0] * routing.top_k, routing.experts
    blocks, warps, stages = tile(-(-pairs // experts), w.n, w.format)
    w.addressable()
    slots = _slots(pairs, experts, blocks["BM"])
    table = part(ws, table_at, "i32", 1 + 2 * slots)
    find = Program(
        "moe.tiles",
        (experts, 1, 1),
        {"offsets": routing.offsets, "table": table},
        {"EXPERTS": experts, "SLOTS": slots, "BM": blocks["BM"], "BLOCK": min(1024, max(16, power_of_two(experts)))},
        warps=1,
    )
    multiply = Program(
        "moe.grouped",
        (slots, -(-w.n // blocks["BN"]), 1),
        {"a": a.codes, "scales": a.scales, "w": w.data, "out": out, "bias": bias,
         "weights": None if up else routing.weights, "table": table, "offsets": routing.offsets,
         "order": routing.order, "scale_rows": a.m,},
        {"N": w.n, "K": w.k, "LDA": a.ld, "PANEL": w.panel_bytes // 4, "FORMAT": FORMATS[w.format], "GROUP": w.group,
         "ACT": ACTS[act], "TOP_K": routing.top_k, "UP": up, "SLOTS": slots, **blocks},
        warps,
        stages,
    )  # fmt: skip
    return [find, multiply]


def _slots(pairs: int, experts: int, bm: int) -> int:
    """Tiles that `pairs` can need at most, whatever the routing: each expert may leave one unfilled."""
    return min(pairs, experts) + pairs // bm


def _table_bytes(pairs: int, experts: int) -> int:
    return 4 * (1 + 2 * _slots(pairs, experts, 16)) + 64


def moe_route(
    x: Tensor,
    norm: Tensor,
    gate: PackedMatrix,
    bias: Tensor | None,
    to: Routing,
    *,
    scale: float,
    norm_topk: bool = True,
    n_group: int = 1,
    topk_group: int = 1,
    eps: float = 1e-5,
    rows: Tensor | None = None,
    ws: Tensor,
    label: str = "",
) -> None:
    """Router of DeepSeek-V3 form in fp32: sigmoid scores, selection on score + bias, weights from the score.

    x [T,D] f32 (raw residual stream; `norm` [D] is applied here), gate f32 [E,D], bias [E].
    """
    check = Check("moe_route", label)
    check.takes("x", x, (None, gate.k), strided=True)
    check.takes("norm", norm, (gate.k,))
    to.fits(check, x.shape[0])
    gate.fits(check, "gate", to.experts, gate.k)
    check.one_of("the format of gate", gate.format, ("f32",))
    check.may_take("bias", bias, (to.experts,))
    if not 1 <= topk_group <= n_group or to.experts % n_group:
        check.fail(f"groups {topk_group}/{n_group} do not fit {to.experts} experts; n_group must divide them")
    check.may_take("rows", rows, (1,), "i32")
    m, experts, top_k = x.shape[0], to.experts, to.top_k
    check.room(ws, gemm_workspace(m, gate.k))

    def programs() -> list[Program]:
        a = Activations.place(ws, 0, m, gate.k, "f32", 1)
        choose = Program(
            "moe.choose",
            (m, 1, 1),
            {"logits": to.logits, "bias": bias, "ids": to.ids, "weights": to.weights, "live": rows, "m": m,
             "scale": float(scale)},
            {"EXPERTS": experts, "TOP_K": top_k, "GROUPS": n_group, "KEEP": topk_group, "NORM": norm_topk,
             "BG": power_of_two(n_group), "BS": power_of_two(experts // n_group), "BK": power_of_two(top_k)},
            warps=1 if experts <= 512 else 4,
        )  # fmt: skip
        sort = Program(
            "moe.sort",
            (experts, 1, 1),
            {"ids": to.ids, "offsets": to.offsets, "order": to.order, "live": rows, "m": m},
            {"TOP_K": top_k, "EXPERTS": experts, "BLOCK": min(1024, max(32, power_of_two(m * top_k)))},
        )
        pre = row_programs(x, a, rows=rows, norm=norm, eps=eps)
        return [*pre, matmul_program(a, gate, to.logits, rows=rows), choose, sort]

    call("moe_route", label, nbytes=gate.matrix_bytes, programs=programs if many_rows(m) else None,
         x=x, ldx=x.ld, norm=norm, eps=eps, gate=gate.data, bias=bias, logits=to.logits, ids=to.ids,
         weights=to.weights, offsets=to.offsets, order=to.order, ws=ws,
         rows=rows, m=x.shape[0], d=x.shape[1], experts=to.experts, top_k=to.top_k,
         n_group=n_group, topk_group=topk_group, norm_topk=int(norm_topk), scale=scale,
         ticket=to.ticket)  # fmt: skip


def moe_up(
    x: Tensor,
    norm: Tensor,
    up: PackedMatrix,
    routing: Routing,
    h: Tensor,
    *,
    shared: PackedMatrix | None = None,
    hs: Tensor | None = None,
    up_bias: Tensor | None = None,
    shared_bias: Tensor | None = None,
    act: str = "relu2",
    eps: float = 1e-5,
    rows: Tensor | None = None,
    ws: Tensor,
    label: str = "",
) -> None:
    """h [T*top_k, I] = act(rms_norm(x) @ up_e.T) for the routed pairs; hs [T,S] the same for the shared expert.

    up_bias [E,I] or flat, shared_bias [S]. ws: moe_workspace().
    """
    check, s, d = Check("moe_up", label), shared or up, up.k
    check.takes("x", x, (None, d), strided=True)
    m = x.shape[0]
    check.takes("norm", norm, (d,))
    routing.fits(check, m)
    up.fits(check, "up", up.n, d, routing.experts)
    check.takes("h", h, (m * routing.top_k, up.n))
    _shared_fits(check, "shared", shared, hs, s.n, d)
    check.may_take("hs", hs, (m, s.n))
    check.may_take("up_bias", up_bias, _bias_shapes(up.count, up.n))
    check.may_take("shared_bias", shared_bias, (s.n,))
    check.apart("h", h, x=x)
    check.one_of("act", act, ACTS)
    check.may_take("rows", rows, (1,), "i32")
    formats = FORMATS[up.format], up.group, FORMATS[s.format], s.group
    check.room(ws, _C.moe_up_workspace(m, routing.top_k, d, *formats))

    def programs() -> list[Program]:
        a = Activations.place(ws, 0, m, d, up.format, up.group)
        out, end, same = row_programs(x, a, rows=rows, norm=norm, eps=eps), a.nbytes, a
        if shared is not None and (shared.format, shared.group) != (up.format, up.group):
            same = Activations.place(ws, end, m, d, shared.format, shared.group)
            end += same.nbytes
            out += row_programs(x, same, rows=rows, norm=norm, eps=eps)
        out += _grouped(a, up, h, routing, end, ws, up=True, bias=up_bias, act=act)
        if shared is not None and hs is not None:
            out.append(matmul_program(same, shared, hs, rows=rows, bias=shared_bias, act=act))
        return out

    call("moe_up", label, nbytes=up.matrix_bytes * routing.top_k + (shared.matrix_bytes if shared else 0),
         programs=programs if many_rows(m) else None,
         x=x, ldx=x.ld, norm=norm, eps=eps, up=up.data,
         shared_up=shared.data if shared else None, up_bias=up_bias,
         shared_bias=shared_bias, ids=routing.ids,
         offsets=routing.offsets, order=routing.order, h=h, hs=hs,
         ws=ws, rows=rows, m=x.shape[0], d=x.shape[1], inner=up.n,
         shared=shared.n if shared else 0, experts=up.count, top_k=routing.top_k, act=ACTS[act],
         format=FORMATS[up.format], group=up.group, shared_format=FORMATS[s.format], shared_group=s.group)  # fmt: skip


def moe_down(
    h: Tensor,
    down: PackedMatrix,
    routing: Routing,
    out: Tensor,
    *,
    residual: Tensor | None = None,
    shared: PackedMatrix | None = None,
    hs: Tensor | None = None,
    down_bias: Tensor | None = None,
    shared_bias: Tensor | None = None,
    rows: Tensor | None = None,
    ws: Tensor,
    label: str = "",
) -> None:
    """out [T,D] = residual + sum over the pairs of weight * (h @ down_e.T) + hs @ shared_down.T.

    down_bias [E,D] or flat, shared_bias [D]. ws: moe_workspace().
    """
    check, s, d, top_k = Check("moe_down", label), shared or down, down.n, routing.top_k
    check.takes("out", out, (None, d), strided=True)
    m = out.shape[0]
    check.may_take("residual", residual, (m, d), strided=True)
    routing.fits(check, m)
    down.fits(check, "down", d, down.k, routing.experts)
    check.takes("h", h, (m * top_k, down.k))
    _shared_fits(check, "shared", shared, hs, d, s.k)
    check.may_take("hs", hs, (m, s.k))
    check.may_take("down_bias", down_bias, _bias_shapes(down.count, d))
    check.may_take("shared_bias", shared_bias, (d,))
    check.apart("out", out, h=h, hs=hs)
    check.may_take("rows", rows, (1,), "i32")
    sizes = top_k, down.k, shared.k if shared else 0, FORMATS[down.format], down.group, FORMATS[s.format], s.group
    check.room(ws, _C.moe_down_workspace(m, *sizes))
    if m == 1 and _C.moe_down_workspace(1, *sizes) > SCRATCH_BYTES:
        check.fail(
            f"top_k {top_k} rows of inner {down.k} take {_C.moe_down_workspace(1, *sizes)} bytes of scratch; "
            f"the limit for one token is {SCRATCH_BYTES}, use a smaller top_k or inner, or format i8"
        )

    def programs() -> list[Program]:
        pairs = m * top_k
        a = Activations.place(ws, 0, pairs, down.k, down.format, down.group)
        out_of = part(ws, a.nbytes, "f32", pairs, d)
        end = a.nbytes + out_of.nbytes
        todo = row_programs(h, a, rows=rows, per=top_k)
        base = residual
        if shared is not None and hs is not None:
            b = Activations.place(ws, end, m, shared.k, shared.format, shared.group)
            end += b.nbytes
            todo += row_programs(hs, b, rows=rows)
            todo.append(matmul_program(b, shared, out, rows=rows, bias=shared_bias, residual=residual))
            base = out
        todo += _grouped(a, down, out_of, routing, end, ws, up=False, bias=down_bias, act="none")
        block = min(1024, power_of_two(d))
        todo.append(
            Program(
                "moe.combine",
                (m, -(-d // block), 1),
                {
                    "pairs": out_of,
                    "base": base,
                    "out": out,
                    "live": rows,
                    "m": m,
                    "ldb": base.ld if base else 0,
                    "ldo": out.ld,
                },
                {"D": d, "TOP_K": top_k, "BLOCK": block},
            )
        )
        return todo

    call("moe_down", label, nbytes=down.matrix_bytes * routing.top_k + (shared.matrix_bytes if shared else 0),
         programs=programs if many_rows(m) else None,
         h=h, hs=hs, residual=residual,
         ldr=residual.ld if residual else 0, down=down.data, shared_down=shared.data if shared else None,
         down_bias=down_bias, shared_bias=shared_bias,
         ids=routing.ids, weights=routing.weights, offsets=routing.offsets,
         order=routing.order, out=out, ldo=out.ld, ws=ws, rows=rows,
         m=out.shape[0], d=out.shape[1], inner=down.k, shared=shared.k if shared else 0, experts=down.count,
         top_k=routing.top_k, format=FORMATS[down.format], group=down.group, shared_format=FORMATS[s.format],
         shared_group=s.group)  # fmt: skip


def moe_workspace(m: int, d: int, up: PackedMatrix, top_k: int, shared: PackedMatrix | None) -> int:
    """Bytes of ws that moe_route, moe_up and moe_down need for m tokens."""
    s = shared or up
    a = (FORMATS[up.format], up.group, FORMATS[s.format])
    inner_group = group_for(up.n) or 1
    shared_inner = group_for(s.n) or 1
    pairs, on_cuda = m * top_k, many_rows(m)
    # Triton: activations as fp32 at most, the outputs of all pairs, the tile table.
    programs = 4 * pairs * (up.n + d + 8) + 4 * m * (s.n + 8) + _table_bytes(pairs, up.count) + 256 if on_cuda else 0
    return max(
        programs,
        gemm_workspace(m, d),
        _C.moe_up_workspace(m, top_k, d, *a, s.group),
        _C.moe_down_workspace(m, top_k, up.n, s.n if shared else 0, a[0], inner_group, a[2], shared_inner),
        # the down matrices may stay unquantised where K does not divide
        _C.moe_down_workspace(m, top_k, up.n, s.n if shared else 0, 0, 1, 0, 1),
    )


# ---------------------------------------------------------------------------------------------------- contract


def _inputs(c: Case, rng: np.random.Generator) -> Arrays:
    def w(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)

    out = {
        "x": w(c.t, c.d) * c.d**0.5,
        "norm": 1 + 0.1 * w(c.d),
        "gate": w(c.e, c.d),
        "bias": 0.3 * w(c.e) * c.e**0.5,
        "up": w(c.e, c.i, c.d),
        "down": w(c.e, c.d, c.i),
        "residual": w(c.t, c.d),
    }
    if c.s:
        out |= {"shared_up": w(c.s, c.d), "shared_down": w(c.d, c.s)}
    return out


def route_reference(logits, bias, top_k: int, n_group: int, topk_group: int, scale: float, norm_topk: bool = True):
    """ids and weights [T, top_k] from logits [T,E] (torch, fp64): the specification of moe_route."""
    import torch

    s = logits.sigmoid()
    choice = s + bias
    if n_group > 1:
        groups = choice.reshape(len(s), n_group, -1)
        score = groups.topk(min(2, groups.shape[-1]), -1).values.sum(-1)
        keep = torch.zeros_like(score, dtype=torch.bool).scatter(1, score.topk(topk_group, -1).indices, True)
        choice = groups.masked_fill(~keep[..., None], float("-inf")).reshape(s.shape)
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    w = s.gather(1, ids)
    return ids, (w / (w.sum(-1, keepdim=True) + 1e-20) if norm_topk else w) * scale


def _matrix(c: Case, w: np.ndarray) -> PackedMatrix:
    k = w.shape[-1]
    return PackedMatrix.pack("w", w, c.dtype if c.dtype in ("f32", "bf16") or group_for(k) else "bf16")


def _reference(c: Case, a: Arrays) -> Arrays:
    import torch

    def product(x, w: np.ndarray):
        m = _matrix(c, w)
        return quantised_activations(x, m.format, m.group) @ torch.from_numpy(m.unpack()).double().T

    x = rms_norm(torch.from_numpy(a["x"]).double(), torch.from_numpy(a["norm"]).double(), 1e-5)
    logits = x @ torch.from_numpy(a["gate"]).double().T
    ids, weights = route_reference(logits, torch.from_numpy(a["bias"]).double(), c.k, c.ng, max(1, c.ng // 2), 2.5)
    out = torch.from_numpy(a["residual"]).double().clone()
    for e in ids.unique().tolist():
        t, j = (ids == e).nonzero(as_tuple=True)
        h = activate(product(x[t], a["up"][e]), "relu2")
        out.index_add_(0, t, weights[t, j, None] * product(h, a["down"][e]))
    if c.s:
        out += product(activate(product(x, a["shared_up"]), "relu2"), a["shared_down"])
    return {"out": out.numpy(), "ids": ids.sort(-1).values.numpy(), "weights": weights.sort(-1).values.numpy()}


def _call(c: Case, a: Arrays, out: np.ndarray):
    arena = GuardedArena()
    t = {k: as_tensor(v) for k, v in a.items() if v.ndim < 3}
    gate = PackedMatrix.pack("gate", a["gate"], "f32")
    up, down = _matrix(c, a["up"]), _matrix(c, a["down"])
    sup, sdown = (_matrix(c, a["shared_up"]), _matrix(c, a["shared_down"])) if c.s else (None, None)
    routing = Routing.empty(arena, "route", c.t, c.e, c.k)
    h, hs = arena.alloc("h", (c.t * c.k, c.i)), arena.alloc("hs", (c.t, c.s)) if c.s else None
    ws = arena.alloc("ws", (moe_workspace(c.t, c.d, up, c.k, sup),), "u8")
    dst = as_tensor(out)

    def run() -> None:
        moe_route(
            t["x"], t["norm"], gate, t["bias"], routing, scale=2.5, n_group=c.ng, topk_group=max(1, c.ng // 2), ws=ws
        )
        moe_up(t["x"], t["norm"], up, routing, h, shared=sup, hs=hs, ws=ws)
        moe_down(h, down, routing, dst, residual=t["residual"], shared=sdown, hs=hs, ws=ws)

    return run, routing


def _run(c: Case, a: Arrays) -> Arrays:
    out = guarded(c.t, c.d)
    run, routing = _call(c, a, out)
    run()
    return {"out": out, "ids": np.sort(routing.ids.numpy()), "weights": np.sort(routing.weights.numpy())}


def _torch(c: Case, a: Arrays):
    import torch

    dtype = torch.float32 if c.dtype == "f32" else torch.bfloat16
    w = {k: torch.from_numpy(v).to(dtype) for k, v in a.items()}

    def step():
        x = torch.nn.functional.rms_norm(w["x"], (c.d,), w["norm"], 1e-5)
        logits = x.float() @ w["gate"].float().T
        s = logits.sigmoid()
        ids = (s + w["bias"].float()).topk(c.k).indices
        p = s.gather(1, ids)
        p = p / p.sum(-1, keepdim=True) * 2.5
        out = w["residual"].clone()
        for e in ids.unique().tolist():
            t, j = (ids == e).nonzero(as_tuple=True)
            h = (x[t] @ w["up"][e].T).relu().square()
            out.index_add_(0, t, (p[t, j, None] * (h @ w["down"][e].T).float()).to(dtype))
        if c.s:
            out += (x @ w["shared_up"].T).relu().square() @ w["shared_down"].T
        return out

    return step


def _bytes(c: Case) -> int:
    touched = min(c.e, c.k * c.t)
    size = {"f32": 4.0, "bf16": 2.0, "i8": 1.03125, "i4": 0.53125}[c.dtype]
    return int(2 * c.d * (touched * c.i + c.s) * size) + 4 * c.e * c.d + 8 * c.t * c.d


_D = {"e": 8, "k": 3, "i": 64, "s": 128, "d": 64, "ng": 1}
register(
    Op(
        name="moe",
        kernels=("moe_route", "moe_up", "moe_down"),
        cases=[
            *cases("tiny", *({"t": t, **_D, "dtype": f} for f in FORMATS for t in (1, 2, 9, 40))),
            *cases(
                "tiny",
                *({"t": t, **_D, "ng": 4, "dtype": "f32"} for t in (1, 7)),
                {"t": 5, **_D, "s": 0, "dtype": "f32"},
                {"t": 1, **_D, "s": 0, "dtype": "i4"},
            ),
            *cases(
                "odd",
                *(
                    {"t": t, "e": 5, "k": 2, "i": 29, "s": 43, "d": 37, "ng": 1, "dtype": f}
                    for f in ("f32", "bf16")
                    for t in (1, 6)
                ),
                {"t": 6, "e": 6, "k": 6, "i": 96, "s": 32, "d": 160, "ng": 3, "dtype": "i4"},
                {"t": 3, "e": 4, "k": 1, "i": 24, "s": 40, "d": 64, "ng": 1, "dtype": "i8"},
                # a router of several panels whose K is split; formats of routed and shared that differ
                *({"t": t, "e": 40, "k": 4, "i": 32, "s": 40, "d": 288, "ng": 1, "dtype": "i4"} for t in (1, 3)),
            ),
            *cases(
                "real",
                *(
                    {"t": t, "e": 16, "k": 6, "i": 1856, "s": 3712, "d": 2688, "ng": 1, "dtype": f}
                    for f in ("bf16", "i4")
                    for t in (1, 512)
                ),
            ),
        ],
        inputs=_inputs,
        reference=_reference,
        run=_run,
        prepare=lambda c, a: _call(c, a, np.zeros((c.t, c.d), np.float32))[0],
        torch_eager=_torch,
        # bf16 and 8-bit activations of the second product depend on the last bit of the first
        tolerance={"f32": 5e-6, "bf16": 1e-3, "i8": 3e-3, "i4": 3e-3},
        bytes=_bytes,
        flops=lambda c: 4 * c.t * c.d * (c.k * c.i + c.s) + 2 * c.t * c.e * c.d,
    )
)
