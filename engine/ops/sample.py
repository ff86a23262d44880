"""The next token, drawn on the device: penalties, temperature, top-k, top-p, min-p, Gumbel-max (csrc/ops/sample)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from engine import _C
from engine.ops.checks import Check
from engine.ops.dispatch import call
from engine.ops.registry import Arrays, Case, GuardedArena, Op, cases, register
from engine.ops.rng import philox_torch
from engine.runtime.arena import Arena, Tensor, as_tensor


@dataclass(frozen=True)
class SamplerState:
    """Everything a draw reads and writes besides logits; all in arena memory."""

    control: Tensor  # f32 [4]: temperature, top_p, min_p, repetition_penalty
    limits: Tensor  # i32 [1]: top_k, 0 = off
    seed: Tensor  # u64 [1]
    seen: Tensor  # u8 [V]
    token: Tensor  # i32 [1]
    history: Tensor  # i32 [capacity]
    pos: Tensor  # i32 [1]
    step: Tensor  # i32 [1]
    work: Tensor  # f32 [V]
    ws: Tensor
    ticket: Tensor  # i32 [2]

    @staticmethod
    def empty(arena: Arena, vocab: int, capacity: int) -> SamplerState:
        def io(name: str, n: int, dtype: str) -> Tensor:
            return arena.alloc(f"sampler.{name}", (n,), dtype, "io")

        return SamplerState(
            io("control", 4, "f32"),
            io("limits", 1, "i32"),
            io("seed", 1, "u64"),
            io("seen", vocab, "u8"),
            io("token", 1, "i32"),
            io("history", capacity, "i32"),
            io("pos", 1, "i32"),
            io("step", 1, "i32"),
            io("work", vocab, "f32"),
            io("ws", _C.sample_workspace(vocab), "u8"),
            io("ticket", 2, "i32"),
        )

    def fits(self, check: Check, vocab: int) -> None:
        """InputError unless the buffers serve a vocabulary of this size."""
        sizes = {
            "control": 4,
            "limits": 1,
            "seed": 1,
            "seen": vocab,
            "token": 1,
            "pos": 1,
            "step": 1,
            "work": vocab,
            "ticket": 2,
        }
        dtypes = {"control": "f32", "seed": "u64", "seen": "u8", "work": "f32"}
        for name, n in sizes.items():
            check.takes(f"state.{name}", getattr(self, name), (n,), dtypes.get(name, "i32"))
        check.takes("state.history", self.history, (None,), "i32")
        check.room(self.ws, _C.sample_workspace(vocab))


def sample(logits: Tensor, state: SamplerState, *, label: str = "sample") -> None:
    """Draws one token from logits [V] f32 (or [1, V]) into state.token.

    Records it in history and seen, advances pos and step.
    """
    check, s = Check("sample", label), state
    check.takes("logits", logits, [(None,), (1, None)])
    vocab = logits.shape[-1]
    check.need(vocab >= 1, "logits are empty; they must have one value per token")
    s.fits(check, vocab)
    call("sample", label, nbytes=logits.nbytes, logits=logits, vocab=vocab,
         control=s.control, limits=s.limits, seed=s.seed, seen=s.seen,
         work=s.work, ws=s.ws, token=s.token, history=s.history,
         capacity=s.history.shape[0], pos=s.pos, step=s.step,
         ticket=s.ticket)  # fmt: skip


# ---------------------------------------------------------------------------------------------------- contract


def _inputs(c: Case, rng: np.random.Generator) -> Arrays:
    logits = (3 * rng.standard_normal(c.v)).astype(np.float32)
    logits[list(c.dims.get("peaks", ()))] = 30
    if c.dims.get("lost"):
        logits[:] = -np.inf  # no finite logit: the id is -1
    return {
        "logits": logits,
        "seen": (rng.random(c.v) < 0.3).astype(np.uint8),
        "seed": rng.integers(0, 2**63, 1, dtype=np.uint64),
    }


def filtered_logits(logits, seen, *, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float):
    """fp64 logits after penalty, temperature and filters (-inf where dropped): the specification (torch [V])."""
    import torch

    x = logits.double()
    x = torch.where(seen.bool(), torch.where(x > 0, x / penalty, x * penalty), x) / temperature
    if 0 < top_k < len(x):
        x = x.masked_fill(x < x.topk(top_k).values[-1], float("-inf"))
    if top_p < 1:
        p, order = x.softmax(-1).sort(descending=True, stable=True)
        kept = int((p.cumsum(-1) < top_p).sum()) + 1
        x = x.masked_fill(x < x[order[min(kept, len(x)) - 1]], float("-inf"))
    if min_p > 0:
        x = x.masked_fill(x < x.max() + np.log(min_p), float("-inf"))
    return x


def _reference(c: Case, a: Arrays) -> Arrays:
    import torch

    logits, seen = torch.from_numpy(a["logits"]), torch.from_numpy(a["seen"])
    greedy = c.temp == 0
    if not logits.isfinite().any():
        return {"ids": np.full(c.draws, -1)}
    x = filtered_logits(
        logits,
        seen,
        temperature=1.0 if greedy else c.temp,
        top_k=0 if greedy else c.k,
        top_p=1.0 if greedy else c.p,
        min_p=0.0 if greedy else c.minp,
        penalty=c.pen,
    )
    picks = []
    for step in range(c.draws):
        score = x
        if not greedy:
            bits = philox_torch(c.v, int(a["seed"][0]), step, 1).double()
            score = x - (-((bits + 0.5) * 2.0**-32).log()).log()
        picks.append(int(score.argmax()))
    return {"ids": np.array(picks)}


def _call(c: Case, a: Arrays):
    state = SamplerState.empty(GuardedArena(), c.v, c.draws)
    state.control.numpy()[:] = [c.temp, c.p, c.minp, c.pen]
    state.limits.numpy()[0] = c.k
    state.seed.numpy()[:] = a["seed"]
    logits = as_tensor(a["logits"])

    def draw() -> None:
        state.seen.numpy()[:] = a["seen"]  # the draw marks its token; every draw of a case starts equal
        sample(logits, state)

    return draw, state


def _run(c: Case, a: Arrays) -> Arrays:
    draw, state = _call(c, a)
    for _ in range(c.draws):
        draw()
    return {"ids": state.history.numpy().copy()}


def _torch(c: Case, a: Arrays):
    import torch

    logits = torch.from_numpy(a["logits"])

    def draw():
        x = logits / max(c.temp, 1e-6)
        if c.k:
            x = x.masked_fill(x < x.topk(c.k).values[-1], float("-inf"))
        if c.p < 1:
            p, order = x.softmax(-1).sort(descending=True)
            x = x.masked_fill(
                torch.zeros_like(x, dtype=torch.bool).scatter(0, order, p.cumsum(-1) - p > c.p), float("-inf")
            )
        return torch.multinomial(x.softmax(-1), 1)

    return draw


_S: dict[str, Any] = {"temp": 0.9, "k": 0, "p": 1.0, "minp": 0.0, "pen": 1.0, "draws": 8}
register(
    Op(
        name="sample",
        cases=[
            *cases(
                "tiny",
                *(
                    {"v": 500, **_S, **o}
                    for o in (
                        {},
                        {"temp": 0},
                        {"temp": 0, "pen": 1.7},
                        {"k": 5},
                        {"p": 0.7},
                        {"minp": 0.1},
                        {"k": 20, "p": 0.9, "minp": 0.02, "pen": 1.2},
                        {"k": 1},
                    )
                ),
            ),
            *cases(
                "odd",
                *(
                    {"v": v, **_S, **o}
                    for v, o in (
                        (1, {}),
                        (3, {"k": 2}),
                        (4097, {"p": 0.95}),
                        (9999, {"k": 50, "p": 0.5}),
                        (700, {"temp": 30.0, "pen": 8.0, "draws": 32}),  # nearly flat: every logit counts
                        (5000, {"temp": 0, "peaks": (4095,)}),
                        (4097, {"temp": 0, "peaks": (4096,)}),
                        (9000, {"temp": 0, "peaks": (8999, 4100, 77, 76)}),  # ties: the lowest id
                        (300, {"temp": 0, "lost": 1, "draws": 2}),
                        (300, {"p": 0.9, "lost": 1, "draws": 2}),
                        (5000, {"k": 40, "p": 0.9, "lost": 1, "draws": 2}),
                    )
                ),
            ),
            *cases("real", {"v": 131072, **_S, "temp": 1.0, "p": 0.95}, {"v": 131072, **_S, "temp": 0}),
        ],
        inputs=_inputs,
        reference=_reference,
        run=_run,
        prepare=lambda c, a: _call(c, a)[0],
        torch_eager=_torch,
        tolerance={"f32": 0.0},
        bytes=lambda c: 12 * c.v,
        flops=lambda c: 0,
        absent={"triton": "one block's reduction: no tiles"},
    )
)
