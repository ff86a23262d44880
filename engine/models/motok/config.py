"""Configuration of MoTok: config.json, its defaults per data set and downrate, and every refusal by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.io.files import member, read_json
from engine.io.values import choice, flag, integer, number, show

MAX_CONFIG_BYTES = 1_000_000
MAX_PARAMETERS = 1 << 36
MAX_STEPS = 10_000  # of training; a list of timesteps cannot be longer

#: Ten, ten, three, two and two timesteps of five equal ranges of 1000, the last one 997 (Fast27).
FAST27 = (0, 22, 44, 66, 88, 111, 133, 155, 177, 199, 200, 222, 244, 266, 288, 311, 333, 355, 377, 399, 400, 500, 599,
          600, 799, 800, 997)  # fmt: skip

MODEL_TYPE = "motok"
DATASETS = ("humanml3d", "kit")
UNITS = {"m": 1.0, "mm": 0.001}  # metres per unit of a motion
SOLVERS = ("lbfgs", "lbfgs_last", "gd", "gd_norm", "project")
# What depends on the downrate, by down_t: kernel of the denoiser and the best guidance scale of either planner.
_VARIANTS = {0: (7, 3.6, 3.2), 1: (7, 3.2, 3.2), 2: (5, 2.6, 2.0), 3: (5, 2.0, 1.8), 4: (5, 1.8, 1.6)}


@dataclass(frozen=True)
class Denoiser:
    """Diffusion decoder: residual blocks, their width, frames seen by a block's convolution (0: none), and width of
    the sinusoids of the timestep."""

    blocks: int = 6
    width: int = 768
    kernel: int = 5
    t_embed: int = 256


@dataclass(frozen=True)
class Diffusion:
    """Noise schedule and sampler.

    steps: length of training. beta_schedule: `linear` (1e-4 to 0.02) or `cosine`. timesteps: the sampled ones, as
    training numbers them, ascending. sampler: `ddim` (eta 0) or `ddpm`. variance: of ddpm, `fixed_large` or
    `fixed_small`.
    """

    steps: int = 1000
    beta_schedule: str = "linear"
    timesteps: tuple[int, ...] = FAST27
    sampler: str = "ddim"
    variance: str = "fixed_large"


@dataclass(frozen=True)
class DDM:
    """Discrete diffusion planner: a masked transformer.

    steps: passes over the tokens. topk_ratio: share of the codes that sampling leaves out. code_dim: width of the token
    table. cfg: scale of classifier-free guidance.
    """

    dim: int = 384
    layers: int = 6
    heads: int = 6
    ff: int = 1024
    code_dim: int = 768
    steps: int = 10
    topk_ratio: float = 0.9
    temperature: float = 1.0
    cfg: float = 2.6


@dataclass(frozen=True)
class AR:
    """Autoregressive planner: layers of its two halves, and positions of its table (`block`)."""

    dim: int = 768
    layers_base: int = 9
    layers_head: int = 0
    heads: int = 12
    ff: int = 3072
    block: int = 51
    cfg: float = 2.0


@dataclass(frozen=True)
class Trajectory:
    """Trajectory encoder; channels of a frame (`in` in the file): three per joint, and with `hint_mask_channels` one
    more that says whether the joint is given."""

    channels: int = 66
    hint_mask_channels: bool = False


@dataclass(frozen=True)
class Guidance:
    """How constraints pull on the motion while it is denoised.

    solver: one of `SOLVERS`. on: the clean estimate (`x0`) or the mean of the next state (`mu`). n_first, n_last: calls
    of L-BFGS at each sampled step from `threshold` on and below it, counted from the clean end. history, max_iter: of
    L-BFGS, max_iter per call. eta, gd_iters: step size, and steps of `gd` and `gd_norm`. max_evals: limit of the
    evaluations of a request, 0 for none.
    """

    solver: str = "lbfgs"
    on: str = "x0"
    n_first: int = 1
    n_last: int = 10
    threshold: int = 10
    history: int = 10
    max_iter: int = 4
    eta: float = 50.0
    gd_iters: int = 10
    max_evals: int = 0

    def calls(self, k: int) -> int:
        """Calls of L-BFGS at sampled step k, 0 for the last one that is sampled."""
        first, threshold = (1, 1) if self.solver == "lbfgs_last" else (self.n_first, self.threshold)
        return first if k >= threshold else self.n_last

    def changed(self, values: Mapping[str, Any]) -> Guidance:
        """With some fields replaced; ConfigError names a key or a value that cannot be used."""
        return replace(self, **_take("guidance.", _object("guidance", values), _PARTS["guidance"]))


@dataclass(frozen=True)
class ClipText:
    """CLIP's text tower; embed: width of the text feature, ff: of its MLPs."""

    width: int = 512
    layers: int = 12
    heads: int = 8
    ctx: int = 77
    ff: int = 2048
    vocab: int = 49408
    embed: int = 512


