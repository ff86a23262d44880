"""The packed activations of a gemm stay inside workspace_bytes(M, K), strip by strip where they are many."""

from __future__ import annotations

import numpy as np
import pytest

from engine.ops.gemm import FORMATS, STRIP_BYTES, PackedMatrix, gemm, workspace_bytes
from engine.ops.registry import GUARD, guarded
from engine.runtime import device
from engine.runtime.arena import as_tensor

ROWS = (*range(1, 65), 183)


@pytest.mark.parametrize("isa", device.available_isas())
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("k", "rows"), [(64, ROWS), (1024, ROWS), (8192, (183,))])
def test_workspace_is_large_enough(isa, format, k, rows):
    rng = np.random.default_rng(0)
    w = PackedMatrix.pack("w", rng.standard_normal((16, k), np.float32), format)
    x, out = as_tensor(rng.standard_normal((183, k), np.float32)), as_tensor(guarded(183, 16))
    whole = as_tensor(np.zeros(workspace_bytes(183, k) + GUARD, np.uint8))
    with device.use_isa(isa):
        for m in rows:
            need = workspace_bytes(m, k)
            behind = whole.numpy()[need : need + GUARD]
            behind[:] = 0xA5
            gemm(x.slice(0, (m, k)), w, out.slice(0, (m, 16)), ws=whole.slice(0, (need,)))
            assert (behind == 0xA5).all(), f"M = {m}: ws of {need} bytes overrun"


@pytest.mark.parametrize("format", FORMATS)
def test_strips_give_what_fewer_rows_give(format):
    """Rows that fill several strips: the same bits as each row in a product of its own kind, in bounded memory."""
    m, k, n = 5 * STRIP_BYTES // (2 * 4 * 1024), 1024, 40
    rng = np.random.default_rng(1)
    w = PackedMatrix.pack("w", rng.standard_normal((n, k), np.float32), format)
    x, out = as_tensor(rng.standard_normal((m, k), np.float32)), as_tensor(guarded(m, n))
    need = workspace_bytes(m, k)
    assert need < STRIP_BYTES + (1 << 17) < m * k * 4
    ws = as_tensor(np.zeros(need + GUARD, np.uint8))
    ws.numpy()[need:] = 0xA5
    gemm(x, w, out, ws=ws.slice(0, (need,)))
    assert (ws.numpy()[need:] == 0xA5).all()
    want = np.empty((m, n), np.float32)
    for at in range(0, m, 112):
        rows = min(112, m - at)
        gemm(x.slice(at * k, (rows, k)), w, as_tensor(want[at : at + rows]), ws=ws.slice(0, (need,)))
    np.testing.assert_array_equal(out.numpy(), want)
