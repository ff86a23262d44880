"""Variant B of VEGA-3D: mRoPE against transformers, assembly against plain torch, its layout on disk, what users get
wrong."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from _peer_vega import CASES, qwen_cases
from _source import Tensors
from _vega import (
    DIT,
    SPATIAL,
    VAE,
    filled,
    geometry,
    pictures,
    random_generator,
    random_spatial,
    scene_weights,
    tokenizer,
)
from safetensors.numpy import load_file, save_file

import engine
from engine.blocks import qwen_reference
from engine.errors import ConfigError, InputError
from engine.io.checkpoint import bf16_to_f32
from engine.models.vega3d import reference
from engine.models.vega3d.config import SpatialConfig, VegaConfig
from engine.models.vega3d.features import PROMPT_FILE, PROMPT_KEY
from engine.models.vega3d.generator_weights import dit_shapes, vae_shapes
from engine.models.vega3d.model import Options, Vega3D, rotary_rows, scene_places
from engine.models.vega3d.towers import CLIP_MEAN, CLIP_STD
from engine.models.vega3d.weights import OWN_GENERATOR, shapes, store

peer = pytest.mark.peer
LIMIT = 1e-5  # of the largest value


@pytest.fixture(scope="module")
def model():
    with random_spatial() as m:
        yield m


def error(got, want) -> float:
    want = np.asarray(want, np.float64)
    return float(np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max())


def fp64(tensors: dict) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(np.asarray(v)).double() for k, v in tensors.items()}


# ------------------------------------------------------------------------------------------------------ peers
def ids_of(about: dict, vocab: int) -> list[int]:
    """The prompt that the peer made: texts around images, whose ids lie behind the vocabulary."""
    before, between, behind = about["text"]
    cells = about["grid"][0] * about["grid"][1] // 4
    ids = [1] * before
    for i in range(about["images"]):
        ids += [2, *range(vocab + i * cells, vocab + (i + 1) * cells), 2]
        ids += [1] * (between if i + 1 < about["images"] else 0)
    return ids + [1] * behind


def config_of(about: dict) -> SpatialConfig:
    o = SPATIAL | about["config"] | {"generative_feat_dim": 24, "frames_upbound": about["images"],
                                       "eos_token_id": None}  # fmt: skip
    o["max_pixels"] = o["min_pixels"] = int(np.prod(about["grid"])) * o["vision_config"]["patch_size"] ** 2
    size = (about["grid"][1] * 40, about["grid"][0] * 40)
    config = VegaConfig.from_json(o | {"rms_norm_eps": 1e-6}, frame_size=size)
    assert isinstance(config, SpatialConfig)
    return config


@peer
@pytest.mark.parametrize("i", range(CASES))
def test_reference_is_transformers(i):
    case = qwen_cases()[i]
    c = config_of(case.about)
    w, io = fp64(load_file(case.folder / "model.safetensors")), fp64(case.io)
    vision = replace(c.vision, grid=tuple(case.about["grid"]))  # a resize keeps aspects only about
    assert error(reference.qwen_vision(w, vision, io["pixels"]), case.io["tokens"]) < LIMIT
    grid = tuple(n // 2 for n in case.about["grid"])
    ids = ids_of(case.about, c.language.vocab)
    places = scene_places(grid, ids, c.language.vocab, len(ids) + 3)
    np.testing.assert_array_equal(places[: len(ids)].T, case.io["positions"])
    assert (places[len(ids) :] == places[: len(ids)].max() + 1 + np.arange(3)[:, None]).all()
    angle = qwen_reference.rotary_angles(c.language, torch.from_numpy(places[: len(ids)]))
    hidden = qwen_reference.language(w, c.language, io["embeds"], angle)
    assert error(hidden, case.io["hidden"]) < LIMIT
    assert error(reference.logits(w, c.language, hidden), case.io["logits"]) < LIMIT


@peer
@pytest.mark.parametrize("i", range(CASES))
def test_language_is_transformers(i):
    """The engine's prefill by the rotary table of images among text."""
    case = qwen_cases()[i]
    c = config_of(case.about)
    tensors = Tensors(filled(shapes(c), 1).tensors | load_file(case.folder / "model.safetensors"))
    embeds = case.io["embeds"]
    frames = len(embeds) // c.cells + 1
    with Vega3D(c, tensors, Options.of(c, frames=frames, context=512, chunk=16), progress=False) as m:
        places = np.zeros((m.context, 3), np.int64)
        places[: len(embeds)] = case.io["positions"].T
        m._rope.write(rotary_rows(c.language, places))
        store(m._rows.slice(0, embeds.shape), embeds)
        m._cache.clear()
        ids, got, step = list(range(m.vocab_size, m.vocab_size + len(embeds))), [], m.io.score_logits.shape[0]
        for at in range(0, len(ids), step):
            m._prefill(ids[: at + step])
            m.plans["score"].replay()
            got.append(m.io.score_logits.read()[: len(ids[at : at + step])])
    assert error(np.concatenate(got), case.io["logits"]) < LIMIT


