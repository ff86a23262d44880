"""The VAE of HunyuanVideo-1.5 as plans, against its plain reference: tiles of every kind, formats, static plans."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _dreambooth import VaeTiny, det, vae_weights
from torch import Tensor

from engine.blocks.weights import Recipe, Shapes
from engine.errors import InputError
from engine.models.dreambooth3d import vae_reference as m
from engine.models.dreambooth3d.config import VaeConfig
from engine.models.dreambooth3d.tiles import Tiling
from engine.models.dreambooth3d.vae import STACKS, Vae, stack_of
from engine.models.dreambooth3d.vae_weights import VaeLoader
from engine.models.dreambooth3d.weights import vae_shapes
from engine.runtime.arena import Arena

SMALL = VaeConfig((8, 8, 16, 16, 16), 1, 4)
CONFIGS = [
    SMALL,
    VaeConfig((8, 16, 16, 32), 2, 2, 8, 4),
    VaeConfig((16, 16, 16), 1, 4, 4, 4),
    VaeConfig((8, 8, 16), 1, 2, 4, 2, 0.7),
    VaeConfig((16, 32, 64, 64, 64), 1, 8),
    VaeConfig((8, 16, 16), 2, 2, 4, 1),
    VaeConfig((16, 16, 16, 16), 1, 4, 4, 2),
]


def last(x: Tensor) -> np.ndarray:
    """[C, T, H, W] with channels last."""
    return np.ascontiguousarray(x.permute(1, 2, 3, 0).numpy())


def near(got: np.ndarray, want: Tensor, bar: float = 1e-5) -> None:
    expected = last(want)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= bar * np.abs(expected).max()


@pytest.mark.parametrize("c", CONFIGS, ids=lambda c: f"{c.widths}-{c.spatial}-{c.temporal}")
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_one_tile(c: VaeConfig, frames: int) -> None:
    """Both ways, grids of one row and column up; and a smaller tile behind a larger one."""
    w = vae_weights(c)
    tiny = VaeTiny(c, Tiling(0), frames, 3, 4, encoded=frames)
    for rows, columns, count in ((3, 4, frames), (1, 2, frames), (2, 1, 1), (3, 4, frames)):
        z = det("z", (c.z, count, rows, columns), 1)
        near(tiny.tiles.decode(last(z)), m.decode(w, c, z / c.scaling))
        pixels = (count - 1) * c.temporal + 1
        x = det("x", (3, pixels, rows * c.spatial, columns * c.spatial), 0.5)
        mean, log = m.encode(w, c, x).chunk(2)
        got, deviation = tiny.tiles.encode(last(x))
        near(got, mean * c.scaling)
        near(deviation, torch.exp(0.5 * log.clamp(-30, 20)) * c.scaling)


@pytest.mark.parametrize(("rows", "columns"), [(9, 17), (2, 11), (8, 7)])
def test_tiles(rows: int, columns: int) -> None:
    """Tiles of 128 pixels as the reference blends them, with narrow ones at the ends."""
    c, w = SMALL, vae_weights(SMALL)
    tiny = VaeTiny(c, Tiling(128), 2, 8, 8)
    z = det("z", (c.z, 2, rows, columns), 1)
    near(tiny.tiles.decode(last(z)), m.tiled_decode(w, c, z / c.scaling, 128))
    x = det("x", (3, 1, 16 * rows, 16 * columns), 0.5)
    near(tiny.tiles.encode(last(x))[0], m.tiled_encode(w, c, x, 128)[: c.z] * c.scaling)
    shapes = {name.split(".")[1] for name in tiny.plans}
    assert len(shapes) <= 8  # at most four shapes, of one and of two latent frames


def test_the_smaller_published_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 pixels, a quarter of which neighbours share."""
    c, w = SMALL, vae_weights(SMALL)
    monkeypatch.setattr(m, "OVERLAP", 0.25)
    tiny = VaeTiny(c, Tiling(128, 0.25), 1, 8, 8)
    z, x = det("z", (c.z, 1, 9, 15), 1), det("x", (3, 1, 144, 208), 0.5)
    near(tiny.tiles.decode(last(z)), m.tiled_decode(w, c, z / c.scaling, 128))
    near(tiny.tiles.encode(last(x))[0], m.tiled_encode(w, c, x, 128)[: c.z] * c.scaling)


def test_tiles_change_the_result() -> None:
    z = last(det("z", (SMALL.z, 1, 9, 9), 1))
    whole, parts = (VaeTiny(SMALL, t, 1, 9, 9).tiles.decode(z) for t in (Tiling(0), Tiling(128)))
    assert np.abs(whole - parts).max() > 1e-3


def test_rounded_weights() -> None:
    z = det("z", (SMALL.z, 3, 3, 4), 1)
    tiles = VaeTiny(SMALL, Tiling(0), 3, 3, 4, dtype="bf16").tiles
    got = tiles.decode(last(z))
    want = last(m.decode(vae_weights(SMALL), SMALL, z / SMALL.scaling))
    assert np.linalg.norm(got - want) <= 2e-2 * np.linalg.norm(want)
    x = det("x", (3, 1, 48, 64), 0.5)
    want = last(m.encode(vae_weights(SMALL), SMALL, x)[: SMALL.z] * SMALL.scaling)
    assert np.linalg.norm(tiles.encode(last(x))[0] - want) <= 2e-2 * np.linalg.norm(want)


def test_plans_are_static() -> None:
    tiny = VaeTiny(SMALL, Tiling(0), 2, 2, 3, encoded=2)
    tiny.tiles.decode(last(det("z", (SMALL.z, 2, 2, 3), 1)))
    tiny.tiles.encode(last(det("x", (3, 5, 32, 48), 0.5)))
    for name, plan in tiny.plans.items():
        audit = plan.audit(tiny.arena, tiny.vae.node_budget(name.split(".")[0], 2))
        assert audit.ok, (name, audit.problems)


def test_stacks() -> None:
    """A frame stands in its place of the ring, the two before it in theirs."""
    for frame in range(12):
        want = tuple(max(frame - 2 + k, 0) % 3 for k in range(3))
        assert STACKS[stack_of(frame)] == want


@pytest.mark.parametrize("tiling", [Tiling(100), Tiling(-16), Tiling(256, 1.0)])
def test_wrong_tilings(tiling: Tiling) -> None:
    with pytest.raises(InputError, match="tiles of"):
        tiling.checked(16)


def test_wrong_sizes() -> None:
    tiny = VaeTiny(SMALL, Tiling(0), 1, 2, 2)
    for shape in ((2, 32, 32, 3), (1, 30, 32, 3), (1, 32, 8, 3)):
        with pytest.raises(InputError, match="sides multiples of 16"):
            tiny.tiles.encode(np.zeros(shape, np.float32))
    with pytest.raises(InputError, match="exceeds"):
        tiny.tiles.decode(np.zeros((1, 3, 2, 4), np.float32))


def test_full_size_fits() -> None:
    """A tile of 16 x 16 cells and 13 latent frames (49 frames) of the published VAE, bf16."""
    c, arena = VaeConfig(), Arena(dry=True)
    loader = VaeLoader(c, Shapes(vae_shapes(c)), arena, Recipe("bf16", None))
    Vae(arena, c, loader.encoder(), loader.decoder(), frames=13, rows=16, columns=16, kv_format="bf16")
    parts = arena.summary()
    assert 2.4e9 < parts["weights"] < 2.7e9 and parts["workspace"] < 5e9
