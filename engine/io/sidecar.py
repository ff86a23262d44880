"""`faster.json`: what a robot policy needs to run and its checkpoint does not say."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path

from engine.errors import ConfigError
from engine.io.files import member, read_json
from engine.io.values import choice, flag, integer, number, show

NAME = "faster.json"
MAX_BYTES = 1 << 20
SCHEDULES = ("has", "const")
NORMS = ("quantile", "zscore", "minmax", "identity")
RESIZES = ("pad-pil", "pad-torch", "pad-corner", "stretch", "none")


@dataclass(frozen=True)
class Sidecar:
    """The fields of `faster.json`; None means: not said, take the checkpoint's or the profile's.

    Attributes:
        schedule: 'has' (horizon-aware) or 'const'.
        alpha, u0: of the training; see `engine.blocks.schedule.HorizonSchedule`.
        num_steps: network calls of a chunk.
        ready_threshold: an action leaves when its flow time is below this.
        max_delay: largest number of committed actions seen in training.
        discrete_state_input: whether the prompt holds the state.
        norm: 'quantile', 'zscore', 'minmax' or 'identity', of state and actions.
        delta_mask: per robot dimension, whether the action is relative to the state.
        robot_dims: dimensions of an action of the robot.
        limits: (low, high) of each robot dimension; a loaded policy clamps its actions to them. In the file
            {"low": [...], "high": [...]}.
        resize: 'pad-pil', 'pad-torch', 'pad-corner', 'stretch' or 'none'; see `engine.blocks.observation.ImageRule`.
    """

    schedule: str | None = None
    alpha: float | None = None
    u0: float | None = None
    num_steps: int | None = None
    ready_threshold: float | None = None
    max_delay: int | None = None
    discrete_state_input: bool | None = None
    norm: str | None = None
    delta_mask: tuple[bool, ...] | None = None
    robot_dims: int | None = None
    limits: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    resize: str | None = None


def read_sidecar(folder: str | os.PathLike[str]) -> Sidecar | None:
    """Read `faster.json` of a checkpoint folder; None where there is none.

    Raises:
        ConfigError: not JSON, an unknown key, or a value out of range.
    """
    path = member(Path(folder), NAME, ConfigError)
    if not path.exists():
        return None
    data = read_json(path, limit=MAX_BYTES, error=ConfigError, unique=True)
    return parse_sidecar(data, str(path))


def parse_sidecar(data: object, where: str = NAME) -> Sidecar:
    """Check the object that `faster.json` holds; errors as in `read_sidecar`."""
    if not isinstance(data, dict):
        raise ConfigError(f"{where} is not a JSON object")
    known = [f.name for f in fields(Sidecar)]
    unknown = [show(k) for k in data if k not in known]
    if unknown:
        # A misspelt key would silently leave a policy out of distribution.
        raise ConfigError(f"{where}: unknown key {unknown[0]}; the keys are {', '.join(known)}")
    made = {name: _check(f"{where}: {name}", name, value) for name, value in data.items() if value is not None}
    sidecar = Sidecar(**made)  # type: ignore[arg-type]
    if sidecar.delta_mask is not None and sidecar.robot_dims not in (None, len(sidecar.delta_mask)):
        raise ConfigError(
            f"{where}: delta_mask has {len(sidecar.delta_mask)} entries and robot_dims is {sidecar.robot_dims}; "
            "make them equal"
        )
    if sidecar.schedule == "has" and (sidecar.alpha is None or sidecar.u0 is None):
        raise ConfigError(
            f"{where}: schedule 'has' needs alpha and u0 of the training; published policies use 0.6 and 0.9"
        )
    return sidecar


def _limits(key: str, value: object) -> tuple[tuple[float, ...], ...]:
    sides = [value.get(side) for side in ("low", "high")] if isinstance(value, dict) and len(value) == 2 else []
    good = [s for s in sides if isinstance(s, list) and 1 <= len(s) <= 1024 and all(type(x) in (int, float) for x in s)]
    low, high = [tuple(map(float, s)) for s in good] if len(good) == 2 else ((), (0.0,))
    if len(low) != len(high) or not all(-1e30 < a <= b < 1e30 for a, b in zip(low, high)):
        raise ConfigError(
            f'{key} = {show(value)}; {{"low": [...], "high": [...]}} is needed, a number for each robot dimension and '
            "low <= high"
        )
    return low, high


def _check(key: str, name: str, value: object) -> object:
    words = {"schedule": SCHEDULES, "norm": NORMS, "resize": RESIZES}
    ranges = {"num_steps": (1, 1000), "max_delay": (0, 4095), "robot_dims": (1, 1024)}
    if name in words:
        return choice(key, value, words[name])
    if name in ranges:
        return integer(key, value, *ranges[name])
    if name == "discrete_state_input":
        return flag(key, value)
    if name == "limits":
        return _limits(key, value)
    if name == "delta_mask":
        if not isinstance(value, list) or not 1 <= len(value) <= 1024:
            raise ConfigError(f"{key} = {show(value)}; a list of 1 to 1024 true or false is needed")
        return tuple(flag(key, item) for item in value)
    # alpha, u0, ready_threshold: zero is allowed, and only alpha may be one.
    if type(value) in (int, float) and value == 0:
        return 0.0
    checked = number(key, value, 0, 1)
    if checked == 1 and name != "alpha":
        raise ConfigError(f"{key} = 1; a number from 0 to below 1 is needed")
    return checked
