"""Runs what is written for host arrays on a CUDA device: registry cases, their guard bytes included."""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from engine import _C
from engine.runtime import cuda, device
from engine.runtime.arena import DTYPES, Tensor
from engine.runtime.program import Program

_ALIGN = 256
Region = tuple[int, int]  # begin and size of host memory


class Mirror:
    """A CUDA driver over another one that takes host addresses.

    Each buffer that a kernel names is copied to the device before it and back after it. When `resident`, a buffer goes
    there once and stays: for timing and for plans; `fetch()` brings the results back.
    """

    cuda = True

    def __init__(self, driver: Any = _C, resident: bool = False) -> None:
        self.driver, self.resident = driver, resident
        self.launched = {"cuda": 0, "triton": 0}
        self._tensors: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self._there: dict[Region, tuple[Any, int]] = {}  # memory on the device, address of the region's begin
        self._pointers = [[n for n, kind in fields if kind == "ptr"] for _, fields in _C.ops()]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.driver, name)

    def know(self, tensor: Tensor) -> None:
        """Kernels get addresses; how long the buffer is says the Tensor."""
        if tensor.address and tensor.device == "cpu":
            self._tensors.add(tensor)

    # ------------------------------------------------------------------------------------------------- addresses
    def _regions(self) -> list[Region]:
        """What the living Tensors cover; a view and its whole are one region."""
        spans = sorted((t.address, t.address + _span(t)) for t in self._tensors)
        out: list[list[int]] = []
        for begin, end in spans:
            if out and begin < out[-1][1]:
                out[-1][1] = max(out[-1][1], end)
            elif end > begin:
                out.append([begin, end])
        return [(b, e - b) for b, e in out]

    def _move(self, address: int, regions: list[Region], used: dict[Region, tuple[Any, int]]) -> int:
        at = bisect.bisect_right(regions, (address, 1 << 62)) - 1
        if at < 0 or address >= sum(regions[at]):
            raise LookupError(f"address {address:#x} belongs to no Tensor")
        region = regions[at]
        if region not in used:
            memory = self.driver.CudaMemory(region[1] + _ALIGN, 0)
            begin = memory.address + (region[0] - memory.address) % _ALIGN  # kernels see the same alignment
            self.driver.cuda_copy(begin, region[0], region[1], 0)
            used[region] = memory, begin
        return used[region][1] + address - region[0]

    def fetch(self, used: Mapping[Region, tuple[Any, int]] | None = None) -> None:
        """Copies buffers back to the host."""
        for (begin, size), (_, there) in (self._there if used is None else used).items():
            self.driver.cuda_copy(begin, there, size, 0)

    @contextmanager
    def _moved(self) -> Iterator[Any]:
        used = self._there if self.resident else {}
        regions = self._regions()
        yield lambda address: self._move(address, regions, used)
        if not self.resident:
            self.fetch(used)

    def _values(self, op: int, values: Mapping[str, Any], move: Any) -> dict[str, Any]:
        return {k: move(int(v)) if k in self._pointers[op] and v else v for k, v in values.items()}

    def _program(self, program: Program, move: Any) -> Program:
        def there(v: Any) -> Any:
            return replace(v, address=move(v.address), device="cuda") if isinstance(v, Tensor) else v

        return replace(program, args={k: there(v) for k, v in program.args.items()})

    # ----------------------------------------------------------------------------------------------------- driver
    def cuda_run(self, op: int, ordinal: int, values: Mapping[str, Any]) -> None:
        self.launched["cuda"] += 1
        with self._moved() as move:
            self.driver.cuda_run(op, ordinal, self._values(op, values, move))

    def cuda_run_program(self, program: Program, ordinal: int) -> None:
        self.launched["triton"] += 1
        with self._moved() as move:
            program = self._program(program, move)
            if self.driver is _C:
                _C.cuda_run_program(**cuda.launch_arguments(program, ordinal), device=ordinal)
            else:
                self.driver.cuda_run_program(program, ordinal)

    def CudaTape(self, ordinal: int) -> MirrorTape:
        return MirrorTape(self, ordinal)


class MirrorTape:
    """A tape of the driver below; every buffer stays on the device."""

    def __init__(self, mirror: Mirror, ordinal: int) -> None:
        if not mirror.resident:
            raise ValueError("a plan needs Mirror(resident=True): its buffers stay where they are")
        self._mirror, self._ordinal = mirror, ordinal
        self._tape = mirror.driver.CudaTape(ordinal)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tape, name)

    def __len__(self) -> int:
        return len(self._tape)

    def push(self, op: int, isa: int, label: str, values: Mapping[str, Any]) -> None:
        with self._mirror._moved() as move:
            self._tape.push(op, isa, label, self._mirror._values(op, values, move))

    def push_program(self, label: str, program: Program) -> None:
        with self._mirror._moved() as move:
            program = self._mirror._program(program, move)
            if self._mirror.driver is _C:
                self._tape.push_program(label=label, **cuda.launch_arguments(program, self._ordinal))
            else:
                self._tape.push_program(label, program)


def _span(t: Tensor) -> int:
    """Bytes from the first to the last element."""
    if not t.shape or 0 in t.shape:
        return DTYPES[t.dtype][0] if not t.shape else 0
    rows = 1
    for n in t.shape[:-1]:
        rows *= n
    return ((rows - 1) * t.ld + t.shape[-1]) * DTYPES[t.dtype][0]


@contextmanager
def mirrored(mirror: Mirror) -> Iterator[Mirror]:
    """Inside, ops of this thread run on the device and take host arrays."""
    before = Tensor.__init__

    def remember(self: Tensor, *args: Any, **named: Any) -> None:
        before(self, *args, **named)
        mirror.know(self)

    Tensor.__init__ = remember  # type: ignore[method-assign]
    try:
        with cuda.use(mirror), device.on("cuda"):
            yield mirror
    finally:
        Tensor.__init__ = before  # type: ignore[method-assign]
