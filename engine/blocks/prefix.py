"""Prefix reuse: KV truncated to what two prompts share, recurrent states from snapshots, other sequences from copies.

A recurrent state cannot be rolled back, so copies of it are kept in slots taken at load. A snapshot of n tokens is
valid as long as the first n cached positions still belong to its tokens (spec: Nemotron 6.6).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from engine import _C
from engine.blocks.lru import Lru
from engine.ops.attention import KVCache
from engine.ops.gemm import FORMATS
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
        if self.live is not None and not self._states:  # nothing but KV: every shared position stays valid
            shared = next((i for i, (a, b) in enumerate(zip(prompt, self.live)) if a != b), len(self.live))
            self.live = self.live[: min(shared, limit)]
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


@dataclass
class _Kept:
    """Copies of the first positions of every layer's keys and values, and the tokens that they belong to."""

    tokens: list[int]
    parts: list[np.ndarray]


class KVStore:
    """Copies of sequences in host memory, least recently used first out, so that a cache of one sequence serves many.

    What comes back is what was saved, to the bit.
    """

    def __init__(self, caches: Sequence[KVCache], budget: int) -> None:
        """budget: bytes; 0 keeps nothing."""
        self._caches, self._kept = list(caches), Lru[_Kept](budget)

    def __contains__(self, key: str) -> bool:
        return key in self._kept

    def save(self, key: str, tokens: Sequence[int]) -> None:
        """The first len(tokens) positions, under a key."""
        if tokens and self._kept.budget:
            parts = [np.stack(run) for run in self._runs(len(tokens))]
            self._kept.put(key, _Kept(list(tokens), parts), sum(p.nbytes for p in parts))

    def load(self, key: str) -> list[int] | None:
        """Puts them back; returns their tokens, or None where the key is not known (any more)."""
        kept = self._kept.get(key)
        if kept is None:
            return None
        for (tensor, count, stride, n), part in zip(self._layout(len(kept.tokens)), kept.parts):
            if tensor.here:
                tensor.numpy().reshape(count, stride)[:, :n] = part
            else:
                for i in range(count):
                    tensor.slice(i * stride, (n,)).write(part[i])
        return list(kept.tokens)

    def _layout(self, tokens: int) -> list[tuple[Tensor, int, int, int]]:
        """(buffer, runs, bytes from run to run, bytes of a run that hold the tokens) of keys and values by layer."""
        out = []
        for c in self._caches:
            panels, size = -(-tokens // 16), _C.gemm_panel_bytes(FORMATS[c.format], c.d, 1)
            out.append((c.k, c.kv_heads, c.ctx // 16 * size, panels * size))
            runs, stride = c.kv_heads * -(-c.d // 16), _C.gemm_panel_bytes(FORMATS[c.format], c.ctx, 1)
            out.append((c.v, runs, stride, stride // c.ctx * 16 * panels))
        return out

    def _runs(self, tokens: int) -> list[list[np.ndarray]]:
        out = []
        for tensor, count, stride, n in self._layout(tokens):
            if tensor.here:
                out.append(list(tensor.numpy().reshape(count, stride)[:, :n]))
            else:
                out.append([tensor.slice(i * stride, (n,)).read() for i in range(count)])
        return out
