"""nemotron_h in plain torch: the arbiter of the kernels' results and the model that the tiny trainer trains.

Written for reading: one class per layer kind, no kernels, differentiable everywhere, and the state dict carries the
key names of the published checkpoints. Shapes: B sequences, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import CheckpointError, ConfigError, InputError
from engine.models.nemotron.config import NemotronConfig


@dataclass
class LayerState:
    """What one layer remembers between calls; a layer uses only its own fields."""

    conv: Tensor | None = None  # M: [B, K-1, conv_dim], inputs of the convolution, newest last
    ssm: Tensor | None = None  # M: [B, heads, P, N] fp32
    k: Tensor | None = None  # *: [B, kv_heads, past, head_dim]
    v: Tensor | None = None


class NemotronState:
    """Incremental state of a batch; `forward` reads and updates it, so pass the same object to the next call."""

    def __init__(self, n_layers: int):
        self.layers = [LayerState() for _ in range(n_layers)]


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        v = x.float()
        v = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + self.eps)
        return (v * self.weight.float()).to(x.dtype)


class GatedGroupNorm(nn.Module):
    """Gate first, then RMS over each group of channels, then the weight; all in fp32."""

    def __init__(self, width: int, groups: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.groups, self.eps = groups, eps

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        v = y.float() * F.silu(z.float())
        g = v.unflatten(-1, (self.groups, -1))
        g = g * torch.rsqrt(g.square().mean(-1, keepdim=True) + self.eps)
        return (g.flatten(-2) * self.weight.float()).to(z.dtype)


def ssd(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Mamba-2 recurrence S_t = exp(dt_t a) S_{t-1} + dt_t x_t (x) b_t, y_t = S_t c_t, evaluated chunk by chunk.

    x [B,T,H,P], dt [B,T,H], a [H], b and c [B,T,G,N], state [B,H,P,N]; everything fp32. Returns y [B,T,H,P] and the
    state after T. Any chunk length gives the same result up to rounding.
    """
    heads, groups = x.shape[2], b.shape[2]
    out = []
    for start in range(0, x.shape[1], chunk):
        part = slice(start, start + chunk)
        xq, dq = x[:, part].transpose(1, 2), dt[:, part].transpose(1, 2)  # [B,H,Q,P], [B,H,Q]
        bq = b[:, part].transpose(1, 2)  # [B,G,Q,N]
        cq = c[:, part].transpose(1, 2)
        q = xq.shape[2]
        cum = (dq * a[:, None]).cumsum(-1)
        # Only differences of cum are exponentiated, masked first: exp(cum) alone would under- or overflow.
        diff = cum[..., :, None] - cum[..., None, :]
        diff = diff.masked_fill(~torch.ones(q, q, dtype=torch.bool, device=x.device).tril(), float("-inf"))
        gram = (cq @ bq.transpose(-1, -2)).repeat_interleave(heads // groups, 1)  # shared by a group's heads
        ch = cq.repeat_interleave(heads // groups, 1)
        xdt = xq * dq[..., None]
        y = (gram * diff.exp()) @ xdt + cum.exp()[..., None] * (ch @ state.transpose(-1, -2))
        tail = (cum[..., -1:] - cum).exp()[..., None]
        bh = bq.repeat_interleave(heads // groups, 1)
        state = cum[..., -1].exp()[..., None, None] * state + (xdt * tail).transpose(-1, -2) @ bh
        out.append(y.transpose(1, 2))
    return torch.cat(out, 1), state


class Mamba2Mixer(nn.Module):
    def __init__(self, c: NemotronConfig):
        super().__init__()
        self.c = c
        inner, heads = c.mamba_inner, c.mamba_num_heads
        self.in_proj = nn.Linear(c.hidden_size, inner + c.conv_dim + heads, bias=c.use_bias)
        self.conv1d = nn.Conv1d(c.conv_dim, c.conv_dim, c.conv_kernel, groups=c.conv_dim, bias=c.use_conv_bias)
        self.A_log = nn.Parameter(torch.log(torch.linspace(1, 16, heads)))
        self.D = nn.Parameter(torch.ones(heads))
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.norm = GatedGroupNorm(inner, c.n_groups, c.layer_norm_epsilon)
        self.out_proj = nn.Linear(inner, c.hidden_size, bias=c.use_bias)

    def forward(self, x: Tensor, state: LayerState) -> Tensor:
        c = self.c
        batch, steps, _ = x.shape
        z, xbc, dt = self.in_proj(x).split([c.mamba_inner, c.conv_dim, c.mamba_num_heads], -1)

        # Depthwise causal convolution; the K-1 columns in front are the last call's, or zeros before the sequence.
        taps = c.conv_kernel
        past = state.conv if state.conv is not None else xbc.new_zeros(batch, taps - 1, c.conv_dim)
        window = torch.cat([past, xbc], 1)
        state.conv = window[:, steps:]
        w = self.conv1d.weight.float()
        u = torch.zeros(()) if self.conv1d.bias is None else self.conv1d.bias.float()
        for k in range(taps):
            u = u + window[:, k : k + steps].float() * w[:, 0, k]
        u = F.silu(u).to(x.dtype).float()

        bc_width = c.n_groups * c.ssm_state_size
        xs, bs, cs = u.split([c.mamba_inner, bc_width, bc_width], -1)
        xs = xs.unflatten(-1, (c.mamba_num_heads, c.mamba_head_dim))
        bs = bs.unflatten(-1, (c.n_groups, c.ssm_state_size))
        cs = cs.unflatten(-1, (c.n_groups, c.ssm_state_size))
        dt = F.softplus(dt.float() + self.dt_bias.float())
        low, high = c.time_step_limit
        if low > 0 or high < float("inf"):
            dt = dt.clamp(low, high)
        past_ssm = state.ssm
        if past_ssm is None:
            past_ssm = u.new_zeros(batch, c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size)
        y, state.ssm = ssd(xs, dt, -self.A_log.float().exp(), bs, cs, past_ssm, c.chunk_size)
        y = y + self.D.float()[:, None] * xs
        return self.out_proj(self.norm(y.flatten(-2), z))


class Attention(nn.Module):
    """Grouped-query attention with no positional encoding at all."""

    def __init__(self, c: NemotronConfig):
        super().__init__()
        self.c = c
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, q, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, kv, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, kv, bias=c.attention_bias)
        self.o_proj = nn.Linear(q, c.hidden_size, bias=c.attention_bias)

    def forward(self, x: Tensor, state: LayerState) -> Tensor:
        c, steps = self.c, x.shape[1]
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (proj(x).unflatten(-1, (-1, c.head_dim)).transpose(1, 2) for proj in projections)
        if state.k is not None and state.v is not None:
            k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
        state.k, state.v = k, v
        repeat, total = c.num_attention_heads // c.num_key_value_heads, k.shape[2]
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        scores = (q @ k.transpose(-1, -2)).float() * c.head_dim**-0.5
        seen = torch.ones(steps, total, dtype=torch.bool, device=x.device).tril(total - steps)
        p = scores.masked_fill(~seen, float("-inf")).softmax(-1).to(x.dtype)
        return self.o_proj((p @ v).transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """down(relu(up(x))^2): a dense layer, one routed expert, or the shared expert."""

    def __init__(self, width: int, inner: int, bias: bool):
        super().__init__()
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor, state: LayerState | None = None) -> Tensor:
        return self.down_proj(F.relu(self.up_proj(x)).square())


class Router(nn.Module):
    """Sigmoid router, fp32 end to end: selects on score + bias, weighs by the score alone."""

    e_score_correction_bias: Tensor

    def __init__(self, c: NemotronConfig):
        super().__init__()
        self.c = c
        self.weight = nn.Parameter(torch.empty(c.n_routed_experts, c.hidden_size, dtype=torch.float32))
        nn.init.normal_(self.weight, std=c.hidden_size**-0.5)
        self.register_buffer("e_score_correction_bias", torch.zeros(c.n_routed_experts, dtype=torch.float32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [n, D] -> expert ids [n, k] int64, weights [n, k] fp32."""
        c = self.c
        score = torch.sigmoid(x.float() @ self.weight.float().T)
        choice = score.detach() + self.e_score_correction_bias.float()
        if c.n_group > 1:
            by_group = choice.unflatten(-1, (c.n_group, -1))
            strength = by_group.topk(min(2, by_group.shape[-1]), -1).values.sum(-1)
            keep = torch.zeros_like(strength, dtype=torch.bool)
            keep.scatter_(-1, strength.sort(dim=-1, descending=True, stable=True).indices[:, : c.topk_group], True)
            choice = by_group.masked_fill(~keep[..., None], float("-inf")).flatten(-2)
        # A stable sort instead of topk: ties go to the lowest expert id, everywhere the same.
        ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, : c.num_experts_per_tok]
        weights = score.gather(-1, ids)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return ids, weights * c.routed_scaling_factor


class MoE(nn.Module):
    def __init__(self, c: NemotronConfig):
        super().__init__()
        self.gate = Router(c)
        self.experts = nn.ModuleList(
            MLP(c.hidden_size, c.moe_intermediate_size, c.mlp_bias) for _ in range(c.n_routed_experts)
        )
        self.shared_experts = MLP(c.hidden_size, c.shared_width, c.mlp_bias) if c.shared_width else None

    def forward(self, x: Tensor, state: LayerState) -> Tensor:
        flat = x.flatten(0, -2)
        ids, weights = self.gate(flat)
        order = ids.flatten().argsort(stable=True)  # (token, slot) pairs, grouped by expert
        token = order // ids.shape[1]
        counts = torch.bincount(ids.flatten(), minlength=len(self.experts)).tolist()
        rows = flat[token].split(counts)
        results = [expert(r) for expert, r in zip(self.experts, rows, strict=True) if r.shape[0]]
        weighted = torch.cat(results).float() * weights.flatten()[order, None]
        routed = torch.zeros_like(flat, dtype=torch.float32).index_add(0, token, weighted).to(x.dtype)
        routed = routed.view_as(x)
        return routed if self.shared_experts is None else routed + self.shared_experts(x)


class Block(nn.Module):
    """x + mixer(norm(x)): one mixer per block, there is no second half."""

    def __init__(self, c: NemotronConfig, kind: str):
        super().__init__()
        self.norm = RMSNorm(c.hidden_size, c.layer_norm_epsilon)
        if kind == "-":
            self.mixer: nn.Module = MLP(c.hidden_size, c.intermediate_size, c.mlp_bias)
        elif kind in ("M", "E", "*"):
            self.mixer = {"M": Mamba2Mixer, "E": MoE, "*": Attention}[kind](c)
        else:
            raise ConfigError(f"layer kind {kind!r} in pattern {c.pattern!r} is unknown; use M, E, * or -")

    def forward(self, x: Tensor, state: LayerState) -> Tensor:
        return x + self.mixer(self.norm(x), state)


class Backbone(nn.Module):
    def __init__(self, c: NemotronConfig):
        super().__init__()
        self.embeddings = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, kind) for kind in c.pattern)
        self.norm_f = RMSNorm(c.hidden_size, c.layer_norm_epsilon)


class NemotronReference(nn.Module):
    """The whole model. `NemotronReference(config)` has random weights; `from_folder` loads a checkpoint."""

    def __init__(self, config: NemotronConfig):
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.backbone.embeddings.weight

    def new_state(self) -> NemotronState:
        """An empty state: the next call starts a sequence."""
        return NemotronState(len(self.backbone.layers))

    def forward(self, ids: Tensor, state: NemotronState | None = None) -> Tensor:
        """ids [T] or [B, T] int64 -> logits [T, V] or [B, T, V] fp32.

        With `state`, ids continue the sequences that the state holds, and it is updated in place.
        """
        if ids.ndim not in (1, 2) or ids.shape[-1] == 0:
            raise InputError(f"ids must be [T] or [B, T] with T >= 1, got {tuple(ids.shape)}")
        state = state or self.new_state()
        x = self.backbone.embeddings(ids if ids.ndim == 2 else ids[None])
        for block, layer_state in zip(self.backbone.layers, state.layers, strict=True):
            x = block(x, layer_state)
        logits = self.lm_head(self.backbone.norm_f(x)).float()
        return logits if ids.ndim == 2 else logits[0]

    @torch.no_grad()
    def generate(self, ids: Tensor, max_new_tokens: int, stop: tuple[int, ...] = ()) -> Tensor:
        """Greedy continuation of ids [T] or [B, T] -> the new tokens only, [n] or [B, n], n <= max_new_tokens.

        A row that met a stop id repeats it until every row is done.
        """
        state, step = self.new_state(), ids if ids.ndim == 2 else ids[None]
        stops, done = torch.tensor(stop, dtype=torch.long), torch.zeros(len(step), dtype=torch.bool)
        out: list[Tensor] = []
        for _ in range(max_new_tokens):
            token = self(step, state)[:, -1].argmax(-1)
            if out:
                token = torch.where(done, out[-1], token)
            out.append(token)
            done = done | torch.isin(token, stops)
            if bool(done.all()):
                break
            step = token[:, None]
        new = torch.stack(out, 1)
        return new if ids.ndim == 2 else new[0]

    @classmethod
    def from_folder(cls, path: str | Path, dtype: torch.dtype = torch.float32) -> NemotronReference:
        """Load a checkpoint folder: config.json and safetensors (one file, or shards by index).

        The router stays fp32 in every dtype; `mtp.*` tensors are skipped.
        """
        folder = Path(path)
        model = cls(NemotronConfig.from_folder(folder)).to(dtype)
        for block in model.backbone.layers:
            if isinstance(block.mixer, MoE):
                block.mixer.gate.float()
        tensors = _canonical(_read_tensors(folder))
        if model.config.tie_word_embeddings:
            tensors.setdefault("lm_head.weight", tensors["backbone.embeddings.weight"])
        for name, p in model.named_parameters():
            # With mlp_bias some writers (transformers) give biases to the shared and dense layers only.
            if ".experts." in name and name.endswith(".bias"):
                tensors.setdefault(name, torch.zeros_like(p))
        try:
            model.load_state_dict(tensors, strict=True)
        except RuntimeError as e:
            raise CheckpointError(f"{folder}: the weights do not fit the configuration: {e}") from None
        return model.eval()


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for name in names:
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{folder}: weight file {name!r} is missing or outside the folder")
        tensors.update(load_file(file))
    return tensors


def _canonical(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring the known spellings to the published one: prefix `backbone.`, one tensor per expert."""
    out: dict[str, Tensor] = {}
    for name, t in tensors.items():
        if name.startswith("mtp."):
            continue
        name = re.sub(r"^(language_model\.)?(backbone|model)\.", "backbone.", name)
        name = name.removeprefix("language_model.")
        fused = re.fullmatch(r"(.*\.mixer\.experts)\.(up_proj|down_proj)(\.weight)?", name)
        if fused and t.ndim == 3:
            out.update({f"{fused[1]}.{e}.{fused[2]}.weight": t[e] for e in range(t.shape[0])})
        else:
            out[name] = t
    return out
