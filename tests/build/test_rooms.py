"""Every op has one room, complete or with its gaps declared; nothing lies between the rooms."""

from __future__ import annotations

import re

import pytest
from _layout import ROOT, files, name

from engine import _C
from engine.ops.registry import ROOM, ops, room

OPS = ops()
# Shared by several rooms, or the machinery of the registry itself.
NOT_ROOMS = {"engine/ops/__init__.py", "engine/ops/registry.py", "engine/ops/dispatch.py", "engine/ops/checks.py",
             "triton_kernels/__init__.py", "csrc/ops/ops.h", "csrc/ops/ops.cpp"}  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_room_is_complete(op):
    missing = [f"{thing}: {path}" for thing, path, state in room(op, ROOT) if state == "MISSING"]
    assert not missing, f"write it, or say why not in absent={{...}} of engine/ops/{op}.py:\n" + "\n".join(missing)


@pytest.mark.parametrize("op", OPS)
def test_absences_are_true(op):
    for thing, reason in OPS[op].absent.items():
        assert thing in ROOM, f"absent[{thing!r}] is not a part of a room"
        assert len(reason) > 5, f"absent[{thing!r}] needs a reason"
        assert not (ROOT / ROOM[thing].format(op=op)).exists(), f"absent[{thing!r}] is declared, but the file is there"


def test_no_orphans():
    known = {pattern.format(op=op) for op in OPS for pattern in ROOM.values()} | NOT_ROOMS
    found = [
        name(p)
        for f in ("csrc/ops", "engine/ops", "triton_kernels")
        for p in files(f, ".py", ".h", ".cpp", ".cu", ".cuh", ".md")
    ]
    # Helper headers may sit in a room beside its kernels.
    orphans = [f for f in found if f not in known and not re.match(rf"csrc/ops/({'|'.join(OPS)})/\w+\.(h|cuh)$", f)]
    assert not orphans, orphans


def test_every_kernel_belongs_to_a_room():
    owned = {k for op in OPS.values() for k in (op.kernels or (op.name,))}
    table = {kernel for kernel, _ in _C.ops()}
    assert table == owned, f"without a room: {sorted(table - owned)}; not in the table: {sorted(owned - table)}"


@pytest.mark.parametrize("op", OPS)
def test_entry(op):
    entry = OPS[op]
    kinds = {c.kind for c in entry.cases}
    assert kinds <= {"tiny", "odd", "real"} and "tiny" in kinds and "odd" in kinds
    ids = [(c.kind, c.id) for c in entry.cases]
    assert len(set(ids)) == len(ids), "two cases have the same id"
    for case in entry.cases:
        assert entry.tolerance_of(case) >= 0 and entry.bytes(case) > 0 and entry.flops(case) >= 0


@pytest.mark.parametrize("path", [p for p in files("csrc/ops", ".cpp", ".cu") if p.name != "ops.cpp"], ids=name)
def test_head_of_a_kernel(path):
    """Five labelled lines are enough to review a kernel; `tried` may only state what was measured."""
    head = path.read_text("utf-8").split("#include")[0]
    for label in ("layout", "mapping", "moves", "tried"):
        assert re.search(rf"^// {label}\b", head, re.M), f"{name(path)} has no '// {label}' line"
