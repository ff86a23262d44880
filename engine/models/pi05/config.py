"""Configuration of pi0.5: lerobot's config.json, openpi's, or the shapes of the tensors alone."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.blocks.siglip import SiglipConfig
from engine.errors import CheckpointError, ConfigError
from engine.io.checkpoint import Checkpoint, Source
from engine.io.files import member, read_json
from engine.io.policy_config import Sizes, features, normalization, pair, width_of, words
from engine.io.values import choice, flag, integer, number, show

MAX_CONFIG_BYTES = 32_000_000
MAX_PARAMETERS = 1 << 42
#: Where the stacks lie in a checkpoint, under canonical names.
VISION = "paligemma_with_expert.paligemma.model.vision_tower.vision_model."
PROJECTOR = "paligemma_with_expert.paligemma.model.multi_modal_projector."
TRUNK = "paligemma_with_expert.paligemma.model.language_model."
EXPERT = "paligemma_with_expert.gemma_expert.model."
NORM_EPS = 1e-6  # of every norm of the model
ROPE_THETA = 10_000.0

#: Sizes behind the variant names of openpi and lerobot: width, depth, mlp, heads, kv_heads, head_dim.
VARIANTS = {
    "gemma_2b": (2048, 18, 16384, 8, 1, 256),
    "gemma_300m": (1024, 18, 4096, 8, 1, 256),
    "dummy": (64, 4, 128, 8, 1, 16),
}
_MODES = {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"}
OPENPI_CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")

# Every size: allowed range and default. Far above any published model, low enough that no product of them is absurd.
_SIZES: dict[str, tuple[int, int, int | None]] = {
    "vision_hidden_size": (1, 1 << 16, 1152),
    "vision_num_hidden_layers": (1, 1024, 27),
    "vision_num_heads": (1, 1 << 12, 16),
    "vision_intermediate_size": (1, 1 << 18, 4304),
    "patch_size": (1, 256, 14),
    "image_size": (1, 4096, 224),
    "hidden_size": (1, 1 << 17, None),
    "num_hidden_layers": (1, 1024, None),
    "intermediate_size": (1, 1 << 20, None),
    "num_attention_heads": (1, 1 << 12, None),
    "num_key_value_heads": (1, 1 << 12, None),
    "head_dim": (2, 1 << 12, None),
    "vocab_size": (1, 1 << 22, 257152),
    "expert_hidden_size": (2, 1 << 17, None),
    "expert_intermediate_size": (1, 1 << 20, None),
    "max_action_dim": (1, 4096, 32),
}
_COUNTS = {
    "chunk_size": (1, 4096, 50),
    "num_inference_steps": (1, 1024, 10),
    "n_action_steps": (1, 4096, None),
    "max_state_dim": (1, 4096, 32),
    "tokenizer_max_length": (1, 1 << 16, 200),
    "empty_cameras": (0, 16, 0),
}
_ALIASES = {"action_horizon": "chunk_size", "action_dim": "max_action_dim", "precision": "dtype"}
_DTYPES = ("bfloat16", "float16", "float32")
_TRUNK = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads",
          "head_dim")  # fmt: skip
_EXPERT = ("expert_hidden_size", "num_hidden_layers", "expert_intermediate_size", *_TRUNK[3:])


@dataclass(frozen=True)
class Gemma:
    """One Gemma stack; the trunk and the action expert share depth and head geometry."""

    width: int
    depth: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Pi05Config:
    """Sizes and settings of a pi0.5 checkpoint (openpi; Black et al. 2025, arXiv 2504.16054).

    Attributes:
        vision, trunk, expert: sizes of the three stacks.
        vocab_size: rows of the token embedding.
        action_dim: width of the action rows that the model denoises (lerobot `max_action_dim`), 32 as published.
        horizon: actions per chunk (lerobot `chunk_size`, openpi `action_horizon`). No tensor has this size: without a
            config.json it is 50, and `assumed` says so.
        steps: flow steps of a full chunk (`num_inference_steps`).
        min_period, max_period: of the sinusoids that embed the flow time.
        max_state_dim: width to which the state may be padded.
        state_dim, robot_dim: raw width of the robot's state and action, None where the file names neither.
        tokenizer_max_length: room for text tokens.
        image_keys: camera names in the order of the prefix; the empty cameras of `empty_cameras` are the last ones.
        normalization_mapping: VISUAL, STATE and ACTION to one of IDENTITY, MEAN_STD, MIN_MAX, QUANTILES, QUANTILE10.
        use_relative_actions, relative_exclude_joints, action_feature_names: actions relative to the state, words in the
            names of those that stay absolute, and the names of all action dimensions.
        dtype: of the file, as config.json states it.
        assumed: what neither file nor tensors say and a default was taken for.
        extra: keys of config.json that the model does not read.

    Beyond the keys of lerobot and openpi, config.json may state each size: hidden_size, num_hidden_layers,
    intermediate_size, num_attention_heads, num_key_value_heads, head_dim, vocab_size, expert_hidden_size,
    expert_intermediate_size, patch_size, image_size, and with the prefix vision_: hidden_size, num_hidden_layers,
    num_heads, intermediate_size. Head counts are the only sizes that tensors do not show (default 8, and 16 in vision).
    """

    vision: SiglipConfig
    trunk: Gemma
    expert: Gemma
    vocab_size: int
    action_dim: int
    horizon: int
    steps: int = 10
    min_period: float = 4e-3
    max_period: float = 4.0
    n_action_steps: int = 50
    max_state_dim: int = 32
    state_dim: int | None = None
    robot_dim: int | None = None
    tokenizer_max_length: int = 200
    image_keys: tuple[str, ...] = OPENPI_CAMERAS
    empty_cameras: int = 0
    normalization_mapping: Mapping[str, str] = field(default_factory=lambda: dict(_MODES), hash=False)
    use_relative_actions: bool = False
    relative_exclude_joints: tuple[str, ...] = ("gripper",)
    action_feature_names: tuple[str, ...] = ()
    dtype: str = "float32"
    assumed: tuple[str, ...] = field(default=(), compare=False)
    extra: dict = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Pi05Config:
        """Read `config.json` and the shapes of the weights; either may be missing, not both.

        Raises:
            ConfigError: config.json is damaged, holds a value that is not usable, or contradicts the tensors.
            CheckpointError: the weights are damaged, or those of another model.
        """
        from engine.models.pi05.weights import canonical

        home = Path(folder)
        if not home.is_dir():
            raise ConfigError(f"{home} is not a folder; give a checkpoint folder with config.json or model.safetensors")
        file = member(home, "config.json", ConfigError)
        raw = read_json(file, limit=MAX_CONFIG_BYTES, error=ConfigError) if file.exists() else None
        weights = [member(home, f"model.safetensors{end}", ConfigError) for end in ("", ".index.json")]
        if not any(path.exists() for path in weights):
            if raw is None:
                raise ConfigError(f"{home} holds neither config.json nor model.safetensors; give a checkpoint folder")
            return cls.from_json(raw)
        with Checkpoint(home) as source:
            return cls.from_json({"type": "pi05"} if raw is None else raw, canonical(source))

    @classmethod
    def from_json(cls, raw: Any, source: Source | None = None) -> Pi05Config:
        """Check a parsed config.json of lerobot (`type` pi05) or openpi (`action_horizon`).

        Args:
            raw: the parsed file.
            source: the tensors under canonical names; their shapes then give the sizes, and `raw` must agree.

        Raises:
            ConfigError: names the key, its value and what is allowed.
            CheckpointError: a tensor that gives a size is missing.
        """
        values = _canonical(raw)
        sizes = Sizes({key: limits[:2] for key, limits in _SIZES.items()})
        for key in _SIZES:
            if key in values:
                sizes.state(key, values[key], key)
        if "image_resolution" in values:
            sizes.add("image_size", _square(values["image_resolution"]), "config key image_resolution")
        for key, names in (("paligemma_variant", _TRUNK), ("action_expert_variant", _EXPERT)):
            if key in values:
                name = values[key]
                variant = choice(key, name.removesuffix("_lora") if isinstance(name, str) else name, VARIANTS)
                for size, value in zip(names, VARIANTS[variant]):
                    sizes.add(size, value, f"{key} {variant}")
        if source is not None:
            _from_tensors(source, sizes)
        for names, variant in ((_TRUNK, "gemma_2b"), (_EXPERT, "gemma_300m")):
            if sizes.get(names[0]) is None:
                for size, value in zip(names, VARIANTS[variant]):
                    sizes.assume(size, value)
        for key, (_, _, default) in _SIZES.items():
            if default is not None:
                sizes.assume(key, default)

        counts = {k: integer(k, values[k], *r[:2]) for k, r in _COUNTS.items() if k in values}
        sizes.assumed += [k for k in ("chunk_size", "num_inference_steps") if k not in counts]
        counts = {k: r[2] for k, r in _COUNTS.items() if r[2] is not None} | counts
        periods = {k: number(k, values[k], 0.0, 1e6) for k in ("min_period", "max_period") if k in values}
        inputs, outputs = features(values, "input_features"), features(values, "output_features")
        heads = sizes["num_attention_heads"], sizes["num_key_value_heads"], sizes["head_dim"]
        depth = sizes["num_hidden_layers"]
        known = {*_SIZES, *_COUNTS, *_READ}
        config = cls(
            vision=SiglipConfig(sizes["vision_hidden_size"], sizes["vision_num_hidden_layers"],
                                sizes["vision_num_heads"], sizes["vision_intermediate_size"], sizes["patch_size"],
                                sizes["image_size"]),
            trunk=Gemma(sizes["hidden_size"], depth, sizes["intermediate_size"], *heads),
            expert=Gemma(sizes["expert_hidden_size"], depth, sizes["expert_intermediate_size"], *heads),
            vocab_size=sizes["vocab_size"],
            action_dim=sizes["max_action_dim"],
            horizon=counts["chunk_size"],
            steps=counts["num_inference_steps"],
            n_action_steps=counts.get("n_action_steps", counts["chunk_size"]),
            max_state_dim=counts["max_state_dim"],
            state_dim=width_of(inputs, "observation.state"),
            robot_dim=width_of(outputs, "action"),
            tokenizer_max_length=counts["tokenizer_max_length"],
            image_keys=_cameras(inputs, counts["empty_cameras"]),
            empty_cameras=counts["empty_cameras"],
            normalization_mapping=normalization(values, _MODES),
            use_relative_actions=flag("use_relative_actions", values.get("use_relative_actions", False)),
            relative_exclude_joints=_excluded(values),
            action_feature_names=words(values, "action_feature_names"),
            dtype=choice("dtype", values.get("dtype", "float32"), _DTYPES),
            assumed=tuple(sizes.assumed),
            extra={k: v for k, v in values.items() if k not in known},
            **periods,
        )  # fmt: skip
        _check(config)
        return config

    def to_json(self) -> dict[str, Any]:
        """lerobot's spelling with every size stated; `from_json` of it gives an equal configuration."""
        v, t, e = self.vision, self.trunk, self.expert
        inputs: dict[str, Any] = {
            key: {"type": "VISUAL", "shape": [3, v.image_size, v.image_size]} for key in self.image_keys
        }
        if self.state_dim is not None:
            inputs["observation.state"] = {"type": "STATE", "shape": [self.state_dim]}
        out: dict[str, Any] = self.extra | {
            "type": "pi05", "dtype": self.dtype,
            "vision_hidden_size": v.width, "vision_num_hidden_layers": v.depth, "vision_num_heads": v.heads,
            "vision_intermediate_size": v.mlp, "patch_size": v.patch_size,
            "image_resolution": [v.image_size, v.image_size],
            "hidden_size": t.width, "num_hidden_layers": t.depth, "intermediate_size": t.mlp,
            "num_attention_heads": t.heads, "num_key_value_heads": t.kv_heads, "head_dim": t.head_dim,
            "expert_hidden_size": e.width, "expert_intermediate_size": e.mlp, "vocab_size": self.vocab_size,
            "max_action_dim": self.action_dim, "chunk_size": self.horizon, "num_inference_steps": self.steps,
            "n_action_steps": self.n_action_steps, "min_period": self.min_period, "max_period": self.max_period,
            "max_state_dim": self.max_state_dim, "tokenizer_max_length": self.tokenizer_max_length,
            "empty_cameras": self.empty_cameras, "input_features": inputs, "output_features": {},
            "normalization_mapping": dict(self.normalization_mapping),
            "use_relative_actions": self.use_relative_actions,
            "relative_exclude_joints": list(self.relative_exclude_joints),
            "action_feature_names": list(self.action_feature_names) or None,
        }  # fmt: skip
        if self.robot_dim is not None:
            out["output_features"] = {"action": {"type": "ACTION", "shape": [self.robot_dim]}}
        return out


