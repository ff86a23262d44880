"""What flow policies share: requests, the flow state, streaming, deadlines, timing. A model adds its prefix and steps.

A request is: preprocessing on the host, the prefix plan, then one step plan per network call. Which rows leave after
which step is a function of the schedule alone, so nothing is read back to find out. Source: FASTER, sections 3 and 4.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from engine.blocks.observation import InputProfile, ModelInput, Preprocessor, TextEncoder, profile, text_encoder
from engine.blocks.packets import ActionChunk, ActionPacket
from engine.blocks.schedule import HorizonSchedule, ScheduleTable, warn_untrained
from engine.errors import ConfigError, DeadlineError, EngineError, InputError, TokenizerError
from engine.io.checkpoint import Checkpoint, Source
from engine.io.files import member
from engine.io.sidecar import Sidecar, read_sidecar
from engine.io.statistics import MODES, Statistics, read_lerobot_processor, read_norm_stats
from engine.ops.flow import FlowState
from engine.runtime.arena import Arena, Tensor
from engine.runtime.device import parse_dtype
from engine.runtime.fit import require
from engine.runtime.model import Model

MAX_BATCH = 64
RING = 3
TIME_SLOTS = 4
SMOOTHING = 0.2  # of the measured stage times that deadlines are judged by
DOUBT = 0.9  # what is left of such a time once it has refused a request: refused work measures nothing


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
        profile: str | InputProfile | None = None,
        statistics: Statistics | str | Path | None = None,
        tokenizer: TextEncoder | None = None,
    ) -> PolicyOptions:
        """From a folder's side files and the arguments of a load; arguments win over faster.json, that over defaults.

        schedule: 'has' (with alpha and u0), 'const', or a HorizonSchedule; default: what faster.json says, else
        'const'. max_delay: committed actions that tables are sized for, default horizon - 1. profile: an InputProfile
        (taken as it is) or the name of a preset (faster.json adapts it). statistics: of the training data, or the path
        of a norm_stats.json.
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
        chosen = profile if isinstance(profile, InputProfile) else _profile(profile, default).with_sidecar(sidecar)
        _fits(chosen, default)
        found = _statistics(folder, statistics)
        encoder = tokenizer or _encoder(folder)
        return PolicyOptions(
            name, device, parsed, quant, strict, progress, batch, asked, trained, delays,
            Preprocessor(chosen, found, encoder, vocab),
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
    kind = schedule or _said(sidecar, "schedule", "has" if "alpha" in numbers or "u0" in numbers else "const")
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


def _profile(asked: str | None, default: InputProfile) -> InputProfile:
    return default if asked is None else profile(asked)


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


def _statistics(folder: Path | None, given: Statistics | str | Path | None) -> Statistics | None:
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
    processor = read_lerobot_processor(folder)
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


class ViewsSeen:
    """Which image each camera showed last: the same bytes need no second look."""

    def __init__(self, views: int) -> None:
        self._last: list[np.ndarray | None] = [None] * views
        self._absent = [False] * views

    def same(self, i: int, image: np.ndarray) -> bool:
        last = self._last[i]
        return last is not None and last.shape == image.shape and bool(np.array_equal(last, image))

    def keep(self, i: int, image: np.ndarray) -> None:
        self._last[i], self._absent[i] = image.copy(), False

    def empty(self, i: int) -> bool:
        """Whether camera i is known to be absent."""
        return self._absent[i]

    def clear(self, i: int) -> None:
        """Camera i is absent, and what stands for it is in place."""
        self._last[i], self._absent[i] = None, True

    def forget(self, which: Sequence[int] | None = None) -> None:
        for i in range(len(self._last)) if which is None else which:
            self._last[i], self._absent[i] = None, False


@dataclass
class Timing:
    """Milliseconds of one request since it began: T_first, T_s, T_H, and each stage by itself."""

    first: float | None = None
    enough: float | None = None
    last: float | None = None
    stages: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, float]:
        """For a server's answer: `<stage>_ms`, `first_ms`, `enough_ms`, `last_ms`."""
        out = {f"{k}_ms": v for k, v in self.stages.items()}
        marks = {"first_ms": self.first, "enough_ms": self.enough, "last_ms": self.last}
        return out | {k: v for k, v in marks.items() if v is not None}


