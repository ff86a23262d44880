"""Configuration of the generator: the diffusion transformer, its VAE, and how features are taken from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.io.files import read_json
from engine.io.values import choice, integer, number, show
from engine.models import GENERATORS

MAX_CONFIG_BYTES = 1_000_000
MAX_SIDE = 4096  # pixels
KINDS = ("t2v", "vace")
CROPS = ("cover", "stretch")
TRAIN_STEPS = 1000
# Per channel, of the published VAE; latents are (mu - mean) / std.
LATENT_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632,
               -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
LATENT_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382,
              1.1253, 2.8251, 1.9160)  # fmt: skip


@dataclass(frozen=True)
class VaeConfig:
    """Encoder of the video VAE on single frames. dim: width of the first stage; mult: of each stage, in dim; z: latent
    channels; blocks: residual blocks of a stage; mean, std: of the latents, [z]."""

    dim: int = 96
    z: int = 16
    mult: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    mean: tuple[float, ...] = LATENT_MEAN
    std: tuple[float, ...] = LATENT_STD

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.dim * m for m in self.mult)

    @property
    def factor(self) -> int:
        """Pixels of an image per cell of its latent, each way."""
        return 1 << (len(self.mult) - 1)

    @staticmethod
    def from_json(value: Any) -> VaeConfig:
        """diffusers' `vae/config.json`, or the same keys of our own; what is absent has its published value."""
        o, d = _object("vae", value), VaeConfig()
        mult = o.get("dim_mult", list(d.mult))
        if not isinstance(mult, list) or not 1 <= len(mult) <= 6:
            raise ConfigError(f"vae.dim_mult = {show(mult)}; a list of 1 to 6 multiples is needed")
        z = integer("vae.z_dim", o.get("z_dim", d.z), 1, 256)
        out = VaeConfig(
            integer("vae.base_dim", o.get("base_dim", d.dim), 1, 1024),
            z,
            tuple(integer("vae.dim_mult", m, 1, 64) for m in mult),
            integer("vae.num_res_blocks", o.get("num_res_blocks", d.blocks), 1, 16),
            _numbers("vae.latents_mean", o.get("latents_mean", list(d.mean)), z, -1e4),
            _numbers("vae.latents_std", o.get("latents_std", list(d.std)), z, 0.0),
        )
        for key in ("is_residual",):
            if o.get(key):
                raise ConfigError(f"vae.{key} is set: that VAE (Wan 2.2) is not supported; use the one of Wan 2.1")
        return out


@dataclass(frozen=True)
class DitConfig:
    """The diffusion transformer (Wan 2.1). vace_layers: blocks that get a hint; none for kind `t2v`."""

    kind: str = "t2v"
    dim: int = 1536
    ffn: int = 8960
    heads: int = 12
    layers: int = 30
    channels: int = 16
    freq_dim: int = 256
    text_len: int = 512
    text_dim: int = 4096
    eps: float = 1e-6
    patch: int = 2
    vace_layers: tuple[int, ...] = ()
    vace_channels: int = 96

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @staticmethod
    def from_json(value: Any) -> DitConfig:
        """config.json of the published folder or of diffusers' `transformer/`."""
        o, d = _object("generator", value), DitConfig()
        name = o.get("_class_name", "WanModel")
        diffusers = "attention_head_dim" in o
        if name not in GENERATORS:
            raise ConfigError(f"generator _class_name = {show(name)} is not one of {', '.join(GENERATORS)}")
        if diffusers:
            heads = integer("num_attention_heads", o.get("num_attention_heads", d.heads), 1, 1024)
            dim = heads * integer("attention_head_dim", o["attention_head_dim"], 2, 1024)
        else:
            heads = integer("num_heads", o.get("num_heads", d.heads), 1, 1024)
            dim = integer("dim", o.get("dim", d.dim), 1, 1 << 16)
        kind = "vace" if "vace" in str(name).lower() else choice("model_type", o.get("model_type", "t2v"), KINDS)

        def read(key: str, other: str, default: int, high: int) -> int:
            return integer(other if diffusers else key, o.get(other if diffusers else key, default), 1, high)

        patch = o.get("patch_size", [1, 2, 2])
        if patch != [1, d.patch, d.patch]:
            raise ConfigError(f"patch_size = {show(patch)}; only [1, 2, 2] is supported")
        layers = read("num_layers", "num_layers", d.layers, 1024)
        vace = tuple(o.get("vace_layers", range(0, layers, 2))) if kind == "vace" else ()
        if vace and (vace[0] != 0 or list(vace) != sorted({integer("vace_layers", i, 0, layers - 1) for i in vace})):
            raise ConfigError(f"vace_layers = {show(vace)}; ascending layers from 0 are needed")
        out = DitConfig(
            kind, dim, read("ffn_dim", "ffn_dim", d.ffn, 1 << 16), heads, layers,
            read("in_dim", "in_channels", d.channels, 256), read("freq_dim", "freq_dim", d.freq_dim, 1 << 14),
            read("text_len", "text_len", d.text_len, 4096), read("text_dim", "text_dim", d.text_dim, 1 << 16),
            number("eps", o.get("eps", d.eps), 0.0, 1.0), d.patch, vace,
            read("vace_in_dim", "vace_in_channels", d.vace_channels, 4096),
        )  # fmt: skip
        if kind == "vace" and out.vace_channels < 2 * out.channels:
            raise ConfigError(f"vace_in_dim = {out.vace_channels}; two latents of {out.channels} channels are needed")
        if dim % heads or out.head_dim % 2 or out.freq_dim % 2:
            raise ConfigError(f"generator: {dim} channels, {heads} heads, freq_dim {out.freq_dim}: heads must divide "
                              "the channels, and both quotients be even")  # fmt: skip
        if out.head_dim // 2 < 3:
            raise ConfigError(f"generator: heads of {out.head_dim} channels have no room for three axes of rotation")
        return out


