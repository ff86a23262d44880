"""The converter of openpi's JAX checkpoints: the golden model, taken apart into their tree, comes back unchanged."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _faster import PI05_JSON, golden, pi05_golden, small_pi05, table

from engine.errors import CheckpointError, ConfigError
from engine.io.sidecar import read_sidecar
from engine.models.pi05.config import EXPERT, PROJECTOR, TRUNK, VISION, Pi05Config
from engine.models.pi05.reference import Pi05Reference
from examples import convert_orbax
from examples.convert_orbax import convert, find_stats, leaves, write_folder

SETTINGS = {"chunk_size": 50, "num_inference_steps": 10}


def jax_tree(model: Pi05Reference, wrap: bool = False) -> dict[str, Any]:
    """The inverse map: the tree that openpi's JAX code has for these weights."""
    t, c = {name: p.detach().numpy() for name, p in model.state_dict().items()}, model.config
    tree: dict[str, Any] = {}

    def put(path: str, array: np.ndarray) -> None:
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = {"value": array} if wrap else array

    def linear(path: str, name: str) -> None:
        put(f"{path}/kernel", t[f"{name}.weight"].T)
        put(f"{path}/bias", t[f"{name}.bias"])

    def stack(prefix: str, name: str, depth: int) -> np.ndarray:
        return np.stack([t[f"{prefix}layers.{i}.{name}"] for i in range(depth)])

    img, block = "PaliGemma/img", "PaliGemma/img/Transformer/encoderblock"
    put(f"{img}/embedding/kernel", t[f"{VISION}embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0))
    put(f"{img}/embedding/bias", t[f"{VISION}embeddings.patch_embedding.bias"])
    put(f"{img}/pos_embedding", t[f"{VISION}embeddings.position_embedding.weight"][None])
    layers, v = f"{VISION}encoder.", c.vision
    for i in (0, 1):
        put(f"{block}/LayerNorm_{i}/scale", stack(layers, f"layer_norm{i + 1}.weight", v.depth))
        put(f"{block}/LayerNorm_{i}/bias", stack(layers, f"layer_norm{i + 1}.bias", v.depth))
        put(f"{block}/MlpBlock_0/Dense_{i}/kernel", stack(layers, f"mlp.fc{i + 1}.weight", v.depth).transpose(0, 2, 1))
        put(f"{block}/MlpBlock_0/Dense_{i}/bias", stack(layers, f"mlp.fc{i + 1}.bias", v.depth))
    heads, attention = (v.heads, v.head_dim), f"{block}/MultiHeadDotProductAttention_0"
    for path, name in (("query", "q"), ("key", "k"), ("value", "v")):
        weight = stack(layers, f"self_attn.{name}_proj.weight", v.depth).transpose(0, 2, 1)
        put(f"{attention}/{path}/kernel", weight.reshape(v.depth, v.width, *heads))
        put(f"{attention}/{path}/bias", stack(layers, f"self_attn.{name}_proj.bias", v.depth).reshape(-1, *heads))
    weight = stack(layers, "self_attn.out_proj.weight", v.depth).transpose(0, 2, 1)
    put(f"{attention}/out/kernel", weight.reshape(v.depth, *heads, v.width))
    put(f"{attention}/out/bias", stack(layers, "self_attn.out_proj.bias", v.depth))
    put(f"{img}/Transformer/encoder_norm/scale", t[f"{VISION}post_layernorm.weight"])
    put(f"{img}/Transformer/encoder_norm/bias", t[f"{VISION}post_layernorm.bias"])
    linear(f"{img}/head", f"{PROJECTOR}linear")

    llm = "PaliGemma/llm"
    put(f"{llm}/embedder/input_embedding", t[f"{TRUNK}embed_tokens.weight"])
    put(f"{llm}/final_norm/scale", np.zeros(c.trunk.width, np.float32))
    for prefix, end, g in ((TRUNK, "", c.trunk), (EXPERT, "_1", c.expert)):
        q = stack(prefix, "self_attn.q_proj.weight", g.depth).reshape(g.depth, g.heads, g.head_dim, g.width)
        put(f"{llm}/layers/attn/q_einsum{end}/w", q.transpose(0, 1, 3, 2))
        kv = np.stack([stack(prefix, f"self_attn.{n}_proj.weight", g.depth) for n in "kv"], 1)
        kv = kv.reshape(g.depth, 2, g.kv_heads, g.head_dim, g.width)
        put(f"{llm}/layers/attn/kv_einsum{end}/w", kv.transpose(0, 1, 2, 4, 3))
        o = stack(prefix, "self_attn.o_proj.weight", g.depth).transpose(0, 2, 1)
        put(f"{llm}/layers/attn/attn_vec_einsum{end}/w", o.reshape(g.depth, g.heads, g.head_dim, g.width))
        gate_up = np.stack([stack(prefix, f"mlp.{n}_proj.weight", g.depth) for n in ("gate", "up")], 1)
        put(f"{llm}/layers/mlp{end}/gating_einsum", gate_up.transpose(0, 1, 3, 2))
        put(f"{llm}/layers/mlp{end}/linear", stack(prefix, "mlp.down_proj.weight", g.depth).transpose(0, 2, 1))
        for path, name in (("pre_attention_norm", "input_layernorm"), ("pre_ffw_norm", "post_attention_layernorm")):
            if end:
                dense = stack(prefix, f"{name}.dense.weight", g.depth).transpose(0, 2, 1)
                put(f"{llm}/layers/{path}_1/Dense_0/kernel", dense)
                put(f"{llm}/layers/{path}_1/Dense_0/bias", stack(prefix, f"{name}.dense.bias", g.depth))
            else:
                put(f"{llm}/layers/{path}/scale", stack(prefix, f"{name}.weight", g.depth))
    linear(f"{llm}/final_norm_1/Dense_0", f"{EXPERT}norm.dense")
    for name in ("action_in_proj", "action_out_proj", "time_mlp_in", "time_mlp_out"):
        linear(name, name)
    return {"params": tree} if wrap else tree


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("which", ["golden", "small", "several kv heads"])
def test_forth_and_back_is_identical(which: str, wrap: bool) -> None:
    changes: dict[str, Any] = {"num_key_value_heads": 4} if which == "several kv heads" else {}
    model = pi05_golden() if which == "golden" else small_pi05(**changes)
    tensors, counts = convert(jax_tree(model, wrap))
    want = model.state_dict()
    assert tensors.keys() == want.keys()
    assert all(np.array_equal(tensors[name], want[name].numpy()) for name in want)
    c = model.config
    assert counts == {
        "num_attention_heads": c.trunk.heads, "head_dim": c.trunk.head_dim, "vision_num_heads": c.vision.heads,
    }  # fmt: skip


@torch.no_grad()
def test_folder_runs_as_the_original(tmp_path: Path) -> None:
    sidecar = {"schedule": "has", "alpha": 0.6, "u0": 0.9, "num_steps": 10}
    config = write_folder(tmp_path, jax_tree(pi05_golden()), SETTINGS, sidecar, "keep")
    assert config == Pi05Config.from_folder(tmp_path) == pi05_golden().config
    assert json.loads((tmp_path / "config.json").read_text())["vision_num_heads"] == PI05_JSON["vision_num_heads"]
    found = read_sidecar(tmp_path)
    assert found is not None and (found.schedule, found.alpha, found.u0) == ("has", 0.6, 0.9)
    io, model = golden("pi05"), Pi05Reference.from_folder(tmp_path)
    prefix = model.prefix(*(io[name] for name in ("images", "image_mask", "tokens", "token_mask")), compact=True)
    assert (model.steps(model.prefill(*prefix), io["noise"], table(50, 0.6))[-1] - io["out_has"]).abs().max() <= 5e-5


def test_dtypes(tmp_path: Path) -> None:
    model = small_pi05()
    half = {name: p.bfloat16().float() for name, p in model.state_dict().items()}
    write_folder(tmp_path / "half", jax_tree(model), SETTINGS | {"chunk_size": 6}, None, "bfloat16")
    loaded = Pi05Reference.from_folder(tmp_path / "half").state_dict()
    assert all(torch.equal(loaded[name], half[name]) for name in half)
    assert (tmp_path / "half/model.safetensors").stat().st_size < 100_000
    assert not (tmp_path / "half/faster.json").exists()
    with pytest.raises(CheckpointError, match="is int32"):
        tree = jax_tree(model)
        tree["time_mlp_in"]["bias"] = np.zeros(16, np.int32)
        write_folder(tmp_path / "bad", tree, SETTINGS, None, "keep")
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("action_in_proj"), "leaf action_in_proj/kernel is missing"),
        (lambda t: t["PaliGemma"]["llm"].pop("final_norm_1"), "pi0 has no adaRMS"),
        (lambda t: t.update(state_proj={"bias": np.zeros(3)}), "not part of pi0.5: state_proj/bias"),
        (lambda t: t["time_mlp_in"].update(lora_a=np.zeros(3)), "merge LoRA weights first"),
        (lambda t: t["time_mlp_in"].update(bias=np.zeros(3)), r"time_mlp_in/bias has shape \[3\], not \[16\]"),
        (lambda t: t["PaliGemma"]["img"].update(pos_embedding=np.zeros(4)), "pos_embedding has shape"),
        (lambda t: t.update({"action_in_proj/bias": np.zeros(3)}), "action_in_proj/bias is there twice"),
    ],
)
def test_faults_are_named(change, says: str) -> None:
    tree = copy.deepcopy(jax_tree(small_pi05()))
    change(tree)
    with pytest.raises(CheckpointError, match=says):
        convert(tree)


