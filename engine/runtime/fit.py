"""Whether a model fits a device, and what to lower where it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engine.runtime import cuda, device
from engine.runtime.cards import RESERVED, card


@contextmanager
def fit(name: str) -> Iterator[tuple[str, int, str]]:
    """Inside, plans can be made for a device that need not be here: this CPU, this host's CUDA device, a card by name.

    Yields words for it, the bytes that a model may take, and the device to plan for.
    """
    if name == "cpu" or cuda.is_cuda(name):
        yield f"{name}, free now", device.available_bytes(name), name
        return
    c = card(name)
    with cuda.use(cuda.Recorder()):
        words = f"{c.name}, {c.memory / 1e9:.2f} GB less {RESERVED / 1e9:.2f} for the driver"
        yield words, c.memory - RESERVED, "cuda"


def lower(need: Callable[..., int], have: int, context: int | None) -> str:
    """The first of the usual changes that fits. need(**changed) gives the bytes of the plan with changed options."""
    tries: list[tuple[str, dict]] = [
        ("--snapshots 1", {"snapshots": 1}),
        ("--chunk 128", {"snapshots": 1, "chunk": 128}),
    ]
    if context is not None:
        at = context // 2
        while at >= 1024:
            tries.append((f"--ctx {at}", {"context": at}))
            at //= 2
    tries += [(f"--quant {q}", {"quant": q}) for q in ("int8", "int4")]
    small: dict = {"quant": "int4", "snapshots": 0, "chunk": 128, "context": 1024}
    tries.append(("--quant int4 --snapshots 0 --chunk 128 --ctx 1024", small))
    for words, changed in tries:
        if need(**changed) <= have:
            return f"{words} takes {need(**changed) / 1e9:.3f} GB and fits"
    return f"the smallest plan takes {need(**small) / 1e9:.3f} GB; use a device with more memory"
