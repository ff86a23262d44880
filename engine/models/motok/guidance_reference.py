"""Kinematics of a motion and the solvers that pull it onto joint constraints, in plain torch.

The arbiter of the guidance kernels. Everything acts on one sample: a motion x [T, D] as the model has it (normalised),
D = 12 * J - 1, and is computed in the dtype of x. Targets and losses are in metres. Sources: Gu et al. 2026 (arXiv
2603.19227), eq. 12 and section 3.4; features of HumanML3D (Guo et al. 2022); solver settings of InterControl.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from engine.errors import InputError
from engine.models.motok.config import Guidance

Objective = Callable[[Tensor], tuple[float, Tensor]]  # flat x -> value and gradient, a fresh tensor


# ---- kinematics -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kinematics:
    """World positions of a motion and what their derivative needs, in the motion's unit of length.

    joints: [..., T, J, 3]. cos, sin: [..., T] of the heading. In the world: step [..., T, 2], the root's way in x and z
    from the frame before, and local [..., T, J - 1, 2], x and z of the other joints from the root.
    """

    joints: Tensor
    cos: Tensor
    sin: Tensor
    step: Tensor
    local: Tensor


def turn(v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """v [..., 2] of the heading's frame -> of the world."""
    x, z = v.unbind(-1)
    return torch.stack([x * cos - z * sin, x * sin + z * cos], -1)


def turn_back(v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """v [..., 2] of the world -> of the heading's frame."""
    return turn(v, cos, -sin)


def kinematics(motion: Tensor) -> Kinematics:
    """Integrate a motion [..., T, D], denormalised.

    Frame 0 stands over the origin and looks along +z; the last row's velocities move nothing.
    """
    count = joints_of(motion.shape[-1])
    angle = 2 * (motion[..., 0].cumsum(-1) - motion[..., 0])  # the feature is half of the turn
    cos, sin = angle.cos(), angle.sin()
    velocity = torch.cat([torch.zeros_like(motion[..., :1, 1:3]), motion[..., :-1, 1:3]], -2)
    step = turn(velocity, cos, sin)
    root = step.cumsum(-2)
    ric = motion[..., 4 : 4 + 3 * (count - 1)].unflatten(-1, (count - 1, 3))
    local = turn(ric[..., [0, 2]], cos[..., None], sin[..., None])
    ground = torch.cat([root[..., None, :], local + root[..., None, :]], -2)
    height = torch.cat([motion[..., 3:4], ric[..., 1]], -1)
    return Kinematics(torch.stack([ground[..., 0], height, ground[..., 1]], -1), cos, sin, step, local)


def recover_from_ric(motion: Tensor) -> Tensor:
    """Joint positions [..., T, J, 3] of a denormalised motion [..., T, D], in its unit of length; y is up."""
    return kinematics(motion).joints


def joints_of(features: int) -> int:
    """Joints of a motion with so many values per frame."""
    if features < 23 or (features + 1) % 12:
        raise InputError(f"a motion has {features} values per frame; 12 * joints - 1 are needed")
    return (features + 1) // 12


# ---- loss -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Targets:
    """Where joints have to be.

    target: [T, J, 3] metres. mask: [T, J] bool, which of them count. mean, std: [D], statistics of the motion. scale:
    metres per unit of the motion.

    Raises:
        InputError: shapes do not fit, nothing is masked in, or a position that counts is not finite.
    """

    target: Tensor
    mask: Tensor
    mean: Tensor
    std: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        count = joints_of(len(self.mean))
        frames = len(self.target)
        if self.target.shape != (frames, count, 3) or self.mask.shape != (frames, count):
            raise InputError(f"target {list(self.target.shape)} and mask {list(self.mask.shape)} do not fit; "
                             f"[T, {count}, 3] and [T, {count}] are needed")  # fmt: skip
        if self.mean.shape != self.std.shape:
            raise InputError(f"mean {list(self.mean.shape)} and std {list(self.std.shape)} differ")
        if self.mask.dtype != torch.bool or not bool(self.mask.any()):
            raise InputError("the mask of the constraints needs at least one true entry, as bool")
        if not bool(self.target[self.mask].isfinite().all()):
            raise InputError("a constrained position is not finite")

    def to(self, dtype: torch.dtype) -> Targets:
        """The same with its numbers in `dtype`."""
        target, mean, std = (x.to(dtype) for x in (self.target, self.mean, self.std))
        return replace(self, target=target, mean=mean, std=std)

    def motion(self, x: Tensor) -> Tensor:
        """Denormalise x [T, D]."""
        if x.shape != (len(self.target), len(self.mean)):
            raise InputError(f"motion {list(x.shape)} does not fit; {[len(self.target), len(self.mean)]} is needed")
        return x * self.std + self.mean

    def error(self, joints: Tensor) -> Tensor:
        """joints [T, J, 3] in the motion's unit -> metres to the target, zero where nothing is asked."""
        return torch.where(self.mask[..., None], self.scale * joints - self.target, 0.0)


def control_loss(x: Tensor, c: Targets) -> Tensor:
    """Mean square of the constrained coordinates' errors, in m^2; differentiable in x [T, D]."""
    return c.error(recover_from_ric(c.motion(x))).square().sum() / (3 * int(c.mask.sum()))


def distances(x: Tensor, c: Targets) -> Tensor:
    """Distance of every constrained joint to its target, in metres, frame by frame: [number of constraints]."""
    return c.error(recover_from_ric(c.motion(x))).norm(dim=-1)[c.mask]


def pull_back(k: Kinematics, force: Tensor, std: Tensor) -> Tensor:
    """Gradient by a normalised motion [T, D] from the gradient `force` [T, J, 3] by its joints.

    Root velocities get suffix sums, because they move every later frame; rotations, joint velocities and contacts get
    exact zeros.
    """
    ground, (cos, sin) = force[..., [0, 2]], (k.cos, k.sin)
    later = ground.sum(1).flip(0).cumsum(0).flip(0)  # what pulls on this frame and all behind it
    grad = force.new_zeros(len(force), len(std))
    grad[:-1, 1:3] = turn_back(later, cos, sin)[1:]
    grad[:, 3] = force[:, 0, 1]
    ric = force[:, 1:].clone()
    ric[..., [0, 2]] = turn_back(ground[:, 1:], cos[:, None], sin[:, None])
    grad[:, 4 : 4 + ric[0].numel()] = ric.flatten(1)

    def cross(a: Tensor, b: Tensor) -> Tensor:
        return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]

    torque = 2 * (cross(k.local, ground[:, 1:]).sum(1) + cross(k.step, later))
    grad[:-1, 0] = torque.flip(0).cumsum(0).flip(0)[1:]
    return grad * std


