"""CUDA devices: which there are, memory on them, copies. Thin; the work is in csrc/base/cuda_graph.cpp.

Everything goes through one driver: the extension module, or in tests an emulator with the same functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from engine import _C
from engine.errors import DeviceError, MemoryPlanError, PlanError

if TYPE_CHECKING:
    from engine.runtime.program import Program

_driver: Any = _C


@contextmanager
def use(driver: Any) -> Iterator[None]:
    """Replaces the driver: an object with what _C offers for CUDA (cuda, cuda_ops, CudaTape, CudaMemory, ...)."""
    global _driver
    before, _driver = _driver, driver
    try:
        yield
    finally:
        _driver = before


class RecordedTape:
    """Nodes of a plan for a device that is not here: (op, -1, label, arguments) or (kernel, -1, label, Program)."""

    def __init__(self) -> None:
        self.nodes: list[tuple] = []

    def __len__(self) -> int:
        return len(self.nodes)

    def push(self, op: int, isa: int, label: str, values: dict) -> None:
        self.nodes.append((op, isa, label, values))

    def push_program(self, label: str, program: Program) -> None:
        self.nodes.append((program.kernel, -1, label, program))

    def node(self, i: int) -> tuple:
        return self.nodes[i]

    def capture(self) -> None:
        """Nothing is instantiated."""

    def replay(self) -> None:
        raise PlanError("this plan was recorded for a device that is not here; it cannot run")

    replay_timed = replay


class Recorder:
    """A driver without a device: memory is laid out in a dry arena and plans are recorded; nothing can run."""

    cuda = True

    def cuda_ops(self) -> list[str]:
        return [name for name, _ in _C.ops()]

    def cuda_device_count(self) -> int:
        return 1

    def cuda_missing(self) -> str:
        return ""

    def CudaTape(self, index: int) -> RecordedTape:
        return RecordedTape()


def built() -> bool:
    return _driver.cuda


def ops() -> frozenset[str]:
    """Ops with a CUDA C++ kernel in this build."""
    return frozenset(_driver.cuda_ops())


def count() -> int:
    """CUDA devices that this process can use; 0 where the build or the host has none."""
    return _driver.cuda_device_count() if built() else 0


def missing() -> str:
    """Why CUDA kernels do not run here; '' if they do."""
    return _driver.cuda_missing() if built() else "built without CUDA"


def is_cuda(device: str) -> bool:
    return device == "cuda" or device.startswith("cuda:")


def ordinal(device: str) -> int:
    """The index in 'cuda' or 'cuda:N', checked against what is there."""
    name, _, index = device.partition(":")
    if name != "cuda" or (":" in device and not index.isdecimal()):
        raise DeviceError(f"device {device!r} is not one of cpu, cuda, cuda:N")
    if not built():
        raise DeviceError(
            f"device {device!r}: this package was built without CUDA; install nvcc and a driver, then build with "
            "ENGINE_CUDA=ON, or use device='cpu'"
        )
    n = count()
    if not n:
        raise DeviceError(f"device {device!r}: {missing()}; install or update the NVIDIA driver, or use device='cpu'")
    if int(index or 0) >= n:
        raise DeviceError(f"device {device!r}: this host has {n} CUDA device(s), counted from 0")
    return int(index or 0)


class _Tape:
    """The module's tape, which takes programs as they are recorded: compiled here, before the capture."""

    def __init__(self, index: int) -> None:
        self._tape, self._index = _driver.CudaTape(index), index

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tape, name)

    def __len__(self) -> int:
        return len(self._tape)

    def push_program(self, label: str, program: Program) -> None:
        self._tape.push_program(label=label, **launch_arguments(program, self._index))


def launch_arguments(program: Program, index: int) -> dict[str, Any]:
    """What the module needs to launch a program on a device."""
    from engine.runtime.program import compile_program  # late: program.py imports the arena, which imports cuda

    cubin = compile_program(program, _driver.cuda_capability(index))
    return {"image": cubin.image, "name": cubin.name, "grid": program.grid, "threads": cubin.threads,
            "shared": cubin.shared, "params": program.params(), "offsets": program.offsets()}  # fmt: skip


def tape(device: str) -> Any:
    """A tape that is captured into a CUDA graph; the same calls as _C.Tape, and push_program(label, Program)."""
    index = ordinal(device)
    return _Tape(index) if _driver is _C else _driver.CudaTape(index)


def memory(nbytes: int, device: str, mapped: bool = False) -> Any:
    """Zeroed device memory with `address` and `size`; mapped: host memory that the device reaches at this address."""
    index = ordinal(device)
    try:
        return _driver.CudaMemory(nbytes, index, mapped)
    except MemoryError:
        free, total = _driver.cuda_memory_info(index)
        raise MemoryPlanError(
            f"{nbytes / 1e9:.2f} GB do not fit on {device}: {free / 1e9:.2f} of {total / 1e9:.2f} GB are free"
        ) from None


def free_bytes(device: str) -> int:
    index = ordinal(device)
    return _driver.cuda_memory_info(index)[0]


def copy(dst: int, src: int, nbytes: int, device: str) -> None:
    """Copies between any two of host and device memory; done when it returns."""
    index = ordinal(device)
    _driver.cuda_copy(dst, src, nbytes, index)


def run(op: int, values: dict, device: str) -> None:
    """One kernel, now."""
    index = ordinal(device)
    _driver.cuda_run(op, index, values)


def run_program(program: Program, device: str) -> None:
    """One Triton kernel, now."""
    index = ordinal(device)
    if _driver is _C:
        _driver.cuda_run_program(**launch_arguments(program, index), device=index)
    else:
        _driver.cuda_run_program(program, index)