class Clock:
    """Stages of the request that runs, what they usually take, and its deadline."""

    def __init__(self, model: str, now: Callable[[], float] = time.perf_counter) -> None:
        self._model, self.now = model, now
        self.usual: dict[str, float] = {}
        self.begin(None)

    def begin(self, deadline_ms: float | None, spent: float = 0.0) -> None:
        """`spent`: milliseconds that preprocessing took already; they count."""
        self.start, self.timing = self.now() - spent / 1e3, Timing()
        if spent:
            self.timing.stages["preprocess"] = spent
        self.deadline = deadline_ms

    @property
    def elapsed(self) -> float:
        return (self.now() - self.start) * 1e3

    @contextmanager
    def stage(self, name: str, kind: str | None = None, ahead: int = 1) -> Iterator[None]:
        """Measures; DeadlineError if the deadline would pass before the stage ends, or has passed when it ends.

        kind: of the work, where a stage of this name is not always the same amount; ahead: so many such stages are
        needed before the first action.
        """
        kind = kind or name
        usual = self.usual.get(kind, 0.0)
        times = "" if ahead == 1 else f", {ahead} times,"
        try:
            self.promise(ahead * usual, f"{name} usually takes{times}")
        except DeadlineError:
            self.usual[kind] = DOUBT * usual  # or one slow moment would refuse every request from now on
            raise
        before = self.elapsed
        yield
        took = self.elapsed - before
        usual = self.usual.get(kind, took)
        self.usual[kind] = usual + SMOOTHING * (took - usual)
        if name == "step":
            self.timing.steps.append(took)
        else:
            self.timing.stages[name] = self.timing.stages.get(name, 0.0) + took
        self.promise(0.0, f"{name} took {took:.1f} ms")

    def promise(self, ahead: float, why: str) -> None:
        """DeadlineError unless `ahead` more milliseconds fit."""
        if self.deadline is not None and self.timing.first is None and self.elapsed + ahead > self.deadline:
            more = f"{why} {ahead:.1f} ms" if ahead else why
            raise DeadlineError(
                f"model {self._model!r} has no action within {self.deadline:g} ms: {self.elapsed:.1f} ms have passed "
                f"and {more}; allow more time, load fewer views, or use a horizon-aware schedule"
            )


