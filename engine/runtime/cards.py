"""Published figures of graphics cards, for memory plans and predicted times where no device is at hand."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import InputError

RESERVED = 750 << 20  # the driver's context, loaded code and what a desktop takes; not measured


@dataclass(frozen=True)
class Card:
    """Vendor figures: memory in bytes, bandwidth in bytes/s, dense matrix rates in operations/s (a multiply-add is 2).

    sm: compute capability. Limits are those of one SM: registers, bytes of shared memory, threads, blocks.
    """

    name: str
    sm: int
    sms: int
    memory: int
    bandwidth: float
    l2: int
    bf16: float
    int8: float
    fp32: float
    registers: int = 65536
    shared: int = 100 << 10
    threads: int = 1536
    blocks: int = 24


CARDS = {
    "rtx3090": Card("RTX 3090", 86, 82, 24576 << 20, 936e9, 6 << 20, 71e12, 284e12, 35.6e12, blocks=16),
    "rtx4090": Card("RTX 4090", 89, 128, 24564 << 20, 1008e9, 72 << 20, 165e12, 660e12, 82.6e12),
    "rtx5090": Card("RTX 5090", 120, 170, 32607 << 20, 1792e9, 96 << 20, 209e12, 838e12, 104.8e12),
    "h100": Card(
        "H100 SXM", 90, 132, 81559 << 20, 3350e9, 50 << 20, 989e12, 1979e12, 66.9e12,
        shared=228 << 10, threads=2048, blocks=32,
    ),
}  # fmt: skip


def card(name: str) -> Card:
    """By key, spelled freely: 'rtx4090', 'RTX 4090', 'h100'.

    Raises: InputError.
    """
    key = "".join(c for c in name.lower() if c.isalnum()).removeprefix("nvidia").removeprefix("geforce")
    key = key if key in CARDS or f"rtx{key}" not in CARDS else f"rtx{key}"
    if key not in CARDS:
        raise InputError(f"card {name!r} is not known; there are: {', '.join(CARDS)}")
    return CARDS[key]
