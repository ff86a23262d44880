"""What the trainers of small checkpoints share."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.io.checkpoint import SafetensorsFile, save

Weights = dict[str, Tensor]


def train(
    name: str, parameters: Iterable[Tensor], loss: Callable[[int], Tensor], steps: int, rate: float, every: int = 100
) -> None:
    """AdamW under a warm-up and a cosine; prints the mean loss now and then."""
    parameters = list(parameters)
    optimiser = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    start, seen = time.perf_counter(), []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100) * (0.02 + 0.49 * (1 + np.cos(np.pi * step / steps)))
        value = loss(step)
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        seen.append(value.item())
        if (step + 1) % every == 0 or step + 1 == steps:
            now = time.perf_counter() - start
            print(f"{name}: step {step + 1} of {steps}, loss {np.mean(seen[-every:]):.4f}, {now:.0f} s", flush=True)


def kept(work: Path, name: str, make: Callable[[], tuple[Weights, dict[str, Any]]]) -> tuple[Weights, dict[str, Any]]:
    """Weights of a stage and what else is known of them: from the work folder where they are there."""
    weights, facts = work / f"{name}.safetensors", work / f"{name}.json"
    if not weights.exists():
        start = time.perf_counter()
        made, about = make()
        facts.write_text(json.dumps(about) + "\n")
        save(weights, {k: ("F32", np.ascontiguousarray(v.float().numpy())) for k, v in made.items()})
        print(f"== {name}: {time.perf_counter() - start:.0f} s", flush=True)
    with SafetensorsFile(weights) as file:
        return {k: torch.from_numpy(np.array(file.read(k))) for k in file.keys()}, json.loads(facts.read_text())  # noqa: SIM118
