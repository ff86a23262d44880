"""Convert checkpoints of MoMask's lineage (.tar, .pth: pickles of torch) into a folder that `engine.load` reads.

    pip install "quintet-engine[torch]"
    python examples/convert_momask.py out --tokenizer net_best_fid.tar --ddm latest.tar --mean Mean.npy --std Std.npy

The engine itself reads safetensors only. Pickles are opened as convert_pickle.py does: tensors and plain containers,
nothing that runs code; still, convert files whose origin you know. Taken are the state dicts under `vq_model` or `net`
(tokenizer; it must have MoTok's diffusion decoder, `denoiser.*`) and `t2m_transformer` or `trans` (planners). A
residual quantiser gives its first codebook. A text tower that a planner carries (`clip_model.*`) is left out: give
--clip, a safetensors file under CLIP's names, and --words, its vocabulary.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from convert_pickle import unpickle

from engine.blocks.motion import HUMANML3D_STATISTICS
from engine.errors import CheckpointError, ConfigError, EngineError
from engine.io.checkpoint import Checkpoint, save
from engine.io.files import parse_json, read_bytes
from engine.io.text.clip import FILE, ClipTokenizer
from engine.models.motok.config import MAX_CONFIG_BYTES, MoTokConfig
from engine.models.motok.layout import FILES, checked, open_source

PLACES = {"tokenizer": ("vq_model", "net"), "planner_ddm": ("t2m_transformer", "trans"), "planner_ar": ("trans", "net")}
MAX_NPY = 1 << 20


def state_dict(path: Path, places: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The tensors of a pickle, as f32, without what wrappers of training put in front of their names."""
    import torch

    whole = unpickle(path)
    if not isinstance(whole, Mapping):
        raise CheckpointError(f"{path} holds no dictionary")
    inner = next((whole[p] for p in places if isinstance(whole.get(p), Mapping)), whole)
    tensors = {str(k).removeprefix("module."): v for k, v in inner.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} has no tensors under {' or '.join(places)}")
    return {k: v.float().contiguous().numpy() for k, v in tensors.items() if v.is_floating_point()}


def tokenizer(path: Path) -> dict[str, np.ndarray]:
    out = {}
    for name, value in state_dict(path, PLACES["tokenizer"]).items():
        name = name.replace("quantizer.layers.0.codebook", "quantizer.codebook")
        if name == "quantizer.codebook" or not name.startswith(
            "quantizer."
        ):  # running averages; deeper residual layers
            out[name] = value
    return out


def planner(path: Path, stem: str) -> dict[str, np.ndarray]:
    skipped = ("clip_model.", "position_enc.", "trans_base.pos_embed")
    found = state_dict(path, PLACES[stem])
    return {k: v for k, v in found.items() if not k.startswith(skipped) and not k.endswith("attn.mask")}


def array(path: Path) -> np.ndarray:
    """A .npy of numbers."""
    data = read_bytes(path, limit=MAX_NPY, error=CheckpointError)
    try:
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.seek(0)
            return np.lib.format.read_array(file, allow_pickle=False).astype(np.float32).reshape(-1)
    except ValueError as fault:
        raise CheckpointError(f"{path} is no array of numbers ({fault})") from fault


def write(folder: Path, stem: str, tensors: Mapping[str, np.ndarray]) -> None:
    save(folder / f"{stem}.safetensors", {k: ("F32", np.ascontiguousarray(v)) for k, v in tensors.items()})


def convert(args: argparse.Namespace, folder: Path) -> None:
    """Everything into `folder`, then the checks of a load."""
    raw: Any = {"dataset": args.dataset, "down_t": args.down_t}
    if args.config:
        raw = parse_json(
            read_bytes(args.config, limit=MAX_CONFIG_BYTES, error=ConfigError), str(args.config), ConfigError
        )
    config = MoTokConfig.from_json(raw)
    (folder / "config.json").write_text(json.dumps(config.to_json(), indent=1) + "\n")
    write(folder, "tokenizer", tokenizer(args.tokenizer))
    for stem, path in (("planner_ddm", args.ddm), ("planner_ar", args.ar)):
        if path:
            write(folder, stem, planner(path, stem))
    if args.clip:
        ClipTokenizer.from_file(args.words)
        shutil.copy(args.clip, folder / f"{FILES['clip.']}.safetensors")
        shutil.copy(args.words, folder / FILE)
    hints = (args.hint_mean, args.hint_std)
    if any(hints) and not all(hints):
        raise ConfigError("--hint-mean and --hint-std belong together")
    if not all(hints) and config.joints != HUMANML3D_STATISTICS.joint_mean.shape[0]:
        raise ConfigError("positions of this skeleton need --hint-mean and --hint-std")
    own = (HUMANML3D_STATISTICS.joint_mean.reshape(-1), HUMANML3D_STATISTICS.joint_std.reshape(-1))
    mean, std = (array(p) for p in hints) if all(hints) else own
    write(folder, "stats", {"mean": array(args.mean), "std": array(args.std), "hint_mean": mean, "hint_std": std})
    with open_source(folder) as source:
        checked(config, source)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--ddm", type=Path, help="discrete planner")
    parser.add_argument("--ar", type=Path, help="autoregressive planner")
    parser.add_argument("--mean", type=Path, required=True, help=".npy that the motions were normalised with")
    parser.add_argument("--std", type=Path, required=True)
    parser.add_argument("--hint-mean", type=Path, help="of joint positions; default: HumanML3D's")
    parser.add_argument("--hint-std", type=Path)
    parser.add_argument("--clip", type=Path, help="safetensors of the text tower")
    parser.add_argument("--words", type=Path, help=f"its {FILE}")
    parser.add_argument("--config", type=Path, help="config.json; default: of the data set and the downrate")
    parser.add_argument("--dataset", choices=["humanml3d", "kit"], default="humanml3d")
    parser.add_argument("--down-t", type=int, default=2, help="halvings of time: 2 is four frames a token")
    args = parser.parse_args(argv)
    if bool(args.clip) != bool(args.words):
        parser.error("--clip and --words belong together")
    if args.out.exists():
        parser.error(f"{args.out} exists; name a folder that does not")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.out.parent) as made:
            folder = Path(made) / "checkpoint"
            folder.mkdir()
            convert(args, folder)
            folder.rename(args.out)  # whole or not at all
    except EngineError as fault:
        sys.exit(f"convert_momask: {fault}")
    with Checkpoint(args.out / "tokenizer.safetensors") as source:
        print(f"written: {args.out}, {len(source.keys())} tensors of the tokenizer")


if __name__ == "__main__":
    main()
