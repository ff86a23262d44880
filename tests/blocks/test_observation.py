"""Preprocessing profiles: images, state bins, prompts, normalisation, actions both ways, hostile files."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from engine.blocks.observation import (
    PROFILES,
    ImageRule,
    Normalizer,
    Preprocessor,
    bilinear,
    digitize,
    lerobot_pi05,
    lerobot_xvla,
    padded_tokens,
    profile,
    prompt_tokens,
    relative_mask,
    text_encoder,
    xvla_action_space,
)
from engine.blocks.observation.actions import ActionMap, ActionSpace
from engine.blocks.observation.prompt import clean, state_prompt
from engine.blocks.observation.rotations import (
    libero_action,
    libero_proprio,
    matrix_to_axis_angle,
    matrix_to_rot6d,
    rot6d_to_matrix,
)
from engine.errors import ConfigError, EngineError, InputError, TokenizerError, TruncationWarning
from engine.io.sidecar import Sidecar, parse_sidecar, read_sidecar
from engine.io.statistics import Statistics, read_lerobot_processor, read_norm_stats

RNG = np.random.default_rng(0)


class Letters:
    """One id a character, from 100 on."""

    def encode(self, text):
        return [100 + ord(c) for c in text]


def stats(n, seed=0):
    r = np.random.default_rng(seed)
    low = r.normal(size=n)
    return {
        "mean": r.normal(size=n), "std": r.uniform(0.1, 2, n), "q01": low, "q99": low + r.uniform(0.1, 3, n),
        "min": low - 1, "max": low + 4,
    }  # fmt: skip


def agilex(**more):
    images = {c: RNG.integers(0, 256, (3, 48, 64), np.uint8) for c in ("cam_high", "cam_left_wrist", "cam_right_wrist")}
    return {"images": images, "state": np.linspace(-1, 1, 14), "prompt": "pick_up the cup\n", **more}


AGILEX = Preprocessor(profile("faster-agilex"), Statistics(stats(14), stats(14, 1), "here"), Letters())


# ---- images


@pytest.mark.parametrize("shape", [(48, 64), (300, 400), (224, 224), (500, 200), (1, 7), (225, 224), (37, 640)])
@pytest.mark.parametrize("size", [(224, 224), (56, 84)])
def test_bilinear_is_that_of_torch(shape, size):
    torch = pytest.importorskip("torch")
    image = RNG.random((*shape, 3), np.float32)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
    peer = torch.nn.functional.interpolate(tensor, size=size, mode="bilinear", align_corners=False)
    assert np.abs(bilinear(image, size) - peer[0].permute(1, 2, 0).numpy()).max() < 2e-6


@pytest.mark.parametrize("shape", [(48, 64), (480, 640), (400, 100), (224, 224)])
def test_centred_padding(shape):
    """Both rules that keep the aspect put the same frame at the same place; only the resampling differs."""
    pytest.importorskip("PIL")
    white = np.full((*shape, 3), 255, np.uint8)
    pil, torch_like = (ImageRule(rule).apply(white) for rule in ("pad-pil", "pad-torch"))
    assert (pil == torch_like).all() and pil.shape == (224, 224, 3) and pil.dtype == np.float32
    rows = np.flatnonzero((pil == 1).any((1, 2)))
    inner = int(shape[0] / max(shape[0] / 224, shape[1] / 224))
    assert rows[0] == (224 - inner) // 2 and len(rows) == inner
    assert set(np.unique(pil)) <= {-1, 1}, "black is -1"


def test_antialiasing_is_the_difference():
    pytest.importorskip("PIL")
    fine = np.zeros((448, 448, 3), np.uint8)
    fine[::2] = 255
    assert np.abs(ImageRule("pad-pil").apply(fine)[20:200]).max() < 0.01
    fine = np.zeros((896, 896, 3), np.uint8)
    fine[1::4] = fine[2::4] = 255
    assert ImageRule("pad-torch").apply(fine).min() == 1, "torch looks at the middle two of four rows only"


def test_pillow_is_identity_at_its_size():
    image = RNG.integers(0, 256, (224, 224, 3), np.uint8)
    rule = ImageRule("pad-pil")
    assert (rule.shape(image) == image).all()
    scale, offset = rule.affine()
    assert np.abs(rule.apply(image) - (image * scale + offset)).max() < 1e-6


def test_stretch_ignores_the_aspect():
    pillow = pytest.importorskip("PIL.Image")
    image = RNG.integers(0, 256, (100, 300, 3), np.uint8)
    rule = ImageRule("stretch", range="imagenet")
    peer = np.asarray(pillow.fromarray(image).resize((224, 224), pillow.BICUBIC))
    expected = (peer / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert np.abs(rule.apply(image) - expected).max() < 1e-5
    scale, offset = rule.affine()
    assert np.abs(peer * scale + offset - expected).max() < 1e-5


def test_corner_padding_comes_after_the_range():
    out = ImageRule("pad-corner", range="imagenet").apply(np.full((50, 100, 3), 255, np.uint8))
    assert (out[:112] == 0).all() and out[112:].min() > 2


def test_legacy_padding_is_minus_three():
    image = np.full((50, 100, 3), 255, np.uint8)
    assert ImageRule("pad-torch", legacy_pad=True).apply(image).min() == -3
    assert ImageRule("pad-torch").apply(image).min() == -1
    with pytest.raises(InputError, match="pad-torch"):
        ImageRule("pad-pil", legacy_pad=True)


@pytest.mark.parametrize("rule", [ImageRule("pad-torch"), ImageRule("none", range="imagenet"), ImageRule("pad-pil")])
def test_layouts_and_floats_agree(rule):
    pytest.importorskip("PIL")
    pixels = RNG.integers(0, 256, (48, 64, 3), np.uint8)
    expected = rule.apply(pixels)
    assert (rule.apply(pixels.transpose(2, 0, 1)) == expected).all()
    # Floats become bytes by cutting, and 255 * (n / 255) may fall just below n: one byte, and the resampling
    # rounds another.
    tolerance = 4.1 / 255 if rule.keeps_bytes else 1e-6
    assert np.abs(rule.apply(pixels / 255) - expected).max() <= tolerance


def test_floats_to_255_only_where_the_reference_takes_them():
    image = np.full((8, 8, 3), 255.0)
    assert np.allclose(ImageRule("none", bytes_as_float=True).apply(image), 1)
    with pytest.raises(InputError, match=r"floats in \[0, 1\]"):
        ImageRule("none").apply(image)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.int32),
        np.zeros((0, 8, 3), np.uint8), np.zeros((2, 8, 8, 3), np.uint8), np.full((8, 8, 3), np.nan),
        np.full((8, 8, 3), -0.5), "cat", None,
        np.zeros((3, 9000, 4), np.uint8),
    ],
)  # fmt: skip
def test_bad_images(image):
    for rule in (ImageRule("pad-torch"), ImageRule("pad-pil", size=(8, 8))):
        with pytest.raises(InputError, match="cam"):
            rule.apply(image, "cam")


# ---- state, prompt, tokens


def test_digitize():
    assert digitize([-1.5, -1, 0, 0.5, 1, 0.9921875, 0.992]).tolist() == [-1, 0, 128, 192, 255, 255, 254]


def test_prompt_text():
    assert clean("  pick_up\nthe cup ") == "pick up the cup"
    assert state_prompt("a_b", [3, -1, 255]) == "Task: a b, State: 3 -1 255;\nAction: "


def test_prompt_tokens():
    letters = Letters()
    assert prompt_tokens("ab", letters).tolist() == [2, 197, 198, 110]
    with_state = prompt_tokens("ab", letters, [7])
    assert with_state[0] == 2 and with_state.dtype == np.int32 and with_state[-1] == 100 + ord(" ")
    with pytest.warns(TruncationWarning, match="takes 20"):
        assert len(prompt_tokens("x" * 50, letters, limit=20)) == 20


def test_padded_tokens():
    assert padded_tokens("ab", Letters(), 6).tolist() == [0, 197, 198, 2, 1, 1]
    with pytest.warns(TruncationWarning):
        assert padded_tokens("abcdef", Letters(), 4).tolist() == [0, 197, 198, 2], "the end token stays"


@pytest.mark.parametrize("prompt", [b"x", 3, None, "x" * 20_000, ["x"], np.array(3)])
def test_bad_prompts(prompt):
    with pytest.raises(InputError, match="prompt"):
        AGILEX(agilex(prompt=prompt))


def test_tokenizer_of_a_folder(tmp_path):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        text_encoder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(TokenizerError, match=r"sentencepiece|damaged"):
        text_encoder(tmp_path)


def test_sentencepiece(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("put both moka pots on the stove\npick up the red cup and the blue cup\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "tokenizer"), vocab_size=28, minloglevel=2, byte_fallback=False
    )
    encoder = text_encoder(tmp_path)
    peer = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert encoder.encode("pick up the cup") == peer.encode("pick up the cup")


# ---- normalisation


@pytest.mark.parametrize(("mode", "low", "high"), [("quantile", "q01", "q99"), ("minmax", "min", "max")])
@pytest.mark.parametrize("convention", ["openpi", "lerobot"])
def test_ranges(mode, low, high, convention):
    s = stats(5)
    n = Normalizer(mode, convention, s)
    x = RNG.normal(size=(4, 5))
    eps = 1e-6 if convention == "openpi" else 0
    expected = (x - s[low]) / (s[high] - s[low] + eps) * 2 - 1
    assert np.abs(n.normalize(x) - expected).max() < (1e-12 if convention == "openpi" else 1e-4)
    scale, offset = n.inverse(5)
    assert np.abs(n.normalize(x) * scale + offset - x).max() < 1e-5


def test_zscore_epsilons():
    s = {"mean": np.zeros(1), "std": np.array([1e-6])}
    assert Normalizer("zscore", "openpi", s).normalize([1.0])[0] == pytest.approx(1 / 2e-6)
    assert Normalizer("zscore", "lerobot", s).normalize([1.0])[0] == pytest.approx(1 / 1.01e-6, rel=1e-5)
    # openpi multiplies by what it divided by, lerobot by the deviation alone.
    assert Normalizer("zscore", "openpi", s).inverse(1)[0][0] == pytest.approx(2e-6)
    assert Normalizer("zscore", "lerobot", s).inverse(1)[0][0] == pytest.approx(1e-6)


def test_an_empty_range():
    s = {"q01": np.ones(1), "q99": np.ones(1)}
    assert Normalizer("quantile", "lerobot", s).normalize([1.0])[0] == -1
    assert Normalizer("quantile", "openpi", s).normalize([1.0])[0] == -1


def test_dimensions_beyond_the_statistics_pass():
    n = Normalizer("quantile", "openpi", stats(3))
    assert n.normalize(np.arange(5.0))[3:].tolist() == [3, 4]
    assert n.normalize(np.arange(2.0)).shape == (2,)
    assert [x[3:].tolist() for x in n.inverse(5)] == [[1, 1], [0, 0]]


def test_missing_statistics_say_what_to_provide():
    with pytest.raises(ConfigError, match=r"no mean and std.*norm_stats\.json"):
        Preprocessor(profile("faster-agilex"))
    with pytest.raises(ConfigError, match=r"no q01 and q99.*policy_preprocessor\.json"):
        Preprocessor(lerobot_pi05(["observation.images.top"], 6))
    # LIBERO's prompt does not hold the state: only the actions need statistics.
    Preprocessor(profile("openpi-libero"), Statistics(actions=stats(7)))


def test_statistics_must_cover_the_robot():
    with pytest.raises(ConfigError, match="cover 7 dimensions, the robot has 14"):
        Preprocessor(profile("faster-agilex"), Statistics(stats(14), stats(7)))


# ---- actions


def test_delta_actions_there_and_back():
    state, prefix = RNG.normal(size=14), RNG.normal(size=(4, 14)).astype(np.float32)
    encoded = AGILEX.action_map.encode(prefix, state)
    assert encoded.shape == (4, 32) and encoded.dtype == np.float32 and not encoded[:, 14:].any()
    assert np.abs(AGILEX.action_map.decode(encoded, state) - prefix).max() < 1e-5
    s, mask = stats(14, 1), np.array(AGILEX.profile.delta_mask)
    assert mask.tolist() == [True] * 6 + [False] + [True] * 6 + [False]
    by_hand = (prefix - np.where(mask, state, 0) - s["mean"]) / (s["std"] + 1e-6)
    assert np.abs(encoded[:, :14] - by_hand).max() < 1e-5


def test_affine_is_the_whole_way_back():
    state, x = RNG.normal(size=14), RNG.normal(size=(50, 32)).astype(np.float32)
    scale, offset = AGILEX.action_affine(state)
    assert scale.dtype == offset.dtype == np.float32 and scale.shape == (14,)
    s, mask = stats(14, 1), np.array(AGILEX.profile.delta_mask)
    by_hand = x[:, :14] * (s["std"] + 1e-6) + s["mean"] + np.where(mask, state, 0)
    assert np.abs(x[:, :14] * scale + offset - by_hand).max() < 1e-5
    with pytest.raises(InputError, match="13 state dimensions"):
        AGILEX.action_affine(state[:12])


@pytest.mark.parametrize(
    "prefix", [np.zeros((2, 13)), np.zeros(14), np.full((2, 14), np.nan), np.zeros((2, 14), bool), "x", None]
)
def test_bad_prefixes(prefix):
    with pytest.raises(InputError, match="action_prefix"):
        AGILEX(agilex(delay=2, action_prefix=prefix))


@pytest.mark.parametrize("delay", [1, 3, -1, 2.0, True, "2", None, np.array([1, 2])])
def test_delay_and_prefix_belong_together(delay):
    with pytest.raises(InputError, match="delay"):
        AGILEX(agilex(delay=delay, action_prefix=np.zeros((2, 14))))


def test_relative_mask():
    names = ["left_shoulder.pos", "left_Gripper.pos", "right_gripper"]
    assert relative_mask(4, names, ["gripper"]) == (True, False, False, True)
    assert relative_mask(2, names, ["gripper"]) == (True, False)
    assert relative_mask(2) == relative_mask(2, None, ["gripper"]) == (True, True)


def test_limits_are_declared_and_checked():
    space, norm = ActionSpace("x", 4, 2), Normalizer("identity")
    low, high = ActionMap(space, norm, limits=([-1, -2], [1, 2])).limits
    assert low.tolist() == [-1, -2] and high.dtype == np.float32
    assert ActionMap(space, norm).limits is None
    for bad in (([1, 1], [0, 2]), ([0], [1]), ([np.nan, 0], [1, 1])):
        with pytest.raises(ConfigError, match="limits"):
            ActionMap(space, norm, limits=bad)


@pytest.mark.parametrize(
    ("mode", "model", "robot", "grippers"),
    [
        ("ee6d", 20, 20, (9, 19)), ("joint", 14, 14, (6, 13)), ("agibot_ee6d", 20, 20, ()),
        ("franka_joint7", 20, 7, ()), ("so101_bimanual", 20, 12, (5, 11)),
    ],
)  # fmt: skip
def test_xvla_action_spaces(mode, model, robot, grippers):
    space = xvla_action_space(mode)
    x = RNG.normal(size=(30, model)).astype(np.float32) * 50
    seen, out = space.mask(x), space.finish(x)
    others = [c for c in range(robot) if c not in grippers]
    assert not seen[:, list(grippers)].any() and (seen[:, others] == x[:, others]).all()
    assert out.shape == (30, robot) and (out[:, others] == x[:, others]).all()
    with np.errstate(over="ignore"):
        assert np.abs(out[:, list(grippers)] - 1 / (1 + np.exp(-x[:, list(grippers)]))).max(initial=0) < 1e-6
    assert space.pad(np.ones((3, robot))).sum() == 3 * robot


def test_xvla_auto_space():
    assert xvla_action_space("auto", 9).robot_dim == 9
    for call in (
        lambda: xvla_action_space("auto"),
        lambda: xvla_action_space("auto", 21),
        lambda: xvla_action_space("x"),
    ):
        with pytest.raises(ConfigError):
            call()


def test_xvla_prefix_has_no_grippers():
    encoded = ActionMap(xvla_action_space("so101_bimanual"), Normalizer("identity")).encode(np.ones((2, 12)))
    assert encoded.shape == (2, 20) and encoded[0].tolist() == [1.0] * 5 + [0] + [1] * 5 + [0] * 9


def rotation(axis, angle):
    x, y, z = axis = np.asarray(axis) / np.linalg.norm(axis)
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k


@given(st.integers(0, 10_000), st.sampled_from([0, 1e-9, 1e-3, 1, 3, np.pi - 1e-6]))
@settings(max_examples=60, deadline=None)
def test_rotations_round_trip(seed, angle):
    axis = np.random.default_rng(seed).normal(size=3)
    matrix = rotation(axis, angle)
    again = rot6d_to_matrix(matrix_to_rot6d(matrix))
    assert np.abs(again - matrix).max() < 1e-5
    turn = matrix_to_axis_angle(matrix)
    assert np.abs(turn - angle * axis / np.linalg.norm(axis)).max() < 1e-5


def test_rot6d_is_two_columns():
    assert matrix_to_rot6d(np.arange(9.0).reshape(3, 3)).tolist() == [0, 3, 6, 1, 4, 7]
    assert np.abs(rot6d_to_matrix(np.array([2.0, 0, 0, 5, 3, 0])) - np.eye(3)).max() < 1e-5


def test_libero_both_ways():
    turn = rotation([1, 2, 3], 0.7)
    state = libero_proprio([1, 2, 3], turn)
    assert state.shape == (20,) and state[:3].tolist() == [1, 2, 3] and not state[9:].any()
    action = np.stack([state, state])
    action[:, 9] = [0.4, 0.6]
    out = libero_action(action)
    assert out.shape == (2, 7) and out[:, 6].tolist() == [-1, 1]
    assert np.abs(out[0, 3:6] - matrix_to_axis_angle(turn)).max() < 1e-5
    with pytest.raises(InputError, match="finite"):
        libero_action(np.full(20, np.nan))


# ---- whole observations


def test_agilex():
    pytest.importorskip("PIL")
    prefix = RNG.normal(size=(3, 14))
    made = AGILEX(agilex(delay=np.array(3), action_prefix=prefix))
    assert made.images.shape == (3, 224, 224, 3) and made.image_mask.all() and made.images.dtype == np.float32
    assert made.delay == 3 and made.prefix.shape == (3, 32) and made.proprio.shape == (0,)
    bins = digitize(AGILEX.state_norm.normalize(made.state))
    assert "".join(chr(i - 100) for i in made.tokens[1:]) == state_prompt("pick_up the cup", bins)
    assert len(bins) == 14, "the padding of the state is not in the prompt"
    first = AGILEX(agilex())
    assert first.delay == 0 and first.prefix.shape == (0, 32)


def test_padded_state_in_the_prompt():
    old = Preprocessor(AGILEX.profile.replace(pad_state=32), Statistics(stats(14), stats(14, 1)), Letters())
    text = "".join(chr(i - 100) for i in old._tokens(agilex(), np.zeros(14))[1:])
    assert re.search(r"( 128){18};", text) and len(text.split("State: ")[1].split(";")[0].split()) == 32


def test_absent_cameras_stay_or_move():
    pytest.importorskip("PIL")
    obs = agilex()
    del obs["images"]["cam_high"]
    made = AGILEX(obs)
    assert made.image_mask.tolist() == [False, True, True] and (made.images[0] == -1).all()
    cameras = [f"observation.images.{c}" for c in "abc"]
    le = Preprocessor(lerobot_pi05(cameras, 6), Statistics(stats(6), stats(6)), Letters())
    white = np.ones((3, 10, 10), np.float32)
    made = le({cameras[1]: white, "observation.state": np.zeros(6), "task": "x"})
    assert made.image_mask.tolist() == [True, False, False]
    assert (made.images[0] == 1).all() and (made.images[1:] == -1).all()
    with pytest.raises(InputError, match="no camera image"):
        le({"observation.state": np.zeros(6), "task": "x"})


def test_libero_droid_calvin():
    pytest.importorskip("PIL")
    image = np.zeros((224, 224, 3), np.uint8)
    libero = Preprocessor(profile("openpi-libero"), Statistics(actions=stats(7)), Letters())
    made = libero(
        {"observation/image": image, "observation/wrist_image": image, "observation/state": np.zeros(8), "prompt": "a"}
    )
    assert made.image_mask.tolist() == [True, True, False] and made.tokens.tolist() == [2, 197, 110]
    droid = Preprocessor(profile("openpi-droid"), Statistics(stats(8), stats(8)), Letters())
    made = droid({
        "observation/exterior_image_1_left": image, "observation/joint_position": np.arange(7.0),
        "observation/gripper_position": 7.0, "prompt": "a",
    })  # fmt: skip
    assert made.state.tolist() == list(range(8)) and made.image_mask.tolist() == [True, False, False]
    calvin = Preprocessor(profile("faster-calvin"), Statistics(actions=stats(7)), Letters())
    assert calvin({"image": image, "prompt": "a"}).state.shape == (0,), "nobody reads it"


def test_xvla():
    pytest.importorskip("PIL")
    made = Preprocessor(profile("xvla"), encoder=Letters())(
        {"image0": np.zeros((9, 9, 3), np.uint8), "proprio": np.ones(10), "language_instruction": "a", "domain_id": 3}
    )
    assert made.tokens.tolist() == [0, 197, 2] + [1] * 47 and made.domain == 3
    assert made.proprio.tolist() == [1.0] * 9 + [0] * 11, "cut or padded, grippers zeroed"
    assert made.image_mask.tolist() == [True, False, False] and not made.images[1:].any()
    le = Preprocessor(
        lerobot_xvla(["observation.images.a"], xvla_action_space("ee6d"), proprio_dim=32, slots=3, resize=(64, 64))
    )
    made = le(
        {"observation.images.a": np.ones((3, 32, 64)), "observation.state": np.zeros(20), "tokens": np.ones(64, int)}
    )
    assert made.images.shape == (3, 64, 64, 3) and made.image_mask.tolist() == [True, False, False]


def test_rotated_view():
    p = profile("xvla").replace(image=ImageRule("none"), views=(*profile("xvla").views[:1],))
    flipped = p.replace(views=(p.views[0].__class__("view_0", "image0", rotate=True),))
    image = RNG.random((4, 5, 3), np.float32)
    obs = {"image0": image, "proprio": np.zeros(20), "prompt": "a"}
    one, two = (Preprocessor(q, encoder=Letters())(obs).images[0] for q in (p, flipped))
    assert (one[::-1, ::-1] == two).all()


def test_given_tokens():
    pytest.importorskip("PIL")
    pre = Preprocessor(AGILEX.profile, Statistics(stats(14), stats(14)), vocab=512)
    made = pre(agilex(tokens=np.array([[2, 5, 0, 0]]), token_mask=np.array([[True, True, False, False]])))
    assert made.tokens.tolist() == [2, 5]
    with pytest.raises(TokenizerError, match="tokens"):
        pre(agilex())
    for bad in (
        np.array([600]),
        np.array([-1]),
        np.array([0.5]),
        np.zeros(0, int),
        np.zeros(300, int),
        np.zeros((2, 3), int),
    ):
        with pytest.raises(InputError):
            pre(agilex(tokens=bad))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("state", np.full(14, np.nan)), ("state", "x"), ("state", None), ("state", np.zeros((2, 7))),
        ("state", np.zeros(5000)), ("prompt", None), ("images", None), ("images", 3), ("domain_id", -1),
        ("domain_id", 1.5), ("domain_id", "x"),
    ],
)  # fmt: skip
def test_bad_observations(key, value):
    with pytest.raises(InputError):
        AGILEX(agilex(**{key: value}))
    with pytest.raises(InputError):
        AGILEX(value)


def test_profiles_print():
    for p in PROFILES.values():
        text = str(p)
        assert p.name in text and p.image.resize in text and all((v.key or "no camera") in text for v in p.views)
    assert "xxxxxx.xxxxxx." in str(profile("faster-agilex"))
    with pytest.raises(ConfigError, match="faster-agilex"):
        profile("nobody")


@pytest.mark.parametrize(
    "bad", [{"prompt": "x"}, {"state_norm": "x"}, {"views": ()}, {"delta_mask": (True,)}, {"max_tokens": 0}]
)
def test_bad_profiles(bad):
    with pytest.raises(ConfigError, match="faster-agilex"):
        profile("faster-agilex").replace(**bad)


# ---- files


def test_norm_stats_file(tmp_path):
    path = tmp_path / "norm_stats.json"
    part = {"mean": [0, 1], "std": [1, 2.5], "q01": None, "q99": None}
    path.write_text(json.dumps({"norm_stats": {"state": part, "actions": part}}))
    read = read_norm_stats(path)
    assert sorted(read.state) == ["mean", "std"] and read.actions["std"].tolist() == [1, 2.5]


@pytest.mark.parametrize(
    "part",
    [
        {"mean": [0, 1], "std": [1]}, {"mean": [0, "1"]}, {"std": [-1]}, {"mean": 3}, {"mean": []}, {"mean": [True]},
        {"mean": [0.0] * 2000}, {"mean": [1e308]}, {"mean": [[1]]}, {"mean": {"0": 1}},
    ],
)  # fmt: skip
def test_hostile_norm_stats(tmp_path, part):
    path = tmp_path / "norm_stats.json"
    path.write_text(json.dumps({"norm_stats": {"state": part, "actions": {}}}))
    with pytest.raises(ConfigError, match=r"norm_stats\.json"):
        read_norm_stats(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"norm_stats": 3}', '{"norm_stats": {"state": {}}}', '{"a": NaN'])
def test_damaged_norm_stats(tmp_path, text):
    path = tmp_path / "norm_stats.json"
    path.write_text(text)
    with pytest.raises(ConfigError):
        read_norm_stats(path)


def lerobot_folder(folder, mode="QUANTILES", state_file="norm.safetensors"):
    steps = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "tokenizer_processor", "config": {"max_length": 50, "task_key": "task"}},
        {
            "registry_name": "normalizer_processor",
            "config": {"eps": 1e-8, "features": {}, "norm_map": {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}},
            "state_file": state_file,
        },
    ]
    (folder / "policy_preprocessor.json").write_text(json.dumps({"name": "p", "steps": steps}))
    tensors = {f"{k}.{n}": v.astype(np.float32) for k in ("observation.state", "action") for n, v in stats(6).items()}
    save_file(tensors | {"observation.images.top.mean": np.zeros((3, 1, 1), np.float32)}, folder / "norm.safetensors")


def test_lerobot_processor(tmp_path):
    assert read_lerobot_processor(tmp_path) is None
    lerobot_folder(tmp_path)
    read = read_lerobot_processor(tmp_path)
    assert (read.state_mode, read.action_mode, read.max_tokens) == ("quantile", "quantile", 50)
    assert np.abs(read.statistics.actions["q99"] - stats(6)["q99"]).max() < 1e-6
    Preprocessor(lerobot_pi05(["observation.images.top"], 6), read.statistics)


def test_a_profile_takes_the_norms_of_the_processor(tmp_path):
    """lerobot runs the saved pipeline; one without a normaliser says nothing."""
    own = lerobot_pi05(["observation.images.top"], 6)
    lerobot_folder(tmp_path, mode="MEAN_STD")
    read = read_lerobot_processor(tmp_path)
    p = own.with_processor(read)
    assert (p.state_norm, p.action_norm, p.eps) == ("zscore", "zscore", 1e-8)
    (tmp_path / "policy_preprocessor.json").write_text('{"name": "p", "steps": []}')
    empty = read_lerobot_processor(tmp_path)
    assert empty.state_mode is None and own.with_processor(empty) == own == own.with_processor(None)


@pytest.mark.parametrize(
    ("convention", "sizes"), [("openpi", {4: True, 6: True, 7: False}), ("lerobot", {4: False, 6: True})]
)
def test_the_state_has_the_length_of_its_statistics(convention, sizes):
    given = Statistics(stats(6), stats(6))
    p = profile("faster-agilex").with_robot_dims(6).replace(convention=convention)
    use = Preprocessor(p, given, None)
    for n, good in sizes.items():
        obs = {"images": {"cam_high": np.zeros((224, 224, 3), np.uint8)}, "state": np.zeros(n), "tokens": [2, 3]}
        if good:
            assert len(use(obs).state) == n
        else:
            with pytest.raises(InputError, match=f"has {n} numbers and its statistics 6"):
                use(obs)


@pytest.mark.parametrize(
    "change", [{"mode": "QUANTILE10"}, {"state_file": "../x.safetensors"}, {"state_file": "no.safetensors"}]
)
def test_hostile_lerobot_processor(tmp_path, change):
    lerobot_folder(tmp_path, **change)
    with pytest.raises(EngineError):
        read_lerobot_processor(tmp_path)


def test_sidecar(tmp_path):
    assert read_sidecar(tmp_path) is None
    text = (
        '{"schedule": "has", "alpha": 0.6, "u0": 0.9, "num_steps": 10, "ready_threshold": 0, "max_delay": 10, '
        '"discrete_state_input": false, "norm": "zscore", "delta_mask": [true, false], "robot_dims": 2, '
        '"resize": "pad-torch", "limits": {"low": [-1, -2.5], "high": [1, 0]}}'
    )
    (tmp_path / "faster.json").write_text(text)
    read = read_sidecar(tmp_path)
    assert read.alpha == 0.6 and read.ready_threshold == 0 and read.delta_mask == (True, False)
    p = profile("faster-agilex").with_sidecar(read)
    assert (p.action.robot_dim, p.delta_mask, p.prompt, p.image.resize) == (2, (True, False), "plain", "pad-torch")
    assert p.limits == ((-1, -2.5), (1, 0))
    assert profile("faster-agilex").with_sidecar(Sidecar()) == profile("faster-agilex")


@pytest.mark.parametrize(
    "bad",
    [
        {"alfa": 0.6}, {"alpha": 1.5}, {"alpha": "0.6"}, {"u0": 1}, {"u0": True}, {"num_steps": 0},
        {"num_steps": 2.0}, {"schedule": "HAS"}, {"schedule": "has"}, {"delta_mask": [1]},
        {"delta_mask": [True], "robot_dims": 2}, {"norm": "x"},
        {"limits": [[0], [1]]}, {"limits": {"low": [0]}}, {"limits": {"low": [1], "high": [0]}},
        {"limits": {"low": [0, 0], "high": [1]}}, {"limits": {"low": [0], "high": [1e31]}},
        {"limits": {"low": [0], "high": [True]}},
        {"ready_threshold": -1}, {"max_delay": -1}, {"robot_dims": 10**9}, {"resize": 3}, {"discrete_state_input": 0},
    ],
)  # fmt: skip
def test_bad_sidecars(bad):
    with pytest.raises(ConfigError, match=r"faster\.json"):
        parse_sidecar(bad)
    with pytest.raises(ConfigError):
        parse_sidecar([bad])
