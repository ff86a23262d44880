"""The plain-torch MoTok: against golden values, against torch's own optimizer, and against its own definition."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from _motok import (
    TINY,
    constrained,
    filled,
    normal,
    single_waves,
    tiny,
    uniform,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lbfgs import _cubic_interpolate

from engine.errors import ConfigError, InputError
from engine.models.motok import guidance_reference
from engine.models.motok.config import FAST27, Diffusion, Guidance, MoTokConfig
from engine.models.motok.guidance_reference import (
    Constraints,
    control_loss,
    distances,
    gd,
    gd_norm,
    guide,
    lbfgs,
    loss_and_gradient,
    project,
    recover_from_ric,
)
from engine.models.motok.reference import (
    ARPlanner,
    ClipTower,
    DDMPlanner,
    Encoder,
    MoTokReference,
    Quantizer,
    Tokenizer,
    alpha_bars,
    best,
    denoise,
    guided_logits,
    hint,
    masked_counts,
    pick,
    sample_ar,
    sample_ddm,
    schedule,
)

FULL = MoTokConfig.humanml3d()
VARIANTS = [MoTokConfig.humanml3d(1), FULL, MoTokConfig.humanml3d(3), MoTokConfig.kit()]
VARIANT_NAMES = ["DR2", "DR4", "DR8", "KIT"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small products, and a second thread waits for a core that something else uses."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def check(x: Tensor, first: list[float], last: float | None, total: float, squares: float, rel: float = 1e-9) -> None:
    """Compare with golden numbers: the first four entries, the last one, sum and sum of squares."""
    x = x.flatten()
    scale = float(x.square().mean().sqrt())
    assert x[:4].tolist() == pytest.approx(first, rel=rel, abs=rel * scale)
    assert last is None or float(x[-1]) == pytest.approx(last, rel=rel, abs=rel * scale)
    assert float(x.sum()) == pytest.approx(total, rel=rel)
    assert float(x.square().sum()) == pytest.approx(squares, rel=rel)


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


# ---- golden: tokenizer and sampler ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return filled(Tokenizer(FULL))


@pytest.fixture(scope="module")
def condition(tokenizer: Tokenizer) -> Tensor:
    return tokenizer.condition(tokenizer.encode(normal("input.x", 1, 64, 263)))


def test_hash() -> None:
    want = [0.32296541100367904, 0.9392699846066535, -0.30673523154109716, -0.061776779126375914, -0.23977054469287395]
    assert uniform("test", 5).tolist() == want


def test_golden_encoder_and_tokens(tokenizer: Tokenizer) -> None:
    h = tokenizer.encoder(normal("input.x", 1, 64, 263))
    check(h.transpose(1, 2), [-0.4297624698, 1.063250618, 0.6522904526, 1.284838093], -1.429047534,
          71.7552358, 18357.90329)  # fmt: skip
    tokens = tokenizer.quantizer(h)
    assert tokens.tolist() == [[831, 358, 445, 673, 110, 602, 684, 471, 810, 110, 282, 58, 943, 588, 781, 252]]
    square = (h[0, :, None] - tokenizer.quantizer.codebook).square().sum(-1).sort(-1).values
    assert float(square[0, 0]) == pytest.approx(567.8544585, rel=1e-9)
    assert float((square[:, 1] - square[:, 0]).min()) == pytest.approx(0.114, abs=5e-4)
    assert torch.equal(square[:, 0], (h[0] - tokenizer.quantizer.codebook[tokens[0]]).square().sum(-1))


def test_golden_condition(condition: Tensor) -> None:
    check(condition, [-0.06350122908, -0.2152177007, 0.05329169447, 0.08009057883], 0.01410723391,
          -135.138746, 4063.036019)  # fmt: skip


def test_golden_denoiser(tokenizer: Tokenizer, condition: Tensor) -> None:
    time, t = tokenizer.denoiser.time_embed, torch.tensor(599)
    check(time.waves(t), [-0.5025964409, -0.2182720698, -0.9394269303, 0.4484211417], None, 46.70893563, 128)
    check(time(t), [0.7759726135, 0.621417338, -0.04235189081, -0.09431435559], None, -1.135552686, 118.3806588)
    check(tokenizer.denoiser(normal("input.xt", 1, 64, 263), t, condition),
          [0.3106600566, 0.7946063971, 0.3766197781, 0.7588289212], -0.4732287806,
          -363.3047972, 18776.26988)  # fmt: skip


@pytest.mark.parametrize(
    ("beta", "golden"),
    [
        ("linear", ([-0.1585649503, -1.2277739, -0.9771427276, 1.571429097], -2.077407963, -920.7307577, 19436.5777)),
        ("cosine", ([0.3112396596, -1.771422242, -0.8019123384, 1.608738709], -1.871032911, -841.960188, 19815.96745)),
    ],
)
def test_golden_sampling(tokenizer: Tokenizer, condition: Tensor, beta: str, golden) -> None:
    check(denoise(lambda x, t: tokenizer.denoiser(x, t, condition), normal("input.noise", 1, 64, 263),
                  Diffusion(beta_schedule=beta)), *golden)  # fmt: skip


# ---- golden: planners and text ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ddm() -> DDMPlanner:
    return filled(DDMPlanner(FULL), "ddm.")


def golden_ids() -> Tensor:
    n = torch.arange(16)
    return torch.where(n % 3 == 0, 1024, (7 * n * n + 3) % 1024)[None]


def test_golden_ddm(ddm: DDMPlanner) -> None:
    ids, text = golden_ids(), uniform("input.clip", 1, 512)
    exact = ddm.position_enc.pe.clone()
    assert (exact - single_waves(5000, 384))[:64].abs().max() < 1e-5
    ours = ddm(ids, text)
    ddm.position_enc.pe.copy_(single_waves(5000, 384))
    cond = ddm(ids, text)
    check(cond.transpose(1, 2), [-2.073007143, -2.021128563, -2.002463918, -2.052453883], -2.168094084,
          -189.8878703, 15775.19807, 1e-8)  # fmt: skip
    check(ddm(ids, torch.zeros_like(text)).transpose(1, 2), [-1.936185297, -1.893723191, -1.881746028, -1.932079757],
          None, -220.6518172, 15787.90478, 1e-8)  # fmt: skip
    check(ddm(ids[:, :12], text).transpose(1, 2), [-2.060909321, -2.009492332, -1.97881037, -2.016665021],
          None, -12.22842016, 11653.80055, 1e-8)  # fmt: skip
    ddm.position_enc.pe.copy_(exact)
    assert error(ours, cond) < 1e-6  # positions as the formula says move nothing that matters


def test_padding_is_not_seen(ddm: DDMPlanner) -> None:
    ids, text, traj = golden_ids(), uniform("input.clip", 1, 512), uniform("input.traj", 1, 16, 384)
    short = ddm(ids[:, :12], text, traj[:, :12])
    ids[:, 12:] = ddm.pad
    torch.testing.assert_close(ddm(ids, text, traj)[:, :12], short, rtol=0, atol=1e-12)


def test_golden_ar() -> None:
    n, model = torch.arange(8), filled(ARPlanner(FULL), "ar.")
    ids, text = ((7 * n * n + 3) % 1024)[None], uniform("input.clip", 1, 512)
    ours = model(ids, text)
    model.trans_base.pos_embed.embed.copy_(single_waves(51, 768))
    logits = model(ids, text)
    assert logits.shape == (1, 9, 1025) and error(ours, logits) < 1e-6
    check(logits, [-0.7245825787, 0.5158677203, 0.4477128554, 0.002608673911], 0.1329961268,
          -145.8160591, 9055.714929, 1e-8)  # fmt: skip


def test_golden_clip() -> None:
    model = filled(ClipTower(FULL.clip), "clip.")
    ids = torch.zeros(1, 77, dtype=torch.long)
    ids[0, :6] = torch.tensor([49406, 320, 2533, 4160, 525, 49407])
    want = model(ids)
    check(want, [-1.027897487, -0.1635132148, -0.02444161335, -1.110352436], 1.184055109, 2.332927415, 597.9586973)
    torch.testing.assert_close(model(ids[:, :6]), want, rtol=0, atol=1e-12)  # padding behind the end is not seen
    with pytest.raises(InputError, match="at most 77"):
        model(torch.zeros(1, 78, dtype=torch.long))


# ---- golden: guidance -------------------------------------------------------------------------------------------


def objective(x: Tensor, c: Constraints):
    def value(flat: Tensor) -> tuple[float, Tensor]:
        loss, grad = loss_and_gradient(flat.view_as(x), c)
        return float(loss), grad.flatten()

    return value


def test_golden_joints_and_gradient() -> None:
    x, c = constrained()
    joints = recover_from_ric(c.motion(x))
    check(joints, [0, 0.9771312362, 0, -0.01674554259], None, 21.67555546, 132.8608247)
    assert joints[63, 0].tolist() == pytest.approx([-0.17665579775, 1.04595747783, -0.00045931160], abs=1e-11)
    assert joints[63, 20].tolist() == pytest.approx([-0.00758727782, 0.00537974818, 0.11939210044], abs=2e-11)
    loss, grad = loss_and_gradient(x, c)
    assert float(loss) == pytest.approx(0.011908933253347602, rel=1e-13)
    check(grad, [8.85814586e-05, 0.0001126411245, 5.480283102e-05, -0.0003961057439], None,
          0.005849858825, 5.542218199e-06)  # fmt: skip


def test_golden_solvers() -> None:
    x, c = constrained()
    y = gd(x, c, 50.0, 10)
    assert float(control_loss(y, c)) == pytest.approx(0.00964553162018285, rel=1e-12)
    assert float(y.sum()) == pytest.approx(160.4735021, rel=1e-9)
    for calls, evals, loss in ((1, 5, 0.007848023266325922), (5, 25, 0.0016522214977806933), (10, 50, 0.0002991352807)):
        flat, spent = lbfgs(objective(x, c), x.flatten(), calls)
        y = flat.view_as(x)
        # Rounding of another machine grows from call to call.
        assert spent == evals and float(control_loss(y, c)) == pytest.approx(loss, rel=1e-12 if calls == 1 else 1e-8)
        if calls == 5:
            assert float(distances(y, c).mean()) == pytest.approx(0.05443217102, rel=1e-8)
    assert float(distances(y, c).mean()) == pytest.approx(0.01642007147, rel=1e-8)
    assert y.flatten()[:4].tolist() == pytest.approx([0.9352270338, -5.412882321, 0.7872721187, 1.60194138], rel=1e-8)


# ---- kinematics and gradient ------------------------------------------------------------------------------------


def slow_joints(motion: np.ndarray) -> np.ndarray:
    """Joint positions frame by frame."""
    frames, count = len(motion), (motion.shape[1] + 1) // 12
    out, angle, x, z = np.zeros((frames, count, 3)), 0.0, 0.0, 0.0
    for t in range(frames):
        if t:
            angle += 2 * motion[t - 1, 0]
        c, s = math.cos(angle), math.sin(angle)
        if t:
            vx, vz = motion[t - 1, 1:3]
            x, z = x + vx * c - vz * s, z + vx * s + vz * c
        out[t, 0] = x, motion[t, 3], z
        for j in range(1, count):
            a, b, d = motion[t, 4 + 3 * (j - 1) : 7 + 3 * (j - 1)]
            out[t, j] = a * c - d * s + x, b, a * s + d * c + z
    return out


@pytest.mark.parametrize("joints", [2, 21, 22])
def test_joints_frame_by_frame(joints: int) -> None:
    motion = normal("motion", 2, 30, 12 * joints - 1)
    got = recover_from_ric(motion)
    assert got.shape == (2, 30, joints, 3)
    for i in range(2):
        np.testing.assert_allclose(got[i].numpy(), slow_joints(motion[i].numpy()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("features", [0, 11, 22, 24, 262, 264])
def test_features_of_no_skeleton(features: int) -> None:
    with pytest.raises(InputError, match="12 \\* joints - 1"):
        recover_from_ric(torch.zeros(4, features))


@pytest.mark.parametrize(
    "case",
    [
        {}, {"joints": (0,)}, {"joints": (20,), "every": 1}, {"joints": tuple(range(22)), "every": 1},
        {"frames": 196, "joints": (0, 10, 21)}, {"frames": 2}, {"frames": 1},
        {"of": 21, "joints": (0, 4, 20), "scale": 0.001},
    ],
)  # fmt: skip
def test_gradient_is_autograds(case: dict[str, Any]) -> None:
    x, c = constrained(**case)
    loss, grad = loss_and_gradient(x, c)
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        want = control_loss(leaf, c)
        want.backward()
    assert float(loss) == float(want)
    assert error(grad, leaf.grad) <= 1e-12
    inactive = torch.ones(x.shape[1], dtype=torch.bool)
    inactive[:4] = False
    for j in c.mask.any(0).nonzero()[:, 0].tolist():
        inactive[4 + 3 * (j - 1) : 4 + 3 * j] = False if j else inactive[1:4]
    assert torch.equal(grad[:, inactive], torch.zeros_like(grad[:, inactive]))
    assert torch.equal(grad[-1, :3], torch.zeros_like(grad[-1, :3]))


def test_kit_is_metres() -> None:
    """Millimetres inside, metres outside: a 20 cm target off gives the loss of 20 cm."""
    x, c = constrained(of=21, joints=(0,), scale=0.001)
    target = 0.001 * recover_from_ric(c.motion(x)) + torch.tensor([0.0, 0.2, 0.0])
    assert float(control_loss(x, replace(c, target=target))) == pytest.approx(0.04 / 3)
    assert distances(x, replace(c, target=target)).tolist() == pytest.approx([0.2] * int(c.mask.sum()))


def test_what_constraints_refuse() -> None:
    x, c = constrained()
    for change, message in (
        ({"mask": torch.zeros_like(c.mask)}, "true entry"),
        ({"mask": c.mask.long()}, "true entry"),
        ({"mask": c.mask[:-1]}, "do not fit"),
        ({"target": c.target[:, :-1]}, "do not fit"),
        ({"std": c.std[:-1]}, "differ"),
        ({"target": c.target * math.nan}, "not finite"),
    ):
        with pytest.raises(InputError, match=message):
            replace(c, **change)
    with pytest.raises(InputError, match="does not fit"):
        control_loss(x[:-1], c)
    free = torch.where(c.mask[..., None], c.target, math.nan)  # what is not asked for may be anything
    assert float(control_loss(x, replace(c, target=free))) == float(control_loss(x, c))


# ---- L-BFGS is torch's ------------------------------------------------------------------------------------------


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def valley(x: Tensor) -> Tensor:
    return (x.square() * torch.logspace(-4, 4, len(x), dtype=x.dtype)).sum() + 0.1 * x.sin().sum()


def bumps(x: Tensor) -> Tensor:
    return (x.square() / 10 + (3 * x).cos()).sum() + (x[0] * x[1]).tanh()


def cliff(x: Tensor) -> Tensor:
    return (1 + x.abs()).log().sum() + (x - 5).relu().square().sum()


def torch_lbfgs(value, x: Tensor, calls: int, **options: Any) -> tuple[Tensor, int]:
    p = nn.Parameter(x.clone())
    optimizer = torch.optim.LBFGS([p], lr=1, line_search_fn="strong_wolfe", **options)

    def closure() -> float:
        f, p.grad = value(p.detach().clone())
        return f

    for _ in range(calls):
        optimizer.step(closure)  # type: ignore[arg-type]
    return p.detach(), optimizer.state[p]["func_evals"]


def torchs_cubic(a, b, low: float, high: float) -> float:
    """The same formula with torch's rounding: its square root and its float / tensor are not the nearest numbers."""
    (ta, da), (tb, db) = (torch.tensor([p.t, p.slope], dtype=torch.float64) for p in (a, b))
    return float(_cubic_interpolate(ta, a.f, da, tb, b.f, db, bounds=(low, high)))


