"""The checkpoint's files, as the published models have them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rooms import FRAMES
from tokenizers import Tokenizer
from torch import Tensor
from towers import DIT, EYES, TAP
from words import END, save_tokenizer

from engine.blocks.qwen_language import LanguageConfig
from engine.blocks.scene import Voxels
from engine.io.checkpoint import f32_to_bf16, save
from engine.models.vega3d.generator_config import VaeConfig


def _save(path: Path, weights: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {k: f32_to_bf16(np.ascontiguousarray(v.float().numpy())) for k, v in sorted(weights.items())}
    save(path, {k: ("BF16", v) for k, v in values.items()})


def _json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def model_config(c: LanguageConfig, tok: Tokenizer, voxels: Voxels) -> dict:
    """config.json, in the keys of LLaVA-Video and of VEGA-3D."""
    return {
        "model_type": "llava_qwen", "architectures": ["LlavaQwenForCausalLM"], "torch_dtype": "bfloat16",
        "hidden_size": c.width, "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads, "intermediate_size": c.mlp, "vocab_size": c.vocab, "rope_theta": c.theta,
        "max_position_embeddings": 1024, "tie_word_embeddings": c.tied, "eos_token_id": tok.token_to_id(END),
        "coord_token_ids": [tok.token_to_id("<coord>")], "ground_token_ids": [tok.token_to_id("<ground>")],
        "frames_upbound": FRAMES, "mm_projector_type": "mlp2x_gelu", "mm_spatial_pool_stride": 1,
        "mm_spatial_pool_mode": "bilinear", "mm_newline_position": "grid",
        "vision_config": {"hidden_size": EYES.width, "num_hidden_layers": EYES.depth, "patch_size": EYES.patch_size,
                          "num_attention_heads": EYES.heads, "intermediate_size": EYES.mlp,
                          "image_size": EYES.image_size},
        "feature_fusion_method": "token_gated", "generative_projector_type": "mlp2x_gelu",
        "generative_vision_tower_type": "wan_t2v", "generative_feat_dim": DIT.dim,
        "generative_vision_tower_size": f"{TAP.size[0]}*{TAP.size[1]}",
        "generative_vision_tower_timestep": TAP.timestep, "generative_vision_tower_shift": TAP.shift,
        "generative_vision_tower_feat_block_idx": TAP.block,
        "world_position_embedding_type": "none", "min_xyz_range": list(voxels.low), "max_xyz_range": list(voxels.high),
        "voxel_size": voxels.size,
    }  # fmt: skip


def write(
    folder: Path, c: LanguageConfig, tok: Tokenizer, weights: dict[str, Tensor],
    vae: tuple[VaeConfig, dict[str, Tensor]], dit: dict[str, Tensor], prompt: Tensor, voxels: Voxels,
) -> None:  # fmt: skip
    """The whole model: language model with its fusion and heads, tokenizer, and the generator in wan/."""
    _json(folder / "config.json", model_config(c, tok, voxels))
    _save(folder / "model.safetensors", weights)
    save_tokenizer(tok, folder)
    d, wan, (v, encoder) = DIT, folder / "wan", vae
    _json(wan / "config.json", {
        "_class_name": "WanModel", "model_type": "t2v", "dim": d.dim, "ffn_dim": d.ffn, "num_heads": d.heads,
        "num_layers": d.layers, "in_dim": d.channels, "out_dim": d.channels, "freq_dim": d.freq_dim,
        "text_len": d.text_len, "text_dim": d.text_dim, "eps": d.eps, "patch_size": [1, d.patch, d.patch],
    })  # fmt: skip
    _save(wan / "diffusion_pytorch_model.safetensors", dit)
    _save(wan / "wan_prompt_embedding.safetensors", {"context": prompt})
    o = asdict(v)
    _json(wan / "vae/config.json", {"base_dim": o["dim"], "z_dim": o["z"], "dim_mult": list(v.mult),
                                    "num_res_blocks": o["blocks"], "latents_mean": list(v.mean),
                                    "latents_std": list(v.std)})  # fmt: skip
    _save(wan / "vae/diffusion_pytorch_model.safetensors", encoder)
