"""Static memory: every buffer of a model is taken here at load and never moves."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine import _C
from engine.errors import InputError, MemoryPlanError, PlanError
from engine.runtime import cuda

DTYPES: dict[str, tuple[int, Any]] = {
    "f32": (4, np.float32),
    "bf16": (2, np.uint16),
    "f16": (2, np.float16),
    "i32": (4, np.int32),
    "u64": (8, np.uint64),
    "u8": (1, np.uint8),
}
_BY_NUMPY: dict[Any, str] = {np.dtype(np_type): name for name, (_, np_type) in DTYPES.items()}
PARTS = ("weights", "state", "kv", "workspace", "io")
_SLAB = 1 << 20
_ALIGN = 64
_NOWHERE = 1 << 40  # where the buffers of a dry arena begin
_capturing: Any = threading.local()


@dataclass(frozen=True, eq=False)
class Tensor:
    """A row-major buffer at a fixed address. `owner` keeps the memory alive."""

    address: int
    shape: tuple[int, ...]
    dtype: str
    owner: object
    device: str = "cpu"
    row_stride: int = 0  # elements between rows when the buffer is a column range of a wider one
    mapped: bool = False  # host memory that the device reaches: both sides read and write it in place

    @property
    def ld(self) -> int:
        """Elements from one row to the next."""
        return self.row_stride or (self.shape[-1] if self.shape else 1)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][0]

    @property
    def here(self) -> bool:
        """Whether the host reaches it without a copy."""
        return self.mapped or self.device == "cpu"

    def numpy(self) -> np.ndarray:
        """A view, not a copy; bf16 comes as uint16."""
        if not self.here:
            raise InputError(f"a buffer on {self.device} has no numpy view; use read(), which copies")
        size, np_type = DTYPES[self.dtype]
        span = self.nbytes if self.ld == self.shape[-1] else ((self.shape[0] - 1) * self.ld + self.shape[-1]) * size
        raw = (ctypes.c_uint8 * span).from_address(self.address)
        raw.owner = self.owner  # type: ignore[attr-defined]  # the view keeps the memory alive
        flat: np.ndarray = np.frombuffer(raw, dtype=np_type)  # type: ignore[call-overload]
        if self.ld == self.shape[-1]:
            return flat.reshape(self.shape)
        return np.lib.stride_tricks.as_strided(flat, self.shape, (self.ld * size, size))

    def read(self) -> np.ndarray:
        """A copy of the contents, from any device."""
        if self.here:
            return self.numpy().copy()
        out = np.empty(self._packed(), DTYPES[self.dtype][1])
        cuda.copy(out.ctypes.data, self.address, self.nbytes, self.device)
        return out

    def write(self, array: np.ndarray) -> None:
        """Replaces the contents, on any device."""
        if self.here:
            self.numpy()[...] = array
            return
        source = np.ascontiguousarray(array, DTYPES[self.dtype][1])
        if source.shape != self._packed():
            raise InputError(f"an array of shape {source.shape} does not fit a buffer of shape {self.shape}")
        cuda.copy(self.address, source.ctypes.data, self.nbytes, self.device)

    def copy_from(self, other: Tensor) -> None:
        """The contents of a buffer of the same size on the same device."""
        if self.here and other.here:
            np.copyto(self.numpy(), other.numpy())
        else:
            cuda.copy(self.address, other.address, self.nbytes, self.device)

    def host(self) -> np.ndarray:
        """The contents here: a view where the host reaches them, else a copy."""
        return self.numpy() if self.here else self.read()

    def window(self) -> np.ndarray | Window:
        """Elements of a 1-D buffer by index, wherever it lies: the memory itself where it is here, else copies."""
        return self.numpy() if self.here else Window(self)

    def _packed(self) -> tuple[int, ...]:
        if self.ld != (self.shape[-1] if self.shape else 1):
            raise InputError(f"a column range of a buffer on {self.device} cannot be copied; copy the whole buffer")
        return self.shape

    def columns(self, start: int, count: int) -> Tensor:
        """Columns [start, start+count) of a [rows, width] buffer."""
        if start < 0 or start + count > self.shape[-1]:
            raise InputError(f"columns [{start}, {start + count}) leave a buffer of width {self.shape[-1]}")
        size = DTYPES[self.dtype][0]
        shape = (*self.shape[:-1], count)
        return Tensor(self.address + start * size, shape, self.dtype, self.owner, self.device, self.ld, self.mapped)

    def rows(self, start: int, count: int) -> Tensor:
        """Rows [start, start+count) of a [rows, width] buffer, or of a range of its columns."""
        if start < 0 or start + count > self.shape[0]:
            raise InputError(f"rows [{start}, {start + count}) leave a buffer of {self.shape[0]}")
        size = DTYPES[self.dtype][0]
        return replace(self, address=self.address + start * self.ld * size, shape=(count, *self.shape[1:]))

    def slice(self, offset: int, shape: Sequence[int]) -> Tensor:
        """A buffer `offset` elements further, of another shape, inside the same memory."""
        size = DTYPES[self.dtype][0]
        if offset < 0 or (offset + math.prod(shape)) * size > self.nbytes:
            raise InputError(
                f"slice [{offset}, +{math.prod(shape)}) leaves a buffer of {math.prod(self.shape)} elements"
            )
        return replace(self, address=self.address + offset * size, shape=tuple(shape), row_stride=0)


class Window:
    """w[i], w[i:j], and assignment to either, of a 1-D buffer on a device; each is one copy."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def _part(self, key: int | slice) -> Tensor:
        start, stop, _ = key.indices(self._tensor.shape[0]) if isinstance(key, slice) else (key, key + 1, 1)
        return self._tensor.slice(start, (stop - start,))

    def __getitem__(self, key: int | slice) -> Any:
        part = self._part(key).read()
        return part if isinstance(key, slice) else part[0]

    def __setitem__(self, key: int | slice, value: Any) -> None:
        part = self._part(key)
        part.write(np.broadcast_to(np.asarray(value, DTYPES[part.dtype][1]), part.shape))


