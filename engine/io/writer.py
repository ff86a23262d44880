"""Writing safetensors: whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from engine.errors import CheckpointError, InputError
from engine.io.tensors import STORAGE


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, tuple[str, np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write tensors to a safetensors file; readers see the old file or the whole new one.

    Args:
        path: a `.safetensors` file, or a folder (made if needed) that gets `model.safetensors`.
        tensors: name to (safetensors dtype, array); the array has element type `STORAGE[dtype]`, BF16 as uint16.
        metadata: strings for the header.

    Returns:
        The path of the file.

    Raises:
        InputError: an unknown dtype, or an array whose element type is not the dtype's.
        CheckpointError: the file cannot be written.
    """
    target = Path(path)
    if target.suffix != ".safetensors" or target.is_dir():
        target = target / "model.safetensors"
    for name, (dtype, array) in tensors.items():
        if name == "__metadata__" or dtype not in STORAGE:
            raise InputError(f"tensor {name!r} has dtype {dtype!r}; use one of {', '.join(STORAGE)} and another name")
        if array.dtype != STORAGE[dtype]:
            raise InputError(f"tensor {name!r} is {array.dtype}, {dtype} is held in {STORAGE[dtype]}; convert it first")
    # Widest elements first keeps every tensor aligned without padding, which the format forbids.
    order = sorted(tensors, key=lambda name: (-STORAGE[tensors[name][0]].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in order:
        dtype, array = tensors[name]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as handle:
            handle.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                # A flat byte view writes without a second copy of the tensor.
                handle.write(np.ascontiguousarray(tensors[name][1]).reshape(-1).view(np.uint8).data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as fault:
        raise CheckpointError(
            f"{target} cannot be written: {fault.strerror or fault}; check space and rights"
        ) from fault
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return target


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable where the system allows it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
