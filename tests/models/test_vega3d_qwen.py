"""Qwen2.5-VL's image tower against transformers, alone and several frames in a pass."""

from __future__ import annotations

import numpy as np
import pytest
from _peer_vega import CASES, qwen_cases
from _source import Tensors
from safetensors.numpy import load_file

from engine.blocks.qwen_vision import (
    QwenVisionConfig,
    QwenVisionTower,
    load_qwen_vision,
    qwen_vision_shapes,
    windows_of,
    workspace_bytes,
)
from engine.blocks.weights import Packer, Recipe
from engine.io.checkpoint import MappedSource
from engine.runtime.arena import Arena

pytestmark = pytest.mark.peer


def config(about: dict) -> QwenVisionConfig:
    v = about["config"]["vision_config"]
    return QwenVisionConfig(v["hidden_size"], v["depth"], v["num_heads"], v["intermediate_size"], v["out_hidden_size"],
                            tuple(about["grid"]), v["patch_size"], 2, v["window_size"] // v["patch_size"] // 2,
                            tuple(v["fullatt_block_indexes"]))  # fmt: skip


def tower(case, images: int, dtype: str = "f32") -> QwenVisionTower:
    c, arena, recipe = config(case.about), Arena(), Recipe(dtype, None)
    tensors = {k: v for k, v in load_file(case.folder / "model.safetensors").items() if k.startswith("visual.")}
    assert {k: v.shape for k, v in tensors.items()} == qwen_vision_shapes("visual.", c)
    weights = load_qwen_vision(Packer(MappedSource(Tensors(tensors)), arena), recipe, "visual.", c)
    ws = arena.alloc("ws", (workspace_bytes(c, images),), "u8")
    return QwenVisionTower(arena, c, weights, images, dtype, ws)


@pytest.mark.parametrize("i", range(CASES))
def test_tower_is_transformers(i):
    case = qwen_cases()[i]
    pixels, want = case.io["pixels"].transpose(0, 2, 3, 1), case.io["tokens"]
    for images in {1, len(pixels)}:
        for dtype, limit in (("f32", 1e-5), ("bf16", 4e-2)):
            t, got = tower(case, images, dtype), []
            for at in range(0, len(pixels), images):
                t.images.write(np.ascontiguousarray(pixels[at : at + images]))
                got.append(t.look().read())
            assert np.abs(np.concatenate(got).reshape(want.shape) - want).max() / np.abs(want).max() < limit


def test_published_windows():
    """A frame of 532 x 420: 15 x 19 tokens in windows of 4 x 4, three rows and columns of them cut."""
    c = QwenVisionConfig(1280, 32, 16, 3420, 3584, (30, 38))
    found = {w.shape: len(w.units) for w in windows_of(c)}
    assert found == {(4, 4): 12, (4, 3): 3, (3, 4): 4, (3, 3): 1}
    seen = np.concatenate([w.units.reshape(-1, 2) for w in windows_of(c)])
    assert len(np.unique(seen, axis=0)) == 285