def loss_and_gradient(x: Tensor, c: Targets) -> tuple[Tensor, Tensor]:
    """`control_loss` of x [T, D] and its gradient [T, D], without autograd."""
    k = kinematics(c.motion(x))
    error, count = c.error(k.joints), 3 * int(c.mask.sum())
    return error.square().sum() / count, pull_back(k, 2 * c.scale / count * error, c.std)


# ---- solvers --------------------------------------------------------------------------------------------------------


def lbfgs(
    objective: Objective, x: Tensor, calls: int = 1, *, history: int = 10, max_iter: int = 4,
    max_evals: int | None = None,
) -> tuple[Tensor, int]:  # fmt: skip
    """Minimise by `torch.optim.LBFGS` with a strong Wolfe search and lr 1.

    Args:
        objective: flat x -> (value, gradient), the gradient a fresh tensor.
        x: [n], where to begin; it is not written to.
        calls: how often `step` of the optimizer is called; it keeps its history from call to call.
        max_evals: no call begins that could exceed this many evaluations in all.

    Returns:
        The new x [n] and the evaluations made.
    """
    place = nn.Parameter(x.clone())
    optimizer = torch.optim.LBFGS([place], history_size=history, max_iter=max_iter, line_search_fn="strong_wolfe")
    evals, most = 0, max_iter * 5 // 4 + 1  # of a call: its bound is that of a search's turns

    def closure() -> float:
        nonlocal evals
        evals += 1
        value, place.grad = objective(place.detach().clone())
        return value

    for _ in range(calls):
        if max_evals is not None and evals + most > max_evals:
            break
        optimizer.step(closure)  # type: ignore[arg-type]
    return place.detach(), evals


