"""pi0.5 in plain torch: the arbiter of the kernels' results and the model that the tiny trainer trains.

Written for reading: no kernels, differentiable everywhere, and the state dict carries lerobot's key names (without
their prefix `model.`). Computes in the dtype of its weights; norms, softmax and rotations in fp32, or in fp64 where the
weights are fp64. Time runs from 1 (noise) to 0 (the action), and every action of a chunk has a time of its own (FASTER,
arXiv 2603.19199, section 4); equal times give the original model.

Shapes: B samples, V views, S pixels, L text tokens, P prefix tokens, H actions, A action width, N flow steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.blocks.siglip import SiglipConfig
from engine.errors import CheckpointError, InputError
from engine.io.checkpoint import Checkpoint, Source, bf16_to_f32
from engine.models.pi05.config import NORM_EPS, ROPE_THETA, Gemma, Pi05Config
from engine.models.pi05.weights import checked

MASKED = -2.3819763e38  # logit of a key that is not there


@dataclass
class PrefixCache:
    """What the prefix leaves for the action expert.

    k, v: per trunk layer [B, P, kv_heads, head_dim], k after its rotation. valid [B, P]: which keys exist.
    positions [B]: of the first action token, the number of valid prefix tokens.
    """

    valid: Tensor
    positions: Tensor
    k: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)


def wide(x: Tensor) -> Tensor:
    """fp64 stays, everything narrower becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def unit_rms(x: Tensor) -> Tensor:
    x = wide(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPS)


class RMSNorm(nn.Module):
    """The published weight is an offset from one."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return (unit_rms(x) * (1 + wide(self.weight))).to(x.dtype)


class AdaRMSNorm(nn.Module):
    """RMS norm whose scale, shift and gate (in this order) are linear in the time condition of each token."""

    def __init__(self, width: int):
        super().__init__()
        self.dense = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)
        # A zero gate would keep every block of a fresh model shut; published weights overwrite this.
        nn.init.ones_(self.dense.bias[2 * width :])

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """x, condition [B, H, D] -> normed [B, H, D], gate [B, H, D]."""
        scale, shift, gate = self.dense(condition).chunk(3, -1)
        return (unit_rms(x) * (1 + wide(scale)) + wide(shift)).to(x.dtype), gate


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding of x [B, T, heads, hd] at positions [B, T]; channel i turns with channel i + hd/2."""
    half = x.shape[-1] // 2
    frequency = ROPE_THETA ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angle = (positions.double()[..., None] * frequency)[:, :, None]
    cos, sin = angle.cos().to(wide(x).dtype), angle.sin().to(wide(x).dtype)
    a, b = wide(x).split(half, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """q [B, T, heads, hd], k and v [B, S, kv_heads, hd], valid [B, S] -> [B, T, heads * hd].

    Every query sees every valid key.
    """
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    logits = wide(torch.einsum("bthd,bshd->bhts", q * q.shape[-1] ** -0.5, k))
    p = logits.masked_fill(~valid[:, None, None], MASKED).softmax(-1).to(v.dtype)
    return torch.einsum("bhts,bshd->bthd", p, v).flatten(-2)


class Attention(nn.Module):
    def __init__(self, g: Gemma):
        super().__init__()
        self.head_dim = g.head_dim
        self.q_proj = nn.Linear(g.width, g.heads * g.head_dim, bias=False)
        self.k_proj = nn.Linear(g.width, g.kv_heads * g.head_dim, bias=False)
        self.v_proj = nn.Linear(g.width, g.kv_heads * g.head_dim, bias=False)
        self.o_proj = nn.Linear(g.heads * g.head_dim, g.width, bias=False)

    def query(self, x: Tensor, positions: Tensor) -> Tensor:
        return rotate(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), positions)

    def key_value(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.k_proj, self.v_proj))
        return rotate(k, positions), v


