"""The files of a MoTok checkpoint, the names of their tensors, the shapes that a configuration asks for.

Names: those of tokenizer.safetensors as they are; `ddm.`, `ar.`, `clip.` and `stats.` in front of those of the other
files. They are the names of the published lineage (MoMask, T2M-GPT, MAR, CLIP), so its checkpoints need no table.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from engine.errors import CheckpointError
from engine.io.checkpoint import Checkpoint, MappedSource, Source, expect
from engine.io.joined import JoinedSource
from engine.io.mapped import Rule
from engine.models.motok.config import MoTokConfig

#: Files of a checkpoint by the prefix of their tensors; only the tokenizer and the statistics must be there.
FILES = {"": "tokenizer", "ddm.": "planner_ddm", "ar.": "planner_ar", "clip.": "clip_text", "stats.": "stats"}
PARTS = ("ddm", "ar", "clip")

_RULES: list[Rule] = [
    # MAR's name for the blocks of its denoiser.
    (re.compile(r"denoiser\.res_blocks\."), "denoiser.blocks."),
    # What follows from sizes, and what the published trainers keep and nothing reads.
    (re.compile(r"ddm\.position_enc\.pe$|ddm\.clip_model\.|ar\.trans_base\.pos_embed(?:ding)?\."), None),
    (re.compile(r"ar\.trans_(?:base|head)\.blocks\.\d+\.attn\.mask$"), None),
]


def open_source(folder: Path) -> JoinedSource:
    """The safetensors files of a checkpoint folder as one source.

    Raises:
        CheckpointError: the tokenizer or the statistics are missing, or a file is damaged.
    """
    parts: dict[str, Source] = {}
    try:
        for prefix, stem in FILES.items():
            path = folder / f"{stem}.safetensors"
            if path.exists():
                parts[prefix] = Checkpoint(path)
            elif prefix in ("", "stats."):
                raise CheckpointError(
                    f"{path} is missing; a MoTok checkpoint has at least tokenizer.safetensors and stats.safetensors"
                )
        return JoinedSource(parts)
    except BaseException:
        for part in parts.values():
            part.close()
        raise


def parts_of(source: Source) -> tuple[str, ...]:
    """Which of `PARTS` a source has."""
    keys = source.keys()
    return tuple(part for part in PARTS if any(key.startswith(f"{part}.") for key in keys))


def checked(config: MoTokConfig, source: Source) -> MappedSource:
    """The source under one set of names, once every tensor is there in its shape and no other is.

    Raises:
        CheckpointError: lists the first misshapen, missing and unknown tensors.
    """
    view = MappedSource(source, _RULES)
    expect(view, shapes(config, parts_of(source)))
    return view


Shape = tuple[int, ...]


def shapes(config: MoTokConfig, parts: Collection[str] = PARTS) -> dict[str, Shape]:
    """Every tensor under its name, and its shape; all are float."""
    c, d, p, a = config, config.denoiser, config.ddm, config.ar
    out: dict[str, Shape] = {}

    def weight(name: str, *shape: int, bias: bool = True) -> None:
        out[f"{name}.weight"] = shape
        if bias:
            out[f"{name}.bias"] = shape[:1]

    def stack(name: str) -> None:
        for i in range(c.depth):
            weight(f"{name}.model.{i}.conv1", c.width, c.width, 3)
            weight(f"{name}.model.{i}.conv2", c.width, c.width, 1)

    def encoder(name: str, channels: int, width: int) -> None:
        weight(f"{name}.model.0", c.width, channels, 3)
        for i in range(c.down_t):
            weight(f"{name}.model.{i + 2}.0", c.width, c.width, 4)
            stack(f"{name}.model.{i + 2}.1")
        weight(f"{name}.model.{c.down_t + 2}", width, c.width, 3)

    encoder("encoder", c.features, c.latent)
    out["quantizer.codebook"] = (c.codes, c.latent)
    weight("decoder.model.0", c.width, c.latent, 3)
    for i in range(c.down_t):
        stack(f"decoder.model.{i + 2}.0")
        weight(f"decoder.model.{i + 2}.2", c.width, c.width, 3)
    weight(f"decoder.model.{c.down_t + 2}", c.width, c.width, 3)
    weight(f"decoder.model.{c.down_t + 4}", c.latent, c.width, 3)

    weight("denoiser.input_proj", d.width, c.features)
    weight("denoiser.time_embed.mlp.0", d.width, d.t_embed)
    weight("denoiser.time_embed.mlp.2", d.width, d.width)
    weight("denoiser.cond_embed", d.width, c.latent)
    for i in range(d.blocks):
        b = f"denoiser.blocks.{i}"
        if d.kernel:
            weight(f"{b}.conv_norm", d.width)
            weight(f"{b}.conv", d.width, d.width, d.kernel)
        weight(f"{b}.mlp_block.in_ln", d.width)
        weight(f"{b}.mlp_block.mlp.0", d.width, d.width)
        weight(f"{b}.mlp_block.mlp.2", d.width, d.width)
        weight(f"{b}.mlp_block.adaLN_modulation.1", 3 * d.width, d.width)
    weight("denoiser.final_layer.linear", c.features, d.width)
    weight("denoiser.final_layer.adaLN_modulation.1", 2 * d.width, d.width)

    def packed_attention(name: str, width: int) -> None:
        out[f"{name}.in_proj_weight"], out[f"{name}.in_proj_bias"] = (3 * width, width), (3 * width,)
        weight(f"{name}.out_proj", width, width)

    if "ddm" in parts:
        weight("ddm.token_emb", c.codes + 2, p.code_dim, bias=False)
        weight("ddm.input_process.poseEmbedding", p.dim, p.code_dim)
        weight("ddm.cond_emb", p.dim, c.clip.embed)
        for i in range(p.layers):
            layer = f"ddm.seqTransEncoder.layers.{i}"
            packed_attention(f"{layer}.self_attn", p.dim)
            weight(f"{layer}.linear1", p.ff, p.dim)
            weight(f"{layer}.linear2", p.dim, p.ff)
            weight(f"{layer}.norm1", p.dim)
            weight(f"{layer}.norm2", p.dim)
        weight("ddm.output_process.dense", p.dim, p.dim)
        weight("ddm.output_process.LayerNorm", p.dim)
        weight("ddm.output_process.poseFinal", c.codes, p.dim)
        encoder("ddm.traj_encoder", c.traj.channels, p.dim)
    if "ar" in parts:
        weight("ar.trans_base.tok_emb", c.codes + 2, a.dim, bias=False)
        weight("ar.trans_base.cond_emb", a.dim, c.clip.embed)
        for block in ar_blocks(c):
            weight(f"{block}.ln1", a.dim)
            weight(f"{block}.ln2", a.dim)
            for name in ("key", "query", "value", "proj"):
                weight(f"{block}.attn.{name}", a.dim, a.dim)
            weight(f"{block}.mlp.0", a.ff, a.dim)
            weight(f"{block}.mlp.2", a.dim, a.ff)
        weight("ar.trans_head.ln_f", a.dim)
        weight("ar.trans_head.head", c.codes + 1, a.dim, bias=False)
        encoder("ar.traj_encoder", c.traj.channels, a.dim)
    if "clip" in parts:
        t = c.clip
        weight("clip.token_embedding", t.vocab, t.width, bias=False)
        out["clip.positional_embedding"] = (t.ctx, t.width)
        for i in range(t.layers):
            block = f"clip.transformer.resblocks.{i}"
            weight(f"{block}.ln_1", t.width)
            weight(f"{block}.ln_2", t.width)
            packed_attention(f"{block}.attn", t.width)
            weight(f"{block}.mlp.c_fc", t.ff, t.width)
            weight(f"{block}.mlp.c_proj", t.width, t.ff)
        weight("clip.ln_final", t.width)
        out["clip.text_projection"] = (t.width, t.embed)
    out |= {"stats.mean": (c.features,), "stats.std": (c.features,)}
    return out | {"stats.hint_mean": (3 * c.joints,), "stats.hint_std": (3 * c.joints,)}


def ar_blocks(config: MoTokConfig) -> list[str]:
    """Prefixes of the autoregressive planner's blocks, in order."""
    halves = (("base", config.ar.layers_base), ("head", config.ar.layers_head))
    return [f"ar.trans_{half}.blocks.{i}" for half, count in halves for i in range(count)]
