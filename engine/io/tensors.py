"""What a tensor file holds: dtypes, the `Source` interface, bf16 conversion and small checks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from engine.errors import CheckpointError, InputError

#: Type that holds each safetensors dtype in numpy; formats that numpy lacks travel as unsigned integers of their width.
STORAGE: dict[str, np.dtype[Any]] = {
    name: np.dtype(code)
    for name, code in {
        "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
        "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1",
        "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
        "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
    }.items()
}  # fmt: skip

# Bits of the exponent field and of the whole number without its sign; E4M3 has one NaN pattern and no infinity.
_EXPONENT = {"BF16": 0x7F80, "F8_E5M2": 0x7C, "F8_E4M3": 0x7F, "F8_E8M0": 0xFF}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor: safetensors dtype name, shape (may be empty: a scalar) and size in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class Source(Protocol):
    """Named read-only tensors: a file, a sharded checkpoint, a renamed view, or a generator behind the same face.

    A source may also have `release_range(name, start, stop)`, the byte range form of `release`.
    """

    def keys(self) -> list[str]:
        """Every tensor name, sorted."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and bytes of a tensor; `CheckpointError` where there is none of that name."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Read-only array of `info(name).shape`; element type `STORAGE[dtype]` (BF16 as uint16, F8 as uint8)."""
        ...

    def release(self, name: str) -> None:
        """Hint that the tensor's pages may be dropped; reading it again still works."""
        ...

    def close(self) -> None:
        """Let go of the files. Arrays handed out before stay valid."""
        ...


def missing(name: str, names: Collection[str], where: object) -> CheckpointError:
    """The error for a tensor that is not there, with the nearest names that are."""
    tail = name.rsplit(".", 2)[-2:]
    near = [key for key in names if key.rsplit(".", 2)[-2:] == tail][:3]
    hint = f"; there is {', '.join(near)}" if near else ""
    return CheckpointError(f"no tensor {name!r} among the {len(names)} of {where}{hint}; the checkpoint is incomplete")


def expect(
    source: Source,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    optional: Collection[str] = (),
    ignore: Collection[str] = (),
    strict: bool = True,
) -> None:
    """Check names and shapes of a checkpoint before any weight is read.

    Args:
        source: what to check.
        shapes: shape of every tensor that the model reads.
        optional: names in `shapes` that may be absent.
        ignore: name prefixes that the model leaves unread.
        strict: refuse tensors that are neither expected nor ignored.

    Raises:
        CheckpointError: lists the first misshapen, missing and unknown tensors.
    """
    have = set(source.keys())
    faults = []
    for name, shape in shapes.items():
        if name in have:
            found = source.info(name).shape
            if found != tuple(shape):
                faults.append(f"{name} has shape {list(found)}, the configuration asks for {list(shape)}")
        elif name not in optional:
            faults.append(f"{name} {list(shape)} is missing")
    if strict:
        prefixes = tuple(ignore)
        faults += [
            f"{n} is not part of the model" for n in sorted(have.difference(shapes)) if not n.startswith(prefixes)
        ]
    if faults:
        more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
        raise CheckpointError(
            f"weights do not fit the configuration: {'; '.join(faults[:5])}{more}; use the config.json of these weights"
        )


def check_finite(name: str, array: np.ndarray, dtype: str | None = None) -> None:
    """Raise `CheckpointError` where a tensor of scales, biases or norms holds NaN or infinity.

    Args:
        name: for the message.
        array: as a `Source` hands it out.
        dtype: safetensors name of its format; without it floats are themselves, uint16 is BF16, other integers pass.
    """
    if array.dtype.kind == "f":
        bad = ~np.isfinite(array)
    else:
        mask = _EXPONENT.get(dtype or ("BF16" if array.dtype == np.uint16 else ""))
        if mask is None:
            return
        bad = (array & array.dtype.type(mask)) == mask
    count = int(np.count_nonzero(bad))
    if count:
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise CheckpointError(
            f"tensor {name!r} holds {count} NaN or infinite of {array.size} values, the first at {first}; "
            "the file is damaged, fetch it again"
        )


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """Widen bfloat16 bits (uint16, any shape) to float32, exactly."""
    if bits.dtype != np.uint16:
        raise InputError(f"bf16_to_f32 takes uint16 bit patterns, not {bits.dtype}")
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Round float32 (any shape) to bfloat16 bits (uint16): to nearest, ties to even; NaN stays NaN (quiet)."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    with np.errstate(over="ignore"):  # only NaN patterns wrap
        rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    # Rounding may carry a NaN into infinity or wrap it to zero, so these keep their top bits.
    nan = (bits & np.uint32(0x7FFFFFFF)) > 0x7F800000
    return np.where(nan, (bits >> 16).astype(np.uint16) | np.uint16(0x0040), rounded)
