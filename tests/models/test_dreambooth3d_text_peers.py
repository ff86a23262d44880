"""The prompts' encoders as the engine runs them against transformers, on random configurations."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from _peer import ROOT, made_once
from safetensors.numpy import load_file

from engine.blocks.weights import Recipe
from engine.io.checkpoint import SafetensorsFile
from engine.models.dreambooth3d.glyphs import OFFSET, GlyphConfig, GlyphEncoder, canonical_glyphs
from engine.models.dreambooth3d.text import PromptEncoder, TextLoader, canonical_text, text_config
from engine.runtime.arena import Arena

SCRIPT = ROOT / "tests/peers/dreambooth_transformers.py"
SEED, CASES = 0, 12


@functools.cache
def cases() -> list[Path]:
    """Folders, in order."""
    return sorted(made_once("dreambooth-text", SCRIPT, "transformers", SEED, CASES).glob("case-*"))


def about(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def near(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


@pytest.mark.parametrize("number", range(CASES))
def test_states(number: int) -> None:
    """Whole, and as a prefix that is kept and what follows it."""
    folder = cases()[number]
    c, io = (
        text_config(about(folder)["text"]),
        load_file(folder / "peer.safetensors"),
    )
    arena = Arena()
    with SafetensorsFile(folder / "text.safetensors") as file:
        w = TextLoader(canonical_text(file, c), arena, Recipe("f32", None)).load(c)
    encoder = PromptEncoder(arena, c, w, None, {}, tokens=64, chunk=7)
    ids = io["ids"].tolist()
    near(encoder.run([], ids), io["states"])
    for cut in {1, len(ids) // 2} - {0}:
        for _ in range(2):
            near(encoder.run(ids[:cut], ids[cut:]), io["states"][cut:])


@pytest.mark.parametrize("number", range(CASES))
def test_glyphs(number: int) -> None:
    folder = cases()[number]
    c, io = (
        GlyphConfig.from_json(about(folder)["glyphs"]),
        load_file(folder / "peer.safetensors"),
    )
    text = bytes(int(i) - OFFSET for i in io["glyph_ids"][:-1]).decode()
    with SafetensorsFile(folder / "glyphs.safetensors") as file:
        near(GlyphEncoder(c, canonical_glyphs(file, c))(text), io["glyph_states"])
