"""From a checkpoint of pi0.5 to one set of names: every published layout looks the same behind `canonical`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from tqdm.auto import tqdm

from engine.blocks.decoder import DecoderLayer
from engine.blocks.siglip import SiglipWeights, load_siglip, siglip_shapes
from engine.blocks.weights import Packer, Recipe
from engine.io.checkpoint import MappedSource, Source, expect
from engine.io.mapped import Rule
from engine.models.pi05.config import EXPERT, PROJECTOR, TRUNK, VISION, Pi05Config
from engine.ops.gemm import PackedMatrix
from engine.runtime.arena import Arena, Tensor

_ANY = r"(?:model\.)?"  # lerobot writes this prefix, openpi does not
_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
_EMBED = f"{TRUNK}embed_tokens.weight"
# Tensors that some writers keep and no result depends on.
_UNUSED = re.compile(
    _ANY
    + r"(?:state_proj\.|paligemma_with_expert\.gemma_expert\.(?:lm_head\.|model\.embed_tokens\.)"
    + rf"|{re.escape(TRUNK)}norm\.weight$|.*\.(?:rotary_emb\.inv_freq|embeddings\.position_ids)$)"
)
_PLAIN_NORM = re.compile(_ANY + re.escape(EXPERT) + r"(?:norm|layers\.\d+\.\w+_layernorm)\.weight$")


def canonical(source: Source) -> MappedSource:
    """The checkpoint under lerobot's names without their prefix `model.`; tensors that nothing reads are `skipped`.

    Understood: lerobot (`model.` in front of every name) and openpi (none); the token embedding under its own name or
    as the tied `lm_head` alone; `action_time_mlp_*` for `time_mlp_*`; left-overs of pi0 (`state_proj`, plain norm
    weights of the expert beside its `dense`), the expert's unused vocabulary, the trunk's final norm.

    Raises:
        CheckpointError: two stored tensors have one canonical name.
    """
    keys = source.keys()
    stored = {key.removeprefix("model.") for key in keys}
    rules: list[Rule] = [(_UNUSED, None)]
    if f"{EXPERT}norm.dense.weight" in stored:
        rules.append((_PLAIN_NORM, None))
    # Tied: the embedding is read, and its other name only where it stands alone.
    rules.append((re.compile(_ANY + re.escape(_HEAD) + "$"), None if _EMBED in stored else _EMBED))
    rules.append((re.compile(_ANY + r"action_time_mlp_(in|out)\."), r"time_mlp_\1."))
    rules.append(("model.", ""))
    return MappedSource(source, rules)


def checked(config: Pi05Config, source: Source) -> MappedSource:
    """`canonical(source)`, once every tensor of the configuration is there in its shape and no other is.

    Raises:
        CheckpointError: lists the first misshapen, missing and unknown tensors.
    """
    view = canonical(source)
    expect(view, shapes(config))
    return view


def shapes(config: Pi05Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model under its canonical name, and its shape; all are float."""
    v, t, e = config.vision, config.trunk, config.expert
    out: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int, bias: bool = True) -> None:
        out[f"{name}.weight"] = (rows, columns)
        if bias:
            out[f"{name}.bias"] = (rows,)

    out |= siglip_shapes(VISION, v)
    out[f"{VISION}post_layernorm.weight"] = out[f"{VISION}post_layernorm.bias"] = (v.width,)
    linear(f"{PROJECTOR}linear", t.width, v.width)

    out[_EMBED] = (config.vocab_size, t.width)
    for stack, g in ((TRUNK, t), (EXPERT, e)):
        for i in range(g.depth):
            p, q, kv = f"{stack}layers.{i}", g.heads * g.head_dim, g.kv_heads * g.head_dim
            for which, rows in (("q", q), ("k", kv), ("v", kv)):
                linear(f"{p}.self_attn.{which}_proj", rows, g.width, bias=False)
            linear(f"{p}.self_attn.o_proj", g.width, q, bias=False)
            linear(f"{p}.mlp.gate_proj", g.mlp, g.width, bias=False)
            linear(f"{p}.mlp.up_proj", g.mlp, g.width, bias=False)
            linear(f"{p}.mlp.down_proj", g.width, g.mlp, bias=False)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                if stack == EXPERT:
                    linear(f"{p}.{norm}.dense", 3 * g.width, g.width)
                else:
                    out[f"{p}.{norm}.weight"] = (g.width,)
    linear(f"{EXPERT}norm.dense", 3 * e.width, e.width)

    linear("action_in_proj", e.width, config.action_dim)
    linear("action_out_proj", config.action_dim, e.width)
    linear("time_mlp_in", e.width, e.width)
    linear("time_mlp_out", e.width, e.width)
    return out


def unread(config: Pi05Config) -> frozenset[str]:
    """Tensors that a checkpoint has and no action depends on: of the last trunk layer only keys and values are used."""
    p = f"{TRUNK}layers.{config.trunk.depth - 1}"
    used = (f"{p}.input_layernorm.weight", f"{p}.self_attn.k_proj.weight", f"{p}.self_attn.v_proj.weight")
    return frozenset(name for name in shapes(config) if name.startswith(f"{p}.") and name not in used)


