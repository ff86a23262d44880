"""diffusers' HunyuanVideo-1.5 VAE with random weights in bf16: `python hunyuan_vae.py THREADS FRAMES ROWS COLUMNS`.

A line of JSON asks, {"do": "decode"} (one tile of latents); a line answers with the seconds. Knows nothing of `engine`.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from diffusers import AutoencoderKLHunyuanVideo15


def main() -> None:
    threads, frames, rows, columns = (int(n) for n in sys.argv[1:])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoencoderKLHunyuanVideo15()
    model = model.to_empty(device="cpu").to(torch.bfloat16).eval()
    for p in model.parameters():
        p.data.normal_(0, 0.02)
    latent = torch.randn(1, 32, frames, rows, columns, dtype=torch.bfloat16)
    print(json.dumps({"seconds": 0}), flush=True)
    for line in sys.stdin:
        assert json.loads(line)["do"] == "decode"
        with torch.inference_mode():
            t0 = time.perf_counter()
            model.decode(latent, return_dict=False)
        print(json.dumps({"seconds": time.perf_counter() - t0}), flush=True)


if __name__ == "__main__":
    main()
