"""The emulator itself: right kernels give the right result in any order, and every planted fault is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from . import build

SCHEDULES = range(6)
if build.compiler() is None:
    pytest.skip("no C++ compiler here: the CUDA text does not run on the host", allow_module_level=True)


@pytest.fixture(scope="module")
def plain():
    return build.load(build.probes("plain"))


@pytest.fixture(scope="module")
def watched():
    module = build.load(build.probes("watched"))
    module.watch(True)
    return module


def aligned(shape, dtype, fill=0) -> np.ndarray:
    """On a sector's border, so that counts do not depend on malloc."""
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(nbytes + 256, np.uint8)
    start = -raw.ctypes.data % 256
    out = raw[start : start + nbytes].view(dtype).reshape(shape)
    out[...] = fill
    return out


INPUT = aligned(4096, np.float32, np.random.default_rng(1).integers(-50, 50, 4096))


def run(module, name: str, given: np.ndarray, out: np.ndarray, n: int = 0) -> np.ndarray:
    module.run(name, given.ctypes.data, out.ctypes.data, n)
    return out


def sums(n: int, each: int) -> np.ndarray:
    return INPUT[: n * each].reshape(n, each).sum(1)


@pytest.mark.parametrize("seed", SCHEDULES)
def test_threads_that_wait_for_each_other(plain, seed):
    plain.set_schedule(seed)
    np.testing.assert_array_equal(run(plain, "block_sum", INPUT, aligned(3, np.float32)), sums(3, 256))
    np.testing.assert_array_equal(run(plain, "warp_sum", INPUT, aligned(4, np.float32), 128), sums(4, 32))
    out = run(plain, "last_block", INPUT, aligned(11, np.float32), 1000)
    assert out[0] == INPUT[:1000].sum() and out.view(np.uint32)[1] == 0
    np.testing.assert_array_equal(run(plain, "double_buffer", INPUT, aligned(8, np.float32), 8), sums(8, 128))
    np.testing.assert_array_equal(run(plain, "twice", INPUT, aligned(64, np.float32), 64), 2 * INPUT[63::-1])


@pytest.mark.parametrize("seed", SCHEDULES)
def test_every_warp_collective(plain, seed):
    plain.set_schedule(seed)
    v = aligned(32, np.int32, np.random.default_rng(2).integers(-100, 100, 32))
    got = run(plain, "collectives", v, aligned((12, 32), np.int32))
    t = np.arange(32)
    votes = int((v > 0) @ (1 << t.astype(np.int64)))
    count = int((v > 0).sum())
    want = [v[t ^ 3], v[np.where(t >= 5, t - 5, t)], v[np.where(t + 5 < 32, t + 5, t)], v[t ^ 4],
            v[np.where(t % 8 + 3 < 8, t + 3, t)], np.full(32, votes, np.int64).astype(np.uint32).view(np.int32),
            np.full(32, 2), np.full(32, v.max()), np.full(32, v.sum()),
            np.where(t < 16, v[:16].min(), v[16:].min()), v[t ^ 1],
            np.full(32, count + 1000 + 10000 * int((v > 0).all()))]  # fmt: skip
    np.testing.assert_array_equal(got, np.array(want))


def bf16(values: np.ndarray) -> np.ndarray:
    """Round to nearest even, by numpy alone."""
    u = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def widened(h: np.ndarray) -> np.ndarray:
    return (h.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("name", ["product_bf16", "product_ldmatrix"])
@pytest.mark.parametrize("seed", [0, 1, 4])
def test_mma_bf16(plain, name, seed):
    plain.set_schedule(seed)
    rng = np.random.default_rng(3)
    a, b = bf16(rng.standard_normal((16, 16))), bf16(rng.standard_normal((8, 16)))
    given = aligned(384, np.uint16, np.concatenate([a.ravel(), b.ravel()]))
    start = 0.5 if name == "product_bf16" else 0
    got = run(plain, name, given, aligned((16, 8), np.float32, start))
    np.testing.assert_allclose(got, start + widened(a).astype(np.float64) @ widened(b).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 4])
