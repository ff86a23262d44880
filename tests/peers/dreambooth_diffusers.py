"""Makes random tiny parts of HunyuanVideo-1.5 with diffusers, and records what these compute.

Run by the interpreter of the peer environment (it knows nothing of `engine`):

    python tests/peers/dreambooth_diffusers.py OUT --seed 0 --cases 12

OUT/case-NN: vae.safetensors and transformer.safetensors as diffusers names them, config.json with {vae, transformer,
tile} and peer.safetensors (fp32). Names begin with `vae.`: image [3, 1, H, W] and video [3, T, H, W] in [-1, 1], their
moments, latent and decoded; large [3, 1, H, W] in tiles of `tile` pixels: moments_tiled, decoded_tiled (of
latent_large). Names begin with `dit.`: latent [z, T, h, w], time [1], states [n, text_dim], glyphs [m, glyph_dim],
velocity, and without_glyphs.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Transformer3DModel
from safetensors.torch import save_file


def randomise(model: torch.nn.Module, generator: torch.Generator, scale: float = 0.08) -> None:
    """Every parameter: norms around one, the rest around zero, so that no zero hides a mistake."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            one = ("norm" in name or "gamma" in name) and p.squeeze().dim() < 2 and not name.endswith("bias")
            p.copy_(1 + 0.1 * noise if one else noise * (scale if p.dim() < 2 else 0.8 * p[0].numel() ** -0.5))


def vae_case(rng: random.Random, g: torch.Generator) -> tuple[dict, torch.nn.Module, dict[str, torch.Tensor], int]:
    z, base = rng.choice([2, 4]), rng.choice([8, 16])
    config = {"latent_channels": z, "block_out_channels": [base, base, 2 * base, 2 * base, 2 * base],
              "layers_per_block": rng.choice([1, 2])}  # fmt: skip
    vae = AutoencoderKLHunyuanVideo15(**config).eval()
    randomise(vae, g)
    t, h, w = 4 * rng.randint(1, 2) + 1, 16 * rng.randint(1, 3), 16 * rng.randint(1, 3)
    image = torch.rand(3, 1, h, w, generator=g) * 2 - 1
    video = torch.rand(3, t, h, w, generator=g) * 2 - 1
    latent = torch.randn(z, rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 3), generator=g)
    tile = 128
    large = torch.rand(3, 1, 16 * rng.randint(9, 18), 16 * rng.randint(9, 18), generator=g) * 2 - 1
    latent_large = torch.randn(z, 1, rng.randint(9, 18), rng.randint(9, 18), generator=g)
    io = {"image": image, "video": video, "latent": latent, "large": large, "latent_large": latent_large}
    with torch.no_grad():
        for name in ("image", "video"):
            io[f"{name}_moments"] = vae.encode(io[name][None]).latent_dist.parameters[0]
        io["decoded"] = vae.decode(latent[None]).sample[0]
        vae.enable_tiling(tile_sample_min_height=tile, tile_sample_min_width=tile, tile_overlap_factor=0.125)
        vae.tile_latent_min_height = vae.tile_latent_min_width = tile // 16
        io["moments_tiled"] = vae.encode(large[None]).latent_dist.parameters[0]
        io["decoded_tiled"] = vae.decode(latent_large[None]).sample[0]
    return config | {"spatial_compression_ratio": 16, "temporal_compression_ratio": 4}, vae, io, tile


def dit_case(rng: random.Random, g: torch.Generator) -> tuple[dict, torch.nn.Module, dict[str, torch.Tensor]]:
    axes = rng.choice([(8, 12, 12), (4, 6, 6), (4, 10, 10)])
    z, text = rng.choice([4, 8]), rng.choice([32, 48])
    config = {"in_channels": 2 * z + 1, "out_channels": z, "num_attention_heads": rng.choice([1, 2, 3]),
              "attention_head_dim": sum(axes), "num_layers": rng.choice([1, 2, 3]),
              "num_refiner_layers": rng.choice([1, 2]), "mlp_ratio": 4.0, "patch_size": 1, "patch_size_t": 1,
              "text_embed_dim": text, "text_embed_2_dim": 56, "image_embed_dim": 40,
              "rope_axes_dim": list(axes)}  # fmt: skip
    dit = HunyuanVideo15Transformer3DModel(**config).eval()
    randomise(dit, g)
    t, h, w, n, m = rng.randint(1, 4), rng.randint(2, 5), rng.randint(2, 5), rng.randint(2, 9), rng.randint(1, 5)
    latent, time = torch.randn(z, t, h, w, generator=g), torch.rand(1, generator=g) * 1000
    states, glyphs = torch.randn(n, text, generator=g), torch.randn(m, 56, generator=g)
    x = torch.nn.functional.pad(latent[None], (0, 0, 0, 0, 0, 0, 0, z + 1))
    io = {"latent": latent, "time": time, "states": states, "glyphs": glyphs}
    with torch.no_grad():
        for name, count in (("velocity", m), ("without_glyphs", 0)):
            mask = torch.zeros(1, m)
            mask[:, :count] = 1
            io[name] = dit(x, time, states[None], torch.ones(1, n), None, glyphs[None], mask,
                           image_embeds=torch.zeros(1, 3, 40), return_dict=False)[0][0]  # fmt: skip
    return config, dit, io


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=12)
    args = parser.parse_args()
    for case in range(args.cases):
        rng, g = random.Random(f"{args.seed} {case}"), torch.Generator().manual_seed(args.seed * 1000 + case)
        vae_config, vae, one, tile = vae_case(rng, g)
        dit_config, dit, two = dit_case(rng, g)
        folder = args.out / f"case-{case:02d}"
        folder.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in vae.state_dict().items()}, folder / "vae.safetensors")
        save_file({k: v.contiguous() for k, v in dit.state_dict().items()}, folder / "transformer.safetensors")
        io = {f"vae.{k}": v for k, v in one.items()} | {f"dit.{k}": v for k, v in two.items()}
        save_file({k: v.float().contiguous() for k, v in io.items()}, folder / "peer.safetensors")
        (folder / "config.json").write_text(json.dumps({"vae": vae_config, "transformer": dit_config, "tile": tile}))


if __name__ == "__main__":
    main()
