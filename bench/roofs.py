"""The roofs of this machine in this run: read bandwidth and arithmetic peak of each number format."""

from __future__ import annotations

import time

import numpy as np

from engine import _C
from engine.ops.dispatch import _OPS
from engine.runtime import device

PROBE_BYTES = 1 << 30


class Bandwidth:
    """Reads 1 GiB of memory backed like the weights (huge pages where granted) with all threads."""

    def __init__(self) -> None:
        self._memory: _C.Memory | None = None
        self.gb_per_s: list[float] = []

    def release(self) -> None:
        """Gives the memory back until the next measurement."""
        self._memory = None

    def measure(self, repeats: int = 5) -> float:
        """Best of a few passes, in GB/s: a roof is what the machine can do, not what it did while disturbed."""
        if self._memory is None:
            self._memory = _C.Memory(PROBE_BYTES)
            np.frombuffer(self._memory, np.uint8)[:] = 1  # type: ignore[call-overload]
        best = 0.0
        sink = np.zeros(64, np.float32)
        call = {"kind": 3, "sink": sink.ctypes.data, "data": self._memory.address, "bytes": PROBE_BYTES}
        for _ in range(repeats):
            t0 = time.perf_counter()
            _C.run(_OPS["gemm_peak"], device.isa(), call)
            best = max(best, PROBE_BYTES / (time.perf_counter() - t0) / 1e9)
        self.gb_per_s.append(best)
        return best


def arithmetic() -> dict[str, float]:
    """GFLOP/s (GOP/s for int8) of independent multiply-adds in registers, all threads: f32, bf16, i8."""
    out = {}
    for i, name in enumerate(("f32", "bf16", "i8")):
        sink = np.zeros(64, np.float32)
        ops = np.zeros(1, np.int64)
        best = 0.0
        call = {"kind": i, "iterations": 2_000_000, "sink": sink.ctypes.data, "ops": ops.ctypes.data}
        for _ in range(5):
            ops[0] = 0
            t0 = time.perf_counter()
            _C.run(_OPS["gemm_peak"], device.isa(), call)
            best = max(best, float(ops[0]) / (time.perf_counter() - t0) / 1e9)
        out[name] = best
    return out
