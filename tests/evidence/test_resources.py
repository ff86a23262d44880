"""The golden table of compiled kernels (resources.json, written by `./run evidence`): no spills, promises kept.

test_evidence.py holds it fresh and compiles some of it again.
"""

from __future__ import annotations

import re

import pytest

from tests.evidence import cubins, records, sources

SHARED_LIMIT = 99 << 10  # of a block on sm_86, sm_89 and sm_120
# Kernels ('compiler/name' as a pattern) whose figure must not be 0.
WIDE = r"cuda/(gemm|moe_\w+|ssm|split_bf16|gather)_kernel|triton/(gemm\.matmul|moe\.grouped|attention\.causal)\b"
MATRIX = r"cuda/split_bf16_kernel|triton/(gemm\.matmul|moe\.grouped|attention\.causal)<\w+, (bf16|i8|i4)\b"
TABLE = records.table()
ROWS = {name: re.fullmatch(r"\w+/(\w+/.+)/sm_(\w+)", name) for name in TABLE}


@pytest.mark.parametrize("room", sources.rooms())
def test_every_room_and_architecture_is_there(room):
    archs = {found[2] for name, found in ROWS.items() if found and name.startswith(f"{room}/")}
    assert archs == set(cubins.ARCHS), f"run `./run evidence {room}`"


def test_no_local_memory():
    local = {name: row["stack"] for name, row in TABLE.items() if row["stack"]}
    assert not local, f"bytes of local memory per thread: {local}"


def test_shared_memory_fits_every_card():
    large = {name: row["shared"] for name, row in TABLE.items() if row["shared"] > SHARED_LIMIT}
    assert not large, f"bytes of shared memory, of {SHARED_LIMIT}: {large}"


@pytest.mark.parametrize(("figure", "pattern"), [("wide", WIDE), ("matrix", MATRIX)])
def test_promises(figure, pattern):
    claimed = {name: TABLE[name][figure] for name, found in ROWS.items() if found and re.match(pattern, found[1])}
    missing = [name for name, value in claimed.items() if not value]
    assert not missing, f"claimed and not there ({figure}): {', '.join(missing)}"


def test_every_claim_names_a_kernel():
    names = {found[1] for found in ROWS.values() if found}
    for alternative in ("cuda/gemm", "cuda/moe_up", "cuda/ssm", "cuda/split_bf16", "cuda/gather", "triton/gemm.matmul"):
        assert any(n.startswith(alternative) for n in names), f"no kernel {alternative}; run `./run evidence`"
