"""What the config.json files of robot policies share: features, normalisation, sizes that several places state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import ConfigError
from engine.io.values import choice, integer, show

NORM_MODES = ("IDENTITY", "MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10")
FEATURE_KINDS = ("VISUAL", "STATE", "ACTION", "ENV", "REWARD", "LANGUAGE")
MAX_FEATURES = 256


class Sizes:
    """Who says which size: config.json, the name of a variant, tensors, defaults. All who speak must agree.

    Args:
        ranges: allowed range of each size.
    """

    def __init__(self, ranges: Mapping[str, tuple[int, int]]) -> None:
        self.ranges = ranges
        #: Sizes that nobody stated and a default was taken for.
        self.assumed: list[str] = []
        self._said: dict[str, tuple[int, str]] = {}

    def add(self, key: str, value: int, who: str) -> int:
        """Record what `who` says; `ConfigError` where it is out of range or contradicts an earlier voice."""
        low, high = self.ranges[key]
        if not low <= value <= high:
            raise ConfigError(f"{who} gives {key} = {value}; from {low} to {high} is allowed")
        other, first = self._said.setdefault(key, (value, who))
        if other != value:
            raise ConfigError(
                f"{first} gives {key} = {other}, {who} gives {value}; use the config.json of these weights"
            )
        return value

    def state(self, key: str, value: Any, who: str) -> int:
        """`add` of an unchecked value of config.json."""
        return self.add(key, integer(who, value, *self.ranges[key]), f"config key {who}")

    def assume(self, key: str, value: int) -> int:
        """The default, where nobody spoke; returns the size that holds."""
        if key not in self._said:
            self.assumed.append(key)
            self._said[key] = value, "the default"
        return self._said[key][0]

    def get(self, key: str) -> int | None:
        return self._said[key][0] if key in self._said else None

    def __getitem__(self, key: str) -> int:
        if key not in self._said:
            raise ConfigError(f"{key} is stated nowhere; give it in config.json, or give the weights")
        return self._said[key][0]


def features(values: Mapping[str, Any], key: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """lerobot's `input_features` or `output_features`: name to (kind, shape), in the order of the file.

    Raises:
        ConfigError: names the feature and what is wrong with it.
    """
    given = values.get(key)
    if given is None:
        return {}
    if not isinstance(given, Mapping) or len(given) > MAX_FEATURES:
        raise ConfigError(f"{key} = {show(given)}; an object of at most {MAX_FEATURES} features is needed")
    out = {}
    for name, feature in given.items():
        if not isinstance(feature, Mapping) or not isinstance(name, str):
            raise ConfigError(f"{key}.{name} = {show(feature)}; an object with type and shape is needed")
        label = f"{key}.{name[:100]}"
        kind, shape = choice(f"{label}.type", feature.get("type"), FEATURE_KINDS), feature.get("shape")
        if not isinstance(shape, (list, tuple)) or len(shape) > 4:
            raise ConfigError(f"{label}.shape = {show(shape)}; a list of at most 4 sizes is needed")
        out[name] = kind, tuple(integer(f"{label}.shape", size, 1, 1 << 16) for size in shape)
    return out


def width_of(given: Mapping[str, tuple[str, tuple[int, ...]]], name: str) -> int | None:
    """Length of a feature that is a vector; None where there is none."""
    _, shape = given.get(name, ("", ()))
    return shape[0] if len(shape) == 1 else None


def normalization(values: Mapping[str, Any], default: Mapping[str, str]) -> dict[str, str]:
    """`normalization_mapping` over its default: VISUAL, STATE and ACTION to one of `NORM_MODES`."""
    modes, given = dict(default), values.get("normalization_mapping")
    if given is None:
        return modes
    if not isinstance(given, Mapping):
        raise ConfigError(f"normalization_mapping = {show(given)}; an object of kinds and modes is needed")
    return modes | {
        kind: choice(f"normalization_mapping.{kind}", given[kind], NORM_MODES) for kind in modes if kind in given
    }


def words(values: Mapping[str, Any], key: str, limit: int = 4096) -> tuple[str, ...]:
    """A list of strings, or nothing."""
    given = values.get(key)
    if given is None:
        return ()
    if not isinstance(given, (list, tuple)) or len(given) > limit or not all(isinstance(word, str) for word in given):
        raise ConfigError(f"{key} = {show(given)}; a list of at most {limit} names is needed")
    return tuple(given)


def text(values: Mapping[str, Any], key: str, default: str | None = None) -> str | None:
    """A string of at most 4096 characters, or the default."""
    given = values.get(key)
    if given is None:
        return default
    if not isinstance(given, str) or len(given) > 4096:
        raise ConfigError(f"{key} = {show(given)}; a short string is needed")
    return given


def pair(key: str, value: Any, low: int, high: int) -> tuple[int, int]:
    """Height and width."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ConfigError(f"{key} = {show(value)}; height and width are needed")
    return integer(key, value[0], low, high), integer(key, value[1], low, high)