def test_mma_s8(plain, seed):
    plain.set_schedule(seed)
    rng = np.random.default_rng(4)
    a, b = rng.integers(-128, 128, (16, 32), np.int8), rng.integers(-128, 128, (8, 32), np.int8)
    given = aligned(768, np.int8, np.concatenate([a.ravel(), b.ravel()]))
    start = np.tile([[1, 2]], (16, 4)) + np.repeat([0, 2], 8)[:, None]
    want = start + a.astype(np.int64) @ b.T.astype(np.int64)
    np.testing.assert_array_equal(run(plain, "product_s8", given, aligned((16, 8), np.int32)), want)


def test_dp4a(plain):
    given = aligned((256, 2), np.uint32, np.random.default_rng(5).integers(0, 1 << 32, (256, 2)))
    bytes4 = given.view(np.uint8).reshape(256, 2, 4)
    unsigned, signed = bytes4.astype(np.int64), bytes4.view(np.int8).astype(np.int64)
    got = run(plain, "dot", given, aligned((256, 2), np.int32), 256)
    np.testing.assert_array_equal(got[:, 0], (unsigned[:, 0] * signed[:, 1]).sum(1) + 5)
    np.testing.assert_array_equal(got[:, 1], (signed[:, 0] * signed[:, 1]).sum(1) - 5)


def test_conversions(plain):
    ties = [1.0 + 2.0**-8, 1.0 + 3 * 2.0**-8, 0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, 1e-40, 65504.0]
    values = aligned(256, np.float32, np.concatenate([ties, np.random.default_rng(6).standard_normal(246)]))
    got = run(plain, "to_bf16", values, aligned(256, np.uint32), 256)
    np.testing.assert_array_equal(got & 0xFFFF, bf16(values))
    np.testing.assert_array_equal(got >> 16, bf16(values))
    halves = aligned(1 << 16, np.uint16, np.arange(1 << 16))
    got = run(plain, "from_f16", halves, aligned(1 << 16, np.float32), 1 << 16)
    np.testing.assert_array_equal(got, halves.view(np.float16).astype(np.float32))


def test_cache_hints_do_not_change_values(plain):
    given = aligned((32, 4), np.float32, INPUT[:128].reshape(32, 4))
    want = given.copy()
    want[:, 0] += given[:, 1] + given[:, 2]
    np.testing.assert_array_equal(run(plain, "keep", given, aligned((32, 4), np.float32), 32), want)


# ------------------------------------------------------------------------------------------------- faults: errors


@pytest.mark.parametrize("seed", SCHEDULES)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("block_sum_divergent", "__syncthreads"),
        ("block_sum_exit", "exit"),
        ("block_sum_other_line", "is at __syncthreads of line"),
        ("warp_sum_divergent", "another collective"),
        ("too_much_shared", "102401 bytes of shared memory"),
        ("too_many_threads", "1025 threads"),
        ("no_blocks", "a grid of"),
    ],
)
def test_impossible_launches_and_divergence(plain, seed, name, message):
    plain.set_schedule(seed)
    with pytest.raises(RuntimeError, match=f"kernel '{name}'.*{message}"):
        run(plain, name, INPUT, aligned(4096, np.float32), 64)
    np.testing.assert_array_equal(run(plain, "block_sum", INPUT, aligned(3, np.float32)), sums(3, 256))


def test_a_missing_barrier_changes_the_result_in_some_order(plain):
    right = set()
    for seed in SCHEDULES:
        plain.set_schedule(seed)
        right.add(bool((run(plain, "block_sum_no_barrier", INPUT, aligned(3, np.float32)) == sums(3, 256)).all()))
    assert False in right


@pytest.mark.parametrize("seed", SCHEDULES)
def test_a_missing_wait_reads_poison(plain, seed):
    plain.set_schedule(seed)
    assert np.isnan(run(plain, "double_buffer_no_wait", INPUT, aligned(8, np.float32), 8)).any()


def test_launches_are_traced(plain):
    plain.clear_launches()
    run(plain, "twice", INPUT, aligned(64, np.float32), 64)
    assert [{k: v for k, v in x.items() if k != "kernel"} for x in plain.launches()] == [
        {"name": "twice", "grid": (1, 1, 1), "block": (64, 1, 1), "shared": 256, "overlap": False}
    ]


