"""From a checkpoint of VEGA-3D's multimodal language models to packed weights, under the published names."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
from tqdm.auto import tqdm

from engine.blocks.decoder import DecoderLayer
from engine.blocks.qwen_language import LanguageConfig, QwenPacker, language_shapes
from engine.blocks.qwen_vision import QwenVisionWeights, load_qwen_vision, qwen_vision_shapes
from engine.blocks.scene import position_tables
from engine.blocks.siglip import SiglipWeights, load_siglip, siglip_shapes
from engine.blocks.weights import Recipe
from engine.io.checkpoint import MappedSource, Source, expect, f32_to_bf16
from engine.io.mapped import Rule
from engine.models.vega3d.config import SceneConfig, SpatialConfig, VegaConfig
from engine.ops.fuse import Gate
from engine.ops.gemm import PackedMatrix
from engine.runtime.arena import Arena, Tensor

VISION = "model.vision_tower.vision_tower.vision_model."
QWEN = "visual."
OWN_GENERATOR = "generative_encoder.tower.model."  # where a checkpoint of variant B may hold the generator
HEADS = ("ground_head_obj", "ground_head_query")
_UNUSED: list[Rule] = [
    (re.compile(re.escape(VISION) + r"(post_layernorm|head)\."), None),
    (re.compile(r".*(rotary_emb\.inv_freq|position_ids)$"), None),
]


def canonical(source: Source, c: VegaConfig) -> MappedSource:
    """The checkpoint without what no result depends on; of variant B under the names of transformers 4."""
    rules = list(_UNUSED)
    if isinstance(c, SpatialConfig):
        rules += [("model.visual.", QWEN), ("model.language_model.", "model."), ("generative_encoder.", None)]
    if c.language.tied:
        rules.append(("lm_head.", None))
    return MappedSource(source, rules)


def own_generator(source: Source) -> MappedSource | None:
    """The generator's transformer where the checkpoint holds one."""
    if not any(key.startswith(OWN_GENERATOR) for key in source.keys()):  # noqa: SIM118
        return None
    return MappedSource(source, [(re.compile(f"(?!{re.escape(OWN_GENERATOR)})"), None), (OWN_GENERATOR, "")])


