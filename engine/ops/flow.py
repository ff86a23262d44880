"""One step of a flow sampler in which every action has its own local time (csrc/ops/flow; FASTER, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.errors import InputError
from engine.ops.checks import Check
from engine.ops.dispatch import call, many_rows
from engine.ops.gemm import power_of_two
from engine.ops.registry import Arrays, Case, GuardedArena, Op, cases, register
from engine.runtime.arena import Arena, Tensor, as_tensor
from engine.runtime.program import Program

RULES = {"euler": 0, "renoise": 1, "implied": 2}
MAX_CHANNELS = 128  # of an action: a program holds a row


@dataclass(frozen=True)
class FlowState:
    """What B chunks of H actions with A channels carry from step to step, in memory that a plan reads and writes.

    step i32 [B]: steps done; tau f32 [B, N+1, H]: local times; index i32 [B, N, H]: row of each time in its table;
    delay i32 [B]: committed actions; prefix, noise, x f32 [B, H, A]: committed actions, the noise, the sample (renoise:
    the last prediction); due i32 [B, H]: step in which a row leaves, -1: never; slot i32 [B]: where in the ring;
    ring f32 [slots, H, dims]: rows in the units of the robot; scale, offset f32 [B, dims]; low, high f32 [dims];
    bad i32 [B]: 1 where a row that left was not finite.
    """

    step: Tensor
    tau: Tensor
    index: Tensor
    delay: Tensor
    prefix: Tensor
    noise: Tensor
    x: Tensor
    due: Tensor
    slot: Tensor
    ring: Tensor
    scale: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor
    bad: Tensor

    @staticmethod
    def empty(arena: Arena, name: str, batch: int, steps: int, horizon: int, channels: int, dims: int, slots: int
              ) -> FlowState:  # fmt: skip
        if min(batch, steps, horizon, channels, dims, slots) < 1 or not dims <= channels <= MAX_CHANNELS:
            raise InputError(
                f"flow {name!r}: batch {batch}, steps {steps}, horizon {horizon}, slots {slots} must be positive and "
                f"dims {dims} <= channels {channels} <= {MAX_CHANNELS}"
            )
        chunk = (batch, horizon, channels)

        def f32(part: str, *shape: int, mapped: bool = False) -> Tensor:
            return arena.alloc(f"{name}.{part}", shape, "f32", "io", mapped)

        def i32(part: str, *shape: int, mapped: bool = False) -> Tensor:
            return arena.alloc(f"{name}.{part}", shape, "i32", "io", mapped)

        # Rows that left are read while the next step runs.

        return FlowState(
            i32("step", batch), f32("tau", batch, steps + 1, horizon), i32("index", batch, steps, horizon),
            i32("delay", batch), f32("prefix", *chunk), f32("noise", *chunk), f32("x", *chunk),
            i32("due", batch, horizon), i32("slot", batch), f32("ring", slots, horizon, dims, mapped=True),
            f32("scale", batch, dims), f32("offset", batch, dims), f32("low", dims), f32("high", dims),
            i32("bad", batch, mapped=True),
        )  # fmt: skip

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(batch, steps, horizon, channels)."""
        b, h, a = self.x.shape
        return b, self.index.shape[1], h, a

    def fits(self, check: Check) -> None:
        """InputError unless the buffers belong together."""
        check.takes("state.x", self.x, (None, None, None))
        check.takes("state.index", self.index, (None, None, None), "i32")
        check.takes("state.ring", self.ring, (None, None, None))
        b, n, h, a = self.sizes
        dims, slots = self.ring.shape[2], self.ring.shape[0]
        i32 = {"step": (b,), "index": (b, n, h), "delay": (b,), "due": (b, h), "slot": (b,), "bad": (b,)}
        f32 = {"tau": (b, n + 1, h), "prefix": (b, h, a), "noise": (b, h, a), "ring": (slots, h, dims),
               "scale": (b, dims), "offset": (b, dims), "low": (dims,), "high": (dims,)}  # fmt: skip
        for dtype, shapes in (("i32", i32), ("f32", f32)):
            for name, shape in shapes.items():
                check.takes(f"state.{name}", getattr(self, name), shape, dtype)
        check.need(dims <= a <= MAX_CHANNELS, f"{a} channels must hold {dims} and be at most {MAX_CHANNELS}")


