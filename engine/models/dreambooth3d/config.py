"""Configuration of 3DreamBooth's base: the diffusion transformer of HunyuanVideo-1.5."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from engine.errors import ConfigError
from engine.io.values import choice, flag, integer, number, show

# What the released text-to-video models have.
_ONLY = {
    "mlp_act_type": "gelu_tanh", "concat_condition": True, "qkv_bias": True, "qk_norm": True, "qk_norm_type": "rms",
    "text_projection": "single_refiner", "text_pool_type": None, "vision_projection": "linear",
    "use_cond_type_embedding": True,
}  # fmt: skip
SHIFTS = {"720p": 9.0, "480p": 5.0}  # of the noise schedule, by resolution of the text-to-video models
IDEAL_SIZES = {960: "720p", 640: "480p"}  # diffusers' target_size


@dataclass(frozen=True)
class DitConfig:
    """The transformer (HunyuanVideo-1.5, text to video).

    channels: of a latent; in_channels: of what is embedded (the latent, a condition's latent and its mask). axes:
    channels of a head that turn by time, row and column. text_dim, glyph_dim, vision_dim: of the conditions' states;
    glyph_dim 0: it reads no quoted texts. sample_size, sample_frames: (height, width) in pixels and frames of videos
    where a caller asks for no others; None: 16:9 at its resolution.
    """

    width: int = 2048
    heads: int = 16
    layers: int = 54
    refiner_layers: int = 2
    mlp: int = 8192
    channels: int = 32
    in_channels: int = 65
    text_dim: int = 3584
    glyph_dim: int = 1472
    vision_dim: int = 1152
    axes: tuple[int, int, int] = (16, 56, 56)
    theta: float = 256.0
    freq_dim: int = 256
    eps: float = 1e-6
    resolution: str = "720p"
    sample_size: tuple[int, int] | None = None
    sample_frames: int = 49

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def shift(self) -> float:
        """Of the noise schedule: the resolution decides it, whatever a request asks for."""
        return SHIFTS[self.resolution]

    @staticmethod
    def from_json(value: Any) -> DitConfig:
        """config.json of the published folder or of diffusers' `transformer/`; ConfigError names what does not fit."""
        if not isinstance(value, dict):
            raise ConfigError(f"transformer: {show(value)} is not a JSON object")
        o, d = value, DitConfig()
        diffusers = "attention_head_dim" in o

        def read(official: str, theirs: str, default: int, high: int = 1 << 20) -> int:
            key = theirs if diffusers else official
            return integer(key, o.get(key, default), 1, high)

        heads = read("heads_num", "num_attention_heads", d.heads, 1024)
        if diffusers:
            width = heads * integer("attention_head_dim", o["attention_head_dim"], 2, 4096)
        else:
            width = integer("hidden_size", o.get("hidden_size", d.width), 2, 1 << 16)
        for key in ("use_meanflow", "guidance_embed"):
            if flag(key, o.get(key, False)):
                raise ConfigError(f"{key} is set: distilled checkpoints are not supported; use the base one")
        patch = o.get("patch_size", 1)
        if patch not in (1, [1, 1, 1]) or o.get("patch_size_t", 1) != 1 or o.get("mm_single_blocks_depth", 0):
            raise ConfigError("patch_size must be 1 and mm_single_blocks_depth 0: this is not HunyuanVideo-1.5")
        for key, want in _ONLY.items():
            if o.get(key, want) != want:
                raise ConfigError(f"{key} = {show(o[key])}; only {want!r} is supported")
        ratio = number("mlp_ratio", o.get("mlp_ratio" if diffusers else "mlp_width_ratio", 4), 0.1, 64)
        channels = read("out_channels", "out_channels", d.channels, 1024)
        in_channels = read("in_channels", "in_channels", d.in_channels if diffusers else channels, 4096)
        if not diffusers:
            in_channels = 2 * in_channels + 1  # concat_condition
        if in_channels != 2 * channels + 1:
            raise ConfigError(
                f"{in_channels} channels are embedded; {2 * channels + 1} (two latents, a mask) are needed"
            )
        axes = o.get("rope_axes_dim" if diffusers else "rope_dim_list", list(d.axes))
        if (
            not isinstance(axes, list | tuple)
            or len(axes) != 3
            or any(type(n) is not int or n < 2 or n % 2 for n in axes)
        ):
            raise ConfigError(f"rope axes {show(axes)}; three even counts are needed")
        if width % heads or sum(axes) != width // heads:
            raise ConfigError(f"{width} channels in {heads} heads with axes {axes}: a head's channels are their sum")
        if diffusers:
            size = o.get("target_size", 960)
            if not isinstance(size, int) or size not in IDEAL_SIZES:
                raise ConfigError(f"target_size {show(size)} is not one of {', '.join(map(str, IDEAL_SIZES))}")
            resolution, task = IDEAL_SIZES[size], o.get("task_type", "t2v")
        else:
            resolution, task = o.get("ideal_resolution", d.resolution), o.get("ideal_task", "t2v")
            choice("ideal_resolution", resolution, SHIFTS)
        choice("task", task, ("t2v",))
        sample = o.get("sample_size")
        if sample is not None:
            if not isinstance(sample, list | tuple) or len(sample) != 2:
                raise ConfigError(f"sample_size {show(sample)} is not [height, width]")
            sample = tuple(integer("sample_size", n, 1, 1 << 13) for n in sample)
        return DitConfig(
            width, heads, read("mm_double_blocks_depth", "num_layers", d.layers, 1024),
            integer("num_refiner_layers", o.get("num_refiner_layers", d.refiner_layers), 1, 64), round(width * ratio),
            channels, in_channels, read("text_states_dim", "text_embed_dim", d.text_dim),
            read("glyph_dim", "text_embed_2_dim", d.glyph_dim) if flag("glyph_byT5_v2", o.get("glyph_byT5_v2", True))
            else 0,
            read("vision_states_dim", "image_embed_dim", d.vision_dim),
            (axes[0], axes[1], axes[2]), number("rope_theta", o.get("rope_theta", d.theta), 1.0, 1e9),
            resolution=resolution, sample_size=sample,
            sample_frames=integer("sample_frames", o.get("sample_frames", d.sample_frames), 1, 1 << 12),
        )  # fmt: skip


@dataclass(frozen=True)
class VaeConfig:
    """The VAE of HunyuanVideo-1.5. widths: channels of the encoder's levels (the decoder has them in reverse); layers:
    residual blocks of a level (the decoder has one more); spatial, temporal: pixels and frames of a latent's cell."""

    widths: tuple[int, ...] = (128, 256, 512, 1024, 1024)
    layers: int = 2
    z: int = 32
    spatial: int = 16
    temporal: int = 4
    scaling: float = 1.03682

    @property
    def halvings(self) -> list[tuple[bool, bool]]:
        """Behind each level of the encoder, whether rows and columns, and whether time is halved."""
        space, time = self.spatial.bit_length() - 1, self.temporal.bit_length() - 1
        return [(i < space, space - time <= i < space) for i in range(len(self.widths))]

    @staticmethod
    def from_json(value: Any) -> VaeConfig:
        """config.json of the published VAE or of diffusers'."""
        if not isinstance(value, dict):
            raise ConfigError(f"vae: {show(value)} is not a JSON object")
        o, d = value, VaeConfig()
        widths = o.get("block_out_channels", list(d.widths))
        if not isinstance(widths, list | tuple) or not 2 <= len(widths) <= 8:
            raise ConfigError(f"vae.block_out_channels = {show(widths)}; 2 to 8 counts are needed")
        widths = tuple(integer("vae.block_out_channels", n, 1, 1 << 14) for n in widths)

        def read(official: str, theirs: str, default: int) -> int:
            n = integer(official, o.get(official, o.get(theirs, default)), 1, 1 << len(widths) - 1)
            if n & (n - 1):
                raise ConfigError(f"vae.{official} = {n} is not a power of two")
            return n

        spatial = read("ffactor_spatial", "spatial_compression_ratio", d.spatial)
        temporal = read("ffactor_temporal", "temporal_compression_ratio", d.temporal)
        if temporal > spatial:
            raise ConfigError(f"vae: time is compressed {temporal}-fold, more than space ({spatial})")
        if o.get("shift_factor") is not None:
            raise ConfigError("vae.shift_factor is set; this is not the VAE of HunyuanVideo-1.5")
        for key, want in (("in_channels", 3), ("out_channels", 3), ("downsample_match_channel", True),
                          ("upsample_match_channel", True)):  # fmt: skip
            if o.get(key, want) != want:
                raise ConfigError(f"vae.{key} = {show(o[key])}; only {want!r} is supported")
        out = VaeConfig(
            widths, integer("vae.layers_per_block", o.get("layers_per_block", d.layers), 1, 16),
            integer("vae.latent_channels", o.get("latent_channels", d.z), 1, 1024), spatial, temporal,
            number("vae.scaling_factor", o.get("scaling_factor", d.scaling), 1e-6, 1e6),
        )  # fmt: skip
        for order in (widths, widths[::-1]):  # the decoder's first levels double what the encoder's first ones halve
            for i, ((space, _), (before, behind)) in enumerate(zip(out.halvings, pairwise(order))):
                if not space and before != behind:
                    raise ConfigError(f"vae: level {i} changes {before} channels to {behind} on one grid")
        # Shortcuts without weights repeat channels, or average groups of them.
        groups = [(widths[-1], 2 * out.z)]
        for (space, time), (before, behind) in zip(out.halvings, pairwise(widths)):
            if space:
                more = 8 if time else 4
                groups += [(behind, more), (4 * before, behind), (4 * behind, before)]
        for many, few in groups:
            if many % few:
                raise ConfigError(f"vae: {many} channels do not divide into {few} (widths {list(widths)}, z {out.z})")
        return out
