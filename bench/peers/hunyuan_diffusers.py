"""diffusers' HunyuanVideo-1.5 transformer with random weights: `python hunyuan_diffusers.py THREADS LAYERS FRAMES ROWS
COLUMNS`.

A line of JSON asks, {"do": "transform"} (both rows of guidance as one batch, texts padded as its pipeline pads them); a
line answers with the seconds. Knows nothing of `engine`.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from diffusers import HunyuanVideo15Transformer3DModel

VALID = (40, 60)  # tokens of the negative and the positive prompt


class Transformer:
    def __init__(self, layers: int, frames: int, rows: int, columns: int) -> None:
        torch.manual_seed(0)
        with torch.device("meta"):
            model = HunyuanVideo15Transformer3DModel(
                in_channels=65, out_channels=32, num_attention_heads=16, attention_head_dim=128, num_layers=layers,
                num_refiner_layers=2, mlp_ratio=4.0, patch_size=1, patch_size_t=1, text_embed_dim=3584,
                text_embed_2_dim=1472, image_embed_dim=1152, rope_axes_dim=(16, 56, 56), target_size=640,
                task_type="t2v",
            )  # fmt: skip
        rope = type(model.rope)(1, 1, (16, 56, 56), 256.0)  # its tables are lost with the meta device
        self.model = model.to_empty(device="cpu").to(torch.bfloat16).eval()
        self.model.rope = rope
        for p in self.model.parameters():
            p.data.normal_(0, 0.02)

        def padded(slots: int, width: int, valid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
            mask = torch.arange(slots)[None] < torch.tensor(valid)[:, None]
            return torch.randn(2, slots, width, dtype=torch.bfloat16), mask

        text, text_mask = padded(1000, 3584, VALID)
        glyphs, glyph_mask = padded(256, 1472, (0, 0))
        self.given = {
            "hidden_states": torch.randn(2, 65, frames, rows, columns, dtype=torch.bfloat16),
            "timestep": torch.tensor([800.0, 800.0], dtype=torch.bfloat16), "encoder_hidden_states": text,
            "encoder_attention_mask": text_mask, "encoder_hidden_states_2": glyphs,
            "encoder_attention_mask_2": glyph_mask, "image_embeds": torch.zeros(2, 729, 1152, dtype=torch.bfloat16),
        }  # fmt: skip

    def transform(self) -> None:
        self.model(**self.given, return_dict=False)


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    model = Transformer(*(int(n) for n in sys.argv[2:]))
    print(json.dumps({"seconds": 0}), flush=True)
    for line in sys.stdin:
        verb = json.loads(line)["do"]
        with torch.inference_mode():
            t0 = time.perf_counter()
            getattr(model, verb)()
        print(json.dumps({"seconds": time.perf_counter() - t0}), flush=True)


if __name__ == "__main__":
    main()
