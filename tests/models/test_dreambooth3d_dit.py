"""3DreamBooth's transformer as plans: against the released module's outputs, and with every saving off."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from _dreambooth import (
    CONFIG,
    TIME,
    Tiny,
    adapter,
    as_rows,
    as_source,
    det,
    golden,
    joint,
    latent,
    states,
    views,
    weights,
)

from engine.blocks.weights import Recipe
from engine.errors import InputError
from engine.models.dreambooth3d import reference as m
from engine.models.dreambooth3d.config import DitConfig
from engine.models.dreambooth3d.dit import Denoiser, Savings, Shape
from engine.models.dreambooth3d.dit_weights import DitLoader, Subject
from engine.models.dreambooth3d.schedule import noise_levels
from engine.models.dreambooth3d.weights import KINDS
from engine.runtime.arena import Arena

NEAR = {"atol": 2e-5, "rtol": 0}
ONE = np.array([TIME / 1000, 0.0])  # one step whose velocity can be read off


def shape(count: int = 2, branches: int = 2) -> Shape:
    return Shape(3, 4, 6, count, branches)


def place(tiny: Tiny, count: int) -> None:
    if count:
        tiny.sampler.place_views(np.stack([as_rows(v) for v in views(count)]))


def velocities(tiny: Tiny, count: int) -> torch.Tensor:
    """[2, z, T, h, w] of the negative and the positive prompt, each as a step without guidance."""
    place(tiny, count)
    noise, out = as_rows(latent()), []
    for row in ("uncond", "cond"):
        clean = tiny.sampler.sample(shape(count, 1), noise, ONE, 1.0, tiny.texts(ONE, row))
        assert clean is not None
        out.append(((noise - clean) / ONE[0]).T.reshape(latent().shape))
    return torch.from_numpy(np.stack(out)).float()


@pytest.mark.parametrize(
    ("name", "count", "subject"),
    [("A_base_noref", 0, Subject()), ("B_joint_2ref_textlora_all", 2, joint(text=True)),
     ("C_joint_2ref_textlora_off", 2, joint()), ("D_joint_0ref_textlora_all", 0, joint(text=True))],
)  # fmt: skip
def test_velocity(name: str, count: int, subject: Subject) -> None:
    torch.testing.assert_close(velocities(Tiny(subject=subject), count), golden(name), **NEAR)


def sampled(tiny: Tiny, count: int = 2, steps: int = 4, guidance: float = 6.0) -> np.ndarray:
    place(tiny, count)
    sigmas = noise_levels(steps, 5.0)
    out = tiny.sampler.sample(shape(count), as_rows(latent()), sigmas, guidance, tiny.texts(sigmas, "uncond", "cond"))
    assert out is not None
    return out


def test_sampler() -> None:
    got = sampled(Tiny(subject=joint())).T.reshape(1, *latent().shape)
    torch.testing.assert_close(torch.from_numpy(np.ascontiguousarray(got)), golden("F_sampler4_final_latent"), **NEAR)


@pytest.mark.parametrize("off", ["shared", "dead"])
@pytest.mark.parametrize("count", [0, 2])
def test_savings_change_nothing(off: str, count: int) -> None:
    kept, plain = (
        sampled(Tiny(subject=joint(text=True), savings=s), count) for s in (Savings(), Savings(**{off: False}))
    )
    np.testing.assert_allclose(kept, plain, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("marks", [(2, 3, 7), (0,), (8,), tuple(range(9))])
@pytest.mark.parametrize("count", [0, 2])
def test_a_name_with_weights_of_its_own(marks: tuple[int, ...], count: int) -> None:
    """The subject's adapter on some tokens of the prompt that is asked for; on all of them: as on the whole text."""
    tiny = Tiny(subject=joint(), named=True)
    place(tiny, count)
    marked = [i in marks for i in range(9)]
    noise, s = as_rows(latent()), Shape(3, 4, 6, count, 1, len(marks))
    got = tiny.sampler.sample(s, noise, ONE, 1.0, tiny.texts(ONE, "cond"), marked=marked)
    assert got is not None
    how = m.Adapters(adapter("tdb", KINDS["subject"]), adapter("tdapter", KINDS["views"]), torch.tensor(marked))
    want = m.velocity(weights(), CONFIG, latent(), TIME, states("cond"), views(count), how)
    np.testing.assert_allclose((noise - got) / ONE[0], as_rows(want), **NEAR)
    sigmas = noise_levels(3, 5.0)
    texts = tiny.texts(sigmas, "uncond", "cond")
    both = tiny.sampler.sample(Shape(3, 4, 6, count, 2, len(marks)), noise, sigmas, 4.0, texts, marked=marked)
    with pytest.raises(InputError, match="are marked"):
        tiny.sampler.sample(Shape(3, 4, 6, count, 2, 4), noise, sigmas, 4.0, texts, marked=marked)
    with pytest.raises(InputError, match="spans=True"):
        Tiny(subject=joint()).sampler.sample(s, noise, ONE, 1.0, tiny.texts(ONE, "cond"), marked=marked)
    x = latent()
    for now, then in pairwise(sigmas):
        without, with_ = (
            m.velocity(weights(), CONFIG, x, 1000 * float(now), states(row), views(count), replace(how, text=text))
            for row, text in (("uncond", "off"), ("cond", torch.tensor(marked)))
        )
        x = x + (without + 4.0 * (with_ - without)) * float(then - now)
    np.testing.assert_allclose(both, as_rows(x), **NEAR)


