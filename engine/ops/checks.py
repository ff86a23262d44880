"""What every public op checks before it hands addresses to a kernel: shapes, dtypes, contiguity, workspace."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NoReturn

from engine.errors import InputError
from engine.runtime.arena import Tensor

Shape = tuple[int | None, ...]  # None: any length


class Check:
    """The checks of one call; every refusal is an InputError that names the op, its label and the argument."""

    def __init__(self, op: str, label: str) -> None:
        self.where = f"{op} {label!r}"

    def fail(self, what: str) -> NoReturn:
        raise InputError(f"{self.where}: {what}")

    def need(self, ok: bool, what: str) -> None:
        if not ok:
            self.fail(what)

    def one_of(self, name: str, value: str, allowed: Iterable[str]) -> None:
        self.need(value in allowed, f"{name} {value!r} is not one of {', '.join(allowed)}")

    def takes(
        self,
        name: str,
        tensor: Tensor,
        shape: Shape | list[Shape],
        dtype: str = "f32",
        *,
        strided: bool = False,
        longer: bool = False,
    ) -> None:
        """`shape`: one, or a list to choose from; `dtype`: names joined by '|'. strided: rows may lie apart (the kernel
        takes a row stride); longer: more rows than asked for are fine."""
        if not isinstance(tensor, Tensor):
            self.fail(f"{name} is {type(tensor).__name__}; it must be a Tensor")
        shapes = shape if isinstance(shape, list) else [shape]
        if tensor.dtype not in dtype.split("|") or not any(_matches(tensor.shape, s, longer) for s in shapes):
            wanted = " or ".join(_text(s) for s in shapes)
            more = " or longer" if longer else ""
            self.fail(f"{name} is {tensor.dtype} {_text(tensor.shape)}; it must be {dtype} {wanted}{more}")
        if not strided and tensor.ld != tensor.shape[-1] and math.prod(tensor.shape[:-1]) > 1:
            self.fail(f"{name} is a column range of a wider buffer; it must be contiguous")

    def may_take(
        self, name: str, tensor: Tensor | None, shape: Shape | list[Shape], dtype: str = "f32", *, strided: bool = False
    ) -> None:
        """`takes` for an argument that may be None."""
        if tensor is not None:
            self.takes(name, tensor, shape, dtype, strided=strided)

    def room(self, ws: Tensor, nbytes: int) -> None:
        self.takes("ws", ws, (None,), "u8")
        self.need(ws.nbytes >= nbytes, f"ws has {ws.nbytes} bytes; it must have {nbytes}")

    def apart(self, name: str, out: Tensor, **read: Tensor | None) -> None:
        """Threads read these again after others have begun to write `out`. Column ranges of one buffer may interleave:
        of those only the beginnings are compared."""
        for other, tensor in read.items():
            if tensor is None:
                continue
            if tensor.ld == tensor.shape[-1] and out.ld == out.shape[-1]:
                clash = tensor.address < out.address + out.nbytes and out.address < tensor.address + tensor.nbytes
            else:
                clash = tensor.address == out.address
            if clash:
                self.fail(f"{name} lies on {other}, which is still read while {name} is written; use another buffer")


def _matches(got: tuple[int, ...], want: Shape, longer: bool) -> bool:
    if len(got) != len(want):
        return False
    return all(w is None or g == w or (longer and i == 0 and g > w) for i, (g, w) in enumerate(zip(got, want)))


def _text(shape: Shape) -> str:
    return f"[{', '.join('any' if s is None else str(s) for s in shape)}]"
