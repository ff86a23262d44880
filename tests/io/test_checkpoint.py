"""Reader and writer of safetensors: round trips, shards, renaming, stacks."""

import json
import os
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine.errors import CheckpointError, ClosedError, InputError
from engine.io.checkpoint import (
    STORAGE,
    Checkpoint,
    MappedSource,
    SafetensorsFile,
    Stack,
    bf16_to_f32,
    check_finite,
    expect,
    f32_to_bf16,
    save,
)
from engine.io.mapped import Joined


def some(shape, dtype="F32", seed=0):
    rng = np.random.default_rng(seed)
    kind = STORAGE[dtype]
    if kind.kind == "f":
        return rng.standard_normal(shape).astype(kind)
    return rng.integers(0, 2 if kind.kind == "b" else 100, shape).astype(kind)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 0, 2), (2, 3, 4)], ids=str)
def test_round_trip_keeps_every_dtype_and_shape(tmp_path, dtype, shape):
    want = some(shape, dtype)
    path = save(tmp_path / "a.safetensors", {"x": (dtype, want), "odd": ("U8", some((3,), "U8"))}, {"k": "ü"})
    with SafetensorsFile(path) as file:
        assert file.keys() == ["odd", "x"] and file.metadata == {"k": "ü"}
        info = file.info("x")
        assert (info.dtype, info.shape, info.nbytes) == (dtype, shape, want.nbytes)
        got = file.read("x")
        assert got.dtype == STORAGE[dtype] and got.shape == shape and not got.flags.writeable
        assert got.flags.aligned
        np.testing.assert_array_equal(got, want)


def test_files_of_the_reference_library_and_ours_read_both_ways(tmp_path):
    a = {"w": some((4, 6)), "b": some((6,), "F16"), "n": np.array(7, np.int64)}
    save_file(a, tmp_path / "theirs.safetensors")
    with SafetensorsFile(tmp_path / "theirs.safetensors") as file:
        for name, want in a.items():
            np.testing.assert_array_equal(file.read(name), want)
    save(tmp_path / "ours.safetensors", {"w": ("F32", a["w"].T), "b": ("F16", a["b"]), "n": ("I64", a["n"])})
    theirs = load_file(tmp_path / "ours.safetensors")
    np.testing.assert_array_equal(theirs["w"], a["w"].T)  # a transposed array is written in C order
    assert theirs["n"].shape == ()


def test_reading_is_zero_copy_and_outlives_close_and_release(tmp_path):
    want = some((1000, 50))
    path = save(tmp_path, {"x": ("F32", want)})
    file = SafetensorsFile(path)
    first, second = file.read("x"), file.read("x")
    assert np.shares_memory(first, second)
    file.release("x")
    np.testing.assert_array_equal(first, want)
    file.close()
    file.close()
    np.testing.assert_array_equal(first, want)
    with pytest.raises(ClosedError, match="closed"):
        file.read("x")


def test_misaligned_tensor_is_copied_to_alignment(tmp_path):
    header = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    header += b" " * ((1 - len(header)) % 4)  # odd header length
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + np.array([1.5, -2], "<f4").tobytes())
    with Checkpoint(tmp_path) as weights:
        x = weights.read("x")
        assert x.flags.aligned and x.tolist() == [1.5, -2.0]


def shards(folder, parts, weight_map=None):
    names = [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        save(folder / name, {key: ("F32", value) for key, value in part.items()})
    made = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    table = {"metadata": {"total_size": 1}, "weight_map": made if weight_map is None else weight_map(made, names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))


def test_shards_by_index(tmp_path):
    parts = [{"a": some((2, 2)), "b": some((3,))}, {"c": some((4,), seed=1)}]
    shards(tmp_path, parts)
    with Checkpoint(tmp_path) as weights:
        assert weights.keys() == ["a", "b", "c"] and len(weights.files) == 2
        np.testing.assert_array_equal(weights.read("c"), parts[1]["c"])
        weights.release("c")
        with pytest.raises(CheckpointError, match=r"no tensor 'x.c'"):
            weights.read("x.c")


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda m, n: m | {"a": "../" + n[0]}, "leaves"),
        (lambda m, n: m | {"a": "/etc/x.safetensors"}, "leaves"),
        (lambda m, n: m | {"a": "x\\y.safetensors"}, "leaves"),
        (lambda m, n: m | {"a": "./" + n[0]}, "leaves"),
        (lambda m, n: m | {"a": "gone.safetensors"}, "shards .* are missing"),
        (lambda m, n: m | {"a": "config.json"}, "no .safetensors file"),
        (lambda m, n: m | {"a": 5}, "no .safetensors file"),
        (lambda m, n: m | {"a": n[1]}, "it is not"),
        (lambda m, n: m | {"ghost": n[0]}, "it is not"),
        (lambda m, n: {}, "no weight_map"),
        (lambda m, n: [1], "no weight_map"),
    ],
)
def test_index_nonsense_is_refused(tmp_path, edit, says):
    shards(tmp_path, [{"a": some((2,))}, {"b": some((2,))}], edit)
    with pytest.raises(CheckpointError, match=says):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "null", "{", "[" * 100_000, '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "\ufffd"]
)
def test_index_that_is_no_json_object_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError):
        Checkpoint(tmp_path)


