"""Configuration of X-VLA: the config.json of lerobot or of the authors (2toINF), or the shapes of the tensors alone."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError, ConfigError
from engine.io.checkpoint import Checkpoint, Source
from engine.io.files import member, read_json
from engine.io.policy_config import Sizes, features, normalization, pair, text, width_of
from engine.io.statistics import read_lerobot_processor
from engine.io.values import choice, flag, integer, number, show

MAX_CONFIG_BYTES = 32_000_000
MAX_PARAMETERS = 1 << 42
MAX_STAGES = 8
NORM_EPS = 1e-5  # of every norm of the model
TIME_PERIOD = 100.0  # longest period of the time sinusoids, in units of 1 / (2 pi)
POSITION_OFFSET = 2  # the first rows of BART's position table are not used

#: Where the parts lie in a checkpoint, under canonical names.
VISION = "vlm.vision_tower."
PROJECTOR = "vlm.multi_modal_projector."
LANGUAGE = "vlm.language_model."
POLICY = "transformer."


@dataclass(frozen=True)
class ActionMode:
    """Layout of an action: width in the model (None: max_action_dim), of the robot (None: as the dataset), and the
    gripper channels, which the model sees as zeros and predicts as logits."""

    dim: int | None
    real: int | None
    grippers: tuple[int, ...] = ()


ACTION_MODES = {
    "ee6d": ActionMode(20, 20, (9, 19)),
    "joint": ActionMode(14, 14, (6, 13)),
    "agibot_ee6d": ActionMode(20, 20),
    "franka_joint7": ActionMode(20, 7),
    "so101_bimanual": ActionMode(20, 12, (5, 11)),
    "auto": ActionMode(None, None),
}
_MODES = {"VISUAL": "IDENTITY", "STATE": "IDENTITY", "ACTION": "IDENTITY"}
_DTYPES = ("bfloat16", "float16", "float32")
_TWO_TO_INF_VIEWS = ("image0", "image1", "image2")

# Allowed range of each size, by its key in config.json; those of the four stages carry a number.
_RANGES: dict[str, tuple[int, int]] = {
    "d_model": (1, 1 << 16),
    "encoder_layers": (1, 1024),
    "encoder_attention_heads": (1, 1 << 12),
    "encoder_ffn_dim": (1, 1 << 18),
    "vocab_size": (1, 1 << 22),
    "max_position_embeddings": (1, 1 << 20),
    "window_size": (1, 1024),
    "max_pos_embeddings": (1, 4096),
    "max_temporal_embeddings": (1, 1 << 16),
    "hidden_size": (1, 1 << 16),
    "depth": (1, 1024),
    "num_heads": (1, 1 << 12),
    "mlp_dim": (1, 1 << 20),
    "num_domains": (1, 1 << 16),
    "len_soft_prompts": (0, 4096),
    "dim_time": (2, 4096),
    "max_len_seq": (1, 1 << 20),
    "action_dim": (1, 4096),
    "max_state_dim": (0, 4096),
    **{
        f"{key}[{stage}]": limits
        for stage in range(MAX_STAGES)
        for key, limits in {
            "dim_embed": (1, 1 << 16), "depths": (1, 1024), "num_heads": (1, 1 << 12), "num_groups": (1, 1 << 12),
            "patch_size": (1, 64), "patch_stride": (1, 64), "patch_padding": (0, 63), "mlp": (1, 1 << 18),
        }.items()
    },
}  # fmt: skip
# Of Florence-2-large and the published policy.
_STAGES = {
    "dim_embed": (256, 512, 1024, 2048), "depths": (1, 1, 9, 1), "patch_size": (7, 3, 3, 3),
    "patch_stride": (4, 2, 2, 2), "patch_padding": (3, 1, 1, 1),
}  # fmt: skip
_DEFAULTS = {
    "d_model": 1024, "encoder_layers": 12, "encoder_attention_heads": 16, "encoder_ffn_dim": 4096,
    "vocab_size": 51289, "max_position_embeddings": 4096, "window_size": 12, "max_pos_embeddings": 50,
    "max_temporal_embeddings": 100, "hidden_size": 1024, "depth": 24, "num_heads": 16, "num_domains": 30,
    "len_soft_prompts": 32, "dim_time": 32, "max_len_seq": 512,
}  # fmt: skip
_OWN = ("hidden_size", "depth", "num_heads", "num_domains", "len_soft_prompts", "dim_time", "max_len_seq")
_COUNTS = {
    "num_denoising_steps": (1, 1024),
    "n_action_steps": (1, 4096),
    "chunk_size": (1, 4096),
    "tokenizer_max_length": (1, 1 << 16),
    "num_image_views": (1, 64),
    "empty_cameras": (0, 16),
}
_READ = ("type", "model_type", "florence_config", "mlp_ratio", "use_hetero_proj", "use_proprio", "action_mode",
         "max_action_dim", "max_state_dim", "image_resolution", "resize_imgs_with_padding", "tokenizer_name",
         "tokenizer_padding_side", "domain_feature_key", "normalization_mapping", "input_features",
         "output_features", "dtype", "num_actions")  # fmt: skip


@dataclass(frozen=True)
class Davit:
    """DaViT tower; one entry per stage: width, pairs of a spatial and a channel block, attention heads, channel groups,
    width of the MLP, and kernel, stride and padding of the convolution that enters the stage.

    window: side of an attention window. positions: rows of the learned row and column tables. temporal: rows of the
    table of frames, of which only the first is used. image_size: height and width of a view in pixels.
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    groups: tuple[int, ...]
    mlp: tuple[int, ...]
    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    paddings: tuple[int, ...]
    window: int
    positions: int
    temporal: int
    image_size: tuple[int, int]

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Height and width of the token grid of each stage."""
        out, (height, width) = [], self.image_size
        for kernel, stride, pad in zip(self.kernels, self.strides, self.paddings):
            height, width = ((side + 2 * pad - kernel) // stride + 1 for side in (height, width))
            out.append((height, width))
        return out

    @property
    def tokens(self) -> int:
        """Tokens of one view: the last grid, and its mean in front."""
        height, width = self.grids[-1]
        return height * width + 1


@dataclass(frozen=True)
class Bart:
    """BART encoder; `positions` counts usable positions, its table has `POSITION_OFFSET` rows more."""

    width: int
    depth: int
    heads: int
    mlp: int
    vocab_size: int
    positions: int


@dataclass(frozen=True)
class Transformer:
    """Sizes of the policy's transformer."""

    width: int
    depth: int
    heads: int
    mlp: int


