"""diffusers' Wan 2.1 (1.3B) with random weights, one frame: `python wan_diffusers.py THREADS DTYPE WIDTH HEIGHT`.

A line of JSON asks, {"do": "encode"} (the VAE's encoder) or {"do": "transform"} (the whole transformer, as published
code runs it for features); a line answers with the seconds. Knows nothing of `engine`.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel


class Wan:
    def __init__(self, dtype: torch.dtype, width: int, height: int) -> None:
        torch.manual_seed(0)
        vae = AutoencoderKLWan(base_dim=96, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2,
                               temperal_downsample=[False, True, True])  # fmt: skip
        self.vae = vae.to(dtype).eval()
        with torch.device("meta"):
            model = WanTransformer3DModel(
                patch_size=(1, 2, 2), num_attention_heads=12, attention_head_dim=128, in_channels=16, out_channels=16,
                text_dim=4096, freq_dim=256, ffn_dim=8960, num_layers=30,
            )  # fmt: skip
        self.model = model.to_empty(device="cpu").to(dtype).eval()
        for p in self.model.parameters():
            p.data.normal_(0, 0.02)
        self.model.rope = type(self.model.rope)(128, (1, 2, 2), 1024)  # its tables were lost with the meta device
        self.image = (torch.rand(1, 3, 1, height, width) * 2 - 1).to(dtype)
        self.latent = torch.randn(1, 16, 1, height // 8, width // 8).to(dtype)
        self.text = torch.randn(1, 512, 4096).to(dtype)

    def encode(self) -> None:
        self.vae.encode(self.image).latent_dist.mode()

    def transform(self) -> None:
        self.model(self.latent, torch.tensor([299]), self.text, return_dict=False)


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    wan = Wan(getattr(torch, sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    print(json.dumps({"seconds": 0}), flush=True)
    for line in sys.stdin:
        verb = json.loads(line)["do"]
        with torch.inference_mode():
            t0 = time.perf_counter()
            getattr(wan, verb)()
        print(json.dumps({"seconds": time.perf_counter() - t0}), flush=True)


if __name__ == "__main__":
    main()
