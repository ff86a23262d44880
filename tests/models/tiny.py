"""A random tiny checkpoint in the published layout, made without torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from engine.io.checkpoint import f32_to_bf16, save
from engine.models.nemotron.config import NemotronConfig
from engine.models.nemotron.weights import tensor_shapes

CONFIG = NemotronConfig(
    vocab_size=300, hidden_size=64, pattern="MEM*E-ME", num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=16, n_groups=2, conv_kernel=4, n_routed_experts=8,
    num_experts_per_tok=3, moe_intermediate_size=64, moe_shared_expert_intermediate_size=64, intermediate_size=96,
    routed_scaling_factor=2.5, max_position_embeddings=2048, eos_token_ids=(2,), torch_dtype="float32",
)  # fmt: skip


def tensors(c: NemotronConfig = CONFIG, seed: int = 0, dtype: str = "F32") -> dict[str, tuple[str, np.ndarray]]:
    """Weights with every parameter away from its default, under the names on disk."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, shape in tensor_shapes(c).items():
        if name.endswith("A_log"):
            value = np.log(rng.uniform(1, 16, shape))
        elif name.endswith("dt_bias"):
            value = rng.normal(-3, 1, shape)
        elif "norm" in name:
            value = 1 + 0.1 * rng.standard_normal(shape)
        elif len(shape) == 1:
            value = 0.3 * rng.standard_normal(shape)
        else:
            value = rng.standard_normal(shape) / shape[-1] ** 0.5
        value = value.astype(np.float32)
        stored = name if name.startswith("lm_head") else f"backbone.{name}"
        out[stored] = (dtype, f32_to_bf16(value) if dtype == "BF16" else value)
    return out


def make(folder: Path, c: NemotronConfig = CONFIG, seed: int = 0, dtype: str = "F32") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(c.to_json()))
    save(folder / "model.safetensors", tensors(c, seed, dtype))
    return folder
