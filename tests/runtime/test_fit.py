"""Memory plans for cards that are not here."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from engine.cli import app
from engine.errors import InputError
from engine.runtime.cards import CARDS, card


@pytest.mark.parametrize("name", ["rtx4090", "RTX 4090", "NVIDIA GeForce RTX 4090", "4090"])
def test_cards_are_found_however_they_are_spelled(name):
    assert card(name) is CARDS["rtx4090"]


def test_an_unknown_card_lists_the_known_ones():
    with pytest.raises(InputError, match="rtx3090, rtx4090, rtx5090, h100"):
        card("voodoo2")


@pytest.fixture
def full(tmp_path):
    from bench.sources import PUBLISHED

    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED.to_json()))
    return str(tmp_path)


def plan(*arguments: str):
    return CliRunner().invoke(app, ["plan", *arguments])


def test_int4_with_32k_fits_24_gb(full):
    done = plan(full, "--device", "rtx4090", "--ctx", "32768", "--quant", "int4")
    assert done.exit_code == 0, done.output
    for part in ("weights", "state", "kv", "workspace", "headroom"):
        assert part in done.output
    headroom = next(float(x.split()[1]) for x in done.output.splitlines() if x.startswith("headroom"))
    assert headroom > 0


def test_what_does_not_fit_says_what_to_lower(full):
    done = plan(full, "--device", "rtx3090", "--ctx", "262144", "--quant", "int8")
    assert done.exit_code == 1
    assert "does not fit: --quant int4 takes" in done.output
    done = plan(full, "--device", "rtx3090", "--dtype", "fp32")
    assert done.exit_code == 1 and "and fits" in done.output


def test_no_device_is_touched_and_the_cpu_plan_stays(full):
    on_card = plan(full, "--device", "h100", "--quant", "int4").output
    on_cpu = plan(full, "--quant", "int4").output
    weights = [next(x for x in text.splitlines() if x.startswith("weights")) for text in (on_card, on_cpu)]
    assert weights[0] == weights[1]
