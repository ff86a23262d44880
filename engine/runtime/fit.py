"""Whether a model fits a device, and what to lower where it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from engine.errors import InputError, MemoryPlanError
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


def require(parts: Mapping[str, int], name: str, advice: str) -> None:
    """MemoryPlanError, which lists the parts and ends in `advice`, where they do not fit what is free on a device."""
    have, need = device.available_bytes(name), sum(parts.values())
    if need > have:
        listing = ", ".join(f"{k} {v / 1e9:.2f} GB" for k, v in parts.items() if v)
        raise MemoryPlanError(
            f"this model needs {need / 1e9:.2f} GB ({listing}) and {have / 1e9:.2f} GB are free here; {advice}"
        )


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
    least = None
    for words, changed in tries:
        try:
            size = need(**changed)
        except InputError:  # not every family has every option
            continue
        if size <= have:
            return f"{words} takes {size / 1e9:.3f} GB and fits"
        least = min(size, least or size)
    return f"the smallest plan takes {(least or need()) / 1e9:.3f} GB; use a device with more memory"
