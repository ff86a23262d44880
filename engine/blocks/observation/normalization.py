"""Robot units to the model's and back, per dimension, in the two conventions of the published policies."""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.errors import ConfigError, InputError
from engine.io.statistics import Vectors

MODES = {
    "identity": (),
    "zscore": ("mean", "std"),
    "quantile": ("q01", "q99"),
    "minmax": ("min", "max"),
}
#: openpi adds 1e-6 to every divisor, both ways; lerobot only keeps divisors from being zero.
CONVENTIONS = ("openpi", "lerobot")


class Normalizer:
    """model = (robot - shift) / divisor + bias, and back: robot = model * scale + offset.

    zscore maps mean -> 0 and one deviation -> 1; quantile and minmax map their range onto [-1, 1]. Dimensions beyond
    the statistics pass through. Computes in fp64 (openpi) or fp32 (lerobot), as these do.

    Args:
        mode: a key of `MODES`.
        convention: 'openpi' or 'lerobot'.
        statistics: the vectors that the mode needs.
        what: 'state' or 'actions', for messages.
        source: where the statistics came from, for messages.
        eps: lerobot's epsilon; openpi's is 1e-6.

    Raises:
        InputError: an unknown mode or convention.
        ConfigError: a statistic is missing; the message says which and where to get it.
    """

    def __init__(
        self,
        mode: str,
        convention: str = "openpi",
        statistics: Vectors | None = None,
        what: str = "state",
        source: str = "the checkpoint",
        eps: float = 1e-8,
    ):
        if mode not in MODES:
            raise InputError(f"normalisation {mode!r} is not known; there are {', '.join(MODES)}")
        if convention not in CONVENTIONS:
            raise InputError(f"convention {convention!r} is not known; there are {', '.join(CONVENTIONS)}")
        self.mode, self.convention = mode, convention
        self._dtype: Any = np.float64 if convention == "openpi" else np.float32
        have = statistics or {}
        missing = [name for name in MODES[mode] if name not in have]
        if missing:
            file = "norm_stats.json" if convention == "openpi" else "policy_preprocessor.json with its .safetensors"
            raise ConfigError(
                f"{what} is normalised by {mode}, but {source} has no {' and '.join(missing)} of it; put the {file} of "
                "the training beside the weights, or pass statistics="
            )
        pair = [np.asarray(have[name], self._dtype) for name in MODES[mode]]
        low: Any = pair[0] if pair else np.zeros(0, self._dtype)
        high: Any = pair[1] if pair else low
        self._shift = low
        if mode == "zscore":
            self._divisor, self._bias = high + self._dtype(1e-6 if convention == "openpi" else eps), self._dtype(0)
            # lerobot undoes the division without the epsilon that it divided by.
            self.scale, self.offset = (self._divisor if convention == "openpi" else high), low
        else:
            width = high - low
            if convention == "openpi":
                width = width + self._dtype(1e-6)
            else:
                width = np.where(width == 0, self._dtype(eps), width)
            self._divisor, self._bias = width / 2, self._dtype(-1)
            self.scale, self.offset = self._divisor, low + self._divisor
        if (self._divisor <= 0).any():
            dimension = int(np.argmin(self._divisor))
            raise ConfigError(f"{what}: dimension {dimension} has no positive range in {source}; compute it again")

    @property
    def dims(self) -> int:
        """Dimensions that the statistics cover."""
        return len(self.scale)

    def normalize(self, values: Any) -> np.ndarray:
        """[..., n] robot units to the model's; fp64 or fp32 by convention."""
        out = np.array(values, self._dtype)
        n = min(out.shape[-1], self.dims)
        out[..., :n] = (out[..., :n] - self._shift[:n]) / self._divisor[:n] + self._bias
        return out

    def inverse(self, dims: int) -> tuple[np.ndarray, np.ndarray]:
        """(scale [dims], offset [dims]) fp64 with robot = model * scale + offset."""
        scale, offset = np.ones(dims), np.zeros(dims)
        n = min(dims, self.dims)
        scale[:n], offset[:n] = self.scale[:n], self.offset[:n]
        return scale, offset

    def __str__(self) -> str:
        return f"{self.mode} ({self.convention}, {self.dims} dimensions)"
