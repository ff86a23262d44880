"""3DreamBooth's transformer and VAE in plain torch against diffusers, on random configurations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _peer_dreambooth import CASES, cases
from torch import Tensor

from engine.models.dreambooth3d import reference as m
from engine.models.dreambooth3d import vae_reference as vae
from engine.models.dreambooth3d.config import VaeConfig
from engine.models.dreambooth3d.weights import dit_shapes, vae_shapes

NUMBERS = range(CASES)


def near(got: Tensor, want: Tensor, bar: float = 1e-5) -> None:
    assert got.shape == want.shape
    assert ((got - want).norm() / want.norm()).item() <= bar


@pytest.mark.parametrize("number", NUMBERS)
def test_transformer(number: int) -> None:
    case = cases()[number]
    c, w = case.dit
    assert {k: tuple(v.shape) for k, v in w.items()} == dit_shapes(c)
    latent, states = case.io["dit.latent"], case.io["dit.states"]
    time = case.io["dit.time"].item()
    near(m.velocity(w, c, latent, time, states, glyphs=case.io["dit.glyphs"]), case.io["dit.velocity"])
    near(m.velocity(w, c, latent, time, states), case.io["dit.without_glyphs"])


@pytest.mark.parametrize("number", NUMBERS)
def test_vae(number: int) -> None:
    case = cases()[number]
    c, w = case.vae
    assert {k: tuple(v.shape) for k, v in w.items()} == vae_shapes(c)
    for name in ("image", "video"):
        near(vae.encode(w, c, case.io[f"vae.{name}"]), case.io[f"vae.{name}_moments"])
    near(vae.decode(w, c, case.io["vae.latent"]), case.io["vae.decoded"])


@pytest.mark.parametrize("number", NUMBERS)
def test_tiles(number: int) -> None:
    """In the released geometry, at a smaller size; what tiles see differs from what the whole picture shows."""
    case = cases()[number]
    (c, w), tile = case.vae, case.about["tile"]
    got = vae.tiled_encode(w, c, case.io["vae.large"], tile)
    near(got, case.io["vae.moments_tiled"])
    assert (got - vae.encode(w, c, case.io["vae.large"])).norm() / got.norm() > 1e-3
    near(vae.tiled_decode(w, c, case.io["vae.latent_large"], tile), case.io["vae.decoded_tiled"])


def test_full_size_of_the_vae() -> None:
    """Tiles of 256 pixels, 224 apart."""
    assert sum(int(np.prod(s)) for s in vae_shapes(VaeConfig()).values()) == 1_260_634_115
    seen = []

    def run(part: Tensor) -> Tensor:
        seen.append(tuple(part.shape[-2:]))
        return part.repeat_interleave(16, -1).repeat_interleave(16, -2)

    out = vae.tiled(torch.zeros(1, 1, 45, 80), 16, 32, 224, run)
    assert out.shape[-2:] == (720, 1280) and len(seen) == 24
    assert (seen.count((16, 16)), seen.count((16, 10)), seen.count((3, 16)), seen.count((3, 10))) == (15, 3, 5, 1)
