"""The engine's Nemotron against transformers: random odd configurations, whole, chunked, token by token, greedy."""

from __future__ import annotations

import numpy as np
import pytest
from models._peer import CASES, peer_cases

import engine

pytestmark = pytest.mark.peer
BOUND = 2e-5  # of the largest logit


def _close(got: np.ndarray, want: np.ndarray, what: str) -> None:
    err = np.abs(got - want).max() / np.abs(want).max()
    assert err <= BOUND, f"{what}: {err:.2e} of the largest logit"


def _load(case, **options):
    return engine.load(case.folder, dtype="fp32", context=512, **options)


@pytest.mark.parametrize("index", range(CASES))
def test_logits_and_greedy(index):
    case = peer_cases()[index]
    with _load(case) as m:
        _close(m.logits(case.ids), case.logits, "one prefill")
        tokens = m.generate(case.ids, max_new_tokens=len(case.greedy), ignore_eos=True).tokens
        assert tokens == case.greedy.tolist()


@pytest.mark.parametrize("index", range(0, CASES, 3))
@pytest.mark.parametrize("chunk", [1, 7])
def test_any_chunk_size(index, chunk):
    case = peer_cases()[index]
    with _load(case, chunk=chunk) as m:
        _close(m.logits(case.ids), case.logits, f"chunks of {chunk}")


@pytest.mark.parametrize("index", range(1, CASES, 3))
def test_decode_steps_equal_prefill(index):
    """Teacher-forced through the decode plan: logits after each single step."""
    case = peer_cases()[index]
    ids, want = case.ids[:40], case.logits[:40]
    with _load(case) as m:
        m.generate(ids[:1], max_new_tokens=1, ignore_eos=True)
        rows = [m.io.logits.numpy()[0].copy()]
        for token in ids[1:]:
            m.io.sampler.token.numpy()[0] = token
            m.plans["decode"].replay()
            rows.append(m.io.logits.numpy()[0].copy())
        _close(np.stack(rows), want, "token by token")


@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_other_instruction_sets(isa):
    from engine.runtime import device

    if isa not in device.available_isas():
        pytest.skip(f"this host has no {isa}")
    case = peer_cases()[5]
    with device.use_isa(isa), _load(case) as m:
        _close(m.logits(case.ids), case.logits, isa)
        assert m.plans["decode"].nodes[0].impl == f"cpu/{isa}"
