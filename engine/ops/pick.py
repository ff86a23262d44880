"""Tokens drawn from guided logits by inverse CDF: one pass of a masked planner, one step of an autoregressive one.

csrc/ops/pick. Sources: Chang et al. 2022, section 3.2 (the least certain are masked again); Ho and Salimans 2022
(classifier-free guidance, here of logits).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.errors import InputError
from engine.ops.checks import Check
from engine.ops.dispatch import call
from engine.ops.registry import Arrays, Case, GuardedArena, Op, cases, register
from engine.runtime.arena import Arena, Tensor, as_tensor

MAX_POSITIONS = 256
MAX_CODES = 4096
MAX_PASSES = 8


def pick_masked(
    cond: Tensor,
    ids: Tensor,
    uniforms: Tensor,
    counts: Tensor | None,
    *,
    uncond: Tensor | None = None,
    scale: Tensor | None = None,
    mask_id: int,
    topk: int,
    temperature: float = 1.0,
    label: str = "",
) -> None:
    """Draws the masked positions of ids i32 [N], then masks the least certain of them again.

    Of each position with ids[n] == mask_id: l = uncond + scale * (cond - uncond), or cond; of the topk highest l (of
    equals the lowest index) with probabilities softmax(l / temperature) the first, in index order, whose cumulative
    probability exceeds uniforms[n]. The counts[0] positions of those whose token has the lowest softmax(l), over all K
    and without temperature, ties to the lowest position, become mask_id again; all of them where counts[0] is more.

    cond, uncond f32 [N, K], rows may lie apart; scale f32 [1], needed with uncond; uniforms f32 [N] in [0, 1);
    counts i32 [1] or None: none is masked again. At most 256 positions and 4096 codes; mask_id is no code.

    Raises:
        InputError: a shape, a dtype, or a limit is wrong; uncond and scale do not come together.
    """
    check = Check("pick_masked", label)
    check.takes("cond", cond, (None, None), strided=True)
    n, k = cond.shape
    check.need(1 <= n <= MAX_POSITIONS, f"{n} positions; 1 to {MAX_POSITIONS} are possible")
    check.need(1 <= k <= MAX_CODES, f"{k} codes; 1 to {MAX_CODES} are possible")
    check.may_take("uncond", uncond, (n, k), strided=True)
    check.need((uncond is None) == (scale is None), "uncond and scale belong together")
    check.may_take("scale", scale, (1,))
    check.takes("ids", ids, (n,), "i32")
    check.takes("uniforms", uniforms, (n,))
    check.may_take("counts", counts, (1,), "i32")
    if counts is not None:
        check.apart("ids", ids, counts=counts)
    check.need(not 0 <= mask_id < k, f"mask_id={mask_id} is one of the {k} codes")
    check.need(topk >= 1, f"topk={topk} must be at least 1")
    check.need(temperature > 0, f"temperature={temperature} must be above 0")
    call("pick_masked", label, nbytes=0, cond=cond, ldc=cond.ld, uncond=uncond, ldu=uncond.ld if uncond else 0,
         scale=scale, ids=ids, uniforms=uniforms, counts=counts, n=n, k=k, topk=topk, mask_id=mask_id,
         temperature=temperature)  # fmt: skip


@dataclass(frozen=True)
class NextState:
    """What an autoregressive planner carries from step to step, in memory that a plan reads and writes.

    uniforms f32 [capacity] in [0, 1); tokens i32 [capacity]: drawn so far, K from the end on; step i32 [1]: tokens
    drawn; limit i32 [1]: the most that can come; open i32 [1]: 1 where END may end it; done i32 [1].
    Of each of `pair` conditioning passes, 1 to 8, for the next step: ids i32 [pair]: the token just drawn; pos i32
    [pair]: its position; rows i32 [pair]: rows of a table of conditions, row step of rows_table i32 [capacity, pair]
    (the last where there is none).
    """

    uniforms: Tensor
    tokens: Tensor
    step: Tensor
    limit: Tensor
    open: Tensor
    done: Tensor
    ids: Tensor
    pos: Tensor
    rows_table: Tensor
    rows: Tensor

    @staticmethod
    def empty(arena: Arena, name: str, capacity: int, pair: int) -> NextState:
        if capacity < 1 or not 1 <= pair <= MAX_PASSES:
            raise InputError(f"pick {name!r}: capacity {capacity} must be at least 1, pair {pair} 1 to {MAX_PASSES}")

        def i32(part: str, *shape: int) -> Tensor:
            return arena.alloc(f"{name}.{part}", shape, "i32", "io")

        return NextState(
            arena.alloc(f"{name}.uniforms", (capacity,), "f32", "io"), i32("tokens", capacity), i32("step", 1),
            i32("limit", 1), i32("open", 1), i32("done", 1), i32("ids", pair), i32("pos", pair),
            i32("rows_table", capacity, pair), i32("rows", pair),
        )  # fmt: skip

    def fits(self, check: Check) -> tuple[int, int]:
        """(capacity, pair); InputError unless the buffers belong together."""
        check.takes("state.ids", self.ids, (None,), "i32")
        pair = self.ids.shape[0]
        check.need(1 <= pair <= MAX_PASSES, f"the state serves {pair} passes; 1 to {MAX_PASSES} are possible")
        check.takes("state.uniforms", self.uniforms, (None,))
        capacity = self.uniforms.shape[0]
        shapes: dict[str, tuple[int, ...]] = {
            "tokens": (capacity,), "step": (1,), "limit": (1,), "open": (1,), "done": (1,), "ids": (pair,),
            "pos": (pair,), "rows_table": (capacity, pair), "rows": (pair,),
        }  # fmt: skip
        for name, shape in shapes.items():
            check.takes(f"state.{name}", getattr(self, name), shape, "i32")
        return capacity, pair


def pick_next(
    cond: Tensor,
    state: NextState,
    *,
    uncond: Tensor | None = None,
    scale: Tensor | None = None,
    label: str = "",
) -> None:
    """Draws token n = state.step of a sequence; code K-1 is END, which does not come where state.open is 0.

    l = uncond + scale * (cond - uncond), or cond; the token is the first whose cumulative softmax(l) exceeds
    uniforms[n]. The sequence is done at END or where n reaches state.limit; tokens[n] is K from there on. ids (END as
    K-2, so that tables of codes can be read), pos, rows and step are those of the next step. Where n has reached the
    capacity nothing is written.

    cond, uncond f32 [1, K], K from 2 to 4096; scale f32 [1], needed with uncond.

    Raises:
        InputError: a shape, a dtype, or a limit is wrong; uncond and scale do not come together.
    """
    check, s = Check("pick_next", label), state
    check.takes("cond", cond, (1, None), strided=True)
    k = cond.shape[1]
    check.need(2 <= k <= MAX_CODES, f"{k} codes; 2 to {MAX_CODES} are possible, the last is END")
    check.may_take("uncond", uncond, (1, k), strided=True)
    check.need((uncond is None) == (scale is None), "uncond and scale belong together")
    check.may_take("scale", scale, (1,))
    capacity, pair = s.fits(check)
    check.need(capacity >= 1, "the state has no capacity")
    call("pick_next", label, nbytes=0, cond=cond, uncond=uncond, scale=scale, k=k, uniforms=s.uniforms, tokens=s.tokens,
         step=s.step, limit=s.limit, open=s.open, done=s.done, ids=s.ids, pos=s.pos, rows_table=s.rows_table,
         rows=s.rows, capacity=capacity, pair=pair)  # fmt: skip


# ---------------------------------------------------------------------------------------------------- contract
# A case draws one pass of a masked sequence, then a sequence token by token until one step past its capacity.
# Dimensions: n, k, topk, cap; w: guidance, none without; temp; count: masked again, none without; known: of `known`
# positions one is masked; coarse: logits in halves, so that many are equal; twins: every position twice, equal scores;
# limit; open: END may come, in the middle of the capacity; pair: passes;
# gaps: logits of -inf, in two rows all of them.
def _guided(rows: Any, c: Case) -> Any:
    """l [..., K] of rows [..., 2 K] in fp64, numpy or torch."""
    cond, uncond = rows[..., : c.k], rows[..., c.k :]
    return uncond + c.w * (cond - uncond) if "w" in c.dims else cond


def _inputs(c: Case, rng: np.random.Generator) -> Arrays:
    """Redrawn until rounding decides nothing: equal values are equal in fp32, others are 1e-5 apart."""
    f, cap = np.float32, c.dims.get("cap", 5)
    while True:
        logits = 2 * rng.standard_normal((c.n, 2 * c.k))
        chain = 2 * rng.standard_normal((cap + 1, 2 * c.k))
        if c.dims.get("coarse"):
            logits = np.round(2 * logits) / 2  # with zeros of both signs
        for at in (0, cap // 2):
            chain[at, [c.k - 1, 2 * c.k - 1]] = 12, 2
        if c.dims.get("twins"):
            logits[(c.n + 1) // 2 :] = logits[: c.n // 2]
        if c.dims.get("gaps"):
            logits[:, : c.k : 3] = -np.inf
            logits[:3:2] = -np.inf
        logits, chain = logits.astype(f), chain.astype(f)
        ids = np.full(c.n, c.k, np.int32)
        known = np.arange(c.n) % c.dims.get("known", 1) > 0
        ids[known] = rng.integers(0, c.k, known.sum())
        drawn = [
            _between(row, c.topk, c.dims.get("temp", 1.0), rng.random()) for row in _guided(logits.astype(float), c)
        ]
        if c.dims.get("twins"):
            drawn[(c.n + 1) // 2 :] = drawn[: c.n // 2]
        codes = c.k if c.dims.get("open") else c.k - 1
        steps = [_between(row[:codes], codes, 1.0, rng.random()) for row in _guided(chain.astype(float), c)]
        scores = np.sort([score for (_, score, _), skip in zip(drawn, known) if not skip])
        gaps = np.diff(scores) / np.maximum(scores[1:], 1e-30)
        if all(clear for *_, clear in drawn + steps) and not ((gaps > 0) & (gaps < 1e-5)).any():
            break
    uniforms = np.array([u for u, *_ in drawn], f)
    if not c.dims.get("twins"):
        uniforms[-1] = 0  # the first that is kept
    return {"logits": logits, "chain": chain, "ids": ids, "uniforms": uniforms,
            "next_uniforms": np.array([u for u, *_ in steps[:cap]], f),
            "rows_table": rng.integers(0, 99, (cap, c.dims.get("pair", 2)), dtype=np.int32)}  # fmt: skip


def _between(row: np.ndarray, topk: int, temperature: float, u: float) -> tuple[float, float, bool]:
    """(a uniform near u and inside its token's share, score of the token, whether rounding cannot change it)."""
    order = np.sort(row)[::-1]
    if order[0] == -np.inf:
        return u, 0.0, True
    clear = topk >= len(row) or order[topk - 1] == order[topk] or order[topk - 1] - order[topk] > 1e-5
    kept = np.argsort(-row, kind="stable")[:topk]
    p = np.zeros(len(row))
    p[kept] = np.exp((row[kept] - order[0]) / temperature)
    mass = np.cumsum(p) / p.sum()
    i = int(np.searchsorted(mass, u, side="right"))
    if p[i] / p.sum() < 1e-4:
        i = int(p.argmax())
    low = mass[i] - p[i] / p.sum()
    u = float(np.clip(u, low + 0.1 * (mass[i] - low), low + 0.9 * (mass[i] - low)))
    return u, float(np.exp(row[i] - order[0]) / np.exp(row - order[0]).sum()), bool(clear)


def _reference(c: Case, a: Arrays) -> Arrays:
    import torch

    def draw(l: Any, u: float) -> int:  # noqa: E741
        mass = l.softmax(0).cumsum(0)
        return int((mass > float(u) * mass[-1]).nonzero()[0])

    ids, scores = torch.from_numpy(a["ids"].astype(np.int64)), {}
    for n, l in enumerate(_guided(torch.from_numpy(a["logits"]).double(), c)):  # noqa: E741
        if ids[n] != c.k:
            continue
        kept = torch.full_like(l, -torch.inf)
        best = l.sort(descending=True, stable=True).indices[: c.topk]
        kept[best] = l[best]
        finite = bool(l.isfinite().any())
        ids[n] = draw(kept / c.dims.get("temp", 1.0), a["uniforms"][n]) if finite else best.max()
        scores[n] = float(l.softmax(0)[ids[n]]) if finite else 0.0
    for n in sorted(scores, key=lambda n: (scores[n], n))[: c.dims.get("count", 0)]:
        ids[n] = c.k
    cap, pair = a["rows_table"].shape
    tokens, trail, done, limit = [], [], False, c.dims.get("limit", cap)
    for n, l in enumerate(_guided(torch.from_numpy(a["chain"]).double(), c)[:cap]):  # noqa: E741
        if not c.dims.get("open"):
            l[c.k - 1] = -torch.inf
        token = draw(l, a["next_uniforms"][n])
        done = done or token == c.k - 1 or n >= limit
        tokens.append(c.k if done else token)
        rows = a["rows_table"][min(n + 1, cap - 1)]
        trail.append([*[min(token, c.k - 2)] * pair, *[n + 1] * pair, *rows, n + 1, int(done)])
    trail.append(trail[-1])
    return {"ids": ids.numpy(), "tokens": np.array(tokens), "trail": np.array(trail)}


def _call(c: Case, a: Arrays) -> tuple[Any, Any, dict[str, Tensor], NextState]:
    """(one pass, step n of the sequence, buffers of the pass, state)."""
    arena, t, guided = GuardedArena(), {k: as_tensor(v) for k, v in a.items()}, "w" in c.dims
    cap = a["rows_table"].shape[0]
    ids, scale = arena.alloc("ids", (c.n,), "i32", "io"), arena.alloc("scale", (1,), "f32", "io")
    counts = arena.alloc("counts", (1,), "i32", "io") if "count" in c.dims else None
    scale.write(np.array([c.dims.get("w", 1.0)]))
    if counts is not None:
        counts.write(np.array([c.count]))
    state = NextState.empty(arena, "next", *a["rows_table"].shape)
    state.uniforms.write(a["next_uniforms"])
    state.rows_table.write(a["rows_table"])
    state.limit.write(np.array([c.dims.get("limit", cap)]))
    state.open.write(np.array([c.dims.get("open", 0)]))

    def guidance(rows: Tensor) -> dict[str, Any]:
        return {"uncond": rows.columns(c.k, c.k) if guided else None, "scale": scale if guided else None}

    def masked() -> None:
        ids.write(a["ids"])
        pick_masked(t["logits"].columns(0, c.k), ids, t["uniforms"], counts, **guidance(t["logits"]), mask_id=c.k,
                    topk=c.topk, temperature=c.dims.get("temp", 1.0))  # fmt: skip

    def step(n: int) -> None:
        row = t["chain"].slice(2 * c.k * n, (1, 2 * c.k))
        pick_next(row.columns(0, c.k), state, **guidance(row))

    return masked, step, {"ids": ids}, state


def _run(c: Case, a: Arrays) -> Arrays:
    masked, step, out, s = _call(c, a)
    masked()
    trail = []
    for n in range(len(a["chain"])):
        step(n)
        trail.append(np.concatenate([x.read() for x in (s.ids, s.pos, s.rows, s.step, s.done)]))
    return {"ids": out["ids"].read(), "tokens": s.tokens.read(), "trail": np.array(trail)}


def _torch(c: Case, a: Arrays) -> Any:
    import torch

    logits, uniforms = torch.from_numpy(a["logits"]), torch.from_numpy(a["uniforms"])
    count = c.dims.get("count", 0)

    def passes() -> Any:
        l = _guided(logits, c)  # noqa: E741
        best, at = l.topk(c.topk)
        at, order = at.sort(-1)
        mass = (best.gather(-1, order) / c.dims.get("temp", 1.0)).softmax(-1).cumsum(-1)
        token = at.gather(-1, (mass <= uniforms[:, None] * mass[:, -1:]).sum(-1, keepdim=True))
        scores = l.softmax(-1).gather(-1, token)[:, 0]
        return token[:, 0].scatter(0, scores.argsort(stable=True)[:count], c.k)

    return passes


register(
    Op(
        name="pick",
        kernels=("pick_masked", "pick_next"),
        cases=[
            *cases(
                "tiny",
                {"n": 5, "k": 40, "topk": 7, "count": 2, "w": 2.5},
                {"n": 9, "k": 100, "topk": 100, "count": 4, "w": 2.5, "temp": 0.7, "open": 1},
                {"n": 40, "k": 64, "topk": 31, "count": 13, "coarse": 1, "temp": 8.0, "limit": 3},
                {"n": 12, "k": 70, "topk": 9, "count": 5, "twins": 1, "w": 4.0, "open": 1, "limit": 1},
                {"n": 33, "k": 129, "topk": 12, "count": 3, "known": 3, "coarse": 1, "w": 2.5, "temp": 1.5},
                {"n": 6, "k": 48, "topk": 5, "known": 2, "w": 1.0, "cap": 9, "open": 1},
            ),
            *cases(
                "odd",
                {"n": 1, "k": 2, "topk": 1, "count": 1, "cap": 1, "pair": 1},
                {"n": 3, "k": 5, "topk": 9, "count": 50, "known": 2, "cap": 2, "w": 0.0},
                {"n": 2, "k": 33, "topk": 32, "count": 0, "cap": 3, "limit": 0, "pair": 8},
                {"n": 4, "k": 31, "topk": 28, "count": 1, "gaps": 1},
                {"n": 256, "k": 35, "topk": 4, "count": 101, "known": 2, "coarse": 1, "cap": 2},
                {"n": 3, "k": 4096, "topk": 409, "count": 1, "w": 2.5, "cap": 2, "open": 1},
                {"n": 27, "k": 1025, "topk": 103, "count": 9, "w": 2.5, "cap": 2},
            ),
            *cases("real", {"n": 49, "k": 1024, "topk": 103, "w": 2.5, "count": 30}),
        ],
        inputs=_inputs,
        reference=_reference,
        run=_run,
        prepare=lambda c, a: _call(c, a)[0],
        torch_eager=_torch,
        tolerance={"f32": 0.0},
        bytes=lambda c: 4 * c.n * c.k * (2 if "w" in c.dims else 1) // c.dims.get("known", 1) + 8 * c.n,
        flops=lambda c: 0,
        absent={"triton": "a row is one reduction: no tiles"},
    )
)  # fmt: skip
