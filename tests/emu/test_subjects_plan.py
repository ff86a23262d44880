"""The CUDA plans of 3DreamBooth: a small model executed without a device, the full size counted."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from engine.models.dreambooth3d.dit import Shape
from engine.models.dreambooth3d.model import DreamBooth3D
from engine.runtime import cuda
from engine.runtime.plan import capture

from . import build
from .beside import beside

# Normalised error of a latent, and of pixels with moments; measured 7.0e-7 and 7.2e-7.
LIMIT = 1e-5

PUBLISHED = {"hidden_size": 2048, "heads_num": 16, "mm_double_blocks_depth": 54, "in_channels": 32,
             "out_channels": 32, "ideal_resolution": "720p"}  # fmt: skip


def test_nodes_of_the_full_size() -> None:
    """A step of 49 frames of 720p, a tile of the VAE, a chunk of a prompt. Where rows are rounded before a product, or
    keys appended before attention, that is a node more than on a CPU, whose budgets the model states."""
    with cuda.use(cuda.Recorder()):
        m = DreamBooth3D.sketch(PUBLISHED, device="cuda", spans=True)
        with m._context():
            shapes = {Shape(13, 45, 80): 1942, Shape(13, 45, 80, 4): 2796, Shape(13, 45, 80, 4, 2, 3): 3223}
            steps = {s: capture(m._denoiser.step(s), s.name) for s in shapes}
            others = [capture(m._vae.decode(13, 16, 16), "decode"), capture(m._vae.encode(1, 16, 16), "encode"),
                      capture(m._prompts.step, "prompt")]  # type: ignore[union-attr]  # fmt: skip
        assert {s: len(p) for s, p in steps.items()} == shapes
        assert [len(p) for p in others] == [4544, 110, 261]
        plans = [*steps.values(), *others, *m.plans.values()]
        assert {n.impl for p in plans for n in p.nodes} == {"cuda", "triton"}


@pytest.mark.slow
@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler here: the CUDA text does not run on the host")
@pytest.mark.parametrize("what", ["steps", "tile"])
def test_small_model_equals_the_cpu_tape(what: str) -> None:
    """Texts, references, steps that run and that keep them, both branches; a tile decoded and a picture encoded."""
    found = beside("subject", what)
    assert found["error"] <= LIMIT, found
    assert found["kinds"] == ["cuda", "triton"] and found["audit"] == []
