"""The CUDA path of arena, plan and dispatch, over a stand-in device that is host memory and a CPU tape."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from engine import _C
from engine.errors import DeviceError, DispatchError, InputError, MemoryPlanError, PlanError
from engine.ops import dispatch
from engine.ops.gather import gather
from engine.ops.rng import rng
from engine.runtime import cuda, device
from engine.runtime.arena import Arena
from engine.runtime.plan import capture


class FakeTape:
    """What _C.CudaTape offers, on the CPU."""

    def __init__(self, ordinal: int) -> None:
        self.ordinal, self.tape, self.captured = ordinal, _C.Tape(), False
        self.node, self.replay, self.replay_timed = self.tape.node, self.tape.replay, self.tape.replay_timed
        self.started = 0

    def start(self) -> None:
        self.replay()
        self.started += 1

    def wait(self) -> None:
        self.started -= 1

    def drain(self) -> None:
        self.started = 0

    def __len__(self) -> int:
        return len(self.tape)

    def push(self, op: int, isa: int, label: str, values: dict) -> None:
        assert isa == -1 and not self.captured
        self.tape.push(op, 0, label, values)

    def capture(self) -> None:
        self.captured = True


class FakeC:
    """engine._C of a CUDA build on a host with two small devices."""

    calls: list[tuple]
    cuda = True

    def __init__(self) -> None:
        self.calls = []

    def __getattr__(self, name: str):
        return getattr(_C, name)

    def cuda_ops(self) -> list[str]:
        return ["rng"]

    def cuda_device_count(self) -> int:
        return 2

    def cuda_missing(self) -> str:
        return ""

    def cuda_memory_info(self, ordinal: int) -> tuple[int, int]:
        return 5 << 20, 8 << 20

    def CudaMemory(self, nbytes: int, ordinal: int, mapped: bool = False):
        if nbytes > 5 << 20:
            raise MemoryError
        self.calls.append(("memory", ordinal))
        return _C.Memory(nbytes)

    def CudaTape(self, ordinal: int) -> FakeTape:
        return FakeTape(ordinal)

    def cuda_copy(self, dst: int, src: int, nbytes: int, ordinal: int) -> None:
        self.calls.append(("copy", ordinal))
        ctypes.memmove(dst, src, nbytes)

    def cuda_run(self, op: int, ordinal: int, values: dict) -> None:
        self.calls.append(("run", ordinal))
        _C.run(op, 0, values)


@pytest.fixture
def fake():
    c = FakeC()
    with cuda.use(c):
        yield c


def buffers(name: str):
    arena = Arena(name)
    out = arena.alloc("out", (64,), "f32", "io")
    seed, offset = arena.alloc("seed", (1,), "u64", "state"), arena.alloc("offset", (1,), "u64", "state")
    seed.write(np.array([7], np.uint64))
    return arena, out, seed, offset


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_a_replay_that_was_started_is_done_when_waited_for(fake, name):
    _, out, seed, offset = buffers(name)
    _, want, host_seed, host_offset = buffers("cpu")
    with device.on(name):
        plan = capture(lambda: rng(out, seed, offset, stream=2))
    reference = capture(lambda: rng(want, host_seed, host_offset, stream=2))
    plan.start()
    plan.wait()
    reference.replay()
    np.testing.assert_array_equal(out.read(), want.read())
    plan.start()
    plan.start()
    plan.wait()
    plan.drain()
    assert name == "cpu" or not plan._tape.started


def test_mapped_memory_is_read_in_place(fake):
    arena = Arena("cuda")
    both = arena.alloc("ring", (3, 4), "f32", "io", mapped=True)
    assert both.device == "cuda" and both.here and both.slice(4, (2, 4)).here and both.columns(1, 2).here
    fake.calls.clear()
    both.numpy()[1] = 7
    both.slice(8, (4,)).write(np.arange(4, dtype=np.float32))
    np.testing.assert_array_equal(both.host(), [[0] * 4, [7] * 4, range(4)])
    assert not fake.calls  # no copy
    with pytest.raises(InputError, match="no numpy view"):
        arena.alloc("there", (4,)).numpy()


def test_plan_records_replays_and_audits(fake):
    arena, out, seed, offset = buffers("cuda:1")
    host_arena, host_out, host_seed, host_offset = buffers("cpu")
    assert ("memory", 1) in fake.calls and out.device == "cuda:1"
    with device.on("cuda:1"):
        plan = capture(lambda: rng(out, seed, offset, stream=2), "noise")
    assert plan.device == "cuda:1" and plan._tape.captured and plan._tape.ordinal == 1
    assert [n.impl for n in plan.nodes] == ["cuda"] and len(plan) == 1
    capture(lambda: rng(host_out, host_seed, host_offset, stream=2)).replay()
    plan.replay()
    np.testing.assert_array_equal(out.read(), host_out.read())
    audit = plan.audit(arena, budget=1)
    assert audit.ok, audit.problems
    assert ("run", 1) in fake.calls
    assert plan.profile(2)[0][1] >= 0
    assert host_arena.summary() == arena.summary()


def test_eager_goes_to_the_device(fake):
    _, out, seed, offset = buffers("cuda")
    with device.on("cuda"):
        rng(out, seed, offset)
    assert ("run", 0) in fake.calls and device.target() == "cpu"


def test_an_op_without_a_kernel_is_refused_by_name(fake):
    _, out, *_ = buffers("cuda")
    arena = Arena("cuda")
    table, ids = arena.alloc("table", (4, 64), "f32"), arena.alloc("ids", (1,), "i32")
    with device.on("cuda"), pytest.raises(DispatchError, match="'gather' has no CUDA kernel"):
        gather(table, ids, out.slice(0, (1, 64)))


def test_buffers_on_a_device_are_copied_never_viewed(fake):
    _, out, *_ = buffers("cuda")
    with pytest.raises(InputError, match="read"):
        out.numpy()
    out.write(np.arange(64, dtype=np.float32))
    np.testing.assert_array_equal(out.read(), np.arange(64))
    with pytest.raises(InputError, match="shape"):
        out.write(np.zeros(3, np.float32))
    wide = Arena("cuda").alloc("wide", (4, 8))
    with pytest.raises(InputError, match="whole buffer"):
        wide.columns(0, 4).read()


def test_too_little_device_memory(fake):
    with pytest.raises(MemoryPlanError, match=r"cuda: 0\.01 of 0\.01 GB are free"):
        Arena("cuda").alloc("big", (1 << 21,))


def test_no_allocation_inside_a_step(fake):
    arena = Arena("cuda")
    with device.on("cuda"), pytest.raises(PlanError, match="allocate it before capture"):
        capture(lambda: arena.alloc("late", (4,)))


@pytest.mark.parametrize(
    ("name", "message"), [("cuda:2", "2 CUDA device"), ("cuda:x", "not one of"), ("tpu", "not one of")]
)
def test_unknown_devices(fake, name, message):
    with pytest.raises(DeviceError, match=message), device.on(name):
        pass
    assert device.target() == "cpu"


def test_without_cuda_every_error_says_so(fake):
    fake.cuda = False
    assert cuda.count() == 0 and cuda.missing() == dispatch.cuda_missing() == "built without CUDA"
    with pytest.raises(DeviceError, match="built without CUDA; install nvcc"):
        cuda.tape("cuda")


@pytest.mark.skipif(not cuda.built() or cuda.count() > 0, reason="needs a CUDA build on a host without a device")
def test_a_cuda_build_imports_without_a_driver():
    assert cuda.missing()
    with pytest.raises(DeviceError, match="driver"):
        cuda.ordinal("cuda")


@pytest.mark.skipif(cuda.count() == 0, reason=f"no CUDA device: {cuda.missing()}")
def test_on_a_real_device():
    arena, out, seed, offset = buffers("cuda")
    _, host_out, host_seed, host_offset = buffers("cpu")
    for kind in ("uniform", "normal"):
        with device.on("cuda"):
            plan = capture(lambda kind=kind: rng(out, seed, offset, stream=2, kind=kind))
        plan.replay()
        rng(host_out, host_seed, host_offset, stream=2, kind=kind)
        np.testing.assert_allclose(out.read(), host_out.read(), rtol=2e-7, atol=0 if kind == "uniform" else 1e-7)
        assert plan.audit(arena).ok
