"""The plain-torch X-VLA: against golden outputs, and against its own definition."""

from __future__ import annotations

import pytest
import torch
from _faster import SMALL_XVLA, constant, golden, small_xvla, table, xvla_golden
from _peer_faster import CASES, FlowCase, compare, error, flow_cases
from _peer_faster import TOLERANCE as PEER_TOLERANCE

from engine.errors import InputError
from engine.models.xvla.reference import WindowAttention, XVLAReference
from engine.models.xvla.weights import shapes

TOLERANCE = 1e-6
FRAMES = "vlm.multi_modal_projector.visual_temporal_embed.pos_idx_to_embed"


@pytest.fixture(scope="module", params=[False, True], ids=["padded windows", "virtual pad"])
@torch.no_grad()
def context(request) -> torch.Tensor:
    io, model = golden("xvla"), xvla_golden()
    model.use_virtual_pad(request.param)
    return model.context(io["images"], io["image_mask"], io["tokens"], io["domain_id"])


def inputs(batch: int = 2, size: tuple[int, int] = (44, 60), action: int = 20, state: int = 21, seed: int = 0):
    """Random images, image mask, tokens, state, domain and noise of the small model."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, 3, *size, generator=g)
    image_mask = torch.tensor([[True, True, False], [True, False, False]])[:batch]
    tokens = torch.randint(0, 31, (batch, 7), generator=g)
    return (images, image_mask, tokens, torch.randn(batch, state, generator=g), torch.tensor([2, 0])[:batch],
            torch.randn(batch, 6, action, generator=g))  # fmt: skip


# ---- golden -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tau", "delay"),
    [
        ("out_const", constant(30), 0),
        ("out_has_a06", table(30, 0.6), 0),
        ("out_has_a07", table(30, 0.7), 0),
        ("out_has_a06_d3", table(30, 0.6, 3), 3),
    ],
)
@torch.no_grad()
def test_golden_chunks(context, name: str, tau: torch.Tensor, delay: int) -> None:
    io, model = golden("xvla"), xvla_golden()
    prefix = io["action_prefix_d3"] if delay else None
    raw = model.steps(context, io["state"], io["domain_id"], io["noise"], tau, prefix, delay)[-1]
    if delay:
        assert torch.equal(raw[:, :delay], io["action_prefix_d3"][:, :delay])
    assert (model.finish(raw) - io[name])[:, delay:].abs().max() <= TOLERANCE


@torch.no_grad()
def test_finished_actions_stay() -> None:
    io, model, tau = golden("xvla"), xvla_golden(), table(30, 0.6)
    context = model.context(io["images"], io["image_mask"], io["tokens"], io["domain_id"])
    states = model.steps(context, io["state"], io["domain_id"], io["noise"], tau)
    for j in range(10):
        done = tau[j + 1] == 0
        assert all(torch.equal(s[:, done], states[j][:, done]) for s in states[j:])


# ---- lerobot ----------------------------------------------------------------------------------------------------


@pytest.mark.peer
@pytest.mark.parametrize("number", range(CASES))
@pytest.mark.parametrize("virtual_pad", [False, True])
@torch.no_grad()
def test_equals_lerobot(number: int, virtual_pad: bool) -> None:
    case = flow_cases("xvla")[number]
    model = XVLAReference.from_folder(case.folder)
    model.use_virtual_pad(virtual_pad)
    io = {name: torch.from_numpy(value) for name, value in case.io.items()}
    vlm, aux = model.encode(io["images"], io["image_mask"], io["tokens"])
    assert error(vlm.numpy(), case.io["vlm"]) <= PEER_TOLERANCE
    assert error(aux.numpy(), case.io["aux"]) <= PEER_TOLERANCE
    context = model.transformer.context(vlm, aux, io["domain"])

    def sample(case: FlowCase, name: str):
        tau = torch.from_numpy(case.tau(name))
        steps = model.steps(context, io["state"], io["domain"], io["noise"], tau, io["prefix"], case.delay(name))
        return model.finish(steps[-1]).numpy()

    errors = compare(case, sample)
    assert max(errors.values()) <= PEER_TOLERANCE, errors


# ---- its own definition -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (3, 2), (8, 9), (1, 1)])
@pytest.mark.parametrize("window", [4, 3])
def test_one_virtual_key_stands_for_the_padding(grid: tuple[int, int], window: int) -> None:
    torch.manual_seed(0)
    attention = WindowAttention(12, 3, window).double()
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    want = attention(x)
    assert want.shape == x.shape
    attention.virtual_pad = True
    torch.testing.assert_close(attention(x), want, rtol=0, atol=1e-12)


def test_windows_are_windows() -> None:
    """A token sees its own window and no other, and its own place in the grid is kept."""
    torch.manual_seed(0)
    attention = WindowAttention(12, 3, 4).double()
    x = torch.randn(1, 8, 12, 12, dtype=torch.float64)
    whole = attention(x)
    for r, c in ((0, 0), (4, 8), (0, 4)):
        part = (slice(None), slice(r, r + 4), slice(c, c + 4))
        torch.testing.assert_close(attention(x[part]), whole[part], rtol=0, atol=1e-12)


@torch.no_grad()
def test_virtual_pad_in_the_whole_model() -> None:
    model, (*seen, state, domain, noise) = small_xvla(dtype=torch.float64), inputs()
    want = model(*seen, state, domain, noise, constant(6, 4))
    model.use_virtual_pad()
    torch.testing.assert_close(model(*seen, state, domain, noise, constant(6, 4)), want, rtol=0, atol=1e-11)


@torch.no_grad()
def test_last_block_is_cut_to_the_actions() -> None:
    model, (images, mask, tokens, state, domain, noise) = small_xvla(dtype=torch.float64), inputs()
    context, tau = model.context(images, mask, tokens, domain), torch.rand(2, 6)
    cut = model.predict(noise, state, tau, context, domain)
    torch.testing.assert_close(model.predict(noise, state, tau, context, domain, cut=False), cut, rtol=0, atol=1e-12)


@torch.no_grad()
def test_absent_views_are_zero_features_and_still_sent() -> None:
    model, (images, mask, tokens, state, domain, noise) = small_xvla(), inputs()
    vlm, aux = model.encode(images, mask, tokens)
    view = model.config.vision.tokens
    assert vlm.shape == (2, view + 7, 18) and aux.shape == (2, 2 * view, 18)
    assert torch.equal(aux[0, view:], torch.zeros_like(aux[0, view:])) and aux[0, :view].abs().sum() > 0
    assert torch.equal(aux[1], torch.zeros_like(aux[1]))
    assert model.context(images, mask, tokens, domain).shape == (2, model.config.context + 4, 24)
    other = torch.where(mask[..., None, None, None], images, torch.full_like(images, 5.0))
    want = model(images, mask, tokens, state, domain, noise, constant(6, 4))
    assert torch.equal(model(other, mask, tokens, state, domain, noise, constant(6, 4)), want)


@torch.no_grad()
def test_batch_is_its_samples() -> None:
    model, io = small_xvla(dtype=torch.float64), inputs()
    whole = model(*io, constant(6, 4))
    for b in range(2):
        alone = model(*(t[b : b + 1] for t in io), constant(6, 4))
        torch.testing.assert_close(alone[0], whole[b], rtol=0, atol=1e-12)


@torch.no_grad()
def test_grippers() -> None:
    """Zeros on input, in noise and state alike; the sigmoid at the very end only."""
    model, (*seen, state, domain, noise) = small_xvla(), inputs()
    want = model(*seen, state, domain, noise, constant(6, 4))
    state2, noise2 = state.clone(), noise.clone()
    state2[:, [9, 19]], noise2[:, :, [9, 19]] = 3.0, -2.0
    assert torch.equal(model(*seen, state2, domain, noise2, constant(6, 4)), want)
    assert bool(((want > 0) & (want < 1))[..., [9, 19]].all())


@pytest.mark.parametrize(
    ("mode", "width", "robot", "changes"),
    [
        ("joint", 14, 14, {}),
        ("agibot_ee6d", 20, 20, {}),
        ("franka_joint7", 20, 7, {}),
        ("so101_bimanual", 20, 12, {}),
        ("auto", 11, 5, {"max_action_dim": 11, "output_features": {"action": {"type": "ACTION", "shape": [5]}}}),
    ],
)
@torch.no_grad()
def test_action_modes(mode: str, width: int, robot: int, changes: dict) -> None:
    model = small_xvla(action_mode=mode, **changes)
    *io, noise = inputs(action=width)
    assert model(*io, noise, constant(6, 4)).shape == (2, 6, robot)
    moved = noise + torch.nn.functional.one_hot(torch.tensor(5), width)
    same = torch.equal(model(*io, noise, constant(6, 1)), model(*io, moved, constant(6, 1)))
    assert same == (5 in model.config.grippers)


@torch.no_grad()
def test_variants_of_the_policy() -> None:
    *seen, state, domain, noise = inputs()
    for changes in ({"use_hetero_proj": True}, {"len_soft_prompts": 0}, {"use_proprio": False, "max_state_dim": None}):
        model = small_xvla(**changes)
        got = model(*seen, state[:, : model.config.proprio_dim], domain, noise, constant(6, 4))
        swapped = model(*seen, state[:, : model.config.proprio_dim], domain.flip(0), noise, constant(6, 4))
        assert got.isfinite().all() and not torch.allclose(got, swapped)
        assert {n: tuple(t.shape) for n, t in model.state_dict().items()} == shapes(model.config)


@torch.no_grad()
def test_delays_per_sample() -> None:
    model, (*seen, state, domain, noise) = small_xvla(), inputs()
    context, prefix = model.context(*seen, domain), torch.randn(2, 2, 20)
    tau = constant(6, 4)[:, None].repeat(1, 2, 1)
    tau[:, 0, :2] = 0
    got = model.steps(context, state, domain, noise, tau, prefix, torch.tensor([2, 0]))[-1]
    assert torch.equal(got[0, :2], prefix[0])
    torch.testing.assert_close(got[1], model.steps(context, state, domain, noise, constant(6, 4))[-1][1])


@torch.no_grad()
def test_precisions_agree() -> None:
    io = inputs()
    want = small_xvla(dtype=torch.float64)(*io, constant(6, 4))
    single, half = small_xvla()(*io, constant(6, 4)), small_xvla().to(torch.bfloat16)(*io, constant(6, 4))
    assert single.dtype == half.dtype == torch.float32
    assert (single - want).abs().max() <= 2e-5 * want.abs().max()
    assert (half - want).abs().max() <= 0.15 * want.abs().max()


def test_every_parameter_gets_a_gradient() -> None:
    model, io = small_xvla().train(), inputs()
    model(*io, constant(6, 1)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_frame_table_is_a_constant() -> None:
    made = small_xvla(**{"florence_config": SMALL_XVLA["florence_config"]}).state_dict()[FRAMES]
    assert torch.equal(made[0], torch.tensor([0.0, 1.0] * 9))
    want = xvla_golden().state_dict()[FRAMES]
    from engine.models.xvla.reference import FrameTable

    torch.testing.assert_close(FrameTable(*want.shape).pos_idx_to_embed, want, rtol=0, atol=1e-5)


def test_bad_input() -> None:
    model, (images, mask, tokens, state, domain, noise) = small_xvla(), inputs()
    with pytest.raises(InputError, match="no camera"):
        model.encode(images, mask & False, tokens)
    with pytest.raises(InputError, match=r"\[n, 3, height, width\]"):
        model.embed_images(images)
    with torch.no_grad():
        context = model.context(images, mask, tokens, domain)
    with pytest.raises(InputError, match="no prefix"):
        model.steps(context, state, domain, noise, constant(6, 4), None, 1)
    with pytest.raises(InputError, match="do not fit"):
        model.steps(context, state, domain, noise, constant(7, 4))
