"""Global memory of the decode kernels at real widths, counted by the watched build: nothing is read twice that could be
read once, and what every block stages for itself stays small beside the weights."""

from __future__ import annotations

import pytest

from engine.ops.registry import ops

from . import build

pytest.importorskip("torch")
if build.compiler() is None:
    pytest.skip("no C++ compiler here: the CUDA text does not run on the host", allow_module_level=True)

from .cases import problems, reference
from .driver import EmulatedCuda

DISTINCT, ISSUED = 1.05, 1.3
# room, part of the case's id: what is above a limit, and why.
CASES = [
    ("gemm", "m1-n10304-k2688-bf16", ""),
    ("gemm", "m1-n10304-k2688-i8", ""),
    ("gemm", "m1-n10304-k2688-i4", ""),
    ("moe", "t1-e16-k6-i1856-s3712-d2688-ng1-i4", ""),
    ("ssm", "t1-h64-p64-g8-n128-k4", ""),
    # Splits leave their partial results in memory, 130 values per head and split: 0.3 MB beside 1.1 MB of K and V.
    ("attention", "t1-past1024-h32-kv2-d128-bf16", "partial results"),
]


@pytest.fixture(scope="module")
def watched():
    return EmulatedCuda("watched")


@pytest.mark.slow
@pytest.mark.parametrize(("room", "case", "excess"), CASES, ids=[c[1] for c in CASES])
def test_bytes(watched, room, case, excess, record_property):
    op = ops()[room]
    index = next(i for i, c in enumerate(op.cases) if c.id == case)
    assert not problems(watched, op, index, 0, reference(op, index))
    last = len(watched.counts())
    if room == "attention":  # the launches before filled the cache
        last = 2
    counts = watched.counts()[-last:]
    least = op.bytes(op.cases[index])
    distinct = sum(c["bytes_read"] + c["bytes_written"] for c in counts) / least
    issued = 32 * sum(c["block_sectors"] for c in counts) / least
    record_property("distinct", distinct)
    record_property("issued", issued)
    print(f"{case}: distinct {distinct:.3f}, issued {issued:.3f} of {least} bytes")
    if excess:
        assert distinct > DISTINCT, f"{excess} no longer cost anything; take the exception out"
        return
    assert distinct <= DISTINCT
    assert issued <= ISSUED


@pytest.mark.slow
def test_bytes_of_the_gated_projection(watched):
    """The widest prologue: x, gate and norm weights, 48 KB per block, beside 4-bit panels of 139 KB."""
    import numpy as np

    from engine.ops.gemm import PackedMatrix, gemm, workspace_bytes
    from engine.ops.registry import guarded
    from engine.runtime import cuda, device
    from engine.runtime.arena import as_tensor

    n, k = 2688, 4096
    rng = np.random.default_rng(3)
    w = PackedMatrix.pack("w", (rng.standard_normal((n, k)) / 64).astype(np.float32), "i4")
    x, z, norm = (as_tensor(rng.standard_normal(s).astype(np.float32)) for s in ((1, k), (1, k), (k,)))
    out, ws = as_tensor(guarded(1, n)), as_tensor(np.zeros(workspace_bytes(1, k), np.uint8))
    watched.begin(0)
    with cuda.use(watched), device.on("cuda"):
        gemm(x, w, out, norm=norm, gate=z, norm_group=512, residual=out, ws=ws)
    (count,) = watched.counts()
    least = w.matrix_bytes + 4 * (3 * k + 2 * n)
    assert count["bytes_read"] + count["bytes_written"] <= DISTINCT * least
    issued = 32 * count["block_sectors"] / least
    print(f"gated projection: issued {issued:.3f}")
    assert issued <= 1.36  # above ISSUED: 48 KB a block; fewer, larger blocks would leave the device idle
