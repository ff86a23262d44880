"""From an observation to the tensors of the model, by a profile."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.blocks.observation.actions import ActionMap
from engine.blocks.observation.images import hwc
from engine.blocks.observation.normalization import Normalizer
from engine.blocks.observation.profile import InputProfile
from engine.blocks.observation.prompt import TextEncoder, digitize, given_tokens, padded_tokens, prompt_tokens
from engine.errors import InputError, TokenizerError
from engine.io.statistics import Statistics

MAX_STATE = 1024


@dataclass(frozen=True, eq=False)
class ModelInput:
    """One observation, ready for the model.

    Attributes:
        images: [V, height, width, 3] fp32 in the model's range; absent cameras hold the range's black.
        image_mask: [V] bool, False where there is no camera; the model may skip those.
        tokens: [L] int32, unpadded, or of the fixed length of the profile.
        state: [n] fp64 in robot units, as sent.
        proprio: [P] fp32 as the model takes it (normalised, cut or padded, grippers zeroed); empty where P is 0.
        delay: d, committed actions of the chunk.
        prefix: [d, A] fp32, these actions in model space.
        domain: domain id.
    """

    images: np.ndarray
    image_mask: np.ndarray
    tokens: np.ndarray
    state: np.ndarray
    proprio: np.ndarray
    delay: int
    prefix: np.ndarray
    domain: int


class Preprocessor:
    """Applies a profile.

    Args:
        profile: which preprocessing; see `engine.blocks.observation.profile`.
        statistics: of the training data; needed by every normalisation but 'identity'.
        encoder: turns prompts into ids; without one every observation must bring `tokens`.
        vocab: ids that come with an observation must be below it.

    Raises:
        ConfigError: statistics that the profile needs are missing or too short.
    """

    def __init__(
        self,
        profile: InputProfile,
        statistics: Statistics | None = None,
        encoder: TextEncoder | None = None,
        vocab: int | None = None,
    ):
        stats = statistics or Statistics()
        self.profile, self.encoder, self.vocab = profile, encoder, vocab
        common = {"convention": profile.convention, "source": stats.source, "eps": profile.eps}
        # A policy that never looks at the state needs no statistics of it.
        state_mode = profile.state_norm if profile.prompt == "state" or profile.proprio_dim else "identity"
        self.state_norm = Normalizer(state_mode, statistics=stats.state, what="state", **common)  # type: ignore[arg-type]
        actions = Normalizer(profile.action_norm, statistics=stats.actions, what="actions", **common)  # type: ignore[arg-type]
        self.action_map = ActionMap(profile.action, actions, profile.delta_mask, profile.limits)

    def __call__(self, obs: Mapping[str, Any]) -> ModelInput:
        """Check an observation and convert it.

        Besides what the profile names, it may hold `tokens` (and `token_mask`) instead of a prompt, `domain_id`, and
        both or neither of `delay` (d) and `action_prefix` ([d, robot_dim] floats, absolute robot units).

        Raises:
            InputError: a part is missing or malformed; the message names it.
            TokenizerError: there is only a prompt, and no tokenizer.
        """
        if not isinstance(obs, Mapping):
            raise InputError(f"an observation is a mapping, not a {type(obs).__name__}")
        state = self._state(obs)
        delay, prefix = self._prefix(obs, state)
        domain = _integer(obs.get("domain_id", self.profile.domain), "domain_id", 0, 2**31 - 1)
        tokens = self._tokens(obs, state)
        images, mask = self._images(obs)
        return ModelInput(images, mask, tokens, state, self._proprio(state), delay, prefix, domain)

    def action_affine(self, state: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """(scale, offset), [robot_dim] fp32: robot = finish(model) * scale + offset; see `ActionMap.affine`."""
        return self.action_map.affine(state)

    def _images(self, obs: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        rule, present = self.profile.image, {}
        for index, view in enumerate(self.profile.views):
            found = None if view.key is None else find(obs, view.key)
            if found is None:
                continue
            image = hwc(found, view.key or view.slot)
            present[index] = rule.apply(image[::-1, ::-1] if view.rotate else image, view.key or view.slot)
        if not present:
            keys = ", ".join(v.key for v in self.profile.views if v.key)
            raise InputError(f"no camera image; profile {self.profile.name} looks for {keys}")
        sizes = {image.shape[:2] for image in present.values()}
        if len(sizes) > 1:
            raise InputError(f"cameras of different sizes {sorted(sizes)} and no resize in profile {self.profile.name}")
        if self.profile.missing_last:
            present = dict(enumerate(present.values()))
        blank = rule.missing(sizes.pop())
        count = len(self.profile.views)
        mask = np.isin(np.arange(count), list(present))
        return np.stack([present.get(i, blank) for i in range(count)]), mask

    def _state(self, obs: Mapping[str, Any]) -> np.ndarray:
        parts = []
        for key in self.profile.state_keys:
            value = find(obs, key)
            if value is None:
                if not self._needs_state:
                    return np.zeros(0)
                raise InputError(
                    f"{key} is missing; profile {self.profile.name} needs {', '.join(self.profile.state_keys)}"
                )
            array = np.asarray(value)
            if array.dtype.kind not in "fiu" or array.ndim > 1 or array.size > MAX_STATE:
                raise InputError(f"{key} is {array.dtype} {list(array.shape)}; at most {MAX_STATE} numbers are needed")
            with np.errstate(over="ignore"):
                finite = np.isfinite(array.astype(np.float32)).all()
            if not finite:
                raise InputError(f"{key} holds NaN or infinity; a sensor of the robot is not ready")
            parts.append(array.astype(np.float64).reshape(-1))
        state = np.concatenate(parts)
        norm, n = self.state_norm, len(state)
        # openpi's statistics may be longer, for they were once taken behind the padding.
        if norm.mode != "identity" and (n > norm.dims or (n < norm.dims and norm.convention == "lerobot")):
            raise InputError(f"the state has {n} numbers and its statistics {norm.dims}; are they of this robot?")
        return state

    @property
    def _needs_state(self) -> bool:
        profile = self.profile
        return profile.prompt == "state" or bool(profile.proprio_dim) or any(profile.delta_mask)

    def _proprio(self, state: np.ndarray) -> np.ndarray:
        out = np.zeros(self.profile.proprio_dim, np.float32)
        n = min(len(out), len(state))
        if n:
            with np.errstate(over="ignore"):
                out[:n] = self.state_norm.normalize(state)[:n]
        if not np.isfinite(out).all():
            raise InputError("the state is so far from its statistics that it is infinite; are its units right?")
        return self.profile.action.mask(out)

    def _tokens(self, obs: Mapping[str, Any], state: np.ndarray) -> np.ndarray:
        profile = self.profile
        if obs.get("tokens") is not None:
            padded = profile.prompt == "padded"
            mask = None if padded else obs.get("token_mask")
            ids = given_tokens(obs["tokens"], mask, vocab=self.vocab, limit=profile.max_tokens)
            if padded and len(ids) != profile.max_tokens:
                raise InputError(
                    f"{len(ids)} tokens; this policy was trained on exactly {profile.max_tokens}, padding included"
                )
            return ids
        prompt = next((obs[key] for key in profile.prompt_keys if obs.get(key) is not None), None)
        if prompt is None:
            raise InputError(f"no prompt; give {' or '.join(profile.prompt_keys)}, or tokens")
        if self.encoder is None:
            raise TokenizerError("there is no tokenizer beside the weights: put tokenizer.json there, or send tokens")
        if profile.prompt == "padded":
            return padded_tokens(prompt, self.encoder, profile.max_tokens)
        return prompt_tokens(prompt, self.encoder, self._bins(state), profile.max_tokens)

    def _bins(self, state: np.ndarray) -> np.ndarray | None:
        if self.profile.prompt != "state":
            return None
        values = self.state_norm.normalize(state)
        return digitize(np.concatenate([values, np.zeros(max(0, self.profile.pad_state - len(values)), values.dtype)]))

    def _prefix(self, obs: Mapping[str, Any], state: np.ndarray) -> tuple[int, np.ndarray]:
        delay, prefix = obs.get("delay"), obs.get("action_prefix")
        if (delay is None) != (prefix is None):
            raise InputError("an observation has both delay and action_prefix, or neither")
        if delay is None:
            return 0, np.zeros((0, self.profile.action.model_dim), np.float32)
        count = _integer(delay, "delay", 0, 4095)
        encoded = self.action_map.encode(prefix, state)
        if len(encoded) != count:
            raise InputError(
                f"action_prefix has {len(encoded)} rows, delay is {count}; one row for each committed action"
            )
        return count, encoded


def find(obs: Mapping[str, Any], key: str) -> Any:
    """obs[key], or for 'a/b' also obs['a']['b']; None where neither is there."""
    if key in obs:
        return obs[key]
    head, slash, rest = key.partition("/")
    inner = obs.get(head) if slash else None
    return find(inner, rest) if isinstance(inner, Mapping) else None


def _integer(value: Any, name: str, low: int, high: int) -> int:
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(-1)[0]
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
        raise InputError(f"{name} is not an integer in [{low}, {high}]")
    return int(value)