def test_another_subject_and_back() -> None:
    """The base is never lost: what was there before a switch comes back bit for bit."""
    tiny = Tiny(subject=joint())
    before = sampled(tiny)
    for _ in tiny.loader.adapt(Subject()):
        pass
    tiny.sampler.forget_subject()
    between = sampled(tiny)
    np.testing.assert_array_equal(between, sampled(Tiny()))
    assert np.abs(before - between).max() > 1e-3
    for _ in tiny.loader.adapt(joint()):
        pass
    tiny.sampler.forget_subject()
    np.testing.assert_array_equal(before, sampled(tiny))


def test_requests_of_other_shapes_in_turn() -> None:
    """Plans, positions and references of one shape do not disturb another's."""
    tiny = Tiny(subject=joint())
    first, without = sampled(tiny), sampled(tiny, 0)
    np.testing.assert_array_equal(sampled(tiny), first)
    np.testing.assert_array_equal(sampled(tiny, 0), without)
    np.testing.assert_array_equal(without, sampled(Tiny(subject=joint()), 0))
    swapped = Tiny(subject=joint())
    swapped.sampler.place_views(np.stack([as_rows(v) for v in views(2)[::-1]]))
    sigmas = noise_levels(4, 5.0)
    other = swapped.sampler.sample(shape(), as_rows(latent()), sigmas, 6.0, swapped.texts(sigmas, "uncond", "cond"))
    assert other is not None and np.abs(other - first).max() > 1e-3


@pytest.mark.parametrize("seed", range(10))
def test_random_shapes(seed: int) -> None:
    """Other widths, heads, grids, references and texts, with glyphs, against the plain reference."""
    rng = np.random.default_rng(seed)
    heads, axes = int(rng.integers(1, 5)), [(4, 6, 6), (8, 12, 12), (2, 8, 10), (4, 2, 2)][seed % 4]
    width = heads * sum(axes)
    c = DitConfig(width, heads, int(rng.integers(1, 4)), int(rng.integers(1, 3)), int(rng.integers(1, 5)) * 24, 4, 9,
                  20, 12, 8, axes)  # fmt: skip
    frames, rows, columns, count = (int(n) for n in (rng.integers(1, 4), *rng.integers(2, 6, 2), rng.integers(0, 4)))
    s = Shape(frames, rows, columns, count, 1)
    clean, text = det("z", (4, frames, rows, columns), 1), det("t", (int(rng.integers(1, 9)), 20), 1)
    glyphs = det("g", (3, 12), 1) if seed % 2 else None
    given = [det(f"v{i}", (4, rows, columns), 1) for i in range(count)]
    subject, seen = adapter("tdb", KINDS["subject"], c), adapter("tdapter", KINDS["views"], c)
    tiny = Tiny(c=c, subject=Subject(as_source(subject), as_source(seen), text=True), image=max(s.image, 1),
                references=count * s.cells)  # fmt: skip
    if count:
        tiny.sampler.place_views(np.stack([as_rows(v) for v in given]))
    tokens = tiny.sampler.tokens(ONE, text.numpy(), None if glyphs is None else glyphs.numpy())
    got = tiny.sampler.sample(s, as_rows(clean), ONE, 1.0, [tokens])
    assert got is not None
    want = m.velocity(weights(c), c, clean, TIME, text, given, m.Adapters(subject, seen, "all"), glyphs)
    velocity = (as_rows(clean) - got) / ONE[0]
    np.testing.assert_allclose(velocity, as_rows(want), atol=2e-5 * float(want.abs().max()), rtol=0)


