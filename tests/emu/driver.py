"""The emulated device behind engine.runtime.cuda: `with cuda.use(EmulatedCuda()), device.on("cuda"): ...`"""

from __future__ import annotations

import ctypes
import re
import subprocess
import time
import weakref
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from engine.ops import registry
from engine.runtime.arena import DTYPES, Tensor
from engine.runtime.program import Program, interpret

from . import build


class Enough(Exception):
    """A case has run as many kernels as it may in a slow build: more of the same would show nothing new."""


class EmulatedTape:
    """What _C.CudaTape offers: nodes in order, run one by one."""

    def __init__(self, driver: EmulatedCuda) -> None:
        self._driver = driver
        self._nodes: list[tuple[Callable[[], None], tuple]] = []
        self.graph_nodes = self._started = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def push(self, op: int, isa: int, label: str, values: Mapping[str, Any]) -> None:
        params = self._driver.bind(op, values)
        self._nodes.append((lambda: self._driver.run_bound(op, params), (op, -1, label, params)))

    def push_program(self, label: str, program: Program) -> None:
        self._nodes.append((lambda: interpret(program), (program.kernel, -1, label, program.signature())))

    def node(self, i: int) -> tuple:
        return self._nodes[i][1]

    def capture(self) -> None:
        self.graph_nodes = len(self)

    def launch(self) -> None:
        for run, _ in self._nodes:
            run()

    def synchronize(self) -> None:
        """Nothing is ever under way."""

    def start(self) -> None:
        """The device is as far ahead of the host as it can be: done at once."""
        self.launch()
        self._started += 1

    def wait(self) -> None:
        assert self._started, "wait() without a start()"
        self._started -= 1

    def drain(self) -> None:
        self._started = 0

    def replay(self) -> None:
        self.launch()

    def replay_timed(self) -> list[int]:
        out = []
        for run, _ in self._nodes:
            start = time.perf_counter_ns()
            run()
            out.append(time.perf_counter_ns() - start)
        return out


class EmulatedCuda:
    """What engine._C offers for CUDA; everything else is forwarded to the module of that build."""

    most_runs = 16  # of a case; the plain build has no limit

    def __init__(self, kind: str = "plain", replaced: Mapping[str, str] | None = None) -> None:
        self.kind = kind
        self._runs = 0
        self.path = build.module(kind, replaced)
        self.module = build.load(self.path)
        if kind == "watched":
            self.module.watch(True)
            _remember_tensors()
        self._declared: list[tuple[int, int]] = []
        self._kept: list[Tensor] = []  # what was declared lives as long as the case: no address stands for two buffers

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def CudaTape(self, ordinal: int) -> EmulatedTape:
        return EmulatedTape(self)

    def cuda_run(self, op: int, ordinal: int, values: Mapping[str, Any]) -> None:
        self._before_run()
        self.module.cuda_run(op, ordinal, values)

    def run_bound(self, op: int, params: bytes) -> None:
        self._before_run()
        self.module.run_bound(op, params)

    def cuda_run_program(self, program: Program, ordinal: int) -> None:
        interpret(program)

    def begin(self, schedule: int) -> None:
        """A new case: nothing is known of earlier ones."""
        self.module.set_schedule(schedule)
        self.module.clear_launches()
        self._runs = 0
        if self.kind == "watched":
            self._declared.clear()
            self._kept.clear()
            self.module.forget()

    def found(self) -> list[str]:
        """Faults since `begin`."""
        return [where(self.path, f) for f in self.module.faults()] if self.kind == "watched" else []

    def _before_run(self) -> None:
        if self.kind != "plain" and self._runs == self.most_runs:
            raise Enough
        self._runs += 1
        if self.kind == "watched":
            self._declare()

    def _declare(self) -> None:
        """Every buffer that a Tensor names is memory that kernels may touch; poison is what nothing has written."""
        guarded = {whole.address: name for name, whole in registry._watched or ()}
        for t in sorted(_tensors, key=lambda t: -t.nbytes):
            begin, size = t.address, _span(t)
            written: bool | bytes = True
            name = guarded.get(begin, "")
            if name and size > 2 * registry.GUARD:
                begin, size = begin + registry.GUARD, size - 2 * registry.GUARD
                written = _written(begin, size)
            if not size or any(b <= begin and begin + size <= b + n for b, n in self._declared):
                continue
            self._declared.append((begin, size))
            self._kept.append(t)
            self.module.declare(begin, size, written, f"{name or 'memory'}@{len(self._declared)}")


_tensors: weakref.WeakSet[Tensor] = weakref.WeakSet()


def _remember_tensors() -> None:
    """From now on every Tensor is known while it lives: kernels get addresses, the watch needs sizes."""
    before = Tensor.__init__
    if before.__name__ == "remember":
        return

    def remember(self: Tensor, *args: Any, **keywords: Any) -> None:
        before(self, *args, **keywords)
        if self.address:
            _tensors.add(self)

    Tensor.__init__ = remember  # type: ignore[method-assign]


def _span(t: Tensor) -> int:
    """Bytes from the first to the last element."""
    rows = int(np.prod(t.shape[:-1])) if t.shape else 1
    width = t.shape[-1] if t.shape else 1
    return ((rows - 1) * t.ld + width) * DTYPES[t.dtype][0] if rows and width else 0


def _written(begin: int, size: int) -> bytes:
    """A byte per byte, 0 where a run of 16 is poison: less could be a number that happens to look like it."""
    raw: Any = (ctypes.c_uint8 * size).from_address(begin)
    words = np.frombuffer(raw, np.uint8).view(np.uint16) != registry.POISON
    whole = np.pad(words, (0, -len(words) % 8)).reshape(-1, 8).any(1)
    return np.repeat(whole, 16)[:size].astype(np.uint8).tobytes()


@cache
def kernel_name(path: Path, offset: int) -> str:
    """'gemm_kernel<3, 1>' of launches()' kernel."""
    command = ["addr2line", "-f", "-C", "-e", str(path), hex(offset)]
    done = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\w+(?:<[^()]*>)?)\((?!anonymous)", done)
    return found.group(1) if found else done.split("\n")[0]


def where(path: Path, fault: Mapping[str, Any]) -> str:
    """A fault in one line, with file and line."""
    done = subprocess.run(["addr2line", "-e", str(path), hex(fault["instruction"] - 1)], capture_output=True, text=True,
                          check=False)  # fmt: skip
    line = done.stdout.strip().rpartition("csrc/")[2] or hex(fault["instruction"])
    text = f"{fault['kind']}: kernel {fault['kernel']!r}, block {fault['block']}, thread {fault['thread']}, "
    if fault["kind"].endswith("race"):
        text += f"with block {fault['other_block']}, thread {fault['other_thread']}, "
    return text + f"{fault['region']} + {fault['offset']}, {line.split(' ')[0]}"