# ------------------------------------------------------------------------------------------------------ packed
@dataclass
class Weights:
    """The packed model. Norm weights of the trunk are folded into the products behind them."""

    vision: SiglipWeights
    post_norm: Tensor
    post_norm_bias: Tensor
    projector: PackedMatrix
    projector_bias: Tensor
    embed: Tensor  # times sqrt(width)
    trunk: list[DecoderLayer]
    expert: list[DecoderLayer]
    modulation: PackedMatrix  # every adaptive norm, in the order in which they are used
    modulation_bias: Tensor
    time_in: PackedMatrix
    time_in_bias: Tensor
    time_out: PackedMatrix
    time_out_bias: Tensor
    action_in: PackedMatrix
    action_in_bias: Tensor
    action_out: PackedMatrix
    action_out_bias: Tensor
    notes: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


class Loader(Packer):
    def __init__(self, config: Pi05Config, source: MappedSource, arena: Arena, recipe: Recipe) -> None:
        super().__init__(source, arena)
        self.c, self.recipe = config, recipe

    def linear(self, name: str, role: str) -> tuple[PackedMatrix, Tensor]:
        k = self.source.info(f"{name}.weight").shape[1]
        return self.matrix(name, [f"{name}.weight"], self.recipe.format(role, k)), self.vector(f"{name}.bias")

    def layer(self, stack: str, i: int, *, folded: bool, last: bool = False) -> DecoderLayer:
        """folded: the norms in front of qkv and gate_up go into their columns, as 1 + weight."""
        p, role = f"{stack}layers.{i}", "trunk" if stack == TRUNK else "expert"
        g = self.c.trunk if stack == TRUNK else self.c.expert

        def product(name: str, parts: list[str], k: int, norm: str | None = None) -> PackedMatrix:
            fn = None
            if norm is not None and folded and not self.arena.dry:
                columns = 1 + self.value(f"{p}.{norm}.weight")
                fn = lambda w: w * columns  # noqa: E731
            return self.matrix(f"{p}.{name}", [f"{p}.{n}.weight" for n in parts], self.recipe.format(role, k), fn=fn)

        qkv = [f"self_attn.{w}_proj" for w in ("kv" if last else "qkv")]
        first = product("qkv", qkv, g.width, "input_layernorm")
        if last:
            return DecoderLayer(first, None, None, None)
        return DecoderLayer(
            first,
            product("o_proj", ["self_attn.o_proj"], g.heads * g.head_dim),
            product("gate_up", ["mlp.gate_proj", "mlp.up_proj"], g.width, "post_attention_layernorm"),
            product("down", ["mlp.down_proj"], g.mlp),
        )

    def load(self, views: int, progress: bool) -> Weights:
        c, v, e = self.c, self.c.vision, self.c.expert
        bar = tqdm(total=v.depth + 2 * e.depth + 2, desc="loading", unit="layer", disable=not progress, delay=1.0,
                   leave=False)  # fmt: skip

        def each(layers):
            out = []
            for layer in layers:
                out.append(layer)
                bar.update()
            return out

        with bar:
            norms = [f"{EXPERT}layers.{i}.{n}.dense" for i in range(e.depth)
                     for n in ("input_layernorm", "post_attention_layernorm")]  # fmt: skip
            norms.append(f"{EXPERT}norm.dense")
            out = Weights(
                load_siglip(self, self.recipe, VISION, v, views, bar.update),
                self.vector(f"{VISION}post_layernorm.weight"), self.vector(f"{VISION}post_layernorm.bias"),
                *self.linear(f"{PROJECTOR}linear", "vision"),
                self.table(_EMBED, self.recipe.table_dtype, math.sqrt(c.trunk.width)),
                each(self.layer(TRUNK, i, folded=True, last=i == c.trunk.depth - 1) for i in range(c.trunk.depth)),
                each(self.layer(EXPERT, i, folded=False) for i in range(e.depth)),
                self.matrix("modulation", [f"{n}.weight" for n in norms], self.recipe.dtype),
                self.stacked("modulation.bias", [f"{n}.bias" for n in norms]),
                *self._plain("time_mlp_in"), *self._plain("time_mlp_out"), *self._plain("action_in_proj"),
                *self._plain("action_out_proj"), self.recipe.notes, self.source.skipped,
            )  # fmt: skip
            bar.update(2)
        return out

    def _plain(self, name: str) -> tuple[PackedMatrix, Tensor]:
        """Small matrices at both ends stay unquantised."""
        return self.matrix(name, [f"{name}.weight"], self.recipe.dtype), self.vector(f"{name}.bias")


def load_weights(
    config: Pi05Config, source: Source, arena: Arena, dtype: str, quant: str | None, views: int, progress: bool = True
) -> Weights:
    """Checks every name and shape first, then packs.

    Raises: CheckpointError (missing, extra or misshapen tensors, unsupported dtype, NaN), InputError (quant, dtype).
    """
    recipe = Recipe(dtype, quant)
    return Loader(config, checked(config, source), arena, recipe).load(views, progress)
