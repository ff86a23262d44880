"""The data set: rooms with pictures of them and questions about them, the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from questions import Question, questions
from rooms import Views, draw_room, render


@dataclass(frozen=True)
class Sample:
    scene: Views
    questions: list[Question]


def sample(seed: int, held_out: bool, index: int) -> Sample:
    """Room `index` of a set. Rooms of which some solid is never seen are drawn again."""
    rng = np.random.default_rng([seed, held_out, index])
    while True:
        views = render(draw_room(rng))
        if len(views.room.solids) >= 3 and views.seen.any(0).all():
            return Sample(views, questions(views, rng))


def dataset(seed: int, count: int, *, held_out: bool = False, start: int = 0) -> Iterator[Sample]:
    """count rooms from `start` on; those held out are never trained on."""
    for index in range(start, start + count):
        yield sample(seed, held_out, index)