def flow_begin(
    state: FlowState,
    out: Tensor,
    rows: Tensor,
    *,
    rule: str = "euler",
    context: Tensor | None = None,
    times: Tensor | None = None,
    hidden: Tensor | None = None,
    label: str = "",
) -> None:
    """out [B*H, A + P + T] = [value | context | times row] of every action; rows i32 [B*H]: its row in tables of times.

    The value is the sample with its first `delay` actions replaced by the prefix ('euler', 'implied'), or noise * tau +
    prediction * (1 - tau) ('renoise'). context f32 [B, P], times f32 [R, T]: optional; hidden i32 [A]: channels != 0
    that the network sees as zero. All f32. Chunks whose steps are done are left alone.
    """
    check = Check("flow_begin", label)
    check.one_of("rule", rule, RULES)
    state.fits(check)
    b, n, h, a = state.sizes
    wide = a
    if context is not None:
        check.takes("context", context, (b, None))
        wide += context.shape[1]
    if times is not None:
        check.takes("times", times, (None, None))
        wide += times.shape[1]
    check.takes("out", out, (b * h, wide), strided=True)
    check.takes("rows", rows, (b * h,), "i32")
    check.may_take("hidden", hidden, (a,), "i32")
    sizes = {
        "context_width": context.shape[1] if context is not None else 0,
        "time_width": times.shape[1] if times is not None else 0,
    }
    buffers: dict[str, Tensor | None] = {
        "step": state.step, "tau": state.tau, "index": state.index, "delay": state.delay, "prefix": state.prefix,
        "noise": state.noise, "x": state.x, "out": out, "rows": rows, "context": context, "times": times,
        "hidden": hidden,
    }  # fmt: skip

    def programs() -> list[Program]:
        p, t = sizes["context_width"], sizes["time_width"]
        blocks = {"BA": power_of_two(a), "BP": power_of_two(max(p, 1)), "BT": power_of_two(max(t, 1))}
        return [Program("flow.begin", (b * h, 1, 1), {**buffers, "ldo": out.ld},
                        {"STEPS": n, "H": h, "A": a, "P": p, "T": t, "RULE": RULES[rule], **blocks},
                        warps=1)]  # fmt: skip

    call("flow_begin", label, nbytes=0, programs=programs if many_rows(b * h) else None, **buffers, ldo=out.ld,
         batch=b, steps=n, horizon=h, channels=a, **sizes, rule=RULES[rule])  # fmt: skip


