"""Configuration of VEGA-3D's multimodal language model (LLaVA-Video with Qwen2 and SigLIP)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.blocks.scene import Voxels
from engine.blocks.siglip import SiglipConfig
from engine.errors import ConfigError, InputError
from engine.io.files import read_json
from engine.io.values import choice, flag, integer, number, show, token_ids
from engine.models.vega3d.generator_config import MAX_CONFIG_BYTES, Tap

#: feature_fusion_method by blend of `gated_fuse`.
BLENDS = {"token_gated": "normed", "token_gated_raw": "raw", "token_gated_residual": "residual"}
GENERATORS = ("wan_t2v", "wan_t2v_online", "wan_vace_online", "wan_vace")
DTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
OBJECTS = 64  # boxes that are scored at once
TEMPERATURE, MASS = 0.07, 0.4  # of grounding several boxes

# Every size: allowed range and default (of the published 7B model; None: needed).
_SIZES: dict[str, tuple[int, int, int | None]] = {
    "hidden_size": (8, 1 << 14, None),
    "num_hidden_layers": (1, 1024, None),
    "num_attention_heads": (1, 1 << 10, None),
    "num_key_value_heads": (1, 1 << 10, None),
    "intermediate_size": (1, 1 << 17, None),
    "vocab_size": (1, 1 << 22, None),
    "max_position_embeddings": (16, 1 << 24, 32768),
}
_VISION: dict[str, tuple[int, int, int]] = {
    "hidden_size": (2, 1 << 14, 1152),
    "num_hidden_layers": (1, 1024, 26),
    "num_attention_heads": (1, 1 << 10, 16),
    "intermediate_size": (1, 1 << 17, 4304),
    "patch_size": (1, 256, 14),
    "image_size": (1, 4096, 384),
}


@dataclass(frozen=True)
class LanguageConfig:
    """Qwen2. eos: ids that end an answer."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    eps: float = 1e-6
    theta: float = 1e6
    positions: int = 32768
    tied: bool = False
    eos: tuple[int, ...] = ()

    @staticmethod
    def from_json(o: dict[str, Any]) -> LanguageConfig:
        """From transformers' keys; ConfigError names what does not fit."""
        sizes = {}
        for key, (low, high, default) in _SIZES.items():
            if key not in o and default is None:
                raise ConfigError(f"config.json has no {key}")
            sizes[key] = integer(key, o.get(key, default), low, high)
        width, heads, kv = sizes["hidden_size"], sizes["num_attention_heads"], sizes["num_key_value_heads"]
        head_dim = integer("head_dim", o["head_dim"], 2, 4096) if o.get("head_dim") else width // heads
        if heads % kv or head_dim % 2 or (not o.get("head_dim") and width % heads):
            raise ConfigError(
                f"{width} channels, {heads} heads, {kv} kv heads: kv heads must divide heads, heads the channels, and "
                "a head be even"
            )
        if o.get("use_sliding_window"):
            raise ConfigError("use_sliding_window is set; only full attention is supported")
        if o.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"hidden_act = {show(o['hidden_act'])}; only 'silu' is supported")
        rope = o.get("rope_parameters") or {}
        theta = o.get("rope_theta", rope.get("rope_theta", 10000.0) if isinstance(rope, dict) else 10000.0)
        vocab = sizes["vocab_size"]
        return LanguageConfig(
            width, sizes["num_hidden_layers"], heads, kv, head_dim, sizes["intermediate_size"], vocab,
            number("rms_norm_eps", o.get("rms_norm_eps", 1e-6), 0.0, 1.0), number("rope_theta", theta, 1.0, 1e12),
            sizes["max_position_embeddings"], flag("tie_word_embeddings", o.get("tie_word_embeddings", False)),
            token_ids("eos_token_id", o.get("eos_token_id"), vocab),
        )  # fmt: skip


