"""Damaged and hostile safetensors files: a typed error or a correct read, never anything else."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import CheckpointError
from engine.io.checkpoint import Checkpoint, SafetensorsFile, save


def build(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


EIGHT = b"\0" * 8
HOSTILE = {
    "empty": b"",
    "short": b"\0" * 8,
    "header beyond file": build({"x": entry()}, EIGHT, length=10_000),
    "header of 2^63": build({"x": entry()}, EIGHT, length=2**63),
    "header of 2^64-1": build({"x": entry()}, EIGHT, length=2**64 - 1),
    "truncated data": build({"x": entry()}, b"\0" * 7),
    "trailing data": build({"x": entry()}, b"\0" * 9),
    "no json": build(b"{nope", EIGHT),
    "bad utf-8": build(b'{"\xff": 1}', EIGHT),
    "a list": build([1, 2], EIGHT),
    "nesting bomb": build(b'{"x":' + b"[" * 50_000, EIGHT),
    "big integer": build(b'{"x":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', EIGHT),
    "leading space": build(b' {"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', EIGHT),
    "key twice": build(
        b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        EIGHT,
    ),
    "entry no object": build({"x": [1]}, EIGHT),
    "entry lacks shape": build({"x": {"dtype": "F32", "data_offsets": [0, 8]}}, EIGHT),
    "entry with more": build({"x": entry() | {"y": 1}}, EIGHT),
    "unknown dtype": build({"x": entry(dtype="F31")}, EIGHT),
    "dtype no string": build({"x": entry() | {"dtype": [[[1]]]}}, EIGHT),
    "lying shape": build({"x": entry(shape=(3,))}, EIGHT),
    "overflowing shape": build({"x": entry(shape=(2**62, 2**62))}, EIGHT),
    "product that wraps to 8": build({"x": entry(shape=(2**63 + 1, 2))}, EIGHT),
    "huge beside zero": build({"x": entry(shape=(0, 2**62), offsets=(0, 0))}),
    "negative size": build({"x": entry(shape=(-2,))}, EIGHT),
    "float size": build({"x": entry(shape=(2.0,))}, EIGHT),
    "bool size": build({"x": entry(shape=(True, 2))}, EIGHT),
    "rank 9": build({"x": entry(shape=(1,) * 8 + (2,))}, EIGHT),
    "shape no list": build({"x": entry() | {"shape": 2}}, EIGHT),
    "offset beyond": build({"x": entry(offsets=(8, 16))}, EIGHT),
    "offset negative": build({"x": entry(offsets=(-8, 0))}, EIGHT),
    "offsets reversed": build({"x": entry(offsets=(8, 0))}, EIGHT),
    "offsets three": build({"x": entry(offsets=(0, 8, 8))}, EIGHT),
    "overlap": build({"x": entry(), "y": entry()}, EIGHT),
    "partial overlap": build({"x": entry(), "y": entry(offsets=(4, 12))}, b"\0" * 12),
    "hole": build({"x": entry(), "y": entry(offsets=(12, 20))}, b"\0" * 20),
    "metadata no map": build({"__metadata__": 3, "x": entry()}, EIGHT),
    "metadata number": build({"__metadata__": {"a": 3}, "x": entry()}, EIGHT),
    "lone surrogate": build(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', EIGHT),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_refused_by_name(tmp_path, name):
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE[name])
    for opened in (lambda: SafetensorsFile(path), lambda: Checkpoint(tmp_path)):
        with pytest.raises(CheckpointError, match=r"model.safetensors"):
            opened()


def test_bool_bytes_above_one_are_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(build({"x": entry("BOOL", (2,), (0, 2))}, b"\1\2"))
    with Checkpoint(tmp_path) as weights, pytest.raises(CheckpointError, match="BOOL"):
        weights.read("x")


def test_a_folder_or_a_missing_file_in_place_of_weights(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        SafetensorsFile(tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="cannot be opened"):
        Checkpoint(tmp_path)


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    rng = np.random.default_rng(0)
    tensors = {
        "layer.0.weight": ("BF16", rng.integers(0, 65535, (3, 4)).astype(np.uint16)),
        "layer.0.bias": ("F32", rng.standard_normal(5).astype(np.float32)),
        "scalar": ("I64", np.array(3, np.int64)),
        "mask": ("BOOL", np.array([True, False, True])),
    }
    return folder / "fuzzed.safetensors", save(folder, tensors, {"format": "pt"}).read_bytes()


def read_all(path):
    """Every tensor read in full, or a typed error."""
    try:
        with SafetensorsFile(path) as file:
            for name in file.keys():  # noqa: SIM118
                array = file.read(name)
                assert array.nbytes == file.info(name).nbytes
                array.tobytes()
                file.release(name)
    except CheckpointError:
        pass


MUTATION = st.tuples(
    st.sampled_from(["set", "insert", "delete", "cut"]), st.integers(0, 10_000), st.binary(min_size=1, max_size=6)
)


@settings(max_examples=200, deadline=None)
@given(st.lists(MUTATION, min_size=1, max_size=6))
def test_fuzz_bytes(valid, edits):
    path, data = valid
    made = bytearray(data)
    for kind, where, what in edits:
        at = where % (len(made) + 1)
        if kind == "set":
            made[at : at + len(what)] = what
        elif kind == "insert":
            made[at:at] = what
        elif kind == "delete":
            del made[at : at + len(what)]
        else:
            del made[at:]
    path.write_bytes(made)
    read_all(path)


ODD = st.one_of(
    st.integers(-(2**70), 2**70), st.integers(-2, 60), st.floats(), st.text(max_size=4), st.none(), st.booleans(),
    st.lists(st.integers(-1, 2**66), max_size=4),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_fuzz_header_values(valid, data):
    path, raw = valid
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(header)))
        item = header[name]
        if isinstance(item, dict) and item and data.draw(st.booleans()):
            item[data.draw(st.sampled_from(sorted(item)))] = data.draw(ODD)
        else:
            header[name] = data.draw(ODD)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    read_all(path)
