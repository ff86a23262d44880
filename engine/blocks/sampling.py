"""Sampling options, checked once, written to the sampler's memory."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field

from engine.errors import InputError
from engine.ops.sample import SamplerState


@dataclass(frozen=True)
class SamplingOptions:
    """temperature 0 is greedy. top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off. seed: 0 <= seed < 2^64."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        def number(name: str, low: float, high: float, open_low: bool = False) -> None:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(float(value)):
                raise InputError(f"{name}={value!r} is not a finite number")
            low_ok = low < float(value) if open_low else low <= float(value)
            if not (low_ok and float(value) <= high):
                raise InputError(f"{name}={value!r} is outside {'(' if open_low else '['}{low:g}, {high:g}]")

        number("temperature", 0, 100)
        number("top_p", 0, 1, open_low=True)
        number("min_p", 0, 1)
        number("repetition_penalty", 0, 100, open_low=True)
        for name, high in (("top_k", 2**31 - 1), ("seed", 2**64 - 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not 0 <= int(value) <= high:
                raise InputError(f"{name}={value!r} is not an integer in [0, {high}]")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if not all(isinstance(s, str) and s for s in self.stop):
            raise InputError(f"stop={self.stop!r} must be non-empty strings")
        object.__setattr__(self, "stop", tuple(self.stop))

    @property
    def greedy(self) -> bool:
        """Below 1e-5 dividing by the temperature overflows; the draw is the argmax there anyway."""
        return self.temperature < 1e-5

    def write(self, state: SamplerState) -> None:
        temperature = 0.0 if self.greedy else self.temperature
        state.control.window()[:] = (temperature, self.top_p, self.min_p, self.repetition_penalty)
        state.limits.window()[0] = self.top_k
        state.seed.window()[0] = self.seed
