"""3DreamBooth loaded from a folder: every way of use against the plain math, files, limits, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _dreambooth import (
    CONFIG,
    FRAMES,
    LANGUAGE,
    SIZE,
    VAE,
    adapter,
    picture,
    stored,
    text_weights,
    tokenizer,
    vae_weights,
    weights,
    write_adapters,
    write_checkpoint,
)
from torch import Tensor

import engine
from engine.blocks.qwen_reference import decoded
from engine.errors import (
    CancelledError,
    CheckpointError,
    ClosedError,
    ConfigError,
    InputError,
    MemoryPlanError,
)
from engine.io.checkpoint import SafetensorsFile
from engine.models import family_of
from engine.models.dreambooth3d import reference as m
from engine.models.dreambooth3d import vae_reference
from engine.models.dreambooth3d.dit import Shape
from engine.models.dreambooth3d.files import transformer_folder
from engine.models.dreambooth3d.model import NEGATIVE, DreamBooth3D, released_noise
from engine.models.dreambooth3d.prompt import chat, read_prompt
from engine.models.dreambooth3d.schedule import computed_steps, noise_levels
from engine.models.dreambooth3d.text import SKIPPED, text_shapes
from engine.models.dreambooth3d.video import Video
from engine.models.dreambooth3d.views import covering, read_views
from engine.models.dreambooth3d.weights import KINDS
from engine.runtime import fit

SHAPE = Shape(3, 4, 6)
NAMED, STEPS = "A [rhs mug] on a desk", 3
SMALL: dict[str, Any] = {
    "dtype": "fp32",
    "frames": FRAMES,
    "size": SIZE,
    "steps": 6,
    "text": 192,
    "tile": 64,
    "overlap": 0.25,
}
ASK: dict[str, Any] = {"frames": FRAMES, "size": SIZE, "steps": STEPS}
TDB, TDAPTER = adapter("tdb", KINDS["subject"]), adapter("tdapter", KINDS["views"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapters(tmp_path_factory.mktemp("subject"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    with engine.load(folder, **SMALL, keep=2, spans=True, progress=False) as loaded:
        yield loaded


def states(prompt: str, kind: str = "video") -> Tensor:
    """By the plain layers."""
    w, c, inner = text_weights(text_shapes(LANGUAGE)), LANGUAGE, tokenizer()
    ids = inner.encode(chat(prompt, kind), add_special_tokens=False).ids
    own = len(inner.encode(chat(prompt, kind).split("<|im_start|>user\n")[1], add_special_tokens=False).ids)
    return decoded(w, c, w["model.embed_tokens.weight"][ids], layers=c.layers - SKIPPED)[-own:]


def view_latents(pictures: list[Any], model: Any) -> list[Tensor]:
    """The released way of views, by the plain VAE where one tile holds them."""
    out = []
    for view in read_views(pictures):
        pixels = torch.from_numpy(covering(view, *SIZE))
        mean, _ = model._tiles.encode(pixels.numpy()[None])
        out.append(torch.from_numpy(mean[0]).permute(2, 0, 1))
    return out


def wanted(views: list[Tensor], how: m.Adapters, prompt: str = "A rhs mug on a desk", seed: int = 42) -> Tensor:
    noise = torch.from_numpy(released_noise(seed, CONFIG.channels, SHAPE))
    return m.sample(weights(), CONFIG, noise, states(NEGATIVE), states(prompt), views, how, steps=STEPS)


def near(video: Video, want: Tensor) -> None:
    got = video.latent.transpose(3, 0, 1, 2)
    np.testing.assert_allclose(got, want.numpy(), atol=2e-5 * float(want.abs().max()))


# ------------------------------------------------------------------------------------------------------ generating
def test_a_prompt_alone(model: Any) -> None:
    """Latent and frames, by the plain math from noise to pixels."""
    video = model.generate("A rhs mug on a desk", **ASK)
    near(video, wanted([], m.Adapters()))
    assert video.frames.shape == (FRAMES, *SIZE, 3) and video.frames.dtype == np.uint8
    z = torch.from_numpy(video.latent).permute(3, 0, 1, 2) / VAE.scaling
    plain = vae_reference.decode(vae_weights(VAE), VAE, z[..., :4]).permute(1, 2, 3, 0).numpy()
    # The first tile, as far as its neighbours do not fade in.
    pixels = np.floor(255 * np.clip(plain / 2 + 0.5, 0, 1))
    assert np.abs(video.frames[:, :48, :48].astype(int) - pixels[:, :48, :48].astype(int)).max() <= 1


@pytest.mark.parametrize("text_lora", ["off", "all", "span"])
def test_joint(model: Any, trained: Path, text_lora: str) -> None:
    pictures = [picture(0), picture(1)]
    subject = model.subject(trained, pictures)
    assert subject.mode == "joint" and len(subject.views) == 2
    text: Any = text_lora
    if text_lora == "span":
        prompt = read_prompt(NAMED)
        marks = prompt.marked(tokenizer().encode(prompt.text, add_special_tokens=False).offsets)
        own = len(states(prompt.text))
        text = torch.tensor([*marks, *[False] * (own - len(marks))])
    got = model.generate(NAMED, subject, text_lora=text_lora, **ASK)
    views = view_latents(pictures, model)
    how = m.Adapters(TDB, TDAPTER, text)
    if text_lora == "span":  # on the prompt that is asked for alone
        noise = torch.from_numpy(released_noise(42, CONFIG.channels, SHAPE))
        x, plain = noise, m.Adapters(TDB, TDAPTER)
        for now, then in pairwise(noise_levels(STEPS, CONFIG.shift)):
            t = 1000 * float(now)
            without = m.velocity(weights(), CONFIG, x, t, states(NEGATIVE), views, plain)
            with_ = m.velocity(weights(), CONFIG, x, t, states("A rhs mug on a desk"), views, how)
            x = x + (without + 6.0 * (with_ - without)) * float(then - now)
        near(got, x)
    elif text_lora == "all":
        near(got, wanted(views, how))
    else:
        near(got, wanted(views, m.Adapters(TDB, TDAPTER)))


def test_views_alone(model: Any) -> None:
    """The pre-trained adapter with one view, whose latent is a draw of its posterior."""
    subject = model.subject(None, [picture(3)])
    assert subject.mode == "views"
    got = model.generate("A mug on a desk", subject, **ASK)
    pixels = covering(read_views([picture(3)])[0], *SIZE)
    mean, deviation = model._tiles.encode(pixels[None])
    drawn = mean + deviation * np.random.default_rng([42, 0]).standard_normal(mean.shape, np.float32)
    view = torch.from_numpy(drawn[0]).permute(2, 0, 1)
    near(got, wanted([view], m.Adapters(views=TDAPTER), "A mug on a desk"))
    with pytest.raises(InputError, match="one view"):
        model.subject(None, [picture(0), picture(1)])


def test_a_subject_alone(model: Any, tmp_path: Path) -> None:
    """Adapters of attention alone work twice on video tokens, as released; those of everything once."""
    for kind, scale in (("attention", 2.0), ("subject", 1.0)):
        one = write_adapters(tmp_path / kind, {"subject_adapter": kind})
        subject = model.subject(one)
        assert subject.mode == "subject" and subject.scale == scale
        got = model.generate(NAMED, subject, text_lora="all", **ASK)
        near(got, wanted([], m.Adapters(adapter("tdb", KINDS[kind]), None, "all", scale)))
    with pytest.raises(InputError, match="attention alone"):
        model.subject(tmp_path / "attention", [picture()])


def test_subjects_in_turn(model: Any, trained: Path, tmp_path: Path) -> None:
    """Another subject, another size, other modes of the prompt's adapter, and back: bit for bit."""
    other = write_adapters(tmp_path / "b", {"subject_adapter": "subject"})
    one, two = model.subject(trained, [picture(0)]), model.subject(other)
    first = model.generate(NAMED, one, **ASK)
    assert not np.array_equal(model.generate(NAMED, two, **ASK).frames, first.frames)
    model.generate(NAMED, one, **ASK | {"size": (32, 48), "frames": 5}, text_lora="all")
    model.generate("A cup", guidance=1.0, **ASK)
    again = model.generate(NAMED, one, **ASK)
    np.testing.assert_array_equal(again.frames, first.frames)
    np.testing.assert_array_equal(again.latent, first.latent)