@dataclass(frozen=True)
class Tap:
    """How features are taken: baked into what was trained on them.

    size: (width, height) in pixels that frames are brought to. timestep: noise level asked for, of 1000; shift: of the
    schedule. block: the block whose output is taken, negative from the end. crop: `cover` scales frames until they
    cover the size and keeps the middle; `stretch` ignores their shape. grid: (rows, columns) of features per frame,
    averaged (`pool`); None: the transformer's own grid. context_scale: weight of VACE's hints.
    """

    size: tuple[int, int] = (1280, 720)
    timestep: int = 300
    shift: float = 5.0
    block: int = -1
    crop: str = "cover"
    grid: tuple[int, int] | None = (14, 14)
    context_scale: float = 1.0

    def checked(self, dit: DitConfig, vae: VaeConfig) -> Tap:
        """With `block` counted from 0; ConfigError names what does not fit."""
        if dit.channels != vae.z:
            raise ConfigError(
                f"the transformer takes {dit.channels} latent channels, the VAE has {vae.z}; they belong to others"
            )
        size, grid = _pair("size", self.size), None if self.grid is None else _pair("grid", self.grid)
        (w, h), step = size, vae.factor * dit.patch
        if not all(isinstance(n, int) and step <= n <= MAX_SIDE and n % step == 0 for n in (w, h)):
            raise ConfigError(f"size {show(self.size)}: width and height must be multiples of {step} up to {MAX_SIDE}")
        integer("timestep", self.timestep, 0, TRAIN_STEPS)
        number("shift", self.shift, 0.0, 1000.0)
        choice("crop", self.crop, CROPS)
        block = integer("block", self.block, -dit.layers, dit.layers - 1) % dit.layers
        rows, columns = h // step, w // step
        if grid is not None and not (1 <= grid[0] <= rows and 1 <= grid[1] <= columns):
            raise ConfigError(f"grid {show(grid)} is larger than the transformer's {rows} x {columns}")
        return replace(self, size=size, grid=grid, block=block)


def read_config(folder: Path, name: str) -> dict:
    """A JSON object of a folder; ConfigError where it is missing or something else."""
    return _object(name, read_json(folder / name, limit=MAX_CONFIG_BYTES, error=ConfigError))


def _object(name: str, value: Any) -> dict:
    if not isinstance(value, dict):
        raise ConfigError(f"{name}: {show(value)} is not a JSON object")
    return value


def _pair(name: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(type(n) is int for n in value):
        raise ConfigError(f"{name} {show(value)} is not a pair of integers")
    return value[0], value[1]


def _numbers(key: str, value: Any, count: int, low: float) -> tuple[float, ...]:
    if not isinstance(value, (list, tuple)) or len(value) != count:
        raise ConfigError(f"{key} = {show(value)}; {count} numbers are needed")
    return tuple(number(key, v, low, 1e4) for v in value)
