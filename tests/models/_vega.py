"""Random weights of VEGA-3D's parts without a peer, and how tests load them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import tokenizers
from _source import Tensors

from engine.io.text import Tokenizer
from engine.models.vega3d.config import SceneConfig, VegaConfig
from engine.models.vega3d.features import Files, GeneratorFeatures
from engine.models.vega3d.generator_config import DitConfig, VaeConfig
from engine.models.vega3d.generator_weights import dit_shapes, vae_shapes
from engine.models.vega3d.model import Options, Vega3D
from engine.models.vega3d.weights import shapes


def filled(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Tensors:
    """Random fp32 tensors: norms around one, the rest by fan-in."""
    rng, values = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        noise = rng.standard_normal(shape).astype(np.float32)
        one = ("norm" in name or "gamma" in name) and not name.endswith("bias")
        scale = 0.1 if one or len(shape) < 2 else float(np.prod(shape[1:])) ** -0.5
        values[name] = one + np.float32(scale) * noise
    return Tensors(values)


VAE = VaeConfig(dim=8, z=4, mult=(1, 2), blocks=1, mean=(0.1, -0.2, 0.3, 0.0), std=(1.5, 0.7, 2.0, 1.0))
DIT = DitConfig(dim=48, ffn=64, heads=2, layers=3, channels=4, freq_dim=32, text_dim=24)


VACE = replace(DIT, kind="vace", vace_layers=(0, 1), vace_channels=12)


def random_generator(
    device: str = "cpu", dtype: str = "fp32", *, dit: DitConfig = DIT, tokens: int = 1, **options
) -> GeneratorFeatures:
    """A small generator on frames of 24 x 16, tapped behind block 1. tokens: of its prompt."""
    prompt = np.random.default_rng(9).standard_normal((tokens, dit.text_dim)).astype(np.float32)
    files = Files(dit, VAE, filled(dit_shapes(dit), 1), filled(vae_shapes(VAE), 2), prompt)
    given = {"size": (24, 16), "block": 1, "grid": (2, 3), "max_pixels": 4096, "progress": False} | options
    return GeneratorFeatures.load(Path("random"), source=files, device=device, dtype=dtype, **given)


# ------------------------------------------------------------------------------------------------------ scenes
CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<ground>", "<coord>", "<|vision_start|>",
        "<|vision_end|>")  # fmt: skip
LANGUAGE = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
            "num_hidden_layers": 2, "vocab_size": 264, "rope_theta": 1e4, "max_position_embeddings": 512}  # fmt: skip
EYES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 40, "num_hidden_layers": 2, "patch_size": 4,
        "image_size": 22}  # fmt: skip
SCENE = {"vision_config": EYES, "frames_upbound": 4, "generative_feat_dim": DIT.dim, "eos_token_id": 258,
         "generative_vision_tower_size": "24*16", "generative_vision_tower_feat_block_idx": 1,
         "coord_token_ids": [261], "ground_token_ids": [260], "voxel_size": 0.25, "min_xyz_range": [-3, -3, -1],
         "max_xyz_range": [3, 3, 3], "torch_dtype": "float32"}  # fmt: skip


def tokenizer() -> Tokenizer:
    """Bytes, and the special tokens of the chat from 256 on."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in CHAT])
    return Tokenizer(inner)


def scene_weights(config: VegaConfig, seed: int = 0) -> Tensors:
    """Every tensor of a model, of variant A with heads for grounding."""
    made = filled(shapes(replace(config, grounding=True) if isinstance(config, SceneConfig) else config), seed)
    for name, value in made.tensors.items():
        # A text of bytes: without this the answers would end at once or never vary.
        if name == "model.embed_tokens.weight":
            value *= 4
    return made


def random_model(source: Tensors | None = None, generator: object = "random", **options) -> Vega3D:
    """A small model of a scene of 4 frames, 3 x 3 visual tokens each; `config`: further keys of config.json."""
    o = LANGUAGE | SCENE | options.pop("config", {})
    plain = VegaConfig.from_json(o)
    source = source or scene_weights(plain)
    config = VegaConfig.from_json(o, source.keys())
    if generator == "random":
        grid = (config.side,) * 2
        generator = random_generator(grid=grid, dtype="fp32", max_pixels=config.vision.image_size**2)
    given = Options.of(config, **{"coord_dtype": "fp32", "feature_cache": 1 << 24, "prefix_cache": 1 << 24} | options)
    return Vega3D(config, source, given, generator=generator, tokenizer=tokenizer(), progress=False)


SPATIAL = LANGUAGE | {
    "model_type": "qwen2_5_vl", "use_generative_encoder": True, "eos_token_id": 258, "torch_dtype": "float32",
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}, "frames_upbound": 4,
    "generative_feat_dim": DIT.dim, "generative_vision_tower_size": "24*16", "generative_merger_hidden_dim": 40,
    "generative_vision_tower_feat_block_idx": 1, "min_pixels": 1, "max_pixels": 240,
    "vision_config": {"hidden_size": 32, "num_heads": 2, "depth": 3, "intermediate_size": 40, "out_hidden_size": 48,
                      "patch_size": 2, "window_size": 8, "fullatt_block_indexes": [1]},
}  # fmt: skip


def random_spatial(source: Tensors | None = None, generator: object = "random", **options) -> Vega3D:
    """A small model of variant B on frames of 30 x 20, 3 x 4 visual tokens each."""
    o = SPATIAL | options.pop("config", {})
    config = VegaConfig.from_json(o, frame_size=(30, 20))
    if generator == "random":
        generator = random_generator(grid=None, dtype="fp32", max_pixels=518 * 518)
    given = Options.of(config, **{"feature_cache": 1 << 24, "prefix_cache": 1 << 24} | options)
    source = source or scene_weights(config)
    return Vega3D(config, source, given, generator=generator, tokenizer=tokenizer(), progress=False)


def geometry(frames: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    """Depth maps and poses of a camera that turns in a room, as `scene` takes them."""
    rng = np.random.default_rng(seed)
    depth = rng.integers(800, 2500, (frames, 12, 16)).astype(np.uint16)
    poses = np.tile(np.eye(4), (frames, 1, 1))
    for i, angle in enumerate(np.linspace(0, 0.6, frames)):
        poses[i, :2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return {"depth": depth, "poses": poses, "intrinsics": np.array([[14.0, 0, 8], [0, 14, 6], [0, 0, 1]])}


def pictures(frames: int = 4, seed: int = 0) -> np.ndarray:
    """[frames, 20, 30, 3] uint8."""
    return np.random.default_rng(seed).integers(0, 256, (frames, 20, 30, 3)).astype(np.uint8)
