"""Quintet: published models from their own checkpoints, each step one static plan.

>>> import engine
>>> m = engine.load("nemotron-tiny")
>>> print(m.chat([{"role": "user", "content": "What is 47 + 85?"}]).message.content)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from engine import errors
from engine.errors import EngineError

if TYPE_CHECKING:
    from engine.runtime.model import Model

__version__ = "0.1.0"
__all__ = ["EngineError", "errors", "load"]


def load(
    name: str | os.PathLike[str],
    *,
    device: str = "auto",
    dtype: object = "auto",
    quant: str | None = None,
    strict: bool = False,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Model:
    """Loads a checkpoint and captures its plans.

    Args:
        name: zoo name ('nemotron-tiny'), folder in the published layout, or hub id.
        device: 'auto' (a GPU where this build and the host have one), 'cpu', 'cuda' or 'cuda:N'.
        dtype: 'auto' (as stored), or a torch dtype, its name, or fp32 / bf16.
        quant: None, 'int8' or 'int4', made at load.
        strict: raise DispatchError where an op would not run on the fastest implementation of this host.
        revision, local_files_only, token, cache_dir: as in huggingface_hub.
        options: of the model family, e.g. context=, chunk=, snapshots= (see its class).

    Raises: ConfigError, CheckpointError, TokenizerError, InputError, DeviceError, MemoryPlanError; before any work.
    """
    from engine.io.hub import resolve
    from engine.models import family_of
    from engine.runtime.device import choose

    device = choose(device)
    folder = resolve(name, revision=revision, local_files_only=local_files_only, token=token, cache_dir=cache_dir)
    _, model_class = family_of(folder)
    takes = model_class.load_options()
    unknown = sorted(set(options) - takes)
    if unknown:
        raise errors.InputError(
            f"{model_class.__name__} has no option {unknown[0]!r}; it takes {', '.join(sorted(takes))}"
        )
    return model_class.load(folder, device=device, dtype=dtype, quant=quant, strict=strict, **options)
