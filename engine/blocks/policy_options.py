"""Options of a flow policy's load: from arguments, faster.json, config.json and statistics, checked before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.blocks.observation import InputProfile, Preprocessor, TextEncoder, text_encoder
from engine.blocks.observation import profile as preset
from engine.blocks.schedule import HorizonSchedule
from engine.errors import ConfigError, InputError, TokenizerError
from engine.io.files import member
from engine.io.sidecar import Sidecar, read_sidecar
from engine.io.statistics import MODES, LerobotProcessor, Statistics, read_lerobot_processor, read_norm_stats
from engine.runtime.device import parse_dtype

MAX_BATCH = 64
RING = 3  # chunks whose rows stay readable besides those of the batch that runs
TIME_SLOTS = 4  # delays whose tables of times are kept, at least


@dataclass(frozen=True)
class PolicyOptions:
    """Checked options of a load."""

    name: str
    device: str
    dtype: str
    quant: str | None
    strict: bool
    progress: bool
    batch: int
    schedule: HorizonSchedule
    trained: HorizonSchedule | None
    max_delay: int
    preprocess: Preprocessor
    sampler: str
    time_room: int = 0  # at least so many rows per table of times

    @property
    def time_slots(self) -> int:
        """Delays whose tables of times are kept; the chunks of a batch may all differ."""
        return max(TIME_SLOTS, self.batch)

    @property
    def ring(self) -> int:
        """Chunks whose rows stay readable."""
        return self.batch + RING

    @property
    def dims(self) -> int:
        """Dimensions of an action of the robot."""
        return self.preprocess.profile.action.robot_dim

    @cached_property
    def time_rows(self) -> int:
        """Most distinct flow times that one delay needs."""
        if self.schedule.is_constant:  # those of the steps, and zero for committed actions
            return max(self.time_room, self.schedule.steps + min(self.max_delay, 1))
        return max(self.time_room, *(len(self.schedule.at(d).values) for d in range(self.max_delay + 1)))

    @staticmethod
    def of(
        folder: Path | None,
        default: InputProfile,
        *,
        name: str,
        horizon: int,
        steps: int,
        checkpoint_dtype: str = "float32",
        vocab: int | None = None,
        samplers: Sequence[str],
        device: str = "cpu",
        dtype: object = "auto",
        quant: str | None = None,
        strict: bool = False,
        progress: bool = True,
        batch: int = 1,
        schedule: str | HorizonSchedule | None = None,
        alpha: float | None = None,
        u0: float | None = None,
        num_steps: int | None = None,
        ready_threshold: float | None = None,
        max_delay: int | None = None,
        sampler: str | None = None,
        profile: str | InputProfile | None = None,
        statistics: Statistics | str | Path | None = None,
        tokenizer: TextEncoder | None = None,
    ) -> PolicyOptions:
        """From a folder's side files and the arguments of a load; arguments win over faster.json, that over defaults.

        schedule: 'has' (with alpha and u0), 'const', or a HorizonSchedule; default: what faster.json says, else
        'const'. max_delay: committed actions that tables are sized for, default horizon - 1. sampler: one of
        `samplers`, by default the first; X-VLA has 'renoise' (of its training) and 'euler' (on the velocity that its
        predictions imply). profile: an InputProfile (taken as it is) or the name of a preset (faster.json adapts it).
        statistics: of the training data, or the path of a norm_stats.json.
        """
        if isinstance(batch, bool) or not isinstance(batch, int) or not 1 <= batch <= MAX_BATCH:
            raise InputError(f"batch={batch!r} is not an integer in [1, {MAX_BATCH}]")
        parsed = parse_dtype(checkpoint_dtype if dtype in ("auto", None) else dtype)
        if parsed == "f16" and dtype in ("auto", None):
            parsed = "f32"
        sidecar = read_sidecar(folder) if folder is not None else None
        trained = _trained(sidecar, horizon, steps)
        asked = _asked(schedule, trained, sidecar, horizon, num_steps or _said(sidecar, "num_steps", steps),
                       {"alpha": alpha, "u0": u0, "ready_threshold": ready_threshold})  # fmt: skip
        limit = horizon - 1
        delays = _said(sidecar, "max_delay", limit) if max_delay is None else max_delay
        if isinstance(delays, bool) or not isinstance(delays, int) or not 0 <= delays <= limit:
            raise InputError(f"max_delay={delays!r} is not an integer in [0, {limit}] for chunks of {horizon} actions")
        processor = read_lerobot_processor(folder) if folder is not None else None
        if isinstance(profile, InputProfile):
            chosen = profile
        else:
            chosen = (preset(profile) if profile else default.with_processor(processor)).with_sidecar(sidecar)
        _fits(chosen, default)
        if sampler is not None and sampler not in samplers:
            raise InputError(f"sampler={sampler!r} is not one of {', '.join(samplers)}")
        found = _statistics(folder, statistics, processor)
        encoder = tokenizer or _encoder(folder)
        return PolicyOptions(
            name, device, parsed, quant, strict, progress, batch, asked, trained, delays,
            Preprocessor(chosen, found, encoder, vocab), sampler or samplers[0],
        )  # fmt: skip


def _said(sidecar: Sidecar | None, key: str, default: Any) -> Any:
    value = getattr(sidecar, key) if sidecar is not None else None
    return default if value is None else value


def _trained(sidecar: Sidecar | None, horizon: int, steps: int) -> HorizonSchedule | None:
    if sidecar is None or sidecar.alpha is None or sidecar.u0 is None:
        return None
    return HorizonSchedule(horizon, _said(sidecar, "num_steps", steps), sidecar.alpha, sidecar.u0,
                           _said(sidecar, "ready_threshold", 0.01))  # fmt: skip


def _asked(
    schedule: str | HorizonSchedule | None, trained: HorizonSchedule | None, sidecar: Sidecar | None, horizon: int,
    steps: int, given: dict[str, float | None],
) -> HorizonSchedule:  # fmt: skip
    numbers = {k: v for k, v in given.items() if v is not None}
    if isinstance(schedule, HorizonSchedule):
        if numbers or schedule.horizon != horizon:
            raise InputError(f"schedule is complete already, and its horizon must be {horizon}; drop alpha, u0, ...")
        return schedule
    shape = [k for k in ("alpha", "u0") if k in numbers]
    kind = schedule or ("has" if shape else _said(sidecar, "schedule", "const"))
    if kind == "const" and shape:
        raise InputError(f"schedule 'const' has no {shape[0]}; drop it, or ask for schedule='has'")
    threshold = numbers.get("ready_threshold", _said(sidecar, "ready_threshold", 0.01))
    if kind == "const":
        return HorizonSchedule.constant(horizon, steps).replace(ready_threshold=threshold)
    if kind != "has":
        raise InputError(f"schedule={kind!r} is not 'has', 'const' or a HorizonSchedule")
    base = {"alpha": trained.alpha, "u0": trained.u0} if trained else {}
    values = base | {k: numbers[k] for k in ("alpha", "u0") if k in numbers}
    if len(values) < 2:
        raise InputError(
            "schedule 'has' needs alpha= and u0= of the training: no checkpoint stores them, and this folder has no "
            "faster.json (published policies: 0.6 and 0.9; X-VLA 0.7 and 0.9)"
        )
    return HorizonSchedule(horizon, steps, values["alpha"], values["u0"], threshold)


def _fits(asked: InputProfile, own: InputProfile) -> None:
    """ConfigError where a profile describes another model than the weights' own: a request would fail, or worse not."""
    padded = own.prompt == "padded"
    for what, got, want, good in (
        ("image slots", len(asked.views), len(own.views), len(asked.views) <= len(own.views)),
        ("channels of an action", asked.action.model_dim, own.action.model_dim,
         asked.action.model_dim == own.action.model_dim),
        ("gripper channels", asked.action.grippers, own.action.grippers,
         asked.action.grippers == own.action.grippers),
        ("values of the state vector", asked.proprio_dim, own.proprio_dim, asked.proprio_dim == own.proprio_dim),
        ("prompt", asked.prompt, own.prompt, (asked.prompt == "padded") == padded),
        ("tokens", asked.max_tokens, own.max_tokens,
         asked.max_tokens == own.max_tokens or (not padded and asked.max_tokens < own.max_tokens)),
    ):  # fmt: skip
        if not good:
            raise ConfigError(f"profile {asked.name} has {what} {got}, these weights {want}; adapt it with replace()")


