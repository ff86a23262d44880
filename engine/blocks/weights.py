"""What every loader does: read, check and pack one tensor after another."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from engine.errors import CheckpointError, DispatchError, InputError
from engine.io.checkpoint import MappedSource, bf16_to_f32, check_finite, f32_to_bf16
from engine.io.tensors import TensorInfo
from engine.ops.dispatch import is_strict
from engine.ops.gemm import PackedMatrix, group_for
from engine.runtime.arena import Arena, Tensor

QUANTS = (None, "int8", "int4")
_ROWS = 4096  # of a table converted at a time: it may be larger than what is free


class Recipe:
    """Which format each role of weights gets; `notes` tells why."""

    def __init__(self, dtype: str, quant: str | None) -> None:
        if quant not in QUANTS:
            raise InputError(f"quant={quant!r} is not one of None, 'int8', 'int4'")
        if dtype not in ("f32", "bf16"):
            raise InputError(f"dtype {dtype!r} is not supported for weights on a CPU; use float32 or bfloat16")
        self.dtype, self.quant = dtype, quant
        self.notes: dict[str, str] = {}

    def choose(self, role: str) -> tuple[str, str]:
        """(format, why) where every width would do."""
        return {None: self.dtype, "int8": "i8", "int4": "i4"}[self.quant], "as asked"

    def format(self, role: str, k: int) -> str:
        chosen, why = self.choose(role)
        if chosen in ("i8", "i4"):
            group = group_for(k)
            if group is None:
                chosen, why = "bf16", f"K = {k} is not a multiple of 32"
                if is_strict():
                    raise DispatchError(
                        f"{role} weights of width {k} cannot be quantised in groups of 32; load with strict=False"
                    )
            else:
                why += f", group {group}"
        self.notes[f"{role} (K={k})"] = f"{chosen} ({why})"
        return chosen

    @property
    def table_dtype(self) -> str:
        """Of embedding tables, which are read row by row."""
        return "f32" if self.dtype == "f32" and not self.quant else "bf16"


class PartRecipe(Recipe):
    """Of models with a language part, which alone gets int4: it is read once per token, and the rest gets int8 then.
    exact: roles that are not quantised, and why."""

    def __init__(self, dtype: str, quant: str | None, exact: Mapping[str, str]) -> None:
        super().__init__(dtype, quant)
        self._exact = exact

    def choose(self, role: str) -> tuple[str, str]:
        if self.quant is not None and role in self._exact:
            return "bf16", self._exact[role]
        if self.quant == "int4" and role != "language":
            return "i8", "int4 loses too much here"
        return super().choose(role)


class Shapes:
    """The tensors of a config without their contents: what a dry arena needs to lay out a model."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = dict(shapes)

    def keys(self) -> list[str]:
        return list(self._shapes)

    def info(self, name: str) -> TensorInfo:
        shape = self._shapes[name]
        return TensorInfo(name, "BF16", shape, 2 * math.prod(shape))

    def read(self, name: str) -> np.ndarray:
        raise CheckpointError(f"tensor {name!r} has a shape and no contents: the model is a sketch")

    def release(self, name: str) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is open."""


class Packer:
    """Reads, checks and packs tensors of a source; the source may drop each one's pages right after."""

    def __init__(self, source: MappedSource, arena: Arena) -> None:
        self.source, self.arena = source, arena

    def value(self, name: str) -> np.ndarray:
        """A tensor as f32, finite."""
        raw = self.source.read(name)
        value = bf16_to_f32(raw) if raw.dtype == np.uint16 else np.asarray(raw, np.float32)
        check_finite(name, value)
        return value

    def put(self, name: str, shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> Tensor:
        """An f32 buffer with what `make` gives; a dry arena does not ask."""
        out = self.arena.alloc(name, shape, "f32", "weights")
        if not self.arena.dry:
            with np.errstate(over="ignore"):
                value = np.asarray(make(), np.float32)
            check_finite(name, value)
            out.write(value.reshape(shape))
        return out

    def vector(
        self,
        name: str,
        shape: tuple[int, ...] | None = None,
        fn: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> Tensor:
        """One tensor as an f32 buffer, through fn if given."""
        return self.put(name, shape or self.source.info(name).shape, lambda: (fn or (lambda v: v))(self.value(name)))

    def optional(self, name: str, wanted: bool) -> Tensor | None:
        return self.vector(name) if wanted else None

    def stacked(self, name: str, names: list[str]) -> Tensor:
        """Several bias vectors as one buffer."""
        size = sum(self.source.info(n).shape[0] for n in names)
        return self.put(name, (size,), lambda: np.concatenate([self.value(n) for n in names]))

    def matrix(
        self,
        name: str,
        names: list[str],
        format: str,
        count: int = 1,
        fn: Callable[[np.ndarray], np.ndarray] | None = None,
        width: int | None = None,
        rows: int | None = None,
    ) -> PackedMatrix:
        """count = 1: the rows of `names` one after another; else one matrix per name.

        fn: from each stored tensor, in f32, to the [rows, width] that is packed; width, rows: what fn makes, if another
        number of columns, or of rows from the one tensor.
        """
        infos = [self.source.info(n) for n in names]
        columns = width or infos[0].shape[1]
        sizes = [rows or math.prod(i.shape) // columns for i in infos]
        out = PackedMatrix.empty(self.arena, name, sum(sizes) // count, columns, format, count)
        if self.arena.dry:
            return out
        row = 0
        for e, (n, info, size) in enumerate(zip(names, infos, sizes)):
            if info.dtype not in ("F32", "BF16", "F16"):
                raise CheckpointError(f"tensor {n!r} is {info.dtype}; this loader reads F32, BF16 and F16 weights")
            part = self.source.read(n) if fn is None else fn(self.value(n)).astype(np.float32).reshape(size, columns)
            if out.fill(part, *((row, 0) if count == 1 else (0, e))):
                raise CheckpointError(
                    f"tensor {n!r} holds NaN, infinity, or values too large for this format; check the checkpoint"
                )
            row += size
            self.source.release(n)
        return out

    def table(self, name: str, dtype: str, scale: float = 1.0, rows: int = 0) -> Tensor:
        """An embedding table [V + rows, D] in f32 or bf16, times scale; rows behind it for what a model computes."""
        info = self.source.info(name)
        out = self.arena.alloc(name, (info.shape[0] + rows, *info.shape[1:]), dtype, "weights")
        if self.arena.dry:
            return out
        raw = self.source.read(name)
        for r in range(0, info.shape[0], _ROWS):
            part = raw[r : r + _ROWS]
            check_finite(name, part, info.dtype)
            if info.dtype == "BF16" and dtype == "bf16" and scale == 1:
                value = part
            else:
                f32 = bf16_to_f32(part) if info.dtype == "BF16" else np.ascontiguousarray(part, np.float32)
                f32 = f32 * np.float32(scale) if scale != 1 else f32
                value = f32 if dtype == "f32" else f32_to_bf16(f32)
            out.slice(r * info.shape[1], value.shape).write(value)
        self.source.release(name)
        return out
