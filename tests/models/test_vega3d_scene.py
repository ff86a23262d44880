"""Scenes of VEGA-3D: assembly, grounding and what is kept, against plain torch; and what users get wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _vega import geometry, pictures, random_generator, random_model, scene_weights

from engine.blocks import qwen_reference
from engine.blocks.scene import average_coordinates, patches_in_boxes
from engine.errors import ClosedError, ConfigError, ContextError, InputError
from engine.io.checkpoint import bf16_to_f32
from engine.models.vega3d import reference
from engine.models.vega3d.config import BLENDS
from engine.models.vega3d.model import Vega3D
from engine.models.vega3d.scene import TASKS
from engine.runtime import cuda

LIMIT = 5e-6  # of the largest value, behind both towers
BOXES = np.array([[0.5, 0.2, 1.5, 1.5, 1.5, 2.0], [-1.0, 0.5, 1.2, 0.8, 1.0, 1.0], [2.9, 2.9, 2.9, 0.1, 0.1, 0.1],
                  [0.0, 0.0, 1.0, 4.0, 4.0, 4.0]])  # fmt: skip
MODES = [{"config": {"feature_fusion_method": m, "world_position_embedding_type": kind}}
         for m in BLENDS for kind in ("avg-discrete-sin3d", "none")]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    with random_model() as m:
        yield m


def error(got, want) -> float:
    want = np.asarray(want, np.float64)
    return float(np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max())


def rms(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.sqrt(((got - want) ** 2).mean() / (want**2).mean()))


def fp64(m: Vega3D) -> dict[str, torch.Tensor]:
    tensors = scene_weights(m.config).tensors
    return {k: torch.from_numpy(np.asarray(v)).double() for k, v in tensors.items()}


def seen_by(m: Vega3D, scene, features: np.ndarray):
    """What the reference makes of the frames: embeddings, gates, semantic tokens before pooling."""
    c = m.config
    images = torch.from_numpy(scene.pictures.transpose(0, 3, 1, 2).astype(np.float64) / 127.5 - 1)
    voxels = None
    if scene.coded:
        cells = average_coordinates(scene.coords, (c.side, c.side), c.cell_pixels, m.options.coord_dtype)
        voxels = torch.from_numpy(c.voxels.of(cells, m.options.coord_dtype).reshape(len(images), -1, 3))
    return reference.visual_tokens(fp64(m), c, images, torch.from_numpy(features).double(), voxels)


def first_logits(m: Vega3D, prompt) -> np.ndarray:
    """Of the first token of an answer."""
    with m._use():
        m._start(prompt, m._options((), {}), ())
    return m.io.logits.read()[0]


def expected_logits(m: Vega3D, prompt, rows: torch.Tensor, place: torch.Tensor | None = None) -> np.ndarray:
    w, c = fp64(m), m.config.language
    table = torch.cat([w["model.embed_tokens.weight"], rows, *([] if place is None else [place])])
    hidden = qwen_reference.language(w, c, table[torch.tensor(list(prompt))])
    return reference.logits(w, c, hidden[-1]).numpy()


# ------------------------------------------------------------------------------------------------------ mathematics
@pytest.mark.parametrize("options", MODES)
def test_assembly(options):
    with random_model(**options) as m:
        features = np.random.default_rng(3).standard_normal((4, 9, m.config.generative)).astype(np.float32)
        scene = m.scene(pictures(), **geometry(), features=features)
        assert scene.coded == m.config.coded
        rows, gates, _ = seen_by(m, scene, features)
        assert error(scene.seen.rows, rows) < LIMIT
        assert np.abs(scene.gates.reshape(4, 9) - gates[..., 0].numpy()).max() < 1e-6
        prompt = scene._question("which is nearer?", None, None, False)
        assert error(first_logits(m, prompt), expected_logits(m, prompt, rows)) < LIMIT


@pytest.mark.parametrize("method", BLENDS)
def test_fusion_alone(method):
    rng = np.random.default_rng(1)
    with random_model(config={"feature_fusion_method": method}) as m:
        s, g = (rng.standard_normal((25, n)).astype(np.float32) for n in (48, m.config.generative))
        got, gates = m.fuse(s, g, return_gates=True)
        w = fp64(m)
        two = reference.projector(w, "model.generative_projector", torch.from_numpy(g).double())
        want, gate = reference.fuse(w, torch.from_numpy(s).double(), two, m.config.blend)
        assert error(got, want) < 1e-6 and np.abs(gates - gate[:, 0].numpy()).max() < 1e-6
        assert np.array_equal(m.fuse(s[7:8], g[7:8]), got[7:8])


def test_pooling_commutes_with_the_projector(model):
    """Exact: the second product is linear, and the shares of a cell add to one."""
    w = fp64(model)
    x = torch.randn(2, 25, 32, dtype=torch.float64)
    hidden = torch.nn.functional.gelu(reference.linear(w, "model.mm_projector.0", x))
    late = reference.pooled(reference.linear(w, "model.mm_projector.2", hidden), 3)
    early = reference.linear(w, "model.mm_projector.2", reference.pooled(hidden, 3))
    assert error(early, late) < 1e-12


def test_caption_adds_the_place(model):
    features = np.ones((4, 9, model.config.generative), np.float32)
    scene = model.scene(pictures(), **geometry(), features=features)
    rows, _, _ = seen_by(model, scene, features)
    c = model.config
    for box in (BOXES[0], BOXES[1], BOXES[0]):
        prompt = scene.prompt(TASKS["scan2cap"], box[:3])
        assert list(prompt).count(model.place_id) == 1 and c.coord not in prompt
        voxel = torch.from_numpy(c.voxels.of(box[None, :3], "fp32"))
        place = fp64(model)["model.embed_tokens.weight"][c.coord] + reference.position_code(voxel, 48).double()
        assert error(first_logits(model, prompt), expected_logits(model, prompt, rows, place)) < LIMIT
    assert scene.caption(BOXES[0], max_new_tokens=4).tokens


@pytest.mark.parametrize("per_pass", [1, 2, 4])
def test_grounding(per_pass):
    with random_model(per_pass=per_pass) as m:
        features = np.ones((4, 9, m.config.generative), np.float32)
        scene = m.scene(pictures(), **geometry(), features=features)
        rows, _, encoded = seen_by(m, scene, features)
        c, w = m.config, fp64(m)
        members = patches_in_boxes(scene.coords, BOXES, (5, 5), 4, coord_dtype="fp32").reshape(4, 4, 25)
        assert members.any((1, 2)).tolist() == [True, True, False, True]
        voxels = torch.from_numpy(c.voxels.of(BOXES[:, :3], "fp32"))
        objects = reference.object_features(encoded, torch.from_numpy(members), voxels)
        assert error(scene.objects(BOXES), objects) < LIMIT
        prompt = scene.prompt(TASKS["scanrefer"].format(description="The red cube."), ground=True)
        table = torch.cat([w["model.embed_tokens.weight"], rows])
        hidden = qwen_reference.language(w, c.language, table[torch.tensor(list(prompt))])[-1]
        want = reference.ground_scores(w, objects, hidden).numpy()
        got = scene.ground("the RED cube.", BOXES)
        assert np.abs(np.append(got.scores, got.none) - want).max() < LIMIT
        assert got.index == want[:-1].argmax() and got.empty == (want.argmax() == 4)
        many = scene.ground("the red cube.", np.tile(BOXES, (20, 1)))  # more than fit into one run
        assert np.abs(many.scores - np.tile(want[:-1], 20)).max() < LIMIT


@pytest.mark.parametrize("pe", ["auto", "none"])
def test_grounding_of_what_was_seen_without_places(pe):
    """The same pictures again, now with places: what is kept of them has to serve boxes, too."""
    with random_model(config={"world_position_embedding_type": "none" if pe == "auto" else "avg-discrete-sin3d"}) as m:
        plain = m.scene(pictures())
        placed = m.scene(pictures(), **geometry(), pe=pe)
        assert np.array_equal(plain.seen.rows, placed.seen.rows)
        scores = placed.ground("the red cube.", BOXES).scores
    with random_model(config={"world_position_embedding_type": "none"}) as m:
        assert np.array_equal(m.scene(pictures(), **geometry()).ground("the red cube.", BOXES).scores, scores)


def test_ground_multi(model):
    scene = model.scene(pictures(), **geometry())
    p = model._scores(scene, scene.prompt(TASKS["multi3drefer"].format(description="All."), ground=True), BOXES)
    share = np.exp(p / 0.07) / np.exp(p / 0.07).sum()
    found = scene.ground_multi("all.", BOXES, threshold=0.4)
    if p.argmax() == 4:
        assert len(found.indices) == 0
    else:
        order = np.argsort(-share[:-1])
        assert found.indices.tolist() == order[: int(np.searchsorted(np.cumsum(share[order]), 0.4)) + 1].tolist()
        assert np.allclose(found.probabilities, share[found.indices])
    assert len(scene.ground_multi("all.", BOXES, threshold=1.0).indices) in (0, 4)


@pytest.mark.parametrize(
    "dtype, quant, limit", [("bf16", None, 2e-2), ("bf16", "int8", 3e-2), ("bf16", "int4", 1.5e-1)]
)
def test_narrow_formats(model, dtype, quant, limit):
    features = np.random.default_rng(3).standard_normal((4, 9, model.config.generative)).astype(np.float32)
    with random_model(dtype=dtype, quant=quant) as m:
        scene = m.scene(pictures(), **geometry(), features=features)
        rows, _, _ = seen_by(m, scene, features)
        assert rms(bf16_to_f32(scene.seen.rows), rows.numpy()) < 2e-2
        prompt = scene._question("which is nearer?", None, None, False)
        assert rms(first_logits(m, prompt), expected_logits(m, prompt, rows)) < limit


# ------------------------------------------------------------------------------------------------------ what is kept
def test_second_question_costs_its_own_tokens(model):
    scene = model.scene(pictures())
    prefix = len(scene.prompt())
    assert scene.ask("how many cubes?", max_new_tokens=3).reused_tokens == prefix
    second = scene.ask("which is nearer?", max_new_tokens=3)
    assert prefix <= second.reused_tokens < second.prompt_tokens
    warm = first_logits(model, scene._question("what colour?", None, None, False))
    with random_model() as cold:
        other = cold.scene(pictures())
        want = first_logits(cold, other._question("what colour?", None, None, False))
    assert error(warm, want) < 1e-6


def test_scenes_take_turns_without_looking_again(model):
    scenes = [model.scene(pictures(seed=s)) for s in range(3)]
    prompts = [s._question("where?", None, None, False) for s in scenes]
    alone = [first_logits(model, p) for p in prompts]
    assert error(alone[1], alone[0]) > 1e-3
    for _ in range(2):
        for scene, prompt, want in zip(scenes, prompts, alone):
            assert np.array_equal(first_logits(model, prompt), want)
            assert model.reused_tokens >= len(scene.prompt())
    text = model.generate([1, 2, 3], max_new_tokens=4, ignore_eos=True).tokens
    assert np.array_equal(first_logits(model, prompts[0]), alone[0])
    assert model.generate([1, 2, 3], max_new_tokens=4, ignore_eos=True).tokens == text


def test_a_scene_outlives_its_place_in_the_caches():
    with random_model(feature_cache=0, prefix_cache=0) as m:
        first = m.scene(pictures(seed=1))
        prompt = first._question("where?", None, None, False)
        want = first_logits(m, prompt)
        m.scene(pictures(seed=2))
        assert error(first_logits(m, prompt), want) < 1e-6 and m.reused_tokens == 0
        assert not len(m._store._kept) and not len(m._features)


def test_features_are_kept_by_content(model):
    calls = []
    inner = model.generator.features
    model.generator.features = lambda *a, **k: calls.append(1) or inner(*a, **k)
    try:
        one = model.features(pictures(seed=9))
        assert np.array_equal(one, model.features(pictures(seed=9))) and len(calls) == 1
        model.features(pictures(seed=9), seed=5)
        assert len(calls) == 2
    finally:
        model.generator.features = inner


def test_streams_and_tasks(model):
    scene = model.scene(pictures())
    stream = scene.stream("where?", max_new_tokens=5)
    text = "".join(str(e.text) for e in stream)
    assert stream.result.text == text and scene.ask("where?", max_new_tokens=5).text == text.strip()
    plain = scene._question("Where is it?", None, "plain", False)
    assert plain == scene.prompt(" Where is it?")
    told = scene._question("Where?", "I stand at the door.", None, True)
    assert told == scene.prompt(
        "The video captures 3D spatial information of a scene. Please focus on the spatial relationships in the video "
        "and answer the following questions.\n I stand at the door. Where? Answer the question using a single word or "
        "phrase."
    )


def test_frames_are_taken_evenly(model):
    many = pictures(9)
    scene = model.scene(many, **geometry(9))
    assert scene.frames.indices.tolist() == [0, 2, 5, 8]
    same = model.scene(many[[0, 2, 5, 8]])
    assert np.array_equal(same.pictures, scene.pictures)


# ------------------------------------------------------------------------------------------------------ faults
@pytest.mark.parametrize(
    "change, words",
    [
        ({"depth": None}, "depth is missing"),
        ({"depth": np.full((4, 12, 16), np.nan)}, "depth"),
        ({"depth": np.ones((3, 12, 16), np.uint16)}, "each of the 4 frames"),
        ({"poses": np.zeros((4, 4, 4))}, "poses"),
        ({"pe": "maybe"}, "pe="),
        ({"features": np.zeros((4, 8, 48), np.float32)}, "features"),
        ({"features": np.full((4, 9, 48), np.nan, np.float32)}, "features"),
        ({"noise": np.zeros((4, 1), np.float32)}, "noise"),
        ({"sampling": "best"}, "sampling"),
    ],
)
def test_bad_scenes(model, change, words):
    kept = model.scene(pictures())
    want = kept.ask("where?", max_new_tokens=4).tokens
    before = len(model._features), len(model._seen), len(model._store._kept)
    with pytest.raises(InputError, match=words):
        model.scene(pictures(seed=77), **(geometry() | change))
    assert (len(model._features), len(model._seen), len(model._store._kept)) == before
    assert kept.ask("where?", max_new_tokens=4).tokens == want


def test_bad_questions(model):
    flat, solid = model.scene(pictures()), model.scene(pictures(), **geometry())
    for call, words in (
        (lambda: flat.ask(" "), "question"),
        (lambda: flat.ask("where?", task="sqa3d"), "situation"),
        (lambda: flat.ask("where?", task="other"), "task"),
        (lambda: flat.caption(BOXES[0]), "depth, intrinsics and poses"),
        (lambda: flat.ground("a cube", BOXES), "depth, intrinsics and poses"),
        (lambda: solid.ground("", BOXES), "description"),
        (lambda: solid.ground("a cube", []), "proposals"),
        (lambda: solid.ground("a cube", BOXES[:, :5]), "proposals"),
        (lambda: solid.ground("a cube", BOXES + np.array([9, 0, 0, 0, 0, 0])), "outside"),
        (lambda: solid.caption(BOXES[0] * [1, 1, 1, -1, 1, 1]), "size"),
        (lambda: solid.ground_multi("a cube", BOXES, threshold=0), "threshold"),
        (lambda: model.fuse(np.zeros((2, 5), np.float32), np.zeros((2, 48), np.float32)), "sem"),
        (lambda: model.fuse(np.zeros((2, 48), np.float32), np.zeros((3, 48), np.float32)), "gen"),
    ):
        with pytest.raises(InputError, match=words):
            call()
    with pytest.raises(ContextError):
        flat.ask("where? " * 400)


def test_without_a_generator():
    with random_model(generator=None) as m:
        assert any("features=" in note for note in m.notes)
        with pytest.raises(InputError, match="wan="):
            m.scene(pictures())
        features = np.zeros((4, 9, m.config.generative), np.float32)
        assert m.scene(pictures(), features=features).ask("where?", max_new_tokens=2).tokens


def test_config_faults():
    for change, words in (
        ({"feature_fusion_method": "concat"}, "feature_fusion_method"),
        ({"mm_projector_type": "linear"}, "mm_projector_type"),
        ({"generative_vision_tower_size": "big"}, "tower_size"),
        ({"use_sliding_window": True}, "sliding"),
        ({"num_key_value_heads": 3}, "kv heads"),
        ({"voxel_size": -1}, "voxel"),
        ({"generative_feat_dim": 30}, "generator gives 48"),
    ):
        with pytest.raises(ConfigError, match=words):
            random_model(config=change)


def test_plan_sketch_and_close(model):
    assert len(model.plans["decode"]) <= model.node_budget
    published = {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944,
                 "num_hidden_layers": 28, "vocab_size": 151649, "rope_theta": 1e6}  # fmt: skip
    parts = Vega3D.plan(published, dtype="bf16")
    assert 17e9 < parts["weights"] < 19.5e9 and sum(parts.values()) < 24e9
    with pytest.raises(InputError, match="no option 'snapshots'"):
        Vega3D.plan(published, snapshots=1)
    with cuda.use(cuda.Recorder()):  # a card of 24 GB, four frames in a pass
        assert sum(Vega3D.plan(published, device="cuda", dtype="bf16").values()) < 24e9
    alone = random_generator(grid=(3, 3), max_pixels=22 * 22)
    with random_model(generator=None) as bare:
        assert model.memory().total == bare.memory().total + alone.memory().total
    assert "plan generator.features" in str(model.explain()) and "plan decode" in str(model.explain())
    m = random_model()
    scene = m.scene(pictures())
    m.close()
    with pytest.raises(ClosedError):
        scene.ask("where?")
