"""Views of a `Source`: tensors under other names, slices of stacked ones, and rows of several as one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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


class Joined:
    """A `Source` in which some tensors are rows of others, one group behind the other.

    Args:
        source: the tensors.
        parts: name to (stored name, first row, row behind the last); stored names that occur here are hidden, and a
            name may be that of one of its own parts.

    Reading such a tensor copies it.

    Raises:
        CheckpointError: a part is missing or has too few rows, or parts differ in dtype or in what follows the rows.
    """

    def __init__(self, source: Source, parts: Mapping[str, Sequence[tuple[str, int, int]]]):
        self.source, self._parts = source, {name: tuple(rows) for name, rows in parts.items()}
        used = {stored for rows in self._parts.values() for stored, _, _ in rows}
        self._plain = [key for key in source.keys() if key not in used and key not in self._parts]  # noqa: SIM118
        self._infos = {name: self._joined(name) for name in self._parts}

    def _joined(self, name: str) -> TensorInfo:
        infos = [self.source.info(stored) for stored, _, _ in self._parts[name]]
        rows = 0
        for info, (stored, first, last) in zip(infos, self._parts[name]):
            alike = (info.dtype, info.shape[1:]) == (infos[0].dtype, infos[0].shape[1:])
            if not alike or not info.shape or info.shape[0] < last:
                raise CheckpointError(
                    f"tensor {stored!r} is {info.dtype} {list(info.shape)}: its rows {first} to {last} do not fit into "
                    f"{name!r}"
                )
            rows += last - first
        nbytes = sum(i.nbytes // i.shape[0] * (last - first) for i, (_, first, last) in zip(infos, self._parts[name]))
        return TensorInfo(name, infos[0].dtype, (rows, *infos[0].shape[1:]), nbytes)

    def keys(self) -> list[str]:
        """Every name, sorted."""
        return sorted([*self._plain, *self._parts])

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and bytes."""
        if name in self._infos:
            return self._infos[name]
        if name not in self._plain:
            raise missing(name, self.keys(), "this checkpoint")
        return self.source.info(name)

    def read(self, name: str) -> np.ndarray:
        """Read-only array (see `Source.read`); a copy where it is joined."""
        if name not in self._parts:
            return self.source.read(self.info(name).name)
        out = np.concatenate([self.source.read(stored)[first:last] for stored, first, last in self._parts[name]])
        out.flags.writeable = False
        return out

    def release(self, name: str) -> None:
        """Hint that the pages of the tensor, or of all that it is joined from, may be dropped."""
        for stored in {stored for stored, _, _ in self._parts[name]} if name in self._parts else (name,):
            self.source.release(stored)

    def close(self) -> None:
        """Close the wrapped source."""
        self.source.close()


def _rename(name: str, rules: Sequence[Rule]) -> str | None:
    for rule, replacement in rules:
        if isinstance(rule, str):
            if name.startswith(rule):
                return None if replacement is None else replacement + name[len(rule) :]
        elif match := rule.match(name):
            return None if replacement is None else match.expand(replacement) + name[match.end() :]
    return name