@dataclass(frozen=True)
class MoTokConfig:
    """Sizes and settings of a MoTok checkpoint (Gu et al. 2026, arXiv 2603.19227; sizes: section 4.1, tables 3 and 7).

    Attributes:
        dataset: `humanml3d` or `kit`.
        features: values of a frame, 12 * joints - 1 (`D` in the file). joints, fps: of the data set.
        unit: of lengths in a motion, `m` or `mm`; constraints and joints are metres.
        max_frames, min_frames: allowed lengths of a motion.
        down_t: halvings of time in the tokenizer; a token stands for 2 ** down_t frames.
        width, depth, dilation_growth: channels of its convolutions, residual blocks per stage and growth of dilation.
        latent, codes: width and number of codes.
        denoiser, diffusion, ddm, ar, traj, guidance, clip: of the parts.
        cfg_alternate: which of two conditions the second pass drops: `coin` (a fair coin per planner step) or
            `even_odd` (the text at even steps, the trajectory at odd ones).
    """

    dataset: str = "humanml3d"
    features: int = 263
    joints: int = 22
    fps: float = 20.0
    unit: str = "m"
    max_frames: int = 196
    min_frames: int = 40
    down_t: int = 2
    width: int = 512
    depth: int = 3
    dilation_growth: int = 3
    latent: int = 768
    codes: int = 1024
    denoiser: Denoiser = Denoiser()
    diffusion: Diffusion = Diffusion()
    ddm: DDM = DDM()
    ar: AR = AR()
    traj: Trajectory = Trajectory()
    guidance: Guidance = Guidance()
    clip: ClipText = ClipText()
    cfg_alternate: str = "coin"

    @property
    def rate(self) -> int:
        """Frames of a token."""
        return 2**self.down_t

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest motion."""
        return self.max_frames // self.rate

    @property
    def scale(self) -> float:
        """Metres per unit of length."""
        return UNITS[self.unit]

    @property
    def topk(self) -> int:
        """Codes that sampling of the discrete planner keeps per position."""
        return max(1, ceil((1 - self.ddm.topk_ratio) * self.codes))

    @classmethod
    def humanml3d(cls, down_t: int = 2) -> MoTokConfig:
        """HumanML3D at 2 ** down_t frames per token, down_t 0 to 4."""
        return cls.from_json({"dataset": "humanml3d", "down_t": down_t})

    @classmethod
    def kit(cls, down_t: int = 2) -> MoTokConfig:
        """KIT-ML at 2 ** down_t frames per token, down_t 0 to 4."""
        return cls.from_json({"dataset": "kit", "down_t": down_t})

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> MoTokConfig:
        """Read `config.json` of a checkpoint folder.

        Raises:
            ConfigError: the file is missing, damaged, or holds a value that is not usable.
        """
        home = Path(folder)
        if not home.is_dir():
            raise ConfigError(f"{home} is not a folder; give a checkpoint folder with config.json")
        file = member(home, "config.json", ConfigError)
        return cls.from_json(read_json(file, limit=MAX_CONFIG_BYTES, error=ConfigError, unique=True))

    @classmethod
    def from_json(cls, raw: Any) -> MoTokConfig:
        """Check a parsed config.json. Absent keys take the values of the data set and the downrate that it names.

        Raises:
            ConfigError: names the key, its value and what is allowed; keys that are not known are refused.
        """
        values = dict(_object("config.json", raw))
        choice("model_type", values.pop("model_type", MODEL_TYPE), (MODEL_TYPE,))
        # These two say what the others default to.
        dataset = choice("dataset", values.get("dataset", "humanml3d"), DATASETS)
        down_t = integer("down_t", values.get("down_t", 2), *_DOWN_T)
        base = _defaults(dataset, down_t)
        top = _take("", values, _TOP, _PARTS)
        features = {"features": 12 * top["joints"] - 1} if "joints" in top and "features" not in top else {}
        base = replace(base, **features, **top)
        parts = {name: _take(f"{name}.", _object(name, values[name]), table)
                 for name, table in _PARTS.items() if name in values}  # fmt: skip
        traj = parts.setdefault("traj", {})
        traj.setdefault("channels", (4 if traj.get("hint_mask_channels") else 3) * base.joints)
        parts.setdefault("ar", {}).setdefault("block", base.max_tokens + 2)
        config = replace(base, **{name: replace(getattr(base, name), **part) for name, part in parts.items()})
        _check(config)
        return config

    def to_json(self) -> dict[str, Any]:
        """The config.json that `from_json` reads back to an equal configuration."""
        out = {"model_type": MODEL_TYPE, **asdict(self)}
        out["D"] = out.pop("features")
        out["traj"]["in"] = out["traj"].pop("channels")
        out["diffusion"]["timesteps"] = list(self.diffusion.timesteps)
        return out


def _defaults(dataset: str, down_t: int) -> MoTokConfig:
    kernel, ddm_cfg, ar_cfg = _VARIANTS.get(down_t, _VARIANTS[max(_VARIANTS)])
    base = MoTokConfig(down_t=down_t, denoiser=Denoiser(kernel=kernel), ddm=DDM(cfg=ddm_cfg), ar=AR(cfg=ar_cfg))
    if dataset == "kit":
        base = replace(base, dataset="kit", features=251, joints=21, fps=12.5, unit="mm", min_frames=24)
    return base


_Check = Callable[[str, Any], Any]


def _int(low: int, high: int) -> _Check:
    return lambda key, value: integer(key, value, low, high)


def _real(low: float, high: float) -> _Check:
    return lambda key, value: number(key, value, low, high)


def _word(*allowed: str) -> _Check:
    return lambda key, value: choice(key, value, allowed)


def _timesteps(key: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_STEPS:
        raise ConfigError(f"{key} = {show(value)}; a list of 1 to {MAX_STEPS} ascending integers is needed")
    steps = tuple(integer(f"{key}[{i}]", item, 0, MAX_STEPS - 1) for i, item in enumerate(value))
    for i in range(1, len(steps)):
        if steps[i] <= steps[i - 1]:
            raise ConfigError(f"{key}[{i}] = {steps[i]} does not come after {steps[i - 1]}; give them ascending")
    return steps


_DOWN_T = (0, 6)
_WIDTH, _DEPTH, _HEADS = _int(1, 1 << 14), _int(0, 128), _int(1, 256)
_CFG = _real(-1e-9, 100.0)  # 0 is the unconditional planner
_TOP: dict[str, _Check] = {
    "dataset": _word(*DATASETS), "D": _int(1, 1 << 14), "joints": _int(2, 1024), "fps": _real(0.0, 1000.0),
    "unit": _word(*UNITS), "max_frames": _int(1, 1 << 16), "min_frames": _int(1, 1 << 16), "down_t": _int(*_DOWN_T),
    "width": _WIDTH, "depth": _int(0, 16), "dilation_growth": _int(1, 16), "latent": _WIDTH, "codes": _int(2, 1 << 20),
    "cfg_alternate": _word("coin", "even_odd"),
}  # fmt: skip
_PARTS: dict[str, dict[str, _Check]] = {
    "denoiser": {"blocks": _DEPTH, "width": _WIDTH, "kernel": _int(0, 63), "t_embed": _int(2, 1 << 14)},
    "diffusion": {
        "steps": _int(1, MAX_STEPS), "beta_schedule": _word("linear", "cosine"), "timesteps": _timesteps,
        "sampler": _word("ddim", "ddpm"), "variance": _word("fixed_large", "fixed_small"),
    },
    "ddm": {
        "dim": _WIDTH, "layers": _DEPTH, "heads": _HEADS, "ff": _int(1, 1 << 16), "code_dim": _WIDTH,
        "steps": _int(1, 1024), "topk_ratio": _real(-1e-9, 1.0), "temperature": _real(0.0, 100.0), "cfg": _CFG,
    },
    "ar": {
        "dim": _WIDTH, "layers_base": _DEPTH, "layers_head": _DEPTH, "heads": _HEADS, "ff": _int(1, 1 << 16),
        "block": _int(1, 1 << 16), "cfg": _CFG,
    },
    "traj": {"in": _WIDTH, "hint_mask_channels": flag},
    "guidance": {
        "solver": _word(*SOLVERS), "on": _word("x0", "mu"), "n_first": _int(0, 1000), "n_last": _int(0, 1000),
        "threshold": _int(0, MAX_STEPS), "history": _int(1, 1000), "max_iter": _int(1, 1000), "eta": _real(0.0, 1e9),
        "gd_iters": _int(0, 100_000), "max_evals": _int(0, 1 << 40),
    },
    "clip": {
        "width": _WIDTH, "layers": _DEPTH, "heads": _HEADS, "ctx": _int(2, 4096), "ff": _int(1, 1 << 16),
        "vocab": _int(3, 1 << 22), "embed": _WIDTH,
    },
}  # fmt: skip
_NAMES = {"D": "features", "in": "channels"}  # fields whose key in the file is no good name


def _object(key: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key} = {show(value)}; an object is needed")
    return value


def _take(prefix: str, values: Mapping[str, Any], table: Mapping[str, _Check], more: Any = ()) -> dict[str, Any]:
    """The checked values of one object, by field name."""
    unknown = [key for key in values if key not in table and key not in more]
    if unknown:
        raise ConfigError(f"key {show(prefix + str(unknown[0]))} is not known; remove it, or use one of "
                          f"{', '.join([*table, *more])}")  # fmt: skip
    return {_NAMES.get(key, key): check(prefix + key, values[key]) for key, check in table.items() if key in values}


def _check(c: MoTokConfig) -> None:
    """Relations between values; single values are in range by now."""
    if c.features != 12 * c.joints - 1:
        raise ConfigError(f"D = {c.features}; {c.joints} joints need 12 * joints - 1 = {12 * c.joints - 1}")
    if c.min_frames > c.max_frames:
        raise ConfigError(f"min_frames = {c.min_frames} is more than max_frames = {c.max_frames}")
    if c.max_tokens < 1:
        raise ConfigError(f"max_frames = {c.max_frames} is less than one token of {c.rate} frames; lower down_t")
    if c.denoiser.kernel and c.denoiser.kernel % 2 == 0:
        raise ConfigError(f"denoiser.kernel = {c.denoiser.kernel} is even; an odd number or 0 is needed")
    if c.denoiser.t_embed % 2:
        raise ConfigError(f"denoiser.t_embed = {c.denoiser.t_embed} is odd; sinusoids come in pairs")
    if c.diffusion.timesteps[-1] >= c.diffusion.steps:
        raise ConfigError(f"diffusion.timesteps ends at {c.diffusion.timesteps[-1]}; diffusion.steps = "
                          f"{c.diffusion.steps} allows less")  # fmt: skip
    for part in ("ddm", "ar", "clip"):
        sizes = getattr(c, part)
        width = sizes.width if part == "clip" else sizes.dim
        if width % sizes.heads:
            name = "width" if part == "clip" else "dim"
            raise ConfigError(f"{part}.{name} = {width} is not a multiple of {part}.heads = {sizes.heads}")
        if part != "clip" and width % 2:
            raise ConfigError(f"{part}.dim = {width} is odd; sinusoids come in pairs")
    if c.ar.block < c.max_tokens + 1:
        raise ConfigError(f"ar.block = {c.ar.block}; the condition and {c.max_tokens} tokens need {c.max_tokens + 1}")
    want = (4 if c.traj.hint_mask_channels else 3) * c.joints
    if c.traj.channels != want:
        raise ConfigError(f"traj.in = {c.traj.channels}; {c.joints} joints with hint_mask_channels = "
                          f"{str(c.traj.hint_mask_channels).lower()} need {want}")  # fmt: skip
    total = _parameters(c)
    if total > MAX_PARAMETERS:
        raise ConfigError(f"these values describe {total:.3g} parameters; at most {MAX_PARAMETERS:.3g} are allowed")


def _parameters(c: MoTokConfig) -> int:
    """Weights without biases: enough to refuse sizes that nobody can load."""
    d, stage = c.denoiser, (4 + 4 * c.depth) * c.width**2
    coder = c.down_t * stage + 3 * c.width * (c.width + c.latent + c.features + c.traj.channels)
    denoiser = d.blocks * d.width**2 * (d.kernel + 5) + d.width * (2 * c.features + c.latent + d.t_embed + 3 * d.width)
    layers = [(c.ddm.dim, c.ddm.ff, c.ddm.layers), (c.ar.dim, c.ar.ff, c.ar.layers_base + c.ar.layers_head),
              (c.clip.width, c.clip.ff, c.clip.layers)]  # fmt: skip
    blocks = sum(n * width * (4 * width + 2 * ff) for width, ff, n in layers)
    tables = c.codes * (c.latent + c.ddm.code_dim + 2 * c.ar.dim + c.ddm.dim) + c.clip.vocab * c.clip.width
    return 4 * coder + denoiser + blocks + tables + c.ar.block * c.ar.dim
