"""The generated tables of README.md are those of the code."""

from __future__ import annotations

from bench.readme import README, op_table, render


def test_op_table_is_fresh():
    text = README.read_text()
    assert "<!-- ops -->" in text
    assert render(text, figures=False) == text, "run `./run bench readme`"
    assert op_table() in text
