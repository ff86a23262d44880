"""SigLIP and Qwen2 of VEGA-3D against transformers: the reference, and the engine's plans."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _peer_vega import CASES, PeerCase, language_cases
from _source import Tensors
from _vega import filled
from safetensors.numpy import load_file

from engine.blocks import qwen_reference
from engine.models.vega3d import reference
from engine.models.vega3d.config import VegaConfig
from engine.models.vega3d.model import Options, Vega3D
from engine.models.vega3d.weights import shapes, store

LIMIT = 1e-5  # of the largest value


@pytest.fixture(params=range(CASES))
def case(request) -> PeerCase:
    return language_cases()[request.param]


def error(got, want) -> float:
    return float(np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max())


def config_of(case: PeerCase) -> VegaConfig:
    v = case.about["vision"]  # whose last layer is left out
    eyes = v | {"num_hidden_layers": v["num_hidden_layers"] - 1}
    more = {"vision_config": eyes, "frames_upbound": 16, "generative_feat_dim": 24}
    return VegaConfig.from_json(case.about["text"] | more)


def weights_of(case: PeerCase, config: VegaConfig) -> Tensors:
    return Tensors(filled(shapes(config), 1).tensors | load_file(case.folder / "model.safetensors"))


def model_of(case: PeerCase, dtype: str = "fp32", quant: str | None = None) -> Vega3D:
    config = config_of(case)
    frames = 40 // config.lines + 1  # rows for the embeddings of the case
    options = Options.of(config, dtype=dtype, quant=quant, context=256, chunk=16, frames=frames)
    return Vega3D(config, weights_of(case, config), options, progress=False)


def run_language(m: Vega3D, embeds: np.ndarray) -> np.ndarray:
    """Logits [T, V] of embeddings, in chunks."""
    first = m.vocab_size
    store(m._rows.slice(0, embeds.shape), embeds)
    out, step = [], m.io.score_logits.shape[0]
    m._cache.clear()
    ids = list(range(first, first + len(embeds)))
    for at in range(0, len(ids), step):
        m._prefill(ids[: at + step])
        m.plans["score"].replay()
        out.append(m.io.score_logits.read()[: len(ids[at : at + step])])
    return np.concatenate(out)


def test_reference(case):
    config = config_of(case)
    w = {k: torch.from_numpy(v).double() for k, v in weights_of(case, config).tensors.items()}
    io = {k: torch.from_numpy(v).double() for k, v in case.io.items()}
    assert error(reference.siglip(w, config.vision, io["images"]), case.io["tokens"]) < LIMIT
    hidden = qwen_reference.language(w, config.language, io["embeds"])
    assert error(hidden, case.io["hidden"]) < LIMIT
    assert error(reference.logits(w, config.language, hidden), case.io["logits"]) < LIMIT


def test_engine(case):
    with model_of(case) as m:
        for image, want in zip(case.io["images"], case.io["tokens"]):
            m._eyes.tower.images.write(image.transpose(1, 2, 0)[None])
            m.plans["look"].replay()
            assert error(m._eyes.tower.x.read(), want) < LIMIT
        assert error(run_language(m, case.io["embeds"]), case.io["logits"]) < LIMIT


@pytest.mark.parametrize("dtype, quant, limit", [("bf16", None, 2e-2), ("bf16", "int8", 4e-2)])
def test_narrow_formats(dtype, quant, limit):
    for case in language_cases()[:4]:
        with model_of(case, dtype, quant) as m:
            got, want = run_language(m, case.io["embeds"]), case.io["logits"]
            assert np.sqrt(((got - want) ** 2).mean() / (want**2).mean()) < limit
