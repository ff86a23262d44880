"""The CUDA step as a whole: nemotron-tiny executed without a device, and the plan of the full size counted."""

from __future__ import annotations

from collections import Counter

import pytest

from . import build

pytest.importorskip("torch")
pytest.importorskip("triton")
if build.compiler() is None:
    pytest.skip("no C++ compiler here: the CUDA text does not run on the host", allow_module_level=True)

from bench.sources import PUBLISHED
from engine.models.nemotron.model import Nemotron
from engine.runtime import cuda

from .beside import beside
from .driver import EmulatedCuda

# Kernels of a decode step: in_proj, ssm, out_proj; route, up, down; qkv, split, combine, o_proj; and outside the
# layers embedding, head, two of the sampler.
BUDGET = {"M": 3, "E": 3, "*": 4, "outside": 4, "all": 170}
# Normalised error of logits. Quantised: 8-bit codes of activations flip at ties, layer after layer, as they do between
# two instruction sets of a CPU.
LIMITS = {"fp32": 5e-6, "bf16": 1e-3, "int8": 1e-2, "int4": 1e-2}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LIMITS)
def test_tiny_model_equals_the_cpu_tape(kind):
    """Prefill in Triton (interpreted) and 16 decoded tokens in CUDA (emulated), in plan order."""
    arguments = ("--quant", kind) if kind.startswith("int") else ("--dtype", kind)
    found = beside("whole", *arguments, *(["--audit"] if kind == "fp32" else []))
    assert found["prefill"] == ["cuda", "triton"] and found["decode"] == ["cuda"]
    assert found["same_tokens"], found
    assert found["error"] <= LIMITS[kind], found
    if kind == "fp32":
        assert found["same_drawn"], found
        assert found["audit"] == []


def recorded(quant: str | None, context: int) -> list[tuple[str, int]]:
    """(label, kernels launched) of every node of the full-size decode step."""
    driver = EmulatedCuda()
    with cuda.use(driver):
        plan = Nemotron.sketch(PUBLISHED.to_json(), quant=quant, context=context, device="cuda").plans["decode"]
        assert {n.impl for n in plan.nodes} == {"cuda"}
        driver.only_trace(True)
        try:
            out = []
            for info, call in zip(plan.nodes, plan.calls, strict=True):
                driver.clear_launches()
                call()
                out.append((info.label, len(driver.launches())))
            return out
        finally:
            driver.only_trace(False)


@pytest.mark.parametrize(("quant", "context"), [("int4", 1024), (None, 32768), ("int8", 262144)])
def test_node_budget_of_the_full_size_step(quant, context):
    per_layer: Counter = Counter()
    for label, kernels in recorded(quant, context):
        layer = label.split(".")[0]
        per_layer[int(layer) if layer.isdecimal() else "outside"] += kernels
    assert per_layer["outside"] <= BUDGET["outside"]
    for i, kind in enumerate(PUBLISHED.pattern):
        assert 0 < per_layer[i] <= BUDGET[kind], f"layer {i} ({kind}): {per_layer[i]} kernels"
    assert sum(per_layer.values()) <= BUDGET["all"]


def test_a_recorded_plan_says_that_it_cannot_run():
    from engine.errors import PlanError

    with cuda.use(cuda.Recorder()):
        model = Nemotron.sketch(PUBLISHED.to_json(), quant="int4", device="cuda")
    with pytest.raises(PlanError, match="not here"):
        model.plans["decode"].replay()
    assert {n.impl for n in model.plans["prefill"].nodes} == {"cuda", "triton"}
