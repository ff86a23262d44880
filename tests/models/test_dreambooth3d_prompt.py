"""3DreamBooth's prompts: marks, the chat's spaces, quoted texts."""

from __future__ import annotations

import pytest

from engine.errors import InputError
from engine.models.dreambooth3d.prompt import MARK, chat, read_prompt


def test_marks_are_taken_out() -> None:
    p = read_prompt("A [rhs plushie] on a desk; the [rhs plushie] waves at a [rhs watch].")
    assert p.text == "A rhs plushie on a desk; the rhs plushie waves at a rhs watch."
    assert [p.text[a:b] for a, b in p.spans] == ["rhs plushie", "rhs watch"] and p.spans[0] == (2, 13)
    assert read_prompt("plain").spans == () and read_prompt("").text == ""
    offsets = [(0, 1), (1, 5), (5, 13), (13, 16), (len(p.text) - 6, len(p.text))]
    assert p.marked(offsets) == [False, True, True, False, True]


@pytest.mark.parametrize(
    ("value", "words"),
    [("a [rhs", "do not pair"), ("a rhs]", "do not pair"), ("a [[rhs]]", "do not pair"), ("a [ ] b", "no name"),
     ("a [] b", "do not pair"), (None, "not a text"), (b"a", "not a text")],
)  # fmt: skip
def test_bad_marks(value: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_prompt(value)


def test_a_subject_must_be_named_where_it_is_shown() -> None:
    with pytest.raises(InputError, match="names no subject"):
        read_prompt("A toy on a desk.", needs_span=True)
    assert read_prompt("A [rhs toy].", needs_span=True).spans


def test_quotes() -> None:
    p = read_prompt('A sign "OPEN" and “zu”, then "OPEN" again, "" and an odd " mark')
    assert p.quoted == ("OPEN", "zu") and p.glyphs == 'Text "OPEN". Text "zu". '
    assert read_prompt("no quotes").glyphs == ""


@pytest.mark.parametrize(("kind", "items"), [("video", 5), ("image", 3)])
def test_chat(kind: str, items: int) -> None:
    """Spaces count: the prompt's place among the tokens depends on them."""
    text = chat("a toy", kind)
    assert text.endswith(f"{MARK}a toy<|im_end|>\n<|im_start|>assistant\n") and text.startswith(
        "<|im_start|>system\nYou are"
    )
    assert f"the {kind} by detailing the following aspects:         1. The main" in text
    assert text.count(" " * 8) == items and text.count(" " * 10) == 0
    assert text.count(" " * 9) == items  # a space ends each item
    assert f"{MARK} <|im_end|>" in chat("", kind)
