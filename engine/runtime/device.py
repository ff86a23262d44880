"""What this host can run: instruction sets, threads, data types."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from engine import _C
from engine.errors import DeviceError, InputError
from engine.runtime import cuda

ISAS: tuple[str, ...] = tuple(_C.isa_names())

_ALIASES = {
    "fp32": "f32", "float32": "f32", "float": "f32", "f32": "f32",
    "bf16": "bf16", "bfloat16": "bf16",
    "fp16": "f16", "float16": "f16", "half": "f16", "f16": "f16",
}  # fmt: skip


def parse_dtype(value: object) -> str:
    """'f32', 'bf16' or 'f16' from a torch dtype, its name, a numpy dtype, or an alias such as 'fp32'."""
    name = str(value).removeprefix("torch.").lower()
    if name not in _ALIASES:
        raise InputError(f"dtype {value!r} is not known; use one of float32, bfloat16, float16 or fp32, bf16, fp16")
    return _ALIASES[name]


def _index(name: str) -> int:
    if name not in ISAS:
        raise DeviceError(f"instruction set {name!r} is not one of {', '.join(ISAS)}; set ENGINE_ISA to one of these")
    missing = _C.isa_missing(ISAS.index(name))
    if missing:
        raise DeviceError(f"this CPU lacks {missing}, which instruction set {name!r} needs; unset ENGINE_ISA")
    return ISAS.index(name)


_target = threading.local()  # device and instruction set are chosen per thread
_default_isa = _index(os.environ["ENGINE_ISA"]) if os.environ.get("ENGINE_ISA") else _C.host_isa()


def isa() -> int:
    """Index into ISAS of the instruction set that ops run on."""
    return getattr(_target, "isa", _default_isa)


def isa_name() -> str:
    return ISAS[isa()]


def available_isas() -> list[str]:
    return [name for i, name in enumerate(ISAS) if not _C.isa_missing(i)]


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Runs this thread's ops on another instruction set; plans captured inside keep it."""
    before, _target.isa = isa(), _index(name)
    try:
        yield
    finally:
        _target.isa = before


def target() -> str:
    """The device that ops of this thread run on: 'cpu', 'cuda' or 'cuda:N'."""
    return getattr(_target, "name", "cpu")


@contextmanager
def on(name: str) -> Iterator[None]:
    """Runs ops on another device; plans captured inside belong to it. Their buffers must live there."""
    if name != "cpu":
        cuda.ordinal(name)
    before = target()
    _target.name = name
    try:
        yield
    finally:
        _target.name = before


def choose(name: object) -> str:
    """'cpu' or a CUDA device that is there, from a name or 'auto'.

    Raises: DeviceError (a CUDA device that is not there), InputError (no such name).
    """
    if name == "auto":
        return "cuda" if cuda.count() else "cpu"
    if name == "cpu":
        return "cpu"
    if not isinstance(name, str) or not cuda.is_cuda(name):
        raise InputError(f"device={name!r} is not known; use 'auto', 'cpu', 'cuda' or 'cuda:N'")
    cuda.ordinal(name)
    return name


def available_bytes(name: str = "cpu") -> int:
    """Memory of a device that this process can still take; on the CPU what the system has free, within its control
    group's limit."""
    if name != "cpu":
        return cuda.free_bytes(name)
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        have = int(next(x for x in lines if x.startswith("MemAvailable")).split()[1]) * 1024
    with suppress(OSError, ValueError, KeyError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())  # "max" raises ValueError: no limit
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])  # caches give way
        have = min(have, limit - used)
    return have


def threads() -> int:
    return _C.threads()


def set_threads(n: int) -> None:
    """Size of the kernel thread team (default: the cores this process may use; ENGINE_THREADS overrides)."""
    if not 1 <= n <= 1024:
        raise InputError(f"threads={n} is outside 1..1024")
    _C.set_threads(n)
