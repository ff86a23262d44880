"""Policies without a model."""

from __future__ import annotations

import threading
import time

import numpy as np

from engine.blocks.packets import ActionChunk, ActionPacket
from engine.blocks.schedule import HorizonSchedule
from engine.errors import DeadlineError, InputError

HORIZON, DIMS = 16, 3


class FakePolicy:
    """Action i of request n is (n, i, delay); each step takes `step_s`. obs['fail'] chooses an error."""

    def __init__(self, step_s: float = 0.0, prefill_s: float = 0.0):
        self.schedule = HorizonSchedule(HORIZON, 10)
        self.step_s, self.prefill_s = step_s, prefill_s
        self.calls: list[dict] = []
        self.deadlines: list[float | None] = []
        self.threads: set[int] = set()
        self.closed = 0
        self.steps = 0
        self.inside = 0

    def act_stream(self, obs, *, actions=None, deadline_ms=None):
        self.deadlines.append(deadline_ms)
        if deadline_ms is not None and deadline_ms < 1e3 * (self.prefill_s + self.step_s):
            raise DeadlineError("no action in time")
        if obs.get("fail") == "input":
            raise InputError("no camera image")
        return self._stream(dict(obs), actions)

    def _stream(self, obs, actions):
        self.inside += 1
        assert self.inside == 1, "two requests in the policy at once"
        number = len(self.calls)
        self.calls.append(obs)
        self.threads.add(threading.get_ident())
        delay = int(obs.get("delay", 0))
        rows = np.array([[number, i, delay] for i in range(HORIZON)], np.float32)
        try:
            time.sleep(self.prefill_s)
            packets = list(self.schedule.at(delay).packets(actions))
            for step, indices in packets:
                time.sleep(self.step_s)
                self.steps += 1
                if obs.get("fail") == "timeout":
                    raise TimeoutError("the camera of the server")
                if obs.get("fail") == "late" and step > 1:
                    raise RuntimeError("secret /path/of/the/server")
                chunk = None
                if step == packets[-1][0] and obs.get("fail") != "no end":
                    place = np.arange(HORIZON)
                    valid = (place >= delay) & (place <= indices[-1])
                    chunk = ActionChunk(rows, valid, {"first_ms": 0.5, "last_ms": 1.0})
                yield ActionPacket(step, indices, rows[indices], chunk)
        finally:
            self.inside -= 1
            self.closed += 1
