"""The plain-torch pi0.5: against the authors' outputs, and against its own definition."""

from __future__ import annotations

import math

import pytest
import torch
from _faster import constant, golden, pi05_golden, schedules, small_pi05, table
from _peer_faster import CASES, FlowCase, compare, error, flow_cases
from _peer_faster import TOLERANCE as PEER_TOLERANCE

from engine.errors import InputError
from engine.models.pi05.config import EXPERT, TRUNK
from engine.models.pi05.reference import Pi05Reference, PrefixCache
from engine.models.pi05.weights import shapes, unread

# fp32 sums in another order than JAX's; the rest is exact.
TOLERANCE = 5e-5


@pytest.fixture(scope="module", params=[False, True], ids=["masked", "compact"])
@torch.no_grad()
def cache(request) -> PrefixCache:
    io, model = golden("pi05"), pi05_golden()
    return model.prefill(*model.prefix(io["images"], io["image_mask"], io["tokens"], io["token_mask"], request.param))


def inputs(batch: int = 2, views: int = 3, seed: int = 0):
    """Random images, image mask, tokens, token mask and noise of the small model; no two samples see the same."""
    g = torch.Generator().manual_seed(seed)
    images = torch.rand(batch, views, 3, 20, 20, generator=g) * 2 - 1
    image_mask = torch.tensor([[True, False, True], [False, True, False]])[:batch, :views]
    tokens = torch.randint(0, 31, (batch, 9), generator=g)
    token_mask = torch.arange(9) < torch.tensor([[6], [4]])[:batch]
    return images, image_mask, tokens, token_mask, torch.randn(batch, 6, 5, generator=g)


# ---- against the authors' outputs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tau", "delay"),
    [
        ("out_const", constant(50), 0),
        ("out_has", table(50, 0.6), 0),
        # Of a constant schedule with a prefix the authors return the prefix rows drifted; nobody reads those.
        ("out_const_d4", constant(50, delay=4), 4),
        ("out_has_d4", table(50, 0.6, 4), 4),
    ],
)
@torch.no_grad()
def test_golden_chunks(cache, name: str, tau: torch.Tensor, delay: int) -> None:
    io = golden("pi05")
    got = pi05_golden().steps(cache, io["noise"], tau, io["action_prefix"] if delay else None, delay)[-1]
    assert (got - io[name])[:, delay:].abs().max() <= TOLERANCE
    if delay:
        assert torch.equal(got[:, :delay], io["action_prefix"][:, :delay])


@torch.no_grad()
def test_golden_stream(cache) -> None:
    """After every step: the whole state, and the rows that a client is sent."""
    io, tau = golden("pi05"), table(50, 0.6, 4)
    assert (tau - io["sched_d4"][:, 0]).abs().max() <= 2e-7
    states = pi05_golden().steps(cache, io["noise"], tau, io["action_prefix"], 4)
    assert (torch.stack(states) - io["stream_x_d4"]).abs().max() <= TOLERANCE
    sent, counts = torch.zeros(50, dtype=torch.bool), []
    sent[:4] = True
    for j, state in enumerate(states):
        new = (tau[j + 1] < 0.01) & ~sent
        assert torch.equal(new, io["stream_new_d4"][j, 0])
        assert not new.any() or (state - io["stream_x_d4"][j])[0, new].abs().max() <= TOLERANCE
        sent, counts = sent | new, [*counts, int(new.sum())]
    assert counts == [1, 1, 2, 4, 4, 6, 6, 7, 7, 8]
    # A row that was sent early (residual time below 0.01) still moves afterwards, so the packet is not the final row.
    ready = torch.tensor(schedules()["H50_N10_a0.6_u0.9_d4"]["ready_step_thr001"]) - 1
    early = [i for i in range(4, 50) if 0 < tau[ready[i] + 1, i] < 0.01]
    assert early
    assert all((states[ready[i]][0, i] - states[-1][0, i]).abs().max() > 0 for i in early)


@torch.no_grad()
def test_prefix_of_the_golden_data() -> None:
    io, model = golden("pi05"), pi05_golden()
    x, valid = model.prefix(io["images"], io["image_mask"], io["tokens"], io["token_mask"])
    assert x.shape == (1, 3 * 256 + 200, 64)
    assert valid.sum() == 2 * 256 + 30
    x, valid = model.prefix(io["images"], io["image_mask"], io["tokens"], io["token_mask"], compact=True)
    assert x.shape == (1, 2 * 256 + 30, 64)
    assert bool(valid.all())


