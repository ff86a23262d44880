"""What callers may ask for: every argument of MoTok's verbs, checked before any work, with the error that names it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.blocks.motion import Constraints, Skeleton, from_joints
from engine.errors import ConfigError, InputError
from engine.io.text.clip import ClipTokenizer
from engine.io.values import show
from engine.models.motok.config import Guidance, MoTokConfig
from engine.models.motok.denoiser import SOLVERS
from engine.ops.guide import MAX_HISTORY

DEFAULT_FRAMES = 120  # of a motion whose length nothing says
MAX_SAMPLES = 4096  # of one call


@dataclass(frozen=True, eq=False)
class Request:
    """One motion to make, checked. frames None: until the planner ends it. tokens with edit: known ones and what to
    draw anew."""

    text: str | None
    ids: list[int] | None
    frames: int | None
    constraints: Constraints | None
    planner: str
    seed: int
    sample: int
    cfg: float
    guidance: Guidance | None
    tokens: np.ndarray | None = None
    edit: np.ndarray | None = None


@dataclass(frozen=True)
class Requests:
    """Checks what a model is asked; model: its name. words: its text tokenizer, planners: those it has, best first."""

    model: str
    config: MoTokConfig
    skeleton: Skeleton
    words: ClipTokenizer | None
    planners: tuple[str, ...]

    def jobs(
        self, text: Any, frames: Any, constraints: Any, planner: Any, n: Any, seed: Any, cfg: Any, guidance: Any,
        tokens: Any, edit: Any,
    ) -> list[Request]:  # fmt: skip
        """Every motion to make, text after text, n of each; see `MoTok.generate`."""
        several = not (text is None or isinstance(text, str))
        if several and not isinstance(text, Sequence):
            raise InputError(f"text={show(text)} is neither a string nor a list of strings")
        texts = list(text) if several else [text]
        if type(n) is not int or n < 1 or not 1 <= len(texts) * n <= MAX_SAMPLES:
            raise InputError(f"{len(texts)} texts, n={show(n)}: one motion and at most {MAX_SAMPLES} can be asked for")

        def each(value: Any, what: str) -> list[Any]:
            """One per text: a list says so, anything else is for all."""
            if not several or not isinstance(value, list | tuple):
                return [value] * len(texts)
            if len(value) != len(texts):
                raise InputError(f"{len(value)} {what} for {len(texts)} texts; give one for each, or one for all")
            return list(value)

        chosen = self.planner(planner)
        pull = self.guidance(guidance)
        known, free = self.edit(tokens, edit, chosen)
        scale = self.cfg(cfg, chosen)
        number = self.seed(seed)
        # A list of waypoints is JSON and belongs to all; a list of Constraints has one for each text.
        whole = isinstance(constraints, list | tuple) and not any(isinstance(x, Constraints) for x in constraints)
        given = [constraints] * len(texts) if whole else each(constraints, "constraints")
        out = []
        for one, length, points in zip(texts, each(frames, "frames"), given):
            ids = self.ids(one)
            limits = self.constraints(points)
            size = self.length(length, limits, chosen, known)
            if limits is not None and size is not None:
                limits.check(size)
            if ids is None and limits is None and known is None:
                raise InputError("there is neither a text nor a waypoint; give text=, constraints=, or both")
            request = Request(one or None, ids, size, limits, chosen, number, 0, scale, pull if limits else None, known,
                              free)  # fmt: skip
            out += [replace(request, sample=i) for i in range(n)]
        return out

    def planner(self, planner: Any) -> str:
        there = self.planners
        if not there:
            raise InputError(
                f"model {self.model!r} has no planner, only its tokenizer; use encode, decode, reconstruct"
            )
        if planner is None:
            return there[0]
        if planner not in there:
            raise InputError(f"planner={show(planner)}; this checkpoint has {' and '.join(there)}")
        return str(planner)

    def ids(self, text: Any) -> list[int] | None:
        if text is None or text == "":
            return None
        if not isinstance(text, str):
            raise InputError(f"text={show(text)} is not a string")
        if self.words is None:
            raise InputError(f"model {self.model!r} has no text tower (clip_text.safetensors); leave the text out")
        return self.words.encode(text, self.config.clip.ctx)

    def constraints(self, given: Any, frames: int | None = None) -> Constraints | None:
        if given is None:
            return None
        out = given if isinstance(given, Constraints) else Constraints.from_json(given, self.skeleton)
        if out.skeleton.names != self.skeleton.names:
            raise InputError(f"the waypoints are for {len(out.skeleton.names)} joints; this model has other joints: "
                             f"{', '.join(self.skeleton.names)}")  # fmt: skip
        if frames is not None:
            out.check(frames)
        return out if len(out) else None

    def length(self, frames: Any, given: Constraints | None, planner: str, known: np.ndarray | None) -> int | None:
        c = self.config
        if known is not None:
            if frames is not None and (type(frames) is not int or frames // c.rate != len(known)):
                raise InputError(f"frames={show(frames)} and {len(known)} tokens of {c.rate} frames do not agree")
            return len(known) * c.rate
        if frames is None and given is None:
            return None if planner == "ar" else min(DEFAULT_FRAMES, c.max_frames) // c.rate * c.rate
        if frames is None and given is not None:
            frames = max(-(-given.frames // c.rate) * c.rate, -(-c.min_frames // c.rate) * c.rate)
        if type(frames) is not int or not c.min_frames <= frames <= c.max_frames:
            raise InputError(f"frames={show(frames)}; a motion has {c.min_frames} to {c.max_frames} at {c.fps:g} fps")
        return frames // c.rate * c.rate

    def edit(self, tokens: Any, edit: Any, planner: str) -> tuple[np.ndarray | None, np.ndarray | None]:
        if tokens is None and edit is None:
            return None, None
        if tokens is None or edit is None:
            raise InputError("tokens and edit are needed together: what is known, and what to draw anew")
        if planner != "ddm":
            raise InputError("only the discrete planner fills in between; use planner='ddm'")
        known = self.tokens(tokens)
        free = np.asarray(edit)
        if free.dtype != np.bool_ or free.shape != known.shape or not free.any():
            raise InputError(
                f"edit is {free.dtype} {list(free.shape)}; bool [{len(known)}] with a true entry is needed"
            )
        return known, free

    def tokens(self, tokens: Any) -> np.ndarray:
        c, ids = self.config, np.asarray(tokens)
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer) or not 1 <= len(ids) <= c.max_tokens:
            raise InputError(f"tokens are {ids.dtype} {list(ids.shape)}; 1 to {c.max_tokens} integers are needed")
        if ids.min() < 0 or ids.max() >= c.codes:
            raise InputError(
                f"a token is {int(ids.min() if ids.min() < 0 else ids.max())}; codes are 0 to {c.codes - 1}"
            )
        return ids.astype(np.int32)

    def seed(self, seed: Any) -> int:
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= int(seed) < 1 << 64:
            raise InputError(f"seed={show(seed)} is not an integer in [0, 2^64)")
        return int(seed)

    def cfg(self, cfg: Any, planner: str) -> float:
        if cfg is None:
            return self.config.ddm.cfg if planner == "ddm" else self.config.ar.cfg
        if isinstance(cfg, bool) or not isinstance(cfg, int | float) or not 0 <= cfg <= 100:
            raise InputError(f"cfg={show(cfg)} is not a number from 0 to 100")
        return float(cfg)

    def guidance(self, guidance: Any) -> Guidance | None:
        if guidance is False:
            return None
        if guidance is None or guidance is True:
            out = self.config.guidance
        elif isinstance(guidance, Mapping):
            try:
                out = self.config.guidance.changed(guidance)
            except ConfigError as fault:
                raise InputError(str(fault)) from None
        else:
            raise InputError(f"guidance={show(guidance)}; a mapping of settings, or False for none, is needed")
        if out.solver not in SOLVERS:
            raise InputError(f"guidance.solver {out.solver!r} has no kernel; use one of {', '.join(SOLVERS)}")
        if out.history > MAX_HISTORY:
            raise InputError(f"guidance.history = {out.history}; the kernels keep at most {MAX_HISTORY}")
        return out

    def noise(self, noise: Any, frames: int) -> np.ndarray:
        out = np.asarray(noise, np.float32)
        if out.shape != (frames, self.config.features) or not np.isfinite(out).all():
            raise InputError(f"noise is {list(out.shape)}; finite [{frames}, {self.config.features}] is needed")
        return out

    def features(self, motion: Any) -> np.ndarray:
        c, x = self.config, np.asarray(motion)
        if x.ndim == 3:
            x = from_joints(x / c.scale, self.skeleton)
        if x.ndim != 2 or x.shape[1] != c.features or not np.issubdtype(x.dtype, np.floating):
            raise InputError(
                f"a motion is {x.dtype} {list(x.shape)}; features [T, {c.features}] or joints [T, {c.joints}, 3] of "
                "floats are needed"
            )
        frames = len(x) // c.rate * c.rate
        most = c.max_tokens * c.rate
        if not c.rate <= frames <= most:
            raise InputError(f"a motion has {len(x)} frames; {c.rate} to {most} at {c.fps:g} fps are possible: cut it")
        if not np.isfinite(x).all():
            raise InputError("a motion has a value that is not finite")
        return x[:frames].astype(np.float32)
