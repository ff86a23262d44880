"""The cases of the registry notice wrong kernels: every mutant is killed, or listed with the reason why not."""

from __future__ import annotations

import pytest

from engine.ops.registry import ops

from . import build

pytest.importorskip("torch")
if build.compiler() is None:
    pytest.skip("no C++ compiler here: the CUDA text does not run on the host", allow_module_level=True)

from .cases import reference, small
from .mutants import MUTANTS, SURVIVORS
from .mutate import mutated, op_of, score


def test_mutants_fit_their_files():
    assert len({m.id for m in MUTANTS}) == len(MUTANTS)
    assert set(SURVIVORS) <= {m.id for m in MUTANTS}
    for m in MUTANTS:
        mutated(m)
        assert op_of(m) in ops(), f"{m.id} belongs to no room: nothing would run it"


@pytest.mark.slow
@pytest.mark.parametrize("op", sorted({op_of(m) for m in MUTANTS}))
def test_every_mutant_is_killed(op, capsys):
    for i, _ in small(ops()[op]):
        reference(ops()[op], i)
    table, wrong = score(m for m in MUTANTS if op_of(m) == op)
    with capsys.disabled():
        print("\n" + table)
    assert not wrong, "\n".join(wrong)
