"""3DreamBooth's transformer and VAE in plain torch against diffusers, on random configurations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _dreambooth import Tiny, VaeTiny, as_rows
from _peer_dreambooth import CASES, cases
from torch import Tensor

from engine.models.dreambooth3d import reference as m
from engine.models.dreambooth3d import vae_reference as vae
from engine.models.dreambooth3d.config import VaeConfig
from engine.models.dreambooth3d.dit import Shape
from engine.models.dreambooth3d.tiles import Tiling
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


@pytest.mark.parametrize("number", NUMBERS)
def test_plan_of_the_transformer(number: int) -> None:
    """Without references, with glyphs and without: the velocity is read off one step."""
    case = cases()[number]
    c, w = case.dit
    latent, states, glyphs = (case.io[f"dit.{n}"] for n in ("latent", "states", "glyphs"))
    sigma = case.io["dit.time"].item() / 1000
    sigmas, shape = np.array([sigma, 0.0]), Shape(*latent.shape[1:], 0, 1)
    tiny = Tiny(c=c, base=w, image=shape.image, references=0)
    for given, name in ((glyphs.numpy(), "velocity"), (None, "without_glyphs")):
        tokens = tiny.sampler.tokens(sigmas, states.numpy(), given)
        clean = tiny.sampler.sample(shape, as_rows(latent), sigmas, 1.0, [tokens])
        assert clean is not None
        near(torch.from_numpy((as_rows(latent) - clean) / sigma).float(), case.io[f"dit.{name}"].flatten(1).T)


@pytest.mark.parametrize("number", NUMBERS)
def test_plans_of_the_vae(number: int) -> None:
    """A picture, a video and a latent whole, and both ways in tiles."""
    case = cases()[number]
    (c, w), tile = case.vae, case.about["tile"]

    def last(name: str) -> np.ndarray:
        return np.ascontiguousarray(case.io[f"vae.{name}"].permute(1, 2, 3, 0).numpy())

    def same(got: np.ndarray, name: str) -> None:
        near(torch.from_numpy(got).permute(3, 0, 1, 2), case.io[f"vae.{name}"])

    whole, parts = (VaeTiny(c, Tiling(n), 3, 20, 20, encoded=3, base=w).tiles for n in (0, tile))
    for name in ("image", "video"):
        mean, deviation = whole.encode(last(name))
        log = 2 * np.log(deviation / c.scaling)
        same(np.concatenate([mean / np.float32(c.scaling), log], -1), f"{name}_moments")
    same(whole.decode(last("latent") * np.float32(c.scaling)), "decoded")
    near(torch.from_numpy(parts.encode(last("large"))[0] / np.float32(c.scaling)).permute(3, 0, 1, 2),
         case.io["vae.moments_tiled"][: c.z])  # fmt: skip
    same(parts.decode(last("latent_large") * np.float32(c.scaling)), "decoded_tiled")


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
