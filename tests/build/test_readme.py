"""The generated tables of README.md are those of the code."""

from __future__ import annotations

import json

from bench import readme
from bench.readme import README, op_table, render


def test_op_table_is_fresh():
    text = README.read_text()
    assert "<!-- ops -->" in text
    assert render(text, figures=False) == text, "run `./run bench readme`"
    assert op_table() in text


def test_op_table_shows_evidence_and_its_absence(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "EVIDENCE", tmp_path)
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    row = next(r for r in op_table().splitlines() if r.startswith("| [gather]"))
    assert row.endswith("| a row copy needs no tiles | no record | no record | no record | not run |")
    fine = {"failures": []}
    record = {
        "emulated": {"result": {"plain": {"cases": 4, "schedules": 3, **fine}, "asan": {"failures": ["a fault"]}}},
        "mutants": {"result": {"a": {"killed": True, **fine}, "b": {"killed": False, "reason": "no case", **fine}}},
        "compiled": {"result": {"80": {"cuda": 2, "triton": 0, **fine}, "90a": {"cuda": 2, "triton": 0, **fine}}},
    }
    (tmp_path / "gather.json").write_text(json.dumps(record))
    rows = [{"op": "gather", "gate": "green"}, {"op": "gather", "gate": "RED"}]
    result = {"date": "2027-01-02 03:04:05", "device": {"name": "RTX 4090"}, "rows": rows}
    (tmp_path / "2027-01-02-rtx-4090-gpu.json").write_text(json.dumps(result))
    row = next(r for r in op_table().splitlines() if r.startswith("| [gather]"))
    for cell in ("4 cases × 3 schedules, ASan + UBSan, races, **1 failed**", "1 of 2 (1 explained)",
                 "sm_80, 90a (2 cuda kernels)", "RTX 4090, 2027-01-02, **1 of 2 red**"):  # fmt: skip
        assert f"| {cell} |" in row
