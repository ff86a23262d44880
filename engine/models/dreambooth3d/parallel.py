"""Guidance's two branches in two processes, which exchange how far each moved the latent (torch.distributed)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.errors import InputError


@dataclass(frozen=True)
class Share:
    """Of the work on a step: which branch runs here, and the sum of an f32 array over both processes."""

    branch: int
    summed: Callable[[np.ndarray], np.ndarray]


def guidance_share(group: Any = None) -> Share:
    """This process's share. Start two processes, call torch.distributed.init_process_group in each, and make the same
    request in both: both return the same video. Close the group with destroy_process_group before the end. group: of
    torch.distributed, default all processes.

    Raises: InputError where torch.distributed is not initialised, or not for two processes.
    """
    try:
        import torch
        import torch.distributed as dist
    except ImportError as fault:
        raise InputError("parallel='guidance' needs torch: pip install torch") from fault
    if not dist.is_available() or not dist.is_initialized():
        raise InputError("parallel='guidance': call torch.distributed.init_process_group in both processes first")
    if (count := dist.get_world_size(group)) != 2:
        raise InputError(f"parallel='guidance' is for two processes, one for each branch; there are {count}")

    def summed(values: np.ndarray) -> np.ndarray:
        total = torch.from_numpy(np.ascontiguousarray(values, np.float32))
        dist.all_reduce(total, group=group)
        return total.numpy()

    return Share(dist.get_rank(group), summed)
