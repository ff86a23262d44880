"""Renamed view of a `Source`: name rules, and slices of stacked tensors under names of their own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from engine.errors import CheckpointError
from engine.io.tensors import Source, TensorInfo, missing

#: (prefix or compiled pattern, replacement); None as replacement hides the tensor.
Rule = tuple["str | re.Pattern[str]", "str | None"]


@dataclass(frozen=True)
class Stack:
    """How a tensor [E, ...] that holds E tensors is spelled when they are stored one by one.

    `pattern` must match the whole (renamed) name; `name` is expanded with its groups, `{e}` being the slice number:
    `Stack(r"(.*experts)[.](up|down)_proj", r"\\1.{e}.\\2_proj.weight")`.
    """

    pattern: str
    name: str


class MappedSource:
    """A `Source` seen through name rules, so that a loader knows one spelling only.

    Args:
        source: the tensors under their stored names.
        rules: tried in order, the first that matches the start of a name replaces what it matched. A string is a plain
            prefix, a compiled pattern may use groups in the replacement. Names that no rule matches stay.
        stacks: tensors whose slices along the first axis are given as tensors of their own, without copying.

    Raises:
        CheckpointError: two stored tensors end up under one name.
    """

    def __init__(self, source: Source, rules: Sequence[Rule] = (), stacks: Sequence[Stack] = ()):
        self.source = source
        #: Stored names that a rule hides, sorted.
        self.skipped: list[str] = []
        self._at: dict[str, tuple[str, int | None]] = {}
        patterns = [(re.compile(stack.pattern), stack.name) for stack in stacks]
        for stored in source.keys():  # noqa: SIM118 - a Source is no dict
            name = _rename(stored, rules)
            if name is None:
                self.skipped.append(stored)
                continue
            match, template = next(((m, t) for p, t in patterns if (m := p.fullmatch(name))), (None, ""))
            if match is None:
                self._put(name, stored, None)
                continue
            shape = source.info(stored).shape
            if not shape:
                raise CheckpointError(f"tensor {stored!r} is a scalar where a stack of tensors is expected")
            stem = match.expand(template)
            for e in range(shape[0]):
                self._put(stem.replace("{e}", str(e)), stored, e)

    def _put(self, name: str, stored: str, part: int | None) -> None:
        if name in self._at:
            raise CheckpointError(f"{self._at[name][0]!r} and {stored!r} both give tensor {name!r}; remove one of them")
        self._at[name] = (stored, part)

    def stored(self, name: str) -> tuple[str, int | None]:
        """Name in the wrapped source, and the slice of it (None: all of it)."""
        try:
            return self._at[name]
        except KeyError:
            raise missing(name, self._at, "this checkpoint") from None

    def keys(self) -> list[str]:
        """Every name after the rules, sorted."""
        return sorted(self._at)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and bytes, of the slice where the tensor is part of a stack."""
        stored, part = self.stored(name)
        info = self.source.info(stored)
        if part is None:
            return TensorInfo(name, info.dtype, info.shape, info.nbytes)
        return TensorInfo(name, info.dtype, info.shape[1:], info.nbytes // info.shape[0])

    def read(self, name: str) -> np.ndarray:
        """Read-only array (see `Source.read`); a view for a slice."""
        stored, part = self.stored(name)
        whole = self.source.read(stored)
        return whole if part is None else whole[part, ...]

    def release(self, name: str) -> None:
        """Hint that the tensor's pages, or those of the slice, may be dropped."""
        stored, part = self.stored(name)
        by_range = getattr(self.source, "release_range", None)
        if part is not None and by_range is not None:
            step = self.info(name).nbytes
            by_range(stored, part * step, (part + 1) * step)
        else:
            self.source.release(stored)

    def close(self) -> None:
        """Close the wrapped source."""
        self.source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _rename(name: str, rules: Sequence[Rule]) -> str | None:
    for rule, replacement in rules:
        if isinstance(rule, str):
            if name.startswith(rule):
                return None if replacement is None else replacement + name[len(rule) :]
        elif match := rule.match(name):
            return None if replacement is None else match.expand(replacement) + name[match.end() :]
    return name
