"""SigLIP's image tower (Zhai et al. 2023): weights under the published names, and the ops of a pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine.blocks.transformer import TowerBuffers, TowerLayer, tower_layer
from engine.blocks.weights import Packer, Recipe
from engine.ops import attention as attention_op
from engine.ops import gemm as gemm_op
from engine.ops.attention import KVCache
from engine.ops.conv import conv_patches
from engine.ops.gemm import PackedMatrix, gemm
from engine.runtime.arena import Arena, Tensor

NORM_EPS = 1e-6


@dataclass(frozen=True)
class SiglipConfig:
    """Square images of `image_size` pixels in patches of `patch_size`; pixels that fill no patch are not seen."""

    width: int
    depth: int
    heads: int
    mlp: int
    patch_size: int
    image_size: int

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def side(self) -> int:
        """Tokens along an edge."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Tokens of one image."""
        return self.side**2


def siglip_shapes(prefix: str, c: SiglipConfig) -> dict[str, tuple[int, ...]]:
    """Tensors of the embeddings and layers, and their shapes."""
    patch, d = (c.width, 3, c.patch_size, c.patch_size), c.width
    out: dict[str, tuple[int, ...]] = {
        f"{prefix}embeddings.patch_embedding.weight": patch,
        f"{prefix}embeddings.patch_embedding.bias": (d,),
        f"{prefix}embeddings.position_embedding.weight": (c.tokens, d),
    }
    for i in range(c.depth):
        p = f"{prefix}encoder.layers.{i}"
        sizes = {f"self_attn.{w}_proj": (d, d) for w in ("q", "k", "v", "out")}
        for name, shape in (sizes | {"mlp.fc1": (c.mlp, d), "mlp.fc2": (d, c.mlp)}).items():
            out[f"{p}.{name}.weight"], out[f"{p}.{name}.bias"] = shape, shape[:1]
        for name in ("layer_norm1", "layer_norm2"):
            out[f"{p}.{name}.weight"] = out[f"{p}.{name}.bias"] = (d,)
    return out


@dataclass
class SiglipWeights:
    """patch: columns (y, x, channel); positions f32 [images * tokens, width]."""

    patch: PackedMatrix
    patch_bias: Tensor
    positions: Tensor
    layers: list[TowerLayer]


def load_siglip(
    packer: Packer, recipe: Recipe, prefix: str, c: SiglipConfig, images: int, done: Callable[[], object] = lambda: None
) -> SiglipWeights:
    """images: that share a pass. done: called after each layer."""

    def product(name: str, names: list[str], k: int) -> tuple[PackedMatrix, Tensor]:
        weights = packer.matrix(name, [f"{n}.weight" for n in names], recipe.format("vision", k))
        return weights, packer.stacked(f"{name}.bias", [f"{n}.bias" for n in names])

    def layer(i: int) -> TowerLayer:
        p = f"{prefix}encoder.layers.{i}"

        def norm(n: int) -> tuple[Tensor, Tensor]:
            return packer.vector(f"{p}.layer_norm{n}.weight"), packer.vector(f"{p}.layer_norm{n}.bias")

        made = TowerLayer(
            *norm(1), *product(f"{p}.qkv", [f"{p}.self_attn.{w}_proj" for w in "qkv"], c.width),
            *product(f"{p}.out", [f"{p}.self_attn.out_proj"], c.width), *norm(2),
            *product(f"{p}.fc1", [f"{p}.mlp.fc1"], c.width), *product(f"{p}.fc2", [f"{p}.mlp.fc2"], c.mlp),
        )  # fmt: skip
        done()
        return made

    patch, position = f"{prefix}embeddings.patch_embedding", f"{prefix}embeddings.position_embedding.weight"
    return SiglipWeights(
        packer.matrix(patch, [f"{patch}.weight"], recipe.dtype, width=3 * c.patch_size**2,
                      fn=lambda w: w.transpose(0, 2, 3, 1)),
        packer.vector(f"{patch}.bias"),
        packer.put(position, (images * c.tokens, c.width), lambda: np.tile(packer.value(position), (images, 1))),
        [layer(i) for i in range(c.depth)],
    )  # fmt: skip


def workspace_bytes(c: SiglipConfig, images: int) -> int:
    """Of a pass of `images`."""
    m = images * c.tokens
    return max(
        gemm_op.workspace_bytes(m, max(c.width, c.mlp, 3 * c.patch_size**2)),
        attention_op.workspace_bytes(c.tokens, c.heads, c.head_dim, _room(c)),
    )


def _room(c: SiglipConfig) -> int:
    return -(-c.tokens // 16) * 16


class SiglipTower:
    """Buffers of a pass and its ops. images f32 [n, S, S, 3] in [-1, 1]; x f32 [n * tokens, width], what is seen."""

    def __init__(
        self, arena: Arena, c: SiglipConfig, weights: SiglipWeights, images: int, kv_format: str, ws: Tensor
    ) -> None:
        self.config, self.weights, self._ws = c, weights, ws
        m = images * c.tokens

        def buffer(name: str, width: int) -> Tensor:
            return arena.alloc(f"vision.{name}", (m, width))

        self.images = arena.alloc("images", (images, c.image_size, c.image_size, 3), "f32", "io")
        self._patches = buffer("patches", 3 * c.patch_size**2)
        cache = KVCache.empty(arena, "vision.kv", c.heads, c.head_dim, _room(c), kv_format, images, "workspace")
        zeros = arena.alloc("vision.pos", (images,), "i32", "io")
        self._b = TowerBuffers(buffer("x", c.width), buffer("qkv", 3 * c.width), buffer("mixed", c.width),
                               buffer("hidden", c.mlp), cache, zeros, ws)  # fmt: skip
        self.x = self._b.x

    def look(self, n: int) -> Tensor:
        """The first n images through every layer, no norm behind them; f32 [n * tokens, width]."""
        c, w, b, m = self.config, self.weights, self._b, n * self.config.tokens

        def rows(t: Tensor) -> Tensor:
            return t.slice(0, (m, t.shape[1]))

        patches, x = rows(self._patches), rows(b.x)
        conv_patches(self.images.slice(0, (n, *self.images.shape[1:])), patches, size=c.patch_size,
                     stride=c.patch_size, label="patches")  # fmt: skip
        gemm(patches, w.patch, x, bias=w.patch_bias, residual=rows(w.positions), ws=self._ws, label="patch")
        some = TowerBuffers(x, rows(b.qkv), rows(b.mixed), rows(b.hidden), b.cache.first(n), b.pos.slice(0, (n,)), b.ws)
        for i, layer in enumerate(w.layers):
            tower_layer(layer, some, heads=c.heads, eps=NORM_EPS, label=f"vision.{i}")
        return x
