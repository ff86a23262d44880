"""examples/convert_pickle.py: pickles of tensors become safetensors that the engine reads, anything else is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.io.checkpoint import SafetensorsFile

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("convert_pickle", ROOT / "examples/convert_pickle.py")
assert _spec is not None and _spec.loader is not None
converter = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(converter)


def converted(tmp_path, value, *more: str) -> SafetensorsFile:
    torch.save(value, tmp_path / "in.pt")
    converter.main([str(tmp_path / "in.pt"), str(tmp_path / "sub" / "out.safetensors"), *more])
    return SafetensorsFile(tmp_path / "sub" / "out.safetensors")


def test_a_prompt_that_shows_a_row_of_a_larger_storage(tmp_path):
    """[1, 4096] of 512 rows, as it is published: 8 kB, not 4 MB."""
    rows = torch.randn(512, 4096).bfloat16()
    with converted(tmp_path, rows[:1]) as file:
        assert file.info("context").dtype == "BF16"
        np.testing.assert_array_equal(file.read("context"), rows[:1].view(torch.int16).numpy().view(np.uint16))
    assert (tmp_path / "sub" / "out.safetensors").stat().st_size < 10_000


def test_dictionaries(tmp_path):
    value = {"step": 3, "state": {"a.weight": torch.ones(2, 3), "b": torch.arange(4)}}
    with converted(tmp_path, value, "--inside", "state") as file:
        assert file.keys() == ["a.weight", "b"] and file.info("b").dtype == "I64"


def test_a_dictionary_of_one_named_tensor(tmp_path):
    with converted(tmp_path, {"embedding": torch.ones(1, 4)}) as file:
        assert file.keys() == ["context"]


@pytest.mark.parametrize(
    ("value", "more", "message"),
    [
        ([1, 2], (), "holds a list"),
        ({"a": 1}, (), "has no tensors"),
        ({"a": torch.ones(1)}, ("--inside", "b"), "no dictionary under 'b'"),
        ({"a": torch.ones(1, dtype=torch.complex64)}, (), "complex64"),
        ({"a": torch.nn.Linear(1, 1)}, (), "no pickle of tensors alone"),
    ],
)
def test_anything_else_is_refused(tmp_path, value, more, message):
    torch.save(value, tmp_path / "in.pt")
    with pytest.raises(SystemExit, match=message):
        converter.main([str(tmp_path / "in.pt"), str(tmp_path / "out.safetensors"), *more])
    assert not (tmp_path / "out.safetensors").exists()


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "out.safetensors").write_text("kept")
    with pytest.raises(SystemExit):
        converter.main([str(tmp_path / "in.pt"), str(tmp_path / "out.safetensors")])
    assert (tmp_path / "out.safetensors").read_text() == "kept"
