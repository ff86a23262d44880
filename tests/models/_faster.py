"""Golden data of the flow policies (tests/data/faster), and small random models of both.

pi0.5: outputs of the authors' JAX code at a tiny size. X-VLA: `out_const` of lerobot, the per-action times of the rule
that equals it where all times are equal.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.io.checkpoint import SafetensorsFile, save
from engine.models.pi05.config import Pi05Config
from engine.models.pi05.reference import Pi05Reference
from engine.models.pi05.weights import canonical as pi05_canonical
from engine.models.xvla.config import XVLAConfig
from engine.models.xvla.reference import XVLAReference
from engine.models.xvla.weights import canonical as xvla_canonical

DATA = Path(__file__).resolve().parents[1] / "data/faster"
PI05_JSON: dict[str, Any] = {"type": "pi05", "chunk_size": 50, "vision_num_heads": 2, "num_attention_heads": 8}
XVLA_JSON: dict[str, Any] = {
    "type": "xvla", "chunk_size": 30, "num_heads": 4, "tokenizer_max_length": 64,
    "florence_config": {
        "text_config": {"encoder_attention_heads": 2},
        "vision_config": {"num_heads": [1, 2, 4, 8], "num_groups": [1, 2, 4, 8]},
    },
}  # fmt: skip


@functools.cache
def golden(model: str) -> dict[str, torch.Tensor]:
    """Inputs and outputs of `pi05` or `xvla`, with the batch and the views as the references take them."""
    with np.load(DATA / f"{model}_tiny_io.npz") as file:
        io = {name: torch.from_numpy(file[name]) for name in file.files}
    images = io["images"].float()
    images = images.permute(0, 3, 1, 2) if model == "pi05" else images
    absent = torch.full_like(images[:1], -1.0 if model == "pi05" else 0.0)
    io["images"] = torch.cat([images, absent])[None]
    io["image_mask"] = torch.tensor([[True, True, False]])
    io["tokens"] = io["tokens"].long()
    if model == "xvla":
        io["domain_id"] = io["domain_id"].reshape(1)
    return io


@functools.cache
def schedules() -> dict[str, dict]:
    return json.loads((DATA / "has_schedules.json").read_text())


def table(horizon: int, alpha: float, delay: int = 0, steps: int = 10, u0: float = 0.9) -> torch.Tensor:
    """Golden times [steps + 1, horizon] of the horizon-aware schedule."""
    return torch.tensor(schedules()[f"H{horizon}_N{steps}_a{alpha}_u{u0}_d{delay}"]["tau"])


def constant(horizon: int, steps: int = 10, delay: int = 0) -> torch.Tensor:
    """Times [steps + 1, horizon] of the ordinary schedule: the same for all actions that are not committed."""
    tau = torch.linspace(1, 0, steps + 1)[:, None].repeat(1, horizon)
    tau[:, :delay] = 0
    return tau


def pi05_source() -> SafetensorsFile:
    return SafetensorsFile(DATA / "pi05_tiny.safetensors")


def xvla_source() -> SafetensorsFile:
    return SafetensorsFile(DATA / "xvla_tiny.safetensors")


@functools.cache
def pi05_golden() -> Pi05Reference:
    with pi05_source() as source:
        return Pi05Reference.from_source(Pi05Config.from_json(PI05_JSON, pi05_canonical(source)), source)


@functools.cache
def xvla_golden() -> XVLAReference:
    with xvla_source() as source:
        return XVLAReference.from_source(XVLAConfig.from_json(XVLA_JSON, xvla_canonical(source)), source)


SMALL_PI05: dict[str, Any] = {
    "type": "pi05", "chunk_size": 6, "max_action_dim": 5, "image_resolution": [20, 20], "patch_size": 10,
    "vision_hidden_size": 12, "vision_num_hidden_layers": 2, "vision_num_heads": 3, "vision_intermediate_size": 20,
    "hidden_size": 24, "num_hidden_layers": 3, "intermediate_size": 40, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "vocab_size": 31, "expert_hidden_size": 16,
    "expert_intermediate_size": 28, "num_inference_steps": 4,
}  # fmt: skip
SMALL_XVLA: dict[str, Any] = {
    "type": "xvla", "chunk_size": 6, "hidden_size": 24, "depth": 2, "num_heads": 3, "mlp_dim": 40, "num_domains": 3,
    "len_soft_prompts": 4, "dim_time": 8, "max_len_seq": 64, "max_state_dim": 21, "num_denoising_steps": 4,
    "tokenizer_max_length": 7, "image_resolution": [44, 60], "num_image_views": 3,
    "florence_config": {
        "text_config": {
            "d_model": 18, "encoder_layers": 2, "encoder_attention_heads": 3, "encoder_ffn_dim": 20, "vocab_size": 31,
            "max_position_embeddings": 40,
        },
        "vision_config": {
            "dim_embed": [6, 12, 18], "depths": [1, 2, 1], "num_heads": [1, 2, 3], "num_groups": [2, 3, 6],
            "patch_size": [7, 3, 3], "patch_stride": [4, 2, 2], "patch_padding": [3, 1, 1], "window_size": 4,
        },
    },
}  # fmt: skip


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Norms and biases away from one and zero: at their initial values they hide mistakes."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn(p.shape, generator=g).to(p.dtype))


def small_pi05(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Pi05Reference:
    torch.manual_seed(seed)
    model = Pi05Reference(Pi05Config.from_json(SMALL_PI05 | changes)).to(dtype).eval()
    randomise(model, seed)
    return model


def small_xvla(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> XVLAReference:
    torch.manual_seed(seed)
    model = XVLAReference(XVLAConfig.from_json(SMALL_XVLA | changes)).to(dtype).eval()
    randomise(model, seed)
    return model


def write_folder(folder: Path, config: dict | None, tensors: dict[str, torch.Tensor]) -> Path:
    """A checkpoint folder; bf16 tensors stay bf16."""
    stored = {}
    for name, t in tensors.items():
        t = t.detach().contiguous()
        if t.dtype == torch.bfloat16:
            stored[name] = ("BF16", t.view(torch.uint16).numpy())
        else:
            stored[name] = ({2: "F16", 4: "F32", 8: "F64"}[t.element_size()], t.numpy())
    save(folder, stored)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def small_folder(home: Path, model: Pi05Reference | XVLAReference) -> Path:
    c = model.config
    raw = c.to_json() | {"normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "IDENTITY", "ACTION": "IDENTITY"}}
    if raw["type"] == "pi05":  # cameras by lerobot's names
        views = {k: v for k, v in raw["input_features"].items() if v["type"] == "VISUAL"}
        rest = {k: v for k, v in raw["input_features"].items() if k not in views}
        raw["input_features"] = {f"observation.images.{k}": v for k, v in views.items()} | rest
    return write_folder(home, raw, {f"model.{k}": v for k, v in model.state_dict().items()})
