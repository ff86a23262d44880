"""A tiny transformer of 3DreamBooth with weights by a hash of their names, as the golden data has them."""

from __future__ import annotations

import functools
import json
import zlib
from pathlib import Path

import numpy as np
import tokenizers
import torch
from _source import Tensors
from torch import Tensor

from engine.blocks.qwen_language import LanguageConfig
from engine.blocks.weights import Recipe
from engine.io.checkpoint import SafetensorsFile, save
from engine.models.dreambooth3d.config import DitConfig, VaeConfig
from engine.models.dreambooth3d.dit import Denoiser, Savings
from engine.models.dreambooth3d.dit_weights import DitLoader, Subject, TimeTables
from engine.models.dreambooth3d.glyphs import GlyphConfig, glyph_shapes
from engine.models.dreambooth3d.sampler import Sampler
from engine.models.dreambooth3d.text import text_shapes
from engine.models.dreambooth3d.tiles import Tiles, Tiling
from engine.models.dreambooth3d.vae import Vae
from engine.models.dreambooth3d.vae_weights import VaeLoader
from engine.models.dreambooth3d.weights import KINDS, adapter_shapes, dit_shapes, vae_shapes
from engine.runtime.arena import Arena
from engine.runtime.plan import Plan

GOLDEN = Path(__file__).resolve().parents[1] / "data/dreambooth3d/golden.safetensors"
CONFIG = DitConfig(64, 2, 3, 2, 256, 8, 17, 48, 1472, 40, (8, 12, 12))
RANK, TIME = 4, 812.5


def det(name: str, shape: tuple[int, ...], scale: float) -> Tensor:
    """The golden data's values: a hash of the name and of each element's number, uniform with this deviation."""
    with np.errstate(over="ignore"):
        x = np.arange(int(np.prod(shape)), dtype=np.uint32) * np.uint32(2654435761) + np.uint32(
            zlib.crc32(name.encode())
        )
        x ^= x >> np.uint32(16)
        x *= np.uint32(2246822519)
        x ^= x >> np.uint32(13)
        x *= np.uint32(3266489917)
        x ^= x >> np.uint32(16)
    u = x.astype(np.float64) / 2**32
    return torch.from_numpy(((2 * u - 1) * 3**0.5 * scale).astype(np.float32)).reshape(shape)


@functools.cache
def weights(c: DitConfig = CONFIG) -> dict[str, Tensor]:
    out = {}
    for name, shape in dit_shapes(c).items():
        if len(shape) > 1:
            out[name] = det(name, shape, 0.8 / float(np.prod(shape[1:])) ** 0.5)
        else:
            out[name] = det(name, shape, 0.1) + name.endswith("weight")
    return out


@functools.cache
def adapter(kind: str, modules: tuple[str, ...], c: DitConfig = CONFIG) -> dict[str, Tensor]:
    out = {}
    for name, shape in adapter_shapes(c, RANK, modules).items():
        fan = float(np.prod(shape[1:]))
        out[name] = det(f"{kind}:{name}", shape, 0.8 / fan**0.5 if "lora_A" in name else 0.05)
    return out


def views(count: int = 2) -> list[Tensor]:
    return [det(f"in.ref{i}", (8, 4, 6), 1) for i in range(count)]


def states(row: str) -> Tensor:
    return det(f"in.txt.{row}", (20, 48), 1)[: {"uncond": 5, "cond": 9}[row]]


def latent() -> Tensor:
    return det("in.latent", (8, 3, 4, 6), 1)


@functools.cache
def golden(name: str) -> Tensor:
    with SafetensorsFile(GOLDEN) as file:
        return torch.from_numpy(np.array(file.read(name)))


# ---- the engine ------------------------------------------------------------------------------------------------------


def as_source(tensors: dict[str, Tensor]) -> Tensors:
    return Tensors({k: v.detach().numpy() for k, v in tensors.items()})


def as_rows(z: Tensor) -> np.ndarray:
    """[z, T, h, w] or [z, h, w] as rows of cells."""
    return np.ascontiguousarray(z.flatten(1).T.numpy())


class Tiny:
    """The golden transformer as the engine runs it."""

    def __init__(
        self, *, subject: Subject | None = None, c: DitConfig = CONFIG, dtype: str = "f32", quant: str | None = None,
        savings: Savings | None = None, kept: int = 0, image: int = 160, references: int = 96, text: int = 16,
        steps: int = 6, base: dict[str, Tensor] | None = None, named: bool = False, device: str = "cpu",
    ) -> None:  # fmt: skip
        self.c, self.arena, self.plans = c, Arena(device), dict[str, Plan]()
        source = as_source(base or weights(c))
        self.loader = DitLoader(c, source, self.arena, Recipe(dtype, quant), named=named)
        self.weights = self.loader.load()
        kv = "f32" if dtype == "f32" and quant is None else "bf16"
        self.denoiser = Denoiser(self.arena, c, self.weights, image=image, references=references, text=text,
                                 steps=steps, kv_format=kv, savings=savings or Savings(), kept=kept)  # fmt: skip
        for _ in self.loader.adapt(subject or Subject(), self.loader.streams):
            pass
        self.sampler = Sampler(self.denoiser, TimeTables(c, source), self.plans)

    def texts(self, sigmas: np.ndarray, *rows: str) -> list[np.ndarray]:
        return [self.sampler.tokens(sigmas, states(row).numpy()) for row in rows]


