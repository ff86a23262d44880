"""Every published layout of the two flow policies is read to the same model; what does not belong is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from _faster import (
    PI05_JSON,
    SMALL_XVLA,
    XVLA_JSON,
    golden,
    pi05_golden,
    pi05_source,
    small_pi05,
    small_xvla,
    table,
    write_folder,
    xvla_golden,
    xvla_source,
)  # fmt: skip

from engine.errors import CheckpointError, ConfigError
from engine.io.checkpoint import Checkpoint
from engine.models.pi05 import weights as pi05
from engine.models.pi05.config import EXPERT, TRUNK, Pi05Config
from engine.models.pi05.reference import Pi05Reference
from engine.models.xvla import weights as xvla
from engine.models.xvla.config import LANGUAGE, PROJECTOR, XVLAConfig
from engine.models.xvla.reference import XVLAReference

HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
EMBED = f"{TRUNK}embed_tokens.weight"


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    x, y = tensors(a), tensors(b)
    return x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x)


def prefixed(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"model.{name}": value for name, value in t.items()}


# ---- pi0.5 ------------------------------------------------------------------------------------------------------


def pi05_layout(layout: str, t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    t, width = dict(t), t["time_mlp_in.weight"].shape[0]
    if layout == "openpi":  # no prefix, the embedding only as the head
        t[HEAD] = t.pop(EMBED)
    if layout == "both embeddings":
        t[HEAD] = t[EMBED].clone()
    if layout == "left-overs":
        for name in ("in", "out"):
            for kind in ("weight", "bias"):
                t[f"action_time_mlp_{name}.{kind}"] = t.pop(f"time_mlp_{name}.{kind}")
        t["state_proj.weight"] = torch.zeros(width, 32)
        t["state_proj.bias"] = torch.zeros(width)
        t["paligemma_with_expert.gemma_expert.lm_head.weight"] = torch.zeros(7, width)
        t[f"{EXPERT}norm.weight"] = torch.zeros(width)
        t[f"{EXPERT}layers.0.input_layernorm.weight"] = torch.zeros(width)
        t[f"{TRUNK}norm.weight"] = torch.zeros(3)
    return t if layout == "openpi" else prefixed(t)


@pytest.mark.parametrize("layout", ["lerobot", "openpi", "both embeddings", "left-overs"])
@torch.no_grad()
def test_pi05_layouts(tmp_path: Path, layout: str) -> None:
    io, want = golden("pi05"), pi05_golden()
    write_folder(tmp_path, PI05_JSON, pi05_layout(layout, tensors(want)))
    model = Pi05Reference.from_folder(tmp_path)
    assert equal(model, want)
    if layout == "openpi":
        cache = model.prefill(*model.prefix(*(io[n] for n in ("images", "image_mask", "tokens", "token_mask")), True))
        assert (model.steps(cache, io["noise"], table(50, 0.6))[-1] - io["out_has"]).abs().max() <= 5e-5
    with Checkpoint(tmp_path) as source:
        assert len(pi05.canonical(source).skipped) == {"both embeddings": 1, "left-overs": 6}.get(layout, 0)


def test_pi05_golden_file_is_read() -> None:
    with pi05_source() as source:
        view = pi05.checked(pi05_golden().config, source)
        assert set(view.keys()) == set(pi05.shapes(pi05_golden().config))
        assert len(view.skipped) == 1  # the trunk's final norm


def test_pi05_sizes_from_tensors_alone(tmp_path: Path) -> None:
    """No config.json, as openpi and FASTER leave their folders."""
    write_folder(tmp_path, None, tensors(pi05_golden()))
    config = Pi05Config.from_folder(tmp_path)
    assert (config.trunk, config.expert) == (pi05_golden().config.trunk, pi05_golden().config.expert)
    assert (config.vision.image_size, config.action_dim, config.horizon, config.vision.heads) == (224, 32, 50, 16)
    assert {"chunk_size", "num_attention_heads", "vision_num_heads", "num_inference_steps"} <= set(config.assumed)


def test_mixed_dtypes(tmp_path: Path) -> None:
    model = small_pi05()
    half = {n: p if "norm" in n else p.bfloat16() for n, p in tensors(model).items()}
    write_folder(tmp_path, model.config.to_json(), prefixed(half))
    loaded = Pi05Reference.from_folder(tmp_path)
    assert all(torch.equal(p, half[n].float()) for n, p in tensors(loaded).items())
    assert Pi05Reference.from_folder(tmp_path, torch.float64).dtype == torch.float64


@pytest.mark.parametrize("seed", range(3))
def test_pi05_written_config_is_read_back(tmp_path: Path, seed: int) -> None:
    changes = [{}, {"max_state_dim": 9, "empty_cameras": 1}, {"head_dim": 8, "num_key_value_heads": 4}][seed]
    model = small_pi05(seed, **changes)
    write_folder(tmp_path, model.config.to_json(), tensors(model))
    assert Pi05Config.from_folder(tmp_path) == model.config
    assert equal(Pi05Reference.from_folder(tmp_path), model)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("action_out_proj.bias"), "action_out_proj.bias .* is missing"),
        (lambda t: t.update({"extra.weight": torch.zeros(2)}), "extra.weight is not part of the model"),
        (lambda t: t.update({"time_mlp_in.weight": torch.zeros(3, 3)}), r"time_mlp_in.weight has shape \[3, 3\]"),
        (lambda t: t.pop(EMBED), "embed_tokens"),
        (lambda t: t.update({"model.time_mlp_in.bias": torch.zeros(16)}), "both give tensor 'time_mlp_in.bias'"),
        (lambda t: t.update({"action_in_proj.weight": torch.zeros(16)}), "2 sizes above zero"),
        (lambda t: t.update({"action_in_proj.weight": torch.zeros(16, 0)}), "2 sizes above zero"),
    ],
)
def test_pi05_faults_are_named(tmp_path: Path, change, says: str) -> None:
    model = small_pi05()
    t = tensors(model)
    change(t)
    write_folder(tmp_path, model.config.to_json(), t)
    with pytest.raises(CheckpointError, match=says):
        Pi05Reference.from_folder(tmp_path)


def test_pi0_is_refused(tmp_path: Path) -> None:
    t = {n: p for n, p in tensors(small_pi05()).items() if ".dense." not in n}
    t[f"{EXPERT}norm.weight"] = torch.zeros(16)
    write_folder(tmp_path, None, t)
    with pytest.raises(CheckpointError, match=r"weights of pi0; this model reads pi0\.5"):
        Pi05Config.from_folder(tmp_path)


def test_config_must_agree_with_tensors(tmp_path: Path) -> None:
    t = tensors(small_pi05())
    for raw, says in (
        ({"paligemma_variant": "gemma_2b"}, "paligemma_variant gemma_2b gives num_hidden_layers = 18, .* gives 3"),
        ({"max_action_dim": 32}, "max_action_dim = 32, tensor action_in_proj.weight gives 5"),
        ({"image_resolution": [224, 224]}, "image_size = 224, tensor .*position_embedding.* gives 20"),
        ({"num_attention_heads": 5}, "num_attention_heads = 5 does not fit q_proj with 24 and k_proj with 12 rows"),
    ):
        write_folder(tmp_path, {"type": "pi05", **raw}, t)
        with pytest.raises(ConfigError, match=says):
            Pi05Config.from_folder(tmp_path)


# ---- X-VLA ------------------------------------------------------------------------------------------------------


def old_layout(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Florence-2 as the authors name it."""
    rules = [
        (r"(convs\.\d+\.)conv\.", r"\1proj."),
        (r"(_block\.)(conv[12])\.", r"\1\2.fn.dw."),
        (r"spatial_block\.norm1\.", "spatial_block.window_attn.norm."),
        (r"channel_block\.norm1\.", "channel_block.channel_attn.norm."),
        (r"(window_attn|channel_attn)\.(qkv|proj)\.", r"\1.fn.\2."),
        (r"(_block\.)norm2\.", r"\1ffn.norm."),
        (r"ffn\.(fc[12])\.", r"ffn.fn.net.\1."),
        (r"multi_modal_projector\.image_position_embed\.", "image_pos_embed."),
        (r"multi_modal_projector\.image_projection\.weight", "image_projection"),
        (r"multi_modal_projector\.", ""),
        (r"language_model\.", "language_model.model."),
    ]
    out = {}
    for name, value in t.items():
        if name.startswith("vlm."):
            for pattern, new in rules:
                changed = re.sub(pattern, new, name, count=1)
                if changed != name:
                    name = changed
                    break
        out[name] = value.T if name == "vlm.image_projection" else value
    out["vlm.language_model.final_logits_bias"] = torch.zeros(1, 5)
    return out


