"""The VACE tower against plain torch, each saving against doing without it, and its names."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from _peer_vega import made
from _vega import DIT, VAE, filled, random_generator

from engine.errors import ConfigError
from engine.io.checkpoint import SafetensorsFile
from engine.models.vega3d import generator_reference as reference
from engine.models.vega3d.generator_config import DitConfig, Tap
from engine.models.vega3d.generator_weights import canonical_dit, checked, dit_shapes, vae_shapes
from engine.models.vega3d.schedule import noise_level

FP32, BF16 = 5e-6, 2e-2
# (heads, head_dim, layers, vace_layers, block, tokens of the prompt, mask channels, scale)
CASES = [
    (2, 24, 3, (0, 2), 2, 1, 4, 1.0), (1, 16, 3, (0, 2), 1, 1, 0, 1.0), (3, 12, 4, (0, 1, 2, 3), 3, 1, 16, 0.5),
    (2, 12, 4, (0, 2), 3, 1, 4, 1.0), (2, 24, 2, (0,), 0, 1, 4, 2.0), (1, 40, 5, (0, 3), 3, 1, 64, 1.0),
    (2, 16, 3, (0, 1), 1, 3, 4, 1.0), (3, 16, 4, (0, 2), 2, 7, 4, -0.7), (2, 24, 5, (0, 4), 4, 1, 8, 1.0),
    (1, 12, 3, (0, 1, 2), 2, 20, 4, 1.0), (4, 12, 6, (0, 2, 4), 5, 1, 4, 1.0), (2, 20, 3, (0, 2), 0, 1, 4, 1.0),
]  # fmt: skip


def error(got, want) -> float:
    want = np.asarray(want, np.float64)
    return float(np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max())


def config(case: tuple) -> DitConfig:
    heads, head_dim, layers, vace_layers, _, _, mask, _ = case
    return replace(DIT, kind="vace", dim=heads * head_dim, heads=heads, layers=layers, vace_layers=vace_layers,
                   vace_channels=2 * DIT.channels + mask)  # fmt: skip


def model(case: tuple, dtype: str = "fp32", **options):
    return random_generator("cpu", dtype, dit=config(case), tokens=case[5], block=case[4], context_scale=case[7],
                            **options)  # fmt: skip


def expected(case: tuple, clip: np.ndarray, noise: np.ndarray, tap: Tap) -> np.ndarray:
    """By the reference in fp64, with every frame, block and row that the published code computes."""
    c = config(case)
    w, v = ({k: torch.from_numpy(t).double() for k, t in filled(s, i).tensors.items()}
            for i, s in ((1, dit_shapes(c)), (2, vae_shapes(VAE))))  # fmt: skip
    prompt = torch.from_numpy(
        np.random.default_rng(9).standard_normal((case[5], c.text_dim)).astype(np.float32)
    ).double()
    images = torch.from_numpy(clip).double().permute(0, 3, 1, 2)
    clean = reference.vae_encode(v, VAE, reference.cover(images, *tap.size))
    black = reference.vae_encode(v, VAE, torch.zeros(1, 3, tap.size[1], tap.size[0], dtype=torch.float64))[0]
    timestep, alpha, sigma = noise_level(tap.timestep)
    z = alpha * clean + sigma * torch.from_numpy(noise).double()
    context = reference.vace_context(c, clean, black)
    out = reference.vace_features(w, c, z[:, :, None], context, prompt, timestep, case[4], case[7])
    rows, columns = (n // 2 for n in clean.shape[2:])
    return reference.pooled(out, rows, columns, tap).numpy()


@pytest.mark.parametrize("case", CASES)
def test_engine_is_the_reference(case):
    rng = np.random.default_rng(0)
    clip = rng.uniform(-1, 1, (3, 20, 30, 3)).astype(np.float32)
    for grid in (None, (2, 3)):
        with model(case, grid=grid) as m:
            noise = rng.standard_normal((3, m.vae.z, *m._generator.latent)).astype(np.float32)
            want = expected(case, clip, noise, m.tap)
            assert error(m.features(clip, noise=noise), want) <= FP32
            for name, plan in m.plans.items():
                assert len(plan) <= m.node_budgets[name], name
                assert not plan.audit(m.arena, budget=m.node_budgets[name]).problems
    with model(case, "bf16") as m:
        assert error(m.features(clip, noise=noise), want) <= BF16


@pytest.mark.parametrize("case", CASES[:3])
def test_frames_of_a_pass_are_each_alone_beside_the_first(case):
    clip = np.random.default_rng(1).uniform(-1, 1, (5, 20, 30, 3)).astype(np.float32)
    with model(case) as m:
        want = m.features(clip, seed=7)
        assert error(m.features(clip[1:], seed=7), want[1:]) > 1e-3  # another first frame
    for per_pass in (2, 3):
        with model(case, per_pass=per_pass) as m:
            np.testing.assert_array_equal(m.features(clip, seed=7), want)


@pytest.mark.peer
def test_diffusers_names():
    folder = made() / "vace"
    c = DitConfig.from_json(json.loads((folder / "config.json").read_text()))
    assert c.kind == "vace" and c.vace_layers == (0, 2) and c.vace_channels == 12
    checked(canonical_dit(SafetensorsFile(folder / "model.safetensors")), dit_shapes(c))


def test_config_faults():
    published = {"_class_name": "VaceWanModel", "dim": 1536, "num_heads": 12, "num_layers": 30}
    c = DitConfig.from_json(published)
    assert c.vace_layers == tuple(range(0, 30, 2)) and c.vace_channels == 96
    for change, words in (({"vace_layers": [1, 2]}, "vace_layers"), ({"vace_in_dim": 20}, "vace_in_dim")):
        with pytest.raises(ConfigError, match=words):
            DitConfig.from_json(published | change)
