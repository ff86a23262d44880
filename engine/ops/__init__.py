"""Ops: the public function, the torch reference and the registry entry of each room."""

from __future__ import annotations

import importlib
import pkgutil

_NOT_ROOMS = {"checks", "dispatch", "registry"}


def load_all() -> None:
    """Imports every room, so that all entries are registered."""
    for module in pkgutil.iter_modules(__path__):
        if module.name not in _NOT_ROOMS:
            importlib.import_module(f"engine.ops.{module.name}")
