"""Model families by the `model_type` of their config.json."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

FAMILIES = {"nemotron_h": ("engine.models.nemotron.model", "Nemotron")}


def family_of(folder: Path) -> tuple[dict, Any]:
    """config.json of a folder (multimodal wrappers opened) and the class that loads it."""
    from engine.errors import ConfigError
    from engine.io.files import read_json

    path = folder / "config.json"
    if not path.exists():
        raise ConfigError(f"{folder} has no config.json; give a folder in the published layout")
    config = read_json(path, limit=16 << 20, error=ConfigError)
    if not isinstance(config, dict):
        raise ConfigError(f"{path} is not a JSON object")
    for wrapper in ("llm_config", "text_config"):
        if isinstance(config.get(wrapper), dict):
            config = config[wrapper]
    return config, family(str(config.get("model_type")))


def family(model_type: str) -> Any:
    """The class that loads checkpoints of this model_type."""
    from engine.errors import ConfigError

    if model_type not in FAMILIES:
        raise ConfigError(f"model_type {model_type!r} is not supported; this engine loads {', '.join(FAMILIES)}")
    module, name = FAMILIES[model_type]
    return getattr(importlib.import_module(module), name)
