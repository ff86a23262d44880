"""Makes random tiny text encoders of HunyuanVideo-1.5 with transformers, and records what these compute.

Run by the interpreter of the peer environment (it knows nothing of `engine`):

    python tests/peers/dreambooth_transformers.py OUT --seed 0 --cases 12

OUT/case-NN: text.safetensors (Qwen2.5-VL's language part) and glyphs.safetensors (a T5 encoder) as transformers names
them, config.json with {text, glyphs} and peer.safetensors (fp32, ids int64): ids [n] and states [n, D], the third
hidden states from the end of the whole sequence, padded on the right; glyph_ids [m], of which the last closes the text,
and glyph_states [m, D].
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

VOCAB, PADDING = 300, 4


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Every parameter: norms around one, the rest around zero."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            one = "norm" in name and p.dim() == 1
            p.copy_(1 + 0.1 * noise if one else noise * (0.1 if p.dim() < 2 else 0.8 * p.shape[-1] ** -0.5))


def text_case(rng: random.Random, g: torch.Generator) -> tuple[dict, torch.nn.Module, dict[str, torch.Tensor]]:
    kv, share, half = rng.choice([1, 2, 3]), rng.choice([1, 2, 4]), rng.choice([4, 8])
    sections = [half // 4, half // 4, half // 2]
    config = {"hidden_size": kv * share * 2 * half, "num_hidden_layers": rng.randint(3, 6),
              "num_attention_heads": kv * share, "num_key_value_heads": kv, "intermediate_size": rng.choice([40, 96]),
              "vocab_size": VOCAB, "rope_theta": rng.choice([1e4, 1e6]), "rms_norm_eps": rng.choice([1e-6, 1e-5]),
              "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": sections}}  # fmt: skip
    # What transformers reads of a published file, old or new.
    read = config | {"rope_parameters": config["rope_scaling"] | {"rope_theta": config["rope_theta"]}}
    model = Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**read, attn_implementation="eager")).eval()
    randomise(model, g)
    ids = torch.randint(0, VOCAB, (rng.randint(2, 40),), generator=g)
    padded = torch.cat([ids, torch.zeros(PADDING, dtype=torch.long)])[None]
    mask = (torch.arange(len(ids) + PADDING) < len(ids)).long()[None]
    with torch.no_grad():
        out = model(input_ids=padded, attention_mask=mask, output_hidden_states=True)
    return config, model, {"ids": ids, "states": out.hidden_states[-3][0, : len(ids)]}


def glyph_case(rng: random.Random, g: torch.Generator) -> tuple[dict, torch.nn.Module, dict[str, torch.Tensor]]:
    config = {"d_model": rng.choice([16, 40]), "num_layers": rng.randint(1, 4), "num_heads": rng.choice([1, 3]),
              "d_kv": rng.choice([8, 16]), "d_ff": rng.choice([24, 64]), "vocab_size": 384,
              "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": rng.choice([8, 32]),
              "relative_attention_max_distance": rng.choice([20, 128])}  # fmt: skip
    model = T5EncoderModel(T5Config(**config)).eval()
    randomise(model, g)
    text = "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(1, 60)))
    ids = torch.tensor([b + 3 for b in text.encode()] + [1])
    with torch.no_grad():
        states = model(input_ids=ids[None]).last_hidden_state[0]
    return config, model, {"glyph_ids": ids, "glyph_states": states}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=12)
    args = parser.parse_args()
    for case in range(args.cases):
        rng, g = random.Random(f"{args.seed} {case}"), torch.Generator().manual_seed(args.seed * 1000 + case)
        text_config, text, one = text_case(rng, g)
        glyph_config, glyphs, two = glyph_case(rng, g)
        folder = args.out / f"case-{case:02d}"
        folder.mkdir(parents=True)
        for name, model in (("text", text), ("glyphs", glyphs)):
            tensors = {k: v.clone().contiguous() for k, v in model.state_dict().items()}
            save_file(tensors, folder / f"{name}.safetensors")
        save_file({k: v.contiguous() for k, v in (one | two).items()}, folder / "peer.safetensors")
        (folder / "config.json").write_text(json.dumps({"text": text_config, "glyphs": glyph_config}))


if __name__ == "__main__":
    main()
