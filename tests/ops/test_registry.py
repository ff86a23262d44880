"""Every case of every op, on every instruction set of this host, against the fp64 reference."""

from __future__ import annotations

import numpy as np
import pytest

from engine.ops.registry import error, ops
from engine.runtime import device

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
    arrays = op.inputs(case, np.random.default_rng(7))
    before = {k: v.copy() for k, v in arrays.items()}
    with device.use_isa(isa):
        got = op.run(case, arrays)
    want = op.reference(case, arrays)
    limit = op.tolerance_of(case)
    for name in want:
        e = error(got[name], want[name])
        assert e <= limit, f"{name}: error {e:.2e}, tolerance {limit:.0e}"
    for name, array in before.items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=f"input {name} was written")