def test_leaves_drop_their_wrappers() -> None:
    tree = {"params": {"a": {"kernel": {"value": np.zeros(1)}}, "value": {"bias": np.ones(2)}}}
    assert [(path, array.size) for path, array in leaves(tree)] == [("a/kernel", 1), ("value/bias", 2)]


def test_statistics_are_found(tmp_path: Path) -> None:
    assert find_stats(tmp_path, None) is None
    for name in ("physical/agilex", "libero"):
        (tmp_path / "assets" / name).mkdir(parents=True)
        (tmp_path / "assets" / name / "norm_stats.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"several robots .libero, physical/agilex"):
        find_stats(tmp_path, None)
    assert find_stats(tmp_path, "libero") == tmp_path / "assets/libero/norm_stats.json"
    with pytest.raises(ConfigError, match="leaves"):
        find_stats(tmp_path, "../..")


def test_command_line(tmp_path: Path, monkeypatch, capsys) -> None:
    """The whole run, with the reader of Orbax replaced."""
    asset = tmp_path / "step/assets/robot"
    asset.mkdir(parents=True)
    part = {"mean": [0.0], "std": [1.0], "q01": [-1.0], "q99": [1.0]}
    (asset / "norm_stats.json").write_text(json.dumps({"norm_stats": {"state": part, "actions": part}}))
    monkeypatch.setattr(convert_orbax, "restore", lambda path: jax_tree(small_pi05(), wrap=True))
    command = ["convert_orbax", str(tmp_path / "step/params"), str(tmp_path / "out"), "--horizon", "6"]
    monkeypatch.setattr("sys.argv", [*command, "--alpha", "0.6", "--u0", "0.9", "--no-state-in-prompt"])
    convert_orbax.main()
    assert "pi0.5, width 24 and 16, 3 layers" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json", "faster.json", "model.safetensors", "norm_stats.json",
    ]  # fmt: skip
    assert Pi05Reference.from_folder(tmp_path / "out").config.horizon == 6
    (asset / "norm_stats.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"convert_orbax: .* has no norm_stats"):
        convert_orbax.main()
