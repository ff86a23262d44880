"""Tape, arena, audit and thread pool."""

from __future__ import annotations

import multiprocessing
import threading
import time

import numpy as np
import pytest

from engine import _C
from engine.errors import DeviceError, InputError, PlanError
from engine.ops.gemm import PackedMatrix, gemm
from engine.ops.rng import rng
from engine.runtime import device
from engine.runtime.arena import Arena, as_tensor
from engine.runtime.plan import capture


def _step(arena: Arena, nodes: int = 4):
    w = PackedMatrix.pack("w", np.eye(32, dtype=np.float32) * 0.5, "f32")
    x, y = arena.alloc("x", (1, 32)), arena.alloc("y", (1, 32))
    x.numpy()[:] = 1

    def step() -> None:  # the value grows by half per node, from x to y and back to x
        for i in range(nodes):
            gemm(*((x, w, y) if i % 2 == 0 else (y, w, x)), residual=x if i % 2 == 0 else y)

    return step, x


def test_capture_runs_nothing_and_replay_equals_eager():
    arena = Arena()
    step, x = _step(arena)
    plan = capture(step, "grow")
    assert len(plan) == 4 and (x.numpy() == 1).all()
    plan.replay()
    assert (x.numpy() == 1.5**4).all()
    x.numpy()[:] = 1
    plan.eager()
    assert (x.numpy() == 1.5**4).all()
    x.numpy()[:] = 1
    step()
    assert (x.numpy() == 1.5**4).all()


def test_audit_restores_state_and_counts_nodes():
    arena = Arena()
    step, x = _step(arena)
    plan = capture(step)
    audit = plan.audit(arena, budget=4)
    assert audit.ok, audit.problems
    assert (x.numpy() == 1).all()
    assert "5 nodes" not in str(plan.audit(arena, budget=3).problems)
    assert plan.audit(arena, budget=3).problems == ["4 nodes, budget 3"]


def test_audit_sees_a_step_that_is_not_static():
    """A node that only the replay runs."""
    arena = Arena()
    step, _ = _step(arena, 1)
    plan = capture(step)
    plan.calls.clear()  # eager now differs from the tape
    problems = plan.audit(arena).problems
    assert any("differ" in p for p in problems)


def test_allocation_inside_a_step_is_refused():
    arena = Arena()

    def step() -> None:
        arena.alloc("late", (4,))

    with pytest.raises(PlanError, match="late"):
        capture(step)
    arena.alloc("late", (4,))  # the failed capture left nothing behind
    arena.seal()
    with pytest.raises(PlanError, match="more"):
        arena.alloc("more", (4,))


def test_nested_capture_is_refused():
    with pytest.raises(PlanError, match="inside"):
        capture(lambda: capture(lambda: None, "inner") and None, "outer")


def test_profile_names_every_node():
    arena = Arena()
    step, _ = _step(arena)
    rows = capture(step).profile(repeats=3)
    assert [info.op for info, _ in rows] == ["gemm"] * 4
    assert all(us >= 0 for _, us in rows)


def test_binding_names_a_wrong_argument():
    with pytest.raises(TypeError, match="rng takes only"):
        _C.run(next(i for i, (n, _) in enumerate(_C.ops()) if n == "rng"), 0, {"outt": 1})


def test_arena_parts_views_and_alignment():
    arena = Arena()
    a = arena.alloc("a", (3, 5), "f32", "state")
    b = arena.alloc("b", (1 << 20,), "f32", "kv")
    assert a.address % 64 == 0 and b.address % 64 == 0
    assert arena.summary()["state"] == 60 and arena.summary()["kv"] == 4 << 20
    a.numpy()[:] = np.arange(15).reshape(3, 5)
    assert a.columns(1, 2).numpy().tolist() == [[1, 2], [6, 7], [11, 12]]
    assert a.slice(5, (2, 5)).numpy()[0, 0] == 5
    for bad in (lambda: a.columns(4, 2), lambda: a.slice(10, (2, 5)), lambda: as_tensor(np.zeros((4, 4))[:, ::2])):
        with pytest.raises(InputError):
            bad()
    with pytest.raises(PlanError, match="exists"):
        arena.alloc("a", (1,))


def test_view_keeps_memory_alive():
    view = Arena().alloc("x", (1 << 20,)).numpy()
    view[:] = 3
    assert view.sum() == 3 * (1 << 20)


def test_dtypes_and_isas():
    assert device.parse_dtype("torch.bfloat16") == "bf16" == device.parse_dtype("bf16")
    assert device.parse_dtype(np.dtype(np.float32)) == "f32" == device.parse_dtype("fp32")
    with pytest.raises(InputError, match="int7"):
        device.parse_dtype("int7")
    with pytest.raises(DeviceError, match="avx1024"), device.use_isa("avx1024"):
        pass
    assert "scalar" in device.available_isas()


def test_threads_can_be_resized_and_results_stay():
    before = device.threads()
    out = []
    try:
        for n in (1, 4, 2):
            device.set_threads(n)
            x = np.zeros(50_000, np.float32)
            rng(as_tensor(x), as_tensor(np.array([5], np.uint64)), as_tensor(np.array([1], np.uint64)))
            out.append(x)
    finally:
        device.set_threads(before)
    assert all(np.array_equal(out[0], o) for o in out)
    with pytest.raises(InputError, match="threads=0"):
        device.set_threads(0)


def test_pool_serves_several_python_threads():
    """Concurrent callers take turns; nobody waits for ever."""
    arena = Arena()
    plans = []
    for i in range(3):
        w = PackedMatrix.pack("w", np.eye(32, dtype=np.float32), "f32")
        x = arena.alloc(f"x{i}", (1, 32))
        y = arena.alloc(f"y{i}", (1, 32))
        x.numpy()[:] = i + 1
        plans.append((capture(lambda x=x, y=y, w=w: gemm(x, w, y)), y))  # type: ignore[misc]
    threads = [threading.Thread(target=lambda p=p: [p.replay() for _ in range(300)]) for p, _ in plans]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
        assert not t.is_alive()
    assert [float(y.numpy()[0, 0]) for _, y in plans] == [1, 2, 3]


def _child(queue):
    x = np.zeros(20_000, np.float32)
    rng(as_tensor(x), as_tensor(np.array([5], np.uint64)), as_tensor(np.array([1], np.uint64)))
    queue.put(float(x.sum()))


def _resized_child(queue):
    device.set_threads(3)
    _child(queue)


@pytest.mark.parametrize("target", [_child, _resized_child])
def test_pool_survives_fork(target):
    x = np.zeros(20_000, np.float32)
    rng(as_tensor(x), as_tensor(np.array([5], np.uint64)), as_tensor(np.array([1], np.uint64)))
    ctx = multiprocessing.get_context("fork")
    queue = ctx.Queue()
    child = ctx.Process(target=target, args=(queue,))
    child.start()
    assert queue.get(timeout=30) == float(x.sum())
    child.join(30)
    assert child.exitcode == 0


def test_parked_threads_wake_up():
    arena = Arena()
    step, x = _step(arena, 2)
    plan = capture(step)
    for pause in (0.0, 0.05, 0.0, 0.05):
        time.sleep(pause)
        plan.replay()
    assert x.numpy()[0, 0] == pytest.approx(1.5**8)
