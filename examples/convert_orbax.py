"""Convert a pi0.5 checkpoint of openpi or FASTER (JAX, Orbax) into a folder that `engine.load` reads.

    pip install "quintet-engine[jax]"
    python examples/convert_orbax.py checkpoints/pi05_faster/29999 out --horizon 50 --alpha 0.6 --u0 0.9

The source is a step folder: params/ (Orbax) and assets/<id>/norm_stats.json. Written are model.safetensors under
lerobot's names, config.json, norm_stats.json, and, where a schedule is given, faster.json. The training code keeps
horizon, steps and schedule in its own configuration, not in the checkpoint, so they are arguments here.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import CheckpointError, ConfigError, EngineError
from engine.io.checkpoint import STORAGE, TensorInfo, f32_to_bf16, save
from engine.io.files import member
from engine.io.sidecar import NAME, parse_sidecar
from engine.io.statistics import read_norm_stats
from engine.models.pi05.config import EXPERT, PROJECTOR, TRUNK, VISION, Pi05Config
from engine.models.pi05.weights import shapes

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


# ---- the tree ------------------------------------------------------------------------------------------------------


def leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """`a/b/c` and array of every leaf; the wrapper `params` on top and `value` around an array are left out."""
    for key, value in tree.items():
        name = f"{path}/{key}" if path else str(key)
        if isinstance(value, Mapping):
            yield from leaves(value, "" if name == "params" else name)
        else:  # only here: attention has a projection of that name
            yield name if key != "value" else path, np.asarray(value)


class Leaves:
    """The leaves by path; remembers which were taken."""

    def __init__(self, tree: Mapping[str, Any]) -> None:
        self._left: dict[str, np.ndarray] = {}
        for path, array in leaves(tree):
            if path in self._left:
                raise CheckpointError(f"leaf {path} is there twice; give params/ of one checkpoint")
            self._left[path] = array

    def take(self, path: str, *axes: int | None) -> np.ndarray:
        """The array at `path`, of as many axes as given; an axis that is not None must have that size."""
        if path not in self._left:
            raise CheckpointError(f"leaf {path} is missing; give params/ of a pi0.5 checkpoint (pi0 has no adaRMS)")
        array = self._left.pop(path)
        want = [size if size is not None else got for size, got in zip(axes, array.shape)]
        if len(axes) != array.ndim or list(array.shape) != want or array.size == 0:
            raise CheckpointError(f"leaf {path} has shape {list(array.shape)}, not {list(axes)} (None: any size)")
        return array

    def finish(self) -> None:
        if self._left:
            names = ", ".join(sorted(self._left)[:5])
            hint = "; merge LoRA weights first" if any("lora" in name for name in self._left) else ""
            raise CheckpointError(f"{len(self._left)} leaves are not part of pi0.5: {names}{hint}")


def convert(tree: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Map the tree of a pi0.5 to lerobot's tensors.

    Args:
        tree: nested mappings with arrays at the end, as the checkpoint holds them; layers are stacked on axis 0.

    Returns:
        Tensors by canonical name (views where nothing has to move) in the dtype of the tree, and the sizes that tensors
        do not show, under their names in config.json.

    Raises:
        CheckpointError: a leaf is missing, unknown or of a wrong shape.
    """
    left, out = Leaves(tree), {}

    def linear(name: str, path: str, inputs: int | None = None) -> None:
        out[f"{name}.weight"] = left.take(f"{path}/kernel", inputs, None).T
        out[f"{name}.bias"] = left.take(f"{path}/bias", out[f"{name}.weight"].shape[0])

    # Vision.
    img = "PaliGemma/img"
    kernel = left.take(f"{img}/embedding/kernel", None, None, 3, None)
    width = kernel.shape[3]
    out[f"{VISION}embeddings.patch_embedding.weight"] = kernel.transpose(3, 2, 0, 1)
    out[f"{VISION}embeddings.patch_embedding.bias"] = left.take(f"{img}/embedding/bias", width)
    out[f"{VISION}embeddings.position_embedding.weight"] = left.take(f"{img}/pos_embedding", 1, None, width)[0]
    block = f"{img}/Transformer/encoderblock"
    for i in (0, 1):
        scale = left.take(f"{block}/LayerNorm_{i}/scale", None, width)
        bias = left.take(f"{block}/LayerNorm_{i}/bias", len(scale), width)
        for layer in range(len(scale)):
            name = f"{VISION}encoder.layers.{layer}.layer_norm{i + 1}"
            out[f"{name}.weight"], out[f"{name}.bias"] = scale[layer], bias[layer]
    depth = len(scale)
    for i in (0, 1):
        kernels = left.take(f"{block}/MlpBlock_0/Dense_{i}/kernel", depth, None, None)
        biases = left.take(f"{block}/MlpBlock_0/Dense_{i}/bias", depth, kernels.shape[2])
        for layer in range(depth):
            name = f"{VISION}encoder.layers.{layer}.mlp.fc{i + 1}"
            out[f"{name}.weight"], out[f"{name}.bias"] = kernels[layer].T, biases[layer]
    vision_heads = 0
    attention = f"{block}/MultiHeadDotProductAttention_0"
    for which, name in (("query", "q"), ("key", "k"), ("value", "v")):
        kernels = left.take(f"{attention}/{which}/kernel", depth, width, None, None)
        vision_heads, head_dim = kernels.shape[2:]
        biases = left.take(f"{attention}/{which}/bias", depth, vision_heads, head_dim)
        for layer in range(depth):
            stem = f"{VISION}encoder.layers.{layer}.self_attn.{name}_proj"
            out[f"{stem}.weight"] = kernels[layer].reshape(width, -1).T
            out[f"{stem}.bias"] = biases[layer].reshape(-1)
    kernels = left.take(f"{attention}/out/kernel", depth, vision_heads, None, width)
    biases = left.take(f"{attention}/out/bias", depth, width)
    for layer in range(depth):
        stem = f"{VISION}encoder.layers.{layer}.self_attn.out_proj"
        out[f"{stem}.weight"], out[f"{stem}.bias"] = kernels[layer].reshape(-1, width).T, biases[layer]
    out[f"{VISION}post_layernorm.weight"] = left.take(f"{img}/Transformer/encoder_norm/scale", width)
    out[f"{VISION}post_layernorm.bias"] = left.take(f"{img}/Transformer/encoder_norm/bias", width)
    linear(f"{PROJECTOR}linear", f"{img}/head", width)

    # The trunk has no suffix, the action expert is "_1".
    llm = "PaliGemma/llm"
    table = left.take(f"{llm}/embedder/input_embedding", None, None)
    out[f"{TRUNK}embed_tokens.weight"] = table
    heads = head_dim = 0
    for stack, end in ((TRUNK, ""), (EXPERT, "_1")):
        q = left.take(f"{llm}/layers/attn/q_einsum{end}/w", None, heads or None, None, head_dim or None)
        depth, heads, width, head_dim = q.shape
        kv = left.take(f"{llm}/layers/attn/kv_einsum{end}/w", depth, 2, None, width, head_dim)
        o = left.take(f"{llm}/layers/attn/attn_vec_einsum{end}/w", depth, heads, head_dim, width)
        gate_up = left.take(f"{llm}/layers/mlp{end}/gating_einsum", depth, 2, width, None)
        down = left.take(f"{llm}/layers/mlp{end}/linear", depth, gate_up.shape[3], width)
        for layer in range(depth):
            p = f"{stack}layers.{layer}"
            out[f"{p}.self_attn.q_proj.weight"] = q[layer].transpose(0, 2, 1).reshape(-1, width)
            for i, name in enumerate("kv"):
                out[f"{p}.self_attn.{name}_proj.weight"] = kv[layer, i].transpose(0, 2, 1).reshape(-1, width)
            out[f"{p}.self_attn.o_proj.weight"] = o[layer].reshape(-1, width).T
            out[f"{p}.mlp.gate_proj.weight"], out[f"{p}.mlp.up_proj.weight"] = gate_up[layer, 0].T, gate_up[layer, 1].T
            out[f"{p}.mlp.down_proj.weight"] = down[layer].T
        for path, name in (("pre_attention_norm", "input_layernorm"), ("pre_ffw_norm", "post_attention_layernorm")):
            if end:
                kernels = left.take(f"{llm}/layers/{path}_1/Dense_0/kernel", depth, width, 3 * width)
                biases = left.take(f"{llm}/layers/{path}_1/Dense_0/bias", depth, 3 * width)
                for layer in range(depth):
                    stem = f"{stack}layers.{layer}.{name}.dense"
                    out[f"{stem}.weight"], out[f"{stem}.bias"] = kernels[layer].T, biases[layer]
            else:
                scale = left.take(f"{llm}/layers/{path}/scale", depth, width)
                out |= {f"{stack}layers.{layer}.{name}.weight": scale[layer] for layer in range(depth)}
    left.take(f"{llm}/final_norm/scale", None)  # nothing reads the output of the trunk
    linear(f"{EXPERT}norm.dense", f"{llm}/final_norm_1/Dense_0", width)
    for name in ("action_in_proj", "action_out_proj", "time_mlp_in", "time_mlp_out"):
        linear(name, name)
    left.finish()
    return out, {"num_attention_heads": heads, "head_dim": head_dim, "vision_num_heads": vision_heads}


