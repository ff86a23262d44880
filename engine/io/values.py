"""Single values out of foreign JSON, checked before use; every fault is a `ConfigError` naming key and range."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from engine.errors import ConfigError


def show(value: Any, limit: int = 80) -> str:
    """Short form of an untrusted value for a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # integers of more than 4300 digits, deep nests
        return f"a {type(value).__name__} too large to print"
    return text if len(text) <= limit else text[:limit] + "..."


def integer(key: str, value: Any, low: int, high: int) -> int:
    """An integer in [low, high]; true and 3.0 are none."""
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(f"{key} = {show(value)}; an integer from {low} to {high} is needed")
    return value


def flag(key: str, value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{key} = {show(value)}; true or false is needed")
    return value


def number(key: str, value: Any, low: float, high: float) -> float:
    """A float or integer in (low, high], never NaN."""
    plain = type(value) is float or (type(value) is int and abs(value) < 2**53)
    if not plain or not low < value <= high:
        raise ConfigError(f"{key} = {show(value)}; a number above {low:g} and up to {high:g} is needed")
    return float(value)


def choice(key: str, value: Any, allowed: Collection[str]) -> str:
    """One of a few words."""
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{key} = {show(value)}; one of {', '.join(allowed)} is needed")
    return value


def token_ids(key: str, value: Any, vocab: int) -> tuple[int, ...]:
    """An id, a list of ids or None, as sorted ids below `vocab`."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if len(ids) > 1024:
        raise ConfigError(f"{key} lists {len(ids)} ids; at most 1024 are allowed")
    return tuple(sorted({integer(key, item, 0, vocab - 1) for item in ids}))


def infinite(value: Any) -> Any:
    """Undo transformers' strict-JSON spelling of infinity; anything else comes back as it is."""
    return math.inf if isinstance(value, dict) and value == {"__float__": "Infinity"} else value
