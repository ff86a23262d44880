"""Names and shapes of the checkpoint's tensors, whichever layout they come in."""

from __future__ import annotations

import re

from engine.errors import CheckpointError
from engine.io.checkpoint import MappedSource, Source
from engine.io.mapped import Joined, Rule
from engine.models.dreambooth3d.config import DitConfig, VaeConfig

STREAMS = ("img", "txt")
ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_proj")
#: What each adapter changes in a block: of the subject, and of the reference views.
VIEW_MODULES = tuple(f"img_{name}" for name in (*ATTENTION, "mlp.fc1", "mlp.fc2"))
SUBJECT_MODULES = (*VIEW_MODULES, *(name.replace("img", "txt") for name in VIEW_MODULES))
EMBED = "img_in.proj"
GLYPH_EPS = 1e-5  # of the norm in front of ByT5's states
GLYPH_WIDTH = 2048  # of the hidden layers in front of quoted texts, whatever the transformer's width


def dit_shapes(c: DitConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the transformer under its official name."""
    d = c.width
    out: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        out[f"{name}.weight"], out[f"{name}.bias"] = (rows, columns), (rows,)

    def norm(name: str, width: int, bias: bool = True) -> None:
        out[f"{name}.weight"] = (width,)
        if bias:
            out[f"{name}.bias"] = (width,)

    out[f"{EMBED}.weight"], out[f"{EMBED}.bias"] = (d, c.in_channels, 1, 1, 1), (d,)
    for name in ("time_in", "txt_in.t_embedder"):
        linear(f"{name}.mlp.0", d, c.freq_dim)
        linear(f"{name}.mlp.2", d, d)
    linear("txt_in.c_embedder.linear_1", d, c.text_dim)
    linear("txt_in.c_embedder.linear_2", d, d)
    linear("txt_in.input_embedder", d, c.text_dim)
    for i in range(c.refiner_layers):
        p = f"txt_in.individual_token_refiner.blocks.{i}"
        norm(f"{p}.norm1", d)
        norm(f"{p}.norm2", d)
        linear(f"{p}.self_attn_qkv", 3 * d, d)
        linear(f"{p}.self_attn_proj", d, d)
        linear(f"{p}.mlp.fc1", c.mlp, d)
        linear(f"{p}.mlp.fc2", d, c.mlp)
        linear(f"{p}.adaLN_modulation.1", 2 * d, d)
    if c.glyph_dim:
        norm("byt5_in.layernorm", c.glyph_dim)
        linear("byt5_in.fc1", GLYPH_WIDTH, c.glyph_dim)
        linear("byt5_in.fc2", GLYPH_WIDTH, GLYPH_WIDTH)
        linear("byt5_in.fc3", d, GLYPH_WIDTH)
    norm("vision_in.proj.0", c.vision_dim)
    linear("vision_in.proj.1", c.vision_dim, c.vision_dim)
    linear("vision_in.proj.3", d, c.vision_dim)
    norm("vision_in.proj.4", d)
    out["cond_type_embedding.weight"] = (3, d)
    for i in range(c.layers):
        for stream in STREAMS:
            p = f"double_blocks.{i}.{stream}"
            linear(f"{p}_mod.linear", 6 * d, d)
            for name in ATTENTION:
                linear(f"{p}_{name}", d, d)
            norm(f"{p}_attn_q_norm", c.head_dim, bias=False)
            norm(f"{p}_attn_k_norm", c.head_dim, bias=False)
            linear(f"{p}_mlp.fc1", c.mlp, d)
            linear(f"{p}_mlp.fc2", d, c.mlp)
    linear("final_layer.adaLN_modulation.1", 2 * d, d)
    linear("final_layer.linear", c.channels, d)
    return out


def vae_shapes(c: VaeConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the VAE under its official name."""
    out: dict[str, tuple[int, ...]] = {}

    def conv(name: str, rows: int, columns: int, kernel: int = 3) -> None:
        out[f"{name}.weight"], out[f"{name}.bias"] = (rows, columns, kernel, kernel, kernel), (rows,)

    def norm(name: str, width: int) -> None:
        out[f"{name}.gamma"] = (width, 1, 1, 1)

    def residual(name: str, width: int) -> None:
        for i in (1, 2):
            norm(f"{name}.norm{i}", width)
            conv(f"{name}.conv{i}.conv", width, width)

    def coder(name: str, widths: tuple[int, ...], blocks: int, ends: tuple[int, int], level: str) -> None:
        conv(f"{name}.conv_in.conv", widths[0], ends[0])
        for i, width in enumerate(widths):
            for j in range(blocks):
                residual(f"{name}.{level}.{i}.block.{j}", width)
        middle = widths[-1] if level == "down" else widths[0]
        for i in (1, 2):
            residual(f"{name}.mid.block_{i}", middle)
        norm(f"{name}.mid.attn_1.norm", middle)
        for n in ("q", "k", "v", "proj_out"):
            conv(f"{name}.mid.attn_1.{n}", middle, middle, 1)
        norm(f"{name}.norm_out", widths[-1])
        conv(f"{name}.conv_out.conv", ends[1], widths[-1])

    coder("encoder", c.widths, c.layers, (3, 2 * c.z), "down")
    coder("decoder", c.widths[::-1], c.layers + 1, (c.z, 3), "up")
    times = sum(time for _, time in c.halvings)
    for i, (space, time) in enumerate(c.halvings):
        if space:
            before, behind = c.widths[i : i + 2]
            conv(f"encoder.down.{i}.downsample.conv.conv", behind // (8 if time else 4), before)
            before, behind = c.widths[::-1][i : i + 2]
            conv(f"decoder.up.{i}.upsample.conv.conv", behind * (8 if i < times else 4), before)
    return out


def adapter_shapes(c: DitConfig, rank: int, modules: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Every tensor of an adapter of `modules` (EMBED, or names inside a block; see KINDS) of one rank."""
    shapes = dit_shapes(c)
    inside = [module for module in modules if module != EMBED]
    names = [EMBED] * (EMBED in modules) + [f"double_blocks.{i}.{module}" for i in range(c.layers) for module in inside]
    out: dict[str, tuple[int, ...]] = {}
    for name in names:
        rows, columns, *kernel = shapes[f"{name}.weight"]
        out[f"{name}.lora_A.weight"] = (rank, columns, *kernel)
        out[f"{name}.lora_B.weight"] = (rows, rank, *kernel)
    return out


# ------------------------------------------------------------------------------------------------------ layouts
_TIME = {"timestep_embedder.linear_1": "mlp.0", "timestep_embedder.linear_2": "mlp.2"}
_RENAMED = {
    "x_embedder.": "img_in.", "cond_type_embed.": "cond_type_embedding.", "proj_out.": "final_layer.linear.",
    "norm_out.linear.": "final_layer.adaLN_modulation.1.",
    **{f"time_embed.{theirs}.": f"time_in.{ours}." for theirs, ours in _TIME.items()},
    **{f"context_embedder.time_text_embed.{theirs}.": f"txt_in.t_embedder.{ours}." for theirs, ours in _TIME.items()},
    "context_embedder.time_text_embed.text_embedder.": "txt_in.c_embedder.",
    "context_embedder.proj_in.": "txt_in.input_embedder.", "context_embedder_2.norm.": "byt5_in.layernorm.",
    **{f"context_embedder_2.linear_{i}.": f"byt5_in.fc{i}." for i in (1, 2, 3)},
    "image_embedder.norm_in.": "vision_in.proj.0.", "image_embedder.linear_1.": "vision_in.proj.1.",
    "image_embedder.linear_2.": "vision_in.proj.3.", "image_embedder.norm_out.": "vision_in.proj.4.",
}  # fmt: skip
_REFINER = {"attn.to_out.0.": "self_attn_proj.", "attn.to_": "self_attn_", "ff.net.0.proj.": "mlp.fc1.",
            "ff.net.2.": "mlp.fc2.", "norm_out.linear.": "adaLN_modulation.1."}  # fmt: skip
_BLOCK = {
    "norm1.linear.": "img_mod.linear.", "norm1_context.linear.": "txt_mod.linear.",
    **{f"attn.to_{n}.": f"img_attn_{n}." for n in "qkv"}, "attn.to_out.0.": "img_attn_proj.",
    **{f"attn.add_{n}_proj.": f"txt_attn_{n}." for n in "qkv"}, "attn.to_add_out.": "txt_attn_proj.",
    **{f"attn.norm_{n}.": f"img_attn_{n}_norm." for n in "qk"},
    **{f"attn.norm_added_{n}.": f"txt_attn_{n}_norm." for n in "qk"},
    "ff.net.0.proj.": "img_mlp.fc1.", "ff.net.2.": "img_mlp.fc2.", "ff_context.net.0.proj.": "txt_mlp.fc1.",
    "ff_context.net.2.": "txt_mlp.fc2.",
}  # fmt: skip


def _inside(theirs: str, ours: str, names: dict[str, str]) -> list[Rule]:
    return [(re.compile(rf"{theirs}\.(\d+)\.{re.escape(a)}"), rf"{ours}.\1.{b}") for a, b in names.items()]


def canonical_dit(source: Source, c: DitConfig) -> Source:
    """The transformer under its official names; diffusers' files look the same behind it.

    There the refiner's products are apart, and the halves of the last modulation change places.
    """
    if not any(key.startswith("transformer_blocks.") for key in source.keys()):  # noqa: SIM118
        return source
    refiner = "txt_in.individual_token_refiner.blocks"
    rules = [
        *_inside(r"context_embedder\.token_refiner\.refiner_blocks", refiner, _REFINER),
        (re.compile(r"context_embedder\.token_refiner\.refiner_blocks\."), f"{refiner}."),
        *_inside("transformer_blocks", "double_blocks", _BLOCK), *_RENAMED.items(),
    ]  # fmt: skip
    d, parts = c.width, {}
    for kind in ("weight", "bias"):
        last = f"final_layer.adaLN_modulation.1.{kind}"
        parts[last] = [(last, d, 2 * d), (last, 0, d)]
        for i in range(c.refiner_layers):
            parts[f"{refiner}.{i}.self_attn_qkv.{kind}"] = [
                (f"{refiner}.{i}.self_attn_{n}.{kind}", 0, d) for n in "qkv"
            ]
    return Joined(MappedSource(source, rules), parts)


#: Adapters by what they change: of the subject, of reference views, of the subject in a model without references.
KINDS = {
    "subject": (EMBED, *SUBJECT_MODULES),
    "views": (EMBED, *VIEW_MODULES),
    "attention": tuple(name for name in SUBJECT_MODULES if "attn" in name),
}


def canonical_adapter(source: Source) -> MappedSource:
    """An adapter under official names; those of diffusers and a prefix `transformer.` look the same behind it."""
    plain = MappedSource(source, [("transformer.", "")])
    return MappedSource(plain, [*_inside("transformer_blocks", "double_blocks", _BLOCK), ("x_embedder.", "img_in.")])


def adapter_kind(source: Source, c: DitConfig) -> str:
    """Which of KINDS an adapter under official names is. Ranks may differ; files' own scales play no part.

    Raises: CheckpointError (a module that no kind has, one that is missing, factors that do not fit).
    """
    found, keys = set(), set(source.keys())
    for key in sorted(keys):
        name, part = key.rsplit(".lora_", 1) if ".lora_" in key else (key, "")
        if part not in ("A.weight", "B.weight"):
            raise CheckpointError(f"tensor {key!r} is no factor of an adapter (MODULE.lora_A.weight, .lora_B.weight)")
        found.add(name)
    modules = {re.sub(r"^double_blocks\.\d+\.", "", name) for name in found}
    kind = next((k for k, names in KINDS.items() if modules == set(names)), None)
    if kind is None:
        near = min(KINDS, key=lambda k: len(modules ^ set(KINDS[k])))
        odd = sorted(modules ^ set(KINDS[near]))
        raise CheckpointError(
            f"an adapter of {len(modules)} kinds of modules; the nearest, of {near!r}, differs by {', '.join(odd[:4])}"
        )
    shapes = dit_shapes(c)
    wanted = {f"double_blocks.{i}.{m}" for i in range(c.layers) for m in KINDS[kind] if m != EMBED} | (
        modules & {EMBED}
    )
    if found != wanted:
        raise CheckpointError(f"the adapter and a transformer of {c.layers} blocks differ: {sorted(found ^ wanted)[0]}")
    for name in sorted(found):
        rows, columns, *kernel = shapes[f"{name}.weight"]
        a, b = (source.info(f"{name}.lora_{m}.weight").shape if f"{name}.lora_{m}.weight" in keys else () for m in "AB")
        rank = a[0] if a else 0
        if a != (rank, columns, *kernel) or b != (rows, rank, *kernel) or not rank:
            raise CheckpointError(
                f"adapter of {name}: factors {list(a)} and {list(b)}; [r, {columns}] and [{rows}, r] are needed"
            )
    return kind


_VAE_BLOCK = {"norm1.": "norm1.", "conv1.": "conv1.", "norm2.": "norm2.", "conv2.": "conv2.",
              "conv_shortcut.": "nin_shortcut."}  # fmt: skip


def canonical_vae(source: Source) -> Source:
    """The VAE under its official names."""
    if not any(".mid_block." in key for key in source.keys()):  # noqa: SIM118
        return source
    rules: list[Rule] = []
    for coder, theirs, ours, sample in (
        ("encoder", "down_blocks", "down", "downsample"), ("decoder", "up_blocks", "up", "upsample")
    ):  # fmt: skip
        for a, b in _VAE_BLOCK.items():
            rules.append(
                (
                    re.compile(rf"{coder}\.{theirs}\.(\d+)\.resnets\.(\d+)\.{re.escape(a)}"),
                    rf"{coder}.{ours}.\1.block.\2.{b}",
                )
            )
            rules += [(f"{coder}.mid_block.resnets.{i}.{a}", f"{coder}.mid.block_{i + 1}.{b}") for i in (0, 1)]
        rules.append((re.compile(rf"{coder}\.{theirs}\.(\d+)\.{sample}rs\.0\."), rf"{coder}.{ours}.\1.{sample}."))
        for n in "qkv":
            rules.append((f"{coder}.mid_block.attentions.0.to_{n}.", f"{coder}.mid.attn_1.{n}."))
        rules.append((f"{coder}.mid_block.attentions.0.", f"{coder}.mid.attn_1."))
    return MappedSource(source, rules)
