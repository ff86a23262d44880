"""Runs in the peer environment: the real-width slice in transformers, driven by JSON lines on standard input.

Commands: {"do": "decode", "steps": n} -> seconds per step; {"do": "prefill"} -> seconds; {"do": "logits"} -> file.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DynamicCache


def main() -> None:
    folder, dtype, prompt, threads, out = sys.argv[1:6]
    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    for layer in model.model.layers:  # transformers 5.23 clamps dt where the published model does not
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (0.0, float("inf"))
    ids = torch.tensor([json.loads(prompt)])
    state: dict = {}

    @torch.inference_mode()
    def prefill(n: int) -> float:
        t0 = time.perf_counter()
        cache = DynamicCache(config=model.config)
        result = model(ids[:, :n], past_key_values=cache, use_cache=True, logits_to_keep=1)
        seconds = time.perf_counter() - t0
        state.update(cache=cache, token=result.logits[:, -1:].argmax(-1))
        return seconds

    @torch.inference_mode()
    def decode(steps: int) -> float:
        t0 = time.perf_counter()
        for _ in range(steps):
            result = model(state["token"], past_key_values=state["cache"], use_cache=True)
            state["token"] = result.logits[:, -1:].argmax(-1)
        return (time.perf_counter() - t0) / steps

    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "prefill":
            answer = prefill(command["n"])
        elif command["do"] == "decode":
            answer = decode(command["steps"])
        else:
            with torch.inference_mode():
                save_file({"logits": model(ids[:, : command["n"]]).logits[0].float().contiguous()}, out)
            answer = 0.0
        print(json.dumps({"seconds": answer}), flush=True)


main()
