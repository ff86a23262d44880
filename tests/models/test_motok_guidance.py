"""Kinematics, gradient and solvers of MoTok's reference: golden values, autograd, torch's optimizer."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from _motok import check, constrained, error, normal, one_thread, reachable
from torch import Tensor

from engine.errors import InputError
from engine.models.motok.config import Guidance, MoTokConfig
from engine.models.motok.guidance_reference import (
    Targets,
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

__all__ = ["one_thread"]

FULL = MoTokConfig.humanml3d()
VARIANTS = [MoTokConfig.humanml3d(1), FULL, MoTokConfig.humanml3d(3), MoTokConfig.kit()]
VARIANT_NAMES = ["DR2", "DR4", "DR8", "KIT"]


# ---- golden: guidance -------------------------------------------------------------------------------------------


def objective(x: Tensor, c: Targets):
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


# ---- solvers --------------------------------------------------------------------------------------------------


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
