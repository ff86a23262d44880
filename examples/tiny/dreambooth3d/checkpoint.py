"""The checkpoint's files, in the released layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from autoencoder import VAE
from clips import FRAMES
from flow import DIT
from solids import SIZE
from tokenizers import Tokenizer
from torch import Tensor
from vocabulary import LANGUAGE

from engine.io.checkpoint import f32_to_bf16, save

Weights = dict[str, Tensor]


def _save(path: Path, weights: Weights) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {k: f32_to_bf16(np.ascontiguousarray(v.float().numpy())) for k, v in sorted(weights.items())}
    save(path, {k: ("BF16", v) for k, v in values.items()}, {"format": "pt"})


def _config(folder: Path, **values: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def write(
    folder: Path, dit: Weights, vae: Weights, scaling: float, views: Weights, language: Weights, tok: Tokenizer
) -> None:
    """scaling: of latents, so that their deviation is one."""
    d, q, inside = DIT, LANGUAGE, folder / "transformer/480p_t2v"
    _config(inside, _class_name="HunyuanVideo_1_5_DiffusionTransformer", hidden_size=d.width, heads_num=d.heads,
            mm_double_blocks_depth=d.layers, num_refiner_layers=d.refiner_layers, mlp_width_ratio=d.mlp / d.width,
            in_channels=d.channels, out_channels=d.channels, text_states_dim=d.text_dim, vision_states_dim=d.vision_dim,
            glyph_byT5_v2=False, rope_dim_list=list(d.axes), rope_theta=d.theta, concat_condition=True,
            patch_size=[1, 1, 1], ideal_resolution=d.resolution, ideal_task="t2v", sample_size=[SIZE, SIZE],
            sample_frames=FRAMES)  # fmt: skip
    _save(inside / "diffusion_pytorch_model.safetensors", dit)
    _config(folder / "vae", _class_name="AutoencoderKLConv3D", block_out_channels=list(VAE.widths),
            layers_per_block=VAE.layers, latent_channels=VAE.z, ffactor_spatial=VAE.spatial,
            ffactor_temporal=VAE.temporal, scaling_factor=round(scaling, 6))  # fmt: skip
    _save(folder / "vae/diffusion_pytorch_model.safetensors", vae)
    _save(folder / "3dapter/pytorch_lora_weights.safetensors", views)
    text = folder / "text_encoder/llm"
    _config(text, model_type="qwen2", hidden_size=q.width, num_hidden_layers=q.layers, num_attention_heads=q.heads,
            num_key_value_heads=q.kv_heads, intermediate_size=q.mlp, vocab_size=q.vocab, rope_theta=q.theta,
            max_position_embeddings=q.positions, tie_word_embeddings=True)  # fmt: skip
    _save(text / "model.safetensors", language)
    tok.save(str(text / "tokenizer.json"))
