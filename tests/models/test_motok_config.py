"""MoTok's configuration: presets, round trips, refusals by name."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from _motok_tiny import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.models.motok.config import MoTokConfig

FULL = MoTokConfig.humanml3d()
VARIANTS = [MoTokConfig.humanml3d(1), FULL, MoTokConfig.humanml3d(3), MoTokConfig.kit()]
VARIANT_NAMES = ["DR2", "DR4", "DR8", "KIT"]


# ---- configuration ----------------------------------------------------------------------------------------------


def test_defaults() -> None:
    assert MoTokConfig.from_json({}) == FULL == MoTokConfig()
    assert (FULL.rate, FULL.max_tokens, FULL.ar.block, FULL.denoiser.kernel) == (4, 49, 51, 5)
    fast, slow, kit = VARIANTS[0], VARIANTS[2], VARIANTS[3]
    assert (fast.rate, fast.max_tokens, fast.ar.block, fast.denoiser.kernel) == (2, 98, 100, 7)
    assert (fast.ddm.cfg, fast.ar.cfg) == (3.2, 3.2)
    assert (slow.rate, slow.max_tokens, slow.ar.block, slow.denoiser.kernel) == (8, 24, 26, 5)
    assert (slow.ddm.cfg, slow.ar.cfg) == (2.0, 1.8)
    assert (kit.features, kit.joints, kit.fps, kit.min_frames, kit.unit) == (251, 21, 12.5, 24, "mm")
    assert (kit.scale, kit.traj.channels, kit.ar.block, kit.max_frames) == (0.001, 63, 51, 196)
    assert {FULL: 1}[MoTokConfig.from_json(json.loads("{}"))] == 1


@pytest.mark.parametrize("c", [*VARIANTS, tiny(), tiny(joints=5, traj={"hint_mask_channels": True})])
def test_round_trip(c: MoTokConfig, tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(c.to_json()))
    assert MoTokConfig.from_folder(tmp_path) == c


def test_sizes_that_follow_from_others() -> None:
    c = tiny(joints=5)
    assert (c.features, c.traj.channels, c.ar.block) == (59, 15, 18)


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        ([], "config.json"), (None, "config.json"), ({"dataset": "amass"}, "dataset"), ({"dataset": None}, "dataset"),
        ({"D": 262}, "D = 262"), ({"D": 263.0}, "D"), ({"joints": 21, "D": 263}, "D = 263"),
        ({"joints": True}, "joints"),
        ({"fps": 0}, "fps"), ({"fps": math.nan}, "fps"), ({"fps": math.inf}, "fps"), ({"unit": "cm"}, "unit"),
        ({"max_frames": 0}, "max_frames"), ({"max_frames": 39}, "min_frames"), ({"min_frames": -1}, "min_frames"),
        ({"max_frames": 3, "min_frames": 1}, "max_frames = 3"),
        ({"down_t": 7}, "down_t"), ({"down_t": -1}, "down_t"), ({"down_t": "2"}, "down_t"),
        ({"width": 0}, "width"), ({"width": 10**9}, "width"), ({"depth": 17}, "depth"), ({"latent": []}, "latent"),
        ({"codes": 1}, "codes"), ({"hidden": 3}, "'hidden'"), ({"x" * 500: 3}, "is not known"),
        ({"denoiser": 6}, "denoiser"), ({"denoiser": {"kernel": 4}}, "denoiser.kernel"),
        ({"denoiser": {"kernel": -1}}, "denoiser.kernel"), ({"denoiser": {"t_embed": 255}}, "denoiser.t_embed"),
        ({"denoiser": {"heads": 2}}, "'denoiser.heads'"), ({"denoiser": {"blocks": None}}, "denoiser.blocks"),
        ({"diffusion": {"steps": 0}}, "diffusion.steps"), ({"diffusion": {"steps": 500}}, "diffusion.timesteps"),
        ({"diffusion": {"beta_schedule": "sqrt"}}, "diffusion.beta_schedule"),
        ({"diffusion": {"sampler": "plms"}}, "diffusion.sampler"),
        ({"diffusion": {"variance": 1}}, "diffusion.variance"),
        ({"diffusion": {"timesteps": []}}, "diffusion.timesteps"),
        ({"diffusion": {"timesteps": 27}}, "diffusion.timesteps"),
        ({"diffusion": {"timesteps": [0, 5, 5]}}, r"diffusion.timesteps\[2\]"),
        ({"diffusion": {"timesteps": [5, 0]}}, r"diffusion.timesteps\[1\]"),
        ({"diffusion": {"timesteps": [0, 1.5]}}, r"diffusion.timesteps\[1\]"),
        ({"diffusion": {"timesteps": [-1]}}, r"diffusion.timesteps\[0\]"),
        ({"ddm": {"heads": 7}}, "ddm.heads"), ({"ddm": {"dim": 385, "heads": 5}}, "ddm.dim"),
        ({"ddm": {"topk_ratio": 1.1}}, "ddm.topk_ratio"), ({"ddm": {"temperature": 0}}, "ddm.temperature"),
        ({"ddm": {"cfg": -1}}, "ddm.cfg"), ({"ddm": {"steps": 0}}, "ddm.steps"), ({"ddm": {"cfg": "2"}}, "ddm.cfg"),
        ({"ar": {"heads": 5}}, "ar.heads"), ({"ar": {"block": 49}}, "ar.block"), ({"ar": {"layers": 9}}, "'ar.layers'"),
        ({"ar": {"layers_head": -1}}, "ar.layers_head"), ({"traj": {"in": 65}}, "traj.in"),
        ({"traj": {"in": 66, "hint_mask_channels": True}}, "traj.in"),
        ({"traj": {"hint_mask_channels": 1}}, "traj.hint_mask_channels"),
        ({"traj": {"channels": 66}}, "'traj.channels'"),
        ({"guidance": {"solver": "adam"}}, "guidance.solver"), ({"guidance": {"on": "x"}}, "guidance.on"),
        ({"guidance": {"history": 0}}, "guidance.history"), ({"guidance": {"max_iter": 0}}, "guidance.max_iter"),
        ({"guidance": {"eta": 0}}, "guidance.eta"), ({"guidance": {"max_evals": -1}}, "guidance.max_evals"),
        ({"clip": {"heads": 7}}, "clip.heads"), ({"clip": {"ctx": 1}}, "clip.ctx"),
        ({"cfg_alternate": "odd"}, "cfg_alternate"),
        ({"width": 16384, "latent": 16384, "denoiser": {"width": 16384, "blocks": 128, "kernel": 63}}, "parameters"),
    ],
)  # fmt: skip
def test_what_a_configuration_refuses(raw: Any, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        MoTokConfig.from_json(raw)


def test_files_that_are_no_configuration(tmp_path) -> None:
    with pytest.raises(ConfigError, match="not a folder"):
        MoTokConfig.from_folder(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        MoTokConfig.from_folder(tmp_path)
    for text in ("{", '{"width": 512, "width": 256}', "[1]", '{"D": NaN}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError):
            MoTokConfig.from_folder(tmp_path)


KEYS = FULL.to_json()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(list(KEYS)), JSON, max_size=3), st.data())
def test_hostile_values_are_config_errors(raw: dict[str, Any], data: st.DataObject) -> None:
    part = data.draw(st.sampled_from([k for k, v in KEYS.items() if isinstance(v, dict)]))
    inner = data.draw(st.dictionaries(st.sampled_from(list(KEYS[part])), JSON, max_size=2))
    try:
        c = MoTokConfig.from_json({**raw, part: inner})
    except ConfigError:
        return
    assert MoTokConfig.from_json(c.to_json()) == c