def gd(x: Tensor, c: Targets, eta: float, iters: int) -> Tensor:
    """Plain gradient steps on `control_loss` (eq. 12)."""
    for _ in range(iters):
        x = x - eta * loss_and_gradient(x, c)[1]
    return x


def gd_norm(x: Tensor, c: Targets, variance: float, iters: int) -> Tensor:
    """Gradient steps on the sum of distances, as OmniControl takes them; row 0 stays.

    The step is 20 / (frames of the most constrained joint) times the variance of the posterior, at least 0.01.
    """
    size = 20.0 / int(c.mask.sum(0).max()) * max(variance, 0.01)
    for _ in range(iters):
        k = kinematics(c.motion(x))
        error = c.error(k.joints)
        length = error.norm(dim=-1, keepdim=True)
        grad = pull_back(k, c.scale * torch.where(length > 0, error / length, 0.0), c.std)
        grad[0] = 0
        x = x - size * grad
    return x


def project(x: Tensor, c: Targets) -> Tensor:
    """Meet the constraints in one pass, at the cost of the bodies' proportions.

    The root's way between two controlled frames takes up their difference in equal parts, the least change of its
    velocities; its height is set; other joints are moved from the root. The turn of the root stays. What cannot be met:
    the root's x and z at frame 0, which is the origin.
    """
    motion = c.motion(x)
    k = kinematics(motion)
    error = -c.error(k.joints) / c.scale  # what is missing, in the motion's unit
    change = torch.zeros_like(x)
    frames = [t for t in c.mask[:, 0].nonzero()[:, 0].tolist() if t > 0]
    steps, last, reached = torch.zeros_like(k.step), 0, torch.zeros_like(k.step[0])
    for t in frames:
        steps[last + 1 : t + 1] = (error[t, 0, [0, 2]] - reached) / (t - last)
        last, reached = t, error[t, 0, [0, 2]]
    change[:-1, 1:3] = turn_back(steps, k.cos, k.sin)[1:]
    change[:, 3] = error[:, 0, 1]
    rest = -c.error(kinematics(motion + change).joints)[:, 1:] / c.scale
    rest[..., [0, 2]] = turn_back(rest[..., [0, 2]], k.cos[:, None], k.sin[:, None])
    change[:, 4 : 4 + rest[0].numel()] = rest.flatten(1)
    return x + change / c.std


def guide(
    x: Tensor, c: Targets, g: Guidance, k: int, variance: float = 0.0, evals: int = 0
) -> tuple[Tensor, int]:  # fmt: skip
    """Pull an estimate x [T, D] of sampled step k (0: the last) onto the constraints with the solver of `g`.

    Args:
        variance: of the posterior at this step, read by `gd_norm`.
        evals: evaluations that the request has spent already, for `max_evals`.

    Returns:
        x and the evaluations spent here.
    """
    c, left = c.to(x.dtype), g.max_evals - evals if g.max_evals else None
    if g.solver in ("gd", "gd_norm"):
        iters = g.gd_iters * (50 if g.solver == "gd_norm" and k < g.threshold else 1)
        iters = iters if left is None else min(iters, max(left, 0))
        return (gd(x, c, g.eta, iters) if g.solver == "gd" else gd_norm(x, c, variance, iters)), iters
    spent = 0
    if g.solver != "project" or not bool(c.mask[:, 0].any()):
        # Without the root, a projection alone would only stretch limbs.

        def objective(flat: Tensor) -> tuple[float, Tensor]:
            loss, grad = loss_and_gradient(flat.view_as(x), c)
            return float(loss), grad.flatten()

        flat, spent = lbfgs(objective, x.flatten(), g.calls(k), history=g.history, max_iter=g.max_iter, max_evals=left)
        x = flat.view_as(x)
    return (project(x, c) if g.solver == "project" else x), spent