# ---- against lerobot --------------------------------------------------------------------------------------------


@pytest.mark.peer
@pytest.mark.parametrize("number", range(CASES))
@torch.no_grad()
def test_equals_lerobot(number: int) -> None:
    case = flow_cases("pi05")[number]
    model = Pi05Reference.from_folder(case.folder)
    io = {name: torch.from_numpy(value) for name, value in case.io.items()}
    cache = model.prefill(*model.prefix(io["images"], io["image_mask"], io["tokens"], io["token_mask"]))
    assert torch.equal(cache.valid, io["valid"])
    assert error(model.embed_images(io["images"]).numpy(), case.io["vision"]) <= PEER_TOLERANCE
    for ours, theirs in ((cache.k, io["k"]), (cache.v, io["v"])):
        for layer, want in zip(ours, theirs, strict=True):
            assert error(layer[cache.valid].numpy(), want[io["valid"]].numpy()) <= PEER_TOLERANCE

    def sample(case: FlowCase, name: str):
        tau = torch.from_numpy(case.tau(name))
        return model.steps(cache, io["noise"], tau, io["prefix"], case.delay(name))[-1].numpy()

    errors = compare(case, sample)
    assert max(errors.values()) <= PEER_TOLERANCE, errors


# ---- against its own definition ---------------------------------------------------------------------------------


@torch.no_grad()
def test_what_is_masked_may_be_left_out() -> None:
    model = small_pi05(dtype=torch.float64)
    images, image_mask, tokens, token_mask, noise = inputs()
    want = model(images, image_mask, tokens, token_mask, noise, constant(6, 4))
    for b in range(2):  # alone, a sample is compacted to its own valid tokens
        row = slice(b, b + 1)
        x, valid = model.prefix(images[row], image_mask[row], tokens[row], token_mask[row], compact=True)
        assert bool(valid.all()) and x.shape[1] == image_mask[b].sum() * 4 + token_mask[b].sum()
        got = model.steps(model.prefill(x, valid), noise[row], constant(6, 4))[-1]
        torch.testing.assert_close(got, want[row], rtol=0, atol=1e-12)
    cache = model.prefill(*model.prefix(images, image_mask, tokens, token_mask, compact=True))
    torch.testing.assert_close(model.steps(cache, noise, constant(6, 4))[-1], want, rtol=0, atol=1e-12)
    # Values of masked views and tokens change nothing.
    images = torch.where(image_mask[..., None, None, None], images, torch.full_like(images, 0.7))
    tokens = torch.where(token_mask, tokens, 3)
    assert torch.equal(model(images, image_mask, tokens, token_mask, noise, constant(6, 4)), want)


@torch.no_grad()
def test_last_trunk_layer_is_cut() -> None:
    model, (images, image_mask, tokens, token_mask, noise) = small_pi05(), inputs()
    prefix = model.prefix(images, image_mask, tokens, token_mask)
    full, cut = model.prefill(*prefix, cut=False), model.prefill(*prefix)
    assert all(torch.equal(a, b) for a, b in zip(full.k + full.v, cut.k + cut.v, strict=True))
    want = model.steps(cut, noise, constant(6, 4))[-1]
    dead = unread(model.config)
    assert {name.removeprefix(f"{TRUNK}layers.2.") for name in dead} == {
        "self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight",
        "mlp.down_proj.weight", "post_attention_layernorm.weight",
    }  # fmt: skip
    for name, p in model.named_parameters():
        if name in dead:
            p.fill_(math.nan)
    assert torch.equal(model.steps(model.prefill(*prefix), noise, constant(6, 4))[-1], want)


@torch.no_grad()
def test_equal_times_are_one_time() -> None:
    """With one time for all actions the modulation of one row serves all: the original model."""
    model, (*seen, noise) = small_pi05(dtype=torch.float64), inputs()
    cache = model.prefill(*model.prefix(*seen))
    want = model.velocity(noise, torch.full((2, 6), 0.3), cache)
    condition = model.condition
    model.condition = lambda tau: condition(tau[:, :1]).expand(-1, tau.shape[1], -1)  # type: ignore[method-assign]
    torch.testing.assert_close(model.velocity(noise, torch.full((2, 6), 0.3), cache), want, rtol=0, atol=1e-12)


