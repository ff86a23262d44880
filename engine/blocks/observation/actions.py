"""Actions of the model to actions of the robot and back: channels, normalisation, relative joints, limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.blocks.observation.normalization import Normalizer
from engine.errors import ConfigError, InputError

MAX_DIMS = 1024


@dataclass(frozen=True)
class ActionSpace:
    """Channels of an action.

    Attributes:
        name: for messages.
        model_dim: channels that the network integrates.
        robot_dim: leading channels that a robot gets; the others are padding.
        grippers: channels that hold a logit: zeroed in what the network sees, through a sigmoid at the end.
    """

    name: str
    model_dim: int
    robot_dim: int
    grippers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.robot_dim <= self.model_dim <= MAX_DIMS:
            raise ConfigError(
                f"action space {self.name}: {self.robot_dim} robot of {self.model_dim} model channels; "
                f"1 <= robot <= model <= {MAX_DIMS} is needed"
            )
        if not all(0 <= g < self.model_dim for g in self.grippers):
            raise ConfigError(
                f"action space {self.name}: grippers {self.grippers} are not channels of {self.model_dim}"
            )

    def mask(self, values: np.ndarray) -> np.ndarray:
        """A copy of actions or proprioception [..., n] with the gripper channels zeroed, as the network sees them."""
        out = np.array(values)
        out[..., [g for g in self.grippers if g < out.shape[-1]]] = 0
        return out

    def pad(self, values: np.ndarray) -> np.ndarray:
        """[..., robot_dim] to [..., model_dim] with zeros."""
        out = np.zeros((*values.shape[:-1], self.model_dim), values.dtype)
        out[..., : values.shape[-1]] = values
        return out

    def finish(self, values: np.ndarray) -> np.ndarray:
        """Network output [..., model_dim] to [..., robot_dim]: sigmoid on grippers, padding dropped."""
        out = np.array(values[..., : self.robot_dim])
        own = [g for g in self.grippers if g < self.robot_dim]
        out[..., own] = _sigmoid(out[..., own])
        return out


#: X-VLA's fixed action spaces; 'auto' depends on the data set, see `xvla_action_space`.
XVLA_SPACES = {
    space.name: space
    for space in (
        ActionSpace("ee6d", 20, 20, (9, 19)),
        ActionSpace("joint", 14, 14, (6, 13)),
        ActionSpace("agibot_ee6d", 20, 20),
        ActionSpace("franka_joint7", 20, 7),
        ActionSpace("so101_bimanual", 20, 12, (5, 11)),
    )
}


def xvla_action_space(mode: str, robot_dim: int | None = None, model_dim: int = 20) -> ActionSpace:
    """The action space of an X-VLA `action_mode`.

    Args:
        mode: a key of `XVLA_SPACES`, or 'auto'.
        robot_dim: for 'auto': dimensions of the data set's actions.
        model_dim: for 'auto': max_action_dim of the configuration.

    Raises:
        ConfigError: an unknown mode, or 'auto' without robot_dim.
    """
    if mode in XVLA_SPACES:
        return XVLA_SPACES[mode]
    if mode != "auto":
        raise ConfigError(f"action_mode {mode!r} is not known; there are {', '.join([*XVLA_SPACES, 'auto'])}")
    if robot_dim is None:
        raise ConfigError("action_mode 'auto' needs the dimensions of the robot's actions; pass robot_dim=")
    return ActionSpace("auto", model_dim, robot_dim)


class ActionMap:
    """Between the model's chunk and the robot: robot = finish(model) * scale + offset.

    Args:
        space: channels.
        normalizer: of the actions.
        delta_mask: per robot dimension, True where the action is relative to the state of the request (a joint),
            False where it is absolute (a gripper); empty: all absolute.
        limits: (low [robot_dim], high [robot_dim]) of the robot, declared for whoever executes; nothing is clamped.

    Raises:
        ConfigError: a mask or limits of another length, limits out of order, too few statistics.
    """

    def __init__(
        self,
        space: ActionSpace,
        normalizer: Normalizer,
        delta_mask: tuple[bool, ...] = (),
        limits: tuple[Any, Any] | None = None,
    ):
        self.space, self.normalizer = space, normalizer
        if len(delta_mask) not in (0, space.robot_dim):
            raise ConfigError(f"delta_mask has {len(delta_mask)} entries; one for each of {space.robot_dim} dimensions")
        if normalizer.mode != "identity" and normalizer.dims < space.robot_dim:
            raise ConfigError(
                f"the statistics of actions cover {normalizer.dims} dimensions, the robot has {space.robot_dim}; "
                "use those of this robot"
            )
        self.delta = np.array(delta_mask or (False,) * space.robot_dim, bool)
        self.delta.flags.writeable = False
        self.limits: tuple[np.ndarray, np.ndarray] | None = None
        if limits is not None:
            low, high = (np.asarray(x, np.float32) for x in limits)
            # Written so that NaN fails.
            if low.shape != (space.robot_dim,) or high.shape != low.shape or not (low <= high).all():
                raise ConfigError(f"limits must be low <= high, {space.robot_dim} each")
            self.limits = (low, high)

    @property
    def sigmoid(self) -> np.ndarray:
        """[robot_dim] bool: channels that take a sigmoid before the affine map."""
        return np.isin(np.arange(self.space.robot_dim), self.space.grippers)

    def affine(self, state: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """(scale, offset), [robot_dim] fp32 each, for one request.

        Args:
            state: [n] robot units, n >= the last relative dimension; needed where an action is relative.

        Raises:
            InputError: the state is missing or too short.
        """
        scale, offset = self.normalizer.inverse(self.space.robot_dim)
        return scale.astype(np.float32), (offset + self._base(state)).astype(np.float32)

    def decode(self, values: Any, state: Any = None) -> np.ndarray:
        """Model chunk [..., model_dim] to robot actions [..., robot_dim] fp32."""
        values = np.asarray(values, np.float32)
        if values.ndim < 1 or values.shape[-1] != self.space.model_dim:
            raise InputError(f"actions have shape {list(values.shape)}; [..., {self.space.model_dim}] is needed")
        scale, offset = self.affine(state)
        return self.space.finish(values) * scale + offset

    def encode(self, actions: Any, state: Any = None) -> np.ndarray:
        """Robot actions [d, robot_dim] to the model's prefix [d, model_dim] fp32, the way back of `decode`.

        Relative dimensions are taken against the state of the *new* request. Gripper channels are zero: the network
        never sees them.

        Raises:
            InputError: another shape, or a value that is not finite.
        """
        array = np.asarray(actions)
        if array.dtype.kind not in "fiu" or array.ndim != 2 or array.shape[1] != self.space.robot_dim:
            raise InputError(f"action_prefix is {array.dtype} {list(array.shape)}; floats [d, {self.space.robot_dim}]")
        relative = array.astype(np.float64) - self._base(state)
        with np.errstate(over="ignore"):
            out = self.space.mask(self.space.pad(self.normalizer.normalize(relative))).astype(np.float32)
        if not np.isfinite(array).all() or not np.isfinite(out).all():
            raise InputError("action_prefix holds NaN or infinity; send the actions that the robot executes")
        return out

    def _base(self, state: Any) -> np.ndarray:
        base = np.zeros(self.space.robot_dim)
        if not self.delta.any():
            return base
        needed = int(np.flatnonzero(self.delta)[-1]) + 1
        array = np.zeros(0) if state is None else np.asarray(state, np.float64)
        if array.ndim != 1 or len(array) < needed:
            raise InputError(f"relative actions need at least {needed} state dimensions, not {list(array.shape)}")
        n = min(len(base), len(array))
        base[:n] = np.where(self.delta[:n], array[:n], 0)
        return base


def _sigmoid(x: np.ndarray) -> np.ndarray:
    # Through tanh, which does not overflow.
    return (0.5 * (1 + np.tanh(0.5 * x.astype(np.float64)))).astype(x.dtype)
