"""Makes random tiny checkpoints of VEGA-3D's parts with diffusers and transformers, and records what these compute.

Run by the interpreter of the peer environment (it knows nothing of `engine`):

    python tests/peers/vega_diffusers.py OUT --seed 0 --cases 12

OUT/generator-NN: vae.safetensors and transformer.safetensors as diffusers names them, config.json with {vae,
transformer, timestep, block} and peer.safetensors (fp32): images [N, 3, H, W] in [-1, 1], mu [N, z, h, w] (the mode of
the posterior), z [N, z, h, w], prompt [n, text_dim], features [N, L, d] (of the block), velocity [N, z, h, w].
OUT/prompt-NN: the same with a prompt of several tokens.
OUT/vace: config.json and model.safetensors of a VACE transformer, for its names.
OUT/text-NN: model.safetensors of a UMT5 encoder as transformers names it, and peer.safetensors: states [1, 1, d],
what it gives for the token 1 alone.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel, WanVACETransformer3DModel
from safetensors.torch import save_file
from transformers import UMT5Config, UMT5EncoderModel


def randomise(model: torch.nn.Module, generator: torch.Generator, scale: float = 0.08) -> None:
    """Every parameter: norms around one, the rest around zero, so that no zero hides a mistake."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            one = ("norm" in name or "gamma" in name) and not name.endswith("bias")
            p.copy_(1 + 0.1 * noise if one else noise * (scale if p.dim() < 2 else p[0].numel() ** -0.5))


def generator_case(folder: Path, seed: int, tokens: int = 1) -> None:
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    mult = rng.choice([[1, 2], [1, 2, 4], [1, 2, 2, 3]])
    z = rng.choice([4, 8])
    vae_config = {"base_dim": rng.choice([8, 12, 16]), "z_dim": z, "dim_mult": mult,
                  "num_res_blocks": rng.choice([1, 2]), "temperal_downsample": [i > 0 for i in range(len(mult) - 1)],
                  "latents_mean": [rng.uniform(-1, 1) for _ in range(z)],
                  "latents_std": [rng.uniform(0.5, 3) for _ in range(z)]}  # fmt: skip
    vae = AutoencoderKLWan(**vae_config, scale_factor_spatial=1 << (len(mult) - 1)).eval()
    randomise(vae, g)
    heads, head_dim = rng.choice([1, 2, 3]), rng.choice([12, 16, 24, 40])
    dit_config = {"num_attention_heads": heads, "attention_head_dim": head_dim, "in_channels": z, "out_channels": z,
                  "text_dim": rng.choice([24, 32]), "freq_dim": rng.choice([32, 64]),
                  "ffn_dim": rng.choice([72, 96, 160]), "num_layers": rng.choice([2, 3, 4])}  # fmt: skip
    dit = WanTransformer3DModel(**dit_config, patch_size=(1, 2, 2)).eval()
    randomise(dit, g)
    factor = 2 << (len(mult) - 1)
    n, height, width = rng.choice([1, 2, 3]), factor * rng.randint(2, 5), factor * rng.randint(2, 6)
    images = torch.rand(n, 3, height, width, generator=g) * 2 - 1
    timestep, block = rng.choice([52, 101, 299, 700]), rng.randrange(dit_config["num_layers"])
    prompt = torch.randn(tokens, dit_config["text_dim"], generator=g)
    with torch.no_grad():
        mu = torch.cat([vae.encode(x[None, :, None]).latent_dist.mode() for x in images])
        latents = torch.randn(mu.shape, generator=g)
        seen = []
        dit.blocks[block].register_forward_hook(lambda _m, _i, out: seen.append(out))
        text = torch.nn.functional.pad(prompt, (0, 0, 0, 512 - len(prompt)))[None].expand(n, -1, -1)
        velocity = dit(latents, torch.full((n,), timestep), text, return_dict=False)[0]
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in vae.state_dict().items()}, folder / "vae.safetensors")
    save_file({k: v.contiguous() for k, v in dit.state_dict().items()}, folder / "transformer.safetensors")
    about = {"vae": vae_config, "transformer": {"_class_name": "WanTransformer3DModel", **dit_config,
             "patch_size": [1, 2, 2]}, "timestep": timestep, "block": block}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(about))
    save_file({"images": images, "mu": mu[:, :, 0].contiguous(), "z": latents[:, :, 0].contiguous(), "prompt": prompt,
               "features": seen[0].contiguous(), "velocity": velocity[:, :, 0].contiguous()},
              folder / "peer.safetensors")  # fmt: skip


def vace_names(folder: Path) -> None:
    config = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "ffn_dim": 40,
              "text_dim": 24, "freq_dim": 32, "num_layers": 3, "vace_layers": [0, 2],
              "vace_in_channels": 12}  # fmt: skip
    model = WanVACETransformer3DModel(**config)
    randomise(model, torch.Generator().manual_seed(1))
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanVACETransformer3DModel", **config}))


def text_case(folder: Path, seed: int) -> None:
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    heads = rng.choice([2, 3, 4])
    config = UMT5Config(vocab_size=rng.randint(5, 40), d_model=rng.choice([24, 40, 64]), d_kv=rng.choice([8, 12]),
                        d_ff=rng.choice([48, 72]), num_layers=rng.choice([1, 2, 4]), num_heads=heads)  # fmt: skip
    model = UMT5EncoderModel(config).eval()
    randomise(model, g)
    with torch.no_grad():
        states = model(torch.tensor([[1]])).last_hidden_state
    folder.mkdir(parents=True)
    weights = {k: v.contiguous().clone() for k, v in model.state_dict().items()}
    if seed % 2:  # one name of a tied table is enough
        weights.pop("encoder.embed_tokens.weight")
    elif seed % 4:
        weights.pop("shared.weight")
    save_file(weights, folder / "model.safetensors")
    save_file({"states": states}, folder / "peer.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=12)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for i in range(args.cases):
        generator_case(args.out / f"generator-{i:02d}", 1000 * args.seed + i)
        generator_case(args.out / f"prompt-{i:02d}", 1000 * args.seed + 500 + i, tokens=(2, 3, 7, 40)[i % 4])
        text_case(args.out / f"text-{i:02d}", 1000 * args.seed + i)
    vace_names(args.out / "vace")


if __name__ == "__main__":
    main()