@dataclass(frozen=True)
class XVLAConfig:
    """Sizes and settings of an X-VLA checkpoint (Zheng et al. 2025, arXiv 2510.10274).

    Attributes:
        vision, language, policy: sizes of DaViT, of the BART encoder and of the soft-prompted transformer.
        num_domains, len_soft_prompts: embodiments, and learned tokens per embodiment.
        dim_time: width of the time sinusoids.
        max_len_seq: rows of the policy's position table; actions, text and image tokens must fit.
        hetero_proj: the projections of text and image tokens have weights per domain too.
        action_mode: one of `ACTION_MODES`.
        action_dim, robot_dim: width of an action in the model and of the robot.
        proprio_dim: width of the state in the model (`max_state_dim`; 0 without `use_proprio`).
        state_dim: raw width of the state, None where the file does not name it.
        horizon: actions per chunk (`chunk_size`, 2toINF `num_actions`); no tensor has this size.
        steps: denoising steps of a full chunk.
        num_views: image slots; slots without a camera still send zero features into the policy.
        image_keys: camera names in order, empty ones behind.
        resize_imgs_with_padding: (height, width) to which lerobot pads images, None for none.
        tokenizer_max_length: text tokens, padding included: padding is attended, so this is part of the model.
        normalization_mapping: VISUAL, STATE and ACTION to one of IDENTITY, MEAN_STD, MIN_MAX, QUANTILES, QUANTILE10.
        assumed: what neither file nor tensors say and a default was taken for.
        extra: keys of config.json that the model does not read.

    Head and group counts are not visible in tensors; without a statement a head of DaViT is 32 wide, and BART and the
    policy have 16. `image_resolution` ([height, width]) may state the size of the views; otherwise it is
    `resize_imgs_with_padding`, else the shape of the first camera, else 224 x 224. `mlp_dim` may stand for `mlp_ratio`,
    and `mlp` in vision_config for the widths of its MLPs.
    """

    vision: Davit
    language: Bart
    policy: Transformer
    num_domains: int
    len_soft_prompts: int
    dim_time: int
    max_len_seq: int
    action_dim: int
    robot_dim: int
    proprio_dim: int
    horizon: int
    num_views: int
    tokenizer_max_length: int
    action_mode: str = "ee6d"
    hetero_proj: bool = False
    steps: int = 10
    n_action_steps: int = 30
    state_dim: int | None = None
    image_keys: tuple[str, ...] = _TWO_TO_INF_VIEWS
    empty_cameras: int = 0
    resize_imgs_with_padding: tuple[int, int] | None = None
    tokenizer_name: str = "facebook/bart-large"
    tokenizer_padding_side: str = "right"
    domain_feature_key: str | None = None
    normalization_mapping: Mapping[str, str] = field(default_factory=lambda: dict(_MODES), hash=False)
    dtype: str = "float32"
    assumed: tuple[str, ...] = field(default=(), compare=False)
    extra: dict = field(default_factory=dict, compare=False, repr=False)

    @property
    def grippers(self) -> tuple[int, ...]:
        """Channels that are zeros on input and logits on output."""
        return ACTION_MODES[self.action_mode].grippers

    @property
    def sequence(self) -> int:
        """Tokens of the policy's transformer: actions, view 0 and text, the other views, soft prompts."""
        return self.horizon + self.context + self.len_soft_prompts

    @property
    def context(self) -> int:
        """Tokens of text and images."""
        return self.num_views * self.vision.tokens + self.tokenizer_max_length

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> XVLAConfig:
        """Read `config.json`, the shapes of the weights, and the text length of `policy_preprocessor.json`.

        Either of the first two may be missing, not both.

        Raises:
            ConfigError: a JSON file is damaged, holds a value that is not usable, or contradicts the tensors.
            CheckpointError: the weights are damaged, or those of another model.
        """
        from engine.models.xvla.weights import canonical

        home = Path(folder)
        if not home.is_dir():
            raise ConfigError(f"{home} is not a folder; give a checkpoint folder with config.json or model.safetensors")
        file = member(home, "config.json", ConfigError)
        raw = read_json(file, limit=MAX_CONFIG_BYTES, error=ConfigError) if file.exists() else None
        weights = [member(home, f"model.safetensors{end}", ConfigError) for end in ("", ".index.json")]
        if any(path.exists() for path in weights):
            with Checkpoint(home) as source:
                config = cls.from_json({"type": "xvla"} if raw is None else raw, canonical(source))
        elif raw is None:
            raise ConfigError(f"{home} holds neither config.json nor model.safetensors; give a checkpoint folder")
        else:
            config = cls.from_json(raw)
        processor = read_lerobot_processor(home)
        if processor is not None and processor.max_tokens is not None:
            config = replace(config, tokenizer_max_length=processor.max_tokens)
            _check(config)
        return config

    @classmethod
    def from_json(cls, raw: Any, source: Source | None = None) -> XVLAConfig:
        """Check a parsed config.json of lerobot (`type` xvla) or of the authors (`model_type` xvla, `num_actions`).

        Args:
            raw: the parsed file.
            source: the tensors under canonical names; their shapes then give the sizes, and `raw` must agree.

        Raises:
            ConfigError: names the key, its value and what is allowed.
            CheckpointError: a tensor that gives a size is missing.
        """
        if not isinstance(raw, Mapping):
            raise ConfigError(f"config.json holds {type(raw).__name__}, not an object; give a model configuration")
        values = {key: value for key, value in raw.items() if value is not None}
        kind = values.get("type", values.get("model_type"))
        if kind != "xvla":
            raise ConfigError(f"type is {show(kind)}; this model reads xvla checkpoints")
        authors = "num_actions" in values
        if authors and values.setdefault("chunk_size", values["num_actions"]) != values["num_actions"]:
            raise ConfigError(
                f"config keys num_actions = {show(values['num_actions'])} and chunk_size = "
                f"{show(values['chunk_size'])} disagree"
            )
        florence, sizes = _florence(values), Sizes(_RANGES)
        for key in (*_OWN, "mlp_dim"):
            if key in values:
                sizes.state(key, values[key], key)
        _state_florence(florence, sizes)
        mode = choice("action_mode", values.get("action_mode", "ee6d"), ACTION_MODES)
        stated = flag("use_hetero_proj", values["use_hetero_proj"]) if "use_hetero_proj" in values else None
        proprio = flag("use_proprio", values.get("use_proprio", True))
        inputs, outputs = features(values, "input_features"), features(values, "output_features")
        _action_width(values, mode, sizes, assume=source is None)
        if not proprio:
            sizes.add("max_state_dim", 0, "use_proprio = false")
        elif "max_state_dim" in values:
            sizes.state("max_state_dim", values["max_state_dim"], "max_state_dim")
        hetero = bool(stated) if source is None else _from_tensors(source, sizes, stated)
        stages = _stages(sizes)
        ratio = number("mlp_ratio", values.get("mlp_ratio", 4.0), 0.0, 64.0)
        if "mlp_ratio" in values:
            sizes.add("mlp_dim", int(sizes.assume("hidden_size", 1024) * ratio), "config key mlp_ratio")
        for key, value in _DEFAULTS.items():
            sizes.assume(key, value)
        sizes.assume("mlp_dim", int(sizes["hidden_size"] * ratio))
        sizes.assume("max_state_dim", 20 if authors else 32)

        counts = {key: integer(key, values[key], *limits) for key, limits in _COUNTS.items() if key in values}
        length = counts.get("tokenizer_max_length", 50 if authors else 64)
        sizes.assumed += [k for k in ("chunk_size", "num_denoising_steps", "tokenizer_max_length") if k not in counts]
        horizon = counts.get("chunk_size", 32 if inputs else 30)
        cameras = [name for name, (of_kind, _) in inputs.items() if of_kind == "VISUAL"]
        if inputs and not cameras:
            raise ConfigError("input_features names no camera (type VISUAL); at least one is needed")
        empty = counts.get("empty_cameras", 0)
        # Saved files list the empty cameras among the features and are counted with them once more, as lerobot does.
        views = max(counts.get("num_image_views", 0 if cameras else 3), len(cameras) + empty)
        blank = (f"observation.images.empty_camera_{i}" for i in range(empty))
        keys = [*(cameras or _TWO_TO_INF_VIEWS), *(name for name in blank if name not in cameras)]
        resize = None
        if "resize_imgs_with_padding" in values:
            resize = pair("resize_imgs_with_padding", values["resize_imgs_with_padding"], 1, 4096)
        known = {*_OWN, "mlp_dim", *_COUNTS, *_READ}
        config = cls(
            vision=Davit(
                **stages, window=sizes["window_size"], positions=sizes["max_pos_embeddings"],
                temporal=sizes["max_temporal_embeddings"], image_size=_image_size(values, resize, inputs, cameras),
            ),
            language=Bart(sizes["d_model"], sizes["encoder_layers"], sizes["encoder_attention_heads"],
                          sizes["encoder_ffn_dim"], sizes["vocab_size"], sizes["max_position_embeddings"]),
            policy=Transformer(sizes["hidden_size"], sizes["depth"], sizes["num_heads"], sizes["mlp_dim"]),
            num_domains=sizes["num_domains"],
            len_soft_prompts=sizes["len_soft_prompts"],
            dim_time=sizes["dim_time"],
            max_len_seq=sizes["max_len_seq"],
            action_dim=sizes["action_dim"],
            robot_dim=ACTION_MODES[mode].real or width_of(outputs, "action") or sizes["action_dim"],
            proprio_dim=sizes["max_state_dim"],
            horizon=horizon,
            num_views=views,
            tokenizer_max_length=length,
            action_mode=mode,
            hetero_proj=hetero,
            steps=counts.get("num_denoising_steps", 10),
            n_action_steps=counts.get("n_action_steps", horizon),
            state_dim=width_of(inputs, "observation.state"),
            image_keys=tuple(keys),
            empty_cameras=empty,
            resize_imgs_with_padding=resize,
            tokenizer_name=text(values, "tokenizer_name", "facebook/bart-large") or "",
            tokenizer_padding_side=choice(
                "tokenizer_padding_side", values.get("tokenizer_padding_side", "right"), ("left", "right")
            ),
            domain_feature_key=text(values, "domain_feature_key"),
            normalization_mapping=normalization(values, _MODES),
            dtype=choice("dtype", values.get("dtype", "float32"), _DTYPES),
            assumed=tuple(sizes.assumed),
            extra={k: v for k, v in values.items() if k not in known},
        )  # fmt: skip
        _check(config)
        return config

    def to_json(self) -> dict[str, Any]:
        """lerobot's spelling with every size stated; `from_json` of it gives an equal configuration."""
        v, t, p = self.vision, self.language, self.policy
        shown = [key for key in self.image_keys if not key.startswith("observation.images.empty_camera_")]
        inputs: dict[str, Any] = {key: {"type": "VISUAL", "shape": [3, *v.image_size]} for key in shown}
        if self.state_dim is not None:
            inputs["observation.state"] = {"type": "STATE", "shape": [self.state_dim]}
        return self.extra | {
            "type": "xvla", "dtype": self.dtype,
            "florence_config": {
                "text_config": {
                    "d_model": t.width, "encoder_layers": t.depth, "encoder_attention_heads": t.heads,
                    "encoder_ffn_dim": t.mlp, "vocab_size": t.vocab_size, "max_position_embeddings": t.positions,
                },
                "vision_config": {
                    "dim_embed": list(v.dims), "depths": list(v.depths), "num_heads": list(v.heads),
                    "num_groups": list(v.groups), "patch_size": list(v.kernels), "patch_stride": list(v.strides),
                    "patch_padding": list(v.paddings), "mlp": list(v.mlp), "window_size": v.window,
                    "patch_prenorm": [i > 0 for i in range(len(v.dims))], "projection_dim": t.width,
                    "image_pos_embed": {"type": "learned_abs_2d", "max_pos_embeddings": v.positions},
                    "visual_temporal_embedding": {"type": "COSINE", "max_temporal_embeddings": v.temporal},
                    "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"],
                },
            },
            "hidden_size": p.width, "depth": p.depth, "num_heads": p.heads, "mlp_dim": p.mlp,
            "num_domains": self.num_domains, "len_soft_prompts": self.len_soft_prompts, "dim_time": self.dim_time,
            "max_len_seq": self.max_len_seq, "use_hetero_proj": self.hetero_proj, "action_mode": self.action_mode,
            "max_action_dim": self.action_dim, "max_state_dim": self.proprio_dim or None,
            "use_proprio": self.proprio_dim > 0, "chunk_size": self.horizon, "num_denoising_steps": self.steps,
            "n_action_steps": self.n_action_steps, "num_image_views": self.num_views,
            "empty_cameras": self.empty_cameras, "image_resolution": list(v.image_size),
            "resize_imgs_with_padding": self.resize_imgs_with_padding and list(self.resize_imgs_with_padding),
            "tokenizer_name": self.tokenizer_name, "tokenizer_max_length": self.tokenizer_max_length,
            "tokenizer_padding_side": self.tokenizer_padding_side, "domain_feature_key": self.domain_feature_key,
            "normalization_mapping": dict(self.normalization_mapping), "input_features": inputs,
            "output_features": {"action": {"type": "ACTION", "shape": [self.robot_dim]}},
        }  # fmt: skip