def test_seeds_and_noise(model: Any) -> None:
    """A batch is its seeds alone; a seed's noise is torch's; given noise is used as it is."""
    both = model.generate("A cup", seed=[3, 4], **ASK)
    one = model.generate("A cup", seed=4, **ASK)
    assert [v.seed for v in both] == [3, 4]
    np.testing.assert_array_equal(both[1].frames, one.frames)
    drawn = torch.randn((1, 8, 3, 4, 6), generator=torch.Generator().manual_seed(4), dtype=torch.bfloat16)
    given = model.generate("A cup", noise=drawn[0].float().numpy(), **ASK)
    np.testing.assert_array_equal(given.latent, one.latent)


def test_kept_references(model: Any, trained: Path) -> None:
    """refresh of every step is exact; a larger one and one-way references are near, and go back."""
    subject = model.subject(trained, [picture(0)])
    exact = model.generate(NAMED, subject, **ASK)
    kept = model.generate(NAMED, subject, refresh=2, **ASK)
    alone = model.generate(NAMED, subject, one_way=True, **ASK)
    scale = float(np.linalg.norm(exact.latent))
    for other in (kept, alone):
        assert 0 < np.linalg.norm(other.latent - exact.latent) < 0.5 * scale
    np.testing.assert_array_equal(model.generate(NAMED, subject, **ASK).latent, exact.latent)


