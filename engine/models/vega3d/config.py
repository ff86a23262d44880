"""Configuration of VEGA-3D's multimodal language models: LLaVA-Video (SigLIP, Qwen2) and Qwen2.5-VL."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.blocks.observation.images import MAX_SIDE
from engine.blocks.qwen_language import LanguageConfig
from engine.blocks.qwen_vision import QwenVisionConfig
from engine.blocks.scene import Voxels, fit_width, smart_resize
from engine.blocks.siglip import SiglipConfig
from engine.errors import ConfigError, InputError
from engine.io.files import read_json
from engine.io.values import choice, integer, number, show, token_ids
from engine.models.vega3d.generator_config import MAX_CONFIG_BYTES, Tap

#: feature_fusion_method by blend of `gated_fuse`.
BLENDS = {"token_gated": "normed", "token_gated_raw": "raw", "token_gated_residual": "residual"}
GENERATORS = ("wan_t2v", "wan_t2v_online", "wan_vace_online", "wan_vace")
DTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
SPATIAL = "qwen2_5_vl"  # model_type of variant B
FRAME_SIZE = (640, 480)  # (width, height) that variant B is loaded for by default
FIT_WIDTH = 518  # pixels that it brings frames to
OBJECTS = 64  # boxes that are scored at once
TEMPERATURE, MASS = 0.07, 0.4  # of grounding several boxes

# Every size: allowed range and default (of the published model).
_SIGLIP: dict[str, tuple[int, int, int]] = {
    "hidden_size": (2, 1 << 14, 1152),
    "num_hidden_layers": (1, 1024, 26),
    "num_attention_heads": (1, 1 << 10, 16),
    "intermediate_size": (1, 1 << 17, 4304),
    "patch_size": (1, 256, 14),
    "image_size": (1, 4096, 384),
}

_QWEN: dict[str, tuple[int, int, int]] = {
    "hidden_size": (4, 1 << 14, 1280),
    "depth": (1, 1024, 32),
    "num_heads": (1, 1 << 10, 16),
    "intermediate_size": (1, 1 << 17, 3420),
    "out_hidden_size": (1, 1 << 14, 3584),
    "patch_size": (1, 256, 14),
    "spatial_merge_size": (2, 2, 2),
    "window_size": (1, 4096, 112),
}


@dataclass(frozen=True)
class VegaConfig:
    """What both variants have.

    frames: of a scene. blend: of the fusion (`gated_fuse`). generative: channels of the generator's features. tap: how
    they are taken; seed: of their noise. dtype: of the checkpoint.
    """

    language: LanguageConfig
    frames: int = 32
    blend: str = "normed"
    generative: int = 1536
    tap: Tap = field(default_factory=Tap)
    seed: int = 0
    dtype: str = "bf16"

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of visual tokens of a frame."""
        raise NotImplementedError

    @property
    def cells(self) -> int:
        """Visual tokens of a frame, newlines left out."""
        return self.grid[0] * self.grid[1]

    @property
    def lines(self) -> int:
        """Embeddings of a frame."""
        return self.cells

    @staticmethod
    def from_json(o: dict[str, Any], keys: Iterable[str] = (), frame_size: tuple[int, int] | None = None) -> VegaConfig:
        """From config.json and the names of the tensors (which tell what is there). frame_size: (width, height) of the
        frames that a model of variant B is loaded for."""
        if o.get("model_type") == SPATIAL:
            return SpatialConfig.read(o, frame_size)
        if frame_size is not None:
            raise InputError("frame_size= is for Qwen2.5-VL; this model takes frames of any size")
        return SceneConfig.read(o, set(keys))

    @staticmethod
    def from_folder(
        folder: Path, keys: Iterable[str] = (), frame_size: tuple[int, int] | None = None
    ) -> VegaConfig:  # fmt: skip
        """config.json of a folder; ends of answers also from generation_config.json."""
        o = read_json(folder / "config.json", limit=MAX_CONFIG_BYTES, error=ConfigError)
        if not isinstance(o, dict):
            raise ConfigError(f"{folder / 'config.json'} is not a JSON object")
        path = folder / "generation_config.json"
        if path.exists():
            more = read_json(path, limit=MAX_CONFIG_BYTES, error=ConfigError)
            ends = [o.get("eos_token_id"), more.get("eos_token_id") if isinstance(more, dict) else None]
            o = o | {"eos_token_id": [i for e in ends if e is not None for i in (e if isinstance(e, list) else [e])]}
        return VegaConfig.from_json(o, keys, frame_size)


