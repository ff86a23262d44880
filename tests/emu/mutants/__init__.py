"""Small wrong edits of kernels. Each must make a test of the emulator fail; a survivor needs a reason.

`old` must occur exactly once in the file. Add one for every line whose loss a case should notice:
bounds, barriers, masks, tails, rounding.
"""

from __future__ import annotations

from . import products, rows, samplers, sequences
from .mutant import Mutant

__all__ = ["MUTANTS", "SURVIVORS", "Mutant"]

MUTANTS = [*products.MUTANTS, *sequences.MUTANTS, *rows.MUTANTS, *samplers.MUTANTS]

# Mutant.id: why no case can tell it from the original.
SURVIVORS: dict[str, str] = {
    "gated_fuse: wide loads of any row": "a host reads 16 bytes at any address, a device only at multiples of 16",
    "guide: frame 0 moved": "no step leads to frame 0, so the loop behind the test has no turn there",
    "rng: half dropped": "changes a normal by one part in 2^33 unless its word is tiny, and no case draws a tiny one",
    "rng: fp32 logarithm": "one fp32 rounding more, which the tolerance of the normals allows",
}