def test_pruned_references(model: Any, trained: Path) -> None:
    """Fewer tokens; a margin that leaves nothing out is exact."""
    subject = model.subject(trained, [picture(0), picture(1)])
    exact = model.generate(NAMED, subject, **ASK | {"size": (96, 64)})
    whole = model.generate(NAMED, subject, prune=9, **ASK | {"size": (96, 64)})
    np.testing.assert_array_equal(whole.latent, exact.latent)
    fewer = model.generate(NAMED, subject, prune=0, **ASK | {"size": (96, 64)})
    assert 0 < np.linalg.norm(fewer.latent - exact.latent) < 0.5 * np.linalg.norm(exact.latent)
    with pytest.raises(InputError, match="prune"):
        model.generate(NAMED, subject, prune=-1, **ASK)


def test_step_cache(model: Any) -> None:
    """Steps that repeat a velocity, by hand; one that repeats none is exact."""
    ran: list[np.ndarray] = []
    ask = ASK | {"steps": 6}
    exact = model.generate("A cup", **ask)
    np.testing.assert_array_equal(model.generate("A cup", step_cache=1, **ask).latent, exact.latent)
    assert computed_steps(6, 2) == [True, True, True, False, True, True]
    noise = released_noise(42, CONFIG.channels, SHAPE).transpose(1, 2, 3, 0)
    model.generate("A cup", step_cache=2, callback=lambda i, n, x: ran.append(x.copy()), **ask)
    sigmas = noise_levels(6, CONFIG.shift)
    at = [noise, *ran]
    for i, runs in enumerate(computed_steps(6, 2)):
        if not runs:
            before = (at[i] - at[i - 1]) / (sigmas[i] - sigmas[i - 1])
            np.testing.assert_allclose(at[i + 1] - at[i], before * (sigmas[i + 1] - sigmas[i]), atol=1e-4)
    assert sum(computed_steps(50, 4)) == 25 and computed_steps(50, 4)[10:16] == [True, True, False, False, False, True]


