"""Registry cases on the emulator: which there are, what they should give, one of them run and judged."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from engine.ops import dispatch
from engine.ops.registry import Arrays, Case, Op, error, ops, surrounded, watch
from engine.runtime import cuda, device

from . import build
from .driver import EmulatedCuda, Enough

SCHEDULES = (0, 3, 4)  # in order; reversed with one warp ahead; shuffled


def kernels_of(op: Op) -> set[str]:
    return set(op.kernels or (op.name,))


def small(op: Op) -> list[tuple[int, Case]]:
    """Cases that an emulator can run, with their place in the entry; not those that are always programs."""
    return [(i, c) for i, c in enumerate(op.cases) if c.kind != "real" and not c.dims.get("programs")]


def emulated_ops(driver: EmulatedCuda) -> list[Op]:
    """Ops of which the module has a CUDA kernel."""
    there = set(driver.cuda_ops())
    return [op for op in ops().values() if kernels_of(op) & there]


def reference_file(op: Op, index: int) -> Path:
    """Where the reference of a case is kept; made from the op's Python text, so that an edit makes a new one."""
    key = hashlib.sha256()
    for name in (f"engine/ops/{op.name}.py", "engine/ops/registry.py", "engine/ops/gemm.py"):
        key.update((build.ROOT / name).read_bytes())
    return build.CACHE / "references" / f"{op.name}-{index}-{key.hexdigest()[:16]}.npz"


def reference(op: Op, index: int) -> Arrays:
    """The fp64 reference, from disk where an earlier process has computed it: workers do without torch."""
    path = reference_file(op, index)
    if not path.exists():
        case = op.cases[index]
        want = op.reference(case, op.inputs(case, np.random.default_rng(7)))
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{np.random.SeedSequence().entropy}.npz")
        np.savez(draft, **want)
        draft.replace(path)
    with np.load(path) as found:
        return dict(found)


def problems(driver: EmulatedCuda, op: Op, index: int, schedule: int, want: Mapping[str, np.ndarray]) -> list[str]:
    """What is wrong with a case on the emulator; nothing if it is right."""
    case, out = op.cases[index], []
    driver.begin(schedule)
    rows, dispatch.PROGRAM_ROWS = dispatch.PROGRAM_ROWS, 1 << 30  # the C++ kernels, for any number of rows
    try:
        with cuda.use(driver), device.on("cuda"), watch() as broken:
            arrays = surrounded(op.inputs(case, np.random.default_rng(7)))
            before = {k: v.copy() for k, v in arrays.items()}
            got = op.run(case, arrays)
            if names := broken():
                out.append(f"written outside {names}")
    except Enough:
        return driver.found()
    except RuntimeError as e:
        return [str(e)]
    finally:
        dispatch.PROGRAM_ROWS = rows
    limit = op.tolerance_of(case)
    for name in want:
        e = error(got[name], want[name])
        if not e <= limit:
            out.append(f"{name}: error {e:.2e}, tolerance {limit:.0e}")
    for name, array in before.items():
        if not np.array_equal(arrays[name].view(np.uint8), array.view(np.uint8)):
            out.append(f"input {name} was written")
    return out + driver.found()
