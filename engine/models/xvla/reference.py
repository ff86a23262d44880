"""X-VLA in plain torch: the arbiter of the kernels' results and the model that the tiny trainer trains.

Written for reading: no kernels, differentiable everywhere, and the state dict carries lerobot's key names (without
their prefix `model.`). Computes in the dtype of its weights, softmax in fp32 (fp64 where they are fp64). Time runs from
1 (noise) to 0. The network predicts the clean action, and every step mixes the same noise in again; every action of a
chunk has a time of its own (FASTER, arXiv 2603.19199, section 4), equal times give the original model.

Shapes: B samples, V image slots, L text tokens, H actions, A action width, P state width, T tokens of one view,
D policy width, N steps.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import CheckpointError, InputError
from engine.io.checkpoint import Checkpoint, Source, bf16_to_f32
from engine.models.xvla.config import NORM_EPS, POSITION_OFFSET, TIME_PERIOD, Bart, Davit, Transformer, XVLAConfig
from engine.models.xvla.weights import checked


def wide(x: Tensor) -> Tensor:
    """fp64 stays, everything narrower becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """q [..., n, d], k and v [..., m, d] -> [..., n, d]; bias is added to the logits [..., n, m]."""
    logits = wide(q * scale @ k.transpose(-1, -2))
    return (logits if bias is None else logits + bias).softmax(-1).to(v.dtype) @ v


def norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=NORM_EPS)


# ---- DaViT --------------------------------------------------------------------------------------------------------


class QKV(nn.Module):
    """The two projections that window and channel attention share."""

    def __init__(self, width: int):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)


class WindowAttention(QKV):
    """Attention within windows of `window` x `window` tokens; the grid is padded right and below with zeros.

    Padding is not masked: its tokens are keys with the bias of qkv. `virtual_pad` computes the same from real tokens
    only: the padding of a window has one key and one value, so it is one key whose logit counts all of it.
    """

    def __init__(self, width: int, heads: int, window: int):
        super().__init__(width)
        self.heads, self.window = heads, window
        self.virtual_pad = False

    def _windows(self, x: Tensor) -> Tensor:
        """[B, rows, columns, C], both multiples of the window -> [B * windows, window^2, C]."""
        side = self.window
        x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # [B, R, side, S, side, C]
        return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x [windows, heads, tokens, d]

    def forward(self, x: Tensor) -> Tensor:
        """x [B, rows, columns, C] -> the same shape."""
        batch, rows, columns, width = x.shape
        side = self.window
        room = (0, 0, 0, -columns % side, 0, -rows % side)
        scale = (width // self.heads) ** -0.5
        if not self.virtual_pad:
            q, k, v = self._heads(self.qkv(self._windows(F.pad(x, room))))
            y = attend(q, k, v, scale)
        else:
            real = self._windows(F.pad(x.new_ones(batch, rows, columns, 1), room))[..., 0].bool()  # [windows, side^2]
            # The qkv of padding is never computed; zeros stand in its place.
            q, k, v = self._heads(self._windows(F.pad(self.qkv(x), room)))
            pad_k, pad_v = self.qkv.bias.unflatten(0, (3, self.heads, -1))[1:, None, :, None]  # [1, heads, 1, d]
            padding = (~real).sum(1).to(wide(x).dtype)[:, None, None, None]
            hidden = torch.zeros_like(padding).expand(len(real), 1, 1, real.shape[1])
            hidden = hidden.masked_fill(~real[:, None, None], -math.inf)
            keys = torch.cat([k, pad_k.expand(len(k), -1, -1, -1)], 2)
            values = torch.cat([v, pad_v.expand(len(v), -1, -1, -1)], 2)
            y = attend(q, keys, values, scale, torch.cat([hidden, padding.log()], -1))
        y = self.proj(y.transpose(1, 2).flatten(2))
        grid = y.view(batch, (rows + side - 1) // side, (columns + side - 1) // side, side, side, width)
        return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :rows, :columns]


class ChannelAttention(QKV):
    """Attention between the channels of a group; the sum runs over the tokens."""

    def __init__(self, width: int, groups: int):
        super().__init__(width)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """x [B, rows, columns, C] -> the same shape."""
        tokens = x.flatten(1, 2)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.groups, -1)).permute(2, 0, 3, 4, 1)  # [B, groups, c, N]
        y = attend(q, k, v, tokens.shape[1] ** -0.5)
        return self.proj(y.permute(0, 3, 1, 2).flatten(2)).view_as(x)


