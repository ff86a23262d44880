"""Predicted times: the arithmetic, the bar, and that README.md shows the present prediction."""

from __future__ import annotations

import json

import pytest
from emu import build

from bench.predict import LATENCY, NODE, PREDICTED, Kernel, blocks_per_sm, predict, seconds
from bench.sources import PUBLISHED
from engine.runtime.cards import CARDS

CARD = CARDS["rtx4090"]
FLOOR_4090 = 2.17e-3  # s: 4-bit weights, one sequence, 1k tokens (2.19 GB at 1008 GB/s)


def kernel(**changed) -> Kernel:
    values = {"label": "x", "name": "k", "grid": 128, "threads": 256, "shared": 8192, "registers": 64,
              "nbytes": 10_000_000, "flops": 0, "flight": 64}  # fmt: skip
    return Kernel(**(values | changed))


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    [(256, 64, 0, 4), (256, 65, 0, 3), (512, 128, 0, 1), (128, 32, 40 << 10, 2), (32, 16, 0, 24), (1024, 64, 0, 1)],
)
def test_resident_blocks(threads, registers, shared, blocks):
    assert blocks_per_sm(CARD, threads, registers, shared) == blocks


def test_enough_blocks_reach_the_bandwidth():
    assert seconds(kernel(), CARD) == pytest.approx(NODE + 1e7 / CARD.bandwidth)


def test_few_blocks_are_bound_by_what_they_keep_in_flight():
    assert seconds(kernel(grid=8), CARD) == pytest.approx(NODE + 1e7 / (8 * 256 * 64 / LATENCY))


def test_a_short_last_wave_costs_time():
    full = seconds(kernel(grid=512, nbytes=512), CARD)
    assert seconds(kernel(grid=513, nbytes=513), CARD) > full


def test_a_kernel_that_fits_no_sm_is_an_error():
    with pytest.raises(ValueError, match="do not fit RTX 4090"):
        seconds(kernel(shared=120 << 10), CARD)


@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler here: launches are recorded by the emulator")
@pytest.mark.parametrize("name", CARDS)
def test_the_step_and_what_the_readme_shows(name):
    found = predict(PUBLISHED.to_json(), CARDS[name], "int4", 1024)
    kept = {p["card"]: p for p in json.loads(PREDICTED.read_text())}
    assert kept[CARDS[name].name] == found.summary(), "run `./run bench predict --write`, then `./run bench readme`"
    if name == "rtx4090":
        assert found.seconds <= 1.25 * FLOOR_4090
