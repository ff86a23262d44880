"""Random weights of VEGA-3D's parts without a peer, and how tests load them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from _source import Tensors

from engine.models.vega3d.features import Files, GeneratorFeatures
from engine.models.vega3d.generator_config import DitConfig, VaeConfig
from engine.models.vega3d.generator_weights import dit_shapes, vae_shapes


def filled(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Tensors:
    """Random fp32 tensors: norms around one, the rest by fan-in."""
    rng, values = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        noise = rng.standard_normal(shape).astype(np.float32)
        one = ("norm" in name or "gamma" in name) and not name.endswith("bias")
        scale = 0.1 if one or len(shape) < 2 else float(np.prod(shape[1:])) ** -0.5
        values[name] = one + np.float32(scale) * noise
    return Tensors(values)


VAE = VaeConfig(dim=8, z=4, mult=(1, 2), blocks=1, mean=(0.1, -0.2, 0.3, 0.0), std=(1.5, 0.7, 2.0, 1.0))
DIT = DitConfig(dim=48, ffn=64, heads=2, layers=3, channels=4, freq_dim=32, text_dim=24)


def random_generator(device: str = "cpu", dtype: str = "fp32", **options) -> GeneratorFeatures:
    """A small generator on frames of 24 x 16, tapped behind block 1."""
    prompt = np.random.default_rng(9).standard_normal((1, DIT.text_dim)).astype(np.float32)
    files = Files(DIT, VAE, filled(dit_shapes(DIT), 1), filled(vae_shapes(VAE), 2), prompt)
    given = {"size": (24, 16), "block": 1, "grid": (2, 3), "max_pixels": 4096, "progress": False} | options
    return GeneratorFeatures.load(Path("random"), source=files, device=device, dtype=dtype, **given)
