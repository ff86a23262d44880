"""Convert a pickle of tensors (.pt, .pth, .tar of torch) that you trust into safetensors, which the engine reads.

    pip install "quintet-engine[torch]"
    python examples/convert_pickle.py Wan2.1_VAE.pth wan/Wan2.1_VAE.safetensors
    python examples/convert_pickle.py wan_prompt_embedding.pt wan/wan_prompt_embedding.safetensors

`torch.load(weights_only=True)` unpickles tensors and plain containers, nothing that runs code; still, convert files
whose origin you know. Taken are the tensors of a dictionary, of that under `--inside` where there is one, or a tensor
that stands alone, which gets `--name`. A view of a larger storage is written as what it shows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import CheckpointError, EngineError
from engine.io.checkpoint import save

ALONE = ("context", "embedding")  # what trainers call a tensor that stands alone in a dictionary


def unpickle(path: Path) -> Any:
    """What a pickle of tensors and plain containers holds."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as fault:
        raise CheckpointError(f"{path} is no pickle of tensors alone ({str(fault)[:200]})") from fault


def tensors_of(path: Path, inside: str | None, alone: str) -> dict[str, tuple[str, np.ndarray]]:
    """Name to (safetensors dtype, array); bf16 as its bits."""
    import torch

    whole = unpickle(path)
    if inside is not None:
        if not isinstance(whole, Mapping) or not isinstance(whole.get(inside), Mapping):
            raise CheckpointError(f"{path} has no dictionary under {inside!r}")
        whole = whole[inside]
    if isinstance(whole, torch.Tensor):
        whole = {alone: whole}
    if not isinstance(whole, Mapping):
        raise CheckpointError(f"{path} holds a {type(whole).__name__}, neither a tensor nor a dictionary of tensors")
    found = {str(k): v for k, v in whole.items() if isinstance(v, torch.Tensor)}
    if len(found) == 1 and next(iter(found)) in ALONE:
        found = {alone: next(iter(found.values()))}
    if not found:
        raise CheckpointError(f"{path} has no tensors; name the dictionary that holds them with --inside")
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
             torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip
    out = {}
    for name, value in found.items():
        if value.dtype not in names:
            raise CheckpointError(
                f"{path}: tensor {name!r} is {value.dtype}; one of {', '.join(names.values())} is read"
            )
        value = value.detach().contiguous()
        bits = value.view(torch.int16).numpy().view(np.uint16) if value.dtype == torch.bfloat16 else value.numpy()
        out[name] = (names[value.dtype], bits)
    return out


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pickle", type=Path)
    parser.add_argument("out", type=Path, help="a .safetensors file that does not exist")
    parser.add_argument("--inside", help="key of the dictionary that holds the tensors")
    parser.add_argument("--name", default="context", help="of a tensor that stands alone (default: context)")
    args = parser.parse_args(argv)
    if args.out.suffix != ".safetensors" or args.out.exists():
        parser.error(f"{args.out} exists or is no .safetensors file; name one that does not exist")
    try:
        found = tensors_of(args.pickle, args.inside, args.name)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        save(args.out, found)
    except EngineError as fault:
        sys.exit(f"convert_pickle: {fault}")
    print(f"{len(found)} tensors in {args.out}")


if __name__ == "__main__":
    main()
