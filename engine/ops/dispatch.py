"""From an op's name to the kernel that runs it. The choice is recorded with its reasons; see Model.explain()."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engine import _C
from engine.errors import DispatchError
from engine.runtime import cuda, device, plan
from engine.runtime.arena import Tensor
from engine.runtime.program import Program

_OPS: dict[str, int] = {name: i for i, (name, _) in enumerate(_C.ops())}
PROGRAM_ROWS = 8  # up to this many rows the C++ kernels read each weight once and are the faster ones
_local = threading.local()  # strictness belongs to the thread that loads


@contextmanager
def strict(on: bool) -> Iterator[None]:
    """While on, an op that would not run on the fastest implementation of this host raises DispatchError."""
    before, _local.strict = is_strict(), on
    try:
        yield
    finally:
        _local.strict = before


def is_strict() -> bool:
    return getattr(_local, "strict", False)


def rejected(isa: int) -> tuple[tuple[str, str], ...]:
    """Faster implementations that do not run, and why."""
    out = [("cuda", cuda_missing())]
    for i in range(len(device.ISAS) - 1, isa, -1):
        missing = _C.isa_missing(i)
        out.append((f"cpu/{device.ISAS[i]}", f"this CPU lacks {missing}" if missing else "ENGINE_ISA asks for less"))
    return tuple(out)


def cuda_missing() -> str:
    """Why CUDA kernels do not run here."""
    return cuda.missing() or "the model was loaded on the CPU"


def many_rows(m: int) -> bool:
    """A CUDA device takes Triton programs for an op with a capacity of m rows."""
    return m > PROGRAM_ROWS and device.target() != "cpu"


def call(
    op: str,
    label: str = "",
    nbytes: int = 0,
    *,
    programs: Callable[[], list[Program]] | None = None,
    **arguments: Tensor | float | None,
) -> None:
    """Runs op now, or records it when a plan is being captured (which then keeps the buffers alive).

    programs: the same work as Triton kernels, which a CUDA device takes instead of the op's C++ kernel; None where
    the C++ kernel is the faster one (few rows) or there is no other.
    """
    values = {k: v.address if isinstance(v, Tensor) else 0 if v is None else v for k, v in arguments.items()}
    recording = plan.current()
    if recording is not None:
        recording.keep(v.owner for v in arguments.values() if isinstance(v, Tensor))
    if device.target() != "cpu":
        if programs is not None:
            _call_programs(op, label, nbytes, programs())
        else:
            _call_cuda(op, label, nbytes, values)
        return
    isa = device.isa()
    if is_strict() and isa != _C.host_isa():
        raise DispatchError(
            f"op {op!r} would run on cpu/{device.ISAS[isa]}, but this CPU has {device.ISAS[_C.host_isa()]}; "
            "unset ENGINE_ISA or load with strict=False"
        )
    if recording is None:
        _C.run(_OPS[op], isa, values)
        return
    info = plan.NodeInfo(label or op, op, f"cpu/{device.ISAS[isa]}", rejected(isa), nbytes)
    recording.record(_OPS[op], isa, info, values)


def _call_cuda(op: str, label: str, nbytes: int, values: dict) -> None:
    if op not in cuda.ops():
        raise DispatchError(f"op {op!r} has no CUDA kernel in this build; run it on device='cpu'")
    recording = plan.current()
    if recording is None:
        cuda.run(_OPS[op], values, device.target())
        return
    recording.record(_OPS[op], -1, plan.NodeInfo(label or op, op, "cuda", (), nbytes), values)


def _call_programs(op: str, label: str, nbytes: int, programs: list[Program]) -> None:
    recording = plan.current()
    for i, program in enumerate(programs):
        if recording is None:
            cuda.run_program(program, device.target())
            continue
        recording.keep(v.owner for v in program.args.values() if isinstance(v, Tensor))
        name = f"{label or op}/{program.kernel.partition('.')[2]}"
        # The bytes of the op are those of its last kernel, the one that reads the weights.
        info = plan.NodeInfo(name, op, "triton", (), nbytes if i == len(programs) - 1 else 0)
        recording.record_program(program, info)
