"""The CUDA plans of MoTok: a small model executed without a device, the full size counted."""

from __future__ import annotations

import pytest

from . import build

pytest.importorskip("torch")
pytest.importorskip("triton")
if build.compiler() is None:
    pytest.skip("no C++ compiler here: the CUDA text does not run on the host", allow_module_level=True)

from engine.models.motok.config import Guidance, MoTokConfig
from engine.models.motok.model import MoTok
from engine.runtime import cuda

from .beside import beside

# Normalised error of joints and features; measured 6.3e-7 and 1.8e-8. In bf16, sums that differ in the last digit may
# round to different operands.
LIMITS = {"fp32": 1e-5, "bf16": 1e-3}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LIMITS)
def test_small_model_equals_the_cpu_tape(dtype: str) -> None:
    """Text, trajectories, both planners, guided and projected motions, tokens of a motion; every plan audited."""
    found = beside("motion", "--dtype", dtype, *(["--audit"] if dtype == "fp32" else []))
    assert found["same_codes"]
    assert found["same_tokens"] or dtype != "fp32"
    assert found["error"] <= LIMITS[dtype], found
    assert found["kinds"] == ["cuda", "triton"]
    assert found["audit"] == ([] if dtype == "fp32" else None)


# Nodes of a sampled step on a GPU: every product is two programs (rows, tiles), everything else one node.
PER_BLOCK, PER_STEP = 7, 8


@pytest.mark.parametrize("down_t", [1, 2])
@pytest.mark.parametrize("quant", [None, "int8"])
def test_node_budget_of_the_full_size(down_t: int, quant: str | None) -> None:
    config = MoTokConfig.humanml3d(down_t)
    with cuda.use(cuda.Recorder()):
        model = MoTok.sketch(config.to_json(), quant=quant, dtype="bf16", device="cuda")
        plan = model.decode_plan(196, 3, Guidance())
        planner = model.ddm_plan(196 // config.rate, True)
        step = model.ar_plan(3)
    steps = len(config.diffusion.timesteps)
    inside = [n for n in plan.nodes if n.label[0].isdigit()]
    assert len(inside) == steps * (PER_STEP + PER_BLOCK * config.denoiser.blocks)
    assert len(plan) - len(inside) == 9 + 21 * config.down_t  # codes, convolutions, joints
    assert len(planner) == config.ddm.steps * (9 + 12 * config.ddm.layers)
    assert len(step) == 7 + 8 * config.ar.layers_base
    assert {n.impl for n in plan.nodes} <= {"cuda", "triton"}


def test_full_size_fits_a_small_card() -> None:
    with cuda.use(cuda.Recorder()):
        parts = MoTok.plan(MoTokConfig.humanml3d().to_json(), dtype="bf16", device="cuda")
    assert sum(parts.values()) < 0.6e9