def flow_end(
    state: FlowState, pred: Tensor, *, rule: str = "euler", squash: Tensor | None = None, label: str = ""
) -> None:
    """Takes the network's answer pred f32 [B*H, A], advances every chunk by a step, and lets finished rows leave.

    'euler': x += (tau[j+1] - tau[j]) * pred, a velocity. The others take a clean prediction, where tau[j] > 0:
    'renoise' x = pred; 'implied' x = r * x + (1 - r) * pred with r = tau[j+1] / tau[j]. Rows with due == step leave
    into the ring as clamp(s(x) * scale + offset, low, high); s: the logistic function where squash (i32 [A]) is not 0.
    """
    check = Check("flow_end", label)
    check.one_of("rule", rule, RULES)
    state.fits(check)
    b, n, h, a = state.sizes
    check.takes("pred", pred, (b * h, a), strided=True)
    check.may_take("squash", squash, (a,), "i32")
    buffers: dict[str, Tensor | None] = {
        "step": state.step, "tau": state.tau, "due": state.due, "slot": state.slot, "pred": pred, "x": state.x,
        "ring": state.ring, "scale": state.scale, "offset": state.offset, "low": state.low, "high": state.high,
        "squash": squash, "bad": state.bad,
    }  # fmt: skip
    dims, slots = state.ring.shape[2], state.ring.shape[0]

    def programs() -> list[Program]:
        blocks = {"BA": power_of_two(a), "BH": max(1, min(power_of_two(h), 2048 // power_of_two(a)))}
        return [Program("flow.end", (b, 1, 1), {**buffers, "ldp": pred.ld, "slots": slots},
                        {"STEPS": n, "H": h, "A": a, "DIMS": dims, "RULE": RULES[rule], **blocks})]  # fmt: skip

    call("flow_end", label, nbytes=0, programs=programs if many_rows(b * h) else None, **buffers, ldp=pred.ld,
         slots=slots, batch=b, steps=n, horizon=h, channels=a, dims=dims, rule=RULES[rule])  # fmt: skip


# ---------------------------------------------------------------------------------------------------- contract
# A case runs `calls` whole steps with a network that answers recorded predictions.
def _inputs(c: Case, rng: np.random.Generator) -> Arrays:
    f, i = np.float32, np.int32
    b, n, h, a = c.b, c.n, c.h, c.a
    tau = np.sort(rng.random((b, n + 1, h)).astype(f), axis=1)[:, ::-1].copy()
    tau[:, 0], tau[:, -1] = 1, 0
    tau[rng.random(tau.shape) < 0.2] = 0  # finished early
    delay = rng.integers(0, h, b).astype(i)
    delay[0] = 0
    out = {
        "step": rng.integers(0, 2, b).astype(i),
        "tau": tau,
        "index": rng.integers(0, c.r, (b, n, h)).astype(i),
        "delay": delay,
        "due": rng.integers(-1, n, (b, h)).astype(i),
        "slot": rng.permutation(c.slots)[:b].astype(i),
        "scale": rng.standard_normal((b, c.dims_out)).astype(f),
        "offset": rng.standard_normal((b, c.dims_out)).astype(f),
        "low": np.full(c.dims_out, -2, f),
        "high": np.full(c.dims_out, 2.5, f),
        "pred": rng.standard_normal((c.calls, b * h, a)).astype(f),
        "hidden": (rng.random(a) < 0.3).astype(i),
    }
    out |= {name: rng.standard_normal((b, h, a)).astype(f) for name in ("prefix", "noise", "x")}
    if c.p:
        out["context"] = rng.standard_normal((b, c.p)).astype(f)
    if c.t:
        out["times"] = rng.standard_normal((c.r, c.t)).astype(f)
    if c.kind == "odd":
        out["step"][-1] = n  # done already
        out["pred"][0, 0, 0] = np.nan
        out["due"][0, 0], out["step"][0] = 0, 0
    return out


OUTPUTS = ("x", "ring", "step", "bad", "out", "rows")


def _reference(c: Case, a: Arrays) -> Arrays:
    import torch

    t = {k: torch.from_numpy(v).double() if v.dtype == np.float32 else torch.from_numpy(v) for k, v in a.items()}
    x, step = t["x"].clone(), t["step"].clone()
    ring = torch.zeros(c.slots, c.h, c.dims_out, dtype=torch.float64)
    bad = torch.zeros(c.b, dtype=torch.int32)
    seen = torch.zeros(c.calls, c.b * c.h, c.a + c.p + c.t, dtype=torch.float64)
    rows = torch.zeros(c.calls, c.b * c.h, dtype=torch.int32)
    for call_, pred in enumerate(t["pred"].reshape(c.calls, c.b, c.h, c.a)):
        for b in range(c.b):
            j, d = int(step[b]), int(t["delay"][b])
            mine = slice(b * c.h, (b + 1) * c.h)
            if j >= c.n:
                if call_:
                    seen[call_, mine], rows[call_, mine] = seen[call_ - 1, mine], rows[call_ - 1, mine]
                continue
            x[b, :d] = t["prefix"][b, :d]
            now, then = t["tau"][b, j][:, None], t["tau"][b, j + 1][:, None]
            value = t["noise"][b] * now + x[b] * (1 - now) if c.rule == "renoise" else x[b]
            value = torch.where(t["hidden"] != 0, torch.zeros(()).double(), value)
            parts = [value]
            if c.p:
                parts.append(t["context"][b].expand(c.h, -1))
            if c.t:
                parts.append(t["times"][t["index"][b, j].long()])
            seen[call_, mine], rows[call_, mine] = torch.cat(parts, 1), t["index"][b, j]
            kept = then / torch.where(now > 0, now, torch.ones_like(now)) if c.rule == "implied" else 0 * now
            clean = torch.where(kept > 0, kept * x[b] + (1 - kept) * pred[b], pred[b])
            x[b] = x[b] + (then - now) * pred[b] if c.rule == "euler" else torch.where(now > 0, clean, x[b])
            leaving = t["due"][b] == j
            v = x[b, leaving, : c.dims_out]
            if c.rule != "euler":
                v = torch.where(t["hidden"][: c.dims_out] != 0, v.sigmoid(), v)
            v = v * t["scale"][b] + t["offset"][b]
            bad[b] |= int(not v.isfinite().all())
            ring[int(t["slot"][b]), leaving] = torch.minimum(torch.maximum(v, t["low"]), t["high"])
            step[b] = j + 1
    out = {"x": x, "ring": ring, "step": step, "bad": bad, "out": seen, "rows": rows}
    return {k: np.nan_to_num(v.numpy().astype(np.float64), nan=-7.0) for k, v in out.items()}


def _call(c: Case, a: Arrays):
    arena = GuardedArena()
    state = FlowState.empty(arena, "flow", c.b, c.n, c.h, c.a, c.dims_out, c.slots)
    for name in (
        "step",
        "tau",
        "index",
        "delay",
        "due",
        "slot",
        "scale",
        "offset",
        "low",
        "high",
        "prefix",
        "noise",
        "x",
    ):
        getattr(state, name).write(a[name])
    t = {k: as_tensor(v) for k, v in a.items()}
    out = arena.alloc("out", (c.b * c.h, c.a + c.p + c.t), "f32", "io")
    rows = arena.alloc("rows", (c.b * c.h,), "i32", "io")
    squash = None if c.rule == "euler" else t["hidden"]

    def step(pred: Tensor) -> None:
        flow_begin(state, out, rows, rule=c.rule, context=t.get("context"), times=t.get("times"), hidden=t["hidden"])
        flow_end(state, pred, rule=c.rule, squash=squash)

    return state, out, rows, step


def _run(c: Case, a: Arrays) -> Arrays:
    state, out, rows, step = _call(c, a)
    seen, ids = [], []
    for k in range(c.calls):
        step(as_tensor(a["pred"]).slice(k * c.b * c.h * c.a, (c.b * c.h, c.a)))
        seen.append(out.read())
        ids.append(rows.read())
    got = {name: getattr(state, name).read() for name in ("x", "ring", "step", "bad")}
    got |= {"out": np.stack(seen), "rows": np.stack(ids)}
    return {k: np.nan_to_num(v.astype(np.float64), nan=-7.0) for k, v in got.items()}


def _prepare(c: Case, a: Arrays):
    state, _, _, step = _call(c, a)
    pred = as_tensor(a["pred"]).slice(0, (c.b * c.h, c.a))

    def run() -> None:
        state.step.numpy()[:] = 0
        step(pred)

    return run


def _torch(c: Case, a: Arrays):
    import torch

    x, pred, tau = (torch.from_numpy(a[k]) for k in ("x", "pred", "tau"))
    prefix, first, delta = torch.from_numpy(a["prefix"]), pred[0].reshape(x.shape), (tau[:, 1] - tau[:, 0])[..., None]
    keep = torch.arange(c.h)[None, :, None] < torch.from_numpy(a["delay"])[:, None, None]
    return lambda: torch.where(keep, prefix, x) + delta * first


register(
    Op(
        name="flow",
        kernels=("flow_begin", "flow_end"),
        cases=[
            *cases(
                "tiny",
                *(
                    {"b": b, "n": n, "h": h, "a": a, "dims_out": dims, "p": p, "t": t, "r": 7, "slots": b + 1,
                     "calls": 3, "rule": rule}
                    for rule in RULES
                    for b, n, h, a, dims, p, t in (
                        (1, 10, 50, 32, 14, 0, 0), (4, 5, 10, 20, 20, 20, 32), (3, 4, 6, 8, 7, 5, 0),
                        (2, 2, 3, 4, 4, 0, 6),
                    )
                ),
            ),
            *cases(
                "odd",
                *(
                    {"b": 3, "n": 2, "h": h, "a": a, "dims_out": 3, "p": 0, "t": 3, "r": 2, "slots": 5, "calls": 3,
                     "rule": rule}
                    for rule in RULES
                    for h, a in ((1, 5), (70, 3))
                ),
            ),
            *cases("real", {"b": 1, "n": 10, "h": 50, "a": 32, "dims_out": 14, "p": 0, "t": 0, "r": 306, "slots": 4,
                            "calls": 1, "rule": "euler"}),
        ],
        inputs=_inputs,
        reference=_reference,
        run=_run,
        prepare=_prepare,
        torch_eager=_torch,
        tolerance={"f32": 1e-6},
        bytes=lambda c: 4 * c.b * c.h * (7 * c.a + c.p + c.t),
        flops=lambda c: 6 * c.b * c.h * c.a,
    )
)  # fmt: skip