def norms_of(mapping: Mapping[str, str]) -> dict[str, str]:
    """`state_norm` and `action_norm` of a profile, by lerobot's normalization_mapping."""
    out = {}
    for field_, kind in (("state_norm", "STATE"), ("action_norm", "ACTION")):
        mode = mapping.get(kind, "IDENTITY")
        if mode not in MODES:
            raise ConfigError(f"normalization_mapping.{kind} = {mode} is not supported; there are {', '.join(MODES)}")
        out[field_] = MODES[mode]
    return out


def _statistics(
    folder: Path | None, given: Statistics | str | Path | None, processor: LerobotProcessor | None
) -> Statistics | None:
    if isinstance(given, Statistics):
        return given
    if given is not None:
        return read_norm_stats(given)
    if folder is None:
        return None
    direct = member(folder, "norm_stats.json", ConfigError)
    assets = sorted(folder.glob("assets/*/norm_stats.json"))
    if direct.exists() or len(assets) == 1:
        return read_norm_stats(direct if direct.exists() else assets[0])
    return processor.statistics if processor is not None else None


def _encoder(folder: Path | None) -> TextEncoder | None:
    if folder is None:
        return None
    try:
        return text_encoder(folder)
    except TokenizerError:
        if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
            raise  # there is one, and it is damaged
        return None  # observations must bring tokens; Preprocessor says so