@dataclass(frozen=True)
class VegaConfig:
    """Variant A, 3D scene understanding.

    frames: of a scene. stride: of the pooling of semantic tokens. blend: of the fusion (`gated_fuse`). generative:
    channels of the generator's features. tap: how they are taken; seed: of their noise. voxels: that position codes
    count in; coded: whether the model was trained with codes. coord, ground: token ids of `<coord>` and `<ground>`.
    """

    language: LanguageConfig
    vision: SiglipConfig
    frames: int = 32
    stride: int = 2
    blend: str = "normed"
    generative: int = 1536
    tap: Tap = field(default_factory=Tap)
    seed: int = 0
    voxels: Voxels = field(default_factory=Voxels)
    coded: bool = True
    coord: int | None = None
    ground: int | None = None
    grounding: bool = False
    dtype: str = "bf16"

    @property
    def side(self) -> int:
        """Visual tokens along an edge of a frame."""
        return -(-self.vision.side // self.stride)

    @property
    def cells(self) -> int:
        """Visual tokens of a frame, newlines left out."""
        return self.side**2

    @property
    def cell_pixels(self) -> int:
        """Edge in pixels of what a visual token stands for in world coordinates."""
        return self.vision.side * self.vision.patch_size // self.side

    @property
    def lines(self) -> int:
        """Embeddings of a frame, a newline behind each row."""
        return self.side * (self.side + 1)

    @staticmethod
    def from_json(o: dict[str, Any], keys: Iterable[str] = ()) -> VegaConfig:
        """From config.json and the names of the tensors (which tell whether grounding heads are there)."""
        language = LanguageConfig.from_json(o)
        v = o.get("vision_config", {})
        if not isinstance(v, dict):
            raise ConfigError(f"vision_config = {show(v)} is not a JSON object")
        s = {k: integer(f"vision_config.{k}", v.get(k, d), low, high) for k, (low, high, d) in _VISION.items()}
        if s["hidden_size"] % s["num_attention_heads"] or s["image_size"] < s["patch_size"]:
            raise ConfigError("vision_config: heads must divide the channels, and a patch fit into the image")
        names = set(keys)
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
        return VegaConfig(
            language, vision, integer("frames_upbound", o.get("frames_upbound", 32), 1, 1024), stride, BLENDS[method],
            integer("generative_feat_dim", o.get("generative_feat_dim", 1536), 1, 1 << 14), _tap(o, (side, side)),
            integer("generative_noise_seed", o.get("generative_noise_seed", 0), 0, (1 << 63) - 1), _voxels(o), coded,
            _one("coord_token_ids", o, language.vocab), _one("ground_token_ids", o, language.vocab),
            "ground_head_zero_target" in names, DTYPES.get(str(o.get("torch_dtype", o.get("dtype"))), "bf16"),
        )  # fmt: skip

    @staticmethod
    def from_folder(folder: Path, keys: Iterable[str] = ()) -> VegaConfig:
        """config.json of a folder; ends of answers also from generation_config.json."""
        o = read_json(folder / "config.json", limit=MAX_CONFIG_BYTES, error=ConfigError)
        if not isinstance(o, dict):
            raise ConfigError(f"{folder / 'config.json'} is not a JSON object")
        path = folder / "generation_config.json"
        if path.exists():
            more = read_json(path, limit=MAX_CONFIG_BYTES, error=ConfigError)
            ends = [o.get("eos_token_id"), more.get("eos_token_id") if isinstance(more, dict) else None]
            o = o | {"eos_token_id": [i for e in ends if e is not None for i in (e if isinstance(e, list) else [e])]}
        return VegaConfig.from_json(o, keys)


_LAYER = re.compile(r"model\.vision_tower\.vision_tower\.vision_model\.encoder\.layers\.(\d+)\.layer_norm1\.weight$")


def _tap(o: dict[str, Any], grid: tuple[int, int]) -> Tap:
    name = "generative_vision_tower"
    d, size = Tap(), o.get(f"{name}_size", "1280*720")
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