# ---- the folder ----------------------------------------------------------------------------------------------------


class Arrays:
    """Named arrays as a tensor source."""

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self._tensors = tensors

    def keys(self) -> list[str]:
        return sorted(self._tensors)

    def info(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise CheckpointError(f"the tree gives no tensor {name}")
        array = self._tensors[name]
        return TensorInfo(name, "F32", array.shape, array.nbytes)

    def read(self, name: str) -> np.ndarray:
        return self._tensors[name]

    def release(self, name: str) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is open."""


def stored(name: str, array: np.ndarray, dtype: str) -> tuple[str, np.ndarray]:
    """(safetensors dtype, array in its storage type); `dtype` is float32, bfloat16 or keep."""
    own = array.dtype.name
    if own not in DTYPES:
        raise CheckpointError(f"tensor {name} is {own}; one of {', '.join(DTYPES)} is needed")
    if own == "bfloat16":  # a type of its own, from outside numpy
        array = np.ascontiguousarray(array)
        if dtype != "float32":
            return "BF16", array.view(np.uint16)
        return "F32", (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if dtype == "bfloat16":
        return "BF16", f32_to_bf16(np.ascontiguousarray(array, np.float32))
    kind = DTYPES[own] if dtype == "keep" else "F32"
    return kind, array.astype(STORAGE[kind], copy=False)


def write_folder(
    out: Path, tree: Mapping[str, Any], settings: Mapping[str, Any], sidecar: Mapping[str, Any] | None, dtype: str
) -> Pi05Config:
    """Write model.safetensors, config.json and, if given, faster.json; nothing is written where one is not usable.

    Args:
        out: folder, made if needed.
        tree: see `convert`.
        settings: keys of config.json that the tree does not show (chunk_size, num_inference_steps, ...).
        sidecar: content of faster.json.
        dtype: float32, bfloat16 or keep.
    """
    tensors, counts = convert(tree)
    config = Pi05Config.from_json({"type": "pi05", **counts, **settings}, Arrays(tensors))
    wrong = [name for name, shape in shapes(config).items() if tensors[name].shape != shape]
    if wrong:
        raise CheckpointError(f"tensor {wrong[0]} has shape {list(tensors[wrong[0]].shape)}; the layers are not equal")
    if sidecar is not None:
        parse_sidecar(dict(sidecar))
    save(out, {f"model.{name}": stored(name, array, dtype) for name, array in tensors.items()})
    (out / "config.json").write_text(json.dumps(config.to_json(), indent=2) + "\n")
    if sidecar is not None:
        (out / NAME).write_text(json.dumps(sidecar, indent=2) + "\n")
    return config


def restore(params: Path) -> Mapping[str, Any]:
    """Read an Orbax folder into nested mappings of numpy arrays."""
    try:
        import jax
        import orbax.checkpoint as ocp
    except ImportError as fault:
        raise EngineError(f"{fault}; reading Orbax needs: pip install 'quintet-engine[jax]'") from fault
    with ocp.PyTreeCheckpointer() as reader:
        described = reader.metadata(params.resolve())
        item = getattr(described, "item_metadata", described)
        item = getattr(item, "tree", item)
        # As numpy, whatever devices the training used.
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        return reader.restore(params.resolve(), ocp.args.PyTreeRestore(item=item, restore_args=how))


def find_stats(source: Path, asset: str | None) -> Path | None:
    """assets/<id>/norm_stats.json; the id must be named where there are several."""
    if asset is not None:
        return member(source / "assets", f"{asset}/norm_stats.json", ConfigError)
    found = sorted((source / "assets").glob("**/norm_stats.json"))
    if len(found) > 1:
        names = ", ".join(str(path.parent.relative_to(source / "assets")) for path in found)
        raise ConfigError(f"{source} has statistics of several robots ({names}); choose one with --asset")
    return found[0] if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="step folder with params/, or params/ itself")
    parser.add_argument("out", type=Path)
    parser.add_argument("--horizon", type=int, required=True, help="actions per chunk (action_horizon of the training)")
    parser.add_argument("--steps", type=int, default=10, help="flow steps")
    parser.add_argument("--tokens", type=int, default=200, help="room for text tokens (max_token_len)")
    parser.add_argument("--dtype", choices=["keep", "float32", "bfloat16"], default="keep")
    parser.add_argument("--asset", help="which assets/<id>/norm_stats.json")
    parser.add_argument("--alpha", type=float, help="of the horizon-aware schedule of the training")
    parser.add_argument("--u0", type=float, help="of the horizon-aware schedule of the training")
    parser.add_argument("--max-delay", type=int)
    parser.add_argument("--norm", choices=["quantile", "zscore"])
    parser.add_argument("--robot-dims", type=int)
    parser.add_argument("--no-state-in-prompt", action="store_true", help="discrete_state_input was False")
    args = parser.parse_args()
    if (args.alpha is None) != (args.u0 is None):
        parser.error("--alpha and --u0 go together")
    sidecar: dict[str, Any] = {"num_steps": args.steps, "max_delay": args.max_delay, "norm": args.norm,
                               "robot_dims": args.robot_dims}  # fmt: skip
    if args.alpha is not None:
        sidecar |= {"schedule": "has", "alpha": args.alpha, "u0": args.u0}
    if args.no_state_in_prompt:
        sidecar["discrete_state_input"] = False
    sidecar = {key: value for key, value in sidecar.items() if value is not None}
    settings = {"chunk_size": args.horizon, "num_inference_steps": args.steps, "tokenizer_max_length": args.tokens}
    try:
        source = args.source.parent if args.source.name == "params" else args.source
        stats = find_stats(source, args.asset)
        if stats is not None:
            read_norm_stats(stats)  # refuse damaged ones before the long part
        config = write_folder(args.out, restore(source / "params"), settings, sidecar, args.dtype)
        if stats is not None:
            shutil.copyfile(stats, args.out / "norm_stats.json")
    except EngineError as fault:
        sys.exit(f"convert_orbax: {fault}")
    if stats is None:
        print(f"no assets/*/norm_stats.json under {source}: give norm_stats.json when you load", file=sys.stderr)
    print(f"{args.out}: pi0.5, width {config.trunk.width} and {config.expert.width}, {config.trunk.depth} layers")


if __name__ == "__main__":
    main()
