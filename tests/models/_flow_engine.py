"""An engine driven with the tensors of the references: no prompts, no resizing, any table of times."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from _peer_faster import FlowCase

from engine.blocks.observation import ModelInput
from engine.blocks.policy import FlowPolicy
from engine.blocks.schedule import HorizonSchedule, ScheduleTable
from engine.io.checkpoint import Checkpoint
from engine.io.statistics import Statistics
from engine.models.pi05.model import Pi05
from engine.models.xvla.model import XVLA

KINDS: dict[str, type[FlowPolicy]] = {"pi05": Pi05, "xvla": XVLA}
_ONE = {"q01": -np.ones(64), "q99": np.ones(64)}
ANY = Statistics(state=_ONE, actions=_ONE)  # for configurations that ask for statistics which a test has no use for


def given_times(tau: np.ndarray, delay: int = 0) -> Any:
    """A schedule that is just these times [N + 1, H]."""
    steps, horizon = len(tau) - 1, tau.shape[1]
    tau = np.ascontiguousarray(tau, np.float32)
    ready = (np.argmax(tau[1:] < 0.01, axis=0) + 1).astype(np.int32)
    ready[:delay] = 0
    values, rows = np.unique(tau[:steps], return_inverse=True)
    own = SimpleNamespace(horizon=horizon, steps=steps, alpha=float(tau.sum()), u0=float((tau**2).sum()),
                          is_constant=True)  # fmt: skip
    table = ScheduleTable(own, delay, np.zeros(horizon), tau, np.diff(tau, axis=0), ready, values,
                          rows.reshape(steps, horizon).astype(np.int32))  # fmt: skip
    own.at = lambda d: table
    return own


def load(kind: str, folder: Path, **options: Any) -> FlowPolicy:
    """With room for any table of times, and statistics where they are asked for."""
    model, schedule = KINDS[kind], options.pop("schedule", None)
    steps = options.pop("num_steps", None)
    config = model.config_of(folder)
    asked = schedule or HorizonSchedule.constant(config.horizon, steps or config.steps)
    made = model.options_of(config, folder, schedule=asked, statistics=ANY, progress=False, **options)
    with Checkpoint(folder) as source:
        return model(config, source, replace(made, time_room=config.horizon * asked.steps))


def request(
    model: FlowPolicy, images: Any, mask: Any, tokens: Any, *, state: Any = None, domain: int = 0, prefix: Any = None
) -> ModelInput:
    """images [V, 3, height, width]; state raw; prefix [d, A] in model space."""
    profile, images = model.profile_of_inputs, np.asarray(images)
    proprio = np.zeros(profile.proprio_dim, np.float32)
    if state is not None:
        n = min(len(state), len(proprio))
        proprio[:n] = np.asarray(state)[:n]
    committed = np.zeros((0, profile.action.model_dim), np.float32) if prefix is None else np.asarray(prefix)
    return ModelInput(
        np.ascontiguousarray(images.transpose(0, 2, 3, 1), np.float32), np.asarray(mask, bool),
        np.asarray(tokens).astype(np.int32), np.zeros(64), profile.action.mask(proprio), len(committed), committed,
        domain,
    )  # fmt: skip


def stream(model: FlowPolicy, given: ModelInput, noise: Any, schedule: Any, wanted: int | None = None) -> list:
    """The packets of a request."""
    count = schedule.at(given.delay).valid if wanted is None else wanted
    return list(model._stream(given, np.asarray(noise), count, None, schedule))


def sample(model: FlowPolicy, given: ModelInput, noise: Any, schedule: Any) -> np.ndarray:
    """What the flow state holds behind the last step [H, A], in model space."""
    stream(model, given, noise, schedule)
    return model.flow.x.read()[0]


def peer_sample(model: FlowPolicy, case: FlowCase, name: str) -> np.ndarray:
    """A chunk [B, H, .] of a lerobot case, sample by sample."""
    io, delay, out = case.io, case.delay(name), []
    for b in range(case.batch):
        tokens = io["tokens"][b]
        more: dict[str, Any] = {"prefix": io["prefix"][b, :delay]}
        if "state" in io:
            more |= {"state": io["state"][b], "domain": int(io["domain"][b])}
        else:
            tokens = tokens[io["token_mask"][b].astype(bool)]
        given = request(model, io["images"][b], io["image_mask"][b], tokens, **more)
        x = sample(model, given, io["noise"][b], given_times(case.tau(name), delay))
        out.append(model.profile_of_inputs.action.finish(x) if "state" in io else x)
    return np.stack(out)