def _common(o: dict[str, Any], grid: tuple[int, int] | None, size: str, blend: str) -> dict[str, Any]:
    """Fields of VegaConfig."""
    return {
        "language": LanguageConfig.from_json(o),
        "frames": integer("frames_upbound", o.get("frames_upbound", 32), 1, 1024),
        "blend": blend,
        "generative": integer("generative_feat_dim", o.get("generative_feat_dim", 1536), 1, 1 << 14),
        "tap": _tap(o, grid, size),
        "seed": integer("generative_noise_seed", o.get("generative_noise_seed", 0), 0, (1 << 63) - 1),
        "dtype": DTYPES.get(str(o.get("torch_dtype", o.get("dtype"))), "bf16"),
    }


@dataclass(frozen=True)
class SceneConfig(VegaConfig):
    """Variant A, 3D scene understanding: SigLIP, pooled by `stride`, world coordinates, boxes.

    voxels: that position codes count in; coded: whether the model was trained with codes. coord, ground: token ids of
    `<coord>` and `<ground>`; grounding: whether its heads are there.
    """

    vision: SiglipConfig = field(default_factory=lambda: SiglipConfig(1152, 26, 16, 4304, 14, 384))
    stride: int = 2
    voxels: Voxels = field(default_factory=Voxels)
    coded: bool = True
    coord: int | None = None
    ground: int | None = None
    grounding: bool = False

    @property
    def side(self) -> int:
        """Visual tokens along an edge of a frame."""
        return -(-self.vision.side // self.stride)

    @property
    def grid(self) -> tuple[int, int]:
        return self.side, self.side

    @property
    def lines(self) -> int:
        """A newline stands behind each row."""
        return self.side * (self.side + 1)

    @property
    def cell_pixels(self) -> int:
        """Edge in pixels of what a visual token stands for in world coordinates."""
        return self.vision.side * self.vision.patch_size // self.side

    @staticmethod
    def read(o: dict[str, Any], names: set[str]) -> SceneConfig:
        s = _sizes("vision_config", o.get("vision_config", {}), _SIGLIP)
        if s["hidden_size"] % s["num_attention_heads"] or s["image_size"] < s["patch_size"]:
            raise ConfigError("vision_config: heads must divide the channels, and a patch fit into the image")
        layers = {int(m[1]) for k in names if (m := _LAYER.match(k))}
        vision = SiglipConfig(s["hidden_size"], len(layers) or s["num_hidden_layers"], s["num_attention_heads"],
                              s["intermediate_size"], s["patch_size"], s["image_size"])  # fmt: skip
        for key, want in (("mm_projector_type", "mlp2x_gelu"), ("generative_projector_type", "mlp2x_gelu"),
                          ("mm_spatial_pool_mode", "bilinear"), ("mm_newline_position", "grid")):  # fmt: skip
            choice(key, o.get(key, want), (want,))
        method = choice("feature_fusion_method", o.get("feature_fusion_method", "token_gated"), BLENDS)
        choice("generative_vision_tower_type", o.get("generative_vision_tower_type", GENERATORS[0]), GENERATORS)
        stride = integer("mm_spatial_pool_stride", o.get("mm_spatial_pool_stride", 2), 1, vision.side)
        side = -(-vision.side // stride)
        kind = o.get("world_position_embedding_type", "avg-discrete-sin3d")
        coded = kind not in (None, "none")
        if coded:
            choice("world_position_embedding_type", kind, ("avg-discrete-sin3d",))
        common = _common(o, (side, side), "1280*720", BLENDS[method])
        vocab = common["language"].vocab
        return SceneConfig(
            **common, vision=vision, stride=stride, voxels=_voxels(o), coded=coded,
            coord=_one("coord_token_ids", o, vocab), ground=_one("ground_token_ids", o, vocab),
            grounding="ground_head_zero_target" in names,
        )  # fmt: skip


@dataclass(frozen=True)
class SpatialConfig(VegaConfig):
    """Variant B, spatial reasoning: Qwen2.5-VL on frames of one size, pictures alone.

    frame_size: (width, height) of frames that come in; fitted: (height, width) that they are brought to for the
    generator, and from there to `vision.size` for the tower. hidden: width of the generative merger.
    """

    vision: QwenVisionConfig = field(default_factory=lambda: QwenVisionConfig(1280, 32, 16, 3420, 3584, (30, 38)))
    frame_size: tuple[int, int] = FRAME_SIZE
    fitted: tuple[int, int] = (392, 504)
    hidden: int = 4096

    @property
    def grid(self) -> tuple[int, int]:
        return self.vision.merged

    @staticmethod
    def read(o: dict[str, Any], frame_size: tuple[int, int] | None) -> SpatialConfig:
        if not o.get("use_generative_encoder"):
            raise ConfigError(
                "config.json has no use_generative_encoder: this is a plain Qwen2.5-VL, not a VEGA-3D checkpoint"
            )
        choice("generative_merger_type", o.get("generative_merger_type", "mlp"), ("mlp",))
        method = choice("generative_fusion_method", o.get("generative_fusion_method", "token_gated_residual"), BLENDS)
        tower = o.get("generative_encoder_tower_type", o.get("generative_vision_tower_type", GENERATORS[0]))
        choice("generative_encoder_tower_type", tower, GENERATORS)
        v = o.get("vision_config", {})
        s = _sizes("vision_config", v, _QWEN)
        full = v.get("fullatt_block_indexes", [7, 15, 23, 31])
        if not isinstance(full, list) or not all(type(i) is int and 0 <= i < s["depth"] for i in full):
            raise ConfigError(f"vision_config.fullatt_block_indexes = {show(full)}; layers below {s['depth']}")
        cell = s["patch_size"] * s["spatial_merge_size"]
        if s["hidden_size"] % s["num_heads"] or s["hidden_size"] // s["num_heads"] % 4 or s["window_size"] % cell:
            raise ConfigError("vision_config: heads must divide the channels by a multiple of 4, and a window be whole "
                              f"tokens of {cell} pixels")  # fmt: skip
        width, height = frame_size = _frame_size(FRAME_SIZE if frame_size is None else frame_size)
        _, h, w, _ = fit_width(np.zeros((1, height, width, 3), np.uint8), FIT_WIDTH, s["patch_size"]).shape
        low, high = _pixels(o, "min_pixels", 256 * 28 * 28), _pixels(o, "max_pixels", 1_605_632)
        rows, columns = (n // s["patch_size"] for n in smart_resize(h, w, cell, low, high))
        vision = QwenVisionConfig(
            s["hidden_size"], s["depth"], s["num_heads"], s["intermediate_size"], s["out_hidden_size"], (rows, columns),
            s["patch_size"], s["spatial_merge_size"], s["window_size"] // cell, tuple(full),
        )  # fmt: skip
        common = _common(o, None, "832*480", BLENDS[method])
        if vision.out != common["language"].width or common["language"].sections is None:
            raise ConfigError(
                f"vision_config.out_hidden_size {vision.out} is not hidden_size, or rope_scaling has no mrope_section"
            )
        hidden = integer("generative_merger_hidden_dim", o.get("generative_merger_hidden_dim", 4096), 1, 1 << 16)
        return SpatialConfig(**common, vision=vision, frame_size=frame_size, fitted=(h, w), hidden=hidden)


def _sizes(name: str, value: Any, known: dict[str, tuple[int, int, int]]) -> dict[str, int]:
    if not isinstance(value, dict):
        raise ConfigError(f"{name} = {show(value)} is not a JSON object")
    return {k: integer(f"{name}.{k}", value.get(k, d), low, high) for k, (low, high, d) in known.items()}


def _frame_size(value: Any) -> tuple[int, int]:
    pair = isinstance(value, (list, tuple)) and len(value) == 2
    if not pair or not all(type(n) is int and 16 <= n <= MAX_SIDE for n in value):
        raise InputError(f"frame_size={value!r} is not (width, height) of 16 to {MAX_SIDE} pixels")
    return value[0], value[1]


def _pixels(o: dict[str, Any], key: str, default: int) -> int:
    return integer(key, o.get(key, default), 1, 1 << 26)


_LAYER = re.compile(r"model\.vision_tower\.vision_tower\.vision_model\.encoder\.layers\.(\d+)\.layer_norm1\.weight$")


def _tap(o: dict[str, Any], grid: tuple[int, int] | None, default: str) -> Tap:
    name = "generative_vision_tower"
    d, size = Tap(), o.get(f"{name}_size", default)
    match = re.fullmatch(r"(\d{1,5})[*x](\d{1,5})", size) if isinstance(size, str) else None
    if match is None:
        raise ConfigError(f"{name}_size = {show(size)}; WIDTH*HEIGHT is needed")
    return Tap(
        (int(match[1]), int(match[2])),
        integer(f"{name}_timestep", o.get(f"{name}_timestep", d.timestep), 0, 1000),
        number(f"{name}_shift", o.get(f"{name}_shift", d.shift), 0.0, 1000.0),
        integer(f"{name}_feat_block_idx", o.get(f"{name}_feat_block_idx", d.block), -1024, 1024),
        grid=grid,
        context_scale=number(f"{name}_context_scale", o.get(f"{name}_context_scale", d.context_scale), -1e3, 1e3),
    )


def _voxels(o: dict[str, Any]) -> Voxels:
    d = Voxels()
    try:
        return Voxels(o.get("min_xyz_range", d.low), o.get("max_xyz_range", d.high), o.get("voxel_size", d.size))
    except InputError as fault:
        raise ConfigError(f"min_xyz_range, max_xyz_range, voxel_size: {fault}") from fault


def _one(key: str, o: dict[str, Any], vocab: int) -> int | None:
    ids = token_ids(key, o.get(key), vocab)
    if len(ids) > 1:
        raise ConfigError(f"{key} = {show(o[key])}; one id is needed")
    return ids[0] if ids else None
