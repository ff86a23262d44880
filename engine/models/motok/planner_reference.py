"""MoTok's planners, their sampling, and the text tower in torch; see reference.py. Source: sections 3.3 and 4.1."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import InputError
from engine.models.motok.config import DDM, ClipText, MoTokConfig
from engine.models.motok.schedule import masked_counts
from engine.models.motok.tokenizer_reference import Encoder, wide

HEAD_EPS = 1e-12
KEPT = 1e5  # score of a token that is never masked again


def waves(rows: int, width: int) -> Tensor:
    """Sinusoids of positions [rows, width], fp64; sine and cosine take turns."""
    angle = torch.arange(rows).double()[:, None] * 10_000.0 ** (-torch.arange(0, width, 2).double() / width)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


# ---- planners -------------------------------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, visible: Tensor | None = None) -> Tensor:
    """q, k, v [B, n, width] -> [B, n, width]; visible [B or 1, n or 1, n] bool says which keys a query sees."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    logits = wide(q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if visible is not None:
        logits = logits.masked_fill(~visible[:, None], -math.inf)
    return (logits.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)


def causal(length: int, device: torch.device) -> Tensor:
    return torch.ones(1, length, length, dtype=torch.bool, device=device).tril()


class PackedAttention(nn.Module):
    """Self-attention whose rows of `in_proj_weight` are query, key, value."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.heads = heads
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        return self.out_proj(attend(q, k, v, self.heads, visible))


class DDMLayer(nn.Module):
    """Norms come after the sums."""

    def __init__(self, d: DDM):
        super().__init__()
        self.self_attn = PackedAttention(d.dim, d.heads)
        self.linear1 = nn.Linear(d.dim, d.ff)
        self.linear2 = nn.Linear(d.ff, d.dim)
        self.norm1 = nn.LayerNorm(d.dim)
        self.norm2 = nn.LayerNorm(d.dim)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        x = self.norm1(x + self.self_attn(x, visible))
        return self.norm2(x + self.linear2(F.gelu(self.linear1(x))))


class DDMInput(nn.Module):
    def __init__(self, d: DDM):
        super().__init__()
        self.poseEmbedding = nn.Linear(d.code_dim, d.dim)


class DDMLayers(nn.Module):
    def __init__(self, d: DDM):
        super().__init__()
        self.layers = nn.ModuleList(DDMLayer(d) for _ in range(d.layers))


class Positions(nn.Module):
    pe: Tensor

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.register_buffer("pe", waves(rows, width)[:, None])  # fp64 until the model is cast


class DDMOutput(nn.Module):
    def __init__(self, d: DDM, codes: int):
        super().__init__()
        self.dense = nn.Linear(d.dim, d.dim)
        self.LayerNorm = nn.LayerNorm(d.dim, eps=HEAD_EPS)
        self.poseFinal = nn.Linear(d.dim, codes)

    def forward(self, x: Tensor) -> Tensor:
        return self.poseFinal(self.LayerNorm(F.gelu(self.dense(x))))


class DDMPlanner(nn.Module):
    """Masked transformer over motion tokens; the keys of planner_ddm.safetensors. MASK is token K, padding K + 1."""

    def __init__(self, c: MoTokConfig):
        super().__init__()
        d = c.ddm
        self.mask, self.pad = c.codes, c.codes + 1
        self.token_emb = nn.Embedding(c.codes + 2, d.code_dim)
        self.input_process = DDMInput(d)
        self.position_enc = Positions(max(5000, c.max_tokens), d.dim)
        self.cond_emb = nn.Linear(c.clip.embed, d.dim)
        self.seqTransEncoder = DDMLayers(d)
        self.output_process = DDMOutput(d, c.codes)
        self.traj_encoder = Encoder(c, c.traj.channels, d.dim)

    def forward(self, ids: Tensor, text: Tensor, traj: Tensor | None = None) -> Tensor:
        """Logits of every position.

        Args:
            ids: [B, N] int64; padding is not attended.
            text: [B, embed], zeros for none. traj: [B, N, dim] of `traj_encoder`, or None.

        Returns:
            [B, N, K].
        """
        x = self.input_process.poseEmbedding(self.token_emb(ids))
        x = x + self.position_enc.pe[: ids.shape[1], 0].to(x.dtype)  # none for the text in front
        x = x if traj is None else x + traj
        x = torch.cat([self.cond_emb(text.to(x.dtype))[:, None], x], 1)
        visible = F.pad(ids != self.pad, (1, 0), value=True)[:, None]
        for layer in self.seqTransEncoder.layers:
            x = layer(x, visible)
        return self.output_process(x[:, 1:])


class ARAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.key = nn.Linear(width, width)
        self.query = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        return self.proj(attend(q, k, v, self.heads, causal(x.shape[1], x.device)))


class ARBlock(nn.Module):
    def __init__(self, c: MoTokConfig):
        super().__init__()
        a = c.ar
        self.ln1 = nn.LayerNorm(a.dim)
        self.ln2 = nn.LayerNorm(a.dim)
        self.attn = ARAttention(a.dim, a.heads)
        self.mlp = nn.Sequential(nn.Linear(a.dim, a.ff), nn.GELU(), nn.Linear(a.ff, a.dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class ARPositions(nn.Module):
    embed: Tensor

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.register_buffer("embed", waves(rows, width)[:, None])  # fp64 until the model is cast


class ARBase(nn.Module):
    def __init__(self, c: MoTokConfig):
        super().__init__()
        self.tok_emb = nn.Embedding(c.codes + 2, c.ar.dim)
        self.cond_emb = nn.Linear(c.clip.embed, c.ar.dim)
        self.pos_embed = ARPositions(c.ar.block, c.ar.dim)
        self.blocks = nn.ModuleList(ARBlock(c) for _ in range(c.ar.layers_base))


class ARHead(nn.Module):
    def __init__(self, c: MoTokConfig):
        super().__init__()
        self.blocks = nn.ModuleList(ARBlock(c) for _ in range(c.ar.layers_head))
        self.ln_f = nn.LayerNorm(c.ar.dim)
        self.head = nn.Linear(c.ar.dim, c.codes + 1, bias=False)


class ARPlanner(nn.Module):
    """Causal transformer over motion tokens; the keys of planner_ar.safetensors. END is token K."""

    def __init__(self, c: MoTokConfig):
        super().__init__()
        self.end, self.pad = c.codes, c.codes + 1
        self.max_tokens = c.max_tokens
        self.trans_base = ARBase(c)
        self.trans_head = ARHead(c)
        self.traj_encoder = Encoder(c, c.traj.channels, c.ar.dim)

    def forward(self, ids: Tensor, text: Tensor, traj: Tensor | None = None) -> Tensor:
        """Logits of the token after the text and after each of ids [B, n].

        Args:
            text: [B, embed], zeros for none.
            traj: [B, N, dim]; the row of the token to come is added, so nothing where all N are there.

        Returns:
            [B, n + 1, K + 1].
        """
        base, head = self.trans_base, self.trans_head
        tokens = base.tok_emb(ids)
        x = torch.cat([base.cond_emb(text.to(tokens.dtype))[:, None], tokens], 1)
        if traj is not None:
            x = x + F.pad(traj, (0, 0, 0, max(0, x.shape[1] - traj.shape[1])))[:, : x.shape[1]]
        x = x + base.pos_embed.embed[: x.shape[1], 0].to(x.dtype)
        for block in [*base.blocks, *head.blocks]:
            x = block(x)
        return head.head(head.ln_f(x))


# ---- planning -------------------------------------------------------------------------------------------------------


def hint(c: MoTokConfig, target: Tensor, mask: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Input of the trajectory encoders, [..., T, channels].

    target: [..., T, J, 3] metres in the motion's world. mask: [..., T, J] bool. mean, std: [3 * J] of positions, in
    metres. What is not constrained is zero.
    """
    x = torch.where(mask[..., None], (target - mean.view(-1, 3)) / std.view(-1, 3), 0.0).flatten(-2)
    return torch.cat([x, mask.to(x.dtype)], -1) if c.traj.hint_mask_channels else x