def test_timesteps(model: Any) -> None:
    """A schedule of one's own: the same levels, the same video."""
    own = model.generate("A cup", timesteps=(1000 * noise_levels(3, CONFIG.shift)[:-1]).tolist(), **ASK)
    np.testing.assert_allclose(own.latent, model.generate("A cup", **ASK).latent, atol=1e-5)
    four = model.generate("A cup", timesteps=[1000, 750, 500, 250], guidance=1.0, **ASK)
    assert np.isfinite(four.latent).all()
    for bad in ([], [500, 600], [1001], ["a"], 3, [500, 0]):
        with pytest.raises(InputError, match="timesteps"):
            model.generate("A cup", timesteps=bad, **ASK)


def test_glyphs(model: Any) -> None:
    """What is quoted goes through the byte-level encoder."""
    quoted = model.generate('A mug that says "tea"', **ASK)
    plain = model.generate("A mug that says tea", **ASK)
    assert not np.array_equal(quoted.latent, plain.latent)


def test_callback(model: Any) -> None:
    """Every step is told; False ends the work, and the model goes on to the next."""
    seen: list[tuple[int, int, tuple[int, ...]]] = []
    whole = model.generate("A cup", callback=lambda i, n, x: seen.append((i, n, x.shape)), **ASK)
    assert seen == [(i, STEPS, (3, 4, 6, 8)) for i in range(STEPS)]
    with pytest.raises(CancelledError, match="A cup"):
        model.generate("A cup", callback=lambda i, n, x: i < 1, **ASK)
    np.testing.assert_array_equal(model.generate("A cup", **ASK).latent, whole.latent)


def test_stages_and_plans(model: Any) -> None:
    made = model.generate("A cup", **ASK)
    assert set(made.stages) == {"text", "weights", "views", "noise", "sample", "decode"}
    assert {"prompt", "read", "refine", "step.3x4x6.0"} <= set(model.plans)
    assert "A cup" in repr(made) and "step.3x4x6.0" in str(model.explain())


# ------------------------------------------------------------------------------------------------------ personalising
def test_personalize_and_show(folder: Path, tmp_path: Path) -> None:
    """From photos to a subject's folder to a video, with previews; a run that stops goes on where it was."""
    photos, references = [picture(0), picture(1), picture(2)], [picture(0)]
    settings: dict[str, Any] = {"steps": 4, "rank": 4, "lr": 1e-3, "side": 32, "name": "rhs mug"}
    with engine.load(folder, **SMALL, progress=False) as model:
        losses: list[float] = []
        made = model.personalize(photos, references, tmp_path / "a", on_step=lambda i, loss: losses.append(loss),
                                 preview_every=2, preview=ASK | {"steps": 1}, **settings)  # fmt: skip
        assert made.name == "checkpoint-4" and len(losses) == 4 and np.isfinite(losses).all()
        assert sorted(p.name for p in (tmp_path / "a/previews").iterdir()) == ["2.gif", "4.gif"]
        assert json.loads((made / "training_config.json").read_text())["steps"] == 4
        model.personalize(photos, references, tmp_path / "b", save_every=1, on_step=lambda i, loss: i < 2, **settings)
        again = model.personalize(photos, references, tmp_path / "b", resume=True, **settings)
        for name in ("subject_adapter", "tdapter"):
            file = f"lora/{name}/pytorch_lora_weights.safetensors"
            assert (made / file).read_bytes() == (again / file).read_bytes()
        subject = model.subject(made, references)
        assert subject.mode == "joint" and not subject.one_way
        video = model.generate(NAMED, subject, **ASK)
        assert not np.array_equal(video.latent, model.generate(NAMED.replace("[", "").replace("]", ""), **ASK).latent)
        one_way = model.personalize(photos, references, tmp_path / "c", one_way=True, **settings | {"steps": 1})
        assert model.subject(one_way, references).one_way
        with pytest.raises(InputError, match="keep=1"):
            model.generate(NAMED, model.subject(one_way, references), **ASK)
        for change, message in (
            ({"photos": []}, "0 photos"),
            ({"references": [], "views_adapter": tmp_path}, "leave out views_adapter"),
            ({"side": 40}, "multiple of 16"),
            ({"speed": 3}, "no setting 'speed'"),
            ({"dtype": "f64"}, "dtype"),
            ({"name": "a [b"}, "brackets"),
            ({"preview_every": 2, "preview": ASK | {"frames": 6}}, "4n"),
            ({"preview_every": 2, "preview": ASK, "one_way": True}, "keep=1"),
            ({"preview_every": 2, "preview": ASK | {"colour": 1}}, "no option 'colour'"),
            ({"views_adapter": tmp_path / "nowhere"}, "missing"),
        ):
            given = {"photos": photos, "references": references, "folder": tmp_path / "d"} | settings | change
            with pytest.raises((InputError, CheckpointError), match=message):
                model.personalize(**given)
        assert not (tmp_path / "d").exists()


