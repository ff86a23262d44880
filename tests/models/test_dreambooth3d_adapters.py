"""3DreamBooth's adapters: both layouts of names, every kind, and what is wrong with a file."""

from __future__ import annotations

import numpy as np
import pytest
from _source import Tensors

from engine.errors import CheckpointError
from engine.models.dreambooth3d.config import DitConfig
from engine.models.dreambooth3d.weights import (
    KINDS,
    adapter_kind,
    adapter_shapes,
    canonical_adapter,
)

CONFIG = DitConfig(64, 2, 2, 2, 256, 8, 17, 48, 1472, 40, (8, 12, 12))
THEIRS = {"img_attn_q": "attn.to_q", "img_attn_k": "attn.to_k", "img_attn_v": "attn.to_v",
          "img_attn_proj": "attn.to_out.0", "txt_attn_q": "attn.add_q_proj", "txt_attn_k": "attn.add_k_proj",
          "txt_attn_v": "attn.add_v_proj", "txt_attn_proj": "attn.to_add_out", "img_mlp.fc1": "ff.net.0.proj",
          "img_mlp.fc2": "ff.net.2", "txt_mlp.fc1": "ff_context.net.0.proj",
          "txt_mlp.fc2": "ff_context.net.2"}  # fmt: skip


def tensors(kind: str = "subject", rank: int = 4) -> dict[str, np.ndarray]:
    return {k: np.zeros(s, np.float32) for k, s in adapter_shapes(CONFIG, rank, KINDS[kind]).items()}


def kind_of(values: dict[str, np.ndarray]) -> str:
    return adapter_kind(canonical_adapter(Tensors(values)), CONFIG)


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("theirs", [False, True])
def test_kinds(prefix: str, theirs: bool) -> None:
    for kind in KINDS:
        values = {}
        for key, value in tensors(kind).items():
            if theirs:
                for ours, name in THEIRS.items():
                    key = key.replace(f".{ours}.", f".{name}.")
                key = key.replace("double_blocks", "transformer_blocks").replace("img_in.", "x_embedder.")
            values[prefix + key] = value
        assert kind_of(values) == kind
    shapes = adapter_shapes(DitConfig(), 16, KINDS["attention"])
    assert len(shapes) == 864 and sum(int(np.prod(s)) for s in shapes.values()) == 28_311_552


def test_ranks_may_differ() -> None:
    values = tensors()
    values["img_in.proj.lora_A.weight"] = np.zeros((2, 17, 1, 1, 1), np.float32)
    values["img_in.proj.lora_B.weight"] = np.zeros((64, 2, 1, 1, 1), np.float32)
    assert kind_of(values) == "subject"


def test_faults() -> None:
    name = "double_blocks.1.img_attn_q"
    for change, words in (
        ({f"{name}.lora_A.weight": np.zeros((4, 60), np.float32)}, name),
        ({f"{name}.lora_B.weight": np.zeros((64, 5), np.float32)}, name),
        ({"double_blocks.2.img_attn_q.lora_A.weight": np.zeros((4, 64), np.float32)}, "2 blocks"),
        ({"double_blocks.1.img_mod.lora_A.weight": np.zeros((4, 64), np.float32)}, "img_mod"),
        ({"double_blocks.1.img_attn_q.weight": np.zeros((64, 64), np.float32)}, "no factor"),
    ):
        with pytest.raises(CheckpointError, match=words):
            kind_of(tensors() | change)
    for gone in (f"{name}.lora_B.weight", f"{name}."):
        with pytest.raises(CheckpointError, match=name):
            kind_of({k: v for k, v in tensors().items() if not k.startswith(gone)})