def test_tensor_in_two_shards_is_refused(tmp_path):
    shards(tmp_path, [{"a": some((2,)), "c": some((2,))}, {"a": some((2,)), "b": some((2,))}])
    with pytest.raises(CheckpointError, match="both"):
        Checkpoint(tmp_path)


def test_folder_without_weights_says_what_it_looked_for(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="convert them to safetensors"):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="not a folder"):
        Checkpoint(tmp_path / "none")


def test_links_out_of_the_folder_are_refused(tmp_path):
    outside = save(tmp_path / "outside.safetensors", {"a": ("F32", some((2,)))})
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(CheckpointError, match="outside"):
        Checkpoint(folder)
    with Checkpoint(folder / "model.safetensors") as weights:  # the caller named this very file
        assert weights.keys() == ["a"]


def test_links_of_the_hub_cache_are_accepted_and_no_others(tmp_path):
    repo = tmp_path / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    save(repo / "blobs" / "own.safetensors", {"a": ("F32", some((2,)))})
    save(tmp_path / "hub" / "blobs" / "00" / "shared.safetensors", {"b": ("F32", some((2,)))})
    own, shared = "../../blobs/own.safetensors", "../../blobs/shared.safetensors"
    (repo / "blobs" / "shared.safetensors").symlink_to("../../blobs/00/shared.safetensors")
    (snapshot / "model-1.safetensors").symlink_to(own)
    (snapshot / "model-2.safetensors").symlink_to(shared)
    table = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(table))
    with Checkpoint(snapshot) as weights:
        assert weights.keys() == ["a", "b"]
    other = save(tmp_path / "hub" / "models--org--other" / "x.safetensors", {"b": ("F32", some((2,)))})
    (snapshot / "model-2.safetensors").unlink()
    (snapshot / "model-2.safetensors").symlink_to(other)
    with pytest.raises(CheckpointError, match="outside"):
        Checkpoint(snapshot)
    (snapshot / "model-2.safetensors").unlink()
    (snapshot / "model-2.safetensors").symlink_to("model-2.safetensors")
    with pytest.raises(CheckpointError):
        Checkpoint(snapshot)


def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    path = save(tmp_path, {"x": ("F32", some((2,)))})
    before = path.read_bytes()

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(CheckpointError, match="No space"):
        save(tmp_path, {"x": ("F32", some((9,)))})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.safetensors"]


def test_saving_refuses_what_it_cannot_describe(tmp_path):
    with pytest.raises(InputError, match="held in uint16"):
        save(tmp_path, {"x": ("BF16", some((2,)))})
    with pytest.raises(InputError, match="use one of"):
        save(tmp_path, {"x": ("F7", some((2,)))})
    assert not os.listdir(tmp_path)


STACKS = [Stack(r"(.*experts)[.](up|down)_proj", r"\1.{e}.\2_proj.weight")]
RULES = [
    (re.compile(r"(language_model\.)?(backbone|model)\."), ""),
    ("mtp.", None),
]


def test_fused_and_single_experts_look_the_same(tmp_path):
    up = some((5, 4, 3))
    save(tmp_path / "fused", {"model.layers.1.experts.up_proj": ("F32", up), "mtp.x": ("F32", up)})
    single = {f"backbone.layers.1.experts.{e}.up_proj.weight": ("F32", up[e]) for e in range(5)}
    save(tmp_path / "single", single)
    with (
        MappedSource(Checkpoint(tmp_path / "fused"), RULES, STACKS) as fused,
        MappedSource(Checkpoint(tmp_path / "single"), RULES, STACKS) as plain,
    ):
        assert fused.skipped == ["mtp.x"] and plain.skipped == []
        assert fused.keys() == plain.keys() and len(fused.keys()) == 5
        for name in fused.keys():  # noqa: SIM118
            assert fused.info(name) == plain.info(name)
            got = fused.read(name)
            assert not got.flags.writeable and np.shares_memory(got, fused.source.read(fused.stored(name)[0]))
            np.testing.assert_array_equal(got, plain.read(name))
            fused.release(name)
        with pytest.raises(CheckpointError, match=r"there is layers.1.experts.0.up_proj.weight"):
            fused.read("layers.1.experts.5.up_proj.weight")


