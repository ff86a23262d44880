"""One wrong edit of a kernel."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    file: str  # under csrc/
    kernel: str
    name: str
    old: str
    new: str

    @property
    def id(self) -> str:
        return f"{self.kernel}: {self.name}"
