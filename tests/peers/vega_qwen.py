"""Makes random tiny Qwen2.5-VL models with transformers, and records what these compute.

Run by the interpreter of the peer environment (it knows nothing of `engine`):

    python tests/peers/vega_qwen.py OUT --seed 0 --cases 12

OUT/qwen-NN: model.safetensors under the names of published checkpoints (`visual.`, `model.`), config.json with
transformers' keys and {grid, images, text: token counts before, between and behind}, and peer.safetensors (fp32):
pixels [N, 3, H, W] (normalised), tokens [N, rows * columns, out] (merged), embeds [T, D], positions i64 [3, T] of a
prompt of N images with text around them, hidden [T, D] behind the last norm, logits [T, V].
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

IMAGE, START, END = 5, 6, 7


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Every parameter: norms around one, the rest around zero, so that no zero hides a mistake."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            one = ("norm" in name or "ln_q" in name) and not name.endswith("bias")
            p.copy_(1 + 0.1 * noise if one else noise * (0.08 if p.dim() < 2 else p[0].numel() ** -0.5))


def patches_of(images: torch.Tensor, patch: int) -> torch.Tensor:
    """[N * rows * columns, 3 * 2 * p * p]: the frame twice, patches in the order of merged tokens, 2 x 2 together."""
    n, _, height, width = images.shape
    rows, columns = height // patch // 2, width // patch // 2
    x = images.reshape(n, 3, rows, 2, patch, columns, 2, patch).permute(0, 2, 5, 3, 6, 1, 4, 7)
    x = x.reshape(-1, 3, 1, patch, patch).expand(-1, -1, 2, -1, -1)
    return x.reshape(-1, 3 * 2 * patch * patch)


def case(folder: Path, seed: int) -> None:
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    heads, depth, patch = rng.choice([1, 2, 3]), rng.choice([2, 3, 4]), rng.choice([4, 7, 14])
    section = rng.choice([[2, 1, 1], [2, 3, 3], [4, 2, 2], [4, 6, 6]])
    head_dim, kv, share = 2 * sum(section), rng.choice([1, 2]), rng.choice([1, 2, 7])
    width = kv * share * head_dim
    vision = {"hidden_size": heads * rng.choice([8, 16, 20]), "num_heads": heads, "depth": depth,
              "intermediate_size": rng.choice([40, 64]), "out_hidden_size": width, "patch_size": patch,
              "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": patch * rng.choice([4, 8]),
              "fullatt_block_indexes": rng.choice([[], [0], [depth - 1], [0, depth - 1]])}  # fmt: skip
    text = {"hidden_size": width, "num_attention_heads": kv * share, "num_key_value_heads": kv,
            "intermediate_size": rng.choice([48, 96]), "num_hidden_layers": rng.choice([1, 2, 3]),
            "vocab_size": rng.randint(50, 120), "rms_norm_eps": 1e-6, "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": rng.choice([1e4, 1e6]), "mrope_section": section},
            "tie_word_embeddings": False}  # fmt: skip
    tied = rng.random() < 0.3
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, vision_start_token_id=START,
                              vision_end_token_id=END, tie_word_embeddings=tied)  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    randomise(model, g)
    if tied:
        model.tie_weights()
    grid = (2 * rng.randint(1, 6), 2 * rng.randint(1, 7))
    n, around = rng.choice([1, 2, 3]), [rng.randint(1, 6) for _ in range(3)]
    images = torch.randn(n, 3, grid[0] * patch, grid[1] * patch, generator=g)
    cells = grid[0] * grid[1] // 4
    ids = [1] * around[0]
    for i in range(n):
        ids += [START] + [IMAGE] * cells + [END] + ([2] * around[1] if i + 1 < n else [])
    ids = torch.tensor([ids + [3] * around[2]])
    grids = torch.tensor([[1, *grid]] * n)
    embeds = torch.randn(ids.shape[1], width, generator=g)
    with torch.no_grad():
        tokens = model.model.visual(patches_of(images, patch), grid_thw=grids).pooler_output
        positions, _ = model.model.get_rope_index(ids, mm_token_type_ids=(ids == IMAGE).long(), image_grid_thw=grids)
        out = model.model.language_model(inputs_embeds=embeds[None], position_ids=positions)
        hidden = out.last_hidden_state[0]
        logits = model.lm_head(hidden)
    stored = {}
    for k, v in model.state_dict().items():
        name = k.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        if not (tied and name == "lm_head.weight"):
            stored[name] = v.contiguous().clone()
    folder.mkdir(parents=True)
    save_file(stored, folder / "model.safetensors")
    flat = {k: v for k, v in text.items() if k != "rope_parameters"}
    flat |= {"rope_theta": text["rope_parameters"]["rope_theta"], "tie_word_embeddings": tied,
             "rope_scaling": {"type": "mrope", "mrope_section": section}, "vision_config": vision}  # fmt: skip
    about = {"config": flat, "grid": grid, "images": n, "text": around}
    (folder / "config.json").write_text(json.dumps(about))
    save_file({"pixels": images, "tokens": tokens.reshape(n, cells, -1).contiguous(), "embeds": embeds,
               "positions": positions[:, 0].contiguous(), "hidden": hidden.contiguous(),
               "logits": logits.contiguous()}, folder / "peer.safetensors")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=12)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for i in range(args.cases):
        case(args.out / f"qwen-{i:02d}", 1000 * args.seed + i)


if __name__ == "__main__":
    main()
