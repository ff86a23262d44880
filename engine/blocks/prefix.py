"""Prefix reuse for models with recurrent state: snapshots at chosen boundaries, KV truncated.

A recurrent state cannot be rolled back, so copies of it are kept in slots taken at load. A snapshot of n tokens is
valid as long as the first n cached positions still belong to its tokens (spec: Nemotron 6.6).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.runtime.arena import Arena, Tensor


@dataclass
class _Slot:
    copies: list[Tensor]
    tokens: list[int] = field(default_factory=list)
    used: int = -1  # clock of the last use; -1: empty


class PrefixCache:
    """Tokens that the live state has seen, and snapshots of earlier states."""

    def __init__(self, arena: Arena, states: Sequence[Tensor], slots: int) -> None:
        self._states = list(states)
        self._slots = [
            _Slot([arena.alloc(f"snapshot{i}.{j}", s.shape, s.dtype, "state") for j, s in enumerate(states)])
            for i in range(slots)
        ]
        self._clock = 0
        self.live: list[int] | None = []  # None: the state is unknown (an interrupted prefill)

    def clear(self) -> None:
        """Empty sequence; every snapshot dies with its KV positions."""
        for s in self._states:
            s.write(np.zeros(s.shape, np.float32))
        self.live = []
        self._drop_beyond(0)

    def rewind(self, prompt: Sequence[int]) -> int:
        """Brings the state to the longest known proper prefix of `prompt`; returns its length."""
        limit = len(prompt) - 1  # the last token must run, its logits are needed
        if self.live is not None and len(self.live) <= limit and prompt[: len(self.live)] == self.live:
            return len(self.live)
        fits = [
            s for s in self._slots if s.used >= 0 and len(s.tokens) <= limit and prompt[: len(s.tokens)] == s.tokens
        ]
        if not fits:
            self.clear()
            return 0
        slot = max(fits, key=lambda s: len(s.tokens))
        self._clock += 1
        slot.used = self._clock
        for state, copy in zip(self._states, slot.copies):
            state.copy_from(copy)
        self.live = list(slot.tokens)
        self._drop_beyond(len(slot.tokens))
        return len(slot.tokens)

    def _drop_beyond(self, length: int) -> None:
        """Positions from `length` on will be overwritten: snapshots that need them are gone."""
        for s in self._slots:
            if s.used >= 0 and len(s.tokens) > length:
                s.used = -1

    def snapshot(self) -> None:
        """Keeps the live state; the least recently used slot gives way."""
        if not self._slots or not self.live:
            return
        self._clock += 1
        for s in self._slots:
            if s.used >= 0 and s.tokens == self.live:
                s.used = self._clock
                return
        slot = min(self._slots, key=lambda s: s.used)
        for state, copy in zip(self._states, slot.copies):
            copy.copy_from(state)
        slot.tokens, slot.used = list(self.live), self._clock