def joint(text: bool = False) -> Subject:
    """Both adapters of the golden data."""
    return Subject(as_source(adapter("tdb", KINDS["subject"])), as_source(adapter("tdapter", KINDS["views"])), text)


@functools.cache
def vae_weights(c: VaeConfig) -> dict[str, Tensor]:
    out = {}
    for name, shape in vae_shapes(c).items():
        if name.endswith("gamma"):
            out[name] = 1 + det(name, shape, 0.1)
        else:
            out[name] = det(name, shape, 0.1 if len(shape) == 1 else 0.8 / float(np.prod(shape[1:])) ** 0.5)
    return out


class VaeTiny:
    """A VAE as the engine runs it, for tiles of so many latent frames, rows and columns."""

    def __init__(
        self, c: VaeConfig, tiling: Tiling, frames: int, rows: int, columns: int, dtype: str = "f32", encoded: int = 1,
        base: dict[str, Tensor] | None = None, device: str = "cpu",
    ) -> None:  # fmt: skip
        self.c, self.arena, self.plans = c, Arena(device), dict[str, Plan]()
        loader = VaeLoader(c, as_source(base or vae_weights(c)), self.arena, Recipe(dtype, None))
        self.vae = Vae(self.arena, c, loader.encoder(), loader.decoder(), frames=frames, rows=rows, columns=columns,
                       kv_format=dtype, encoded=encoded)  # fmt: skip
        self.tiles = Tiles(self.vae, tiling, self.plans)


# ---- a whole checkpoint ----------------------------------------------------------------------------------------------

VAE = VaeConfig((8, 8, 16, 16, 16), 1, 8)
LANGUAGE = LanguageConfig(48, 4, 4, 2, 12, 64, 300)
GLYPHS = GlyphConfig(1472, 1, 2, 8, 32, 400)
SIZE, FRAMES = (64, 96), 9  # of the golden latent


def tokenizer() -> tokenizers.Tokenizer:
    """Bytes and the chat's special tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    return inner


def text_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    out = {}
    for name, shape in shapes.items():
        norm = len(shape) == 1 and name.endswith("weight")
        out[name] = 1 + det(name, shape, 0.1) if norm else det(name, shape, 0.8 / shape[-1] ** 0.5)
    return out


def stored(path: Path, tensors: dict[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return save(path, {k: ("F32", np.ascontiguousarray(v.numpy())) for k, v in tensors.items()}, {"format": "pt"})


def write_adapters(folder: Path, kinds: dict[str, str] | None = None) -> Path:
    """The golden adapters as a subject's folder. kinds: by folder, which of KINDS."""
    for name, kind in (kinds or {"subject_adapter": "subject", "tdapter": "views"}).items():
        seed = "tdapter" if kind == "views" else "tdb"
        stored(folder / name / "pytorch_lora_weights.safetensors", adapter(seed, KINDS[kind]))
    return folder


def write_checkpoint(folder: Path, *, glyphs: bool = True, text: bool = True) -> Path:
    """The golden transformer with a VAE, text encoders and the pre-trained adapter of views, in the released layout."""
    c, v, q = CONFIG, VAE, LANGUAGE

    def config(home: str, **values: object) -> None:
        (folder / home).mkdir(parents=True, exist_ok=True)
        (folder / home / "config.json").write_text(json.dumps(values))

    inside = "transformer/720p_t2v"
    config(inside, hidden_size=c.width, heads_num=c.heads, mm_double_blocks_depth=c.layers, mlp_width_ratio=4,
           in_channels=c.channels, out_channels=c.channels, text_states_dim=c.text_dim, vision_states_dim=c.vision_dim,
           glyph_dim=c.glyph_dim, rope_dim_list=list(c.axes), rope_theta=c.theta, concat_condition=True,
           ideal_resolution="720p", ideal_task="t2v", patch_size=[1, 1, 1])  # fmt: skip
    stored(folder / inside / "diffusion_pytorch_model.safetensors", weights())
    config("vae", block_out_channels=list(v.widths), layers_per_block=v.layers, latent_channels=v.z)
    stored(folder / "vae/diffusion_pytorch_model.safetensors", vae_weights(v))
    stored(folder / "3dapter/pytorch_lora_weights.safetensors", adapter("tdapter", KINDS["views"]))
    if text:
        config("text_encoder/llm", hidden_size=q.width, num_hidden_layers=q.layers, num_attention_heads=q.heads,
               num_key_value_heads=q.kv_heads, intermediate_size=q.mlp, vocab_size=q.vocab,
               rope_theta=q.theta)  # fmt: skip
        stored(folder / "text_encoder/llm/model.safetensors", text_weights(text_shapes(q)))
        tokenizer().save(str(folder / "text_encoder/llm/tokenizer.json"))
    if glyphs:
        g = GLYPHS
        config("text_encoder_2", d_model=g.width, num_layers=g.layers, num_heads=g.heads, d_kv=g.head_dim, d_ff=g.mlp,
               vocab_size=384)  # fmt: skip
        stored(folder / "text_encoder_2/model.safetensors", text_weights(glyph_shapes(g)))
    return folder


def picture(seed: int = 0, side: int = 80) -> np.ndarray:
    """A coloured box on white, RGBA."""
    rng = np.random.default_rng(seed)
    out = np.full((side, side, 4), 255, np.uint8)
    out[..., 3] = 0
    out[side // 4 : side // 2, side // 3 : 2 * side // 3] = [*rng.integers(0, 200, 3), 255]
    return out
