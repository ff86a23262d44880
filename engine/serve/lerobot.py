"""A policy with the methods that lerobot's control loops call; lerobot itself is not needed."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.blocks.policy import FlowPolicy
from engine.errors import InputError

TOKENS, MASK = "observation.language.tokens", "observation.language.attention_mask"


class LerobotPolicy:
    """`select_action`, `predict_action_chunk` and `reset` over a loaded policy.

    Batches are what a robot or a data set gives, before any processor: `observation.images.*` uint8 or floats in [0, 1]
    ([B, C, H, W] or [B, H, W, C]), `observation.state` [B, n] in robot units, `task` (a text or a list of B). Actions
    come back in robot units: normalisation is the engine's, so lerobot's pre- and postprocessor must not run as well.
    Token ids may replace the task (`observation.language.tokens`, with their attention mask).

    Args:
        model: from `engine.load`; batches up to its `batch` run together, larger ones in turns.
        n_action_steps: actions that `select_action` takes from a chunk before it asks for the next; default: those of
            the checkpoint.
    """

    def __init__(self, model: FlowPolicy, n_action_steps: int | None = None) -> None:
        steps = model.config.n_action_steps if n_action_steps is None else n_action_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= model.horizon:
            raise InputError(f"n_action_steps={steps!r} is not an integer in [1, {model.horizon}]")
        self.model, self.n_action_steps = model, steps
        self._queue: deque[Any] = deque()

    def reset(self) -> None:
        """A new episode: drops the queue and what the cameras showed last."""
        self._queue.clear()
        self.model.reset()

    def select_action(self, batch: Mapping[str, Any], noise: Any = None) -> Any:
        """The next action [B, dims]; a new chunk is sampled when the queue is empty, from its first action on."""
        if batch.get("delay") is not None:
            raise InputError("select_action executes chunks from their first action on; give delay and action_prefix "
                             "to predict_action_chunk")  # fmt: skip
        if not self._queue:
            chunk = self.predict_action_chunk(batch, noise)
            self._queue.extend(chunk[:, i] for i in range(self.n_action_steps))
        return self._queue.popleft()

    def predict_action_chunk(self, batch: Mapping[str, Any], noise: Any = None) -> Any:
        """A chunk [B, H, dims], a torch tensor where the batch holds torch tensors, else numpy. noise [B, H, A].

        Behind a `delay` [B] with its `action_prefix` [B, d, dims], the chunk begins with these committed actions.
        """
        observations = self._split(batch)
        drawn = None if noise is None else np.asarray(noise, np.float32)
        if drawn is not None and len(drawn) != len(observations):
            raise InputError(f"noise is for {len(drawn)} samples and the batch has {len(observations)}")
        rows, most = [], self.model.options.batch
        for at in range(0, len(observations), most):
            part = slice(at, at + most)
            some = None if drawn is None else drawn[part]
            if most == 1:
                rows.append(self.model.act(observations[at], noise=some).actions)
            else:
                rows += [c.actions for c in self.model.act_batch(observations[part], noise=some)]
        out = np.stack(rows)
        for row, one in zip(out, observations, strict=True):
            if one.get("action_prefix") is not None:
                row[: len(one["action_prefix"])] = one["action_prefix"]
        torch = sys.modules.get("torch")
        if torch is not None and any(isinstance(v, torch.Tensor) for v in batch.values()):
            return torch.from_numpy(out)
        return out

    def _split(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """One observation per sample."""
        profile = self.model.profile_of_inputs
        own = {*profile.state_keys, *(v.key for v in profile.views)}
        arrays = {k: np.asarray(v) for k, v in batch.items() if k.startswith("observation.") or k in own}
        sizes = {k: len(v) for k, v in arrays.items() if v.ndim}
        if not sizes or len(set(sizes.values())) != 1:
            raise InputError(f"a batch needs observation.* of one length; this one has {sizes or 'none'}")
        count = next(iter(sizes.values()))
        tasks = batch.get("task")
        tasks = [tasks] * count if tasks is None or isinstance(tasks, str) else list(tasks)
        if len(tasks) != count:
            raise InputError(f"the batch has {count} samples and {len(tasks)} tasks")
        out = []
        for i in range(count):
            one = {k: v[i] for k, v in arrays.items() if k not in (TOKENS, MASK)}
            if tasks[i] is not None:
                one["task"] = tasks[i]
            if TOKENS in arrays:
                one["tokens"] = arrays[TOKENS][i]
                if MASK in arrays:
                    one["token_mask"] = arrays[MASK][i].astype(bool)
            for key in ("domain_id", "delay", "action_prefix"):
                if batch.get(key) is not None:
                    one[key] = np.asarray(batch[key])[i]
            out.append(one)
        return out
