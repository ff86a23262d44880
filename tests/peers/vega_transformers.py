"""Makes random tiny SigLIP towers and Qwen2 models with transformers, and records what these compute.

Run by the interpreter of the peer environment (it knows nothing of `engine`):

    python tests/peers/vega_transformers.py OUT --seed 0 --cases 12

OUT/model-NN: model.safetensors under the names of LLaVA-Video's checkpoints, config.json with {vision, text} as
transformers has them, and peer.safetensors (fp32): images [N, 3, S, S], tokens [N, n, width] behind the layer before
last, embeds [T, D], hidden [T, D] behind the last norm, logits [T, V].
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

PREFIX = "model.vision_tower.vision_tower.vision_model."


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Every parameter: norms around one, the rest around zero, so that no zero hides a mistake."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            one = "norm" in name and not name.endswith("bias")
            p.copy_(1 + 0.1 * noise if one else noise * (0.08 if p.dim() < 2 else p[0].numel() ** -0.5))


def case(folder: Path, seed: int) -> None:
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    heads, patch, side = rng.choice([1, 2, 3]), rng.choice([4, 5, 7]), rng.randint(3, 7)
    vision = {"hidden_size": heads * rng.choice([8, 16, 18]), "num_attention_heads": heads,
              "intermediate_size": rng.choice([40, 64]), "num_hidden_layers": rng.choice([2, 3, 4]),
              "patch_size": patch, "image_size": side * patch + rng.randrange(patch)}  # fmt: skip
    kv, share, head_dim = rng.choice([1, 2]), rng.choice([1, 2, 7]), rng.choice([8, 16, 32])
    text = {"hidden_size": kv * share * head_dim, "num_attention_heads": kv * share, "num_key_value_heads": kv,
            "intermediate_size": rng.choice([48, 96]), "num_hidden_layers": rng.choice([1, 2, 3]),
            "vocab_size": rng.randint(50, 120), "rms_norm_eps": rng.choice([1e-6, 1e-5]),
            "rope_theta": rng.choice([1e4, 1e6]), "max_position_embeddings": 512,
            "tie_word_embeddings": rng.random() < 0.3}  # fmt: skip
    tower = SiglipVisionModel(SiglipVisionConfig(**vision, vision_use_head=False)).eval()
    given = {k: v for k, v in text.items() if k != "rope_theta"}
    rope = {"rope_type": "default", "rope_theta": text["rope_theta"]}
    model = Qwen2ForCausalLM(Qwen2Config(**given, rope_parameters=rope)).eval()
    for part in (tower, model):
        randomise(part, g)
    size, rows = vision["image_size"], rng.randint(5, 40)
    images = torch.rand(rng.choice([1, 2, 4]), 3, size, size, generator=g) * 2 - 1
    embeds = torch.randn(rows, text["hidden_size"], generator=g)
    with torch.no_grad():
        tokens = tower(images, output_hidden_states=True).hidden_states[-2]
        out = model(inputs_embeds=embeds[None], output_hidden_states=True)
    # The published checkpoint lacks the layer whose output nobody reads.
    last = f"encoder.layers.{vision['num_hidden_layers'] - 1}."
    stored = {PREFIX + k.removeprefix("vision_model."): v for k, v in tower.state_dict().items() if last not in k}
    stored |= {k: v for k, v in model.state_dict().items() if not (text["tie_word_embeddings"] and "lm_head" in k)}
    folder.mkdir(parents=True)
    save_file({k: v.contiguous().clone() for k, v in stored.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"vision": vision, "text": text}))
    save_file({"images": images, "tokens": tokens.contiguous(), "embeds": embeds, "logits": out.logits[0].contiguous(),
               "hidden": out.hidden_states[-1][0].contiguous()}, folder / "peer.safetensors")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=12)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    for i in range(args.cases):
        case(args.out / f"model-{i:02d}", 1000 * args.seed + i)


if __name__ == "__main__":
    main()