@pytest.mark.parametrize("seen", [(0, 1, 7, 23, 24, 30), tuple(range(48)), (40,), ()])
def test_some_cells_of_references(seen: tuple[int, ...]) -> None:
    """Each at its own place: as attention over all tokens whose other references are left out."""
    tiny = Tiny(subject=joint(text=True), kept=1)
    place(tiny, 2)
    whole = tiny.sampler.sample(shape(2, 1), as_rows(latent()), ONE, 1.0, tiny.texts(ONE, "cond"))
    got = tiny.sampler.sample(replace(shape(2, 1), seen=seen), as_rows(latent()), ONE, 1.0, tiny.texts(ONE, "cond"))
    assert got is not None and whole is not None
    how = m.Adapters(adapter("tdb", KINDS["subject"]), adapter("tdapter", KINDS["views"]), "all")
    streams = m.begin(weights(), CONFIG, latent(), TIME, states("cond"), views(), how)
    one = streams[1]
    chosen = list(seen)
    assert one.angles is not None
    streams[1] = replace(one, x=one.x[chosen], angles=one.angles[chosen])
    if not seen:
        del streams[1]
    for i in range(CONFIG.layers):
        streams = m.block(weights(), CONFIG, f"double_blocks.{i}", streams)
    np.testing.assert_allclose((as_rows(latent()) - got) / ONE[0], m.ended(weights(), CONFIG, streams[0]).T, **NEAR)
    if len(seen) == 48:
        np.testing.assert_array_equal(got, whole)
    again = tiny.sampler.sample(shape(2, 1), as_rows(latent()), ONE, 1.0, tiny.texts(ONE, "cond"))
    np.testing.assert_array_equal(again, whole)
    with pytest.raises(InputError, match="beyond the 48"):
        tiny.sampler.sample(replace(shape(2, 1), seen=(48,)), as_rows(latent()), ONE, 1.0, tiny.texts(ONE, "cond"))


@pytest.mark.parametrize("kept", [1, 2])
def test_one_way_references(kept: int) -> None:
    """They run once per subject, and every step finds what they left, in whichever set it looks."""
    tiny = Tiny(subject=joint(text=True), kept=kept)
    place(tiny, 2)
    how = m.Adapters(adapter("tdb", KINDS["subject"]), adapter("tdapter", KINDS["views"]), "all")
    noise = as_rows(latent())
    for row in ("uncond", "cond", "uncond"):
        got = tiny.sampler.sample(shape(2, 1), noise, ONE, 1.0, tiny.texts(ONE, row), one_way=True)
        assert got is not None
        want = m.velocity(weights(), CONFIG, latent(), TIME, states(row), views(), how, one_way=True)
        np.testing.assert_allclose((noise - got) / ONE[0], as_rows(want), **NEAR)
    plain = m.velocity(weights(), CONFIG, latent(), TIME, states("uncond"), views(), how)
    assert (plain - want).abs().max() > 1e-3
    assert not any(name.startswith("step.") for name in tiny.plans)


def test_kept_references() -> None:
    """Behind a step with the same latent and time the kept keys and values are the exact ones; later they are not."""
    tiny = Tiny(subject=joint(), kept=2)
    place(tiny, 2)
    again = np.array([0.8, 0.8, 0.7])  # the first step moves nothing
    texts = tiny.texts(again, "uncond", "cond")
    one, other = (tiny.sampler.sample(shape(), as_rows(latent()), again, 6.0, texts, refresh=n) for n in (1, 2))
    assert one is not None and other is not None and np.abs(one - as_rows(latent())).max() > 1e-2
    np.testing.assert_allclose(one, other, atol=1e-6, rtol=1e-6)
    sigmas = noise_levels(4, 5.0)
    texts = tiny.texts(sigmas, "uncond", "cond")
    exact, two, four = (
        tiny.sampler.sample(shape(), as_rows(latent()), sigmas, 6.0, texts, refresh=n) for n in (1, 2, 4)
    )
    assert exact is not None and two is not None and four is not None
    np.testing.assert_array_equal(exact, sampled(Tiny(subject=joint())))
    near, far = (np.linalg.norm(z - exact) / np.linalg.norm(exact) for z in (two, four))
    assert 0 < near < 1e-2 and 0 < far < 1e-2
    with pytest.raises(InputError, match="kept= at load"):
        place(small := Tiny(subject=joint(), kept=1), 2)
        small.sampler.sample(shape(), as_rows(latent()), sigmas, 6.0, texts, refresh=2)


