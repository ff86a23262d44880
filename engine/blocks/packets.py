"""What a streaming policy gives: packets of actions as they are finished, and the whole chunk at the end."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, eq=False)
class ActionChunk:
    """The result of one request.

    Attributes:
        actions: [H, A] fp32, robot units.
        valid: [H] bool. False for committed actions, which the robot executes anyway, and for what an early stop left
            unfinished: never execute those rows.
        timing: milliseconds by name: `first_ms` (until the first action), `enough_ms` (until those that were asked
            for), `last_ms` (until the whole chunk), and of each stage.
    """

    actions: np.ndarray
    valid: np.ndarray
    timing: Mapping[str, float] = field(default_factory=dict)

    @property
    def delay(self) -> int:
        """Committed actions at the head of the chunk."""
        return int(np.argmax(self.valid))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write actions and valid as a numpy .npz file."""
        np.savez(path, actions=self.actions, valid=self.valid)


@dataclass(frozen=True, eq=False)
class ActionPacket:
    """Actions that became executable after one network call.

    Attributes:
        step: that call, from 1.
        indices: [k] int64, their places in the chunk, rising; k may be 0 in the final packet.
        actions: [k, A] fp32, robot units.
        chunk: the whole result, in the last packet only.
    """

    step: int
    indices: np.ndarray
    actions: np.ndarray
    chunk: ActionChunk | None = None

    @property
    def final(self) -> bool:
        """Nothing follows."""
        return self.chunk is not None