ASAN = """
import sys
import numpy as np
from tests.emu import build
probes = build.load(build.probes("asan"))
given, out = np.ones(64 * 128, np.float32), np.zeros(4096, np.float32)
for seed in range(5):
    probes.set_schedule(seed)
    for name in sys.argv[1].split(","):
        probes.run(name, given.ctypes.data, out.ctypes.data, 64)
"""


@pytest.mark.parametrize(
    ("names", "report"),
    [
        ("block_sum,twice,double_buffer,last_block,many_collectives", ""),
        ("twice_overrun", "use-after-poison"),
        ("static_overrun", "insufficient space"),
    ],
)
def test_asan_sees_shared_overruns(names, report):
    environment = {**os.environ, **build.environment("asan"), "PYTHONPATH": str(build.ROOT)}
    build.probes("asan")
    done = subprocess.run([sys.executable, "-c", ASAN, names], env=environment, cwd=build.ROOT, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert (done.returncode == 0) == (report == ""), done.stderr[-3000:]
    assert report in done.stderr


# ------------------------------------------------------------------------------------------------ faults: watched


def watch(module, name: str, out: np.ndarray, n: int, seed: int = 0, *, given=INPUT, written=True) -> list[dict]:
    module.forget()
    module.set_schedule(seed)
    module.declare(given.ctypes.data, given.nbytes, True, "in")
    module.declare(out.ctypes.data, out.nbytes, written, "out")
    run(module, name, given, out, n)
    return module.faults()


@pytest.mark.parametrize("seed", SCHEDULES)
@pytest.mark.parametrize(
    ("name", "size", "n"),
    [
        ("block_sum", 3, 0),
        ("warp_sum", 4, 128),
        ("last_block", 11, 1000),
        ("double_buffer", 8, 8),
        ("twice", 64, 64),
        ("waits", 32, 32),
    ],
)
def test_right_kernels_have_no_faults(watched, seed, name, size, n):
    assert watch(watched, name, aligned(size, np.float32), n, seed) == []


@pytest.mark.parametrize("seed", SCHEDULES)
@pytest.mark.parametrize(
    ("name", "size", "n", "kind", "region"),
    [
        ("block_sum_no_barrier", 3, 0, "shared race", "static shared"),
        ("block_sum_uninitialised", 3, 0, "uninitialised shared", "static shared"),
        ("double_buffer_no_wait", 8, 8, "uninitialised shared", "dynamic shared"),
        ("block_race", 4, 0, "global race", "out"),
        ("last_block_no_fence", 11, 1000, "global race", "out"),
        ("does_not_wait", 32, 32, "before wait", "out"),
    ],
)
def test_faults_are_found(watched, seed, name, size, n, kind, region):
    found = watch(watched, name, aligned(size, np.float32), n, seed)
    assert (kind, region) in {(f["kind"], f["region"]) for f in found}
    assert all(f["kernel"] == name for f in found)


def test_reads_outside_and_of_unwritten_memory(watched):
    few = aligned(24, np.float32)
    found = watch(watched, "waits", aligned(32, np.float32), 32, given=few)
    assert [(f["kind"], f["region"], f["offset"]) for f in found] == [("outside", "after in", 96)]
    found = watch(watched, "block_race", aligned(4, np.float32), 0, written=False)
    assert "uninitialised global" in {f["kind"] for f in found}


@pytest.mark.parametrize(("stride", "sectors"), [(1, 4), (2, 8), (8, 32), (32, 32)])
def test_sectors_of_a_stride(watched, stride, sectors):
    assert not watch(watched, "strided", aligned(32, np.float32), stride)
    (c,) = watched.counts()
    assert (c["requests"], c["sectors"], c["bytes_read"], c["bytes_written"]) == (2, sectors + 4, 128, 128)
    assert c["regions"] == {"in": (128, 0), "out": (0, 128)}


@pytest.mark.parametrize(("stride", "turns"), [(1, 1), (2, 2), (3, 1), (8, 8), (32, 32), (33, 1)])
def test_bank_conflicts_of_a_stride(watched, stride, turns):
    assert not watch(watched, "banks", aligned(32, np.float32), stride)
    (c,) = watched.counts()
    assert (c["conflicts"], c["worst_conflict"]) == (turns - 1, turns)


def test_faults_are_json(watched):
    assert json.dumps(watch(watched, "block_race", aligned(4, np.float32), 0))