# Keys that `from_json` reads one by one.
_READ = ("type", "model_type", "image_resolution", "paligemma_variant", "action_expert_variant", "min_period",
         "max_period", "input_features", "output_features", "normalization_mapping", "use_relative_actions",
         "relative_exclude_joints", "action_feature_names", "dtype")  # fmt: skip


def _from_tensors(source: Source, sizes: Sizes) -> None:
    """Sizes as the tensors show them, under canonical names."""
    keys = source.keys()

    def shape(name: str, rank: int) -> tuple[int, ...]:
        found = source.info(name).shape
        if len(found) != rank or 0 in found:
            raise CheckpointError(f"tensor {name!r} has shape {list(found)}; {rank} sizes above zero are needed")
        return found

    def depth(prefix: str) -> int:
        pattern = re.compile(re.escape(prefix) + r"layers\.(\d{1,5})\.")
        return len({match[1] for key in keys if (match := pattern.match(key))})

    if f"{EXPERT}norm.dense.weight" not in keys and f"{EXPERT}norm.weight" in keys:
        raise CheckpointError(
            f"{EXPERT}norm has a plain weight and no dense: these are the weights of pi0; this model reads pi0.5"
        )
    # The layers of both stacks must be as many: each expert layer attends to the trunk layer beside it.
    for key, count, who in (
        ("vision_num_hidden_layers", depth(VISION + "encoder."), "the vision tower"),
        ("num_hidden_layers", depth(TRUNK), "the trunk"),
        ("num_hidden_layers", depth(EXPERT), "the action expert"),
    ):
        sizes.add(key, count, f"the number of layers of {who}")

    def add(name: str, *axes: str) -> tuple[int, ...]:
        found = shape(name, len(axes))
        for size, value in zip(axes, found):
            if size:
                sizes.add(size, value, f"tensor {name}")
        return found

    _, _, patch, _ = add(f"{VISION}embeddings.patch_embedding.weight", "vision_hidden_size", "", "patch_size", "")
    rows, _ = add(f"{VISION}embeddings.position_embedding.weight", "", "vision_hidden_size")
    side = math.isqrt(rows)
    if side * side != rows:
        raise CheckpointError(f"{VISION}embeddings.position_embedding.weight has {rows} rows, not those of a square")
    sizes.add("image_size", side * patch, f"tensor {VISION}embeddings.position_embedding.weight")
    add(f"{VISION}encoder.layers.0.mlp.fc1.weight", "vision_intermediate_size", "vision_hidden_size")
    add(f"{TRUNK}embed_tokens.weight", "vocab_size", "hidden_size")
    add(f"{TRUNK}layers.0.mlp.up_proj.weight", "intermediate_size", "hidden_size")
    add(f"{EXPERT}layers.0.mlp.up_proj.weight", "expert_intermediate_size", "expert_hidden_size")
    add("action_in_proj.weight", "expert_hidden_size", "max_action_dim")
    q, _ = add(f"{TRUNK}layers.0.self_attn.q_proj.weight", "", "hidden_size")
    kv, _ = add(f"{TRUNK}layers.0.self_attn.k_proj.weight", "", "hidden_size")
    heads, head_dim, kv_heads = (sizes.get(k) for k in ("num_attention_heads", "head_dim", "num_key_value_heads"))
    if head_dim is None and kv_heads is not None:
        head_dim = kv // kv_heads
    if heads is None:
        heads = q // head_dim if head_dim else sizes.assume("num_attention_heads", 8)
    if q % heads or kv % (q // heads):
        raise ConfigError(
            f"num_attention_heads = {heads} does not fit q_proj with {q} and k_proj with {kv} rows; "
            "state num_attention_heads and head_dim in config.json"
        )
    sizes.add("num_attention_heads", heads, f"tensor {TRUNK}layers.0.self_attn.q_proj.weight")
    sizes.add("head_dim", q // heads, f"tensor {TRUNK}layers.0.self_attn.q_proj.weight")
    sizes.add("num_key_value_heads", kv // (q // heads), f"tensor {TRUNK}layers.0.self_attn.k_proj.weight")


def _canonical(raw: Any) -> dict[str, Any]:
    """One name per key."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"config.json holds {type(raw).__name__}, not an object; give a model configuration")
    values = {key: value for key, value in raw.items() if value is not None}
    kind = values.get("type", values.get("model_type"))
    if kind is None and "action_horizon" not in values:
        raise ConfigError("config.json names neither a type nor an action_horizon; give the one of a pi0.5 checkpoint")
    if kind is not None and kind != "pi05":
        raise ConfigError(f"type is {show(kind)}; this model reads pi05 checkpoints")
    for alias, name in _ALIASES.items():
        if alias not in values:
            continue
        value = values.pop(alias)
        if values.setdefault(name, value) != value:
            raise ConfigError(f"config keys {alias} = {show(value)} and {name} = {show(values[name])} disagree")
    return values


def _excluded(values: Mapping[str, Any]) -> tuple[str, ...]:
    """An empty list means that every joint is relative; without the key lerobot leaves the grippers out."""
    return words(values, "relative_exclude_joints") if "relative_exclude_joints" in values else ("gripper",)


def _square(value: Any) -> int:
    height, width = pair("image_resolution", value, *_SIZES["image_size"][:2])
    if height != width:
        raise ConfigError(f"image_resolution = {show(value)}; the vision tower sees squares, height must equal width")
    return height


def _cameras(inputs: Mapping[str, tuple[str, tuple[int, ...]]], empty: int) -> tuple[str, ...]:
    """Camera names in the order of the file, empty ones behind."""
    views = [name for name, (kind, _) in inputs.items() if kind == "VISUAL"] if inputs else list(OPENPI_CAMERAS)
    views += [name for i in range(empty) if (name := f"observation.images.empty_camera_{i}") not in views]
    if not views:
        raise ConfigError("input_features names no camera (type VISUAL); at least one is needed")
    return tuple(views)


def _check(c: Pi05Config) -> None:
    """Relations between values; single values are in range by now."""
    v, t = c.vision, c.trunk
    for name, whole, part_name, part in (
        ("vision_hidden_size", v.width, "vision_num_heads", v.heads),
        ("image_size", v.image_size, "patch_size", v.patch_size),
        ("num_attention_heads", t.heads, "num_key_value_heads", t.kv_heads),
    ):
        if whole % part:
            raise ConfigError(f"{name} = {whole} is not a multiple of {part_name} = {part}")
    for name, value in (("head_dim", t.head_dim), ("expert_hidden_size", c.expert.width)):
        if value % 2:
            raise ConfigError(f"{name} = {value} is odd; rotations and sinusoids come in pairs")
    if c.min_period >= c.max_period:
        raise ConfigError(f"min_period = {c.min_period:g} is not below max_period = {c.max_period:g}")
    if c.n_action_steps > c.horizon:
        raise ConfigError(f"n_action_steps = {c.n_action_steps} is more than chunk_size = {c.horizon}")
    if c.robot_dim is not None and c.robot_dim > c.action_dim:
        raise ConfigError(f"output_features.action has {c.robot_dim} values, max_action_dim is {c.action_dim}")
    attention = 2 * t.head_dim * (t.heads + t.kv_heads)
    total = c.vocab_size * t.width + v.depth * v.width * (4 * v.width + 2 * v.mlp)
    total += t.depth * sum(g.width * (attention + 3 * g.mlp) for g in (t, c.expert)) + 6 * t.depth * c.expert.width**2
    if total > MAX_PARAMETERS or t.heads * t.head_dim > 1 << 20:
        raise ConfigError(f"these values describe {total:.3g} parameters; at most {MAX_PARAMETERS:.3g} are allowed")
