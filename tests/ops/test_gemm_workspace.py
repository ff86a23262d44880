"""The packed activations of a gemm stay inside workspace_bytes(M, K)."""

from __future__ import annotations

import numpy as np
import pytest

from engine.ops.gemm import FORMATS, PackedMatrix, gemm, workspace_bytes
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
