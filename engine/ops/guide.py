"""Guidance of a motion towards joint targets, and the sampler's update (csrc/ops/guide; InterControl, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from engine import _C
from engine.ops.checks import Check
from engine.ops.dispatch import call
from engine.ops.registry import Arrays, Case, GuardedArena, Op, cases, register
from engine.runtime.arena import Tensor, as_tensor

SOLVERS = {"none": 0, "gradient": 1, "descent": 2, "lbfgs": 3, "project": 4}
MAX_FRAMES = 256
MAX_HISTORY = 10


def features(joints: int) -> int:
    """Features of a frame: yaw, path and height of the root, then positions, rotations, velocities, contacts."""
    return 12 * joints - 1


def workspace_bytes(batch: int, frames: int, slots: int, precise: bool = False) -> int:
    """Bytes of `ws`."""
    return int(_C.guide_workspace(batch, frames, slots, int(precise)))


@dataclass(frozen=True)
class JointTargets:
    """Where joints of B motions should be.

    joints i32 [B, K]: the joint of each slot, -1 for none; at f32 [B, T, K, 3]; mask f32 [B, T, K], 0 or 1; mean, std
    f32 [D]: of the features; stats f32 [B, 4]: out, see `guide`; ws: workspace_bytes(B, T, K, precise).
    """

    joints: Tensor
    at: Tensor
    mask: Tensor
    mean: Tensor
    std: Tensor
    stats: Tensor
    ws: Tensor

    def fits(self, check: Check, batch: int, frames: int, d: int, precise: bool) -> int:
        """The number of slots; InputError unless the buffers belong together."""
        check.takes("joints", self.joints, (batch, None), "i32")
        k = self.joints.shape[1]
        check.need(k >= 1 and 4 + 3 * k <= d, f"{k} slots of joints do not fit {d} features")
        check.takes("at", self.at, (batch, frames, k, 3))
        check.takes("mask", self.mask, (batch, frames, k))
        check.takes("mean", self.mean, (d,))
        check.takes("std", self.std, (d,))
        check.takes("stats", self.stats, (batch, 4))
        check.room(self.ws, workspace_bytes(batch, frames, k, precise))
        return k


def guide(
    x0: Tensor,
    x: Tensor | None = None,
    *,
    batch: int = 1,
    a: float = 1.0,
    b: float = 0.0,
    sigma: float = 0.0,
    noise: Tensor | None = None,
    frames: Tensor | None = None,
    solver: str = "none",
    targets: JointTargets | None = None,
    steps: int = 1,
    eta: float = 0.0,
    max_iter: int = 4,
    history: int = MAX_HISTORY,
    metres: float = 1.0,
    precise: bool = False,
    label: str = "",
) -> None:
    """Moves x0 [B*T, D] (normalised features, in place) to its targets, then x = a * x0 + b * x + sigma * noise.

    frames i32 [B]: real frames of each motion, default T (at most 256). The loss is the mean square of
    metres * (position - target) over masked coordinates. targets.stats gets it before and after, the evaluations, and
    how many coordinates there are.

    solver: 'gradient' puts the gradient into x0; 'descent' makes `steps` steps of eta; 'lbfgs' is `steps` times one
    step of torch.optim.LBFGS (strong Wolfe, max_iter, history), its memory kept; 'project' meets every target by the
    smallest change of the root's path, after 'lbfgs' where the root has no target. precise: in fp64.
    """
    check = Check("guide", label)
    check.one_of("solver", solver, SOLVERS)
    check.takes("x0", x0, (None, None), strided=True)
    m, d = x0.shape
    check.need(0 < batch <= m and m % batch == 0, f"{m} rows are not {batch} equal motions")
    t, k, of = m // batch, 0, targets
    check.need(t <= MAX_FRAMES, f"{t} frames; the limit is {MAX_FRAMES}")
    check.may_take("x", x, (m, d), strided=True)
    check.may_take("noise", noise, (m, d))
    check.need(noise is None or x is not None, "noise goes into x, which is missing")
    check.may_take("frames", frames, (batch,), "i32")
    check.need((of is None) == (solver == "none"), f"solver '{solver}' and targets do not go together")
    if of is not None:
        k = of.fits(check, batch, t, d, precise)
        check.need(1 <= history <= MAX_HISTORY, f"history={history} is not in [1, {MAX_HISTORY}]")
        check.need(max_iter >= 1 and steps >= 0, f"max_iter={max_iter} must be at least 1, steps={steps} at least 0")
        check.need(metres > 0, f"metres={metres} must be above 0")
    call("guide", label, nbytes=0, x0=x0, ldx0=x0.ld, x=x, ldx=x.ld if x else 0, noise=noise, frames=frames,
         mean=of.mean if of else None, std=of.std if of else None, joints=of.joints if of else None,
         target=of.at if of else None, mask=of.mask if of else None, ws=of.ws if of else None,
         stats=of.stats if of else None, batch=batch, t=t, d=d, k=k, solver=SOLVERS[solver], steps=steps,
         max_iter=max_iter, history=history, precise=int(precise), eta=eta, metres=metres, a=a, b=b,
         sigma=sigma)  # fmt: skip


def guide_joints(
    x: Tensor, mean: Tensor, std: Tensor, out: Tensor, *, batch: int = 1, frames: Tensor | None = None, label: str = ""
) -> None:
    """Positions out [B*T, J, 3] of normalised features x [B*T, 12 J - 1]; frames behind a motion's end are zero."""
    check = Check("guide_joints", label)
    check.takes("out", out, (None, None, 3))
    m, joints, _ = out.shape
    check.need(joints >= 1 and 0 < batch <= m and m % batch == 0, f"{m} rows are not {batch} equal motions")
    d = features(joints)
    check.takes("x", x, (m, d), strided=True)
    check.takes("mean", mean, (d,))
    check.takes("std", std, (d,))
    check.may_take("frames", frames, (batch,), "i32")
    call("guide_joints", label, nbytes=0, x=x, ldx=x.ld, mean=mean, std=std, frames=frames, out=out, batch=batch,
         t=m // batch, joints=joints)  # fmt: skip


# ---------------------------------------------------------------------------------------------------- contract
_STD = (0.0128, 0.0169, 0.1538, 0.1222, 0.2997, 0.0195, 0.3559)  # of the groups of features, as published data has them


def _scale(joints: int) -> tuple[np.ndarray, np.ndarray]:
    """(mean, std) [D] of the size that real motions have."""
    widths = (1, 2, 1, 3 * (joints - 1), 6 * (joints - 1), 3 * joints, 4)
    mean = np.zeros(features(joints), np.float32)
    mean[3] = 0.9
    return mean, np.repeat(_STD, widths).astype(np.float32)


def _inputs(c: Case, rng: np.random.Generator) -> Arrays:
    f, d = np.float32, features(c.j)
    mean, std = _scale(c.j)
    frames = np.array([max(1, c.t - 3 * i) for i in range(c.b)], np.int32)
    x0 = rng.standard_normal((c.b, c.t, d)).astype(f)
    joints = np.stack([rng.permutation(np.arange(1, c.j))[: c.k] for _ in range(c.b)]).astype(np.int32)
    if c.dims.get("root", 1):
        joints[:, 0] = 0
    if c.b > 1:
        joints[1, -1] = -1  # a motion with a slot less
    places = _positions(x0.astype(np.float64), mean.astype(np.float64), std.astype(np.float64), c.j)
    here = np.take_along_axis(places, np.maximum(joints, 0)[:, None, :, None], 2)
    mask = (rng.random((c.b, c.t, c.k)) < c.dims.get("dense", 0.3)).astype(f)
    mask[:, -1] = 1
    if c.b > 2:
        mask[2] = 0  # and one that nothing pulls
    target = here + 0.2 * rng.uniform(-1, 1, here.shape)
    if c.solver == "project":
        mask[:, 0] = 1  # what cannot be met: the path begins at the origin
    return {"x0": x0.reshape(c.b * c.t, d), "x": rng.standard_normal((c.b * c.t, d)).astype(f),
            "noise": rng.standard_normal((c.b * c.t, d)).astype(f), "mean": mean, "std": std, "frames": frames,
            "joints": joints, "target": target.astype(f), "mask": mask}  # fmt: skip


def _positions(x: Any, mean: Any, std: Any, joints: int) -> Any:
    """[..., T, J, 3] of features [..., T, D], numpy or torch; recover_from_ric of HumanML3D."""
    import torch

    given = torch.as_tensor(x)
    v = given * torch.as_tensor(std) + torch.as_tensor(mean)
    nothing = torch.zeros_like(v[..., :1, 0])
    phi = 2 * torch.cat([nothing, v[..., :-1, 0].cumsum(-1)], -1)
    c, s = phi.cos(), phi.sin()
    vx, vz = (torch.cat([nothing, v[..., :-1, i]], -1) for i in (1, 2))
    rx, rz = (vx * c - vz * s).cumsum(-1), (vx * s + vz * c).cumsum(-1)
    rho = v[..., 4 : 4 + 3 * (joints - 1)].unflatten(-1, (joints - 1, 3))
    c, s, rx, rz = (a[..., None] for a in (c, s, rx, rz))
    others = torch.stack(
        [rho[..., 0] * c - rho[..., 2] * s + rx, rho[..., 1], rho[..., 0] * s + rho[..., 2] * c + rz], -1
    )
    out = torch.cat([torch.stack([rx, v[..., 3:4], rz], -1), others], -2)
    return out if isinstance(x, torch.Tensor) else out.numpy()


def _loss(c: Case, a: Arrays, b: int) -> tuple[Any, Any, int]:
    """(loss of x0, x0 [T, D], controlled coordinates) of motion b, in fp64 torch."""
    import torch

    t = int(a["frames"][b])
    x0 = torch.from_numpy(a["x0"].reshape(c.b, c.t, -1)[b, :t].astype(np.float64))
    mean, std = (torch.from_numpy(a[n].astype(np.float64)) for n in ("mean", "std"))
    slots = np.flatnonzero(a["joints"][b] >= 0)
    mask = torch.from_numpy(a["mask"][b, :t][:, slots].astype(np.float64))[..., None]
    target = torch.from_numpy(a["target"][b, :t][:, slots].astype(np.float64))
    count, metres = int(3 * mask.sum()), c.dims.get("metres", 1.0)

    def loss(x: Any) -> Any:
        at = _positions(x, mean, std, c.j)[:, a["joints"][b][slots]]
        return ((metres * mask * (at - target)) ** 2).sum() / max(count, 1)

    return loss, x0, count


def _reference(c: Case, a: Arrays) -> Arrays:
    import torch

    x0 = a["x0"].astype(np.float64).reshape(c.b, c.t, -1)
    stats = np.zeros((c.b, 4))
    for b in range(c.b):
        loss, start, count = _loss(c, a, b)
        if c.solver == "none":
            continue
        stats[b, 3] = count
        if not count:
            continue
        x = start.clone().requires_grad_(True)
        stats[b, 0] = float(loss(x.detach()))
        solved = c.solver
        if c.solver == "project" and 0 not in a["joints"][b]:
            solved = "lbfgs"
        if not c.steps and solved == "lbfgs":
            solved = "look"
        if solved == "lbfgs":
            search = torch.optim.LBFGS([x], history_size=c.dims.get("history", 10), max_iter=c.dims.get("max_iter", 4),
                                       line_search_fn="strong_wolfe")  # fmt: skip

            def closure(x=x, b=b, loss=loss, search=search) -> Any:
                search.zero_grad()
                value = loss(x)
                value.backward()
                stats[b, 2] += 1
                return value

            for _ in range(c.steps):
                search.step(closure)
        elif solved == "descent":
            for _ in range(c.steps):
                (g,) = torch.autograd.grad(loss(x), x)
                x = (x - c.eta * g).detach().requires_grad_(True)
        elif solved == "gradient":
            (g,) = torch.autograd.grad(loss(x), x)
            active = [0, 1, 2, 3, *(4 + 3 * (j - 1) + i for j in a["joints"][b] if j > 0 for i in range(3))]
            out = start.clone()
            out[:, active] = g[:, active]
            x = out
        if c.solver == "project":
            x = torch.from_numpy(_projected(c, a, b, x.detach().numpy()))
        x0[b, : len(x)] = x.detach().numpy()
        stats[b, 1] = stats[b, 0] if solved == "gradient" else float(loss(x.detach()))
        stats[b, 2] += {"lbfgs": 0, "descent": c.steps + 1}.get(solved, 1)
        stats[b, 2] += c.solver == "project"
    x = a["x"].astype(np.float64).reshape(c.b, c.t, -1)
    for b, t in enumerate(a["frames"]):
        x[b, :t] = 0.7 * x0[b, :t] + 0.4 * x[b, :t] + 0.1 * a["noise"].reshape(x.shape)[b, :t]
    places = _positions(x0, a["mean"].astype(np.float64), a["std"].astype(np.float64), c.j)
    places[np.arange(c.t) >= a["frames"][:, None]] = 0
    return {"x0": x0.reshape(c.b * c.t, -1), "x": x.reshape(c.b * c.t, -1), "stats": stats,
            "places": places.reshape(c.b * c.t, c.j, 3)}  # fmt: skip


def _projected(c: Case, a: Arrays, b: int, x: np.ndarray) -> np.ndarray:
    """Steps of the root between two of its targets take equal parts of what is missing; then the other joints."""
    mean, std = a["mean"].astype(np.float64), a["std"].astype(np.float64)
    v, slots, mask, target = x * std + mean, a["joints"][b], a["mask"][b], a["target"][b].astype(np.float64)
    phi = 2 * np.concatenate([[0], np.cumsum(v[:-1, 0])])
    turn = np.stack([[np.cos(phi), -np.sin(phi)], [np.sin(phi), np.cos(phi)]]).transpose(2, 0, 1)  # [T, 2, 2]
    steps = np.einsum("tij,tj->ti", turn, np.concatenate([[[0, 0]], v[:-1, 1:3]]))
    if 0 in slots:
        k = int(np.flatnonzero(slots == 0)[0])
        before = 0
        for t in map(int, np.flatnonzero(mask[: len(v), k])):
            v[t, 3] = target[t, k, 1]
            if t:
                left = target[t, k, ::2] - steps[: t + 1].sum(0)
                steps[before + 1 : t + 1] += left / (t - before)
                before = t
        v[:-1, 1:3] = np.einsum("tji,tj->ti", turn[1:], steps[1:])
    root = steps.cumsum(0)
    for k, j in enumerate(slots):
        if j <= 0:
            continue
        on = np.flatnonzero(mask[: len(v), k])
        flat = np.einsum("tji,tj->ti", turn[on], target[on, k, ::2] - root[on])
        v[on, 4 + 3 * (j - 1) : 7 + 3 * (j - 1)] = np.stack([flat[:, 0], target[on, k, 1], flat[:, 1]], 1)
    return (v - mean) / std


def _call(c: Case, a: Arrays) -> tuple[Any, dict[str, Tensor]]:
    arena, precise = GuardedArena(), bool(c.dims.get("precise", 0))
    t = {k: as_tensor(v) for k, v in a.items()}
    x0, x = (arena.alloc(n, a[n].shape, "f32", "io") for n in ("x0", "x"))
    x0.write(a["x0"])
    x.write(a["x"])
    places = arena.alloc("places", (c.b * c.t, c.j, 3), "f32", "io")
    stats = arena.alloc("stats", (c.b, 4), "f32", "io")
    ws = arena.alloc("ws", (workspace_bytes(c.b, c.t, c.k, precise),), "u8")
    to = JointTargets(t["joints"], t["target"], t["mask"], t["mean"], t["std"], stats, ws)
    options = {n: c.dims[n] for n in ("eta", "max_iter", "history", "metres") if n in c.dims}

    def run() -> None:
        guide(x0, x, batch=c.b, a=0.7, b=0.4, sigma=0.1, noise=t["noise"], frames=t["frames"], solver=c.solver,
              targets=None if c.solver == "none" else to, steps=c.steps, precise=precise, **options)  # fmt: skip

        guide_joints(x0, t["mean"], t["std"], places, batch=c.b, frames=t["frames"])

    return run, {"x0": x0, "x": x, "stats": stats, "places": places}


def _run(c: Case, a: Arrays) -> Arrays:
    run, out = _call(c, a)
    run()
    return {name: tensor.read() for name, tensor in out.items()}


def _torch(c: Case, a: Arrays) -> Any:
    """One evaluation of loss and gradient, as a loop around autograd makes it."""
    import torch

    loss, start, _ = _loss(c, a, 0)
    x = start.float().requires_grad_(True)
    return lambda: torch.autograd.grad(loss(x), x)


def _case(solver: str, b: int, t: int, j: int, k: int, steps: int = 1, **more: Any) -> dict[str, Any]:
    return {"solver": solver, "b": b, "t": t, "j": j, "k": k, "steps": steps} | more


register(
    Op(
        name="guide",
        kernels=("guide", "guide_joints"),
        cases=[
            *cases(
                "tiny",
                _case("none", 3, 9, 22, 2),
                _case("gradient", 3, 64, 22, 3),
                _case("gradient", 1, 40, 22, 21, dense=1.0, root=0),
                _case("descent", 2, 24, 21, 2, 4, eta=50.0, metres=0.1),
                _case("lbfgs", 3, 64, 22, 2, 10, precise=1),
                _case("lbfgs", 1, 196, 22, 3, 3, precise=1),
                _case("project", 3, 40, 22, 3),
                _case("project", 1, 40, 22, 2, 2, root=0, precise=1),
            ),
            *cases(
                "odd",
                _case("gradient", 2, 1, 3, 2, root=0),
                _case("gradient", 1, 17, 5, 4, precise=1),
                _case("lbfgs", 2, 33, 22, 2, 4, precise=1, history=2),
                _case("lbfgs", 1, 20, 4, 3, 2, precise=1, max_iter=9),
                _case("project", 1, 256, 22, 4),
                _case("lbfgs", 1, 30, 22, 2, 0),
            ),
            *cases("real", _case("gradient", 1, 196, 22, 3), _case("lbfgs", 1, 196, 22, 3, 10, precise=1)),
        ],
        inputs=_inputs,
        reference=_reference,
        run=_run,
        prepare=lambda c, a: _call(c, a)[0],
        torch_eager=_torch,
        tolerance={"f32": 3e-6},
        bytes=lambda c: 4 * c.b * c.t * (2 * features(c.j) + 4 * c.k),
        flops=lambda c: 40 * c.b * c.t * c.k * max(1, 5 * c.steps),
        absent={"triton": "one chain of scans and scalars per motion: a block of threads, no tiles"},
    )
)  # fmt: skip