def test_prefix_rules_collisions_and_scalars(tmp_path):
    save(tmp_path / "a", {"model.x": ("F32", some((2,))), "backbone.x": ("F32", some((2,)))})
    with pytest.raises(CheckpointError, match="both give tensor 'x'"):
        MappedSource(Checkpoint(tmp_path / "a"), [("model.", ""), ("backbone.", "")])
    source = MappedSource(Checkpoint(tmp_path / "a"), [("model.", "m.")])
    assert source.keys() == ["backbone.x", "m.x"]
    source.release("m.x")
    save(tmp_path / "b", {"experts.up_proj": ("F32", np.float32(1).reshape(()))})
    with pytest.raises(CheckpointError, match="scalar"):
        MappedSource(Checkpoint(tmp_path / "b"), [], STACKS)


def test_a_fused_tensor_beside_a_single_expert_is_a_collision(tmp_path):
    save(tmp_path, {"experts.up_proj": ("F32", some((2, 3))), "experts.1.up_proj.weight": ("F32", some((3,)))})
    with pytest.raises(CheckpointError, match="both give"):
        MappedSource(Checkpoint(tmp_path), [], STACKS)


def test_joined_rows(tmp_path):
    """Fused from parts, and halves that change places; what it is made of is hidden."""
    q, k, both = some((2, 3)), some((4, 3), seed=1), some((4,), seed=2)
    save(tmp_path, {"q": ("F32", q), "k": ("F32", k), "both": ("F32", both), "plain": ("F32", both)})
    parts = {"qk": [("q", 0, 2), ("k", 1, 4)], "both": [("both", 2, 4), ("both", 0, 2)]}
    with Checkpoint(tmp_path) as file:
        source = Joined(file, parts)
        assert source.keys() == ["both", "plain", "qk"]
        info = source.info("qk")
        assert (info.shape, info.dtype, info.nbytes) == ((5, 3), "F32", 60)
        np.testing.assert_array_equal(source.read("qk"), np.concatenate([q, k[1:]]))
        np.testing.assert_array_equal(source.read("both"), np.concatenate([both[2:], both[:2]]))
        np.testing.assert_array_equal(source.read("plain"), both)
        assert not source.read("qk").flags.writeable
        source.release("qk")
        expect(source, {"both": (4,), "plain": (4,), "qk": (5, 3)})
        for name in ("q", "absent"):
            with pytest.raises(CheckpointError, match=name):
                source.read(name)
        for rows in ([("q", 0, 3)], [("q", 0, 2), ("both", 0, 2)], [("absent", 0, 1)]):
            with pytest.raises(CheckpointError, match=rows[-1][0]):
                Joined(file, {"x": rows})


def test_expect_names_what_does_not_fit(tmp_path):
    save(tmp_path, {"a": ("F32", some((2, 3))), "b": ("F32", some((2,))), "mtp.c": ("F32", some((2,)))})
    with Checkpoint(tmp_path) as weights:
        expect(weights, {"a": (2, 3), "b": (2,), "z": (1,)}, optional=["z"], ignore=["mtp."])
        with pytest.raises(
            CheckpointError, match=r"a has shape \[2, 3\].*\[3, 2\].*z \[1\] is missing.*mtp.c is not part"
        ):
            expect(weights, {"a": (3, 2), "b": (2,), "z": (1,)})
        expect(weights, {"a": (2, 3)}, strict=False)


def test_bf16_conversion_matches_exact_rounding():
    every = np.arange(65536, dtype=np.uint16)
    wide = bf16_to_f32(every)
    nan = np.isnan(wide)
    np.testing.assert_array_equal(f32_to_bf16(wide)[~nan], every[~nan])
    assert np.isnan(bf16_to_f32(f32_to_bf16(wide)))[nan].all()
    odd = np.array([0xFFFFFFFF, 0x7F800001, 0x7F7FFFFF, 0x3F808000, 0x3F818000, 0x3F808001], np.uint32).view(np.float32)
    assert [hex(x) for x in f32_to_bf16(odd)] == ["0xffff", "0x7fc0", "0x7f80", "0x3f80", "0x3f82", "0x3f81"]
    assert f32_to_bf16(np.float32(1.0)).shape == () and bf16_to_f32(np.array(0x3F80, np.uint16)) == 1.0
    with pytest.raises(InputError):
        bf16_to_f32(np.zeros(2, np.float32))


def test_check_finite_sees_every_float_format():
    check_finite("s", np.ones(3, np.float32))
    check_finite("s", np.array(1.0, np.float16))
    check_finite("s", f32_to_bf16(np.array([1e38, -3.0], np.float32)))
    check_finite("s", np.array([0x7E, 0xFE], np.uint8), "F8_E4M3")
    check_finite("s", np.array([255], np.uint8), "U8")
    check_finite("s", np.array([], np.float32))
    for array, dtype in [
        (np.array([1, np.nan], np.float32), None),
        (np.array(np.inf, np.float64), None),
        (f32_to_bf16(np.array([1, -np.inf], np.float32)), "BF16"),
        (np.array([0xFF], np.uint8), "F8_E4M3"),
        (np.array([0x7C], np.uint8), "F8_E5M2"),
    ]:
        with pytest.raises(CheckpointError, match="NaN or infinite"):
            check_finite("scale", array, dtype)