class GatedMLP(nn.Module):
    def __init__(self, g: Gemma):
        super().__init__()
        self.gate_proj = nn.Linear(g.width, g.mlp, bias=False)
        self.up_proj = nn.Linear(g.width, g.mlp, bias=False)
        self.down_proj = nn.Linear(g.mlp, g.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class TrunkLayer(nn.Module):
    def __init__(self, g: Gemma):
        super().__init__()
        self.self_attn = Attention(g)
        self.mlp = GatedMLP(g)
        self.input_layernorm = RMSNorm(g.width)
        self.post_attention_layernorm = RMSNorm(g.width)

    def key_value(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.self_attn.key_value(self.input_layernorm(x), positions)

    def forward(self, x: Tensor, positions: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        """x [B, P, D] after the layer whose own keys and values are k and v."""
        q = self.self_attn.query(self.input_layernorm(x), positions)
        x = x + self.self_attn.o_proj(attend(q, k, v, valid))
        return x + self.mlp(self.post_attention_layernorm(x))


class ExpertLayer(nn.Module):
    def __init__(self, g: Gemma):
        super().__init__()
        self.self_attn = Attention(g)
        self.mlp = GatedMLP(g)
        self.input_layernorm = AdaRMSNorm(g.width)
        self.post_attention_layernorm = AdaRMSNorm(g.width)

    def forward(self, x: Tensor, condition: Tensor, positions: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        """x, condition [B, H, D]; k and v [B, P, kv_heads, head_dim] are those of the trunk layer beside this one."""
        y, gate = self.input_layernorm(x, condition)
        own_k, own_v = self.self_attn.key_value(y, positions)
        q = self.self_attn.query(y, positions)
        seen = torch.cat([valid, valid.new_ones(x.shape[:2])], 1)
        y = attend(q, torch.cat([k, own_k], 1), torch.cat([v, own_v], 1), seen)
        x = x + gate * self.self_attn.o_proj(y)
        y, gate = self.post_attention_layernorm(x, condition)
        return x + gate * self.mlp(y)


class VisionAttention(nn.Module):
    def __init__(self, c: SiglipConfig):
        super().__init__()
        self.heads = c.heads
        self.q_proj = nn.Linear(c.width, c.width)
        self.k_proj = nn.Linear(c.width, c.width)
        self.v_proj = nn.Linear(c.width, c.width)
        self.out_proj = nn.Linear(c.width, c.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(q, k, v, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)))


class VisionMLP(nn.Module):
    def __init__(self, c: SiglipConfig):
        super().__init__()
        self.fc1 = nn.Linear(c.width, c.mlp)
        self.fc2 = nn.Linear(c.mlp, c.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class VisionLayer(nn.Module):
    def __init__(self, c: SiglipConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(c.width, eps=NORM_EPS)
        self.layer_norm2 = nn.LayerNorm(c.width, eps=NORM_EPS)
        self.self_attn = VisionAttention(c)
        self.mlp = VisionMLP(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionEmbeddings(nn.Module):
    def __init__(self, c: SiglipConfig):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, c.width, c.patch_size, c.patch_size)
        self.position_embedding = nn.Embedding(c.tokens, c.width)

    def forward(self, images: Tensor) -> Tensor:
        return self.patch_embedding(images).flatten(2).transpose(1, 2) + self.position_embedding.weight


class VisionEncoder(nn.Module):
    def __init__(self, c: SiglipConfig):
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(c) for _ in range(c.depth))


class VisionModel(nn.Module):
    """SigLIP without its pooling head: images [n, 3, S, S] in [-1, 1] -> [n, tokens, width]."""

    def __init__(self, c: SiglipConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(c)
        self.encoder = VisionEncoder(c)
        self.post_layernorm = nn.LayerNorm(c.width, eps=NORM_EPS)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embeddings(images)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


class VisionTower(nn.Module):
    def __init__(self, c: SiglipConfig):
        super().__init__()
        self.vision_model = VisionModel(c)


class Projector(nn.Module):
    def __init__(self, c: Pi05Config):
        super().__init__()
        self.linear = nn.Linear(c.vision.width, c.trunk.width)


class Trunk(nn.Module):
    def __init__(self, c: Pi05Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.trunk.width)
        nn.init.normal_(self.embed_tokens.weight, std=c.trunk.width**-0.5)  # it is scaled up by sqrt(width)
        self.layers = nn.ModuleList(TrunkLayer(c.trunk) for _ in range(c.trunk.depth))


class PaliGemmaModel(nn.Module):
    def __init__(self, c: Pi05Config):
        super().__init__()
        self.vision_tower = VisionTower(c.vision)
        self.multi_modal_projector = Projector(c)
        self.language_model = Trunk(c)


class PaliGemma(nn.Module):
    def __init__(self, c: Pi05Config):
        super().__init__()
        self.model = PaliGemmaModel(c)


class ExpertModel(nn.Module):
    def __init__(self, c: Pi05Config):
        super().__init__()
        self.layers = nn.ModuleList(ExpertLayer(c.expert) for _ in range(c.expert.depth))
        self.norm = AdaRMSNorm(c.expert.width)


class GemmaExpert(nn.Module):
    def __init__(self, c: Pi05Config):
        super().__init__()
        self.model = ExpertModel(c)


class PaliGemmaWithExpert(nn.Module):
    def __init__(self, c: Pi05Config):
        super().__init__()
        self.paligemma = PaliGemma(c)
        self.gemma_expert = GemmaExpert(c)


class Pi05Reference(nn.Module):
    """The whole model. `Pi05Reference(config)` has random weights; `from_folder` loads a checkpoint."""

    def __init__(self, config: Pi05Config):
        super().__init__()
        self.config = config
        width = config.expert.width
        self.paligemma_with_expert = PaliGemmaWithExpert(config)
        self.action_in_proj = nn.Linear(config.action_dim, width)
        self.action_out_proj = nn.Linear(width, config.action_dim)
        self.time_mlp_in = nn.Linear(width, width)
        self.time_mlp_out = nn.Linear(width, width)

    @property
    def dtype(self) -> torch.dtype:
        return self.action_in_proj.weight.dtype

    # ---- the prefix: images and text ----------------------------------------------------------------------------

    def embed_images(self, images: Tensor) -> Tensor:
        """images [B, V, 3, S, S] in [-1, 1] -> vision tokens [B, V, tokens, width], as the trunk takes them."""
        side = self.config.vision.image_size
        if images.ndim != 5 or images.shape[2:] != (3, side, side):
            raise InputError(f"images are {list(images.shape)}; [B, V, 3, {side}, {side}] is needed")
        model = self.paligemma_with_expert.paligemma.model
        x = model.vision_tower.vision_model(images.flatten(0, 1).to(self.dtype))
        return model.multi_modal_projector.linear(x).unflatten(0, images.shape[:2])

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] int64 -> [B, L, width], scaled by sqrt(width) as rounded to the dtype of the weights."""
        x = self.paligemma_with_expert.paligemma.model.language_model.embed_tokens(tokens)
        return x * torch.tensor(math.sqrt(self.config.trunk.width), dtype=x.dtype)

    def prefix(
        self, images: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor, compact: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The token sequence [view 0][view 1]...[text] and which of it exists.

        Args:
            images: [B, V, 3, S, S] in [-1, 1]; the values of a view that is masked do not matter.
            image_mask: [B, V] bool.
            tokens, token_mask: [B, L] int64 and bool.
            compact: leave out what is masked in every sample; the actions stay the same.

        Returns:
            x [B, P, width] and valid [B, P] bool.
        """
        if not bool(image_mask.any(1).all()):
            raise InputError("a sample has no camera; at least one view must be present")
        if compact:
            views, text = image_mask.any(0), token_mask.any(0)
            images, image_mask, tokens, token_mask = (
                images[:, views],
                image_mask[:, views],
                tokens[:, text],
                token_mask[:, text],
            )
        vision = self.embed_images(images)
        x = torch.cat([vision.flatten(1, 2), self.embed_tokens(tokens)], 1)
        return x, torch.cat([image_mask.repeat_interleave(vision.shape[2], 1), token_mask], 1)

    def prefill(self, x: Tensor, valid: Tensor, cut: bool = True) -> PrefixCache:
        """Run the trunk over the prefix x [B, P, width], valid [B, P].

        All valid tokens see each other; masked ones take no position. The last layer is cut to its keys and values,
        all that anything reads of it; `cut=False` computes it nevertheless.
        """
        positions = valid.long().cumsum(1) - 1
        cache = PrefixCache(valid, valid.long().sum(1))
        layers = cast("list[TrunkLayer]", self.paligemma_with_expert.paligemma.model.language_model.layers)
        for i, layer in enumerate(layers):
            k, v = layer.key_value(x, positions)
            cache.k.append(k)
            cache.v.append(v)
            if i + 1 < len(layers) or not cut:
                x = layer(x, positions, k, v, valid)
        return cache

    # ---- the action expert --------------------------------------------------------------------------------------

    def condition(self, tau: Tensor) -> Tensor:
        """Flow times tau [...] -> time condition [..., expert width]."""
        c, half = self.config, self.config.expert.width // 2
        exponent = torch.linspace(0, 1, half, dtype=torch.float64, device=tau.device)
        period = c.min_period * (c.max_period / c.min_period) ** exponent
        angle = 2 * math.pi * tau.double()[..., None] / period
        x = torch.cat([angle.sin(), angle.cos()], -1).to(self.dtype)
        return F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(x))))

    def modulations(self, tau: Tensor) -> Tensor:
        """tau [...] -> scale, shift and gate of every norm: [2 * depth + 1, ..., 3 * expert width].

        Order: input and post-attention norm of layer 0, of layer 1, ..., the final norm.
        """
        expert, condition = self.paligemma_with_expert.gemma_expert.model, self.condition(tau)
        layers = cast("list[ExpertLayer]", expert.layers)
        norms = [n for layer in layers for n in (layer.input_layernorm, layer.post_attention_layernorm)]
        return torch.stack([norm.dense(condition) for norm in [*norms, expert.norm]])

    def velocity(self, x: Tensor, tau: Tensor, cache: PrefixCache) -> Tensor:
        """The flow at noisy actions x [B, H, A] and times tau [B, H] -> [B, H, A]."""
        expert, condition = self.paligemma_with_expert.gemma_expert.model, self.condition(tau)
        positions = cache.positions[:, None] + torch.arange(x.shape[1], device=x.device)
        x = self.action_in_proj(x.to(self.dtype))
        for layer, k, v in zip(expert.layers, cache.k, cache.v, strict=True):
            x = layer(x, condition, positions, k, v, cache.valid)
        return self.action_out_proj(expert.norm(x, condition)[0])

    def steps(
        self, cache: PrefixCache, noise: Tensor, tau: Tensor, prefix: Tensor | None = None, delay: int | Tensor = 0
    ) -> list[Tensor]:
        """The actions after each flow step, N tensors [B, H, A].

        Args:
            cache: of the same B samples.
            noise: [B, H, A], what the flow starts from.
            tau: [N + 1, B, H] (or [N + 1, H] for all samples), 0 for every action before `delay`.
            prefix: [B, H, A] (or [B, d, A]); its first `delay` rows are committed and put in place before each step.
            delay: committed actions, of all samples or [B].
        """
        x = noise.to(wide(self.action_in_proj.weight).dtype)
        if tau.ndim == 2:
            tau = tau[:, None].expand(-1, len(x), -1)
        if x.ndim != 3 or tau.ndim != 3 or tau.shape[1:] != x.shape[:2] or len(tau) < 2:
            raise InputError(f"noise {list(x.shape)} and tau {list(tau.shape)} do not fit; [B, H, A] and [N + 1, B, H]")
        held = torch.arange(x.shape[1], device=x.device) < torch.as_tensor(delay, device=x.device).reshape(-1, 1)
        if bool(held.any()):
            if prefix is None:
                raise InputError("delay is above 0 and there is no prefix; give the committed actions")
            prefix = F.pad(prefix.to(x.dtype), (0, 0, 0, x.shape[1] - prefix.shape[1]))
        out = []
        for now, after in pairwise(tau):
            if prefix is not None:
                x = torch.where(held[..., None], prefix, x)
            v = self.velocity(x, now, cache).to(x.dtype)
            x = x + (after - now)[..., None].to(x.dtype) * v
            out.append(x)
        return out

    def forward(
        self, images: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor, noise: Tensor, tau: Tensor,
        prefix: Tensor | None = None, delay: int | Tensor = 0,
    ) -> Tensor:  # fmt: skip
        """Sample a chunk [B, H, A] of normalised actions; arguments as of `prefix` and `steps`."""
        cache = self.prefill(*self.prefix(images, image_mask, tokens, token_mask))
        return self.steps(cache, noise, tau, prefix, delay)[-1]

    @classmethod
    def from_folder(cls, path: str | Path, dtype: torch.dtype = torch.float32) -> Pi05Reference:
        """Load a checkpoint folder of any published layout.

        Raises:
            ConfigError, CheckpointError: the folder does not hold a usable pi0.5 checkpoint.
        """
        config = Pi05Config.from_folder(path)
        with Checkpoint(path) as source:
            return cls.from_source(config, source, dtype)

    @classmethod
    def from_source(cls, config: Pi05Config, source: Source, dtype: torch.dtype = torch.float32) -> Pi05Reference:
        """Load from named tensors under any published names."""
        view = checked(config, source)
        model = cls(config).to(dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                info = view.info(name)
                if info.dtype not in ("F32", "BF16", "F16", "F64"):
                    raise CheckpointError(f"tensor {name!r} is {info.dtype}; F32, BF16, F16 or F64 is needed")
                raw = view.read(name)
                parameter.copy_(torch.from_numpy(bf16_to_f32(raw) if info.dtype == "BF16" else raw.copy()))
        return model.eval()
