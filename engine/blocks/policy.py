"""What flow policies share: requests, the flow state, streaming. A model adds its prefix and its steps.

A request is: preprocessing on the host, the prefix plan, then one step plan per network call. Which rows leave after
which step is a function of the schedule alone, so nothing is read back to find out. Source: FASTER, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from engine.blocks.clock import Clock
from engine.blocks.observation import InputProfile, ModelInput
from engine.blocks.packets import ActionChunk, ActionPacket
from engine.blocks.policy_options import PolicyOptions
from engine.blocks.schedule import HorizonSchedule, ScheduleTable, warn_untrained
from engine.errors import EngineError, InputError
from engine.io.checkpoint import Checkpoint, Source
from engine.ops.dispatch import strict as strict_dispatch
from engine.ops.flow import FlowState
from engine.runtime.arena import Arena, Tensor
from engine.runtime.device import on
from engine.runtime.fit import require
from engine.runtime.model import Model, keywords


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


class FlowPolicy(Model):
    """Base of pi0.5 and X-VLA. Verbs: `act`, `act_stream`, `reset`; see there."""

    samplers: ClassVar[Mapping[str, str]]  # to rules of the flow ops; the first is the default
    config_type: Any
    weights: Any
    flow: FlowState

    @classmethod
    def load(cls, folder: Path, *, source: Source | None = None, **options: Any) -> Self:
        """From a folder in a published layout; `source` replaces its weight files. Options: see `PolicyOptions.of`."""
        config = cls.config_of(folder)
        checked = cls.options_of(config, folder, **options)
        parts = cls(config, None, checked, record=False).arena.summary()
        require(parts, checked.device, "load with quant='int8', or a smaller batch=")
        if source is not None:
            return cls(config, source, checked)
        with Checkpoint(folder) as checkpoint:
            return cls(config, checkpoint, checked)

    @classmethod
    def load_options(cls) -> frozenset[str]:
        """Names of the options that `engine.load` takes; see `PolicyOptions.of`."""
        return keywords(PolicyOptions.of, "name", "horizon", "steps", "checkpoint_dtype", "vocab", "samplers")

    @classmethod
    def sketch(cls, config: dict, **options: Any) -> Self:
        """The model of a config.json without memory: every buffer is laid out and every plan recorded, none can run."""
        parsed = cls.parse(config)
        profile = cls.default_profile(parsed).replace(state_norm="identity", action_norm="identity")
        return cls(parsed, None, cls.options_of(parsed, None, profile=profile, **options))

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
                                vocab=cls.vocabulary(config), samplers=tuple(cls.samplers), **options)  # fmt: skip

    @property
    def rule(self) -> str:
        """Of the flow ops; see engine.ops.flow."""
        return self.samplers[self.options.sampler]

    @classmethod
    def vocabulary(cls, config: Any) -> int:
        """Token ids are below this."""
        return config.vocab_size

    def __init__(self, config: Any, source: Source | None, options: PolicyOptions, record: bool = True) -> None:
        """Packs the weights of `source` and captures every plan. Without a source a sketch, whose plans cannot run;
        record=False: not even those."""
        o = options
        arena = Arena(o.device, dry=source is None)
        self.config, self.options = config, o
        with strict_dispatch(o.strict):
            self.weights = self._load(source, arena)
        with on(o.device):
            self.flow = self._allocate(arena)
        super().__init__(o.name, arena)
        self.weight_notes = self.weights.notes
        if config.assumed:
            self.notes.append(f"neither files nor tensors say {', '.join(config.assumed)}: defaults were taken")
        if self.weights.skipped:
            self.notes.append(f"skipped {len(self.weights.skipped)} tensors that no action depends on")
        self.views_seen = ViewsSeen(len(o.preprocess.profile.views))
        self.clock = Clock(o.name)
        self._requests, self._ring_slots = 0, [0] * o.batch
        self._slots: dict[tuple, int] = {}  # (schedule, delay) -> slot of the time tables, least recently used first
        self._warned = False
        self._rng = np.random.default_rng()
        if not arena.dry:
            none = np.full(o.dims, np.inf, np.float32)
            low, high = o.preprocess.action_map.limits or (-none, none)
            self.flow.low.write(low)
            self.flow.high.write(high)
            self.flow.step.write(np.full(o.batch, o.schedule.steps, np.int32))  # nothing to do yet
            self.flow.due.write(np.full(self.flow.due.shape, -1, np.int32))
            self._prepare()
        arena.seal()
        if record:
            with strict_dispatch(o.strict), on(o.device):
                self._capture()

    # ------------------------------------------------------------------------------------------ for subclasses
    def _load(self, source: Source | None, arena: Arena) -> Any:
        """The packed weights, with `notes` and `skipped`; without a source only their places."""
        raise NotImplementedError

    def _allocate(self, arena: Arena) -> FlowState:
        """Every other buffer."""
        raise NotImplementedError

    def _prepare(self) -> None:
        """What must be in the buffers before the first request."""

    def _capture(self) -> None:
        """Records every plan."""
        raise NotImplementedError

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
            with self._steps(len(inputs), max(t.steps_for() for t in tables)) as done:
                for _ in done:
                    pass
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
            steps = table.steps_for(wanted)
            sent, first = 0, int(table.ready_step[given.delay])
            with self._steps(1, steps, first) as done:
                for step in done:
                    indices = table.emitted(step)[: wanted - sent]
                    if not len(indices) and step < steps:
                        continue
                    rows = self._rows_of(0)[indices].copy()
                    # On a device the next step may have said so of its own rows: the chunk is lost all the same.
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
        start = np.zeros_like(noise) if self.rule == "renoise" else noise
        for tensor, value in (
            (f.tau, table.tau), (f.index, base + table.rows), (f.prefix, prefix), (f.noise, noise), (f.x, start),
            (f.due, due), (f.scale, scale), (f.offset, offset),
        ):  # fmt: skip
            _part(tensor, b).write(value)
        self._requests += 1
        self._ring_slots[b] = self._requests % self.options.ring
        for tensor, number in ((f.delay, d), (f.bad, 0), (f.step, 0), (f.slot, self._ring_slots[b])):
            tensor.window()[b] = number
        self._rows_of(b)[:] = 0  # rows that never leave must not show another request's
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

    @contextmanager
    def _steps(self, batch: int, steps: int, first: int = 1) -> Iterator[Iterator[int]]:
        """Counts 1 to `steps` as each is done; on a device the next one is queued by then. Step `first` is the one that
        gives the first action."""
        plan, name = self._step_plan(batch), self._step_name(batch)

        def run() -> Iterator[int]:
            queued = 0
            for step in range(1, steps + 1):
                with self.stage("step", name, max(1, first - step + 1)):
                    while queued < min(step + 1, steps):
                        plan.start()
                        queued += 1
                    plan.wait()
                yield step

        try:
            yield run()
        finally:
            plan.drain()

    def _step_name(self, batch: int) -> str:
        return "step" if self.options.batch == 1 else f"step_{batch}"

    def _step_plan(self, batch: int) -> Any:
        return self.plans[self._step_name(batch)]

    def _rows_of(self, b: int) -> np.ndarray:
        """[H, dims]: what has left of chunk b, where it lies."""
        return _part(self.flow.ring, self._ring_slots[b]).numpy()

    def _chunk(self, b: int, table: ScheduleTable, count: int) -> ActionChunk:
        place = np.arange(self.horizon)
        valid = (place >= table.delay) & (place < table.delay + count)
        return ActionChunk(self._rows_of(b).copy(), valid, self.clock.timing.as_dict())

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
