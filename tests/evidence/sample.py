"""Which units a run makes again: a random tenth, bounded by the seconds that their records name."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence

Unit = tuple[str, str]
SHARE = 0.1
BUDGET = 240.0  # seconds


def choose(
    seconds: Mapping[Unit, float],
    parts: Callable[[Unit], Sequence[str]],
    seed: int,
    share: float = SHARE,
    budget: float = BUDGET,
) -> dict[Unit, list[str] | None]:
    """Units drawn alike, whatever they cost. None: the whole unit; else the parts of a long one that fit what is left.

    A unit of which not even one part fits is passed over for the next of the draw.
    """
    rng, left = random.Random(seed), budget
    order = sorted(seconds)
    rng.shuffle(order)
    out: dict[Unit, list[str] | None] = {}
    for unit in order:
        if len(out) == math.ceil(share * len(order)):
            break
        if seconds[unit] <= left:
            out[unit], left = None, left - seconds[unit]
            continue
        names = list(parts(unit))
        fit = int(left * len(names) / seconds[unit])
        if fit:
            out[unit], left = sorted(rng.sample(names, fit), key=names.index), 0.0
    return out