def _florence(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of Florence-2 in one flat object: text keys as they are, vision keys under `vision`."""
    given = values.get("florence_config", {})
    if not isinstance(given, Mapping):
        raise ConfigError(f"florence_config = {show(given)}; an object is needed")
    out = {key: value for key, value in given.items() if value is not None}
    language, vision = out.pop("text_config", {}), out.pop("vision_config", {})
    for key, part in (("text_config", language), ("vision_config", vision)):
        if not isinstance(part, Mapping):
            raise ConfigError(f"florence_config.{key} = {show(part)}; an object is needed")
    vision = {key: value for key, value in vision.items() if value is not None}
    if "embed_dim" in vision:
        vision.setdefault("dim_embed", vision["embed_dim"])
    for table, kind, alias, key in (
        ("image_pos_embed", "learned_abs_2d", "max_position_embeddings", "max_pos_embeddings"),
        ("visual_temporal_embedding", "COSINE", "max_temporal_embeddings", "max_temporal_embeddings"),
    ):
        inner = vision.get(table, {})
        if not isinstance(inner, Mapping) or inner.get("type", kind) != kind:
            raise ConfigError(f"vision_config.{table} = {show(inner)}; only type {kind!r} is supported")
        found = inner.get(key, inner.get("max", vision.get(alias)))
        if found is not None:
            vision[key] = found
    return {key: value for key, value in {**out, **language}.items() if value is not None} | {"vision": vision}


_UNSUPPORTED = {
    "scale_embedding": False, "activation_function": "gelu", "encoder_layerdrop": 0.0, "normalize_before": False,
}  # fmt: skip
_UNSUPPORTED_VISION = {
    "qkv_bias": True, "activation_function": "gelu", "in_channels": 3, "conv_at_attn": True, "conv_at_ffn": True,
    "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"],
}  # fmt: skip


def _state_florence(florence: Mapping[str, Any], sizes: Sizes) -> None:
    vision = florence["vision"]
    for label, part, only in (
        ("text_config", florence, _UNSUPPORTED),
        ("vision_config", vision, _UNSUPPORTED_VISION),
    ):
        for key, value in only.items():
            if key in part and part[key] != value:
                raise ConfigError(f"{label}.{key} = {show(part[key])} is not supported; only {value!r} is")
    for key in ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "vocab_size",
                "max_position_embeddings"):  # fmt: skip
        if key in florence:
            sizes.state(key, florence[key], key)
    for key in ("window_size", "max_pos_embeddings", "max_temporal_embeddings"):
        if key in vision:
            sizes.state(key, vision[key], key)
    if "projection_dim" in vision:
        sizes.add("d_model", integer("vision_config.projection_dim", vision["projection_dim"], 1, 1 << 16),
                  "config key vision_config.projection_dim")  # fmt: skip
    count = None
    for key in ("dim_embed", "depths", "num_heads", "num_groups", "patch_size", "patch_stride", "patch_padding", "mlp"):
        given = vision.get(key)
        if given is None:
            continue
        if not isinstance(given, (list, tuple)) or not 1 <= len(given) <= MAX_STAGES:
            raise ConfigError(f"vision_config.{key} = {show(given)}; one size per stage is needed")
        count = count or len(given)
        if len(given) != count:
            raise ConfigError(f"vision_config.{key} has {len(given)} stages, other keys have {count}")
        for stage, value in enumerate(given):
            sizes.state(f"{key}[{stage}]", value, f"{key}[{stage}]")
    prenorm = vision.get("patch_prenorm")
    if prenorm is not None and list(prenorm if isinstance(prenorm, (list, tuple)) else [prenorm]) != [
        i > 0 for i in range(count or 4)
    ]:
        raise ConfigError(f"vision_config.patch_prenorm = {show(prenorm)}; only false, then true is supported")
    if "mlp_ratio" in vision and "dim_embed" in vision:
        ratio = number("vision_config.mlp_ratio", vision["mlp_ratio"], 0.0, 64.0)
        for stage in range(len(vision["dim_embed"])):
            sizes.add(f"mlp[{stage}]", int(sizes[f"dim_embed[{stage}]"] * ratio), "config key vision_config.mlp_ratio")


def _stages(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """The per-stage sizes, where nobody stated them those of Florence-2-large."""
    count = next((i for i in range(MAX_STAGES) if sizes.get(f"dim_embed[{i}]") is None), MAX_STAGES) or 4
    for key, published in _STAGES.items():
        for stage in range(count):
            if stage < len(published):
                sizes.assume(f"{key}[{stage}]", published[stage])
    for stage in range(count):
        width = sizes[f"dim_embed[{stage}]"]
        for key in ("num_heads", "num_groups"):
            if sizes.get(f"{key}[{stage}]") is None and width % 32 == 0:
                sizes.assume(f"{key}[{stage}]", width // 32)
        sizes.assume(f"mlp[{stage}]", 4 * width)
    names = {"dims": "dim_embed", "depths": "depths", "heads": "num_heads", "groups": "num_groups", "mlp": "mlp",
             "kernels": "patch_size", "strides": "patch_stride", "paddings": "patch_padding"}  # fmt: skip
    return {name: tuple(sizes[f"{key}[{stage}]"] for stage in range(count)) for name, key in names.items()}


def _action_width(values: Mapping[str, Any], mode: str, sizes: Sizes, assume: bool) -> None:
    fixed = ACTION_MODES[mode].dim
    if fixed is not None:
        sizes.add("action_dim", fixed, f"action_mode {mode}")
    elif "max_action_dim" in values:
        sizes.add(
            "action_dim", integer("max_action_dim", values["max_action_dim"], 1, 4096), "config key max_action_dim"
        )
    elif assume:
        sizes.assume("action_dim", 20)


def _from_tensors(source: Source, sizes: Sizes, stated: bool | None) -> bool:
    """Sizes as the tensors show them, under canonical names; returns use_hetero_proj."""
    keys = source.keys()

    def shape(name: str, rank: int) -> tuple[int, ...]:
        found = source.info(name).shape
        if len(found) != rank or 0 in found:
            raise CheckpointError(f"tensor {name!r} has shape {list(found)}; {rank} sizes above zero are needed")
        return found

    def count(prefix: str, who: str, key: str) -> int:
        pattern = re.compile(re.escape(prefix) + r"(\d{1,5})\.")
        return sizes.add(key, len({m[1] for name in keys if (m := pattern.match(name))}), f"the number of {who}")

    def add(name: str, *axes: str) -> tuple[int, ...]:
        found = shape(name, len(axes))
        for key, value in zip(axes, found):
            if key:
                sizes.add(key, value, f"tensor {name}")
        return found

    stages = len({m[1] for name in keys if (m := re.match(re.escape(VISION) + r"convs\.(\d{1,3})\.", name))})
    if not 1 <= stages <= MAX_STAGES:
        raise CheckpointError(f"the vision tower has {stages} stages; 1 to {MAX_STAGES} are supported")
    for s in range(stages):
        add(f"{VISION}convs.{s}.conv.weight", f"dim_embed[{s}]", "", f"patch_size[{s}]", f"patch_size[{s}]")
        count(f"{VISION}blocks.{s}.", f"blocks of stage {s}", f"depths[{s}]")
        add(f"{VISION}blocks.{s}.0.spatial_block.ffn.fc1.weight", f"mlp[{s}]", f"dim_embed[{s}]")
    last = f"dim_embed[{stages - 1}]"
    add(f"{PROJECTOR}image_projection.weight", "d_model", last)
    add(f"{PROJECTOR}image_position_embed.row_embeddings.weight", "max_pos_embeddings", "")
    if f"{PROJECTOR}visual_temporal_embed.pos_idx_to_embed" in keys:
        add(f"{PROJECTOR}visual_temporal_embed.pos_idx_to_embed", "max_temporal_embeddings", last)
    add(f"{LANGUAGE}shared.weight", "vocab_size", "d_model")
    rows, _ = add(f"{LANGUAGE}encoder.embed_positions.weight", "", "d_model")
    sizes.add("max_position_embeddings", rows - POSITION_OFFSET, f"tensor {LANGUAGE}encoder.embed_positions.weight")
    count(f"{LANGUAGE}encoder.layers.", "layers of the language encoder", "encoder_layers")
    add(f"{LANGUAGE}encoder.layers.0.fc1.weight", "encoder_ffn_dim", "d_model")

    _, _, width = add(f"{POLICY}pos_emb", "", "max_len_seq", "hidden_size")
    count(f"{POLICY}blocks.", "blocks of the policy", "depth")
    add(f"{POLICY}blocks.0.mlp.fc1.weight", "mlp_dim", "hidden_size")
    _, action = add(f"{POLICY}action_decoder.bias.weight", "num_domains", "action_dim")
    if f"{POLICY}soft_prompt_hub.weight" in keys:
        _, prompts = add(f"{POLICY}soft_prompt_hub.weight", "num_domains", "")
        sizes.add("len_soft_prompts", prompts // width, f"tensor {POLICY}soft_prompt_hub.weight")
    else:
        sizes.add("len_soft_prompts", 0, "the absence of soft_prompt_hub")
    _, entries = add(f"{POLICY}action_encoder.fc.weight", "num_domains", "")
    # Its inputs are the action, the state and the time, so the width of the state is what is left.
    left = entries // width - action - sizes.assume("dim_time", 32)
    sizes.add("max_state_dim", left, f"tensor {POLICY}action_encoder.fc.weight")
    hetero = f"{POLICY}vlm_proj.fc.weight" in keys
    if stated is not None and stated != hetero:
        raise ConfigError(f"use_hetero_proj is {stated}, the tensors of {POLICY}vlm_proj say otherwise")
    return hetero


def _image_size(
    values: Mapping[str, Any],
    resize: tuple[int, int] | None,
    inputs: Mapping[str, tuple[str, tuple[int, ...]]],
    cameras: list[str],
) -> tuple[int, int]:
    if "image_resolution" in values:
        return pair("image_resolution", values["image_resolution"], 1, 4096)
    if resize is not None:
        return resize
    if not cameras:
        return 224, 224
    shape = inputs[cameras[0]][1]
    if len(shape) != 3 or shape[0] != 3:
        raise ConfigError(f"input_features.{cameras[0]}.shape = {list(shape)}; [3, height, width] is needed")
    return pair(f"input_features.{cameras[0]}.shape", shape[1:], 1, 4096)


def _check(c: XVLAConfig) -> None:
    """Relations between values; single values are in range by now."""
    v = c.vision
    pairs = [
        ("d_model", c.language.width, "encoder_attention_heads", c.language.heads),
        ("hidden_size", c.policy.width, "num_heads", c.policy.heads),
    ]
    for s, width in enumerate(v.dims):
        pairs += [(f"dim_embed[{s}]", width, f"num_heads[{s}]", v.heads[s]),
                  (f"dim_embed[{s}]", width, f"num_groups[{s}]", v.groups[s])]  # fmt: skip
    for name, whole, part_name, part in pairs:
        if whole % part:
            raise ConfigError(f"{name} = {whole} is not a multiple of {part_name} = {part}")
    if c.dim_time % 2:
        raise ConfigError(f"dim_time = {c.dim_time} is odd; sinusoids come in pairs")
    for s, grid in enumerate(v.grids):
        if min(grid) < 1:
            raise ConfigError(f"images of {v.image_size[0]} x {v.image_size[1]} leave nothing for stage {s}")
    if max(v.grids[-1]) > v.positions:
        raise ConfigError(f"images of {v.image_size[0]} x {v.image_size[1]} give a grid of {v.grids[-1]}; the position "
                          f"tables end at {v.positions}: resize the images (resize_imgs_with_padding)")  # fmt: skip
    if v.tokens + c.tokenizer_max_length > c.language.positions:
        raise ConfigError(f"one view and the text are {v.tokens + c.tokenizer_max_length} tokens, "
                          f"max_position_embeddings is {c.language.positions}")  # fmt: skip
    if c.horizon + c.context > c.max_len_seq:
        raise ConfigError(
            f"actions, images and text are {c.horizon + c.context} tokens, max_len_seq is {c.max_len_seq}; "
            "use fewer views, smaller images or a shorter tokenizer_max_length"
        )
    if c.robot_dim > c.action_dim:
        raise ConfigError(f"output_features.action has {c.robot_dim} values, the model's actions have {c.action_dim}")
    if c.n_action_steps > c.horizon:
        raise ConfigError(f"n_action_steps = {c.n_action_steps} is more than chunk_size = {c.horizon}")
    entries = c.num_domains * c.policy.width * (c.len_soft_prompts + c.action_dim * 2 + c.proprio_dim + c.dim_time)
    if c.hetero_proj:
        entries += 2 * c.num_domains * c.policy.width * c.language.width
    blocks = sum(d * 2 * w * (4 * w + 2 * m) for d, w, m in zip(v.depths, v.dims, v.mlp))
    blocks += sum(p.depth * p.width * (4 * p.width + 2 * p.mlp) for p in (c.language, c.policy))
    total = entries + blocks + c.language.vocab_size * c.language.width
    if total > MAX_PARAMETERS:
        raise ConfigError(f"these values describe {total:.3g} parameters; at most {MAX_PARAMETERS:.3g} are allowed")