def test_attention_alone_twice_as_strong() -> None:
    """A subject trained without references: its image side counts double, as released."""
    part = adapter("tdb", KINDS["attention"])
    tiny = Tiny(subject=Subject(as_source(part), None, text=True, scale=2.0))
    want = [m.velocity(weights(), CONFIG, latent(), TIME, states(row), (), m.Adapters(part, text="all", scale=2.0))
            for row in ("uncond", "cond")]  # fmt: skip
    torch.testing.assert_close(velocities(tiny, 0), torch.stack(want), **NEAR)


@pytest.mark.parametrize(("dtype", "quant", "bar"), [("bf16", None, 2e-2), ("bf16", "int8", 4e-2)])
def test_rounded_weights(dtype: str, quant: str | None, bar: float) -> None:
    got, want = velocities(Tiny(subject=joint(), dtype=dtype, quant=quant), 2), golden("C_joint_2ref_textlora_off")
    assert float((got - want).norm() / want.norm()) <= bar


def test_a_step_is_static() -> None:
    tiny = Tiny(subject=joint())
    sampled(tiny)
    for name, plan in tiny.plans.items():
        budget = tiny.denoiser.node_budget(shape()) if name.startswith("step.") else None
        audit = plan.audit(tiny.arena, budget)
        assert audit.ok, (name, audit.problems)


def test_cancelled_between_steps() -> None:
    tiny, seen = Tiny(subject=joint()), []
    place(tiny, 2)
    sigmas = noise_levels(4, 5.0)

    def each(i: int, z: np.ndarray) -> bool:
        seen.append((i, z.shape))
        return i < 1

    texts = tiny.texts(sigmas, "uncond", "cond")
    assert tiny.sampler.sample(shape(), as_rows(latent()), sigmas, 6.0, texts, each=each) is None
    assert seen == [(0, (72, 8)), (1, (72, 8))]
    again = tiny.sampler.sample(shape(), as_rows(latent()), sigmas, 6.0, texts)
    assert again is not None
    np.testing.assert_array_equal(again, sampled(Tiny(subject=joint())))


def test_texts_are_kept() -> None:
    tiny = Tiny()
    sigmas = noise_levels(3, 9.0)
    one = tiny.sampler.tokens(sigmas, states("cond").numpy())
    assert tiny.sampler.tokens(sigmas, states("cond").numpy()) is one
    assert tiny.sampler.tokens(noise_levels(4, 9.0), states("cond").numpy()) is not one


@pytest.mark.parametrize(
    "wrong", [Shape(0, 4, 6), Shape(3, 4, 6, -1), Shape(3, 4, 6, 2, 3), Shape(9, 4, 6), Shape(1, 4, 6, 5)]
)
def test_wrong_shapes(wrong: Shape) -> None:
    with pytest.raises(InputError):
        Tiny().denoiser.fits(wrong)


@pytest.mark.parametrize(
    "change", [{"refresh": 0}, {"noise": np.zeros((1, 8), np.float32)}, {"sigmas": noise_levels(3, 5.0)}]
)
def test_wrong_requests(change: dict) -> None:
    tiny, sigmas = Tiny(), noise_levels(2, 5.0)
    given = {"noise": as_rows(latent()), "sigmas": sigmas, "guidance": 6.0} | change
    with pytest.raises(InputError, match="are needed"):
        tiny.sampler.sample(shape(0), texts=tiny.texts(sigmas, "uncond", "cond"), **given)


def test_wrong_texts() -> None:
    for count in (0, 17):
        with pytest.raises(InputError, match="text= at load"):
            Tiny().sampler.tokens(ONE, np.zeros((count, 48), np.float32))
    with pytest.raises(InputError, match="steps= at load"):
        sampled(Tiny(), steps=7)


def test_full_size_fits() -> None:
    """Weights of 720p, their second set for references, and a request of 49 frames with 4 references."""
    c, arena = DitConfig(), Arena(dry=True)
    from engine.blocks.weights import Shapes
    from engine.models.dreambooth3d.weights import dit_shapes

    w = DitLoader(c, Shapes(dit_shapes(c)), arena, Recipe("bf16", None)).load()
    Denoiser(arena, c, w, image=17 * 3600, references=4 * 3600, text=128, steps=50, kv_format="bf16")
    parts = arena.summary()
    assert 16.4e9 < parts["weights"] < 17e9
