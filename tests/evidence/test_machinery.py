"""Drawing, comparing and keeping evidence, on made-up units."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

from tests.evidence import __main__ as cli
from tests.evidence import layers, records, sample, sources
from tests.evidence.records import Record

UNITS = {(f"room{i}", layer): 10.0 + i for i in range(10) for layer in sources.LAYERS}


def few(unit):
    return ["a", "b", "c", "d"]


def test_a_tenth_is_drawn_and_repeats():
    first = sample.choose(UNITS, few, 3)
    assert first == sample.choose(UNITS, few, 3) and len(first) == 4 and set(first.values()) == {None}
    assert first != sample.choose(UNITS, few, 4)
    drawn = {u for seed in range(200) for u in sample.choose(UNITS, few, seed)}
    assert drawn == set(UNITS)


def test_a_draw_keeps_to_its_budget():
    assert sample.choose({("a", "mutants"): 1000.0}, few, 0) == {}
    (parts,) = sample.choose({("a", "mutants"): 600.0}, few, 0).values()
    assert parts is not None and len(parts) == 1 and parts[0] in "abcd"
    long = {u: s * 20 for u, s in UNITS.items()}
    for seed in range(20):
        chosen = sample.choose(long, few, seed)
        assert sum(long[u] * (1 if p is None else len(p) / 4) for u, p in chosen.items()) <= sample.BUDGET


def record(**result) -> Record:
    return Record("hash", {"a.cu": "1"}, {"nvcc": "13"}, result, 1.0, "2026-01-01", {"compile_seconds": {"80": 2.0}})


def row(registers: int) -> dict:
    return {"registers": registers, "stack": 0, "shared": 0, "wide": 1, "matrix": 0}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(records, "RESOURCES", tmp_path / "resources.json")
    return tmp_path


def test_records_come_back(folder):
    one = record(**{"80": {"cuda": 1, "failures": [], "rows": {"x/cuda/k<1, 2>/sm_80": row(40)}}})
    two = record(plain={"cases": 3, "failures": ["odd: error"]})
    records.save("x", "compiled", one)
    records.save("x", "emulated", two)
    assert records.load("x", "compiled") == one and records.load("x", "emulated") == two
    assert records.load("x", "mutants") is None and records.load("y", "compiled") is None
    assert list(json.loads((folder / "records/x.json").read_text())) == ["emulated", "compiled"]
    assert len((folder / "resources.json").read_text().splitlines()) == 3
    assert two.failures() == ["plain: odd: error"]
    records.save("y", "compiled", record(**{"80": {"rows": {"y/cuda/k/sm_80": row(1)}}}))
    assert len(records.table()) == 2
    records.save("x", "compiled", record(**{"80": {"rows": {}}}))
    assert list(records.table()) == ["y/cuda/k/sm_80"]


def test_what_is_shown_of_a_change():
    assert records.difference({"k": row(40)}, {"k": row(44)}) == ["k registers: 40 -> 44"]
    assert records.difference({"a": 1}, {"b": 2}) == ["a: 1 -> nothing", "b: nothing -> 2"]
    assert records.changed(record(), {"a.cu": "2", "b.h": "1"}) == ["a.cu", "b.h"]


def test_states(folder, monkeypatch):
    files = {"a.cu": "1"}
    monkeypatch.setattr(sources, "hashes", lambda room, layer: files)
    monkeypatch.setattr(sources, "tools", lambda room, layer: {"nvcc": "14"})
    assert records.state("x", "emulated") == "missing"
    good = record(plain={"failures": []})
    good.sources = sources.digest(files)
    records.save("x", "emulated", good)
    assert records.state("x", "emulated") == "fresh"
    assert records.other_tools("x", "emulated", good) == "nvcc 14 instead of 13"
    good.result["plain"]["failures"].append("wrong")
    records.save("x", "emulated", good)
    assert records.state("x", "emulated") == "FAILED: 1"
    files["a.cu"] = "2"
    assert records.state("x", "emulated") == "stale: a.cu"


def test_caches_do_not_shorten_times(folder):
    records.save("x", "emulated", record())
    new = record()
    new.seconds, new.tracked = 0.2, {"compile_seconds": {"80": 0.0}}
    layers.keep("x", "emulated", new)
    kept = records.load("x", "emulated")
    assert kept and kept.seconds == 1.0 and kept.tracked == {"compile_seconds": {"80": 2.0}}


def test_units_and_their_files():
    units = sources.units()
    assert ("rng", "emulated") in units and ("gather", "interpreted") not in units
    for room, layer in units:
        names = sources.names(room, layer)
        assert f"csrc/ops/{room}/{room}.cu" in names or layer == "interpreted" or room not in names
        assert all((sources.ROOT / n).is_file() for n in names)
    assert "csrc/base/launch.h" in sources.names("gather", "mutants")
    assert {"triton_kernels/gemm.py", "engine/ops/moe.py"} <= set(sources.names("moe", "interpreted"))


def test_the_command(capsys):
    assert cli.main(["gather", "--check", "--layer", "compiled"]) in (0, 1)
    assert "gather     compiled" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["nothing", "--check"])
    assert "no room nothing; there are: attention" in capsys.readouterr().err


def test_another_compiler_is_skipped_and_fails_in_ci(folder, monkeypatch):
    pytest.importorskip("torch")
    from tests.evidence.test_evidence import test_made_again as made_again

    monkeypatch.setattr(sources, "hashes", lambda room, layer: {"a.cu": "1"})
    monkeypatch.setattr(sources, "tools", lambda room, layer: {"nvcc": "14"})
    kept = record(plain={"cases": 3, "failures": []})
    kept.sources = sources.digest({"a.cu": "1"})
    records.save("x", "emulated", kept)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="nvcc 14 instead of 13"):
        made_again((("x", "emulated"), None))
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match="run evidence x --all"):
        made_again((("x", "emulated"), None))
    monkeypatch.setattr(sources, "tools", lambda room, layer: {"nvcc": "13"})
    for cases in (3, 4):
        made = record(plain={"cases": cases, "failures": []})
        monkeypatch.setattr(layers, "make", lambda room, layer, parts, made=made: made)
        if cases == 3:
            made_again((("x", "emulated"), None))
        else:
            with pytest.raises(AssertionError, match="plain cases: 3 -> 4"):
                made_again((("x", "emulated"), None))
