"""Every CUDA kernel without a GPU: each small case of each op on the emulator, against the fp64 reference.

Three builds of the unmodified .cu text: plain under several schedules, with AddressSanitizer and UBSan, and watched for
races, unwritten and undeclared memory.
"""

from __future__ import annotations

import json
import os

import pytest

from engine.ops.registry import ops

from . import build, worker

pytest.importorskip("torch")
if build.compiler() is None:
    pytest.skip("no C++ compiler here: the CUDA text does not run on the host", allow_module_level=True)

from .cases import SCHEDULES, kernels_of, problems, reference, small
from .driver import EmulatedCuda

WITH_KERNEL = [op for op in ops().values() if any((build.ROOT / "csrc/ops" / op.name).glob("*.cu"))]
CASES = [pytest.param(op, i, id=f"{op.name}-{c.id}") for op in WITH_KERNEL for i, c in small(op)]


@pytest.fixture(scope="module")
def emulated():
    return EmulatedCuda()


def test_every_cuda_kernel_belongs_to_an_op(emulated):
    assert set(emulated.cuda_ops()) <= set().union(*(kernels_of(op) for op in WITH_KERNEL))


@pytest.mark.parametrize(("op", "index"), CASES)
def test_case(emulated, op, index):
    want = reference(op, index)
    for schedule in SCHEDULES:
        found = problems(emulated, op, index, schedule, want)
        assert not found, f"schedule {schedule}: " + "; ".join(found)
        assert emulated.launches(), "nothing ran on the device"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["asan", "watched"])
@pytest.mark.parametrize("op", WITH_KERNEL, ids=lambda op: op.name)
def test_faults(op, kind):
    for i, _ in small(op):
        reference(op, i)
    build.module(kind)
    done = worker.start(kind, "--ops", op.name, "--schedules", os.environ.get("ENGINE_EMU_SCHEDULES", "4"))
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [f"{x['case']} (schedule {x['schedule']}): " + "; ".join(x["problems"]) for x in lines if x["problems"]]
    assert not wrong, "\n".join(wrong)
    assert done.returncode == 0 and lines, done.stderr[-6000:]
