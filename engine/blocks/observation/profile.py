"""Which preprocessing a checkpoint was trained with, written down so that it can be read and printed.

The same weights fed by another convention run without any error and act worse, so nothing here is guessed from data:
choose a preset, adapt it with `replace`, and look at `print(profile)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from engine.blocks.observation.actions import ActionSpace, xvla_action_space
from engine.blocks.observation.images import RANGES, RESIZES, ImageRule
from engine.blocks.observation.normalization import CONVENTIONS, MODES
from engine.errors import ConfigError
from engine.io.sidecar import Sidecar
from engine.io.statistics import LerobotProcessor

PROMPTS = {
    "state": "'Task: ..., State: <bins>;\\nAction: ', BOS first",
    "plain": "text, then a line end, BOS first",
    "padded": "BOS, text, EOS, padded to a fixed length",
}


@dataclass(frozen=True)
class View:
    """One image slot of the model.

    Attributes:
        slot: its name in the model.
        key: where the observation has it; `a/b` is that key, or key b inside a. None: this robot has no such camera.
        rotate: turn the image by 180 degrees first.
    """

    slot: str
    key: str | None
    rotate: bool = False


@dataclass(frozen=True)
class InputProfile:
    """Everything between an observation and the tensors of the model.

    Attributes:
        name: of the preset.
        views: image slots in the model's order.
        image: resize and range.
        missing_last: absent cameras go behind the present ones (lerobot) instead of staying in their slot (openpi).
        state_keys: parts of the state, concatenated in this order.
        prompt_keys: where the prompt is; the first that is there.
        prompt: a key of `PROMPTS`.
        max_tokens: most tokens of a prompt; its exact length where 'padded'.
        pad_state: zeros behind the state up to this many dimensions *before* it is written into the prompt, as
            lerobot 0.4 did; 0: not.
        state_norm, action_norm: 'quantile', 'zscore', 'minmax' or 'identity'.
        convention: 'openpi' or 'lerobot', where they differ in epsilons and precision.
        eps: lerobot's epsilon.
        action: channels of the model and of the robot.
        delta_mask: per robot dimension, whether actions are relative to the state; empty: none is.
        limits: (low, high) of each robot dimension where known; a loaded policy clamps its actions to them.
        proprio_dim: length of the state vector that the model takes; 0 where it takes none.
        domain: default of `domain_id`.
    """

    name: str
    views: tuple[View, ...]
    image: ImageRule
    state_keys: tuple[str, ...]
    action: ActionSpace
    prompt: str = "state"
    prompt_keys: tuple[str, ...] = ("prompt",)
    max_tokens: int = 200
    missing_last: bool = False
    pad_state: int = 0
    state_norm: str = "quantile"
    action_norm: str = "quantile"
    convention: str = "openpi"
    eps: float = 1e-8
    delta_mask: tuple[bool, ...] = ()
    limits: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    proprio_dim: int = 0
    domain: int = field(default=0)

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("prompt", self.prompt, PROMPTS),
            ("state_norm", self.state_norm, MODES),
            ("action_norm", self.action_norm, MODES),
            ("convention", self.convention, CONVENTIONS),
        ):
            if value not in allowed:
                raise ConfigError(f"profile {self.name}: {name}={value!r} is not known; there are {', '.join(allowed)}")
        if not self.views or len({v.slot for v in self.views}) != len(self.views):
            raise ConfigError(f"profile {self.name}: views must be at least one, with different slots")
        if len(self.delta_mask) not in (0, self.action.robot_dim):
            raise ConfigError(
                f"profile {self.name}: delta_mask has {len(self.delta_mask)} entries, not {self.action.robot_dim}"
            )
        if not 1 <= self.max_tokens <= 8192 or not 0 <= self.pad_state <= 1024 or not 0 <= self.proprio_dim <= 1024:
            raise ConfigError(f"profile {self.name}: max_tokens, pad_state or proprio_dim is out of range")

    def replace(self, **changes: Any) -> InputProfile:
        """A copy with other values, checked again."""
        return replace(self, **changes)

    def with_robot_dims(self, dims: int, delta_mask: tuple[bool, ...] | None = None) -> InputProfile:
        """For a robot of `dims` dimensions; the mask of another robot is dropped."""
        kept = self.delta_mask if len(self.delta_mask) == dims else ()
        mask = kept if delta_mask is None else delta_mask
        return replace(self, action=replace(self.action, robot_dim=dims), delta_mask=mask)

    def with_processor(self, processor: LerobotProcessor | None) -> InputProfile:
        """With how `policy_preprocessor.json` normalises, where it does: it is what lerobot runs."""
        if processor is None or processor.state_mode is None or processor.action_mode is None:
            return self
        return replace(self, state_norm=processor.state_mode, action_norm=processor.action_mode, eps=processor.eps)

    def with_sidecar(self, sidecar: Sidecar | None) -> InputProfile:
        """With what `faster.json` says; its fields win."""
        if sidecar is None:
            return self
        out = self
        dims = sidecar.robot_dims or (len(sidecar.delta_mask) if sidecar.delta_mask else None)
        if dims is not None:
            out = out.with_robot_dims(dims, sidecar.delta_mask)
        if sidecar.norm is not None:
            out = replace(out, state_norm=sidecar.norm, action_norm=sidecar.norm)
        if sidecar.discrete_state_input is not None and out.prompt != "padded":
            out = replace(out, prompt="state" if sidecar.discrete_state_input else "plain")
        if sidecar.limits is not None:
            out = replace(out, limits=sidecar.limits)
        if sidecar.resize is not None:
            out = replace(out, image=replace(out.image, resize=sidecar.resize))
        return out

    def __str__(self) -> str:
        rows = [(f"view {v.slot}", _where(v)) for v in self.views]
        size = "" if self.image.resize == "none" else f" to {self.image.size[0]}x{self.image.size[1]}"
        rows += [
            ("absent cameras", "masked, behind the present ones" if self.missing_last else "masked, in their slot"),
            ("resize", f"{self.image.resize}{size}: {RESIZES[self.image.resize]}"),
            ("pixels", RANGES[self.image.range] + (", padding -3" if self.image.legacy_pad else "")),
            ("state", " + ".join(self.state_keys) + f", {self.state_norm} ({self.convention})"),
            ("state input", self._state_input()),
            ("prompt", f"{' or '.join(self.prompt_keys)}: {PROMPTS[self.prompt]}, at most {self.max_tokens} tokens"),
            ("actions", f"{self.action.robot_dim} of {self.action.model_dim} channels, {self.action_norm}"),
            (
                "relative to state",
                "".join(".x"[m] for m in self.delta_mask) if any(self.delta_mask) else "no dimension",
            ),
            ("limits", "declared" if self.limits else "not known"),
        ]
        if self.pad_state:
            rows.append(("state padding", f"to {self.pad_state} before it is written into the prompt"))
        if self.action.grippers:
            rows.append(("grippers", f"channels {', '.join(map(str, self.action.grippers))}: zero in, sigmoid out"))
        if self.prompt == "padded":
            rows.append(("domain", str(self.domain)))
        return "\n".join([f"profile {self.name}", *(f"  {k:<24} {v}" for k, v in rows)])

    def _state_input(self) -> str:
        if self.proprio_dim:
            return f"a vector of {self.proprio_dim}"
        return "in the prompt" if self.prompt == "state" else "none: the model does not see the state"


def _where(view: View) -> str:
    return "no camera" if view.key is None else view.key + (" (rotated by 180 degrees)" if view.rotate else "")


_ALOHA = (True,) * 6 + (False,) + (True,) * 6 + (False,)


def _openpi(name: str, cameras: Sequence[str | None], state: Sequence[str], dims: int, **more: Any) -> InputProfile:
    slots = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    views = tuple(View(slot, key) for slot, key in zip(slots, cameras, strict=True))
    return InputProfile(name, views, ImageRule("pad-pil"), tuple(state), ActionSpace("pi05", 32, dims), **more)


def relative_mask(dims: int, names: Sequence[str] | None = None, exclude: Sequence[str] = ()) -> tuple[bool, ...]:
    """`delta_mask` of a lerobot configuration with use_relative_actions.

    Args:
        dims: of an action.
        names: action_feature_names; without them every dimension is relative.
        exclude: relative_exclude_joints; a dimension whose name contains one of them stays absolute.
    """
    words = [word.lower() for word in exclude if word]
    mask = [not any(word in name.lower() for word in words) for name in names or ()][:dims]
    return tuple(mask + [True] * (dims - len(mask)))


def lerobot_pi05(
    cameras: Sequence[str], robot_dim: int, *, model_dim: int = 32, size: tuple[int, int] = (224, 224), **more: Any
) -> InputProfile:
    """lerobot's pi0.5: cameras in the order of the configuration's input_features, torch resize, absent ones last."""
    views = tuple(View(key.removeprefix("observation.images."), key) for key in cameras)
    settings: dict[str, Any] = {"prompt_keys": ("task", "prompt"), "missing_last": True, "convention": "lerobot"} | more
    space = ActionSpace("pi05", model_dim, robot_dim)
    return InputProfile("lerobot-pi05", views, ImageRule("pad-torch", size), ("observation.state",), space, **settings)


def openpi_pi05(
    cameras: Sequence[str], robot_dim: int, *, model_dim: int = 32, size: tuple[int, int] = (224, 224), **more: Any
) -> InputProfile:
    """openpi's pi0.5, whose files do not name the robot: observations hold the model's slots, `state` and `prompt`."""
    views = tuple(View(key, key) for key in cameras)
    space = ActionSpace("pi05", model_dim, robot_dim)
    return InputProfile("openpi-pi05", views, ImageRule("pad-pil", size), ("state",), space, **more)


def lerobot_xvla(
    cameras: Sequence[str],
    action: ActionSpace,
    *,
    proprio_dim: int,
    slots: int | None = None,
    resize: tuple[int, int] | None = None,
    **more: Any,
) -> InputProfile:
    """lerobot's X-VLA: ImageNet range, `resize_imgs_with_padding` (height, width) after it, `slots` image slots."""
    views = [View(key.removeprefix("observation.images."), key) for key in cameras]
    views += [View(f"empty_{i}", None) for i in range((slots or 0) - len(views))]
    image = ImageRule(
        "none" if resize is None else "pad-corner", resize or (224, 224), range="imagenet", bytes_as_float=True
    )
    settings: dict[str, Any] = {
        "prompt": "padded", "prompt_keys": ("task", "prompt"), "max_tokens": 64, "missing_last": True,
        "state_norm": "identity", "action_norm": "identity", "convention": "lerobot", "proprio_dim": proprio_dim,
    } | more  # fmt: skip
    return InputProfile("lerobot-xvla", tuple(views), image, ("observation.state",), action, **settings)


