"""The wire format: openpi's bytes, and frames that a hostile or broken peer may send."""

from __future__ import annotations

import contextlib
import random
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from engine.blocks.packets import ActionChunk, ActionPacket
from engine.errors import ProtocolError, ServerError
from engine.serve.protocol import ReplyReader, partial_frame, read_request, result_frame
from engine.serve.wire import DTYPES, Limits, decode, encode

GOLDEN = (
    "82a474797065a77061727469616ca7616374696f6e7384c40b5f5f6e6461727261795f5fc3c40464617461c410000000000000803f00000040"
    "00004040c4056474797065a33c6634c4057368617065920104"
)


def test_golden_bytes():
    value = {"type": "partial", "actions": np.array([[0, 1, 2, 3]], np.float32)}
    assert encode(value).hex() == GOLDEN and len(encode(value)) == 82
    read = decode(bytes.fromhex(GOLDEN))
    assert (
        read["type"] == "partial" and read["actions"].dtype == np.float32 and (read["actions"] == [[0, 1, 2, 3]]).all()
    )


def same(a, b):
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    return type(a) is type(b) and (a == b or a != a)


ARRAYS = hnp.arrays(
    st.sampled_from(sorted(DTYPES)).map(np.dtype), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
)
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=40),
    st.binary(max_size=300), ARRAYS,
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=8), inner, max_size=20),
    max_leaves=12,
)


@given(VALUES)
@settings(max_examples=300, deadline=None)
def test_round_trip(value):
    read = decode(encode(value), Limits(depth=40))
    # Arrays of the other byte order come back in the native one.
    if isinstance(value, np.ndarray) and not value.dtype.isnative:
        assert read.dtype.isnative and np.array_equal(read, value, equal_nan=value.dtype.kind == "f")
    else:
        native = isinstance(value, (dict, list)) and any(not d.isnative for d in dtypes(value))
        assert native or same(value, read)


def dtypes(value):
    if isinstance(value, np.ndarray):
        yield value.dtype
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from dtypes(item)


@given(VALUES)
@settings(max_examples=200, deadline=None)
def test_same_bytes_as_msgpack(value):
    msgpack = pytest.importorskip("msgpack")

    def numpy_extension(x):
        if isinstance(x, np.ndarray):
            return {b"__ndarray__": True, b"data": x.tobytes(), b"dtype": x.dtype.str, b"shape": x.shape}
        return {b"__npgeneric__": True, b"data": x.item(), b"dtype": x.dtype.str}

    assert encode(value) == msgpack.packb(value, default=numpy_extension)


@pytest.mark.parametrize("length", [0, 15, 16, 31, 32, 255, 256, 65_535, 65_536])
def test_lengths_as_msgpack_writes_them(length):
    msgpack = pytest.importorskip("msgpack")
    for value in ("a" * length, b"a" * length, [1] * length, {str(i): 1 for i in range(length)}):
        assert encode(value) == msgpack.packb(value)
        assert same(value, decode(encode(value), Limits(values=10**6)))


@pytest.mark.parametrize(
    "scalar", [np.float32(1.5), np.int64(-3), np.bool_(True), np.uint8(7), np.float16(2), np.uint64(2**63)]
)
def test_numpy_scalars(scalar):
    read = decode(encode({"x": scalar}))["x"]
    assert type(read) is type(scalar) and read == scalar


def test_arrays_are_views_that_cannot_be_written():
    image = decode(encode({"i": np.zeros((4, 4, 3), np.uint8)}))["i"]
    assert not image.flags.writeable and not image.flags.owndata


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, np.array(["a"]), np.array([object()]), 1j, 2**64, {3: 4}, "\ud800", np.array(1j)]
)
def test_what_cannot_travel(value):
    with pytest.raises(ProtocolError):
        encode({"x": value})


def test_own_nesting_is_an_error():
    loop: list = []
    loop.append(loop)
    with pytest.raises(ProtocolError, match="nested"):
        encode(loop)