class FlowPolicy(Model):
    """Base of pi0.5 and X-VLA. Verbs: `act`, `act_stream`, `reset`; see there."""

    rule: str
    config_type: Any

    @classmethod
    def load(cls, folder: Path, *, source: Source | None = None, **options: Any) -> Self:
        """From a folder in a published layout; `source` replaces its weight files. Options: see `PolicyOptions.of`."""
        config = cls.config_of(folder)
        checked = cls.options_of(config, folder, **options)
        parts = cls.made_of(config, None, checked).arena.summary()
        require(parts, checked.device, "load with quant='int8', or a smaller batch=")
        if source is not None:
            return cls.made_of(config, source, checked)
        with Checkpoint(folder) as checkpoint:
            return cls.made_of(config, checkpoint, checked)

    @classmethod
    def made_of(cls, config: Any, source: Source | None, options: PolicyOptions) -> Self:
        """Packs the weights of `source` and captures every plan; without one a sketch, whose plans cannot run."""
        return cls(config, source, options)  # type: ignore[arg-type]  # subclasses take these three

    @classmethod
    def sketch(cls, config: dict, **options: Any) -> Self:
        """The model of a config.json without memory: every buffer is laid out and every plan recorded, none can run."""
        parsed = cls.parse(config)
        profile = cls.default_profile(parsed).replace(state_norm="identity", action_norm="identity")
        return cls.made_of(parsed, None, cls.options_of(parsed, None, profile=profile, **options))

    @classmethod
    def plan(
        cls, config: dict, *, device: str = "cpu", dtype: object = "auto", quant: str | None = None, batch: int = 1,
        **others: object,
    ) -> dict[str, int]:  # fmt: skip
        """Bytes by part that a load would take, from config.json alone and by the code that allocates."""
        if others:
            raise InputError(f"a policy has no {', '.join(others)}; it takes dtype, quant and batch")
        return cls.sketch(config, device=device, dtype=dtype, quant=quant, batch=batch).arena.summary()

    @classmethod
    def parse(cls, config: dict) -> Any:
        """The checked configuration of a config.json."""
        return cls.config_type.from_json(config)

    @classmethod
    def config_of(cls, folder: Path) -> Any:
        """The checked configuration of a folder: config.json and the shapes of the weights."""
        return cls.config_type.from_folder(folder)

    @classmethod
    def default_profile(cls, config: Any) -> InputProfile:
        """The preprocessing of this kind of checkpoint."""
        raise NotImplementedError

    @classmethod
    def options_of(cls, config: Any, folder: Path | None = None, **options: Any) -> PolicyOptions:
        """Options of a load, checked; see `PolicyOptions.of`."""
        return PolicyOptions.of(folder, cls.default_profile(config), horizon=config.horizon, steps=config.steps,
                                name=folder.name if folder else cls.__name__.lower(), checkpoint_dtype=config.dtype,
                                vocab=cls.vocabulary(config), **options)  # fmt: skip

    @classmethod
    def vocabulary(cls, config: Any) -> int:
        """Token ids are below this."""
        return config.vocab_size

    def __init__(self, arena: Arena, flow: FlowState, options: PolicyOptions) -> None:
        super().__init__(options.name, arena)
        self.options = options
        self.flow = flow
        self.views_seen = ViewsSeen(len(options.preprocess.profile.views))
        self.clock = Clock(options.name)
        self._requests = 0
        self._slots: dict[tuple, int] = {}  # (schedule, delay) -> slot of the time tables, least recently used first
        self._warned = False
        self._rng = np.random.default_rng()
        if not arena.dry:
            low, high = options.preprocess.action_map.limits or (np.full(options.dims, -np.inf, np.float32),
                                                                 np.full(options.dims, np.inf, np.float32))  # fmt: skip
            flow.low.write(low)
            flow.high.write(high)
            flow.step.write(np.full(options.batch, options.schedule.steps, np.int32))  # nothing to do yet
            flow.due.write(np.full(flow.due.shape, -1, np.int32))

    # ------------------------------------------------------------------------------------------ for subclasses
    def _prefix(self, b: int, views: list[np.ndarray | None], given: ModelInput) -> None:
        """Runs what depends on the observation alone, for chunk b."""
        raise NotImplementedError

    def _fill_times(self, slot: int, table: ScheduleTable) -> None:
        """Fills a slot of the tables of times."""
        raise NotImplementedError

    def _accept(self, inputs: Sequence[ModelInput]) -> None:
        """InputError where this model cannot take these inputs together; before any work."""

    def stage(self, name: str, kind: str | None = None, ahead: int = 1) -> Any:
        return self.clock.stage(name, kind, ahead)

    def look_at(
        self, views: Mapping[int, np.ndarray], images: Tensor, out: Tensor, tokens: Tensor, per_view: int
    ) -> None:
        """Tokens of the views that are not those seen last, by one plan `vision_n`.

        images [V, height, width, 3] and out [V * per_view, D] are the plan's; tokens [V * per_view, D] keeps those of
        every view.
        """
        new = [i for i, image in views.items() if not self.views_seen.same(i, image)]
        with self.stage("vision", f"vision_{len(new)}"):
            if new:
                self._look_at(new, views, images, out, tokens, per_view)

    def _look_at(
        self, new: list[int], views: Mapping[int, np.ndarray], images: Tensor, out: Tensor, tokens: Tensor,
        per_view: int,
    ) -> None:  # fmt: skip
        for at, i in enumerate(new):
            if views[i].shape != images.shape[1:]:
                raise InputError(
                    f"view {i} is {list(views[i].shape)}; this model looks at {list(images.shape[1:])}: use a profile "
                    "that resizes"
                )
            _part(images, at).write(views[i])
        self.views_seen.forget(new)  # until their tokens are there
        self.plans[f"vision_{len(new)}"].replay()
        size = per_view * out.shape[1]
        for at, i in enumerate(new):
            tokens.slice(i * size, (size,)).copy_from(out.slice(at * size, (size,)))
            self.views_seen.keep(i, views[i])

    def flow_of(self, batch: int) -> FlowState:
        """The state of the first chunks."""
        return replace(self.flow, **{name: _lead(getattr(self.flow, name), batch) for name in _PER_CHUNK})

    # ------------------------------------------------------------------------------------------ what users see
    @property
    def profile_of_inputs(self) -> InputProfile:
        """The preprocessing that observations go through; print it."""
        return self.options.preprocess.profile

    @property
    def schedule(self) -> HorizonSchedule:
        return self.options.schedule

    @property
    def horizon(self) -> int:
        return self.options.schedule.horizon

    def act(
        self,
        obs: Mapping[str, Any],
        *,
        noise: np.ndarray | None = None,
        actions: int | None = None,
        deadline_ms: float | None = None,
        schedule: HorizonSchedule | None = None,
    ) -> ActionChunk:
        """A chunk of actions: [H, dims] in robot units, with `valid` [H] and the timing.

        Arguments and errors as in `act_stream`.
        """
        last = None
        for packet in self.act_stream(obs, noise=noise, actions=actions, deadline_ms=deadline_ms, schedule=schedule):
            last = packet
        assert last is not None and last.chunk is not None
        return last.chunk

    def act_batch(
        self,
        observations: Sequence[Mapping[str, Any]],
        *,
        noise: np.ndarray | None = None,
        schedule: HorizonSchedule | None = None,
    ) -> list[ActionChunk]:
        """One chunk per observation, at most `batch` of the load; each may have a delay of its own. noise [B, H, A]."""
        if not 1 <= len(observations) <= self.options.batch:
            raise InputError(f"{len(observations)} observations; this model was loaded with batch={self.options.batch}")
        begun = self.clock.now()
        inputs = [self.options.preprocess(obs) for obs in observations]
        for given in inputs:
            self._schedule_at(schedule, given.delay)
        self._accept(inputs)
        drawn = self._noise(noise, len(inputs))
        spent = (self.clock.now() - begun) * 1e3
        with self._use():
            clock = self.clock
            clock.begin(None, spent)
            tables = [self._begin(b, given, drawn[b], None, schedule) for b, given in enumerate(inputs)]
            plan = self._step_plan(len(inputs))
            for _ in range(max(t.steps_for() for t in tables)):
                with self.stage("step", self._step_name(len(inputs))):
                    plan.replay()
            bad = self.flow.bad.read()
            if bad[: len(inputs)].any():
                raise self._not_finite()
            clock.timing.first = clock.timing.enough = clock.timing.last = clock.elapsed  # nothing leaves before
            return [self._chunk(b, t, t.valid) for b, t in enumerate(tables)]

    def act_stream(
        self,
        obs: Mapping[str, Any],
        *,
        noise: np.ndarray | None = None,
        actions: int | None = None,
        deadline_ms: float | None = None,
        schedule: HorizonSchedule | None = None,
    ) -> Generator[ActionPacket, None, None]:
        """Packets of rows as they become final; the last one holds the whole chunk.

        Args:
            obs: what `profile_of_inputs` names; `delay` and `action_prefix` for committed actions.
            noise: f32 [H, A], the start of the flow; default: drawn.
            actions: stop when that many valid actions have left; default: all.
            deadline_ms: the first action leaves within this, or DeadlineError is raised: as soon as it is clear that it
                will be late. What this call itself takes (preprocessing) counts, then the time from the first `next()`.
            schedule: another one than that of the load, with the same number of steps.

        Raises: InputError and TokenizerError before any work; DeadlineError; BusyError on the first packet;
            EngineError if an action is not finite.
        """
        if deadline_ms is not None and not (isinstance(deadline_ms, (int, float)) and 0 < deadline_ms < 1e9):
            raise InputError(f"deadline_ms={deadline_ms!r} is not a number of milliseconds above 0")
        table = self._schedule_at(schedule, 0)  # refuses early
        begun = self.clock.now()
        given = self.options.preprocess(obs)
        self._accept([given])
        table = self._schedule_at(schedule, given.delay)
        wanted = table.valid if actions is None else actions
        table.steps_for(wanted)  # refuses a count that the chunk does not have
        drawn = self._noise(noise, 1)[0]
        spent = (self.clock.now() - begun) * 1e3
        stream = self._stream(given, drawn, wanted, deadline_ms, schedule, spent)
        self._open.add(stream)
        return stream

    def _stream(
        self, given: ModelInput, noise: np.ndarray, wanted: int, deadline_ms: float | None,
        schedule: HorizonSchedule | None, spent: float = 0.0,
    ) -> Generator[ActionPacket, None, None]:  # fmt: skip
        with self._use():
            clock = self.clock
            clock.begin(deadline_ms, spent)
            table = self._begin(0, given, noise, wanted, schedule)
            plan, steps = self._step_plan(1), table.steps_for(wanted)
            slot = int(self.flow.slot.window()[0])
            sent, first = 0, int(table.ready_step[given.delay])
            for step in range(1, steps + 1):
                with self.stage("step", self._step_name(1), max(1, first - step + 1)):
                    plan.replay()
                indices = table.emitted(step)[: wanted - sent]
                if not len(indices) and step < steps:
                    continue
                rows = self._rows_of(slot)[indices].copy()
                if self.flow.bad.window()[0] or not np.isfinite(rows).all():
                    raise self._not_finite()
                sent += len(indices)
                clock.timing.first = clock.timing.first if clock.timing.first is not None else clock.elapsed
                chunk = None
                if step == steps:
                    clock.timing.enough = clock.elapsed
                    clock.timing.last = clock.elapsed if wanted == table.valid else None
                    chunk = self._chunk(0, table, wanted)
                last = ActionPacket(step, indices, rows, chunk)
                if step < steps:
                    yield last
        yield last  # free for the next caller, who may come before this generator is exhausted

    def reset(self) -> None:
        """Forgets what earlier requests left: cameras are looked at again, tables of times stay."""
        with self._use():
            self.views_seen.forget()

    def seed(self, value: int) -> None:
        """Of the noise that is drawn where none is given."""
        self._rng = np.random.default_rng(value)

    def warmup(self) -> None:
        """Runs every plan once on zeros and makes the tables of the first delays, so that no request pays for it."""
        with self._use():
            for plan in self.plans.values():
                plan.replay()
            self.views_seen.forget()
            self._slots.clear()
            for d in range(min(self.options.time_slots, self.options.max_delay + 1)):
                self._time_slot(self.schedule.at(d))

    # ------------------------------------------------------------------------------------------ a request
    def _schedule_at(self, schedule: HorizonSchedule | None, delay: int) -> ScheduleTable:
        o = self.options
        asked = schedule or o.schedule
        if (asked.horizon, asked.steps) != (o.schedule.horizon, o.schedule.steps):
            raise InputError(
                f"a schedule of {asked.horizon} actions in {asked.steps} steps does not fit this load "
                f"({o.schedule.horizon} in {o.schedule.steps}); load with num_steps="
            )
        if delay > o.max_delay:
            raise InputError(f"delay {delay} is above max_delay = {o.max_delay} of this load")
        table = asked.at(delay)
        if len(table.values) > o.time_rows:
            raise InputError(
                f"this schedule has {len(table.values)} distinct times and the tables hold {o.time_rows}; load with it"
            )
        if not self._warned:
            self._warned = warn_untrained(asked, o.trained)
        return table

    def _noise(self, noise: np.ndarray | None, batch: int) -> np.ndarray:
        _, _, h, a = self.flow.sizes
        if noise is None:
            return self._rng.standard_normal((batch, h, a), dtype=np.float32)
        given = np.asarray(noise)
        if given.shape not in ((batch, h, a), *([(h, a)] if batch == 1 else [])) or given.dtype.kind != "f":
            raise InputError(f"noise is {given.dtype} {list(given.shape)}; floats [{batch}, {h}, {a}] are needed")
        with np.errstate(over="ignore"):
            out = np.ascontiguousarray(given.reshape(batch, h, a), np.float32)
        if not np.isfinite(out).all():
            raise InputError("noise holds NaN or infinity")
        return out

    def _begin(
        self, b: int, given: ModelInput, noise: np.ndarray, wanted: int | None, schedule: HorizonSchedule | None
    ) -> ScheduleTable:
        """Everything in front of the first step of chunk b."""
        table = self._schedule_at(schedule, given.delay)
        count = table.valid if wanted is None else wanted
        scale, offset = self.options.preprocess.action_affine(given.state)
        views = [image if there else None for image, there in zip(given.images, given.image_mask)]
        self._prefix(b, views, given)
        with self.stage("times", "times" if self._time_key(table) in self._slots else "new times"):
            base = self._time_slot(table) * self.options.time_rows
        f, d = self.flow, given.delay
        due = table.ready_step - 1
        due = np.where(np.arange(len(due)) < d + count, due, -1).astype(np.int32)
        prefix = np.zeros_like(noise)
        prefix[:d] = given.prefix
        start = noise if self.rule == "euler" else np.zeros_like(noise)
        for tensor, value in (
            (f.tau, table.tau), (f.index, base + table.rows), (f.prefix, prefix), (f.noise, noise), (f.x, start),
            (f.due, due), (f.scale, scale), (f.offset, offset),
        ):  # fmt: skip
            _part(tensor, b).write(value)
        self._requests += 1
        for tensor, number in ((f.delay, d), (f.bad, 0), (f.step, 0), (f.slot, self._requests % self.options.ring)):
            tensor.window()[b] = number
        # Rows that never leave must not show another request's.
        self._ring(self._requests % self.options.ring).write(np.zeros(f.ring.shape[1:], np.float32))
        return table

    def _time_slot(self, table: ScheduleTable) -> int:
        """The slot that holds the times of a table, filled now if it is not there."""
        key = self._time_key(table)
        slot = self._slots.pop(key, None)
        if slot is None:
            used = set(self._slots.values())
            free = [s for s in range(self.options.time_slots) if s not in used]
            # Chunks of a batch that run now may hold the least recent ones: a batch uses at most as many as there are.
            slot = free[0] if free else self._slots.pop(next(iter(self._slots)))
            self._fill_times(slot, table)
        self._slots[key] = slot
        return slot

    @staticmethod
    def _time_key(table: ScheduleTable) -> tuple:
        return table.schedule.alpha, table.schedule.u0, table.delay

    def _step_name(self, batch: int) -> str:
        return "step" if self.options.batch == 1 else f"step_{batch}"

    def _step_plan(self, batch: int) -> Any:
        return self.plans[self._step_name(batch)]

    def _ring(self, slot: int) -> Tensor:
        ring = self.flow.ring
        size = ring.shape[1] * ring.shape[2]
        return ring.slice(slot * size, ring.shape[1:])

    def _rows_of(self, slot: int) -> np.ndarray:
        """[H, dims] of a slot of the ring."""
        return self._ring(slot).host()

    def _chunk(self, b: int, table: ScheduleTable, count: int) -> ActionChunk:
        slot = int(self.flow.slot.window()[b])
        place = np.arange(self.horizon)
        valid = (place >= table.delay) & (place < table.delay + count)
        return ActionChunk(self._rows_of(slot).copy(), valid, self.clock.timing.as_dict())

    def _not_finite(self) -> EngineError:
        return EngineError(
            f"model {self.name!r} gave an action that is not finite; its weights, their quantisation or the statistics "
            "are broken"
        )


_PER_CHUNK = ("step", "tau", "index", "delay", "prefix", "noise", "x", "due", "slot", "scale", "offset", "bad")


def _lead(tensor: Tensor, batch: int) -> Tensor:
    return tensor.slice(0, (batch, *tensor.shape[1:]))


def _part(tensor: Tensor, b: int) -> Tensor:
    """Entry b of a buffer [B, ...]."""
    shape = tensor.shape[1:]
    size = int(np.prod(shape))
    return tensor.slice(b * size, shape)
