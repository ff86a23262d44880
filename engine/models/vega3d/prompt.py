"""The text encoder's output for an empty text, without a text encoder at run time (UMT5; Chung et al. 2023).

An empty text is one token, </s>. Alone in its sequence it attends to itself: attention is the product of the value and
output matrices, and no position plays a part. So a layer is a few matrix-vector products, read from disk one after
another.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from engine.blocks.diffusion import gelu_tanh
from engine.blocks.weights import Packer
from engine.errors import CheckpointError
from engine.io.checkpoint import Checkpoint, MappedSource, SafetensorsFile, Source, bf16_to_f32, check_finite
from engine.io.mapped import Rule
from engine.runtime.arena import Arena

END = 1  # </s>
EPS = 1e-6
FILES = ("models_t5_umt5-xxl-enc-bf16.safetensors", "text_encoder")
_MAX_LAYERS = 1024
_THEIRS = "encoder.block"
_RULES: list[Rule] = [  # of transformers; the original names are kept
    ("shared.", "token_embedding."),
    ("encoder.final_layer_norm.", "norm."),
    (re.compile(_THEIRS + r"\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\."), None),
    (re.compile(_THEIRS + r"\.(\d+)\.layer\.0\.SelfAttention\."), r"blocks.\1.attn."),
    (re.compile(_THEIRS + r"\.(\d+)\.layer\.0\.layer_norm\."), r"blocks.\1.norm1."),
    (re.compile(_THEIRS + r"\.(\d+)\.layer\.1\.layer_norm\."), r"blocks.\1.norm2."),
    (re.compile(_THEIRS + r"\.(\d+)\.layer\.1\.DenseReluDense\.wi_0\."), r"blocks.\1.ffn.gate.0."),
    (re.compile(_THEIRS + r"\.(\d+)\.layer\.1\.DenseReluDense\.wi_1\."), r"blocks.\1.ffn.fc1."),
    (re.compile(_THEIRS + r"\.(\d+)\.layer\.1\.DenseReluDense\.wo\."), r"blocks.\1.ffn.fc2."),
]


def find(folder: Path) -> Path | None:
    """The text encoder of a generator's folder, published as one file or in diffusers' layout."""
    return next((folder / name for name in FILES if (folder / name).exists()), None)


def empty_text(path: Path) -> np.ndarray:
    """f32 [1, text_dim] from the text encoder's weights: a safetensors file, or a folder of them.

    Raises: CheckpointError (a tensor is missing, misshapen or not finite).
    """
    with Checkpoint(path) if path.is_dir() else SafetensorsFile(path) as source:
        return embed(source)


def embed(source: Source) -> np.ndarray:
    """f32 [1, text_dim]: the encoder on </s> alone, in fp64."""
    keys = list(source.keys())
    twice = "shared.weight" in keys  # the table may have one name of two, or both
    view = MappedSource(source, [("encoder.embed_tokens.", None if twice else "token_embedding."), *_RULES])
    read = Packer(view, Arena(dry=True))
    table = view.info("token_embedding.weight")
    if len(table.shape) != 2 or table.shape[0] <= END:
        raise CheckpointError(f"token_embedding.weight is {list(table.shape)}; [vocabulary, text_dim] is needed")
    h = _row(view, "token_embedding.weight", END)
    d = h.size

    def weight(name: str, *shape: int | None) -> np.ndarray:
        found = view.info(name).shape
        if len(found) != len(shape) or any(want is not None and n != want for n, want in zip(found, shape)):
            raise CheckpointError(f"{name} of the text encoder is {list(found)}; {list(shape)} is needed")
        return read.value(name).astype(np.float64)

    def rms(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.square(x).mean() + EPS) * weight(f"{name}.weight", d)

    layers = {int(m[1]) for k in view.keys() if (m := re.match(r"blocks\.(\d{1,4})\.", k))}  # noqa: SIM118
    if not layers or len(layers) > _MAX_LAYERS or layers != set(range(len(layers))):
        raise CheckpointError("the text encoder's blocks are not numbered from 0 without a gap")
    for i in range(len(layers)):
        p = f"blocks.{i}"
        v = weight(f"{p}.attn.v.weight", None, d)
        h = h + weight(f"{p}.attn.o.weight", d, len(v)) @ (v @ rms(h, f"{p}.norm1"))
        n = rms(h, f"{p}.norm2")
        gate, up = weight(f"{p}.ffn.gate.0.weight", None, d) @ n, weight(f"{p}.ffn.fc1.weight", None, d) @ n
        h = h + weight(f"{p}.ffn.fc2.weight", d, len(up)) @ (gelu_tanh(gate) * up)
        for key in view.keys():  # noqa: SIM118
            if key.startswith(f"{p}."):
                view.release(key)
    return rms(h, "norm").astype(np.float32)[None]


def _row(view: MappedSource, name: str, row: int) -> np.ndarray:
    """One row of a table that may be larger than what is free, f64."""
    raw = np.ascontiguousarray(view.read(name)[row])
    value = bf16_to_f32(raw) if raw.dtype == np.uint16 else raw.astype(np.float32)
    check_finite(name, value)
    view.release(name)
    return value.astype(np.float64)