def nd(data=b"", dtype="<f4", shape=(0,), **more):
    return encode({b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": list(shape), **more})


HOSTILE = {
    "nothing": b"",
    "extension": b"\xd4\x01\x00",
    "extension 32": b"\xc9\xff\xff\xff\xff\x01",
    "unused byte": b"\xc1",
    "list bomb": b"\xdd\xff\xff\xff\xff",
    "map bomb": b"\xdf\xff\xff\xff\xff",
    "binary bomb": b"\xc6\xff\xff\xff\xff",
    "text bomb": b"\xdb\xff\xff\xff\xff",
    "depth bomb": b"\x91" * 100_000 + b"\xc0",
    "map depth bomb": b"\x81\xa1a" * 1000 + b"\xc0",
    "many small lists": b"\xdd\x00\x0f\x00\x00" + b"\x90" * 0xF0000,
    "many nils": b"\xdd\x00\x0f\x00\x00" + b"\xc0" * 0xF0000,
    "trailing": b"\x80\x80",
    "bad UTF-8": b"\xa1\xff",
    "long text": b"\xdb\x00\x20\x00\x00" + b"a" * 0x200000,
    "key twice": b"\x82\xa1a\x01\xa1a\x02",
    "integer key": b"\x81\x01\x02",
    "list key": b"\x81\x90\x02",
    "nil key": b"\x81\xc0\x02",
    "object dtype": nd(b"12345678", "|O", (1,)),
    "pickled dtype": nd(b"12345678", "O", (1,)),
    "void dtype": nd(b"1234", "|V4", (1,)),
    "complex dtype": nd(b"1" * 16, "<c16", (1,)),
    "text dtype": nd(b"1234", "<U1", (1,)),
    "date dtype": nd(b"1" * 8, "<M8[ns]", (1,)),
    "struct dtype": nd(b"1234", "f4,f4", (1,)),
    "dtype is a list": encode({b"__ndarray__": True, b"data": b"", b"dtype": [["a", "<f4"]], b"shape": [0]}),
    "too short": nd(b"123", "<f4", (1,)),
    "too long": nd(b"12345678", "<f4", (1,)),
    "negative": nd(b"1234", "<f4", (-1,)),
    "negative twice": nd(b"1234", "<f4", (-1, -1)),
    "float shape": nd(b"1234", "<f4", (1.0,)),
    "huge shape": nd(b"", "<f4", (2**31, 0)),
    "overflowing shape": nd(b"", "<f4", (2**30,) * 8),
    "empty with huge sizes": nd(b"", "<f4", (0, 2**31 - 1, 2**31 - 1, 2**31 - 1)),
    "empty booleans with huge sizes": nd(b"", "|b1", (2**31 - 1,) * 5 + (0,)),
    "rank": nd(b"1234", "<f4", (1,) * 9),
    "boolean shape": nd(b"1234", "<f4", (True,)),
    "shape is a number": encode({b"__ndarray__": True, b"data": b"1234", b"dtype": "<f4", b"shape": 1}),
    "data is text": encode({b"__ndarray__": True, b"data": "1234", b"dtype": "<f4", b"shape": [1]}),
    "more keys": nd(b"1234", "<f4", (1,), extra=1),
    "fewer keys": encode({b"__ndarray__": True, b"data": b"1234"}),
    "bad booleans": nd(b"\x02", "|b1", (1,)),
    "scalar of another type": encode({b"__npgeneric__": True, b"data": 1.5, b"dtype": "<i4"}),
    "scalar too large": encode({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}),
    "scalar object": encode({b"__npgeneric__": True, b"data": 1, b"dtype": "|O"}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_frames(name):
    with pytest.raises(ProtocolError):
        decode(HOSTILE[name])


def test_frames_have_a_size():
    with pytest.raises(ProtocolError, match="at most 1000"):
        decode(b"\xc0" * 1001, Limits(size=1000))


def malformed(count, seed=0):
    """Frames that are no request: hostile ones, cut ones, and observations with bytes changed or exchanged."""
    r = random.Random(seed)
    good = encode(
        {
            "state": np.arange(14.0),
            "image": np.zeros((8, 8, 3), np.uint8),
            "prompt": "pick",
            "n": [1, {"a": None}],
            "delay": 3,
        }
    )
    made = list(HOSTILE.values()) + [good[:n] for n in range(len(good))]
    while len(made) < count * 4:
        frame = bytearray(good)
        for _ in range(r.randint(1, 6)):
            kind, place = r.randrange(3), r.randrange(len(frame))
            if kind == 0:
                frame[place] = r.randrange(256)
            elif kind == 1:
                frame[place:place] = struct.pack(">I", r.getrandbits(32))
            else:
                del frame[place : place + r.randint(1, 9)]
        made.append(bytes(frame))
    refused = []
    for frame in made:
        try:
            read_request(frame)
        except ProtocolError:
            refused.append(frame)
    return refused[:count]


def test_a_thousand_malformed_frames_are_typed_errors():
    # Any exception but ProtocolError fails inside malformed().
    assert len(malformed(1000)) == 1000


@given(st.binary(max_size=200))
@settings(max_examples=500, deadline=None)
def test_random_bytes(data):
    with contextlib.suppress(ProtocolError):
        decode(data)


# ---- requests and answers


def test_requests():
    frame = encode({"state": np.zeros(3), "prompt": "a", "episode": 7, "stream": True, "early_stop": 4})
    request = read_request(frame)
    assert sorted(request.observation) == ["prompt", "state"]
    assert (request.episode, request.stream, request.actions) == (7, True, 4)
    assert not read_request(frame, stream=False).stream
    plain = read_request(encode({"prompt": "a"}))
    assert (plain.episode, plain.stream, plain.actions, plain.deadline_ms) == (None, False, None, None)
    for sent in (40, 40.0, np.float32(40)):
        request = read_request(encode({"prompt": "a", "deadline_ms": sent}))
        assert request.deadline_ms == 40 and list(request.observation) == ["prompt"]


@pytest.mark.parametrize(
    "bad",
    [
        {"episode": 1.5}, {"episode": "x" * 65}, {"episode": [1]}, {"stream": 1}, {"early_stop": 0},
        {"early_stop": True}, {"deadline_ms": 0}, {"deadline_ms": True}, {"deadline_ms": "9"},
        {"deadline_ms": float("nan")},
        {"early_stop": "4"}, {b"state": 1}, [1], "obs", None,
    ],
)  # fmt: skip
def test_bad_requests(bad):
    with pytest.raises(ProtocolError):
        read_request(encode(bad))


def test_text_is_no_request():
    with pytest.raises(ProtocolError, match="text frame"):
        read_request("hello")


def chunk(h=6, d=2, done=5):
    rows = np.arange(h)
    return ActionChunk(np.arange(h * 3, dtype=np.float32).reshape(h, 3), (rows >= d) & (rows < done), {"first_ms": 1.5})


def test_stream_there_and_back():
    c = chunk()
    reader = ReplyReader(delay=2)
    one = reader.read(partial_frame(ActionPacket(1, np.array([2, 3]), c.actions[2:4]), 9))
    assert one.episode == 9 and one.packet.indices.tolist() == [2, 3] and not one.packet.final
    end = reader.read(
        result_frame(ActionPacket(3, np.array([4]), c.actions[4:5], c), {"infer_ms": 7.0}, 9, stream=True)
    )
    assert end.packet.final and end.packet.indices.tolist() == [4] and (end.packet.actions == c.actions[4:5]).all()
    assert (end.packet.chunk.actions == c.actions).all() and (end.packet.chunk.valid == c.valid).all()
    assert end.packet.chunk.delay == 2 and end.packet.chunk.timing["first_ms"] == 1.5
    assert end.fields["server_timing"] == {"infer_ms": 7.0}


def test_plain_answers_are_those_of_openpi():
    fields = decode(result_frame(ActionPacket(3, np.array([4]), chunk().actions[4:5], chunk()), {"infer_ms": 7.0}))
    assert fields["actions"].shape == (6, 3) and "infer_ms" in fields["policy_timing"] and "type" not in fields


def test_servers_without_indices_are_counted():
    reader = ReplyReader(delay=2)
    for indices, rows in (([2], 1), ([], 0), ([3, 4], 2)):
        frame = encode({"type": "partial", "actions": np.zeros((rows, 3), np.float32)})
        assert reader.read(frame).packet.indices.tolist() == indices
    end = reader.read(encode({"type": "final", "actions": np.zeros((6, 3))}))
    assert end.packet.indices.tolist() == [5] and end.packet.chunk.valid.tolist() == [False] * 2 + [True] * 4


@pytest.mark.parametrize(
    "change",
    [
        {"actions": None}, {"actions": np.zeros(3)}, {"actions": np.full((2, 3), np.nan)}, {"type": "x"},
        {"indices": [3, 3]},
        {"indices": np.array([4, 3])}, {"indices": np.array([-1, 3])}, {"indices": np.array([1])},
        {"indices": [0.5, 1]},
        {"indices": "ab"}, {"step": -1}, {"step": "a"}, {"type": "final", "valid": np.zeros(3, bool)},
        {"actions": np.zeros((2, 3), bool)},
        {"type": "final", "valid": [True, True]}, {"type": "final", "new": np.array([7])},
        {"type": "final", "policy_timing": 3},
    ],
)  # fmt: skip
def test_bad_answers(change):
    fields = {"type": "partial", "actions": np.zeros((2, 3)), "indices": np.array([0, 1]), "step": 1}
    with pytest.raises(ProtocolError):
        ReplyReader().read(encode(fields | change))


def test_error_answers():
    with pytest.raises(ServerError, match="no camera"):
        ReplyReader().read("InputError: no camera")
    with pytest.raises(ProtocolError):
        ReplyReader().read(encode([1]))
