"""Tensors in memory as a checkpoint."""

from __future__ import annotations

import numpy as np

from engine.io.checkpoint import TensorInfo


class Tensors:
    """A dictionary as a source."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self.tensors = tensors

    def keys(self) -> list[str]:
        return sorted(self.tensors)

    def info(self, name: str) -> TensorInfo:
        array = self.tensors[name]
        return TensorInfo(name, "F32", array.shape, array.nbytes)

    def read(self, name: str) -> np.ndarray:
        return self.tensors[name]

    def release(self, name: str) -> None:
        """Nothing is mapped."""

    def close(self) -> None:
        """Nothing is open."""