def pick(logits: Tensor, uniform: Tensor) -> Tensor:
    """Categorical sample [...] of logits [..., K]: the first index at which the sum of the probabilities exceeds
    uniform [...] times their whole sum."""
    mass = wide(logits).softmax(-1).cumsum(-1)
    return (mass <= uniform[..., None].to(mass.dtype) * mass[..., -1:]).sum(-1)


def best(logits: Tensor, count: int) -> Tensor:
    """Logits [..., K] with all but the `count` highest at -inf; of equals the lowest index stays."""
    order = logits.argsort(dim=-1, descending=True, stable=True)[..., :count]
    keep = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, True)
    return logits.masked_fill(~keep, -math.inf)


def guided_logits(
    predict: Callable[[Tensor, Tensor | None], Tensor], text: Tensor | None, traj: Tensor | None, w: float,
    drop_traj: Tensor, none: Tensor,
) -> Tensor:  # fmt: skip
    """Classifier-free guidance on logits (eq. 9 to 11).

    Args:
        predict: (text [B, embed], traj [B, N, dim] or None) -> logits.
        text, traj: the conditions, None where there is none.
        w: scale; 1 needs no second pass.
        drop_traj: [B] bool, which condition the second pass drops where there are two: the text, or the trajectory.
        none: [B, embed] zeros, the text that is not there.
    """
    cond = predict(none if text is None else text, traj)
    if text is None or w == 1:
        return cond
    if traj is None:
        uncond = predict(none, None)
    else:
        uncond = predict(torch.where(drop_traj[:, None], text, none), torch.where(drop_traj[:, None, None], 0.0, traj))
    return uncond + w * (cond - uncond)


