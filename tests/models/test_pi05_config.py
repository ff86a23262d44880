"""config.json of pi0.5: every published spelling, and every refusal by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.blocks.siglip import SiglipConfig
from engine.errors import ConfigError
from engine.models.pi05.config import Gemma, Pi05Config
from engine.models.pi05.weights import shapes, unread

IMAGE = {"type": "VISUAL", "shape": [3, 224, 224]}
BASE = {
    "type": "pi05", "n_obs_steps": 1, "paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m",
    "dtype": "float32", "chunk_size": 50, "n_action_steps": 50, "max_state_dim": 32, "max_action_dim": 32,
    "num_inference_steps": 10, "time_sampling_beta_alpha": 1.5, "min_period": 0.004, "max_period": 4.0,
    "use_relative_actions": False, "relative_exclude_joints": ["gripper"], "action_feature_names": None,
    "rtc_config": None, "image_resolution": [224, 224], "empty_cameras": 0, "tokenizer_max_length": 200,
    "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"},
    "input_features": {
        "observation.images.base_0_rgb": IMAGE, "observation.images.left_wrist_0_rgb": IMAGE,
        "observation.state": {"type": "STATE", "shape": [14]},
    },
    "output_features": {"action": {"type": "ACTION", "shape": [14]}}, "device": "cuda", "optimizer_lr": 2.5e-05,
}  # fmt: skip
WANT = Pi05Config.from_json(BASE)


def base(*drop: str, **more):
    return {k: v for k, v in BASE.items() if k not in drop} | more


def test_published_values():
    assert WANT.vision == SiglipConfig(1152, 27, 16, 4304, 14, 224)
    assert (WANT.vision.tokens, WANT.vision.head_dim) == (256, 72)
    assert WANT.trunk == Gemma(2048, 18, 16384, 8, 1, 256)
    assert WANT.expert == Gemma(1024, 18, 4096, 8, 1, 256)
    assert (WANT.vocab_size, WANT.action_dim, WANT.horizon, WANT.steps) == (257152, 32, 50, 10)
    assert (WANT.state_dim, WANT.robot_dim) == (14, 14)
    assert WANT.image_keys == ("observation.images.base_0_rgb", "observation.images.left_wrist_0_rgb")
    assert WANT.extra["device"] == "cuda" and "chunk_size" not in WANT.extra


def test_equal_configurations_are_one_key():
    assert {WANT: 1}[Pi05Config.from_json(copy.deepcopy(BASE))] == 1


def test_published_sizes():
    """Parameters of the published model, part by part."""
    count = dict.fromkeys(shapes(WANT), 1)
    for name, shape in shapes(WANT).items():
        for side in shape:
            count[name] *= side

    def total(*parts: str) -> int:
        return sum(n for name, n in count.items() if any(part in name for part in parts))

    assert total("vision_tower") == 412_442_352
    assert total("multi_modal_projector") == 2_361_344
    assert total("embed_tokens") == 526_647_296
    assert total("language_model.layers") == 1_981_884_416 - 2048  # the final norm, which nothing reads
    assert total("gemma_expert") == 427_932_672
    assert sum(n for name, n in count.items() if ".dense." in name) == 116_505_600
    assert total("action_in_proj", "action_out_proj", "time_mlp") == 2_165_792
    assert len(unread(WANT)) == 6


def test_openpi_spelling():
    raw = {"action_dim": 32, "action_horizon": 10, "paligemma_variant": "gemma_2b",
           "action_expert_variant": "gemma_300m_lora", "precision": "bfloat16"}  # fmt: skip
    config = Pi05Config.from_json(raw)
    assert (config.trunk, config.expert, config.vision) == (WANT.trunk, WANT.expert, WANT.vision)
    assert (config.horizon, config.n_action_steps, config.dtype) == (10, 10, "bfloat16")
    assert config.image_keys == ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    assert "chunk_size" not in config.assumed and "num_inference_steps" in config.assumed
    small = Pi05Config.from_json(raw | {"paligemma_variant": "dummy", "action_expert_variant": "dummy"})
    assert small.trunk == small.expert == Gemma(64, 4, 128, 8, 1, 16)


@pytest.mark.parametrize(
    "raw",
    [
        base("dtype", "n_action_steps", "max_state_dim", "rtc_config", "image_resolution"),
        base("paligemma_variant", "action_expert_variant"),
        base("type", model_type="pi05"),
        base(num_attention_heads=8, vision_num_heads=16, head_dim=256, image_size=224, vocab_size=257152),
        base("chunk_size", "max_action_dim", action_horizon=50, action_dim=32),
        base(action_horizon=50),
        base(min_period=None, max_period=None, normalization_mapping=None),
        base(normalization_mapping={"VISUAL": "IDENTITY", "ENV": "MIN_MAX"}),
    ],
)
def test_every_spelling_gives_the_same(raw):
    assert Pi05Config.from_json(raw) == WANT


def test_written_file_gives_the_same():
    assert Pi05Config.from_json(json.loads(json.dumps(WANT.to_json()))) == WANT
    other = Pi05Config.from_json(
        base("input_features", "output_features", relative_exclude_joints=[], empty_cameras=1, chunk_size=9,
             n_action_steps=3, action_feature_names=["a", "b"], use_relative_actions=True)
    )  # fmt: skip
    assert Pi05Config.from_json(other.to_json()) == other
    assert other.relative_exclude_joints == () and other.robot_dim is None


def test_cameras_keep_their_order():
    names = ["observation.images.z", "observation.images.a", "observation.images.empty_camera_0"]
    features = dict.fromkeys(names[:2], IMAGE)
    assert Pi05Config.from_json(base(input_features=features, empty_cameras=1)).image_keys == tuple(names)
    saved = features | {names[2]: IMAGE}  # lerobot adds the empty ones to the file
    assert Pi05Config.from_json(base(input_features=saved, empty_cameras=1)).image_keys == tuple(names)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"type": "pi0"}, "type is 'pi0'; this model reads pi05"),
        ({"chunk_size": 0}, "chunk_size = 0; an integer from 1 to"),
        ({"chunk_size": True}, "chunk_size = True"),
        ({"chunk_size": 50.0}, "chunk_size = 50.0"),
        ({"chunk_size": 2**70}, "chunk_size = "),
        ({"action_horizon": 10}, "action_horizon = 10 and chunk_size = 50 disagree"),
        ({"n_action_steps": 51}, "n_action_steps = 51 is more than chunk_size = 50"),
        ({"num_inference_steps": -1}, "num_inference_steps = -1"),
        ({"max_action_dim": 10**9}, "max_action_dim = 1000000000"),
        ({"max_action_dim": 8}, "output_features.action has 14 values, max_action_dim is 8"),
        ({"paligemma_variant": "gemma_7b"}, "paligemma_variant = 'gemma_7b'; one of gemma_2b"),
        ({"paligemma_variant": ["gemma_2b"]}, "paligemma_variant"),
        ({"action_expert_variant": "dummy"}, "num_hidden_layers = 18, action_expert_variant dummy gives 4"),
        ({"num_attention_heads": 4}, "config key num_attention_heads gives num_attention_heads = 4, paligemma"),
        ({"hidden_size": 1024}, "hidden_size = 1024, paligemma_variant gemma_2b gives 2048"),
        ({"vision_num_heads": 7}, "vision_hidden_size = 1152 is not a multiple of vision_num_heads = 7"),
        ({"patch_size": 15}, "image_size = 224 is not a multiple of patch_size = 15"),
        ({"image_resolution": [224, 448]}, "height must equal width"),
        ({"image_resolution": [224]}, "height and width are needed"),
        ({"image_resolution": 224}, "height and width are needed"),
        ({"image_resolution": [224, "224"]}, "image_resolution = '224'"),
        ({"image_resolution": [256, 256], "image_size": 224}, "image_size = 224, .* gives 256"),
        ({"min_period": 5.0}, "min_period = 5 is not below max_period = 4"),
        ({"min_period": 0}, "min_period = 0"),
        ({"max_period": float("nan")}, "max_period = nan"),
        ({"dtype": "int8"}, "dtype = 'int8'"),
        ({"precision": "bfloat16"}, "precision = 'bfloat16' and dtype = 'float32' disagree"),
        ({"normalization_mapping": {"STATE": "LOG"}}, "normalization_mapping.STATE = 'LOG'; one of IDENTITY"),
        ({"normalization_mapping": []}, "normalization_mapping"),
        ({"input_features": {"observation.state": {"type": "STATE", "shape": [3]}}}, "names no camera"),
        ({"input_features": {"x": {"type": "SOUND", "shape": [3]}}}, "input_features.x.type = 'SOUND'"),
        ({"input_features": {"x": {"type": "VISUAL", "shape": [-3]}}}, "input_features.x.shape = -3"),
        ({"input_features": {"x": {"type": "VISUAL", "shape": "3"}}}, "input_features.x.shape"),
        ({"input_features": {"x": 3}}, "input_features.x = 3"),
        ({"input_features": [1]}, "input_features = "),
        ({"output_features": {"action": {"type": "ACTION", "shape": [40]}}}, "has 40 values"),
        ({"use_relative_actions": 1}, "use_relative_actions = 1; true or false"),
        ({"relative_exclude_joints": "gripper"}, "relative_exclude_joints"),
        ({"action_feature_names": [1]}, "action_feature_names"),
        ({"empty_cameras": 1000}, "empty_cameras = 1000"),
        ({"tokenizer_max_length": 0}, "tokenizer_max_length = 0"),
    ],
)
def test_refused_by_name(more, says):
    with pytest.raises(ConfigError, match=says):
        Pi05Config.from_json(base(**more))


def test_odd_widths_are_refused():
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 8, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 8, "expert_hidden_size": 16,
             "expert_intermediate_size": 8}  # fmt: skip
    raw = base("paligemma_variant", "action_expert_variant")
    assert Pi05Config.from_json(raw | sizes).trunk == Gemma(64, 2, 8, 2, 1, 8)
    for key in ("head_dim", "expert_hidden_size"):
        with pytest.raises(ConfigError, match=f"{key} = 7 is odd"):
            Pi05Config.from_json(raw | sizes | {key: 7})
    with pytest.raises(ConfigError, match="num_attention_heads = 2 is not a multiple of num_key_value_heads = 3"):
        Pi05Config.from_json(raw | sizes | {"num_key_value_heads": 3})
    with pytest.raises(ConfigError, match="parameters"):
        Pi05Config.from_json(raw | sizes | {"hidden_size": 1 << 17, "intermediate_size": 1 << 20,
                                            "num_hidden_layers": 1024})  # fmt: skip


def test_folders(tmp_path: Path):
    with pytest.raises(ConfigError, match="is not a folder"):
        Pi05Config.from_folder(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"neither config.json nor model.safetensors"):
        Pi05Config.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    assert Pi05Config.from_folder(tmp_path) == WANT
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not usable JSON"):
        Pi05Config.from_folder(tmp_path)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**80), 2**80), st.floats(), st.text(max_size=6)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=2)),
    max_leaves=6,
)
KEYS = [*BASE, "action_horizon", "action_dim", "precision", "hidden_size", "vision_num_heads", "patch_size", "head_dim"]


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=3), st.sets(st.sampled_from(KEYS), max_size=2))
def test_fuzz_config(more, drop):
    try:
        config = Pi05Config.from_json(base(*drop, **more))
    except ConfigError:
        return
    assert Pi05Config.from_json(config.to_json()) == config


@settings(max_examples=100, deadline=None)
@given(JSON)
def test_fuzz_whole_document(value):
    with pytest.raises(ConfigError):
        Pi05Config.from_json(value)
