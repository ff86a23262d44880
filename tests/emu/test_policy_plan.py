"""The CUDA plans of the flow policies: small models executed without a device, the full sizes counted."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

from . import build

pytest.importorskip("torch")
pytest.importorskip("triton")
if build.compiler() is None:
    pytest.skip("no C++ compiler here: the CUDA text does not run on the host", allow_module_level=True)

from engine.models.pi05.model import Pi05
from engine.models.xvla.model import XVLA
from engine.runtime import cuda

from .beside import beside

sys.path.insert(0, str(build.ROOT / "tests/models"))
from _faster import small_folder, small_pi05, small_xvla

# Nodes of a step: rows and product of four matrices, append and attend, per layer; outside the layers begin, end, and
# rows and product of two matrices. X-VLA's last layer has a matrix and an append more: only actions have queries there.
PER_LAYER, OUTSIDE, LAST = 10, 6, {"pi05": 0, "xvla": 3}
LAYERS = {"pi05": 18, "xvla": 24}
FAMILY = {"pi05": Pi05, "xvla": XVLA}
FULL: dict[str, dict] = {
    "pi05": {"type": "pi05"},
    "xvla": {"type": "xvla", "chunk_size": 30, "max_state_dim": 20, "num_image_views": 3, "florence_config": {}},
}
# Normalised error of actions after the whole flow; measured 2.5e-6, 3.8e-8, 4.3e-7, 6.3e-3. In bf16, sums that differ
# in the last digit may round to different operands: X-VLA's steps meet such a tie, those of pi0.5 do not.
LIMITS = {("pi05", "fp32"): 1e-5, ("pi05", "bf16"): 1e-4, ("xvla", "fp32"): 1e-5, ("xvla", "bf16"): 1e-2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {"pi05": small_pi05(3, hidden_size=64, expert_hidden_size=64), "xvla": small_xvla(3)}
    return {kind: small_folder(tmp_path_factory.mktemp(kind), model) for kind, model in made.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype"), LIMITS)
def test_small_policy_equals_the_cpu_tape(folders, kind: str, dtype: str) -> None:
    """Vision, prefix, tables of times and ten steps, with a committed action; two requests."""
    audit = ["--audit"] if dtype == "fp32" else []
    found = beside("policy", kind, str(folders[kind]), "--dtype", dtype, *audit)
    assert found["error"] <= LIMITS[kind, dtype], found
    assert found["same_rows"]
    assert found["kinds"]["step"] == ["cuda", "triton"]
    assert found["audit"] == ([] if dtype == "fp32" else None)


@pytest.mark.parametrize("kind", FULL)
@pytest.mark.parametrize("quant", [None, "int8"])
def test_node_budget_of_the_full_size_step(kind: str, quant: str | None) -> None:
    with cuda.use(cuda.Recorder()):
        model = FAMILY[kind].sketch(FULL[kind], quant=quant, dtype="bf16", device="cuda")
    nodes = model.plans["step"].nodes
    layers = Counter(n.label.split(".")[0] for n in nodes)
    last = LAYERS[kind] - 1
    assert all(layers[str(i)] == PER_LAYER for i in range(last))
    assert layers[str(last)] == PER_LAYER + LAST[kind]
    assert len(nodes) == PER_LAYER * LAYERS[kind] + OUTSIDE + LAST[kind]
    assert {n.impl for n in nodes} <= {"cuda", "triton"}


@pytest.mark.parametrize("kind", FULL)
def test_full_size_fits_a_card(kind: str) -> None:
    """24 GB hold either policy; the parts come from the code that allocates."""
    with cuda.use(cuda.Recorder()):
        parts = FAMILY[kind].plan(FULL[kind], dtype="bf16", device="cuda")
    assert sum(parts.values()) < {"pi05": 7.5e9, "xvla": 2.2e9}[kind]