def coin_table(c: MoTokConfig, coins: Tensor | None, batch: int, steps: int) -> Tensor:
    """[B, steps] bool: whether the second pass drops the trajectory."""
    if c.cfg_alternate == "even_odd":
        return (torch.arange(steps) % 2 == 1).expand(batch, steps)
    if coins is None or coins.shape != (batch, steps):
        raise InputError(f"coins of {[batch, steps]} are needed, one per sample and step")
    return coins.bool()


def sample_ddm(
    model: DDMPlanner, c: MoTokConfig, lengths: list[int], uniforms: Tensor, text: Tensor | None = None,
    traj: Tensor | None = None, coins: Tensor | None = None, cfg: float | None = None, known: Tensor | None = None,
    edit: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Fill in tokens in a few passes, the most certain first (section 3.3).

    Args:
        lengths: tokens of each sample; N is the longest.
        uniforms: [B, steps, N] in [0, 1).
        text: [B, embed]. traj: [B, N, dim]. coins: [B, steps], true drops the trajectory; needed with both conditions.
        cfg: scale of guidance, the configuration's if None.
        known, edit: tokens [B, N] and which of them to sample anew, bool; all of them if None.

    Returns:
        tokens [B, N] int64, `model.pad` behind the end of a sample.
    """
    batch, longest, steps = len(lengths), max(lengths), c.ddm.steps
    if uniforms.shape != (batch, steps, longest):
        raise InputError(f"uniforms are {list(uniforms.shape)}; {[batch, steps, longest]} is needed")
    if (known is None) != (edit is None):
        raise InputError("known tokens and the edit mask are needed together")
    if known is not None and bool(((known < 0) | (known > model.pad)).any()):
        raise InputError(f"a known token is not in 0 to {model.mask - 1}")
    device = uniforms.device
    valid = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
    free = valid if edit is None else valid & edit
    ids = torch.full((batch, longest), model.pad, device=device).masked_fill(valid, model.mask)
    ids = ids if known is None else torch.where(free | ~valid, ids, known)
    scores = torch.where(free, 0.0, KEPT).double()
    weight = model.cond_emb.weight
    none = weight.new_zeros(batch, weight.shape[1])
    both = text is not None and traj is not None
    drop = coin_table(c, coins, batch, steps).to(device) if both else free.new_zeros(batch, steps)
    counts = torch.tensor([masked_counts(n, steps) for n in free.sum(1).tolist()], device=device)
    for i in range(steps):
        rank = scores.argsort(dim=-1, stable=True).argsort(dim=-1)
        masked = rank < counts[:, i, None]
        ids = ids.masked_fill(masked, model.mask)
        seen = ids
        logits = wide(guided_logits(lambda t, m, seen=seen: model(seen, t, m), text, traj,  # type: ignore[misc]
                                    c.ddm.cfg if cfg is None else cfg, drop[:, i], none))  # fmt: skip
        new = pick(best(logits, c.topk) / c.ddm.temperature, uniforms[:, i])
        ids = torch.where(masked, new, ids)
        chance = logits.softmax(-1).gather(-1, new[..., None])[..., 0]
        scores = torch.where(masked, chance.double(), KEPT)
    return ids


def sample_ar(
    model: ARPlanner, c: MoTokConfig, uniforms: Tensor, lengths: list[int] | None = None, text: Tensor | None = None,
    traj: Tensor | None = None, coins: Tensor | None = None, cfg: float | None = None,
) -> Tensor:  # fmt: skip
    """Tokens one after the other (section 3.3).

    Args:
        uniforms: [B, N] in [0, 1); N is the most tokens that can come.
        lengths: tokens of each sample, at most N. None: until END, or N tokens.
        text, traj, coins, cfg: as of `sample_ddm`; coins [B, N].

    Returns:
        tokens [B, N] int64, `model.pad` behind the end of a sample.
    """
    batch, longest = uniforms.shape
    if longest > model.max_tokens or (lengths is not None and max(lengths) > longest):
        raise InputError(
            f"uniforms for {longest} tokens; at most {model.max_tokens} and at least the lengths are needed"
        )
    device, weight = uniforms.device, model.trans_base.cond_emb.weight
    limit = torch.full((batch,), longest) if lengths is None else torch.tensor(lengths)
    none = weight.new_zeros(batch, weight.shape[1])
    both = text is not None and traj is not None
    drop = coin_table(c, coins, batch, longest).to(device) if both else torch.zeros(batch, longest).bool().to(device)
    ids = torch.empty(batch, 0, dtype=torch.long, device=device)
    done = torch.zeros(batch, dtype=torch.bool, device=device)
    for n in range(longest):
        seen = ids
        logits = wide(guided_logits(lambda t, m, seen=seen: model(seen, t, m)[:, -1],  # type: ignore[misc]
                                    text, traj, c.ar.cfg if cfg is None else cfg, drop[:, n], none))  # fmt: skip
        if lengths is not None:
            logits = F.pad(logits[:, : model.end], (0, 1), value=-math.inf)
        new = pick(logits, uniforms[:, n])
        done = done | (new == model.end) | (n >= limit.to(device))
        ids = torch.cat([ids, torch.where(done, model.pad, new)[:, None]], 1)
    return ids


# ---- text -----------------------------------------------------------------------------------------------------------


class ClipMLP(nn.Module):
    def __init__(self, c: ClipText):
        super().__init__()
        self.c_fc = nn.Linear(c.width, c.ff)
        self.c_proj = nn.Linear(c.ff, c.width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        return self.c_proj(x * torch.sigmoid(1.702 * x))


class ClipBlock(nn.Module):
    def __init__(self, c: ClipText):
        super().__init__()
        self.ln_1 = nn.LayerNorm(c.width)
        self.ln_2 = nn.LayerNorm(c.width)
        self.attn = PackedAttention(c.width, c.heads)
        self.mlp = ClipMLP(c)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x), visible)
        return x + self.mlp(self.ln_2(x))


class ClipTransformer(nn.Module):
    def __init__(self, c: ClipText):
        super().__init__()
        self.resblocks = nn.ModuleList(ClipBlock(c) for _ in range(c.layers))


class ClipTower(nn.Module):
    """CLIP's text encoder; the keys of clip_text.safetensors."""

    def __init__(self, c: ClipText):
        super().__init__()
        self.ctx = c.ctx
        self.token_embedding = nn.Embedding(c.vocab, c.width)
        self.positional_embedding = nn.Parameter(torch.randn(c.ctx, c.width) * 0.01)
        self.transformer = ClipTransformer(c)
        self.ln_final = nn.LayerNorm(c.width)
        self.text_projection = nn.Parameter(torch.randn(c.width, c.embed) * c.width**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, n], n <= ctx, the highest id ends the text -> features [B, embed], not normalised.

        Nothing behind the end is seen, so padding may be left out.
        """
        if ids.shape[1] > self.ctx:
            raise InputError(f"a text has {ids.shape[1]} tokens; at most {self.ctx} are allowed")
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        for block in self.transformer.resblocks:
            x = block(x, causal(ids.shape[1], ids.device))
        end = ids.argmax(-1)
        return self.ln_final(x[torch.arange(len(ids), device=ids.device), end]) @ self.text_projection
