"""The plain-torch Nemotron: against transformers (marker `peer`), against its own definition, and its loader."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from _peer import CASES, peer_cases
from safetensors.torch import load_file, save_file

from engine.errors import CheckpointError, ConfigError, InputError
from engine.models.nemotron.config import NemotronConfig
from engine.models.nemotron.reference import NemotronReference, Router, ssd

TINY = NemotronConfig(
    vocab_size=61, hidden_size=24, pattern="ME*-M", num_attention_heads=4, num_key_value_heads=2, head_dim=12,
    mamba_num_heads=4, mamba_head_dim=10, ssm_state_size=6, n_groups=2, conv_kernel=4, n_routed_experts=6,
    num_experts_per_tok=2, moe_intermediate_size=20, moe_shared_expert_intermediate_size=28, intermediate_size=36,
    routed_scaling_factor=2.5, chunk_size=16,
)  # fmt: skip


def tiny(seed: int = 0, **changes) -> NemotronReference:
    torch.manual_seed(seed)
    model = NemotronReference(dataclasses.replace(TINY, **changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def worst(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


# ---- against transformers ---------------------------------------------------------------------------------------


@pytest.mark.peer
@pytest.mark.parametrize("case", range(CASES))
@torch.no_grad()
def test_equals_transformers(case: int) -> None:
    peer = peer_cases()[case]
    model, ids = NemotronReference.from_folder(peer.folder), torch.from_numpy(peer.ids)
    want = torch.from_numpy(peer.logits)
    assert worst(model(ids), want) <= 2e-5
    for cut in {1, len(ids) // 3, len(ids) - 1} - {0, len(ids)}:
        state = model.new_state()
        parts = [model(ids[:cut], state), model(ids[cut:], state)]
        assert worst(torch.cat(parts), want) <= 2e-5, f"cut at {cut}"
    assert model.generate(ids, len(peer.greedy)).tolist() == peer.greedy.tolist()


# ---- against its own definition ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "chunk"), [(1, 4), (7, 4), (8, 4), (33, 16), (50, 128)])
def test_chunked_scan_is_the_recurrence(steps: int, chunk: int) -> None:
    g = torch.Generator().manual_seed(steps)
    batch, heads, width, groups, n = 2, 6, 5, 3, 4

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x, b, c = rand(batch, steps, heads, width), rand(batch, steps, groups, n), rand(batch, steps, groups, n)
    dt, a, state = rand(batch, steps, heads).exp(), -rand(heads).exp(), rand(batch, heads, width, n)
    y, last = ssd(x, dt, a, b, c, state, chunk)
    for t in range(steps):
        bh, ch = (v[:, t].repeat_interleave(heads // groups, 1) for v in (b, c))
        decay = (dt[:, t] * a).exp()[..., None, None]
        state = decay * state + (dt[:, t, :, None] * x[:, t])[..., None] * bh[:, :, None]
        torch.testing.assert_close(y[:, t], (state * ch[:, :, None]).sum(-1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(last, state, rtol=1e-9, atol=1e-9)


def test_scan_survives_extreme_decay() -> None:
    x, dt = torch.ones(1, 300, 1, 2), torch.full((1, 300, 1), 50.0)
    b = torch.ones(1, 300, 1, 3)
    y, last = ssd(x, dt, torch.tensor([-16.0]), b, b, torch.zeros(1, 1, 2, 3), 128)
    assert torch.isfinite(y).all()
    assert torch.isfinite(last).all()


@torch.no_grad()
def test_any_split_gives_the_same_logits() -> None:
    model = tiny()
    ids = torch.arange(70) * 7 % 61
    whole = model(ids)
    for sizes in ([1] * 70, [2, 1, 3, 64], [69, 1], [33, 37]):
        state = model.new_state()
        assert worst(torch.cat([model(part, state) for part in ids.split(sizes)]), whole) <= 2e-6
    assert worst(model(ids.view(2, 35))[0], whole[:35]) <= 2e-6


@torch.no_grad()
def test_router_selects_by_biased_score_within_the_best_groups() -> None:
    config = dataclasses.replace(TINY, n_routed_experts=12, n_group=4, topk_group=2, num_experts_per_tok=3)
    torch.manual_seed(0)
    gate = Router(config)
    gate.e_score_correction_bias.normal_(std=0.3)
    x = torch.randn(40, config.hidden_size)
    ids, weights = gate(x)
    for row in range(len(x)):
        score = torch.sigmoid(gate.weight @ x[row])
        biased = (score + gate.e_score_correction_bias).tolist()
        strength = [sum(sorted(biased[g * 3 : g * 3 + 3])[-2:]) for g in range(4)]
        groups = sorted(range(4), key=lambda g: -strength[g])[:2]
        chosen = sorted((e for e in range(12) if e // 3 in groups), key=lambda e: -biased[e])[:3]
        assert ids[row].tolist() == chosen
        want = score[chosen] / score[chosen].sum() * 2.5
        torch.testing.assert_close(weights[row], want)


def test_router_breaks_ties_to_the_lowest_expert() -> None:
    gate = Router(TINY)
    with torch.no_grad():
        gate.weight.zero_()
    assert gate(torch.randn(5, TINY.hidden_size))[0].tolist() == [[0, 1]] * 5


@torch.no_grad()
def test_position_is_nowhere_but_in_the_order() -> None:
    model = tiny(pattern="*")
    ids = torch.tensor([5, 9, 3, 7])
    torch.testing.assert_close(model(ids)[-1], model(ids[[1, 2, 0, 3]])[-1])  # attention alone sees a set


@torch.no_grad()
def test_time_step_limit_is_applied() -> None:
    free, ids = tiny(), torch.arange(20)
    clamped = NemotronReference(dataclasses.replace(TINY, time_step_limit=(0.0, 0.2))).eval()
    clamped.load_state_dict(free.state_dict())
    assert worst(clamped(ids), free(ids)) > 1e-3
    wide = NemotronReference(dataclasses.replace(TINY, time_step_limit=(1e-9, 1e9))).eval()
    wide.load_state_dict(free.state_dict())
    assert torch.equal(wide(ids), free(ids))


@pytest.mark.parametrize("flag", ["use_bias", "mlp_bias", "attention_bias", "use_conv_bias"])
def test_bias_flags(flag: str) -> None:
    names = {on: {n for n, _ in tiny(**{flag: on}).named_parameters()} for on in (True, False)}
    added = names[True] - names[False]
    assert added
    assert all(n.endswith(".bias") for n in added)
    assert not names[False] - names[True]


def test_key_names_are_the_published_ones() -> None:
    keys = set(tiny().state_dict())
    for key in (
        "backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight", "backbone.layers.0.norm.weight",
        "backbone.layers.0.mixer.in_proj.weight", "backbone.layers.0.mixer.conv1d.weight",
        "backbone.layers.0.mixer.conv1d.bias", "backbone.layers.0.mixer.A_log", "backbone.layers.0.mixer.D",
        "backbone.layers.0.mixer.dt_bias", "backbone.layers.0.mixer.norm.weight",
        "backbone.layers.0.mixer.out_proj.weight", "backbone.layers.1.mixer.gate.weight",
        "backbone.layers.1.mixer.gate.e_score_correction_bias", "backbone.layers.1.mixer.experts.5.up_proj.weight",
        "backbone.layers.1.mixer.experts.5.down_proj.weight", "backbone.layers.1.mixer.shared_experts.up_proj.weight",
        "backbone.layers.2.mixer.q_proj.weight", "backbone.layers.2.mixer.o_proj.weight",
        "backbone.layers.3.mixer.up_proj.weight", "backbone.layers.3.mixer.down_proj.weight",
    ):  # fmt: skip
        assert key in keys
    assert tiny().state_dict()["backbone.layers.0.mixer.conv1d.weight"].shape == (TINY.conv_dim, 1, 4)


def test_every_parameter_gets_a_gradient() -> None:
    model = tiny().train()
    ids = torch.randint(0, 61, (4, 40), generator=torch.Generator().manual_seed(0))
    model(ids).logsumexp(-1).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_bad_input() -> None:
    with pytest.raises(InputError, match="T >= 1"):
        tiny()(torch.zeros(0, dtype=torch.long))
    with pytest.raises(ConfigError, match="'X'"):
        NemotronReference(dataclasses.replace(TINY, pattern="MX"))


# ---- loading ----------------------------------------------------------------------------------------------------


def write(folder, model: NemotronReference, tensors: dict, shards: int = 1) -> None:
    raw = {
        k: v
        for k, v in dataclasses.asdict(model.config).items()
        if k not in ("extra", "pattern", "time_step_limit", "eos_token_ids") and v is not None
    }
    raw |= {"model_type": "nemotron_h", "hybrid_override_pattern": model.config.pattern}
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    names, where = sorted(tensors), {}
    for i in range(shards):
        part = {k: tensors[k] for k in names[i::shards]}
        save_file(part, folder / f"model-{i + 1:05d}-of-{shards:05d}.safetensors")
        where |= dict.fromkeys(part, f"model-{i + 1:05d}-of-{shards:05d}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.mark.parametrize("layout", ["published", "shards", "fused", "with mtp"])
@torch.no_grad()
def test_from_folder(tmp_path, layout: str) -> None:
    model, shards = tiny(), 1
    tensors = dict(model.state_dict())
    if layout == "shards":
        shards = 3
    if layout == "fused":
        for which in ("up_proj", "down_proj"):
            parts = [tensors.pop(f"backbone.layers.1.mixer.experts.{e}.{which}.weight") for e in range(6)]
            tensors[f"backbone.layers.1.mixer.experts.{which}"] = torch.stack(parts)
        tensors = {k.replace("backbone.", "model."): v for k, v in tensors.items()}
    if layout == "with mtp":
        tensors["mtp.layers.0.norm.weight"] = torch.zeros(3)
    write(tmp_path, model, tensors, shards)
    ids = torch.arange(9)
    assert torch.equal(NemotronReference.from_folder(tmp_path)(ids), model(ids))
    half = NemotronReference.from_folder(tmp_path, torch.bfloat16)
    assert half.backbone.layers[1].mixer.gate.weight.dtype == torch.float32
    assert worst(half(ids), model(ids)) < 0.1


def test_from_folder_names_what_is_wrong(tmp_path) -> None:
    model = tiny()
    tensors = dict(model.state_dict())
    del tensors["backbone.norm_f.weight"]
    write(tmp_path, model, tensors)
    with pytest.raises(CheckpointError, match=r"backbone\.norm_f\.weight"):
        NemotronReference.from_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        NemotronReference.from_folder(tmp_path)


@torch.no_grad()
def test_saved_model_round_trips(tmp_path) -> None:
    model = tiny(3)
    write(tmp_path, model, dict(model.state_dict()))
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


# ---- nemotron-tiny ----------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def trainer():
    """The trainer's modules: its data, its evaluation, its simulated formats."""
    folder = str(ROOT / "examples/tiny/nemotron")
    sys.path.insert(0, folder)
    try:
        import evaluate

        yield evaluate
    finally:
        sys.path.remove(folder)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["bf16", "int4"])
def test_tiny_answers_held_out_problems(trainer, mode: str) -> None:
    from tokenizers import Tokenizer

    folder = ROOT / "engine/zoo/nemotron-tiny"
    model = NemotronReference.from_folder(folder)
    tok = Tokenizer.from_file(str(folder / "tokenizer.json"))
    trainer.quant.convert(model, mode)
    problems = trainer.data.held_out(150)
    score = trainer.accuracy(model, tok, trainer.Template(folder / "chat_template.jinja"), problems, thinking=True)
    assert score["all"][0] >= 0.95 * score["all"][1], score


def test_held_out_problems_share_nothing_with_training(trainer) -> None:
    import random

    data = trainer.data
    for p in data.held_out(200):
        assert all(data.is_held_out(*operation) for operation in p.operations)
        assert data.check(p, f"{p.thought}\n</think>\n{p.reply}<|im_end|>")
        assert not data.check(p, f"{p.thought}\n</think>\nThe answer is -1.")
        if p.kind == "tool":
            assert all(data.is_held_out("value", v) for v in p.answer["arguments"].values())
    r = random.Random(0)
    for _ in range(2000):
        p = data.training_problem(r)
        assert not any(data.is_held_out(*operation) for operation in p.operations)