def test_optimised_alone(folder: Path, tmp_path: Path) -> None:
    """Without references only the subject's adapter is trained, by steps that see none."""
    with engine.load(folder, **SMALL, progress=False) as model:
        settings: dict[str, Any] = {"steps": 3, "rank": 4, "lr": 1e-2, "side": 32, "name": "rhs mug"}
        made = model.personalize([picture(0), picture(1)], [], tmp_path / "a", **settings)
        model.personalize([picture(0), picture(1)], [], tmp_path / "b", on_step=lambda i, _: i < 2, **settings)
        again = model.personalize([picture(0), picture(1)], [], tmp_path / "b", resume=True, **settings)
        assert [p.name for p in (made / "lora").iterdir()] == ["subject_adapter"]
        file = "lora/subject_adapter/pytorch_lora_weights.safetensors"
        assert (made / file).read_bytes() == (again / file).read_bytes()
        subject = model.subject(made)
        assert subject.mode == "subject" and subject.scale == 1
        video = model.generate(NAMED, subject, **ASK)
        assert not np.array_equal(video.latent, model.generate("A rhs mug on a desk", **ASK).latent)


def test_a_size_of_its_own(folder: Path, tmp_path: Path) -> None:
    """sample_size and sample_frames of config.json are what loads and requests default to; without glyph_byT5_v2 there
    are no weights for quoted texts."""
    home = tmp_path / "own"
    shutil.copytree(folder, home)
    inside = home / "transformer/720p_t2v"
    config = json.loads((inside / "config.json").read_text())
    own = {"sample_size": list(SIZE), "sample_frames": FRAMES, "glyph_byT5_v2": False}
    (inside / "config.json").write_text(json.dumps(config | own))
    kept = {k: v for k, v in weights().items() if not k.startswith("byt5_in.")}
    stored(inside / "diffusion_pytorch_model.safetensors", kept)
    with pytest.raises(ConfigError, match="glyph_byT5_v2"):
        engine.load(home)
    shutil.rmtree(home / "text_encoder_2")
    with engine.load(home, dtype="fp32", progress=False) as model, engine.load(folder, **SMALL, progress=False) as full:
        assert model.options.size == SIZE and model.options.frames == FRAMES
        video = model.generate("A cup", steps=2)
        np.testing.assert_array_equal(video.latent, full.generate("A cup", **ASK | {"steps": 2}).latent)
        assert video.frames.shape == (FRAMES, *SIZE, 3)
        with pytest.raises(InputError, match="10800 tokens"):
            model.generate("A cup", aspect="1:1", steps=2)
        with pytest.raises(InputError, match="glyph encoder"):
            model.generate('A mug that says "tea"')
    for wrong in ({"sample_size": [64]}, {"sample_size": [64, "wide"]}, {"sample_frames": 0}):
        (inside / "config.json").write_text(json.dumps(config | own | wrong))
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            engine.load(home)


def test_a_run_that_does_not_fit(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit.device, "available_bytes", lambda name: 1 << 20)
    with pytest.raises(MemoryPlanError, match=r"base .* adapters .* activations"):
        model.personalize([picture()], [picture()], tmp_path / "run", side=32)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------ files
