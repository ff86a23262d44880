"""Personalisation on the tiny transformer: what a step is, kills and resumes, files, and what is refused."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from _dreambooth import CONFIG, Tiny, adapter, as_rows, as_source, det, states, views, weights
from test_dreambooth3d_dit import ONE, shape

from engine.errors import CheckpointError, InputError
from engine.io.checkpoint import SafetensorsFile
from engine.models.dreambooth3d import personalize
from engine.models.dreambooth3d import reference as m
from engine.models.dreambooth3d.dit_weights import Subject
from engine.models.dreambooth3d.personalize import ADAPTER, STATE, Personalizer, Photos, Settings
from engine.models.dreambooth3d.weights import KINDS, adapter_kind, canonical_adapter

BASE = as_source(weights())
PHOTOS = Photos(
    det("mean", (3, 8, 4, 6), 1).numpy(), det("std", (3, 8, 4, 6), 0.1).abs().numpy(),
    torch.stack(views()).numpy(), states("cond").numpy(),
)  # fmt: skip
SIX = Settings(steps=6, rank=4, dtype="f32", lr=1e-3)


def run(settings: Settings = SIX) -> Personalizer:
    return Personalizer(CONFIG, BASE, PHOTOS, settings, as_source(adapter("tdapter", KINDS["views"])))


def test_a_step_is_the_released_one() -> None:
    """Loss, gradient of both adapters and AdamW of one step, by the reference and torch, from the same draws."""
    got = run()
    how = m.Adapters(*({k: v.detach().clone().requires_grad_() for k, v in got.adapters[part].items()}
                       for part in ("subject", "views")), "all")  # fmt: skip
    params = [*(how.subject or {}).values(), *(how.views or {}).values()]
    optimiser = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.01)
    chosen = np.random.default_rng([42, 0, 0]).permutation(3)[0]
    rng = np.random.default_rng([42, 1, 0])
    posterior, noise = (torch.from_numpy(rng.standard_normal((8, 4, 6), np.float32)) for _ in range(2))
    time = 1000 * float(torch.sigmoid(torch.tensor(rng.standard_normal(), dtype=torch.float64)) * (1 - 2e-5) + 1e-5)
    clean = torch.from_numpy(PHOTOS.mean[chosen]) + torch.from_numpy(PHOTOS.std[chosen]) * posterior
    loss = m.one_frame_loss(weights(), CONFIG, clean[:, None], noise[:, None], time, states("cond"), views(), how)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    optimiser.step()
    assert got.step() == pytest.approx(loss.item(), rel=1e-6)
    for mine, theirs in ((got.adapters["subject"], how.subject), (got.adapters["views"], how.views)):
        for key, value in (theirs or {}).items():
            torch.testing.assert_close(mine[key], value, atol=1e-7, rtol=1e-5, msg=key)


def test_it_learns_and_generates(tmp_path: Path) -> None:
    """The loss on one photo falls, and the files that a run leaves are what the engine merges."""
    settings = Settings(steps=60, rank=4, dtype="f32", lr=1e-2)
    one = Personalizer(CONFIG, BASE, Photos(PHOTOS.mean[:1], PHOTOS.std[:1], PHOTOS.views, PHOTOS.states), settings)
    losses: list[float] = []
    folder = one.run(tmp_path, on_step=lambda _, loss: losses.append(loss))
    assert folder.name == "checkpoint-60" and np.mean(losses[-15:]) < 0.9 * np.mean(losses[:15])
    sources = {}
    for part, name in personalize.FOLDERS.items():
        source = canonical_adapter(SafetensorsFile(folder / "lora" / name / ADAPTER))
        assert adapter_kind(source, CONFIG) == part
        sources[part] = source
    tiny = Tiny(subject=Subject(sources["subject"], sources["views"], text=True))
    tiny.sampler.place_views(np.stack([as_rows(v) for v in views()]))
    z = det("in.latent", (8, 3, 4, 6), 1)
    got = tiny.sampler.sample(shape(2, 1), as_rows(z), ONE, 1.0, tiny.texts(ONE, "cond"))
    assert got is not None
    with torch.no_grad():
        how = m.Adapters(one.adapters["subject"], one.adapters["views"], "all")
        want = m.velocity(weights(), CONFIG, z, 1000 * float(ONE[0]), states("cond"), views(), how)
    np.testing.assert_allclose((as_rows(z) - got) / ONE[0], as_rows(want), atol=2e-5 * float(want.abs().max()))


@pytest.mark.parametrize("settings", [SIX, Settings(steps=6, rank=4, drop_views=0.7), Settings(6, 4, one_way=True)])
def test_killed_and_resumed(tmp_path: Path, settings: Settings) -> None:
    """The same adapters bit for bit, wherever it was cut off."""

    class Killed(Exception):
        pass

    def kill(done: int, _: float) -> None:
        if done in (3, 5):
            raise Killed

    whole = run(settings).run(tmp_path / "whole", save_every=2)
    parts = tmp_path / "parts"
    for _ in range(2):
        with pytest.raises(Killed):
            run(settings).run(parts, save_every=2, resume=True, on_step=kill)
        with pytest.raises(InputError, match="resume=True"):
            run(settings).run(parts)
    resumed = run(settings).run(parts, save_every=2, resume=True)
    for name in personalize.FOLDERS.values():
        assert (whole / "lora" / name / ADAPTER).read_bytes() == (resumed / "lora" / name / ADAPTER).read_bytes()
    assert {p.name for p in parts.iterdir()} == {STATE, "checkpoint-6"}


def test_stopped_by_its_caller(tmp_path: Path) -> None:
    stopped = run().run(tmp_path, save_every=100, on_step=lambda done, _: done < 4)
    assert stopped.name == "checkpoint-4"
    assert run().run(tmp_path, resume=True).name == "checkpoint-6"


@pytest.mark.parametrize("change", [{"seed": 7}, {"steps": 7}, {"lr": 1e-4}])
def test_a_state_of_another_run(tmp_path: Path, change: dict) -> None:
    one = run()
    one.step()
    one.save(tmp_path)
    with pytest.raises(CheckpointError, match="other settings"):
        run(Settings(**(vars(SIX) | change))).run(tmp_path, resume=True)
    other = Photos(PHOTOS.mean + 1, PHOTOS.std, PHOTOS.views, PHOTOS.states)
    with pytest.raises(CheckpointError, match="other photos"):
        Personalizer(CONFIG, BASE, other, SIX).run(tmp_path, resume=True)


def test_an_adapter_of_something_else() -> None:
    with pytest.raises(CheckpointError, match="'subject'"):
        Personalizer(CONFIG, BASE, PHOTOS, SIX, as_source(adapter("tdb", KINDS["subject"])))


def test_a_full_disk_keeps_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = run()
    one.step()
    one.save(tmp_path)
    before = (tmp_path / STATE).read_bytes()
    one.step()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CheckpointError, match="No space left"):
        one.save(tmp_path)
    with pytest.raises(CheckpointError, match="No space left"):
        one.export(tmp_path)
    assert (tmp_path / STATE).read_bytes() == before and {p.name for p in tmp_path.iterdir()} == {STATE}


@pytest.mark.parametrize(
    ("change", "named"),
    [({"mean": PHOTOS.mean[:, :7]}, "photos"), ({"std": PHOTOS.std[:1]}, "photos"),
     ({"mean": PHOTOS.mean[:0]}, "photos"), ({"views": PHOTOS.views[:, :, :3]}, "views"),
     ({"states": PHOTOS.states[:, :5]}, "states"), ({"states": PHOTOS.states[:0]}, "states"),
     ({"mean": PHOTOS.mean * np.float32("nan")}, "mean holds NaN")],
)  # fmt: skip
def test_wrong_photos(change: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        Photos(**(vars(PHOTOS) | change)).checked(CONFIG)


@pytest.mark.parametrize(
    "change", [{"steps": 0}, {"rank": 0}, {"lr": 0.0}, {"drop_views": 1.5}, {"dtype": "f16"}, {"clip": 0}]
)
def test_wrong_settings(change: dict) -> None:
    with pytest.raises(InputError):
        Settings(**change).checked()
