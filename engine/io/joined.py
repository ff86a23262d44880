"""Several sources as one, each under a prefix of its own."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Self

import numpy as np

from engine.errors import CheckpointError
from engine.io.tensors import Source, TensorInfo, missing


class JoinedSource:
    """The tensors of `parts` under `<prefix><name>`; closes them.

    Raises:
        CheckpointError: two parts give one name.
    """

    def __init__(self, parts: Mapping[str, Source]) -> None:
        self._parts = dict(parts)
        self._at: dict[str, tuple[Source, str]] = {}
        for prefix, source in self._parts.items():
            for name in source.keys():  # noqa: SIM118 - a Source is no dict
                if prefix + name in self._at:
                    raise CheckpointError(f"tensor {(prefix + name)[:200]!r} is in two files; remove one of them")
                self._at[prefix + name] = (source, name)

    def _stored(self, name: str) -> tuple[Source, str]:
        try:
            return self._at[name]
        except KeyError:
            raise missing(name, self._at, "this checkpoint") from None

    def keys(self) -> list[str]:
        """Every prefixed name, sorted."""
        return sorted(self._at)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and bytes."""
        source, stored = self._stored(name)
        info = source.info(stored)
        return TensorInfo(name, info.dtype, info.shape, info.nbytes)

    def read(self, name: str) -> np.ndarray:
        """Read-only array (see `Source.read`)."""
        source, stored = self._stored(name)
        return source.read(stored)

    def release(self, name: str) -> None:
        """Hint that the tensor's pages may be dropped."""
        source, stored = self._stored(name)
        source.release(stored)

    def close(self) -> None:
        """Close every part."""
        with ExitStack() as stack:
            for source in self._parts.values():
                stack.callback(source.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
