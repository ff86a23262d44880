"""MessagePack with numpy arrays, byte for byte as openpi's clients write it; limits are checked before memory is taken.

An array travels as a map with the byte-string keys `__ndarray__`, `data`, `dtype`, `shape`, a numpy scalar as one with
`__npgeneric__`, `data`, `dtype`. The format has no types that run code, and extension types are refused.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.errors import ProtocolError

_WIDE = ("i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8")
#: dtypes that may travel, as numpy spells them; both byte orders.
DTYPES = frozenset(["|b1", "|i1", "|u1", *(o + k for o in "<>" for k in _WIDE)])


@dataclass(frozen=True)
class Limits:
    """What a frame may ask for.

    Attributes:
        size: bytes of a frame.
        depth: maps and lists inside each other.
        values: keys, items and scalars of a frame, array elements not counted.
        text: bytes of one string.
        rank: dimensions of an array.
    """

    size: int = 64 << 20
    depth: int = 8
    values: int = 20_000
    text: int = 1 << 20
    rank: int = 8


LIMITS = Limits()


def encode(value: Any) -> bytes:
    """The frame of None, bool, int, float, str, bytes, list, tuple, dict, numpy arrays and scalars.

    Raises:
        ProtocolError: any other type, an integer beyond 64 bits, a dtype that may not travel, or nesting beyond 32.
    """
    parts: list[bytes] = []
    _write(value, parts, 32)
    return b"".join(parts)


def decode(data: bytes | bytearray | memoryview, limits: Limits = LIMITS) -> Any:
    """The value of a frame. Arrays are read-only views of `data`, of native byte order where it is.

    Raises:
        ProtocolError: cut off, trailing bytes, unknown or extension types, a key twice, text that is not UTF-8, an
            array whose bytes are not its shape times its dtype, or a limit exceeded.
    """
    if len(data) > limits.size:
        raise ProtocolError(f"a frame of {len(data)} bytes; at most {limits.size} are allowed, send smaller images")
    reader = _Reader(memoryview(data), limits)
    value = _plain(reader.value(limits.depth))
    if reader.at != len(reader.data):
        raise ProtocolError(f"{len(reader.data) - reader.at} bytes follow the value; one value per frame")
    return value


# ---- writing

# (largest value, first byte, struct code) of each unsigned and signed width.
_UNSIGNED = ((0xFF, 0xCC, ">BB"), (0xFFFF, 0xCD, ">BH"), (0xFFFFFFFF, 0xCE, ">BI"), (2**64 - 1, 0xCF, ">BQ"))
_SIGNED = ((-0x80, 0xD0, ">Bb"), (-0x8000, 0xD1, ">Bh"), (-(2**31), 0xD2, ">Bi"), (-(2**63), 0xD3, ">Bq"))


def _write(value: Any, out: list[bytes], depth: int) -> None:
    # The order is msgpack's own: numpy's float64, str_ and bytes_ are subclasses and travel as plain values.
    if depth < 0:
        raise ProtocolError("a value nested deeper than 32; flatten it")
    if value is None:
        out.append(b"\xc0")
    elif isinstance(value, bool):
        out.append(b"\xc3" if value else b"\xc2")
    elif isinstance(value, int):
        out.append(_integer(value))
    elif isinstance(value, float):
        out.append(struct.pack(">Bd", 0xCB, value))
    elif isinstance(value, (bytes, bytearray)):
        out += [_head(len(value), None, 0, 0xC4), bytes(value)]
    elif isinstance(value, str):
        try:
            text = value.encode()
        except UnicodeEncodeError as fault:
            raise ProtocolError("a str holds a lone surrogate; decode it as UTF-8 first") from fault
        out += [_head(len(text), 0xA0, 31, 0xD9), text]
    elif isinstance(value, Mapping):
        out.append(_head(len(value), 0x80, 15, 0xDD, narrow=False))
        for key, item in value.items():
            if not isinstance(key, (str, bytes)):
                raise ProtocolError(f"a key of type {type(key).__name__}; keys are str")
            _write(key, out, depth - 1)
            _write(item, out, depth - 1)
    elif isinstance(value, (list, tuple)):
        out.append(_head(len(value), 0x90, 15, 0xDB, narrow=False))
        for item in value:
            _write(item, out, depth - 1)
    elif isinstance(value, (np.ndarray, np.generic)):
        if value.dtype.str not in DTYPES:
            raise ProtocolError(f"dtype {value.dtype} cannot travel; convert it to a number type")
        if isinstance(value, np.ndarray):
            shape = tuple(value.shape)
            fields = {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": shape}
        else:
            fields = {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
        _write(fields, out, depth - 1)
    else:
        raise ProtocolError(f"a value of type {type(value).__name__} cannot travel; send numbers, text or numpy arrays")


def _integer(value: int) -> bytes:
    if -32 <= value <= 127:
        return struct.pack(">b", value)
    for limit, code, form in _UNSIGNED if value > 0 else _SIGNED:
        if (value <= limit) if value > 0 else (value >= limit):
            return struct.pack(form, code, value)
    raise ProtocolError("an integer beyond 64 bits cannot travel")


def _head(count: int, fix: int | None, most: int, code: int, *, narrow: bool = True) -> bytes:
    """Type byte and length: one byte where `fix` has room, else of 8 (`narrow`), 16 or 32 bits, at code, +1, +2."""
    if fix is not None and count <= most:
        return bytes([fix | count])
    if narrow and count <= 0xFF:
        return struct.pack(">BB", code, count)
    if count <= 0xFFFF:
        return struct.pack(">BH", code + 1, count)
    if count <= 0xFFFFFFFF:
        return struct.pack(">BI", code + 2, count)
    raise ProtocolError(f"a value of {count} bytes or items cannot travel; 2**32 - 1 is the limit")


# ---- reading

_FIXED = {
    0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
    0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip
_LENGTH = {
    0xC4: ">B", 0xC5: ">H", 0xC6: ">I", 0xD9: ">B", 0xDA: ">H", 0xDB: ">I",
    0xDC: ">H", 0xDD: ">I", 0xDE: ">H", 0xDF: ">I",
}  # fmt: skip
_CONSTANT = {0xC0: None, 0xC2: False, 0xC3: True}


class _Reader:
    def __init__(self, data: memoryview, limits: Limits):
        self.data, self.limits = data, limits
        self.at = 0
        self.left = limits.values

    def value(self, depth: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ProtocolError(
                f"more than {self.limits.values} values in a frame; send lists of numbers as numpy arrays"
            )
        code = self.take(1)[0]
        if code <= 0x7F:
            return code
        if code >= 0xE0:
            return code - 256
        if code in _CONSTANT:
            return _CONSTANT[code]
        if code in _FIXED:
            return self.number(_FIXED[code])
        if code <= 0x8F:
            return self.map(code & 15, depth)
        if code <= 0x9F:
            return self.list(code & 15, depth)
        if code <= 0xBF:
            return self.text(code & 31)
        if code not in _LENGTH:
            raise ProtocolError(f"type byte 0x{code:02x} is an extension or unknown; numpy arrays travel as maps")
        count = self.number(_LENGTH[code])
        if code <= 0xC6:
            return bytes(self.take(count)) if count <= 64 else self.take(count)
        if code <= 0xDB:
            return self.text(count)
        return self.list(count, depth) if code <= 0xDD else self.map(count, depth)

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise ProtocolError(f"the frame ends {count - len(self.data) + self.at} bytes early")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, count: int) -> str:
        if count > self.limits.text:
            raise ProtocolError(f"a string of {count} bytes; at most {self.limits.text} are allowed")
        try:
            return str(self.take(count), "utf-8")
        except UnicodeDecodeError as fault:
            raise ProtocolError("a string is not UTF-8") from fault

    def enter(self, count: int, least: int, depth: int) -> None:
        # A count is believed only where that many bytes are left, and the budget of values caps what they become.
        if depth <= 0:
            raise ProtocolError(f"nested deeper than {self.limits.depth}")
        if count * least > len(self.data) - self.at or count > self.left:
            raise ProtocolError(
                f"{count} items announced, more than the frame holds or than {self.limits.values} values"
            )

    def list(self, count: int, depth: int) -> list[Any]:
        self.enter(count, 1, depth)
        return [_plain(self.value(depth - 1)) for _ in range(count)]

    def map(self, count: int, depth: int) -> Any:
        self.enter(count, 2, depth)
        out: dict[Any, Any] = {}
        for _ in range(count):
            key = _plain(self.value(0))
            if not isinstance(key, (str, bytes)):
                raise ProtocolError(f"a key of type {type(key).__name__}; keys are text")
            if key in out:
                raise ProtocolError(f"key {key[:60]!r} appears twice")
            out[key] = self.value(depth - 1)
        if b"__ndarray__" in out:
            return self.array(out)
        if b"__npgeneric__" in out:
            return self.scalar(out)
        return {k: _plain(v) for k, v in out.items()}

    def array(self, fields: dict[Any, Any]) -> np.ndarray:
        dtype = _dtype(fields, {b"__ndarray__", b"data", b"dtype", b"shape"})
        data, shape = fields[b"data"], fields[b"shape"]
        if not isinstance(data, (bytes, memoryview)) or not isinstance(shape, list) or len(shape) > self.limits.rank:
            raise ProtocolError(f"an array needs bytes and a shape of at most {self.limits.rank} dimensions")
        if not all(type(n) is int and 0 <= n < 2**31 for n in shape):
            raise ProtocolError("an array's shape holds something else than sizes from 0 to 2**31 - 1")
        if math.prod(shape) * dtype.itemsize != len(data):
            raise ProtocolError(f"an array of {dtype} {shape} cannot have {len(data)} bytes")
        if dtype.kind == "b" and (np.frombuffer(data, np.uint8) > 1).any():
            raise ProtocolError("an array of booleans holds bytes other than 0 and 1")
        try:
            array = np.frombuffer(data, dtype).reshape(shape)
        except ValueError as fault:  # empty, with other sizes that no array can have
            raise ProtocolError(f"no array has the shape {shape}") from fault
        return array if dtype.isnative else array.astype(dtype.newbyteorder("="))

    @staticmethod
    def scalar(fields: dict[Any, Any]) -> np.generic:
        dtype = _dtype(fields, {b"__npgeneric__", b"data", b"dtype"})
        data = fields[b"data"]
        if type(data) is not {"b": bool, "f": float}.get(dtype.kind, int):
            raise ProtocolError(f"a numpy scalar of {dtype} holds a {type(data).__name__}")
        try:
            # float16 of 1e300 is infinity by numpy's own rule; that is a value, not a fault.
            with np.errstate(over="ignore"):
                return dtype.newbyteorder("=").type(data)
        except OverflowError as fault:
            raise ProtocolError(f"a numpy scalar does not fit into {dtype}") from fault


def _dtype(fields: dict[Any, Any], names: set[bytes]) -> np.dtype[Any]:
    if set(fields) != names:
        raise ProtocolError(f"a numpy value has the keys {sorted(map(str, names))}, no others")
    name = fields[b"dtype"]
    if not isinstance(name, str) or name not in DTYPES:
        raise ProtocolError("an array's dtype may not travel; send booleans, integers or floats of 16 to 64 bits")
    return np.dtype(name)


def _plain(value: Any) -> Any:
    """Views of the frame become bytes where they are no array's data."""
    return bytes(value) if isinstance(value, memoryview) else value