def shapes(c: VegaConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model and its shape; all are float."""
    d, out = c.language.width, language_shapes(c.language)

    def linear(name: str, rows: int, columns: int) -> None:
        out[f"{name}.weight"], out[f"{name}.bias"] = (rows, columns), (rows,)

    def fusion(name: str) -> None:
        for n in (1, 2):
            out[f"{name}.norm{n}.weight"] = out[f"{name}.norm{n}.bias"] = (d,)
        linear(f"{name}.gate_projection.0", 1, 2 * d)
        if c.blend == "residual":
            out[f"{name}.residual_scale"] = ()

    if isinstance(c, SpatialConfig):
        out |= qwen_vision_shapes(QWEN, c.vision)
        out["generative_merger.ln_q.weight"] = (c.generative,)
        linear("generative_merger.mlp.0", c.hidden, c.generative * c.vision.merge**2)
        linear("generative_merger.mlp.2", d, c.hidden)
        fusion("generative_fusion")
        return out
    assert isinstance(c, SceneConfig)
    out |= siglip_shapes(VISION, c.vision)
    linear("model.mm_projector.0", d, c.vision.width)
    linear("model.mm_projector.2", d, d)
    linear("model.generative_projector.0", d, c.generative)
    linear("model.generative_projector.2", d, d)
    fusion("model.feature_fusion")
    out["model.image_newline"] = (d,)
    if c.grounding:
        for head in HEADS:
            linear(f"{head}.0", d, d)
            linear(f"{head}.3", d, d)
            out[f"{head}.2.weight"] = out[f"{head}.2.bias"] = (d,)
        out["ground_head_zero_target"] = (d,)
    return out


# ------------------------------------------------------------------------------------------------------ packed
@dataclass
class Mlp:
    """Two products with an activation between them, and a norm: of a grounding head in front of the second, of a merger
    in front of the first."""

    fc1: PackedMatrix
    fc1_bias: Tensor
    fc2: PackedMatrix
    fc2_bias: Tensor
    norm: Tensor | None = None
    norm_bias: Tensor | None = None


@dataclass
class LanguageWeights:
    """embed: the vocabulary, and behind it rows that a scene fills."""

    embed: Tensor
    layers: list[DecoderLayer]
    norm: Tensor
    lm_head: PackedMatrix


@dataclass
class Fusion:
    """The gate of two streams; rho: of the residual blend."""

    gate: Gate
    rho: float


@dataclass
class GroundWeights:
    """Heads of objects and of the query; zero_target: f32 [D], on the host."""

    objects: Mlp
    query: Mlp
    zero_target: np.ndarray


@dataclass
class Weights:
    """The packed model. projector: semantic, of variant A; generative: projector or merger. codes: tables of the
    voxels' codes."""

    vision: SiglipWeights | QwenVisionWeights
    projector: Mlp | None
    generative: Mlp
    fusion: Fusion
    language: LanguageWeights
    newline: Tensor | None = None
    codes: tuple[Tensor, Tensor, Tensor] | None = None
    ground: GroundWeights | None = None
    notes: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


class Loader(QwenPacker):
    """Packs the parts of a model one after another."""

    def mlp(self, name: str, role: str, last: int = 2, norm: str | None = None, bias: bool = True) -> Mlp:
        """name.0 and name.last; norm: the name of one, which has a bias or not."""

        def product(i: int) -> tuple[PackedMatrix, Tensor]:
            k = self.source.info(f"{name}.{i}.weight").shape[1]
            weights = self.matrix(f"{name}.{i}", [f"{name}.{i}.weight"], self.recipe.format(role, k))
            return weights, self.vector(f"{name}.{i}.bias")

        (fc1, fc1_bias), (fc2, fc2_bias) = product(0), product(last)
        return Mlp(fc1, fc1_bias, fc2, fc2_bias, self.optional(f"{norm}.weight", norm is not None),
                   self.optional(f"{norm}.bias", norm is not None and bias))  # fmt: skip

    def language(self, c: LanguageConfig, rows: int, bar: tqdm) -> LanguageWeights:
        """rows: behind the vocabulary in the table of embeddings."""
        embed = self.table("model.embed_tokens.weight", self.recipe.table_dtype, rows=rows)
        layers = []
        for i in range(c.layers):
            layers.append(self.layer(i, c))
            bar.update()
        head = "model.embed_tokens.weight" if c.tied else "lm_head.weight"
        lm_head = self.matrix("lm_head", [head], self.recipe.format("lm_head", c.width))
        return LanguageWeights(embed, layers, self.vector("model.norm.weight"), lm_head)

    def fusion(self, c: VegaConfig, name: str) -> Fusion:
        """The norms and the gate."""
        d = c.language.width
        keys = [f"{name}.norm{n}.{part}" for n in (1, 2) for part in ("weight", "bias")]
        keys += [f"{name}.gate_projection.0.weight", f"{name}.gate_projection.0.bias"]
        if self.arena.dry:
            zero = np.zeros(d, np.float32)
            return Fusion(Gate.fold(self.arena, "gate", (zero, zero, zero, zero), np.zeros(2 * d), 0.0), 1.0)
        w1, b1, w2, b2, weight, bias = (self.value(k) for k in keys)
        gate = Gate.fold(self.arena, "gate", (w1, b1, w2, b2), weight.reshape(-1), float(bias.reshape(-1)[0]))
        scale = self.value(f"{name}.residual_scale") if c.blend == "residual" else np.ones(1)
        return Fusion(gate, float(scale.reshape(-1)[0]))

    def ground(self) -> GroundWeights:
        target = np.zeros(0, np.float32) if self.arena.dry else self.value("ground_head_zero_target")
        objects, query = (self.mlp(head, "grounding", 3, f"{head}.2") for head in HEADS)
        return GroundWeights(objects, query, target)

    def codes(self, c: SceneConfig) -> tuple[Tensor, Tensor, Tensor]:
        """Tables of the position codes by axis, as the embeddings are stored."""
        d, counts, out = c.language.width, c.voxels.counts, []
        tables = (None,) * 3 if self.arena.dry else position_tables(d, counts)
        for axis, count, table in zip("xyz", counts, tables):
            out.append(self.arena.alloc(f"code.{axis}", (count, d // 3), self.recipe.table_dtype, "weights"))
            if table is not None:
                store(out[-1], table)
        x, y, z = out
        return x, y, z

    def load(self, c: VegaConfig, images: int, rows: int, progress: bool) -> Weights:
        """images: frames of a pass; rows: of a scene in the table of embeddings."""
        assert isinstance(c, SceneConfig | SpatialConfig)
        total = c.vision.depth + c.language.layers
        with tqdm(total=total, desc="loading", unit="layer", disable=not progress, delay=1.0, leave=False) as bar:
            if isinstance(c, SpatialConfig):
                return Weights(
                    load_qwen_vision(self, self.recipe, QWEN, c.vision, bar.update), None,
                    self.mlp("generative_merger.mlp", "projector", norm="generative_merger.ln_q", bias=False),
                    self.fusion(c, "generative_fusion"), self.language(c.language, rows, bar),
                    notes=self.recipe.notes, skipped=self.source.skipped,
                )  # fmt: skip
            return Weights(
                load_siglip(self, self.recipe, VISION, c.vision, images, bar.update),
                self.mlp("model.mm_projector", "projector"), self.mlp("model.generative_projector", "projector"),
                self.fusion(c, "model.feature_fusion"), self.language(c.language, rows, bar),
                self.vector("model.image_newline"), self.codes(c), self.ground() if c.grounding else None,
                self.recipe.notes, self.source.skipped,
            )  # fmt: skip


def store(table: Tensor, values: np.ndarray) -> None:
    """f32 values into a table of f32 or bf16."""
    table.write(values if table.dtype == "f32" else f32_to_bf16(values))


def load_weights(
    c: VegaConfig, source: Source, arena: Arena, recipe: Recipe, images: int, rows: int, progress: bool = True
) -> Weights:
    """Checks every name and shape first, then packs.

    Raises: CheckpointError (missing, extra or misshapen tensors, unsupported dtype, NaN).
    """
    view = canonical(source, c)
    expect(view, shapes(c))
    return Loader(view, arena, recipe).load(c, images, rows, progress)
