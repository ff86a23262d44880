"""Questions about a room, with their answers from its geometry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rooms import SHAPES, Views

#: The four kinds that arms are compared by, and two that only name.
SPATIAL = ("nearer", "left", "count", "first")
KINDS = (*SPATIAL, "shape", "colour")
NUMBERS = ("zero", "one", "two", "three", "four")
RATIO, ANGLE = 1.25, 8.0  # of distances, of bearings in degrees: below them two solids are not compared


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


def questions(views: Views, rng: np.random.Generator) -> list[Question]:
    """Every question that has a clear answer; which of two solids is named first is left to chance."""
    room, seen = views.room, views.seen
    far, across, first = room.distances, room.bearings(), seen.argmax(0)
    each = np.stack([room.bearings(pose) for pose in room.poses])
    out = []
    for i, a in enumerate(room.solids):
        for j in range(i + 1, len(room.solids)):
            pair = [a.name, room.solids[j].name]
            one, two = rng.permutation(pair)

            def ask(kind: str, text: str, winner: int, pair: list[str] = pair, one: str = one, two: str = two) -> None:
                out.append(Question(kind, f"{text}, the {one} or the {two}?", pair[winner]))

            if max(far[i], far[j]) > RATIO * min(far[i], far[j]):
                ask("nearer", "Which is nearer", int(far[j] < far[i]))
            order = each[:, i] < each[:, j]
            if abs(across[i] - across[j]) > ANGLE and order.all() == order.any():
                ask("left", "Which is further left", int(not order[0]))
            if first[i] != first[j]:
                ask("first", "Which was seen first", int(first[j] < first[i]))
    shapes = [s.shape for s in room.solids]
    for shape in SHAPES:
        out.append(Question("count", f"How many {shape}s are there?", NUMBERS[shapes.count(shape)]))
    for s in room.solids:
        out.append(Question("shape", f"What is the {s.colour} thing?", s.shape))
        if shapes.count(s.shape) == 1:
            out.append(Question("colour", f"What colour is the {s.shape}?", s.colour))
    return out


# ---- the exam -------------------------------------------------------------------------------------------------------


def interval(right: int, asked: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, p = 1.959964, right / asked
    middle, half = p + z * z / (2 * asked), z * (p * (1 - p) / asked + z * z / (4 * asked * asked)) ** 0.5
    return (middle - half) / (1 + z * z / asked), (middle + half) / (1 + z * z / asked)


def exam(rooms: Sequence[Sequence[str]], each: int) -> list[np.ndarray]:
    """Of rooms' kinds of questions, which are asked in each: the first `each` of every spatial kind, one of a kind from
    a room, for answers about one room are not independent.

    Raises: ValueError where the rooms have too few.
    """
    left = dict.fromkeys(SPATIAL, each)
    out = []
    for kinds in rooms:
        mine: list[int] = []
        for i, kind in enumerate(kinds):
            if left.get(kind, 0) and kind not in [kinds[j] for j in mine]:
                left[kind] -= 1
                mine.append(i)
        out.append(np.array(mine, int))
    if any(left.values()):
        raise ValueError(f"too few rooms: {left} questions are missing")
    return out