class MLP(nn.Module):
    def __init__(self, width: int, inner: int, approximate: str = "none"):
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class VisionBlock(nn.Module):
    """Convolution, attention, convolution, MLP, each on top of its input; x [B, rows, columns, C]."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm2 = norm(width)
        self.ffn = MLP(width, inner)

    def attention(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv1(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.attention(self.norm1(x))
        x = x + self.conv2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.ffn(self.norm2(x))


class SpatialBlock(VisionBlock):
    def __init__(self, width: int, inner: int, heads: int, window: int):
        super().__init__(width, inner)
        self.window_attn = WindowAttention(width, heads, window)

    def attention(self, x: Tensor) -> Tensor:
        return self.window_attn(x)


class ChannelBlock(VisionBlock):
    def __init__(self, width: int, inner: int, groups: int):
        super().__init__(width, inner)
        self.channel_attn = ChannelAttention(width, groups)

    def attention(self, x: Tensor) -> Tensor:
        return self.channel_attn(x)


class VisionPair(nn.Module):
    """The unit that a stage repeats."""

    def __init__(self, c: Davit, stage: int):
        super().__init__()
        width, inner = c.dims[stage], c.mlp[stage]
        self.spatial_block = SpatialBlock(width, inner, c.heads[stage], c.window)
        self.channel_block = ChannelBlock(width, inner, c.groups[stage])

    def forward(self, x: Tensor) -> Tensor:
        return self.channel_block(self.spatial_block(x))


class Entry(nn.Module):
    """The convolution that enters a stage; its norm comes after it in the first stage, before it in the others."""

    def __init__(self, c: Davit, stage: int):
        super().__init__()
        before, width = c.dims[stage - 1] if stage else 3, c.dims[stage]
        self.conv = nn.Conv2d(before, width, c.kernels[stage], c.strides[stage], c.paddings[stage])
        self.norm = norm(before if stage else width)
        self.first = stage == 0

    def forward(self, x: Tensor) -> Tensor:
        """x [B, rows, columns, C] -> [B, rows', columns', C']."""
        x = x if self.first else self.norm(x)
        x = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.norm(x) if self.first else x


class VisionTower(nn.Module):
    def __init__(self, c: Davit):
        super().__init__()
        self.convs = nn.ModuleList(Entry(c, s) for s in range(len(c.dims)))
        self.blocks = nn.ModuleList(
            nn.ModuleList(VisionPair(c, s) for _ in range(c.depths[s])) for s in range(len(c.dims))
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """images [n, 3, height, width] -> the grid after every stage, [n, rows, columns, C]."""
        x, out = images.permute(0, 2, 3, 1), []
        for entry, stage in zip(self.convs, cast("list[nn.ModuleList]", self.blocks), strict=True):
            x = entry(x)
            for unit in stage:
                x = unit(x)
            out.append(x)
        return out


class PositionTables(nn.Module):
    """Learned positions: the first half of the channels knows the column, the rest the row."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.row_embeddings = nn.Embedding(rows, width // 2)
        self.column_embeddings = nn.Embedding(rows, width - width // 2)

    def forward(self, rows: int, columns: int) -> Tensor:
        """-> [rows, columns, C]."""
        column = self.column_embeddings.weight[None, :columns].expand(rows, -1, -1)
        return torch.cat([column, self.row_embeddings.weight[:rows, None].expand(-1, columns, -1)], -1)


class FrameTable(nn.Module):
    """Sinusoids of the frame number, a constant; one image is frame 0."""

    pos_idx_to_embed: Tensor

    def __init__(self, frames: int, width: int):
        super().__init__()
        half = width // 2
        angle = torch.arange(frames, dtype=torch.float64)[:, None] * 10_000.0 ** (-torch.arange(half).double() / half)
        table = torch.zeros(frames, width, dtype=torch.float64)
        table[:, 0 : 2 * half : 2], table[:, 1 : 2 * half : 2] = angle.sin(), angle.cos()
        self.register_buffer("pos_idx_to_embed", table.float())


class Projector(nn.Module):
    """Grid of the last stage -> its mean and its tokens, in the width of the language encoder."""

    def __init__(self, c: XVLAConfig):
        super().__init__()
        width = c.vision.dims[-1]
        self.image_projection = nn.Linear(width, c.language.width, bias=False)
        self.image_proj_norm = norm(c.language.width)
        self.image_position_embed = PositionTables(c.vision.positions, width)
        self.visual_temporal_embed = FrameTable(c.vision.temporal, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [n, rows, columns, C] -> [n, rows * columns + 1, width]."""
        x = x + self.image_position_embed(x.shape[1], x.shape[2]) + self.visual_temporal_embed.pos_idx_to_embed[0]
        x = x.flatten(1, 2)
        return self.image_proj_norm(self.image_projection(torch.cat([x.mean(1, keepdim=True), x], 1)))


# ---- BART encoder -------------------------------------------------------------------------------------------------


class EncoderAttention(nn.Module):
    def __init__(self, c: Bart):
        super().__init__()
        self.heads = c.heads
        self.q_proj = nn.Linear(c.width, c.width)
        self.k_proj = nn.Linear(c.width, c.width)
        self.v_proj = nn.Linear(c.width, c.width)
        self.out_proj = nn.Linear(c.width, c.width)

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in projections)
        return self.out_proj(attend(q, k, v, q.shape[-1] ** -0.5).transpose(1, 2).flatten(-2))


class EncoderLayer(nn.Module):
    """Norms come after the sums."""

    def __init__(self, c: Bart):
        super().__init__()
        self.self_attn = EncoderAttention(c)
        self.self_attn_layer_norm = norm(c.width)
        self.fc1 = nn.Linear(c.width, c.mlp)
        self.fc2 = nn.Linear(c.mlp, c.width)
        self.final_layer_norm = norm(c.width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.self_attn_layer_norm(x + self.self_attn(x))
        return self.final_layer_norm(x + self.fc2(F.gelu(self.fc1(x))))


class Encoder(nn.Module):
    def __init__(self, c: Bart):
        super().__init__()
        self.embed_positions = nn.Embedding(c.positions + POSITION_OFFSET, c.width)
        self.layernorm_embedding = norm(c.width)
        self.layers = nn.ModuleList(EncoderLayer(c) for _ in range(c.depth))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T + L, width] -> the same shape; everything is attended, padded text too."""
        x = x + self.embed_positions.weight[POSITION_OFFSET : POSITION_OFFSET + x.shape[1]]
        x = self.layernorm_embedding(x)
        for layer in self.layers:
            x = layer(x)
        return x


class LanguageModel(nn.Module):
    def __init__(self, c: Bart):
        super().__init__()
        self.shared = nn.Embedding(c.vocab_size, c.width)
        self.encoder = Encoder(c)


class Florence(nn.Module):
    def __init__(self, c: XVLAConfig):
        super().__init__()
        self.vision_tower = VisionTower(c.vision)
        self.multi_modal_projector = Projector(c)
        self.language_model = LanguageModel(c.language)


# ---- the policy ---------------------------------------------------------------------------------------------------


class DomainLinear(nn.Module):
    """A linear layer whose weight [in, out] and bias are chosen by the domain of the sample."""

    def __init__(self, inputs: int, outputs: int, domains: int):
        super().__init__()
        self.fc = nn.Embedding(domains, inputs * outputs)
        self.bias = nn.Embedding(domains, outputs)
        self.shape = inputs, outputs
        nn.init.normal_(self.fc.weight, std=inputs**-0.5)
        nn.init.zeros_(self.bias.weight)

    def forward(self, x: Tensor, domain: Tensor) -> Tensor:
        """x [B, T, in], domain [B] int64 -> [B, T, out]."""
        return x @ self.fc(domain).unflatten(-1, self.shape) + self.bias(domain)[:, None]


class BlockAttention(QKV):
    def __init__(self, width: int, heads: int):
        super().__init__(width)
        self.heads = heads

    def forward(self, x: Tensor, rows: int) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attend(q[:, :, :rows], k, v, q.shape[-1] ** -0.5).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, c: Transformer):
        super().__init__()
        self.norm1 = norm(c.width)
        self.norm2 = norm(c.width)
        self.attn = BlockAttention(c.width, c.heads)
        self.mlp = MLP(c.width, c.mlp, approximate="tanh")

    def forward(self, x: Tensor, rows: int) -> Tensor:
        """x [B, T, D] -> its first `rows` tokens after the block."""
        x = x[:, :rows] + self.attn(self.norm1(x), rows)
        return x + self.mlp(self.norm2(x))


class SoftPromptedTransformer(nn.Module):
    """Full attention over [actions][view 0 and text][other views][soft prompts]; nothing is masked."""

    def __init__(self, c: XVLAConfig):
        super().__init__()
        self.c = c
        width, language = c.policy.width, c.language.width
        self.blocks = nn.ModuleList(Block(c.policy) for _ in range(c.policy.depth))
        if c.hetero_proj:
            self.vlm_proj: nn.Module = DomainLinear(language, width, c.num_domains)
            self.aux_visual_proj: nn.Module = DomainLinear(language, width, c.num_domains)
        else:
            self.vlm_proj = nn.Linear(language, width)
            self.aux_visual_proj = nn.Linear(language, width)
        self.pos_emb = nn.Parameter(torch.empty(1, c.max_len_seq, width).normal_(std=0.02))
        self.norm = norm(width)
        self.action_encoder = DomainLinear(c.action_dim + c.proprio_dim + c.dim_time, width, c.num_domains)
        self.action_decoder = DomainLinear(width, c.action_dim, c.num_domains)
        if c.len_soft_prompts:
            self.soft_prompt_hub = nn.Embedding(c.num_domains, c.len_soft_prompts * width)
            nn.init.normal_(self.soft_prompt_hub.weight, std=0.02)

    def context(self, vlm: Tensor, aux: Tensor, domain: Tensor) -> Tensor:
        """What stays the same in every step: encoder output, other views and soft prompts [B, S, D]."""
        c = self.c
        if c.hetero_proj:
            x = torch.cat([self.vlm_proj(vlm, domain), self.aux_visual_proj(aux, domain)], 1)
        else:
            x = torch.cat([self.vlm_proj(vlm), self.aux_visual_proj(aux)], 1)
        x = x + self.pos_emb[:, c.horizon : c.horizon + x.shape[1]]
        if not c.len_soft_prompts:
            return x
        return torch.cat([x, self.soft_prompt_hub(domain).unflatten(-1, (c.len_soft_prompts, -1))], 1)

    def time(self, tau: Tensor) -> Tensor:
        """tau [...] -> cosines, then sines [..., dim_time]."""
        half = self.c.dim_time // 2
        exponent = torch.arange(half, dtype=torch.float64, device=tau.device) / half
        angle = tau.double()[..., None] * TIME_PERIOD**-exponent
        return torch.cat([angle.cos(), angle.sin()], -1).to(self.pos_emb.dtype)

    def forward(self, x: Tensor, proprio: Tensor, tau: Tensor, context: Tensor, domain: Tensor, cut: bool) -> Tensor:
        """x [B, H, A], proprio [B, P], tau [B, H] -> predicted actions [B, H, A], grippers as logits."""
        horizon = x.shape[1]
        proprio = proprio[:, None].expand(-1, horizon, -1)
        x = self.action_encoder(torch.cat([x, proprio, self.time(tau)], -1), domain) + self.pos_emb[:, :horizon]
        x = torch.cat([x, context], 1)
        for i, block in enumerate(self.blocks, 1):
            # Of the last block only the actions are read.
            x = block(x, horizon if cut and i == len(self.blocks) else x.shape[1])
        return self.action_decoder(self.norm(x[:, :horizon]), domain)


class XVLAReference(nn.Module):
    """The whole model. `XVLAReference(config)` has random weights; `from_folder` loads a checkpoint."""

    def __init__(self, config: XVLAConfig):
        super().__init__()
        self.config = config
        self.vlm = Florence(config)
        self.transformer = SoftPromptedTransformer(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.pos_emb.dtype

    def use_virtual_pad(self, on: bool = True) -> None:
        """Compute window attention from real tokens only; the results are the same."""
        for module in self.modules():
            if isinstance(module, WindowAttention):
                module.virtual_pad = on

    # ---- once per observation -----------------------------------------------------------------------------------

    def embed_images(self, images: Tensor) -> Tensor:
        """images [n, 3, height, width], normalised -> tokens of each view [n, T, width of the language encoder]."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise InputError(f"images are {list(images.shape)}; [n, 3, height, width] is needed")
        return self.vlm.multi_modal_projector(self.vlm.vision_tower(images.to(self.dtype))[-1])

    def encode(self, images: Tensor, image_mask: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Images and text -> what the policy reads of them.

        Args:
            images: [B, V, 3, height, width], normalised; the values of an absent view do not matter.
            image_mask: [B, V] bool. Absent views are not computed: their features are zeros.
            tokens: [B, L] int64, padding included.

        Returns:
            vlm [B, T + L, width], the encoder over view 0 and the text, and aux [B, (V - 1) * T, width], the rest.
        """
        if not bool(image_mask.any()):
            raise InputError("no camera is present; at least one view is needed")
        seen = self.embed_images(images[image_mask])
        views = seen.new_zeros(*image_mask.shape, *seen.shape[1:])
        views[image_mask] = seen
        x = torch.cat([views[:, 0], self.vlm.language_model.shared(tokens)], 1)
        return self.vlm.language_model.encoder(x), views[:, 1:].flatten(1, 2)

    def context(self, images: Tensor, image_mask: Tensor, tokens: Tensor, domain: Tensor) -> Tensor:
        """`encode`, projected to the policy, with positions and the soft prompts of domain [B] behind: [B, S, D]."""
        return self.transformer.context(*self.encode(images, image_mask, tokens), domain)

    # ---- every step ---------------------------------------------------------------------------------------------

    def hide_grippers(self, x: Tensor) -> Tensor:
        """Zero the gripper channels of x [..., width], those that it has."""
        keep = torch.ones(x.shape[-1], dtype=torch.bool, device=x.device)
        keep[[i for i in self.config.grippers if i < x.shape[-1]]] = False
        return torch.where(keep, x, 0.0)

    def predict(
        self, x: Tensor, proprio: Tensor, tau: Tensor, context: Tensor, domain: Tensor, cut: bool = True
    ) -> Tensor:
        """Clean actions [B, H, A] from noisy ones, grippers as logits.

        Args:
            x: [B, H, A] noisy actions, proprio: [B, P] state; their gripper channels are zeroed here.
            tau: [B, H].
            context: of `context`. domain: [B] int64.
            cut: compute only the action rows of the last block, all that anything reads of it.
        """
        x, proprio = self.hide_grippers(x.to(self.dtype)), self.hide_grippers(proprio.to(self.dtype))
        return self.transformer(x, proprio, tau, context, domain, cut)

    def steps(
        self, context: Tensor, proprio: Tensor, domain: Tensor, noise: Tensor, tau: Tensor,
        prefix: Tensor | None = None, delay: int | Tensor = 0,
    ) -> list[Tensor]:  # fmt: skip
        """The predicted actions after each step, N tensors [B, H, A], grippers as logits.

        Every step mixes the same noise into the current prediction, x = tau * noise + (1 - tau) * a, and predicts
        again; an action whose time is 0 keeps its value.

        Args:
            context: of `context`, proprio: [B, P], domain: [B] int64.
            noise: [B, H, A].
            tau: [N + 1, B, H] (or [N + 1, H] for all samples), 0 for every action before `delay`.
            prefix: [B, H, A] (or [B, d, A]); its first `delay` rows are committed actions as the model has them.
            delay: committed actions, of all samples or [B].
        """
        noise = noise.to(wide(self.transformer.pos_emb).dtype)
        if tau.ndim == 2:
            tau = tau[:, None].expand(-1, len(noise), -1)
        if noise.ndim != 3 or tau.ndim != 3 or tau.shape[1:] != noise.shape[:2] or len(tau) < 2:
            raise InputError(
                f"noise {list(noise.shape)} and tau {list(tau.shape)} do not fit; [B, H, A] and [N + 1, B, H]"
            )
        actions, out = torch.zeros_like(noise), []
        held = torch.arange(noise.shape[1], device=noise.device)
        held = held < torch.as_tensor(delay, device=noise.device).reshape(-1, 1)
        if bool(held.any()):
            if prefix is None:
                raise InputError("delay is above 0 and there is no prefix; give the committed actions")
            prefix = F.pad(prefix.to(noise.dtype), (0, 0, 0, noise.shape[1] - prefix.shape[1]))
            actions = torch.where(held[..., None], prefix, actions)
        for now, _ in pairwise(tau):
            t = now.to(noise.dtype)[..., None]
            x = noise * t + actions * (1 - t)
            new = self.predict(x, proprio, now, context, domain).to(noise.dtype)
            actions = torch.where((t > 0) & ~held[..., None], new, actions)
            out.append(actions)
        return out

    def finish(self, actions: Tensor) -> Tensor:
        """Predicted actions [..., A] as the robot takes them: grippers through the sigmoid, [..., robot_dim]."""
        channels = torch.zeros(actions.shape[-1], dtype=torch.bool, device=actions.device)
        channels[list(self.config.grippers)] = True
        return torch.where(channels, actions.sigmoid(), actions)[..., : self.config.robot_dim]

    def forward(
        self, images: Tensor, image_mask: Tensor, tokens: Tensor, proprio: Tensor, domain: Tensor, noise: Tensor,
        tau: Tensor, prefix: Tensor | None = None, delay: int | Tensor = 0,
    ) -> Tensor:  # fmt: skip
        """Sample a chunk [B, H, robot_dim]; arguments as of `encode` and `steps`, all rows through `finish`."""
        context = self.context(images, image_mask, tokens, domain)
        return self.finish(self.steps(context, proprio, domain, noise, tau, prefix, delay)[-1])

    @classmethod
    def from_folder(cls, path: str | Path, dtype: torch.dtype = torch.float32) -> XVLAReference:
        """Load a checkpoint folder of any published layout.

        Raises:
            ConfigError, CheckpointError: the folder does not hold a usable X-VLA checkpoint.
        """
        config = XVLAConfig.from_folder(path)
        with Checkpoint(path) as source:
            return cls.from_source(config, source, dtype)

    @classmethod
    def from_source(cls, config: XVLAConfig, source: Source, dtype: torch.dtype = torch.float32) -> XVLAReference:
        """Load from named tensors under any published names."""
        view = checked(config, source)
        model = cls(config).to(dtype)
        there = set(view.keys())
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if name not in there:
                    continue  # the frame table, a constant
                info = view.info(name)
                if info.dtype not in ("F32", "BF16", "F16", "F64"):
                    raise CheckpointError(f"tensor {name!r} is {info.dtype}; F32, BF16, F16 or F64 is needed")
                raw = view.read(name)
                tensor.copy_(torch.from_numpy(bf16_to_f32(raw) if info.dtype == "BF16" else raw.copy()))
        return model.eval()