def xvla_layout(layout: str, t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    t, embed = dict(t), f"{LANGUAGE}encoder.embed_tokens.weight"
    if layout in ("both embeddings", "old, prefixed"):
        t[embed] = t[f"{LANGUAGE}shared.weight"].clone()
    if layout in ("encoder embedding", "authors, encoder embedding"):
        t[embed] = t.pop(f"{LANGUAGE}shared.weight")
    if layout.startswith(("authors", "old")):
        t = old_layout(t)
        t["vlm.language_model.model.decoder.layers.0.fc1.bias"] = torch.zeros(2)
    if layout == "no frame table":
        t.pop(f"{PROJECTOR}visual_temporal_embed.pos_idx_to_embed")
    return t if layout.startswith("authors") else prefixed(t)


@pytest.mark.parametrize(
    "layout",
    ["lerobot", "authors", "old, prefixed", "both embeddings", "encoder embedding", "authors, encoder embedding",
     "no frame table"],
)  # fmt: skip
@torch.no_grad()
def test_xvla_layouts(tmp_path: Path, layout: str) -> None:
    want = small_xvla()
    raw = want.config.to_json()
    if layout.startswith("authors"):
        raw |= {"model_type": raw.pop("type"), "num_actions": raw.pop("chunk_size")}
    write_folder(tmp_path, raw, xvla_layout(layout, tensors(want)))
    assert equal(XVLAReference.from_folder(tmp_path), want)
    assert XVLAConfig.from_folder(tmp_path) == want.config


@pytest.mark.parametrize("layout", ["lerobot", "authors"])
@torch.no_grad()
def test_xvla_golden_layouts(tmp_path: Path, layout: str) -> None:
    io, want = golden("xvla"), xvla_golden()
    write_folder(tmp_path, XVLA_JSON, xvla_layout(layout, tensors(want)))
    model = XVLAReference.from_folder(tmp_path)
    names = ("images", "image_mask", "tokens", "state", "domain_id", "noise")
    assert (model(*(io[n] for n in names), table(30, 0.7)) - io["out_has_a07"]).abs().max() <= 1e-6


def test_square_projection_is_turned_only_where_it_is_old(tmp_path: Path) -> None:
    """Its shape does not show which way it lies, so the name decides."""
    vision = SMALL_XVLA["florence_config"]["vision_config"]
    assert vision["dim_embed"][-1] == SMALL_XVLA["florence_config"]["text_config"]["d_model"]
    want = small_xvla()
    for layout in ("lerobot", "authors"):
        write_folder(tmp_path, want.config.to_json(), xvla_layout(layout, tensors(want)))
        assert equal(XVLAReference.from_folder(tmp_path), want)


def test_xvla_golden_file_is_read() -> None:
    with xvla_source() as source:
        view = xvla.checked(xvla_golden().config, source)
        assert set(view.keys()) == set(xvla.shapes(xvla_golden().config))


def test_xvla_sizes_from_tensors_alone(tmp_path: Path) -> None:
    sizes = {"num_heads": 16, "hidden_size": 32, "mlp_dim": 80, "max_len_seq": 900, "dim_time": 32}
    model = small_xvla(**sizes, florence_config=wide_florence(), use_hetero_proj=True)
    write_folder(tmp_path, None, prefixed(tensors(model)))
    config = XVLAConfig.from_folder(tmp_path)
    assert (config.proprio_dim, config.action_dim, config.policy.mlp, config.num_domains) == (21, 20, 80, 3)
    assert config.vision.heads == config.vision.groups == (1, 2, 3)
    assert config.hetero_proj
    assert {"chunk_size", "num_heads", "num_heads[0]", "tokenizer_max_length"} <= set(config.assumed)


def wide_florence() -> dict:
    """Sizes whose default head counts fit."""
    text = {"d_model": 32, "encoder_layers": 1, "encoder_ffn_dim": 20, "vocab_size": 31, "max_position_embeddings": 400}
    vision = SMALL_XVLA["florence_config"]["vision_config"]
    vision = {k: v for k, v in vision.items() if k not in ("num_heads", "num_groups")} | {"dim_embed": [32, 64, 96]}
    return {"text_config": text, "vision_config": vision}


def test_text_length_comes_from_the_preprocessor(tmp_path: Path) -> None:
    model = small_xvla()
    write_folder(tmp_path, model.config.to_json(), tensors(model))
    steps = '{"steps": [{"registry_name": "device_processor"}, {"registry_name": "tokenizer_processor", "config": %s}]}'
    (tmp_path / "policy_preprocessor.json").write_text(steps % '{"max_length": 11}')
    assert XVLAConfig.from_folder(tmp_path).tokenizer_max_length == 11
    for bad, says in (('{"max_length": 0}', "max_length = 0"), ('{"max_length": 60}', "one view and the text")):
        (tmp_path / "policy_preprocessor.json").write_text(steps % bad)
        with pytest.raises(ConfigError, match=says):
            XVLAConfig.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("transformer.norm.bias"), "transformer.norm.bias .* is missing"),
        (lambda t: t.update({"vlm.odd": torch.zeros(2)}), "vlm.odd is not part of the model"),
        (lambda t: t.update({"transformer.norm.bias": torch.zeros(3)}), r"transformer.norm.bias has shape \[3\]"),
        (lambda t: t.update({"transformer.pos_emb": torch.zeros(4)}), "3 sizes above zero"),
        (lambda t: t.update({f"{LANGUAGE}model.shared.weight": torch.zeros(31, 18)}), "both give tensor"),
    ],
)
def test_xvla_faults_are_named(tmp_path: Path, change, says: str) -> None:
    model = small_xvla()
    t = tensors(model)
    change(t)
    write_folder(tmp_path, model.config.to_json(), t)
    with pytest.raises(CheckpointError, match=says):
        XVLAReference.from_folder(tmp_path)


def test_xvla_config_must_agree_with_tensors(tmp_path: Path) -> None:
    t = tensors(small_xvla())
    for raw, says in (
        ({"hidden_size": 32}, "hidden_size = 32, tensor transformer.pos_emb gives 24"),
        ({"max_state_dim": 32}, "max_state_dim = 32, tensor transformer.action_encoder.fc.weight gives 21"),
        ({"action_mode": "joint"}, "action_mode joint gives action_dim = 14, tensor .* gives 20"),
        ({"use_hetero_proj": True}, "vlm_proj say otherwise"),
        ({"dim_time": 60}, "gives max_state_dim = -31"),
        ({"len_soft_prompts": 5}, "len_soft_prompts = 5"),
    ):
        write_folder(tmp_path, SMALL_XVLA | raw, t)
        with pytest.raises(ConfigError, match=says):
            XVLAConfig.from_folder(tmp_path)