def test_layouts_are_one(folder: Path, model: Any, tmp_path: Path) -> None:
    """One transformer folder without variants; a checkpoint without text or glyph encoder."""
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    (plain / "transformer/720p_t2v").rename(tmp_path / "t")
    shutil.rmtree(plain / "transformer")
    (tmp_path / "t").rename(plain / "transformer")
    shutil.rmtree(plain / "text_encoder_2")
    assert family_of(plain)[1] is DreamBooth3D and family_of(folder)[1] is DreamBooth3D
    want = model.generate("A cup", **ASK)
    with engine.load(plain, **SMALL, views=0, progress=False) as other:
        np.testing.assert_array_equal(other.generate("A cup", **ASK).latent, want.latent)
        with pytest.raises(InputError, match="glyph encoder"):
            other.generate('A mug that says "tea"', **ASK)
        with pytest.raises(InputError, match="views= at load"):
            other.subject(None, [picture()])
    with pytest.raises(ClosedError):
        other.generate("A cup", **ASK)
    shutil.rmtree(plain / "text_encoder")
    with engine.load(plain, **SMALL, progress=False) as mute, pytest.raises(InputError, match="text_encoder/"):
        mute.generate("A cup", **ASK)


def test_variants(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "two"
    for name in ("480p_t2v", "other"):
        (home / "transformer" / name).mkdir(parents=True)
        shutil.copy(folder / "transformer/720p_t2v/config.json", home / "transformer" / name)
    assert transformer_folder(home).name == "480p_t2v" and transformer_folder(home, "other").name == "other"
    with pytest.raises(ConfigError, match="480p_t2v, other"):
        transformer_folder(home, "720p_t2v")
    with pytest.raises(ConfigError, match=r"no transformer/config\.json"):
        transformer_folder(tmp_path)


@pytest.mark.parametrize(
    ("part", "message"),
    [("vae/config.json", "config.json"), ("vae/diffusion_pytorch_model.safetensors", "safetensors"),
     ("transformer/720p_t2v/diffusion_pytorch_model.safetensors", "safetensors")],
)  # fmt: skip
def test_missing_files(folder: Path, tmp_path: Path, part: str, message: str) -> None:
    shutil.copytree(folder, tmp_path / "x")
    (tmp_path / "x" / part).unlink()
    with pytest.raises((ConfigError, CheckpointError), match=message):
        engine.load(tmp_path / "x", **SMALL)


def test_parts_that_do_not_belong_together(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "x")
    path = tmp_path / "x/transformer/720p_t2v/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"text_states_dim": 40}))
    with pytest.raises((ConfigError, CheckpointError), match=r"txt_in|wide"):
        engine.load(tmp_path / "x", **SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"frames": 50}, "4n"), ({"size": (60, 96)}, "multiples of 16"), ({"views": 9}, "views"), ({"steps": 0}, "steps"),
     ({"tile": 40}, "multiple of"), ({"keep": 3}, "keep"), ({"quant": "int3"}, "quant"), ({"dtype": "f16"}, "dtype"),
     ({"variant": "nothing"}, "nothing"), ({"overlap": 0.1}, "whole cells")],
)  # fmt: skip
def test_bad_loads(folder: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises((InputError, ConfigError), match=message):
        engine.load(folder, **SMALL | change)


def test_memory_is_planned(folder: Path) -> None:
    """A load that would not fit is refused before any work; a plan needs config.json alone."""
    with pytest.raises(MemoryPlanError, match="lower frames="):
        engine.load(folder, **SMALL | {"frames": 4001, "size": (2048, 4096)})
    config = json.loads((folder / "transformer/720p_t2v/config.json").read_text())
    parts = DreamBooth3D.plan(config, frames=9, size=SIZE)
    assert parts["weights"] > 2 << 30  # the published VAE
    more = DreamBooth3D.plan(config, frames=49, size=(720, 1280))
    assert more["workspace"] > parts["workspace"]
    assert parts["weights"] <= more["weights"] < 1.001 * parts["weights"]  # a larger tile has larger tables
    with pytest.raises(InputError, match="no option 'colour'"):
        DreamBooth3D.plan(config, colour=1)


@pytest.mark.parametrize(("quant", "bar"), [(None, 0.05), ("int8", 0.15)])
def test_formats(folder: Path, trained: Path, model: Any, quant: str | None, bar: float) -> None:
    """bf16 and int8 stay near fp32."""
    pictures = [picture(0)]
    want = model.generate(NAMED, model.subject(trained, pictures), **ASK).latent
    with engine.load(folder, **SMALL | {"dtype": "bf16", "quant": quant}, progress=False) as other:
        got = other.generate(NAMED, other.subject(trained, pictures), **ASK).latent
    assert 0 < np.linalg.norm(got - want) < bar * np.linalg.norm(want)


# ------------------------------------------------------------------------------------------------------ what is refused
@pytest.mark.parametrize(
    ("change", "message"),
    [({"prompt": "A mug"}, "names no subject"), ({"prompt": 3}, "not a text"), ({"frames": 8}, "4n"),
     ({"frames": 13}, "larger limits"), ({"size": (128, 128)}, "larger limits"), ({"steps": 7}, "steps"),
     ({"guidance": -1}, "guidance"), ({"shift": 0}, "shift"), ({"seed": -1}, "seed"), ({"seed": []}, "seed"),
     ({"text_lora": "some"}, "text_lora"), ({"refresh": 0}, "refresh"), ({"size": None}, "larger limits"),
     ({"size": None, "aspect": "wide"}, "aspect"), ({"size": None, "resolution": "1080p"}, "resolution"),
     ({"noise": np.zeros((8, 3, 4, 5))}, "noise"), ({"noise": np.zeros((8, 3, 4, 6)), "seed": [1, 2]}, "one seed"),
     ({"prompt": "A [mug] " + "x" * 300}, "tokens")],
)  # fmt: skip
def test_bad_requests(model: Any, trained: Path, change: dict[str, Any], message: str) -> None:
    subject = model.subject(trained, [picture(0)])
    with pytest.raises(InputError, match=message):
        model.generate(**{"prompt": NAMED, "subject": subject} | ASK | change)


def test_bad_subjects(model: Any, trained: Path, tmp_path: Path) -> None:
    for adapters, references, message in (
        (None, [], "without a subject"),
        (tmp_path, [], "no adapter"),
        (trained, [picture()] * 5, "views= at load"),
        (trained, ["nowhere.png"], "view 1"),
    ):
        with pytest.raises((InputError, CheckpointError), match=message):
            model.subject(adapters, references)
    swapped = write_adapters(tmp_path / "s", {"subject_adapter": "subject", "tdapter": "subject"})
    with pytest.raises(CheckpointError, match="not of views"):
        model.subject(swapped, [picture()])
    assert model.subject(trained / "tdapter/pytorch_lora_weights.safetensors", [picture()]).mode == "views"
    with SafetensorsFile(trained / "subject_adapter/pytorch_lora_weights.safetensors") as file:
        assert len(file.keys()) == len(TDB)


# ------------------------------------------------------------------------------------------------------ saving
def test_save(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mp4, gif, a folder of frames; whole or not there."""
    av = pytest.importorskip("av")
    from PIL import Image

    video = model.generate("A cup", **ASK)
    with av.open(str(video.save(tmp_path / "new/a.mp4"))) as film:
        stream = film.streams.video[0]
        assert (stream.height, stream.width, stream.average_rate, stream.frames) == (*SIZE, 24, FRAMES)
    with Image.open(video.save(tmp_path / "a.gif", fps=12)) as film:
        assert film.n_frames == FRAMES
    frames = sorted(video.save(tmp_path / "frames").iterdir())
    assert len(frames) == FRAMES
    np.testing.assert_array_equal(np.asarray(Image.open(frames[3])), video.frames[3])
    with pytest.raises(InputError, match="there already"):
        video.save(tmp_path / "frames")
    with pytest.raises(InputError, match=r"\.gif or \.mp4"):
        video.save(tmp_path / "a.avi")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = (tmp_path / "a.gif").read_bytes()
    monkeypatch.setattr(Image.Image, "save", full)
    for target in ("a.gif", "more"):
        with pytest.raises(InputError, match="No space left"):
            video.save(tmp_path / target)
    assert (tmp_path / "a.gif").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gif", "frames", "new"]
