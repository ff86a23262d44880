"""The multimodal language models in plain torch, as published: what the plans must give.

Sources: VEGA-3D (arXiv 2603.19235) and its released code; SigLIP (Zhai et al. 2023); Qwen2.5-VL (Bai et al. 2025).

Weights are mappings of tensors under the published names; everything is differentiable.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.blocks.qwen_language import LanguageConfig
from engine.blocks.qwen_reference import heads_of, linear, rms_norm, rotate
from engine.blocks.qwen_vision import QwenVisionConfig
from engine.blocks.siglip import SiglipConfig
from engine.models.vega3d.config import SceneConfig, SpatialConfig
from engine.models.vega3d.weights import QWEN, VISION

Weights = Mapping[str, Tensor]
EPS = 1e-6  # of the norms in the towers and the merger
FUSION_EPS = HEAD_EPS = 1e-5


def layer_norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


# ------------------------------------------------------------------------------------------------------ towers
def siglip(w: Weights, c: SiglipConfig, images: Tensor) -> Tensor:
    """[N, 3, S, S] in [-1, 1] to [N, tokens, width]: the layers that are there, no norm behind them."""
    patch = f"{VISION}embeddings.patch_embedding"
    x = F.conv2d(images, w[f"{patch}.weight"], w[f"{patch}.bias"], stride=c.patch_size).flatten(2).transpose(1, 2)
    x = x + w[f"{VISION}embeddings.position_embedding.weight"]
    for i in range(c.depth):
        p = f"{VISION}encoder.layers.{i}"
        h = layer_norm(w, f"{p}.layer_norm1", x, EPS)
        q, k, v = (heads_of(linear(w, f"{p}.self_attn.{n}_proj", h), c.heads) for n in "qkv")
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(w, f"{p}.self_attn.out_proj", mixed)
        h = F.gelu(linear(w, f"{p}.mlp.fc1", layer_norm(w, f"{p}.layer_norm2", x, EPS)), approximate="tanh")
        x = x + linear(w, f"{p}.mlp.fc2", h)
    return x


def qwen_vision(w: Weights, c: QwenVisionConfig, images: Tensor) -> Tensor:
    """[N, 3, H, W], normalised, to merged tokens [N, rows * columns, out], row by row. A token sees the tokens of its
    window, or in the layers `full` all of its frame."""
    rows, columns, p = *c.grid, c.patch_size
    weight = w[f"{QWEN}patch_embed.proj.weight"].sum(2)  # two equal frames
    x = F.conv2d(images, weight, stride=p).flatten(2).transpose(1, 2)
    at = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    edge = c.window * c.merge
    window = at[:, 0] // edge * columns + at[:, 1] // edge
    together = window[:, None] == window[None]
    half = c.head_dim // 2
    turn = 10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)
    angle = (at.double()[:, :, None] * turn).flatten(1)
    for i in range(c.depth):
        b = f"{QWEN}blocks.{i}"
        h = linear(w, f"{b}.attn.qkv", rms_norm(w, f"{b}.norm1", x, EPS))
        q, k, v = (heads_of(t, c.heads) for t in h.chunk(3, -1))
        mask = None if i in c.full else together
        mixed = F.scaled_dot_product_attention(rotate(q, angle), rotate(k, angle), v, attn_mask=mask)
        x = x + linear(w, f"{b}.attn.proj", mixed.transpose(1, 2).flatten(2))
        h = rms_norm(w, f"{b}.norm2", x, EPS)
        h = F.silu(linear(w, f"{b}.mlp.gate_proj", h)) * linear(w, f"{b}.mlp.up_proj", h)
        x = x + linear(w, f"{b}.mlp.down_proj", h)
    units = merged(rms_norm(w, f"{QWEN}merger.ln_q", x, EPS), c)
    return linear(w, f"{QWEN}merger.mlp.2", F.gelu(linear(w, f"{QWEN}merger.mlp.0", units)))


def merged(x: Tensor, c: QwenVisionConfig) -> Tensor:
    """[N, patches, D] to [N, tokens, merge * merge * D]: row by row, and so inside a token."""
    m, (rows, columns) = c.merge, c.merged
    return x.unflatten(1, (rows, m, columns, m)).transpose(2, 3).flatten(3).flatten(1, 2)


def projector(w: Weights, name: str, x: Tensor) -> Tensor:
    return linear(w, f"{name}.2", F.gelu(linear(w, f"{name}.0", x)))


def pooled(x: Tensor, side: int) -> Tensor:
    """[N, n * n, D] to [N, side * side, D], bilinear between centres of cells."""
    n = round(x.shape[1] ** 0.5)
    grid = x.transpose(1, 2).unflatten(2, (n, n))
    return F.interpolate(grid, (side, side), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)


# ------------------------------------------------------------------------------------------------------ fusion
def fuse(w: Weights, s: Tensor, g: Tensor, blend: str, name: str = "model.feature_fusion") -> tuple[Tensor, Tensor]:
    """Both streams [..., D] to one, and the gate [..., 1] (1: semantic)."""
    one, two = layer_norm(w, f"{name}.norm1", s, FUSION_EPS), layer_norm(w, f"{name}.norm2", g, FUSION_EPS)
    gate = torch.sigmoid(linear(w, f"{name}.gate_projection.0", torch.cat([one, two], -1)))
    if blend == "normed":
        return gate * one + (1 - gate) * two, gate
    mixed = gate * s + (1 - gate) * g
    return (mixed if blend == "raw" else s + w[f"{name}.residual_scale"] * (mixed - s)), gate


def position_code(voxels: Tensor, d: int) -> Tensor:
    """[..., 3] voxels to [..., d]: sines at even, cosines at odd channels of each axis; zeros behind."""
    n = d // 3
    i = torch.arange(n)
    angle = voxels.double()[..., None] / 10000.0 ** (2 * (i // 2) / n)
    waves = torch.where(i % 2 == 0, angle.sin(), angle.cos()).flatten(-2)
    return F.pad(waves, (0, d - 3 * n)).to(torch.get_default_dtype())


def visual_tokens(
    w: Weights, c: SceneConfig, images: Tensor, features: Tensor, voxels: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """images [T, 3, S, S], features [T, cells, C], voxels [T, cells, 3]: (embeddings [rows, D] with newlines, gates
    [T, cells, 1], semantic tokens before pooling [T, tokens, D])."""
    encoded = projector(w, "model.mm_projector", siglip(w, c.vision, images))
    x, gate = fuse(w, pooled(encoded, c.side), projector(w, "model.generative_projector", features), c.blend)
    if voxels is not None:
        x = x + position_code(voxels, x.shape[-1]).to(x)
    lines = x.unflatten(1, (c.side, c.side))
    ends = w["model.image_newline"].expand(*lines.shape[:2], 1, -1)
    return torch.cat([lines, ends], 2).flatten(0, 2), gate, encoded


def spatial_tokens(
    w: Weights, c: SpatialConfig, images: Tensor, features: Tensor, source: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """images [T, 3, H, W], normalised, features [T, cells, C] on the grid `source`: (embeddings [T * tokens, D], gates
    [T, tokens, 1])."""
    grid = features.transpose(1, 2).unflatten(2, source)
    resized = F.interpolate(grid, c.vision.grid, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    units = merged(rms_norm(w, "generative_merger.ln_q", resized, EPS), c.vision)
    x, gate = fuse(w, qwen_vision(w, c.vision, images), projector(w, "generative_merger.mlp", units), c.blend,
                   "generative_fusion")  # fmt: skip
    return x.flatten(0, 1), gate


# ------------------------------------------------------------------------------------------------------ language
def logits(w: Weights, c: LanguageConfig, hidden: Tensor) -> Tensor:
    return F.linear(hidden, w["model.embed_tokens.weight" if c.tied else "lm_head.weight"])


# ------------------------------------------------------------------------------------------------------ grounding
def object_features(encoded: Tensor, members: Tensor, voxels: Tensor) -> Tensor:
    """[K, D]: means of the semantic tokens [T, n, D] that belong to each object (bool [K, T, n]; zeros where none
    does), with the code of its centre's voxel [K, 3]."""
    share = members.flatten(1).to(encoded)
    mean = share @ encoded.flatten(0, 1) / share.sum(1, keepdim=True).clamp(min=1)
    return mean + position_code(voxels, encoded.shape[-1]).to(encoded)


def ground_head(w: Weights, name: str, x: Tensor) -> Tensor:
    return linear(w, f"{name}.3", layer_norm(w, f"{name}.2", F.relu(linear(w, f"{name}.0", x)), HEAD_EPS))


def ground_scores(w: Weights, objects: Tensor, hidden: Tensor) -> Tensor:
    """[K + 1] cosines of objects [K, D], and of none, with the hidden state [D] at `<ground>`."""
    rows = ground_head(w, "ground_head_obj", torch.cat([objects, w["ground_head_zero_target"][None]]))
    return F.cosine_similarity(rows, ground_head(w, "ground_head_query", hidden)[None])