def as_tensor(value: object) -> Tensor:
    """A Tensor over numpy memory (or anything with DLPack on the CPU); contiguous or refused."""
    if isinstance(value, Tensor):
        return value
    array = value if isinstance(value, np.ndarray) else np.from_dlpack(value)  # type: ignore[arg-type]
    if not array.flags.c_contiguous:
        raise InputError(f"an array of shape {array.shape} is not contiguous; pass numpy.ascontiguousarray(x)")
    if array.dtype not in _BY_NUMPY:
        raise InputError(f"dtype {array.dtype} is not supported; use one of {', '.join(DTYPES)}")
    return Tensor(array.ctypes.data, array.shape, _BY_NUMPY[array.dtype], array)


class Arena:
    """Allocates named static buffers and knows what they are for.

    Small buffers share slabs; each large one is mapped on its own, on huge pages where the kernel grants them. After
    `seal()` nothing can be allocated: a step that tries breaks the rule of static plans and raises PlanError.
    """

    def __init__(self, device: str = "cpu", dry: bool = False) -> None:
        self.device = device
        self.dry = dry  # counts bytes and takes none: what a load would need; addresses are made up
        self.sealed = False
        self.allocations = 0
        self.buffers: dict[str, tuple[str, Tensor]] = {}
        self._slab: Any = None
        self._used = 0

    def alloc(
        self, name: str, shape: Sequence[int], dtype: str = "f32", part: str = "workspace", mapped: bool = False
    ) -> Tensor:
        """mapped: small, and read here while the device runs; no difference on a CPU."""
        if self.sealed or getattr(_capturing, "depth", False):
            raise PlanError(f"buffer {name!r} would be allocated inside a step; allocate it before capture")
        if name in self.buffers:
            raise PlanError(f"buffer {name!r} exists already")
        if part not in PARTS:
            raise PlanError(f"part {part!r} is not one of {', '.join(PARTS)}")
        shape = tuple(int(s) for s in shape)
        nbytes = math.prod(shape) * DTYPES[dtype][0]
        if self.dry:
            self.buffers[name] = (part, Tensor(_NOWHERE + self._used, shape, dtype, None, self.device))
            self._used += (nbytes + _ALIGN - 1) // _ALIGN * _ALIGN
            return self.buffers[name][1]
        try:
            if mapped and self.device != "cpu":
                memory, offset = cuda.memory(nbytes, self.device, mapped=True), 0
            elif nbytes >= _SLAB // 4:
                memory, offset = self._take(nbytes), 0
            else:
                if self._slab is None or self._used + nbytes > _SLAB:
                    self._slab, self._used = self._take(_SLAB), 0
                memory, offset = self._slab, self._used
                self._used += (nbytes + _ALIGN - 1) // _ALIGN * _ALIGN
        except MemoryPlanError:
            raise
        except MemoryError:
            raise MemoryPlanError(
                f"buffer {name!r} needs {nbytes / 1e9:.2f} GB, which this machine does not have"
            ) from None
        self.allocations += 1
        tensor = Tensor(memory.address + offset, shape, dtype, memory, self.device, mapped=mapped)
        self.buffers[name] = (part, tensor)
        return tensor

    def _take(self, nbytes: int) -> Any:
        return _C.Memory(nbytes) if self.device == "cpu" else cuda.memory(nbytes, self.device)

    def seal(self) -> None:
        self.sealed = True

    def summary(self) -> dict[str, int]:
        """Bytes by part."""
        out = dict.fromkeys(PARTS, 0)
        for part, tensor in self.buffers.values():
            out[part] += tensor.nbytes
        return out

    def mutable(self) -> dict[str, Tensor]:
        """Everything that a replay may change."""
        return {name: tensor for name, (part, tensor) in self.buffers.items() if part != "weights"}
