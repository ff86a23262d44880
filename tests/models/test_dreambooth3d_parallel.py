"""Guidance's branches in two processes: what one process alone gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from _dreambooth import FRAMES, SIZE, picture, write_adapters, write_checkpoint

import engine
from engine.errors import InputError

HERE = Path(__file__).resolve().parent


def test_two_processes(tmp_path: Path) -> None:
    assert dist.is_gloo_available()
    base, trained = write_checkpoint(tmp_path / "base"), write_adapters(tmp_path / "subject")
    paths = os.pathsep.join([str(HERE), str(HERE.parents[1]), *sys.path])
    halves = [
        subprocess.Popen(
            [sys.executable, str(HERE / "_half.py"), str(rank), str(tmp_path / "store"), str(base), str(trained),
             str(tmp_path / f"{rank}.npz")], env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    errors = [half.communicate(timeout=240)[1] for half in halves]
    assert [half.returncode for half in halves] == [0, 0], errors
    one, two = (np.load(tmp_path / f"{rank}.npz") for rank in range(2))
    with engine.load(base, dtype="fp32", frames=FRAMES, size=SIZE, steps=6, text=192, tile=64, overlap=0.25, keep=2,
                     progress=False) as m:  # fmt: skip
        subject = m.subject(trained, [picture(0)])
        ask = {"frames": FRAMES, "size": SIZE, "steps": 3}
        for name, options in (("plain", {}), ("refresh", {"refresh": 2}), ("one_way", {"one_way": True})):
            want = m.generate("A [rhs mug]", subject, **ask, **options).latent
            np.testing.assert_array_equal(one[name], two[name])
            assert np.abs(one[name] - want).max() <= 1e-5 * np.abs(want).max(), name
        assert one["ended"] and two["ended"]
        with pytest.raises(InputError, match="init_process_group"):
            m.generate("A [rhs mug]", subject, parallel="guidance", **ask)
        with pytest.raises(InputError, match="guidance=1 runs one"):
            m.generate("A [rhs mug]", subject, parallel="guidance", guidance=1.0, **ask)
        with pytest.raises(InputError, match="'guidance'"):
            m.generate("A [rhs mug]", subject, parallel="heads", **ask)
