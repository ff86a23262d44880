"""Causal conv + Mamba-2 selective scan over 1..T tokens that continue a sequence (csrc/ops/ssm)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.ops.checks import Check
from engine.ops.dispatch import call, many_rows
from engine.ops.gemm import power_of_two
from engine.ops.registry import Arrays, Case, Op, cases, guarded, register, surrounded
from engine.runtime.arena import Tensor, as_tensor
from engine.runtime.program import Program

PRECISION = "ieee"  # of the products of the chunked scan; "tf32x3" takes three tensor core products, "tf32" one


@dataclass(frozen=True)
class SsmShape:
    """heads H, head_dim P, groups G, n_state N, taps K (conv kernel). channels = H*P + 2*G*N."""

    heads: int
    head_dim: int
    groups: int
    n_state: int
    taps: int

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim + 2 * self.groups * self.n_state

    @property
    def state(self) -> tuple[int, int, int]:
        """Shape of the scan state: [H, N, P padded to 16]."""
        return self.heads, self.n_state, (self.head_dim + 15) // 16 * 16


def ssm(
    shape: SsmShape,
    xbc: Tensor,
    dt: Tensor,
    out: Tensor,
    *,
    conv_w: Tensor,
    conv_b: Tensor | None,
    conv_state: Tensor,
    a: Tensor,
    d_skip: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    u: Tensor,
    ticket: Tensor,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    rows: Tensor | None = None,
    label: str = "",
) -> None:
    """y = scan(silu(conv(xbc))), states updated in place (Dao & Gu 2024, Mamba-2).

    xbc [T, channels], dt [T,H], out [T, H*P] f32; conv_w [K, channels]; conv_state [K-1, channels]: last raw inputs;
    a = -exp(A_log), d_skip, dt_bias [H]; state [H,N,Pp]; u [T, channels] workspace; ticket
    i32 [G], zero between launches. rows (i32 [1]) replaces T.
    """
    check, channels = Check("ssm", label), shape.channels
    if min(shape.heads, shape.head_dim, shape.groups, shape.n_state, shape.taps) < 1 or shape.heads % shape.groups:
        check.fail(f"{shape} must have positive sizes and heads that are a multiple of groups")
    check.takes("out", out, (None, shape.heads * shape.head_dim), strided=True)
    t = out.shape[0]
    check.takes("xbc", xbc, (t, channels), strided=True)
    check.takes("dt", dt, (t, shape.heads), strided=True)
    check.takes("conv_w", conv_w, (shape.taps, channels))
    check.may_take("conv_b", conv_b, (channels,))
    check.takes("conv_state", conv_state, (shape.taps - 1, channels))
    for name, vector in (("a", a), ("d_skip", d_skip), ("dt_bias", dt_bias)):
        check.takes(name, vector, (shape.heads,))
    check.takes("state", state, shape.state)
    check.takes("u", u, (t, channels))
    check.takes("ticket", ticket, (shape.groups,), "i32")
    check.may_take("rows", rows, (1,), "i32")

    def programs() -> list[Program]:
        heads, p, n = shape.heads, shape.head_dim, shape.n_state
        live: dict[str, Tensor | int | None] = {"live": rows, "m": t}
        width = {"CHANNELS": channels, "TAPS": shape.taps}
        bt, bc = min(16, power_of_two(t)), min(128, power_of_two(channels))
        bp, blocks = max(16, min(32, power_of_two(p))), -(-channels // bc)
        first = {
            "xbc": xbc,
            "conv_w": conv_w,
            "conv_b": conv_b,
            "conv_state": conv_state,
            "u": u,
            **live,
            "ldx": xbc.ld,
        }
        last = {"xbc": xbc, "conv_state": conv_state, **live, "ldx": xbc.ld}
        walk = {"u": u, "dt": dt, "a": a, "d_skip": d_skip, "dt_bias": dt_bias, "state": state, "out": out, **live,
                "lddt": dt.ld, "ldo": out.ld, "dt_min": float(dt_limit[0]), "dt_max": float(dt_limit[1])}  # fmt: skip
        sizes: dict[str, int | bool | str] = {
            "HEADS": heads,
            "P": p,
            "GROUPS": shape.groups,
            "N": n,
            "PP": shape.state[2],
            "Q": max(16, min(64, power_of_two(t))),
            "BN": max(16, min(32, power_of_two(n))),
            "BP": bp,
            "PRECISION": PRECISION,
        }
        out_of = [Program("ssm.conv", (-(-t // bt), blocks, 1), first, {**width, "BT": bt, "BC": bc})]
        if shape.taps > 1:
            out_of.append(Program("ssm.tail", (blocks, 1, 1), last, {**width, "BC": bc}))
        return [*out_of, Program("ssm.scan", (heads, -(-p // bp), 1), walk, sizes, warps=8, stages=1)]

    call("ssm", label, nbytes=2 * state.nbytes, programs=programs if many_rows(t) else None,
         xbc=xbc, ldx=xbc.ld, dt=dt, lddt=dt.ld,
         conv_w=conv_w, conv_b=conv_b, conv_state=conv_state, a=a,
         d_skip=d_skip, dt_bias=dt_bias, state=state, u=u, out=out, ldo=out.ld,
         rows=rows, m=t, heads=shape.heads, head_dim=shape.head_dim, groups=shape.groups,
         n_state=shape.n_state, taps=shape.taps, dt_min=dt_limit[0], dt_max=dt_limit[1],
         ticket=ticket)  # fmt: skip


# ---------------------------------------------------------------------------------------------------- contract


def _shape(c: Case) -> SsmShape:
    return SsmShape(c.h, c.p, c.g, c.n, c.k)


def _inputs(c: Case, rng: np.random.Generator) -> Arrays:
    s, f = _shape(c), np.float32
    pad = np.zeros(s.state, f)
    pad[..., : c.p] = rng.standard_normal((c.h, c.n, c.p))
    out = {
        "xbc": rng.standard_normal((c.t, s.channels)),
        "dt": rng.standard_normal((c.t, c.h)),
        "conv_w": rng.standard_normal((c.k, s.channels)) / c.k**0.5,
        "conv_b": 0.1 * rng.standard_normal(s.channels),
        "conv_state": rng.standard_normal((c.k - 1, s.channels)),
        "a": -rng.uniform(1, 16, c.h),
        "d_skip": rng.standard_normal(c.h),
        "dt_bias": rng.standard_normal(c.h) - 3,
        "state": pad,
    }
    return {k: np.ascontiguousarray(v, f) for k, v in out.items()}


def _reference(c: Case, arrays: Arrays) -> Arrays:
    import torch

    a = {k: torch.from_numpy(v).double() for k, v in arrays.items()}
    di, gn = c.h * c.p, c.g * c.n
    seq = torch.cat([a["conv_state"], a["xbc"]])
    u = torch.stack([(a["conv_w"] * seq[t : t + c.k]).sum(0) for t in range(c.t)]) + a["conv_b"]
    u = torch.nn.functional.silu(u)
    x = u[:, :di].reshape(c.t, c.h, c.p)
    b, cc = (
        u[:, di + i * gn : di + (i + 1) * gn].reshape(c.t, c.g, c.n).repeat_interleave(c.h // c.g, 1) for i in (0, 1)
    )
    dt = torch.nn.functional.softplus(a["dt"] + a["dt_bias"]).clamp(0.0, float("inf"))
    state, ys = a["state"][..., : c.p], []
    for t in range(c.t):
        state = (dt[t] * a["a"]).exp()[:, None, None] * state + b[t][:, :, None] * (dt[t][:, None] * x[t])[:, None, :]
        ys.append((state * cc[t][:, :, None]).sum(1) + a["d_skip"][:, None] * x[t])
    return {
        "out": torch.stack(ys).reshape(c.t, di).numpy(),
        "state": state.numpy(),
        "conv_state": seq[-(c.k - 1) :].numpy(),
    }


def _call(c: Case, arrays: Arrays, out: np.ndarray):
    s = _shape(c)
    t = {k: as_tensor(v) for k, v in arrays.items()}
    u = as_tensor(guarded(c.t, s.channels))
    dst = as_tensor(out)
    names = ("conv_w", "conv_b", "conv_state", "a", "d_skip", "dt_bias", "state")
    ticket = as_tensor(np.zeros(c.g, np.int32))
    return lambda: ssm(s, t["xbc"], t["dt"], dst, u=u, ticket=ticket, **{n: t[n] for n in names})  # type: ignore[arg-type]


def _run(c: Case, arrays: Arrays) -> Arrays:
    a = surrounded(arrays)
    out = guarded(c.t, c.h * c.p)
    _call(c, a, out)()
    return {"out": out, "state": a["state"][..., : c.p], "conv_state": a["conv_state"]}


def _torch(c: Case, arrays: Arrays):
    import torch

    a = {k: torch.from_numpy(v) for k, v in arrays.items()}
    s, di = _shape(c), c.h * c.p
    weight = a["conv_w"].T.unsqueeze(1).contiguous()

    def step():
        seq = torch.cat([a["conv_state"], a["xbc"]]).T.unsqueeze(0)
        u = torch.nn.functional.silu(torch.nn.functional.conv1d(seq, weight, a["conv_b"], groups=s.channels))[0].T
        dt = torch.nn.functional.softplus(a["dt"] + a["dt_bias"])
        state, ys = a["state"][..., : c.p], []
        for t in range(c.t):
            x = u[t, :di].reshape(c.h, c.p)
            b, cc = (
                u[t, di + i * c.g * c.n : di + (i + 1) * c.g * c.n].reshape(c.g, c.n).repeat_interleave(c.h // c.g, 0)
                for i in (0, 1)
            )
            state = (dt[t] * a["a"]).exp()[:, None, None] * state + b[:, :, None] * (dt[t][:, None] * x)[:, None, :]
            ys.append((state * cc[:, :, None]).sum(1) + a["d_skip"][:, None] * x)
        return torch.stack(ys)

    return step


register(
    Op(
        name="ssm",
        cases=[
            *cases("tiny", *({"t": t, "h": 4, "p": 16, "g": 2, "n": 8, "k": 4} for t in (1, 2, 3, 4, 5, 17))),
            *cases(
                "odd",
                {"t": 7, "h": 6, "p": 12, "g": 3, "n": 5, "k": 2},
                {"t": 9, "h": 2, "p": 100, "g": 1, "n": 17, "k": 3},
                {"t": 1, "h": 3, "p": 33, "g": 3, "n": 24, "k": 4},
                {"t": 130, "h": 8, "p": 20, "g": 2, "n": 16, "k": 4},
            ),
            *cases(
                "real",
                {"t": 1, "h": 64, "p": 64, "g": 8, "n": 128, "k": 4},
                {"t": 128, "h": 64, "p": 64, "g": 8, "n": 128, "k": 4},
            ),
        ],
        inputs=_inputs,
        reference=_reference,
        run=_run,
        prepare=lambda c, a: _call(c, {k: v.copy() for k, v in a.items()}, np.zeros((c.t, c.h * c.p), np.float32)),
        torch_eager=_torch,
        tolerance={"f32": 1e-5},
        # both states each way, the inputs, the conv weights, the output
        bytes=lambda c: (
            4
            * (
                2 * c.h * c.n * c.p
                + _shape(c).channels * (2 * (c.k - 1) + c.k + 1 + c.t)
                + c.h * (3 + c.t)
                + c.t * c.h * c.p
            )
        ),
        flops=lambda c: c.t * (6 * c.h * c.n * c.p + 2 * c.k * _shape(c).channels),
    )
)
