"""A cache with a byte budget, whose least recently used entry gives way; keys of contents."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class Lru(Generic[Value]):
    """Values by key. An entry larger than the whole budget is not kept."""

    def __init__(self, budget: int) -> None:
        """budget: bytes of all entries together."""
        self.budget, self.nbytes = budget, 0
        self._entries: OrderedDict[str, tuple[Value, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def get(self, key: str) -> Value | None:
        """The value, which counts as used; None where there is none."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: str, value: Value, nbytes: int) -> None:
        """Keeps a value of so many bytes, in place of the key's earlier one."""
        self.drop(key)
        if nbytes > self.budget:
            return
        while self._entries and self.nbytes + nbytes > self.budget:
            _, (_, freed) = self._entries.popitem(last=False)
            self.nbytes -= freed
        self._entries[key] = (value, nbytes)
        self.nbytes += nbytes

    def drop(self, key: str) -> None:
        """Forgets a key, if it is known."""
        if key in self._entries:
            self.nbytes -= self._entries.pop(key)[1]


def digest(*parts: Any) -> str:
    """A key of texts, bytes and contiguous arrays: what they hold, and the shapes of arrays."""
    made = hashlib.blake2b(digest_size=20)
    for part in parts:
        made.update(part.encode() if isinstance(part, str) else part)
        made.update(str(getattr(part, "shape", "")).encode())
    return made.hexdigest()
