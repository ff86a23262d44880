"""config.json of X-VLA: both published spellings, and every refusal by name."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.models.xvla.config import Bart, Transformer, XVLAConfig
from engine.models.xvla.weights import shapes

TEXT = {
    "model_type": "florence2_language", "d_model": 1024, "encoder_layers": 12, "encoder_attention_heads": 16,
    "encoder_ffn_dim": 4096, "vocab_size": 51289, "max_position_embeddings": 4096, "scale_embedding": False,
    "activation_function": "gelu", "decoder_layers": 12,
}  # fmt: skip
VISION = {
    "model_type": "davit", "dim_embed": [256, 512, 1024, 2048], "num_heads": [8, 16, 32, 64],
    "num_groups": [8, 16, 32, 64], "depths": [1, 1, 9, 1], "window_size": 12, "projection_dim": 1024,
    "patch_size": [7, 3, 3, 3], "patch_stride": [4, 2, 2, 2], "patch_padding": [3, 1, 1, 1],
    "patch_prenorm": [False, True, True, True], "drop_path_rate": 0.1,
    "visual_temporal_embedding": {"type": "COSINE", "max_temporal_embeddings": 100},
    "image_pos_embed": {"type": "learned_abs_2d", "max_pos_embeddings": 50},
    "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"],
}  # fmt: skip
POLICY = {"hidden_size": 1024, "depth": 24, "num_heads": 16, "mlp_ratio": 4.0, "num_domains": 30,
          "len_soft_prompts": 32, "dim_time": 32, "max_len_seq": 512, "use_hetero_proj": False}  # fmt: skip
IMAGE = {"type": "VISUAL", "shape": [3, 224, 224]}
LEROBOT = {
    "type": "xvla", "chunk_size": 30, "n_action_steps": 30, "dtype": "float32",
    "florence_config": {"text_config": TEXT, "vision_config": VISION, "vocab_size": 51289},
    "tokenizer_name": "facebook/bart-large", "tokenizer_max_length": 64, "tokenizer_padding_side": "right",
    "pad_language_to": "max_length", **POLICY, "action_mode": "ee6d", "num_denoising_steps": 10, "use_proprio": True,
    "max_state_dim": 20, "max_action_dim": 20, "domain_feature_key": None, "resize_imgs_with_padding": [224, 224],
    "num_image_views": 3, "empty_cameras": 0,
    "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "IDENTITY", "ACTION": "IDENTITY"},
    "input_features": {"observation.images.image": IMAGE, "observation.images.image2": IMAGE,
                       "observation.state": {"type": "STATE", "shape": [8]}},
    "output_features": {"action": {"type": "ACTION", "shape": [20]}},
}  # fmt: skip
AUTHORS = {
    "model_type": "xvla", "architectures": ["XVLA"], "num_actions": 30, "action_mode": "ee6d", "use_proprio": True,
    **POLICY, "florence_config": {"text_config": TEXT, "vision_config": VISION, "projection_dim": 1024},
}  # fmt: skip
WANT = XVLAConfig.from_json(LEROBOT)


def lerobot(*drop: str, **more):
    return {k: v for k, v in LEROBOT.items() if k not in drop} | more


def florence(text: dict | None = None, vision: dict | None = None):
    return lerobot(florence_config={"text_config": TEXT | (text or {}), "vision_config": VISION | (vision or {})})


def test_published_values():
    assert WANT.language == Bart(1024, 12, 16, 4096, 51289, 4096)
    assert WANT.policy == Transformer(1024, 24, 16, 4096)
    assert WANT.vision.grids == [(56, 56), (28, 28), (14, 14), (7, 7)]
    assert (WANT.vision.tokens, WANT.context, WANT.sequence) == (50, 214, 276)
    assert (WANT.action_dim, WANT.robot_dim, WANT.proprio_dim, WANT.horizon) == (20, 20, 20, 30)
    assert WANT.grippers == (9, 19) and WANT.num_views == 3 and WANT.state_dim == 8


def test_equal_configurations_are_one_key():
    assert {WANT: 1}[XVLAConfig.from_json(copy.deepcopy(LEROBOT))] == 1


def test_published_sizes():
    """879,482,456 parameters; the frame table is a constant."""
    total = {name: math.prod(shape) for name, shape in shapes(WANT).items() if "pos_idx_to_embed" not in name}
    assert len(shapes(WANT)) == 902  # the file has the token embedding twice
    assert sum(n for k, n in total.items() if "vision_tower" in k) == 360_632_320
    assert sum(n for k, n in total.items() if "language_model" in k) == 207_873_024
    assert sum(total.values()) == 879_482_456


def test_spelling_of_the_authors():
    config = XVLAConfig.from_json(AUTHORS)
    assert (config.vision, config.language, config.policy) == (WANT.vision, WANT.language, WANT.policy)
    assert (config.horizon, config.proprio_dim, config.num_views, config.tokenizer_max_length) == (30, 20, 3, 50)
    assert config.sequence == 262
    assert {"max_state_dim", "tokenizer_max_length", "num_denoising_steps"} <= set(config.assumed)
    assert config.image_keys == ("image0", "image1", "image2")


@pytest.mark.parametrize(
    "raw",
    [
        lerobot("dtype", "mlp_ratio", "num_denoising_steps", "use_hetero_proj", "hidden_size", "depth"),
        lerobot("type", model_type="xvla"),
        lerobot("florence_config"),
        lerobot(florence_config={**TEXT, "vision_config": VISION}),
        lerobot(mlp_dim=4096),
        lerobot(num_actions=30),
        lerobot("tokenizer_name", "n_action_steps", "normalization_mapping"),
        florence(vision={"visual_temporal_embedding": {"type": "COSINE", "max": 100}, "mlp_ratio": 4.0}),
        florence(vision={"dim_embed": None, "embed_dim": VISION["dim_embed"], "image_pos_embed": None,
                         "max_position_embeddings": 50, "visual_temporal_embedding": None,
                         "max_temporal_embeddings": 100}),
    ],
)  # fmt: skip
def test_every_spelling_gives_the_same(raw):
    before = copy.deepcopy(raw)
    assert XVLAConfig.from_json(raw) == WANT
    assert raw == before


def test_written_file_gives_the_same():
    for config in (WANT, XVLAConfig.from_json(AUTHORS)):
        assert XVLAConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    odd = XVLAConfig.from_json(lerobot(use_proprio=False, max_state_dim=None, action_mode="auto", max_action_dim=9,
                                       output_features={"action": {"type": "ACTION", "shape": [5]}},
                                       resize_imgs_with_padding=None, len_soft_prompts=0))  # fmt: skip
    assert (odd.proprio_dim, odd.action_dim, odd.robot_dim, odd.grippers) == (0, 9, 5, ())
    assert XVLAConfig.from_json(odd.to_json()) == odd


def test_views():
    """As many slots as stated, at least one per camera, empty cameras counted on top."""
    assert XVLAConfig.from_json(lerobot(num_image_views=None)).num_views == 2
    assert XVLAConfig.from_json(lerobot(num_image_views=1, empty_cameras=2)).num_views == 4
    config = XVLAConfig.from_json(lerobot(empty_cameras=1))
    assert config.image_keys[2:] == ("observation.images.empty_camera_0",)
    assert XVLAConfig.from_json(config.to_json()) == config


def test_image_size():
    size = {"observation.images.image": {"type": "VISUAL", "shape": [3, 96, 128]}}
    assert XVLAConfig.from_json(lerobot(resize_imgs_with_padding=None, input_features=size)).vision.image_size == (
        96,
        128,
    )
    assert XVLAConfig.from_json(lerobot(input_features=size)).vision.image_size == (224, 224)
    assert XVLAConfig.from_json(lerobot(image_resolution=[64, 64])).vision.tokens == 5
    assert XVLAConfig.from_json(lerobot(image_resolution=[256, 256])).vision.tokens == 65


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (lerobot(type="pi05"), "type is 'pi05'; this model reads xvla"),
        (lerobot("type"), "type is None"),
        (lerobot(num_actions=20), "num_actions = 20 and chunk_size = 30 disagree"),
        (lerobot(chunk_size=0), "chunk_size = 0"),
        (lerobot(chunk_size="30"), "chunk_size = '30'"),
        (lerobot(n_action_steps=31), "n_action_steps = 31 is more than chunk_size = 30"),
        (lerobot(chunk_size=400), "actions, images and text are 614 tokens, max_len_seq is 512"),
        (lerobot(num_image_views=9), "max_len_seq is 512"),
        (lerobot(hidden_size=2**40), "hidden_size = 1099511627776"),
        (lerobot(num_heads=7), "hidden_size = 1024 is not a multiple of num_heads = 7"),
        (lerobot(mlp_dim=4095), "config key mlp_dim gives mlp_dim = 4095, config key mlp_ratio gives 4096"),
        (lerobot(mlp_ratio=-1), "mlp_ratio = -1"),
        (lerobot(mlp_ratio=math.inf), "mlp_ratio = inf"),
        (lerobot(dim_time=31), "dim_time = 31 is odd"),
        (lerobot(len_soft_prompts=True), "len_soft_prompts = True"),
        (lerobot(action_mode="hand"), "action_mode = 'hand'; one of ee6d"),
        (lerobot(action_mode=["ee6d"]), "action_mode"),
        (lerobot(action_mode="auto", max_action_dim=0), "max_action_dim = 0"),
        (lerobot(action_mode="auto", max_action_dim=9), "output_features.action has 20 values, .* have 9"),
        (lerobot(max_state_dim=-1), "max_state_dim = -1"),
        (lerobot(use_proprio="yes"), "use_proprio = 'yes'"),
        (lerobot(resize_imgs_with_padding=[224]), "height and width"),
        (lerobot(resize_imgs_with_padding=[2000, 2000]), "the position tables end at 50"),
        (lerobot(image_resolution=[0, 4]), "image_resolution = 0"),
        (lerobot(input_features={"observation.state": {"type": "STATE", "shape": [8]}}), "names no camera"),
        (lerobot(resize_imgs_with_padding=None, input_features={"a": {"type": "VISUAL", "shape": [9]}}), "a.shape"),
        (lerobot(tokenizer_max_length=4090), "max_position_embeddings is 4096"),
        (lerobot(tokenizer_padding_side="top"), "tokenizer_padding_side = 'top'"),
        (lerobot(tokenizer_name=3), "tokenizer_name = 3"),
        (lerobot(normalization_mapping={"ACTION": "MEAN"}), "normalization_mapping.ACTION = 'MEAN'"),
        (lerobot(dtype="int4"), "dtype = 'int4'"),
        (lerobot(florence_config=[]), "florence_config = "),
        (lerobot(florence_config={"vision_config": 3}), "florence_config.vision_config = 3"),
        (florence(text={"d_model": 512}), "d_model = 512, config key vision_config.projection_dim gives 1024"),
        (florence(text={"encoder_attention_heads": 3}), "d_model = 1024 is not a multiple of"),
        (florence(text={"activation_function": "relu"}), "text_config.activation_function = 'relu'"),
        (florence(text={"scale_embedding": True}), "text_config.scale_embedding = True is not supported"),
        (florence(text={"encoder_layers": 0}), "encoder_layers = 0"),
        (florence(vision={"dim_embed": [256]}), "depths has 4 stages, other keys have 1"),
        (florence(vision={"dim_embed": 256}), "vision_config.dim_embed = 256; one size per stage"),
        (florence(vision={"dim_embed": [256, 512, 1024, "2048"]}), r"dim_embed\[3\] = '2048'"),
        (florence(vision={"num_heads": [7, 16, 32, 64]}), r"dim_embed\[0\] = 256 is not a multiple of num_heads\[0\]"),
        (florence(vision={"num_groups": [8, 16, 32, 63]}), r"num_groups\[3\] = 63"),
        (florence(vision={"window_size": 0}), "window_size = 0"),
        (florence(vision={"patch_prenorm": [True] * 4}), "patch_prenorm"),
        (florence(vision={"patch_stride": [4, 2, 2, 0]}), r"patch_stride\[3\] = 0"),
        (florence(vision={"patch_size": [64] * 4, "patch_padding": [0] * 4}), "leave nothing for stage"),
        (florence(vision={"qkv_bias": False}), "vision_config.qkv_bias = False"),
        (florence(vision={"image_feature_source": ["last_frame"]}), "image_feature_source"),
        (florence(vision={"image_pos_embed": {"type": "sine"}}), "only type 'learned_abs_2d'"),
        (florence(vision={"visual_temporal_embedding": 3}), "only type 'COSINE'"),
        (florence(vision={"mlp_ratio": "4"}), "vision_config.mlp_ratio"),
    ],
)
def test_refused_by_name(raw, says):
    with pytest.raises(ConfigError, match=says):
        XVLAConfig.from_json(raw)


def test_folders(tmp_path: Path):
    with pytest.raises(ConfigError, match="is not a folder"):
        XVLAConfig.from_folder(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"neither config.json nor model.safetensors"):
        XVLAConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LEROBOT))
    assert XVLAConfig.from_folder(tmp_path) == WANT
    (tmp_path / "policy_preprocessor.json").write_text('{"steps": 3}')
    with pytest.raises(ConfigError, match="no list of at most 64 steps"):
        XVLAConfig.from_folder(tmp_path)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**80), 2**80), st.floats(), st.text(max_size=6)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=2)),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.sampled_from([*LEROBOT, "num_actions", "image_resolution"]), JSON, max_size=2),
    st.dictionaries(st.sampled_from([*TEXT]), JSON, max_size=1),
    st.dictionaries(st.sampled_from([*VISION, "mlp", "mlp_ratio", "embed_dim"]), JSON, max_size=2),
    st.sets(st.sampled_from([*LEROBOT]), max_size=2),
)
def test_fuzz_config(more, text, vision, drop):
    try:
        config = XVLAConfig.from_json({k: v for k, v in florence(text, vision).items() if k not in drop} | more)
    except ConfigError:
        return
    assert XVLAConfig.from_json(config.to_json()) == config


@settings(max_examples=100, deadline=None)
@given(JSON)
def test_fuzz_whole_document(value):
    with pytest.raises(ConfigError):
        XVLAConfig.from_json(value)
