"""Every op of the registry at its real widths: gate, then speed against torch eager and torch.compile."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.report import Report
from bench.roofs import Bandwidth, arithmetic
from bench.timing import interleave, ratio
from engine.ops.registry import Case, Op, error, ops

PEAK_OF = {"f32": "f32", "bf16": "bf16", "i8": "i8", "i4": "i8"}


def compiled(call: Callable[[], Any]) -> Callable[[], Any] | None:
    """torch.compile of the eager opponent; None (with the reason printed) where it does not compile."""
    import torch

    try:
        fn = torch.compile(call)
        fn()
        fn()
        return fn
    except Exception as fault:  # torch.compile raises many types
        print(f"  torch.compile: {type(fault).__name__}: {str(fault).splitlines()[0][:100]}", file=sys.stderr)
        return None


def gate(op: Op, case: Case, arrays: dict[str, np.ndarray]) -> float:
    got, want = op.run(case, arrays), op.reference(case, arrays)
    return max(error(got[name], want[name]) for name in want)


def bench_op(
    op: Op, case: Case, report: Report, peaks: dict[str, float], bandwidth: Bandwidth, with_compile: bool
) -> None:
    arrays = op.inputs(case, np.random.default_rng(0))
    err, limit = gate(op, case, arrays), op.tolerance_of(case)
    row: dict[str, Any] = {
        "op": op.name,
        "case": case.id,
        "error": err,
        "tolerance": limit,
        "gate": "green" if err <= limit else "RED",
    }
    if err > limit:
        print(f"{op.name:<10} {case.id:<44} RED  error {err:.1e} > {limit:.0e}: no speed")
        report.add(**row)
        return
    assert op.prepare is not None
    calls: dict[str, Callable[[], Any]] = {"ours": op.prepare(case, arrays)}
    if op.torch_eager is not None:
        calls["torch"] = op.torch_eager(case, arrays)
        fn = compiled(calls["torch"]) if with_compile else None
        if fn is not None:
            calls["compile"] = fn
    times = interleave(calls)
    ours = times["ours"].median
    gbs, gflops = op.bytes(case) / ours / 1e9, op.flops(case) / ours / 1e9
    peak = peaks[PEAK_OF[case.dims.get("dtype", "f32")]] if case.dims.get("dtype", "f32") in PEAK_OF else peaks["f32"]
    roof = bandwidth.gb_per_s[-1]
    row |= {"gb_s": gbs, "of_bandwidth": gbs / roof, "gflop_s": gflops, "of_peak": gflops / peak}
    row |= {name: t.row() for name, t in times.items()}
    row |= {f"vs_{name}": ratio(t, times["ours"]) for name, t in times.items() if name != "ours"}
    report.add(**row)
    versus = "  ".join(f"{name} x{ratio(t, times['ours']):.2f}" for name, t in times.items() if name != "ours")
    print(f"{op.name:<10} {case.id:<44} {ours * 1e6:10.1f} us  {gbs:6.1f} GB/s ({gbs / roof:4.0%})  "
          f"{gflops:7.1f} GFLOP/s ({gflops / peak:4.0%})  {versus}  error {err:.1e}", flush=True)  # fmt: skip


def main(names: list[str], with_compile: bool = True) -> None:
    import torch

    from engine.runtime import device

    torch.set_num_threads(device.threads())
    report, bandwidth = Report("ops"), Bandwidth()
    peaks = arithmetic()
    print(
        f"read bandwidth {bandwidth.measure():.1f} GB/s; peaks "
        + ", ".join(f"{k} {v:.0f}" for k, v in peaks.items())
        + " GOP/s"
    )
    for name, op in ops().items():
        if names and name not in names:
            continue
        for case in op.cases:
            if case.kind == "real":
                bandwidth.measure(2)
                bench_op(op, case, report, peaks, bandwidth, with_compile)
    bandwidth.measure()
    report.data |= {"peaks_gop_s": peaks, "bandwidth_gb_s": bandwidth.gb_per_s}
    print("written:", report.save())
