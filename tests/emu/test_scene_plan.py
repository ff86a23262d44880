"""The CUDA plans of VEGA-3D: small ones executed without a device, the full sizes counted."""

from __future__ import annotations

import pytest

from . import build

pytest.importorskip("torch")
pytest.importorskip("triton")
if build.compiler() is None:
    pytest.skip("no C++ compiler here: the CUDA text does not run on the host", allow_module_level=True)

from engine.models.vega3d.features import GeneratorFeatures
from engine.models.vega3d.generator_config import DitConfig, Tap, VaeConfig
from engine.models.vega3d.model import Vega3D
from engine.runtime import cuda

from .beside import beside

# Normalised error of the features. In bf16, sums that differ in the last digit may round to different operands.
LIMITS = {"fp32": 1e-5, "bf16": 5e-3}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("what", ["features", "vace", "prompt"])
def test_small_generator_equals_the_cpu_tape(what: str, dtype: str) -> None:
    """Seeds, crops, the VAE, the transformer, means; hints, and a text of several tokens; every plan audited."""
    found = beside("scene", what, "--dtype", dtype, *(["--audit"] if dtype == "fp32" else []))
    assert found["error"] <= LIMITS[dtype], found
    assert found["kinds"] == ["cuda", "triton"]
    assert found["audit"] == ([] if dtype == "fp32" else None)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("what", ["questions", "spatial"])
def test_small_model_equals_the_cpu_tape(what: str, dtype: str) -> None:
    """Of both variants: towers, fusion, prefill, decode, and grounding; every plan audited."""
    found = beside("scene", what, "--dtype", dtype, *(["--audit"] if dtype == "fp32" else []))
    assert found["error"] <= LIMITS[dtype], found
    assert found["kinds"] == ["cuda", "triton"]
    assert found["audit"] == ([] if dtype == "fp32" else None)


# Nodes on a GPU: a product that rounds its rows first is two programs, one that reads bf16 is one.
PER_BLOCK = 2 * 5 + 2 + 2 + 1  # products, norms, attention (append, attend), the text's gate


@pytest.mark.parametrize(("size", "cells"), [((832, 480), 1560), ((1280, 720), 3600)])
def test_node_budget_of_the_full_size(size: tuple[int, int], cells: int) -> None:
    """Up to block 20: the transformer in 319 nodes, a frame's encoder in 70 to 80."""
    dit, vae = DitConfig(), VaeConfig()
    tap = Tap(size=size, block=20).checked(dit, vae)
    with cuda.use(cuda.Recorder()):
        m = GeneratorFeatures.sketch(dit, vae, tap, device="cuda")
        assert m.plans["features"].nodes[0].op == "conv_patches"
        assert len(m.plans["features"]) == 3 + PER_BLOCK * 21 + 2
        assert len(m.plans["frame.0"]) <= 80
        assert {n.impl for p in m.plans.values() for n in p.nodes} <= {"cuda", "triton"}
        assert m._generator.tokens == cells
        assert sum(m.memory().parts.values()) < 10e9  # weights 1.8, four frames of a pass


def test_node_budget_of_the_language_model() -> None:
    """7B: seven nodes a layer, as rotary attention appends and then attends; ten where rows are rounded first."""
    published = {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944,
                 "num_hidden_layers": 28, "vocab_size": 151649, "rope_theta": 1e6}  # fmt: skip
    with cuda.use(cuda.Recorder()):
        m = Vega3D.sketch(published, device="cuda", dtype="bf16")
        sizes = {"look": 10 * 26 + 8, "fuse": 5, "fuse_code": 5, "prefill": 10 * 27 + 3 + 1, "decode": 7 * 28 + 3}
        assert {name: len(m.plans[name]) for name in sizes} == sizes
        assert {n.impl for p in m.plans.values() for n in p.nodes} <= {"cuda", "triton"}


def test_node_budget_of_variant_b() -> None:
    """Its tower attends to windows of four shapes in 28 of 32 layers; an attention is two nodes."""
    published = {"model_type": "qwen2_5_vl", "use_generative_encoder": True, "hidden_size": 3584,
                 "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944,
                 "num_hidden_layers": 28, "vocab_size": 152064, "rope_theta": 1e6, "max_position_embeddings": 128000,
                 "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}  # fmt: skip
    with cuda.use(cuda.Recorder()):
        m = Vega3D.sketch(published, device="cuda", dtype="bf16")
        sizes = {"look": 32 * 8 + 2 * (28 * 4 + 4) + 10, "fuse": 7, "prefill": 10 * 27 + 3 + 1, "decode": 7 * 28 + 3}
        assert {name: len(m.plans[name]) for name in sizes} == sizes
