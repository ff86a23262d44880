"""Every case of every op, on every instruction set of this host, against the fp64 reference, between sentinels."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from engine.ops import registry
from engine.ops.registry import error, guarded, ops, surrounded, watch
from engine.runtime import device
from engine.runtime.plan import capture

pytest.importorskip("torch")

CASES = [
    pytest.param(op, case, isa, id=f"{op.name}-{case.id}-{isa}")
    for op in ops().values()
    for case in op.cases
    if case.kind != "real"
    for isa in device.available_isas()
]


@pytest.mark.parametrize(("op", "case", "isa"), CASES)
def test_case(op, case, isa):
    arrays = surrounded(op.inputs(case, np.random.default_rng(7)))
    before = {k: v.copy() for k, v in arrays.items()}
    with device.use_isa(isa), watch() as broken:
        got = op.run(case, arrays)
    assert not broken(), f"written outside {broken()}"
    want = op.reference(case, arrays)
    limit = op.tolerance_of(case)
    for name in want:
        e = error(got[name], want[name])
        assert e <= limit, f"{name}: error {e:.2e}, tolerance {limit:.0e}"
    for name, array in before.items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=f"input {name} was written")


def test_guards_see_one_byte():
    for at in (-1, 12):
        with watch() as broken:
            array = guarded(3)
            assert np.isnan(array).all() and not broken()
            (ctypes.c_uint8 * 1).from_address(array.ctypes.data + at)[0] = 0
        assert broken() == ["out"]


@pytest.mark.parametrize("op", ops().values(), ids=lambda op: op.name)
def test_every_run_is_guarded(op):
    case = op.cases[0]
    with watch():
        op.run(case, op.inputs(case, np.random.default_rng(7)))
        assert registry._watched, "run makes its outputs with guarded() or GuardedArena"


@pytest.mark.parametrize("op", [pytest.param(o, id=o.name) for o in ops().values() if o.graph_safe])
def test_graph_safe_ops_can_be_captured(op):
    """Capturing runs nothing and allocates nothing; the plan then replays."""
    case = next(c for c in op.cases if c.kind == "tiny")
    call = op.prepare(case, op.inputs(case, np.random.default_rng(7)))
    call()
    plan = capture(call, op.name)
    assert {node.op for node in plan.nodes} <= set(op.kernels or (op.name,))
    plan.replay()