@pytest.mark.parametrize("options", [
    {"max_iter": 4, "history_size": 10}, {"max_iter": 20, "history_size": 3}, {"max_iter": 7, "history_size": 1},
    {"max_iter": 4, "history_size": 10, "max_eval": 25}, {"max_iter": 1, "history_size": 2},
])  # fmt: skip
@pytest.mark.parametrize("function", [rosenbrock, valley, bumps, cliff, "guidance"])
def test_lbfgs_is_torchs(function, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    x, c = constrained(24)
    x = x.flatten() if function == "guidance" else 4 * normal("start", 13)

    def value(flat: Tensor) -> tuple[float, Tensor]:
        if function == "guidance":
            return objective(x.view(24, -1), c)(flat)
        with torch.enable_grad():
            leaf = flat.clone().requires_grad_()
            f = function(leaf)
            f.backward()
        return f.item(), leaf.grad

    ours = {{"history_size": "history"}.get(k, k): v for k, v in options.items()}
    for calls in (1, 2, 13):
        want, evals = torch_lbfgs(value, x, calls, **options)
        got, spent = lbfgs(value, x, calls, **ours)
        assert spent == evals
        assert error(got, want) < (1e-12 if calls == 1 else 1e-5)  # an ulp grows along the way
        with monkeypatch.context() as patch:
            patch.setattr(guidance_reference, "_cubic", torchs_cubic)
            got, spent = lbfgs(value, x, calls, **ours)
        assert spent == evals and torch.equal(got, want)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", ["value", "gradient", "both"])
def test_lbfgs_ends_on_numbers_that_are_none(bad: float, where: str) -> None:
    def value(flat: Tensor) -> tuple[float, Tensor]:
        worse = flat.norm() < 9
        f = bad if worse and where != "gradient" else float(flat.square().sum())
        return f, torch.full_like(flat, bad) if worse and where != "value" else 2 * flat

    assert lbfgs(value, normal("start", 13) * 4, 10)[1] <= 60
    assert lbfgs(value, normal("start", 13), 10)[1] <= 60


def test_lbfgs_keeps_to_its_limit() -> None:
    x, c = constrained()
    made = []

    def value(flat: Tensor) -> tuple[float, Tensor]:
        made.append(1)
        return objective(x, c)(flat)

    for limit in (0, 5, 6, 17, 40):
        made.clear()
        _, spent = lbfgs(value, x.flatten(), 50, max_evals=limit)
        assert spent == len(made) <= limit and spent >= min(limit - 5, 0)


# ---- the other solvers ------------------------------------------------------------------------------------------


def reachable(**case: Any) -> tuple[Tensor, Constraints]:
    x, c = constrained(**case)
    target = c.target.clone()
    target[0, 0, [0, 2]] = 0
    return x, replace(c, target=target)


@pytest.mark.parametrize("case", [
    {}, {"joints": (0,)}, {"joints": (20, 10)}, {"joints": tuple(range(22)), "every": 1}, {"frames": 196, "every": 50},
    {"of": 21, "joints": (0, 7), "scale": 0.001}, {"reach": 3.0},
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_project_meets_what_can_be_met(case: dict[str, Any], dtype: torch.dtype) -> None:
    x, c = reachable(**case)
    y = project(x.to(dtype), c.to(dtype))
    assert y.dtype == dtype
    assert float(distances(y.double(), c).max()) < (1e-12 if dtype == torch.float64 else 4e-6)
    joints = len(c.mask[0])
    assert torch.equal(y[:, 0], x.to(dtype)[:, 0])
    assert torch.equal(y[:, 4 + 3 * (joints - 1) :], x.to(dtype)[:, 4 + 3 * (joints - 1) :])


def test_project_reports_what_cannot_be_met() -> None:
    x, c = constrained()
    left = distances(project(x, c), c)
    assert float(left[0]) == pytest.approx(float(c.target[0, 0, [0, 2]].norm()))
    assert float(left[1:].max()) < 1e-12


def test_project_is_the_least_change_of_the_root() -> None:
    x, c = reachable(frames=12, joints=(0,))
    with torch.enable_grad():
        jacobian = torch.autograd.functional.jacobian(lambda v: recover_from_ric(c.motion(v))[:, 0, [0, 2]], x)
    rows = c.mask[1:, 0].nonzero()[:, 0] + 1
    part = jacobian[rows][..., 1:3].flatten(2).flatten(0, 1)
    missing = (c.target[:, 0] - recover_from_ric(c.motion(x))[:, 0])[rows][:, [0, 2]].flatten()
    want = torch.linalg.pinv(part) @ missing
    torch.testing.assert_close((project(x, c) - x)[:, 1:3].flatten(), want, rtol=0, atol=1e-10)


def test_gd_norm_follows_the_distances() -> None:
    x, c = constrained(joints=(0, 20), every=4)
    target = c.target.clone()
    target[4, 20] = recover_from_ric(c.motion(x))[4, 20]  # met already: no direction, no NaN
    c = replace(c, target=target)
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        c.error(recover_from_ric(c.motion(leaf))).norm(dim=-1).sum().backward()
    step = 20 / 16 * 0.04 * leaf.grad
    step[0] = 0
    torch.testing.assert_close(gd_norm(x, c, 0.04, 1), x - step, rtol=0, atol=1e-12)
    torch.testing.assert_close(gd_norm(x, c, 0.0001, 1), x - step / 4, rtol=0, atol=1e-12)
    assert float(distances(gd_norm(x, c, 0.01, 40), c).mean()) < float(distances(x, c).mean())


@pytest.mark.parametrize("solver", ["lbfgs", "lbfgs_last", "gd", "gd_norm", "project"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_guide(solver: str, dtype: torch.dtype) -> None:
    x, c = constrained()
    y, spent = guide(x.to(dtype), c, Guidance(solver=solver), 3, 0.01)
    assert y.dtype == dtype and float(control_loss(y.double(), c)) < float(control_loss(x, c))
    if dtype == torch.float64:
        assert spent == {"lbfgs": 50, "lbfgs_last": 5, "gd": 10, "gd_norm": 500, "project": 0}[solver]
    _, spent = guide(x.to(dtype), c, Guidance(solver=solver, max_evals=20), 3, 0.01, 12)
    assert spent <= 8


def test_project_without_the_root_solves_first() -> None:
    x, c = constrained(joints=(20,))
    y, spent = guide(x, c, Guidance(solver="project"), 0)
    assert spent > 10 and float(distances(y, c).max()) < 1e-12
    assert float((y - project(x, c)).norm()) > 0.1


def test_calls_per_step() -> None:
    steps = range(27)
    assert sum(Guidance().calls(k) for k in steps) == 117
    assert sum(Guidance(n_first=5).calls(k) for k in steps) == 185
    assert [Guidance(solver="lbfgs_last", n_first=5).calls(k) for k in (26, 1, 0)] == [1, 1, 10]


# ---- schedules --------------------------------------------------------------------------------------------------


def test_fast27_follows_from_its_rule() -> None:
    want: list[int] = []
    for section, count in enumerate((10, 10, 3, 2, 2)):
        stride, at = 199 / (count - 1), 0.0
        for _ in range(count):
            want.append(200 * section + round(at))
            at += stride
    want[-1] = 997
    assert tuple(want) == FAST27 and len(FAST27) == 27


LINEAR = """.9999 .99268577 .97606241 .95049997 .91671327 .87360499 .8260645 .77359578 .71748636 .65903851 .65634701
.59680883 .53744096 .47931193 .42334634 .36797562 .31862485 .27322768 .23203437 .19514644 .19357201 .077796658
.025879389 .025567492 .0015320895 .0015075211 4.202153e-05"""
COSINE = """.99995872 .9978232 .99334852 .9865557 .97747667 .96558694 .95197589 .93624113 .91845662 .89870592 .89776291
.87605605 .85258227 .82745188 .80078299 .77139301 .74197475 .71141969 .67987142 .64747821 .64598817 .49228517
.34080964 .339333 .094045613 .09313778 9.715044e-06"""


@pytest.mark.parametrize(("beta", "table"), [("linear", LINEAR), ("cosine", COSINE)])
def test_alpha_bars(beta: str, table: str) -> None:
    d = Diffusion(beta_schedule=beta)
    s = schedule(d)
    for got, text in zip(s.alpha_bar.tolist(), table.split(), strict=True):
        assert got == pytest.approx(float(text), rel=6e-8)
    bars = alpha_bars(d)
    assert len(bars) == 1000 and bool((bars.diff() < 0).all())
    assert (float(s.a[0]), float(s.b[0])) == (1.0, 0.0)


@pytest.mark.parametrize("steps", [FAST27, (0, 1, 2, 500, 999), (7,), tuple(range(0, 1000, 20))])
def test_steps_are_those_of_the_definitions(steps: tuple[int, ...]) -> None:
    """ddim keeps the noise that x and the clean estimate imply; ddpm is the posterior by Bayes' rule."""
    d = Diffusion(timesteps=steps)
    s, small = schedule(d), schedule(replace(d, variance="fixed_small"))
    clean, noise = 0.7, -1.3
    for k in range(len(steps)):
        bar, after = float(s.alpha_bar[k]), float(s.alpha_bar[k - 1]) if k else 1.0
        x = math.sqrt(bar) * clean + math.sqrt(1 - bar) * noise
        want = math.sqrt(after) * clean + math.sqrt(1 - after) * noise
        assert float(s.a[k]) * clean + float(s.b[k]) * x == pytest.approx(want, abs=1e-12)
        alpha = bar / after
        assert float(s.sigma[k]) ** 2 == pytest.approx(1 - alpha, rel=1e-9)
        if k == 0:
            assert (float(s.mean_clean[0]), float(s.mean_x[0])) == (pytest.approx(1.0), 0.0)
            continue
        # x' ~ N(sqrt(after) clean, 1 - after), x | x' ~ N(sqrt(alpha) x', 1 - alpha)
        precision = 1 / (1 - after) + alpha / (1 - alpha)
        mean = (math.sqrt(after) * clean / (1 - after) + math.sqrt(alpha) * x / (1 - alpha)) / precision
        assert float(s.mean_clean[k]) * clean + float(s.mean_x[k]) * x == pytest.approx(mean, rel=1e-9)
        assert float(small.sigma[k]) ** 2 == pytest.approx(1 / precision, rel=1e-9)


def test_ddpm_adds_its_noise_and_none_at_the_end() -> None:
    d = Diffusion(sampler="ddpm", timesteps=(0, 300, 700))
    s, noise, extra = schedule(d), normal("n", 1, 4, 5), normal("e", 3, 1, 4, 5)
    x = noise
    for k in (2, 1, 0):
        x = float(s.mean_clean[k]) * x.tanh() + float(s.mean_x[k]) * x + (float(s.sigma[k]) * extra[k] if k else 0)
    seen = []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        seen.append(int(t))
        return x.tanh()

    torch.testing.assert_close(denoise(predict, noise, d, extra), x, rtol=0, atol=1e-14)
    assert seen == [700, 300, 0]
    for bad in (None, extra[:2]):
        with pytest.raises(InputError, match=r"step_noise of \[3, 1, 4, 5\]"):
            denoise(predict, noise, d, bad)


# ---- the discrete planner ---------------------------------------------------------------------------------------


def test_masked_counts() -> None:
    assert masked_counts(49, 10) == [49, 48, 46, 42, 38, 31, 24, 17, 9, 1]
    assert masked_counts(1, 10) == [1] * 10 and masked_counts(0, 10) == [0] * 10 and masked_counts(5, 1) == [5]
    share = (torch.linspace(0, 1, 10) * math.pi * 0.5).double().cos()  # angles in fp32, as the original has them
    for n in range(1, 200):
        assert masked_counts(n, 10) == [max(1, round(float(s))) for s in share * n]


def test_pick_is_the_inverse_of_the_sums() -> None:
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    for u, want in ((0.0, 1), (0.2499, 1), (0.2501, 3), (0.7499, 3), (0.7501, 4), (1 - 2**-53, 4)):
        assert int(pick(p.log(), torch.tensor(u, dtype=torch.float64))) == want
    logits, u = normal("logits", 50, 40), uniform("u", 50).abs()
    mass = logits.softmax(-1).cumsum(-1)
    for row in range(50):
        want = next(i for i in range(40) if mass[row, i] > u[row] * mass[row, -1])
        assert int(pick(logits, u)[row]) == want


def test_best_keeps_so_many_and_the_lowest_of_equals() -> None:
    kept = best(torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0]), 3)
    assert kept.isfinite().nonzero()[:, 0].tolist() == [1, 2, 3]
    assert FULL.topk == 103 and int(best(normal("l", 1024), FULL.topk).isfinite().sum()) == 103


def test_quantizer_takes_the_lowest_of_equals() -> None:
    q = Quantizer(tiny())
    q.codebook[7] = q.codebook[3]
    q.codebook[30] = q.codebook[3]
    assert q(q.codebook[[7, 3, 30, 5]]).tolist() == [3, 3, 3, 5]


def tiny_ddm(c: MoTokConfig) -> DDMPlanner:
    return filled(DDMPlanner(c), "ddm.")


def slow_ddm(model: DDMPlanner, c: MoTokConfig, ids: list[int], free: list[bool], uniforms: Tensor, text: Tensor,
             traj: Tensor, coins: list[bool], w: float) -> list[int]:  # fmt: skip
    """The planner's loop for one sample, token by token."""
    scores = [0.0 if f else 1e5 for f in free]
    ids = [c.codes if f else i for i, f in zip(ids, free, strict=True)]
    count = sum(free)
    for i in range(c.ddm.steps):
        n = max(1, math.floor(math.cos(i / (c.ddm.steps - 1) * math.pi / 2) * count + 0.5 - 1e-9))
        chosen = sorted(range(len(ids)), key=lambda j: (scores[j], j))[:n]
        for j in chosen:
            ids[j] = c.codes
        seen, none = torch.tensor([ids]), torch.zeros_like(text)
        cond = model(seen, text, traj)
        uncond = model(seen, text, torch.zeros_like(traj)) if coins[i] else model(seen, none, traj)
        logits = (uncond + w * (cond - uncond))[0]
        scores = [1e5] * len(ids)
        for j in chosen:
            order = sorted(range(c.codes), key=lambda k: (-float(logits[j, k]), k))[: c.topk]
            weights = [math.exp(float(logits[j, k])) for k in sorted(order)]
            mass = np.cumsum(weights)
            at = sorted(order)[int(np.argmax(mass > float(uniforms[i, j]) * mass[-1]))]
            ids[j], scores[j] = at, float(logits[j].softmax(-1)[at])
    return ids


@pytest.mark.parametrize("edited", [False, True])
def test_ddm_sampling_token_by_token(edited: bool) -> None:
    c = tiny()
    model, lengths, longest = tiny_ddm(c), [13, 6, 16], 16
    uniforms, text = uniform("u", 3, 5, longest).abs(), uniform("t", 3, 14)
    traj, coins = uniform("m", 3, longest, 24), uniform("c", 3, 5) > 0
    known = ((uniform("k", 3, longest) + 1) * 20).long()
    edit = uniform("e", 3, longest) > 0
    more = {"known": known, "edit": edit} if edited else {}
    got = sample_ddm(model, c, lengths, uniforms, text, traj, coins, 2.0, **more)
    for b, n in enumerate(lengths):
        free = edit[b, :n].tolist() if edited else [True] * n
        want = slow_ddm(model, c, known[b, :n].tolist(), free, uniforms[b, :, :n], text[b : b + 1],
                        traj[b : b + 1, :n], coins[b].tolist(), 2.0)  # fmt: skip
        assert got[b, :n].tolist() == want and (got[b, n:] == model.pad).all()
        assert bool((got[b, :n] < c.codes).all())
        if edited:
            keep = ~edit[b, :n]
            assert torch.equal(got[b, :n][keep], known[b, :n][keep])


def test_nothing_to_edit_changes_nothing() -> None:
    c = tiny()
    known = torch.arange(8)[None]
    got = sample_ddm(tiny_ddm(c), c, [8], torch.zeros(1, 5, 8), known=known, edit=torch.zeros(1, 8).bool())
    assert torch.equal(got, known)


def test_guided_logits() -> None:
    text, traj, none = uniform("t", 2, 4), uniform("m", 2, 3, 4), torch.zeros(2, 4).double()
    seen: list[tuple[Tensor, Tensor | None]] = []

    def predict(t: Tensor, m: Tensor | None) -> Tensor:
        seen.append((t, m))
        return t[:, None] * 2 + (0 if m is None else m)

    off = torch.tensor([False, True])
    got = guided_logits(predict, text, traj, 3.0, off, none)
    assert len(seen) == 2 and torch.equal(seen[0][0], text) and seen[0][1] is traj
    uncond = torch.stack([traj[0], 2 * text[1][None].expand(3, -1)])  # sample 0 lost its text, 1 its trajectory
    want = uncond + 3 * (2 * text[:, None] + traj - uncond)
    torch.testing.assert_close(got, want)
    for t, m, w, passes in ((text, traj, 1.0, 1), (None, traj, 3.0, 1), (None, None, 3.0, 1), (text, None, 3.0, 2)):
        seen.clear()
        guided_logits(predict, t, m, w, off, none)
        assert len(seen) == passes
        assert torch.equal(seen[0][0], none if t is None else text) and seen[0][1] is m
    assert torch.equal(seen[1][0], none) and seen[1][1] is None


def test_even_odd_needs_no_coins() -> None:
    c = tiny(cfg_alternate="even_odd")
    model, u = tiny_ddm(c), uniform("u", 2, 5, 8).abs()
    text, traj = uniform("t", 2, 14), uniform("m", 2, 8, 24)
    coins = (torch.arange(5) % 2 == 1).expand(2, 5)
    want = sample_ddm(model, tiny(), [8, 8], u, text, traj, coins)
    assert torch.equal(sample_ddm(model, c, [8, 8], u, text, traj), want)
    with pytest.raises(InputError, match=r"coins of \[2, 5\]"):
        sample_ddm(model, tiny(), [8, 8], u, text, traj)


def test_what_sampling_refuses() -> None:
    c = tiny()
    ddm, ar = tiny_ddm(c), filled(ARPlanner(c), "ar.")
    u, known = torch.zeros(1, 5, 8), torch.zeros(1, 8, dtype=torch.long)
    with pytest.raises(InputError, match=r"\[1, 5, 9\]"):
        sample_ddm(ddm, c, [9], u)
    with pytest.raises(InputError, match="together"):
        sample_ddm(ddm, c, [8], u, known=known)
    with pytest.raises(InputError, match="not in 0 to 39"):
        sample_ddm(ddm, c, [8], u, known=known - 1, edit=known.bool())
    with pytest.raises(InputError, match="at most 16"):
        sample_ar(ar, c, torch.zeros(1, 17))
    with pytest.raises(InputError, match="4 tokens"):
        sample_ar(ar, c, torch.zeros(1, 4), [5])


# ---- the autoregressive planner ---------------------------------------------------------------------------------


def test_ar_is_causal_and_sees_the_trajectory_one_step_ahead() -> None:
    c = tiny()
    model, text = filled(ARPlanner(c), "ar."), uniform("t", 1, 14)
    ids, traj = torch.arange(6)[None], uniform("m", 1, 6, 24)
    logits = model(ids, text, traj)
    assert logits.shape == (1, 7, 41)
    for n in range(6):
        torch.testing.assert_close(model(ids[:, :n], text, traj), logits[:, : n + 1], rtol=0, atol=1e-12)
        moved = traj.clone()
        moved[:, n] += uniform("more", 24)  # not a constant, which the norms would take away
        changed = (model(ids, text, moved) - logits).abs().amax((0, 2)) > 1e-6
        assert changed.tolist() == [p >= n for p in range(7)]


@pytest.mark.parametrize("known_length", [False, True])
def test_ar_sampling_token_by_token(known_length: bool) -> None:
    c = tiny()
    model = filled(ARPlanner(c), "ar.")
    uniforms, text, traj = uniform("u", 4, 16).abs(), uniform("t", 4, 14), uniform("m", 4, 16, 24)
    uniforms[0, 5] = uniforms[2, 0] = 1 - 1e-9  # END is the last index
    coins, lengths = uniform("c", 4, 16) > 0, [16, 3, 9, 1] if known_length else None
    got = sample_ar(model, c, uniforms, lengths, text, traj, coins, 1.5)
    ends = 0
    for b in range(4):
        ids: list[int] = []
        one, path, none = text[b : b + 1], traj[b : b + 1], torch.zeros(1, 14).double()
        for n in range(lengths[b] if lengths else 16):
            seen = torch.tensor([ids], dtype=torch.long)
            cond = model(seen, one, path)[0, -1]
            uncond = (model(seen, one, path * 0) if coins[b, n] else model(seen, none, path))[0, -1]
            logits = uncond + 1.5 * (cond - uncond)
            mass = (logits[: model.end] if lengths else logits).softmax(-1).cumsum(-1)
            new = next(i for i in range(len(mass)) if mass[i] > uniforms[b, n] * mass[-1])
            if new == model.end:
                ends += 1
                break
            ids.append(new)
        assert got[b].tolist() == ids + [model.pad] * (16 - len(ids))
    assert known_length or ends >= 2


# ---- shapes, keys and sizes -------------------------------------------------------------------------------------


def conv(name: str, out: int, channels: int, kernel: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, channels, kernel), f"{name}.bias": (out,)}


def linear(name: str, out: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, inputs), f"{name}.bias": (out,)}


def layer_norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def stack_keys(name: str) -> dict[str, tuple[int, ...]]:
    out = {}
    for i in range(3):
        out |= conv(f"{name}.model.{i}.conv1", 512, 512, 3) | conv(f"{name}.model.{i}.conv2", 512, 512, 1)
    return out


def encoder_keys(name: str, channels: int, out: int, down_t: int) -> dict[str, tuple[int, ...]]:
    keys = conv(f"{name}.model.0", 512, channels, 3) | conv(f"{name}.model.{2 + down_t}", out, 512, 3)
    for i in range(2, 2 + down_t):
        keys |= conv(f"{name}.model.{i}.0", 512, 512, 4) | stack_keys(f"{name}.model.{i}.1")
    return keys


def tokenizer_keys(c: MoTokConfig) -> dict[str, tuple[int, ...]]:
    keys = encoder_keys("encoder", c.features, 768, c.down_t) | {"quantizer.codebook": (1024, 768)}
    keys |= conv("decoder.model.0", 512, 768, 3)
    for i in range(2, 2 + c.down_t):
        keys |= stack_keys(f"decoder.model.{i}.0") | conv(f"decoder.model.{i}.2", 512, 512, 3)
    keys |= conv(f"decoder.model.{2 + c.down_t}", 512, 512, 3) | conv(f"decoder.model.{4 + c.down_t}", 768, 512, 3)
    keys |= linear("denoiser.input_proj", 768, c.features) | linear("denoiser.cond_embed", 768, 768)
    keys |= linear("denoiser.time_embed.mlp.0", 768, 256) | linear("denoiser.time_embed.mlp.2", 768, 768)
    for i in range(6):
        block = f"denoiser.blocks.{i}"
        keys |= layer_norm(f"{block}.conv_norm", 768) | conv(f"{block}.conv", 768, 768, c.denoiser.kernel)
        keys |= layer_norm(f"{block}.mlp_block.in_ln", 768) | linear(f"{block}.mlp_block.adaLN_modulation.1", 2304, 768)
        keys |= linear(f"{block}.mlp_block.mlp.0", 768, 768) | linear(f"{block}.mlp_block.mlp.2", 768, 768)
    return (
        keys
        | linear("denoiser.final_layer.linear", c.features, 768)
        | linear("denoiser.final_layer.adaLN_modulation.1", 1536, 768)
    )


def ddm_keys(c: MoTokConfig) -> dict[str, tuple[int, ...]]:
    keys: dict[str, tuple[int, ...]] = {"token_emb.weight": (1026, 768), "position_enc.pe": (5000, 1, 384)}
    keys |= linear("input_process.poseEmbedding", 384, 768) | linear("cond_emb", 384, 512)
    for i in range(6):
        layer = f"seqTransEncoder.layers.{i}"
        keys |= {f"{layer}.self_attn.in_proj_weight": (1152, 384), f"{layer}.self_attn.in_proj_bias": (1152,)}
        keys |= linear(f"{layer}.self_attn.out_proj", 384, 384)
        keys |= linear(f"{layer}.linear1", 1024, 384) | linear(f"{layer}.linear2", 384, 1024)
        keys |= layer_norm(f"{layer}.norm1", 384) | layer_norm(f"{layer}.norm2", 384)
    keys |= linear("output_process.dense", 384, 384) | layer_norm("output_process.LayerNorm", 384)
    keys |= linear("output_process.poseFinal", 1024, 384)
    return keys | encoder_keys("traj_encoder", 3 * c.joints, 384, c.down_t)


def ar_keys(c: MoTokConfig) -> dict[str, tuple[int, ...]]:
    keys: dict[str, tuple[int, ...]] = {"trans_base.tok_emb.weight": (1026, 768)}
    keys |= {"trans_base.pos_embed.embed": (c.max_tokens + 2, 1, 768), "trans_head.head.weight": (1025, 768)}
    keys |= linear("trans_base.cond_emb", 768, 512) | layer_norm("trans_head.ln_f", 768)
    for i in range(9):
        block = f"trans_base.blocks.{i}"
        keys |= layer_norm(f"{block}.ln1", 768) | layer_norm(f"{block}.ln2", 768)
        for part in ("key", "query", "value", "proj"):
            keys |= linear(f"{block}.attn.{part}", 768, 768)
        keys |= linear(f"{block}.mlp.0", 3072, 768) | linear(f"{block}.mlp.2", 768, 3072)
    return keys | encoder_keys("traj_encoder", 3 * c.joints, 768, c.down_t)


def clip_keys() -> dict[str, tuple[int, ...]]:
    keys: dict[str, tuple[int, ...]] = {"token_embedding.weight": (49408, 512), "positional_embedding": (77, 512)}
    keys |= {"text_projection": (512, 512)} | layer_norm("ln_final", 512)
    for i in range(12):
        block = f"transformer.resblocks.{i}"
        keys |= layer_norm(f"{block}.ln_1", 512) | layer_norm(f"{block}.ln_2", 512)
        keys |= {f"{block}.attn.in_proj_weight": (1536, 512), f"{block}.attn.in_proj_bias": (1536,)}
        keys |= linear(f"{block}.attn.out_proj", 512, 512)
        keys |= linear(f"{block}.mlp.c_fc", 2048, 512) | linear(f"{block}.mlp.c_proj", 512, 2048)
    return keys


def sketched(c: MoTokConfig) -> MoTokReference:
    with torch.device("meta"):
        return MoTokReference(c)


@pytest.mark.parametrize("c", VARIANTS, ids=VARIANT_NAMES)
def test_keys_of_the_files(c: MoTokConfig) -> None:
    model = sketched(c)
    for part, want in (
        ("tokenizer", tokenizer_keys(c)),
        ("ddm", ddm_keys(c)),
        ("ar", ar_keys(c)),
        ("clip", clip_keys()),
    ):
        got = {key: tuple(tensor.shape) for key, tensor in getattr(model, part).state_dict().items()}
        assert got == want, part


def millions(*modules: nn.Module) -> float:
    return round(sum(p.numel() for m in modules for p in m.parameters()) / 1e6, 2)


def test_published_sizes() -> None:
    m = sketched(FULL)
    assert millions(m.tokenizer.encoder) == 9.98 and millions(m.tokenizer.decoder) == 11.02
    assert millions(m.tokenizer.denoiser) == pytest.approx(38.4, abs=0.05)
    assert millions(m.ddm) - millions(m.ddm.traj_encoder) == pytest.approx(10.1, abs=0.05)
    assert millions(m.ddm.traj_encoder) == pytest.approx(9.1, abs=0.05)
    assert millions(m.ar) - millions(m.ar.traj_encoder) == pytest.approx(65.8, abs=0.06)
    assert millions(m.ar.traj_encoder) == pytest.approx(9.7, abs=0.05)
    assert millions(m.clip) == 63.43
    fast = sketched(MoTokConfig.humanml3d(1))
    assert millions(fast.tokenizer.denoiser) - millions(m.tokenizer.denoiser) == pytest.approx(
        12 * 768**2 / 1e6, abs=0.02
    )


@pytest.mark.parametrize("dataset", ["humanml3d", "kit"])
@pytest.mark.parametrize("down_t", [1, 2, 3])
def test_from_text_and_joints_to_motion(dataset: str, down_t: int) -> None:
    """Every part once at small sizes, in fp32, at the longest and at the shortest length."""
    c = tiny(dataset=dataset, down_t=down_t, diffusion={"timesteps": [0, 200, 600, 997]})
    model = filled(MoTokReference(c)).float()
    joints, features = c.joints, c.features
    _, constraints = constrained(64, joints=(0, 5), of=joints, scale=c.scale)
    text = model.clip(torch.tensor([[48, 3, 4, 49, 0], [48, 7, 49, 0, 0]]))
    assert text.shape == (2, 14) and features == 12 * joints - 1
    statistic = torch.zeros(3 * joints), torch.ones(3 * joints)
    guide_input = hint(c, constraints.target.float(), constraints.mask, *statistic).expand(2, -1, -1)
    assert guide_input.shape == (2, 64, 3 * joints)
    for frames in (64, 2 * c.rate):
        n = frames // c.rate
        traj, ar_traj = (p.traj_encoder(guide_input[:, :frames]) for p in (model.ddm, model.ar))
        assert traj.shape == (2, n, 24)
        tokens = sample_ddm(model.ddm, c, [n, n], uniform("u", 2, 5, n).abs(), text, traj, torch.zeros(2, 5))
        other = sample_ar(model.ar, c, uniform("v", 2, n).abs(), [n, n], text, ar_traj, torch.ones(2, n))
        for ids in (tokens, other):
            assert ids.shape == (2, n) and int(ids.max()) < c.codes
        motion, evals = model.decode(tokens, normal("noise", 2, frames, features).float())
        assert motion.shape == (2, frames, features) and motion.dtype == torch.float32 and evals == [0, 0]
        assert bool(motion.isfinite().all())
        assert model.tokenizer.encode(motion).shape == (2, n)
    with pytest.raises(InputError, match=f"not a multiple of {c.rate}"):
        model.tokenizer.encode(torch.zeros(1, 64 + 1, features))


def test_hint() -> None:
    _, c = constrained()
    mean, std = uniform("mean", 66), 1 + uniform("std", 66) / 2
    got = hint(FULL, c.target, c.mask, mean, std)
    want = (c.target - mean.view(22, 3)) / std.view(22, 3)
    assert torch.equal(got.view(64, 22, 3)[c.mask], want[c.mask])
    assert torch.equal(got.view(64, 22, 3)[~c.mask], torch.zeros(64, 22, 3).double()[~c.mask])
    marked = MoTokConfig.from_json({"traj": {"hint_mask_channels": True}})
    got = hint(marked, c.target, c.mask, mean, std)
    assert got.shape == (64, marked.traj.channels) == (64, 88) and torch.equal(got[:, 66:], c.mask.double())


def test_the_denoiser_is_local() -> None:
    """Two blocks of kernel 5 see four frames to either side."""
    c = tiny()
    model = filled(Tokenizer(c)).denoiser
    x, s, t = normal("x", 1, 32, 263), normal("s", 1, 32, 20), torch.tensor([500])
    want, moved = model(x, t, s), x.clone()
    moved[:, 16] += 1
    changed = (model(moved, t, s) - want).abs().amax((0, 2)) > 1e-9
    assert changed.nonzero()[:, 0].tolist() == list(range(12, 21))
    head = filled(Tokenizer(tiny(denoiser={**TINY["denoiser"], "kernel": 0}))).denoiser
    changed = (head(moved, t, s) - head(x, t, s)).abs().amax((0, 2)) > 1e-9
    assert changed.nonzero()[:, 0].tolist() == [16]
    assert not any(".conv" in key for key in head.state_dict())


def test_dilations_run_down() -> None:
    stack = Encoder(tiny(), 8, 8).model[2][1].model
    assert [block.conv1.dilation[0] for block in stack] == [9, 3, 1]


def test_single_precision() -> None:
    c = tiny()
    exact, single = (filled(MoTokReference(c)).to(dtype) for dtype in (torch.float64, torch.float32))
    x, noise, tokens = normal("x", 1, 64, 263), normal("noise", 1, 64, 263), torch.arange(16)[None]
    text = uniform("t", 1, 14)
    assert error(single.tokenizer.encoder(x.float()), exact.tokenizer.encoder(x)) < 1e-5
    assert error(single.ddm(tokens, text.float()), exact.ddm(tokens, text)) < 1e-5
    assert error(single.ar(tokens, text.float()), exact.ar(tokens, text)) < 1e-5
    assert error(single.decode(tokens, noise)[0], exact.decode(tokens, noise)[0]) < 1e-4


# ---- guided decoding --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> MoTokReference:
    return filled(MoTokReference(tiny()))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("on", ["x0", "mu"])
@pytest.mark.parametrize("solver", ["lbfgs", "lbfgs_last", "project"])
def test_guided_decoding(small: MoTokReference, solver: str, on: str, sampler: str) -> None:
    """Guidance comes closer than none, one sample's motion does not depend on its neighbours, and calls add up."""
    model = filled(MoTokReference(tiny(diffusion={"sampler": sampler})))
    tokens, noise = torch.stack([torch.arange(8), torch.arange(8, 16)]), normal("noise", 2, 32, 263)
    extra = normal("steps", 27, 2, 32, 263)
    _, one = reachable(frames=32)
    _, two = reachable(frames=32, joints=(0, 3, 15), every=7)
    g = Guidance(solver=solver, on=on)
    free, _ = model.decode(tokens, noise, step_noise=extra)
    motion, evals = model.decode(tokens, noise, [one, two], g, extra)
    for i, c in enumerate((one, two)):
        assert float(distances(motion[i], c).mean()) < 0.2 * float(distances(free[i], c).mean())
        alone, spent = model.decode(tokens[i : i + 1], noise[i : i + 1], [c], g, extra[:, i : i + 1])
        # One sample's products round otherwise than two samples', and L-BFGS makes the difference larger.
        assert spent == pytest.approx(evals[i : i + 1], rel=0.05)
        torch.testing.assert_close(alone[0], motion[i], rtol=0, atol=1e-3)
    if solver == "project":
        assert evals == [0, 0] and float(distances(motion[0], one).max()) < 1e-9
    else:
        calls = sum(g.calls(k) for k in range(27))
        assert all(4 * calls < e <= 6 * calls for e in evals)
    limit = replace(g, max_evals=60)
    assert max(model.decode(tokens, noise, [one, two], limit, extra)[1]) <= 60


def test_what_decoding_refuses(small: MoTokReference) -> None:
    _, c = constrained(frames=32)
    tokens, noise = torch.zeros(2, 8, dtype=torch.long), torch.zeros(2, 32, 263)
    with pytest.raises(InputError, match="1 constraints for 2 samples"):
        small.decode(tokens, noise, [c])
    with pytest.raises(InputError, match=r"noise is \[2, 31, 263\]"):
        small.decode(tokens, noise[:, 1:])


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
