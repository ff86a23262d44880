"""Normalisation statistics as robot policies ship them: openpi's norm_stats.json, lerobot's processor pipelines."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from engine.errors import ConfigError
from engine.io.checkpoint import SafetensorsFile, bf16_to_f32
from engine.io.files import member, read_json
from engine.io.values import choice, integer, number, show

MAX_DIMS = 1024
MAX_STEPS = 64
MAX_JSON_BYTES = 16 << 20
_NAMES = ("mean", "std", "q01", "q99", "min", "max")
_NEVER_NEGATIVE = ("std",)
#: lerobot's words for the modes of `engine.blocks.observation.Normalizer`.
MODES = {"IDENTITY": "identity", "MEAN_STD": "zscore", "QUANTILES": "quantile", "MIN_MAX": "minmax"}

Vectors = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Statistics:
    """Per-dimension statistics of the training data, in robot units.

    Attributes:
        state, actions: name (mean, std, q01, q99, min, max; those that were there) to [n] fp64; empty where none.
        source: the file they came from, for messages.
    """

    state: Vectors = field(default_factory=dict)
    actions: Vectors = field(default_factory=dict)
    source: str = "nowhere"


@dataclass(frozen=True, eq=False)
class LerobotProcessor:
    """What policy_preprocessor.json says about the inputs of a policy.

    Attributes:
        statistics: as far as the pipeline carries them; lerobot/pi05_base has none.
        state_mode, action_mode: a value of `MODES`; None where no step of the pipeline normalises.
        eps: what lerobot adds to a standard deviation, and puts in place of an empty range.
        max_tokens: length of the tokenised prompt, or None.
    """

    statistics: Statistics
    state_mode: str | None = None
    action_mode: str | None = None
    eps: float = 1e-8
    max_tokens: int | None = None


def read_norm_stats(path: str | os.PathLike[str]) -> Statistics:
    """Read openpi's `norm_stats.json`: {"norm_stats": {"state": {"mean": [...], ...}, "actions": {...}}}.

    Args:
        path: the file, usually assets/<robot>/norm_stats.json of the checkpoint.

    Raises:
        ConfigError: missing or damaged; lists of unequal length, NaN, infinity, or a negative deviation.
    """
    data = read_json(Path(path), limit=MAX_JSON_BYTES, error=ConfigError, unique=True)
    stats = data.get("norm_stats") if isinstance(data, dict) else None
    if not isinstance(stats, dict) or not all(isinstance(stats.get(k), dict) for k in ("state", "actions")):
        raise ConfigError(f"{path} has no norm_stats with state and actions; give the norm_stats.json of the training")
    parts = {
        part: vectors({k: stats[part][k] for k in _NAMES if stats[part].get(k) is not None}, f"{path}: {part}")
        for part in ("state", "actions")
    }
    return Statistics(parts["state"], parts["actions"], str(path))


def read_lerobot_processor(folder: str | os.PathLike[str]) -> LerobotProcessor | None:
    """Read `policy_preprocessor.json` (and the safetensors files that it names); None where the folder has none.

    Raises:
        ConfigError, CheckpointError: a file is damaged, or uses a normalisation that is not supported here.
    """
    home = Path(folder)
    path = member(home, "policy_preprocessor.json", ConfigError)
    if not path.exists():
        return None
    modes: dict[str, str | None] = {"STATE": None, "ACTION": None}
    state: Vectors = {}
    actions: Vectors = {}
    eps, max_tokens = 1e-8, None
    for name, config, tensors in _steps(home, path):
        if name == "tokenizer_processor" and config.get("max_length") is not None:
            max_tokens = integer(f"{path}: max_length", config["max_length"], 1, 8192)
        if name != "normalizer_processor":
            continue
        eps = number(f"{path}: eps", config.get("eps", 1e-8), 0, 1)
        map_ = config.get("norm_map", {})
        if not isinstance(map_, dict):
            raise ConfigError(f"{path}: norm_map = {show(map_)}; an object is needed")
        modes = {"STATE": "identity", "ACTION": "identity"}
        modes |= {k: MODES[choice(f"{path}: norm_map.{k}", map_[k], MODES)] for k in modes if k in map_}
        state = _pick(tensors, "observation.state.", f"{path}: observation.state")
        actions = _pick(tensors, "action.", f"{path}: action")
    return LerobotProcessor(Statistics(state, actions, str(path)), modes["STATE"], modes["ACTION"], eps, max_tokens)


def vectors(values: Mapping[str, Any], what: str) -> Vectors:
    """Statistics out of lists or arrays: equal lengths (1 to 1024), finite, deviations not negative.

    Raises:
        ConfigError: anything else.
    """
    out = {}
    for name, value in values.items():
        key = f"{what}.{name}"
        if not isinstance(value, np.ndarray):
            plain = isinstance(value, list) and all(type(x) in (int, float) and abs(x) < 1e300 for x in value)
            if not plain:
                raise ConfigError(f"{key} = {show(value)}; a list of finite numbers is needed")
            value = np.array(value, np.float64)
        if value.ndim != 1 or not 1 <= value.size <= MAX_DIMS:
            raise ConfigError(f"{key} has shape {list(value.shape)}; 1 to {MAX_DIMS} numbers are needed")
        value = value.astype(np.float64)
        if not np.isfinite(value).all() or (name in _NEVER_NEGATIVE and (value < 0).any()):
            raise ConfigError(f"{key} holds NaN, infinity or a negative deviation; compute the statistics again")
        value.flags.writeable = False
        out[name] = value
    if len({v.size for v in out.values()}) > 1:
        sizes = ", ".join(f"{k} {v.size}" for k, v in out.items())
        raise ConfigError(f"{what}: statistics of different lengths ({sizes}); compute them again")
    return MappingProxyType(out)


def _steps(home: Path, path: Path) -> list[tuple[str, dict[str, Any], dict[str, np.ndarray]]]:
    """(registry name, config, tensors) of each step of a pipeline file."""
    data = read_json(path, limit=MAX_JSON_BYTES, error=ConfigError)
    steps = data.get("steps") if isinstance(data, dict) else None
    if not isinstance(steps, list) or len(steps) > MAX_STEPS or not all(isinstance(s, dict) for s in steps):
        raise ConfigError(f"{path} has no list of at most {MAX_STEPS} steps; it is not a processor pipeline")
    out = []
    for step in steps:
        config, file = step.get("config", {}), step.get("state_file")
        if not isinstance(config, dict) or not isinstance(file, str | None):
            raise ConfigError(f"{path}: a step's config or state_file is not an object and a name; the file is damaged")
        name = str(step.get("registry_name", ""))
        # Other steps (renaming, devices) have nothing that is needed here, and their files stay closed.
        tensors = _tensors(member(home, file, ConfigError)) if file and name == "normalizer_processor" else {}
        out.append((name, config, tensors))
    return out


def _tensors(path: Path) -> dict[str, np.ndarray]:
    file = SafetensorsFile(path)
    try:
        out = {}
        for name in file.keys():  # noqa: SIM118 - a Source is no dict
            info = file.info(name)
            # Camera statistics are [3, 1, 1] and unused; lists of indices and the like are not floats.
            if len(info.shape) != 1 or info.dtype not in ("F64", "F32", "F16", "BF16") or info.shape[0] > MAX_DIMS:
                continue
            raw = file.read(name)
            out[name] = np.array(bf16_to_f32(raw) if info.dtype == "BF16" else raw)
        return out
    finally:
        file.close()


def _pick(tensors: Mapping[str, np.ndarray], prefix: str, what: str) -> Vectors:
    return vectors({k: tensors[prefix + k] for k in _NAMES if prefix + k in tensors}, what)