def _xvla_original() -> InputProfile:
    return InputProfile(
        "xvla",
        tuple(View(f"view_{i}", f"image{i}") for i in range(3)),
        ImageRule("stretch", range="imagenet"),
        ("proprio",),
        xvla_action_space("ee6d"),
        prompt="padded",
        prompt_keys=("language_instruction", "prompt"),
        max_tokens=50,
        missing_last=True,
        state_norm="identity",
        action_norm="identity",
        proprio_dim=20,
    )


#: Presets of the published checkpoints. The lerobot ones are examples: their cameras and dimensions are in config.json.
PROFILES: dict[str, InputProfile] = {
    p.name: p
    for p in (
        _openpi(
            "faster-agilex",
            ("images/cam_high", "images/cam_left_wrist", "images/cam_right_wrist"),
            ("state",),
            14,
            delta_mask=_ALOHA,
            state_norm="zscore",
            action_norm="zscore",
        ),
        _openpi(
            "openpi-libero",
            ("observation/image", "observation/wrist_image", None),
            ("observation/state",),
            7,
            prompt="plain",
        ),
        _openpi(
            "openpi-droid",
            ("observation/exterior_image_1_left", "observation/wrist_image_left", None),
            ("observation/joint_position", "observation/gripper_position"),
            8,
        ),
        _openpi(
            "faster-calvin",
            ("image", "wrist_image", None),
            ("state_ee_pos", "state_ee_rot", "state_gripper"),
            7,
            prompt="plain",
            state_norm="zscore",
            action_norm="zscore",
        ),
        lerobot_pi05(
            tuple(f"observation.images.{s}" for s in ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")), 32
        ),
        _xvla_original(),
        lerobot_xvla(
            tuple(f"observation.images.{s}" for s in ("image", "image2")),
            xvla_action_space("ee6d"),
            proprio_dim=20,
            slots=3,
        ),
    )
}


def profile(name: str) -> InputProfile:
    """A preset by name; `ConfigError` lists them."""
    if name not in PROFILES:
        raise ConfigError(f"profile {name!r} is not known; there are {', '.join(PROFILES)}")
    return PROFILES[name]
