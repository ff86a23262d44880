"""MoTok (Gu et al. 2026, arXiv 2603.19227): text and waypoints to motions, motions to tokens and back.

text         the prompt's tokens to a feature (kept by prompt)
trajectory_T waypoints of T frames to what the planner adds to its positions
ddm_N, ar    tokens: every pass of the discrete planner over N of them, or one step of the autoregressive one
noise_T      the noise that sampling begins with
decode_T     tokens to the condition of every frame, every sampled step with guidance in it, joints
encode_T     a motion to tokens

A plan is recorded when a request of its length first comes and kept: sizes are exact, so nothing is padded and a motion
in a batch is the motion alone. Requests of a batch run one after another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from engine.blocks.motion import Constraints, FeatureStatistics, StartPose, skeleton_of
from engine.blocks.weights import Shapes
from engine.errors import ConfigError, InputError
from engine.io.checkpoint import Source
from engine.io.text.clip import ClipTokenizer
from engine.io.values import show
from engine.models.motok.config import Guidance, MoTokConfig
from engine.models.motok.convs import ConvBuffers, Stream
from engine.models.motok.denoiser import (
    NODES_PER_BLOCK,
    NODES_PER_STEP,
    Denoiser,
    DenoiserBuffers,
    GuidanceBuffers,
)
from engine.models.motok.layout import checked, open_source, parts_of, shapes
from engine.models.motok.motion import Motion
from engine.models.motok.planners import ARPlan, Conditions, DDMPlan
from engine.models.motok.requests import DEFAULT_FRAMES, Request, Requests
from engine.models.motok.text import TextPlan
from engine.models.motok.weights import load_weights
from engine.ops import gemm as gemm_op
from engine.ops.codebook import codebook_search
from engine.ops.dispatch import strict as strict_dispatch
from engine.ops.guide import MAX_FRAMES, guide_joints
from engine.ops.rng import rng
from engine.runtime.arena import Arena, Tensor, as_tensor
from engine.runtime.device import on, parse_dtype
from engine.runtime.fit import require
from engine.runtime.model import Model
from engine.runtime.plan import Plan, capture

PLANNERS = ("ddm", "ar")
MAX_PLANS = 64  # kept
MAX_FEATURES = 256  # prompts whose features are kept
STREAMS = {"noise": 0, "tokens": 1, "coins": 2, "steps": 3}  # of the generator


@dataclass(frozen=True)
class Options:
    """Checked options of a load."""

    name: str
    device: str
    dtype: str
    quant: str | None
    strict: bool
    precise: bool

    @property
    def kv(self) -> str:
        """Format of keys, values and modulations."""
        return "bf16" if self.dtype == "bf16" else "f32"


class MoTok(Model):
    """A loaded MoTok: `generate`, `encode`, `decode`, `reconstruct`, `explain`, `memory`. See engine.load."""

    @classmethod
    def load(
        cls, folder: Path, *, device: str = "cpu", dtype: object = "auto", quant: str | None = None,
        strict: bool = False, precise: bool = True, source: Source | None = None, progress: bool = True,
    ) -> Self:  # fmt: skip
        """From a folder of config.json, tokenizer.safetensors and stats.safetensors, and with planner_ddm, planner_ar
        and clip_text whichever are there; `source` replaces the weight files.

        precise: guidance computes in fp64 (default), which all backends then agree in.

        Raises: ConfigError, CheckpointError, TokenizerError, InputError, MemoryPlanError; before any work.
        """
        del progress
        config = MoTokConfig.from_folder(folder)
        given = source or open_source(folder)
        try:
            parts = parts_of(given)
            checked(config, given)
            words = ClipTokenizer.from_folder(folder) if "clip" in parts else None
            options = load_options(folder.name, given, device=device, dtype=dtype, quant=quant, strict=strict,
                                   precise=precise)  # fmt: skip
            need = cls(config, options, Shapes(shapes(config, parts)), None, dry=True).arena.summary()
            require(need, device, "load with quant='int8'")
            return cls(config, options, given, words)
        finally:
            if source is None:
                given.close()

    @classmethod
    def sketch(
        cls, config: dict, *, device: str = "cpu", dtype: object = "auto", quant: str | None = None,
        precise: bool = True, **others: object,
    ) -> Self:  # fmt: skip
        """The model of a config.json without memory: every buffer is laid out; plans can be recorded, none can run."""
        if others:
            raise InputError(f"a motion model has no {', '.join(others)}; it takes dtype, quant and precise")
        parsed = MoTokConfig.from_json(config)
        source = Shapes(shapes(parsed))
        checked = load_options("motok", source, device=device, dtype=dtype, quant=quant, precise=precise)
        return cls(parsed, checked, source, None, dry=True)

    @classmethod
    def plan(cls, config: dict, **options: Any) -> dict[str, int]:
        """Bytes by part that a load would take, from config.json alone and by the code that allocates."""
        return cls.sketch(config, **options).arena.summary()

    def __init__(
        self, config: MoTokConfig, options: Options, source: Source, words: ClipTokenizer | None, dry: bool = False
    ) -> None:
        _fits(config, words)
        self.config, self.options, self.words = config, options, words
        arena = Arena(options.device, dry=dry)
        with strict_dispatch(options.strict):
            self.weights = load_weights(config, source, arena, options.dtype, options.quant)
        with on(options.device):
            self._allocate(arena)
        super().__init__(options.name, arena)
        self.weight_notes = self.weights.notes
        w = self.weights
        if not dry:
            shape = (config.joints, 3)
            self.statistics = FeatureStatistics(w.mean.read(), w.std.read(), w.hint_mean.reshape(shape),
                                                w.hint_std.reshape(shape))  # fmt: skip
            self._denoiser.b.frame.write(np.arange(self._denoiser.b.frame.shape[0], dtype=np.int32))
            for planner in (self._ddm, self._ar):
                if planner is not None:
                    planner.prepare()
        self.skeleton = skeleton_of(config.features)
        there = tuple(name for name, plan in zip(PLANNERS, (self._ddm, self._ar)) if plan is not None)
        self.requests = Requests(options.name, config, self.skeleton, words, there)
        self._features: dict[str, np.ndarray] = {}
        arena.seal()
        if w.skipped:
            self.notes.append(f"skipped {len(w.skipped)} tensors that no motion depends on")

    # ------------------------------------------------------------------------------------------ memory
    def _allocate(self, arena: Arena) -> None:
        c, o, w = self.config, self.options, self.weights
        frames, tokens = c.max_tokens * c.rate, c.max_tokens

        def io(name: str, *shape: int, dtype: str = "f32") -> Tensor:
            return arena.alloc(name, shape, dtype, "io")

        widest = max(3 * c.features, 3 * c.traj.channels, 4 * c.width, 3 * c.latent,
                     max(c.denoiser.kernel, 1) * c.denoiser.width)  # fmt: skip
        sizes = [gemm_op.workspace_bytes(frames, widest)]
        if w.ddm:
            wide = max(c.ddm.dim, c.ddm.ff, c.clip.embed)
            sizes += [gemm_op.workspace_bytes(2 * (tokens + 1), wide), DDMPlan.workspace(c)]
        if w.ar:
            sizes += [gemm_op.workspace_bytes(4, max(c.ar.dim, c.ar.ff, c.clip.embed)), ARPlan.workspace(c)]
        if w.text:
            sizes += [gemm_op.workspace_bytes(c.clip.ctx, max(c.clip.width, c.clip.ff)), TextPlan.workspace(c.clip)]
        ws = arena.alloc("ws", (max(sizes),), "u8")
        self._convs = ConvBuffers(arena, c, ws)
        zeros = self._convs.zeros
        self._given = Stream.empty(arena, "features", frames, c.features, 1, zeros)
        self._hints = Stream.empty(arena, "hints", frames, c.traj.channels, 1, zeros)
        self._latents = arena.alloc("latents", (tokens, c.latent))
        self._found, self._tokens = io("found", tokens, dtype="i32"), io("tokens", tokens, dtype="i32")
        self._seed, self._offset = io("seed", 1, dtype="u64"), io("offset", 1, dtype="u64")
        buffers = DenoiserBuffers(arena, c, w.denoiser.modulation.w.n, o.kv, self._convs)
        self._pull = GuidanceBuffers.empty(arena, c, o.precise)
        self._denoiser = Denoiser(c, w.denoiser, buffers, self._pull, w.mean, w.std, o.precise)
        self._joints = io("joints", frames, c.joints, 3)
        self._ddm = DDMPlan(arena, c, w.ddm, self._convs, o.kv) if w.ddm else None
        self._ar = ARPlan(arena, c, w.ar, self._convs, o.kv) if w.ar else None
        self._text = TextPlan(arena, c.clip, w.text, ws, o.kv) if w.text else None

    # ------------------------------------------------------------------------------------------ the plans
    def recorded(self, name: str, step: Callable[[], None]) -> Plan:
        """The plan of this name, recorded now if it is not there; those used last are kept."""
        plan = self.plans.pop(name, None)
        if plan is None:
            with strict_dispatch(self.options.strict), on(self.options.device):
                plan = capture(step, name)
            while len(self.plans) >= MAX_PLANS:
                del self.plans[next(iter(self.plans))]
        self.plans[name] = plan
        return plan

    def text_plan(self) -> Plan:
        assert self._text is not None
        return self.recorded("text", self._text.encode)

    def trajectory_plan(self, planner: str, t: int) -> Plan:
        """Waypoints of t frames to rows of a planner's conditions."""
        return self.recorded(f"{planner}.trajectory_{t}", partial(self._planner(planner).hint, self._hints, t))

    def condition_plan(self, planner: str) -> Plan:
        """The text's feature to a row of a planner's conditions."""
        return self.recorded(f"{planner}.text", self._planner(planner).begin)

    def ddm_plan(self, n: int, guided: bool) -> Plan:
        """Every pass of the discrete planner over n tokens."""
        assert self._ddm is not None
        return self.recorded(f"ddm_{n}" + (".guided" if guided else ""), partial(self._ddm.passes, n, guided))

    def ar_plan(self, passes: int) -> Plan:
        """One step of the autoregressive planner."""
        assert self._ar is not None
        return self.recorded(f"ar_{passes}", partial(self._ar.step, passes))

    def noise_plan(self, t: int) -> Plan:
        return self.recorded(f"noise_{t}", partial(self._noise, t))

    def decode_plan(self, t: int, slots: int = 0, guidance: Guidance | None = None) -> Plan:
        """Tokens to joints of t frames, `slots` joints pulled by `guidance`."""
        name = f"decode_{t}"
        if guidance is not None:
            name += f".{slots}.{'-'.join(str(v) for v in vars(guidance).values())}"
        return self.recorded(name, partial(self._decode, t, slots, guidance))

    def encode_plan(self, t: int) -> Plan:
        return self.recorded(f"encode_{t}", partial(self._encode, t))

    def _noise(self, t: int) -> None:
        b, d = self._denoiser.b, self.config.features
        rng(b.x.slice(0, (t, d)), self._seed, self._offset, stream=STREAMS["noise"], label="noise")
        if b.noise is not None:
            steps = b.noise.slice(0, (b.noise.shape[0], t, d))
            rng(steps, self._seed, self._offset, stream=STREAMS["steps"], label="step_noise")

    def _decode(self, t: int, slots: int, guidance: Guidance | None) -> None:
        c, w, b = self.config, self.weights, self._denoiser.b
        condition = b.condition.slice(0, (t, c.denoiser.width))
        self._convs.decode(w.decoder, self._tokens.slice(0, (t // c.rate,)), condition, "decoder")
        self._denoiser.sample(t, slots, guidance)
        guide_joints(b.x.slice(0, (t, c.features)), w.mean, w.std, self._joints.slice(0, (t, c.joints, 3)),
                     label="joints")  # fmt: skip

    def _encode(self, t: int) -> None:
        c, w, n = self.config, self.weights, t // self.config.rate
        latents = self._latents.slice(0, (n, c.latent))
        self._convs.encode(w.encoder, self._given, latents, t, "encoder")
        codebook_search(latents, w.codes, w.norms, self._found.slice(0, (n,)), label="codes")

    @property
    def node_budget(self) -> int:
        """Most nodes that the plan of a decode may have; guidance on the mean takes two more a step."""
        c = self.config
        codes, double, rest = 1, 4 + 3 * c.depth, 4  # a halving of the rate: rows cleared twice, two halves
        steps = len(c.diffusion.timesteps) * (NODES_PER_STEP + NODES_PER_BLOCK * c.denoiser.blocks)
        return codes + c.down_t * double + rest + 1 + steps + 1

    def _planner(self, name: str) -> DDMPlan | ARPlan:
        planner = self._ddm if name == "ddm" else self._ar
        assert planner is not None
        return planner

    # ------------------------------------------------------------------------------------------ requests
    def generate(
        self,
        text: str | Sequence[str | None] | None = None,
        *,
        frames: int | Sequence[int | None] | None = None,
        constraints: Any = None,
        planner: str | None = None,
        n: int = 1,
        seed: int = 0,
        cfg: float | None = None,
        guidance: Mapping[str, Any] | bool | None = None,
        tokens: Any = None,
        edit: Any = None,
    ) -> Motion | list[Motion]:
        """Motions for a text, waypoints, or both.

        Args:
            text: a prompt, or a list of them for several motions; None or '' for none.
            frames: length of the motion at the data set's frame rate (`config.fps`), rounded down to whole tokens; one
                for each text if a list. None: up to the last waypoint; without any, 120 frames, or with the
                autoregressive planner as many as it finds right.
            constraints: `Constraints`, or JSON (text, or what it parses to) as `Constraints.from_json` reads it; a list
                of `Constraints` for a list of texts. Positions in metres in your world; the motion comes back there.
            planner: 'ddm' or 'ar'; default: the first that the checkpoint has.
            n: motions per text; they differ in their random numbers.
            seed: 0 <= seed < 2^64. The same seed gives the same motion, in a batch or alone.
            cfg: scale of classifier-free guidance; default: the configuration's. 1 is none.
            guidance: how waypoints pull on the motion: fields of the configuration's `guidance` to change, e.g.
                {"solver": "project"}; False: only the planner knows of them.
            tokens, edit: known tokens [N] and which of them to draw anew (bool [N]): in-betweening, with 'ddm'.

        Returns:
            A Motion, or a list of them if `text` is a list or n is not 1: all n of the first text, then of the next.

        Raises: InputError (a value that cannot be used, named), BusyError, ClosedError; before any work.
        """
        jobs = self.requests.jobs(text, frames, constraints, planner, n, seed, cfg, guidance, tokens, edit)
        with self._use():
            made = [self._make(job) for job in jobs]
        return made[0] if n == 1 and (text is None or isinstance(text, str)) else made

    def encode(self, motion: Any) -> np.ndarray:
        """Tokens [T / rate] int32 of a motion: features [T, D] (not normalised), or joints [T, J, 3] in metres at the
        data set's frame rate. Frames that fill no token are left out at the end.

        Raises: InputError (another shape, too short or too long, a value that is not finite), BusyError, ClosedError.
        """
        features = self.requests.features(motion)
        with self._use():
            return self._encoded(features)

    def decode(
        self, tokens: Any, *, constraints: Any = None, seed: int = 0,
        guidance: Mapping[str, Any] | bool | None = None, noise: Any = None,
    ) -> Motion:  # fmt: skip
        """The motion of tokens [N], pulled to waypoints if there are any. noise: [T, D], what sampling starts from.

        Raises: InputError, BusyError, ClosedError; before any work.
        """
        ids = self.requests.tokens(tokens)
        frames = len(ids) * self.config.rate
        given = self.requests.constraints(constraints, frames)
        pull = self.requests.guidance(guidance)
        job = Request(None, None, frames, given, "ddm", self.requests.seed(seed), 0, 1.0, pull if given else None)
        start = None if noise is None else self.requests.noise(noise, frames)
        with self._use():
            return self._decoded(job, ids, {}, start)

    def reconstruct(self, motion: Any, *, constraints: Any = None, seed: int = 0, **more: Any) -> Motion:
        """`decode(encode(motion))`."""
        return self.decode(self.encode(motion), constraints=constraints, seed=seed, **more)

    def warmup(self, frames: int | None = None) -> None:
        """Records and runs every plan of an unconstrained request."""
        words = "a person walks forward" if self.words and (self._ddm or self._ar) else None
        if words:
            self.generate(words, frames=frames or DEFAULT_FRAMES)
        else:
            self.decode(np.zeros(max(self.config.min_frames // self.config.rate, 1), np.int32))

    # ------------------------------------------------------------------------------------------ work
    def _make(self, job: Request) -> Motion:
        stages: dict[str, float] = {}
        ids = self._plan_tokens(job, stages)
        return self._decoded(replace(job, frames=len(ids) * self.config.rate), ids, stages, None)

    def _plan_tokens(self, job: Request, stages: dict[str, float]) -> np.ndarray:
        c, planner = self.config, self._planner(job.planner)
        if job.ids is not None:
            with _timed(stages, "text"):
                planner.feature.write(self._feature(job.text or "", job.ids))
                self.condition_plan(job.planner).replay()
        if job.constraints is not None:
            with _timed(stages, "trajectory"):
                assert job.frames is not None
                self._write_hints(job.constraints, job.frames)
                self.trajectory_plan(job.planner, job.frames).replay()
        with _timed(stages, "planner"):
            n = c.max_tokens if job.frames is None else job.frames // c.rate
            steps = c.ddm.steps if job.planner == "ddm" else n
            guided = job.ids is not None and job.cfg != 1
            given = Conditions(
                job.ids is not None, job.constraints is not None, self.coins(job.seed, job.sample, steps), guided
            )
            if job.planner == "ddm":
                return self._masked(job, n, given)
            return self._one_by_one(job, n, given)

    def _masked(self, job: Request, n: int, given: Conditions) -> np.ndarray:
        c, planner = self.config, self._ddm
        assert planner is not None
        ids = np.full(n, c.codes, np.int32)
        if job.tokens is not None and job.edit is not None:
            ids = np.where(job.edit, c.codes, job.tokens).astype(np.int32)
        uniforms = self.draw(job.seed, job.sample, "tokens", "uniform", c.ddm.steps * n)
        planner.request(n, given, uniforms, ids, job.cfg)
        self.ddm_plan(n, given.guided).replay()
        return planner.ids.read()[:n]

    def _one_by_one(self, job: Request, n: int, given: Conditions) -> np.ndarray:
        planner = self._ar
        assert planner is not None
        known = job.frames is not None
        planner.request(n, given, self.draw(job.seed, job.sample, "tokens", "uniform", n), job.cfg)
        plan = self.ar_plan(1 if not given.guided else 3 if given.drops else 2)
        least = n if known else -(-self.config.min_frames // self.config.rate)  # END may come behind these
        for i in range(n):
            if i == least:
                planner.state.open.write(np.ones(1, np.int32))
            plan.replay()
            if i >= least and planner.state.done.read()[0]:
                break
        ids = planner.state.tokens.read()[:n]
        return ids[ids < self.config.codes]

    def _decoded(self, job: Request, ids: np.ndarray, stages: dict[str, float], noise: np.ndarray | None) -> Motion:
        c, frames, given = self.config, len(ids) * self.config.rate, job.constraints
        guided = given is not None and job.guidance is not None
        with _timed(stages, "decoder"):
            whole = np.zeros(self._tokens.shape, np.int32)
            whole[: len(ids)] = ids
            self._tokens.write(whole)
            self._seed.write(np.array([job.seed], np.uint64))
            self._offset.write(np.array([job.sample], np.uint64))
            slots = 0
            if guided and given is not None:
                slots = self._write_targets(given, frames)
            self.noise_plan(frames).replay()
            if noise is not None:
                self._denoiser.b.x.slice(0, noise.shape).write(noise)
            self.decode_plan(frames, slots, job.guidance if guided else None).replay()
        with _timed(stages, "output"):
            normed = self._denoiser.b.x.slice(0, (frames, c.features)).read()
            features = self.statistics.denormalize(normed).astype(np.float32)
            joints = self._joints.slice(0, (frames, c.joints, 3)).read() * np.float32(c.scale)
            start = given.start if given is not None else StartPose()
            if given is not None:
                joints = given.to_world(joints)
            return Motion(
                joints, features, ids.astype(np.int32), c.fps, self.skeleton, start, c.scale, job.text, given,
                given.residuals(joints) if given is not None else (),
                int(self._pull.stats.read()[:, 0, 2].sum()) if guided else 0, stages,
            )  # fmt: skip

    def _encoded(self, features: np.ndarray) -> np.ndarray:
        frames = len(features)
        self._given.rows(frames).write(self.statistics.normalize(features))
        self.encode_plan(frames).replay()
        return self._found.read()[: frames // self.config.rate]

    def _feature(self, text: str, ids: list[int]) -> np.ndarray:
        """The text's feature [1, embed]; of prompts seen before the one from then."""
        kept = self._features.pop(text, None)
        if kept is None:
            assert self._text is not None
            self._text.request(ids)
            self.text_plan().replay()
            kept = self._text.feature.read()
            while len(self._features) >= MAX_FEATURES:
                del self._features[next(iter(self._features))]
        self._features[text] = kept
        return kept

    def _write_hints(self, given: Constraints, frames: int) -> None:
        target, mask = given.target(frames)
        hints = self.statistics.hint(target, mask)
        if self.config.traj.hint_mask_channels:
            hints = np.concatenate([hints, mask.astype(np.float32)], -1)
        self._hints.rows(frames).write(hints)

    def _write_targets(self, given: Constraints, frames: int) -> int:
        """Targets and masks of the joints that have any; how many these are. Clears what the last request reported."""
        target, mask = given.target(frames)
        self._pull.stats.write(np.zeros(self._pull.stats.shape, np.float32))
        joints = list(given.joints)
        k, p = len(joints), self._pull
        p.joints.slice(0, (1, k)).write(np.array([joints], np.int32))
        p.at.slice(0, (1, frames, k, 3)).write((target[:, joints] / self.config.scale)[None].astype(np.float32))
        p.mask.slice(0, (1, frames, k)).write(mask[:, joints][None].astype(np.float32))
        return k

    def draw(self, seed: int, sample: int, stream: str, kind: str, count: int) -> np.ndarray:
        """Random numbers of a request; few, so they are made here, with the bits that every device would make."""
        out = np.zeros(count, np.int32 if kind == "bits" else np.float32)
        key, offset = np.array([seed], np.uint64), np.array([sample], np.uint64)
        with on("cpu"):
            rng(as_tensor(out), as_tensor(key), as_tensor(offset), stream=STREAMS[stream], kind=kind)
        return out

    def coins(self, seed: int, sample: int, steps: int) -> np.ndarray:
        """[steps] bool: whether the second pass drops the trajectory."""
        if self.config.cfg_alternate == "even_odd":
            return np.arange(steps) % 2 == 1
        return (self.draw(seed, sample, "coins", "bits", steps) & 1).astype(bool)


@contextmanager
def _timed(stages: dict[str, float], name: str) -> Iterator[None]:
    before = time.perf_counter()
    yield
    stages[name] = (time.perf_counter() - before) * 1e3


def load_options(
    name: str, source: Source, *, device: str = "cpu", dtype: object = "auto", quant: str | None = None,
    strict: bool = False, precise: bool = True,
) -> Options:  # fmt: skip
    """Options of a load, checked; dtype 'auto' is what the weights are stored as."""
    stored = source.info("decoder.model.0.weight").dtype
    parsed = parse_dtype(dtype) if dtype not in ("auto", None) else "bf16" if stored == "BF16" else "f32"
    if type(precise) is not bool:
        raise InputError(f"precise={show(precise)} is neither True nor False")
    return Options(name, device, parsed, quant, strict, precise)


def _fits(c: MoTokConfig, words: ClipTokenizer | None) -> None:
    """What the kernels can hold, and whether text and tower belong together."""
    if c.max_tokens * c.rate > MAX_FRAMES:
        raise ConfigError(f"max_frames = {c.max_frames}; the kernels take motions of at most {MAX_FRAMES} frames")
    if words is not None and words.vocab_size > c.clip.vocab:
        raise ConfigError(f"the text's vocabulary has {words.vocab_size} entries, clip.vocab = {c.clip.vocab}; "
                          "use the vocabulary file of these weights")  # fmt: skip