# ------------------------------------------------------------------------------------------------------ assembly
def expected(m: Vega3D, scene, features: np.ndarray):
    c = m.config
    w = fp64(scene_weights(c).tensors)
    images = (scene.pictures / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    rows, gates = reference.spatial_tokens(
        w, c, torch.from_numpy(images.transpose(0, 3, 1, 2)), torch.from_numpy(features).double(), (4, 6)
    )
    return w, rows, gates


def first_logits(m: Vega3D, prompt) -> np.ndarray:
    with m._use():
        m._start(prompt, m._options((), {}), ())
    return m.io.logits.read()[0]


def given(m: Vega3D) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((4, 24, m.config.generative)).astype(np.float32)


@pytest.mark.parametrize("method", ["token_gated_residual", "token_gated", "token_gated_raw"])
@pytest.mark.parametrize("per_pass", [1, 4])
def test_assembly(method, per_pass):
    with random_spatial(config={"generative_fusion_method": method}, per_pass=per_pass) as m:
        features = given(m)
        scene = m.scene(pictures(), features=features)
        w, rows, gates = expected(m, scene, features)
        assert error(scene.seen.rows, rows) < LIMIT
        assert np.abs(scene.gates.reshape(4, -1) - gates[..., 0].numpy()).max() < 1e-6
        prompt = scene._question("How many chairs?")
        places = scene_places(m.config.grid, prompt, m.vocab_size, len(prompt))
        table = torch.cat([w["model.embed_tokens.weight"], rows])
        angle = qwen_reference.rotary_angles(m.config.language, torch.from_numpy(places))
        hidden = qwen_reference.language(w, m.config.language, table[torch.tensor(list(prompt))], angle)
        want = reference.logits(w, m.config.language, hidden[-1])
        assert error(first_logits(m, prompt), want) < LIMIT


def test_towers_see_the_same_cut(model):
    scene = model.scene(pictures())
    fitted = model._eyes.prepare(pictures())[1]
    assert fitted.shape == (4, *model.config.fitted, 3) and scene.pictures.shape[1:3] == model.config.vision.size
    other = random_generator(grid=None, max_pixels=518 * 518)
    assert error(model.features(pictures()), other.features(fitted, seed=0)) < 1e-6
    other.close()


def test_published_sizes():
    """640 x 480 frames: 504 x 392 pixels for the generator, 532 x 420 for the tower, 285 tokens."""
    published = {"model_type": "qwen2_5_vl", "use_generative_encoder": True, "hidden_size": 3584,
                 "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944,
                 "num_hidden_layers": 28, "vocab_size": 152064, "rope_theta": 1e6, "max_position_embeddings": 128000,
                 "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}  # fmt: skip
    c = VegaConfig.from_json(published)
    assert isinstance(c, SpatialConfig) and c.fitted == (392, 504) and c.vision.size == (420, 532)
    assert c.cells == 285 and c.blend == "residual" and c.tap.size == (832, 480) and c.tap.block == -1
    parts = Vega3D.plan(published, dtype="bf16")
    assert 18e9 < parts["weights"] < 21e9 and sum(parts.values()) < 26e9


def test_second_question_and_turns(model):
    scenes = [model.scene(pictures(seed=s)) for s in range(2)]
    prompts = [s._question("where?") for s in scenes]
    alone = [first_logits(model, p) for p in prompts]
    assert error(alone[1], alone[0]) > 1e-3
    text = model.generate([1, 2, 3], max_new_tokens=4, ignore_eos=True).tokens
    for scene, prompt, want in zip(scenes, prompts, alone):
        assert np.array_equal(first_logits(model, prompt), want)
        assert model.reused_tokens >= len(scene.prompt()) - 1
    assert model.generate([1, 2, 3], max_new_tokens=4, ignore_eos=True).tokens == text
    assert len(scenes[0].ask("where?").tokens) <= 16


def test_prompts(model):
    scene = model.scene(pictures())
    asked = scene._question("How many?", choices=["one", "two"])
    assert asked == scene.prompt(
        "These are frames of a video.\nHow many?\nOptions:\nA. one\nB. two\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert scene._question("How many?", task="plain") == scene.prompt("How many?")
    start, end = (model.tokenizer.encode(t)[0] for t in ("<|vision_start|>", "<|vision_end|>"))
    ids = list(scene.prompt())
    assert ids.count(start) == ids.count(end) == 4 and ids[-1] == end


@pytest.mark.parametrize("quant, limit", [(None, 3e-2), ("int8", 5e-2), ("int4", 2e-1)])
def test_narrow_formats(quant, limit):
    with random_spatial(dtype="bf16", quant=quant) as m:
        features = given(m)
        scene = m.scene(pictures(), features=features)
        _, rows, _ = expected(m, scene, features)
        got, want = bf16_to_f32(scene.seen.rows), rows.numpy()
        assert np.sqrt(((got - want) ** 2).mean() / (want**2).mean()) < limit


# ------------------------------------------------------------------------------------------------------ on disk
def write_folder(to, own: bool = False, prefix: str = "") -> None:
    """A checkpoint of variant B with its generator beside it, or its transformer inside."""
    c = VegaConfig.from_json(SPATIAL, frame_size=(30, 20))
    tensors = dict(scene_weights(c).tensors)
    dit, vae = (filled(s, i).tensors for i, s in ((1, dit_shapes(DIT)), (2, vae_shapes(VAE))))
    if prefix:
        names = {k: k.replace("visual.", "model.visual.", 1) if k.startswith("visual.") else k for k in tensors}
        names = {k: n.replace("model.", "model.language_model.", 1) if k.startswith("model.") else n
                 for k, n in names.items()}  # fmt: skip
        tensors = {names[k]: v for k, v in tensors.items()}
    (to / "wan/vae").mkdir(parents=True)
    if own:
        tensors |= {OWN_GENERATOR + k: v for k, v in dit.items()}
        dit = {k: v + 1 for k, v in dit.items()}  # not the ones that count
    save_file({k: np.array(v, order="C") for k, v in tensors.items()}, to / "model.safetensors")
    (to / "config.json").write_text(json.dumps(SPATIAL))
    (to / "tokenizer.json").write_text(tokenizer()._inner.to_str())
    save_file(dit, to / "wan/diffusion_pytorch_model.safetensors")
    save_file(vae, to / "wan/vae/diffusion_pytorch_model.safetensors")
    (to / "wan/vae/config.json").write_text(json.dumps(
        {"base_dim": VAE.dim, "z_dim": VAE.z, "dim_mult": list(VAE.mult), "num_res_blocks": VAE.blocks,
         "latents_mean": list(VAE.mean), "latents_std": list(VAE.std)}))  # fmt: skip
    sizes = {"dim": DIT.dim, "ffn_dim": DIT.ffn, "num_heads": DIT.heads, "num_layers": DIT.layers,
             "in_dim": DIT.channels, "freq_dim": DIT.freq_dim, "text_dim": DIT.text_dim}  # fmt: skip
    (to / "wan/config.json").write_text(json.dumps({"_class_name": "WanModel", "model_type": "t2v"} | sizes))
    prompt = np.random.default_rng(9).standard_normal((1, DIT.text_dim)).astype(np.float32)
    save_file({PROMPT_KEY: prompt}, to / "wan" / PROMPT_FILE)


@pytest.mark.parametrize("own, prefix", [(False, ""), (True, ""), (False, "model.")])
def test_layout_on_disk(tmp_path, own, prefix):
    write_folder(tmp_path, own, prefix)
    with engine.load(tmp_path, device="cpu", frame_size=(30, 20)) as m, random_spatial() as want:
        assert isinstance(m, Vega3D) and m.generator is not None
        assert np.array_equal(m.features(pictures()), want.features(pictures()))
        a, b = (x.scene(pictures()) for x in (m, want))
        assert np.array_equal(a.seen.rows, b.seen.rows)
        assert a.ask("where?").tokens == b.ask("where?").tokens


# ------------------------------------------------------------------------------------------------------ faults
def test_faults(model):
    scene = model.scene(pictures())
    for call, words in (
        (lambda: model.scene(np.zeros((4, 21, 30, 3), np.uint8)), "frame_size=\\(30, 21\\)"),
        (lambda: model.scene(pictures(), **geometry()), "pictures alone"),
        (lambda: scene.caption([0, 0, 0, 1, 1, 1]), "variant A"),
        (lambda: scene.ground("a chair", [[0, 0, 0, 1, 1, 1]]), "variant A"),
        (lambda: scene.ask("where?", situation="I sit."), "variant A"),
        (lambda: scene.ask("where?", task="scanqa"), "task"),
        (lambda: scene.ask("where?", choices=["one"]), "choices"),
        (lambda: scene.ask("where?", choices=["a", "b"], task="plain"), "choices"),
        (lambda: model.fuse(np.zeros((13, 48), np.float32), np.zeros((1, 24, 48), np.float32)), "sem"),
        (lambda: random_spatial(frames=0), "frames=0"),
    ):
        with pytest.raises(InputError, match=words):
            call()
    for change, words in (
        ({"use_generative_encoder": False}, "plain Qwen2.5-VL"),
        ({"generative_merger_type": "avg"}, "generative_merger_type"),
        ({"generative_fusion_method": "concat"}, "generative_fusion_method"),
        ({"rope_scaling": None}, "mrope_section"),
        ({"rope_scaling": {"mrope_section": [1, 2, 2]}}, "mrope_section"),
        ({"vision_config": SPATIAL["vision_config"] | {"window_size": 7}}, "window"),
        ({"vision_config": SPATIAL["vision_config"] | {"fullatt_block_indexes": [9]}}, "fullatt"),
    ):
        with pytest.raises(ConfigError, match=words):
            random_spatial(config=change)


def test_plans_are_static(model):
    model.scene(pictures())
    for name, plan in model.plans.items():
        assert not plan.audit(model.arena).problems, name
