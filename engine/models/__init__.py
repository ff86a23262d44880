"""Model families by the `model_type` of their config.json."""

from __future__ import annotations

import importlib
from typing import Any

FAMILIES = {"nemotron_h": ("engine.models.nemotron.model", "Nemotron")}


def family(model_type: str) -> Any:
    """The class that loads checkpoints of this model_type."""
    from engine.errors import ConfigError

    if model_type not in FAMILIES:
        raise ConfigError(f"model_type {model_type!r} is not supported; this engine loads {', '.join(FAMILIES)}")
    module, name = FAMILIES[model_type]
    return getattr(importlib.import_module(module), name)