@torch.no_grad()
def test_time_embedding() -> None:
    model = small_pi05(dtype=torch.float64, min_period=0.01, max_period=2.0)
    seen: list[torch.Tensor] = []
    model.time_mlp_in.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    model.condition(torch.tensor([[0.25]]))
    period = [0.01 * 200 ** (k / 7) for k in range(8)]
    want = [f(2 * math.pi * 0.25 / p) for f in (math.sin, math.cos) for p in period]
    torch.testing.assert_close(seen[0].flatten(), torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-9)


@torch.no_grad()
def test_modulations_are_those_of_the_norms() -> None:
    model, tau = small_pi05(), torch.rand(2, 6)
    made = model.modulations(tau)
    assert made.shape == (7, 2, 6, 48)
    expert, condition = model.paligemma_with_expert.gemma_expert.model, model.condition(tau)
    assert torch.equal(made[3], expert.layers[1].post_attention_layernorm.dense(condition))
    assert torch.equal(made[6], expert.norm.dense(condition))


@torch.no_grad()
def test_committed_rows_and_delays_per_sample() -> None:
    model, (*seen, noise) = small_pi05(), inputs()
    prefix, delay = torch.randn(2, 6, 5), torch.tensor([2, 0])
    tau = constant(6, 4)[:, None].repeat(1, 2, 1)
    tau[:, 0, :2] = 0
    cache = model.prefill(*model.prefix(*seen))
    got = model.steps(cache, noise, tau, prefix, delay)[-1]
    assert torch.equal(got[0, :2], prefix[0, :2])
    alone = model.steps(cache, noise, constant(6, 4))[-1]
    torch.testing.assert_close(got[1], alone[1])
    assert not torch.allclose(got[0, 2:], alone[0, 2:])  # the committed rows are seen by the others
    short = model.steps(cache, noise, tau, prefix[:, :2], delay)[-1]
    assert torch.equal(short, got)


@torch.no_grad()
def test_unexecuted_rows_are_seen() -> None:
    model, (*seen, noise) = small_pi05(), inputs()
    cache = model.prefill(*model.prefix(*seen))
    noise2 = noise.clone()
    noise2[:, -1] += 1
    a, b = (model.steps(cache, n, constant(6, 4))[-1] for n in (noise, noise2))
    assert (a - b)[:, 0].abs().max() > 1e-4


@torch.no_grad()
def test_precisions_agree() -> None:
    io = inputs()
    want = small_pi05(dtype=torch.float64)(*io, constant(6, 4))
    single = small_pi05()(*io, constant(6, 4))
    half = small_pi05().to(torch.bfloat16)(*io, constant(6, 4))
    assert want.dtype == torch.float64 and single.dtype == half.dtype == torch.float32
    scale = want.abs().max()
    assert (single - want).abs().max() <= 1e-5 * scale
    assert (half - want).abs().max() <= 0.1 * scale


def test_state_dict_has_the_published_names() -> None:
    model = small_pi05()
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == shapes(model.config)
    for name in (f"{EXPERT}layers.2.input_layernorm.dense.bias", f"{TRUNK}embed_tokens.weight", "time_mlp_out.weight"):
        assert name in model.state_dict()


def test_every_parameter_gets_a_gradient() -> None:
    model, io = small_pi05().train(), inputs()
    model(*io, constant(6, 1)).square().sum().backward()
    without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert without == unread(model.config)


def test_fresh_model_has_open_gates() -> None:
    from engine.models.pi05.reference import AdaRMSNorm

    x, condition = torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    y, gate = AdaRMSNorm(8)(x, condition)
    assert torch.equal(gate, torch.ones_like(gate))
    torch.testing.assert_close(y, x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


def test_bad_input() -> None:
    model, (images, image_mask, tokens, token_mask, noise) = small_pi05(), inputs()
    with pytest.raises(InputError, match="no camera"):
        model.prefix(images, image_mask & False, tokens, token_mask)
    with pytest.raises(InputError, match=r"\[B, V, 3, 20, 20\]"):
        model.embed_images(images[..., :10])
    cache = model.prefill(*model.prefix(images, image_mask, tokens, token_mask))
    with pytest.raises(InputError, match="no prefix"):
        model.steps(cache, noise, constant(6, 4), None, 2)
    with pytest.raises(InputError, match="do not fit"):
        model.steps(cache, noise, constant(5, 4))
