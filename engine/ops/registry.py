"""One entry per op: cases, tolerances, reference, bytes and flops. Tests, benches and tables are made from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.runtime.arena import DTYPES, Arena, Tensor, as_tensor

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """Named shapes and dtypes. `kind` is 'tiny', 'odd' or 'real'; real widths are for benches."""

    kind: str
    dims: Mapping[str, Any]

    @property
    def id(self) -> str:
        return "-".join(f"{k}{v}" if not isinstance(v, str) else v for k, v in self.dims.items())

    def __getattr__(self, name: str) -> Any:
        try:
            return self.dims[name]
        except KeyError:
            raise AttributeError(name) from None


def cases(kind: str, *dims: Mapping[str, Any]) -> list[Case]:
    return [Case(kind, d) for d in dims]


@dataclass(frozen=True)
class Op:
    """The contract of one room.

    inputs(case, rng) makes arrays; reference(case, inputs) is plain torch in fp64, the specification; run(case, inputs)
    calls the public function. Outputs are compared by the normalised error
    sqrt(mean((a-b)^2) / mean(b^2)) <= tolerance[dtype], or exactly when the tolerance is 0.
    """

    name: str
    cases: list[Case]
    inputs: Callable[[Case, np.random.Generator], Arrays]
    reference: Callable[[Case, Arrays], Arrays]
    run: Callable[[Case, Arrays], Arrays]
    tolerance: Mapping[str, float]
    bytes: Callable[[Case], int]
    flops: Callable[[Case], int]
    kernels: tuple[str, ...] = ()  # entries of the C++ table that this room owns; default: its name
    graph_safe: bool = True
    absent: Mapping[str, str] = field(default_factory=dict)
    torch_eager: Callable[[Case, Arrays], Callable[[], Any]] | None = None  # the opponent of the bench
    prepare: Callable[[Case, Arrays], Callable[[], Any]] | None = None  # the timed call, weights already packed

    def tolerance_of(self, case: Case) -> float:
        return self.tolerance[case.dims.get("dtype", "f32")]


_OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    _OPS[op.name] = op
    return op


def ops() -> dict[str, Op]:
    """All ops, by name."""
    from engine.ops import load_all

    load_all()
    return dict(sorted(_OPS.items()))


def error(got: np.ndarray, want: np.ndarray) -> float:
    """Normalised root mean square error; NaN or a shape mismatch counts as infinite."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape or not np.isfinite(got).all():
        return float("inf")
    scale = float(np.sqrt(np.mean(want**2))) if want.size else 0.0
    return float(np.sqrt(np.mean((got - want) ** 2))) / (scale or 1.0) if want.size else 0.0


# ------------------------------------------------------------------------------------------------------ sentinels
GUARD = 65536  # bytes before and after a guarded buffer
POISON = np.frombuffer(b"\xff\x7f", np.uint16)[0]  # NaN as f32, bf16 and f16; no valid id, no likely result
_watched: list[tuple[str, Tensor]] | None = None


class GuardedArena(Arena):
    """An arena for cases: guard bytes around every buffer, workspaces poisoned (other parts start as zeros)."""

    def alloc(
        self, name: str, shape: Sequence[int], dtype: str = "f32", part: str = "workspace", mapped: bool = False
    ) -> Tensor:
        nbytes = math.prod(shape) * DTYPES[dtype][0]
        whole = super().alloc(name, (GUARD + nbytes + nbytes % 2 + GUARD,), "u8", part)
        words = whole.numpy().view(np.uint16)
        words[: GUARD // 2] = words[-(GUARD // 2) :] = POISON
        inside = whole.slice(GUARD, (nbytes + nbytes % 2,))
        if part == "workspace":
            inside.numpy().view(np.uint16)[:] = POISON
        if _watched is not None:
            _watched.append((name, whole))
        return Tensor(inside.address, tuple(shape), dtype, whole.owner)


def guarded(*shape: int, dtype: str = "f32") -> np.ndarray:
    """A poisoned array between guard bytes, for a kernel to write."""
    return GuardedArena().alloc("out", shape, dtype).numpy()


def surrounded(arrays: Arrays) -> Arrays:
    """Copies between guard bytes: what is read beyond an end is NaN."""
    out = {name: guarded(*array.shape, dtype=as_tensor(array).dtype) for name, array in arrays.items()}
    for name, array in arrays.items():
        out[name][...] = array
    return out


@contextmanager
def watch() -> Iterator[Callable[[], list[str]]]:
    """Yields a function that names the buffers, guarded since, whose guard bytes have changed."""
    global _watched
    buffers: list[tuple[str, Tensor]] = []
    before, _watched = _watched, buffers

    def broken() -> list[str]:
        guards = ((name, whole.numpy().view(np.uint16)) for name, whole in buffers)
        n = GUARD // 2
        return [name for name, w in guards if not ((w[:n] == POISON).all() and (w[-n:] == POISON).all())]

    try:
        yield broken
    finally:
        _watched = before


ROOM = {
    "contract": "csrc/ops/{op}/{op}.h",
    "cpu": "csrc/ops/{op}/{op}_cpu.cpp",
    "cuda": "csrc/ops/{op}/{op}.cu",
    "triton": "triton_kernels/{op}.py",
    "python": "engine/ops/{op}.py",
    "story": "csrc/ops/{op}/README.md",
}


def room(name: str, root: Path) -> list[tuple[str, str, str]]:
    """(thing, path, state) for the eight things of a room; state is 'there', or the declared reason, or 'MISSING'."""
    op = ops()[name]
    out = []
    for thing, pattern in ROOM.items():
        path = pattern.format(op=name)
        state = "there" if (root / path).exists() else op.absent.get(thing, "MISSING")
        out.append((thing, path, state))
    out.append(("tests", f"tests/ops (from the registry: {len(op.cases)} cases x ISA)", "there"))
    out.append(("bench", f"./run bench ops {name}", "there"))
    return out
