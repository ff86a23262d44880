"""The converter of MoMask's lineage: names, refusals, a folder that loads."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from _motok import filled, one_thread
from _motok_engine import stats
from _motok_tiny import tiny

import engine
from engine.models.motok.model import MoTok
from engine.models.motok.planner_reference import ARPlanner, DDMPlanner
from engine.models.motok.tokenizer_reference import Tokenizer

__all__ = ["one_thread"]

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))  # what a script's own folder is to it
_spec = importlib.util.spec_from_file_location("convert_momask", ROOT / "examples/convert_momask.py")
assert _spec and _spec.loader
converter = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(converter)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """What the lineage's trainers write: state dicts inside dictionaries, with a residual quantiser and wrappers."""
    c = tiny()
    tokens = {k: v.float() for k, v in filled(Tokenizer(c)).state_dict().items()}
    tokens["quantizer.layers.0.codebook"] = tokens.pop("quantizer.codebook")
    tokens["quantizer.layers.0.code_count"] = torch.ones(c.codes)
    tokens["quantizer.layers.1.codebook"] = torch.zeros(c.codes, c.latent)
    torch.save({"vq_model": tokens, "ep": 3}, tmp_path / "vq.tar")
    ddm = {f"module.{k}": v.float() for k, v in filled(DDMPlanner(c), "ddm.").state_dict().items()}
    torch.save({"t2m_transformer": {**ddm, "clip_model.x": torch.ones(2)}}, tmp_path / "ddm.tar")
    ar = {k: v.float() for k, v in filled(ARPlanner(c), "ar.").state_dict().items()}
    torch.save({"trans": {**ar, "trans_base.blocks.0.attn.mask": torch.ones(3)}}, tmp_path / "ar.pth")
    for name in ("mean", "std"):
        np.save(tmp_path / f"{name}.npy", stats(c.joints)[f"stats.{name}"])
    (tmp_path / "config.json").write_text(json.dumps(c.to_json()))
    return tmp_path


def arguments(files: Path, *more: str) -> list[str]:
    return [str(files / "out"), "--tokenizer", str(files / "vq.tar"), "--mean", str(files / "mean.npy"), "--std",
            str(files / "std.npy"), "--config", str(files / "config.json"), *more]  # fmt: skip


def test_converts(files: Path) -> None:
    converter.main(arguments(files, "--ddm", str(files / "ddm.tar"), "--ar", str(files / "ar.pth")))
    with engine.load(files / "out", dtype="fp32") as m:
        assert isinstance(m, MoTok) and m._ddm is not None and m._ar is not None
        tokens = np.arange(10, dtype=np.int32)
        assert m.decode(tokens).joints.shape == (40, 22, 3)
        want = filled(Tokenizer(tiny())).float().quantizer.codebook.numpy()
        assert np.array_equal(m.weights.codes.read(), want)


@pytest.mark.parametrize("fault", ["code", "plain", "no denoiser", "array", "config"])
def test_refuses(files: Path, fault: str) -> None:
    if fault == "code":
        torch.save({"vq_model": {"x": Path("a")}}, files / "vq.tar")
    elif fault == "plain":
        (files / "vq.tar").write_bytes(b"nothing")
    elif fault == "no denoiser":
        kept = {k: v.float() for k, v in Tokenizer(tiny()).state_dict().items() if not k.startswith("denoiser.")}
        torch.save({"net": kept}, files / "vq.tar")
    elif fault == "array":
        (files / "std.npy").write_bytes(b"\x93NUMPY")
    else:
        (files / "config.json").write_text('{"width": "wide"}')
    with pytest.raises(SystemExit, match="convert_momask"):
        converter.main(arguments(files))
    assert not (files / "out").exists()


def test_refuses_to_overwrite(files: Path) -> None:
    (files / "out").mkdir()
    with pytest.raises(SystemExit):
        converter.main(arguments(files))
