"""CLIP's tokenizer: its vocabulary, cutting, refusals; the published file where a package brings it."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InputError, TokenizerError
from engine.io.text.clip import FILE, ClipTokenizer

MERGES = [("w", "a"), ("wa", "l"), ("wal", "k</w>"), ("a", "</w>")]
PUBLISHED = sorted(Path(__file__).parents[2].glob(f".venvs/*/lib/python*/site-packages/*/{FILE}"))


@pytest.fixture(scope="module")
def words() -> ClipTokenizer:
    return ClipTokenizer(MERGES[:3])


def write(folder: Path, text: str) -> Path:
    path = folder / FILE
    path.write_bytes(gzip.compress(text.encode()))
    return path


def test_vocabulary(words: ClipTokenizer) -> None:
    assert words.vocab_size == 2 * 256 + 3 + 2
    assert words.encode("walk") == [515, 514, 516]
    # 'a' is the 65th printable letter; at the end of a word it comes 256 later.
    assert words.encode("a") == [515, 256 + ord("a") - 33, 516]
    assert words.encode("") == words.encode("   ") == [515, 516]


def test_case_spaces_and_entities(words: ClipTokenizer) -> None:
    assert words.encode("  WALK \t\n walk ") == words.encode("walk walk")
    assert words.encode("a &amp;amp; b") == words.encode("a & b")
    assert len(words.encode("it's 42!")) == 2 + 2 + 2 + 2 + 1  # it | 's | 4 | 2 | !, letters one by one


def test_the_end_is_kept(words: ClipTokenizer) -> None:
    ids = words.encode("walk " * 50, 7)
    assert len(ids) == 7 and ids[-1] == words.end
    assert words.encode("walk", 2) == [515, 516]


def test_from_folder(tmp_path: Path, words: ClipTokenizer) -> None:
    write(tmp_path, "#version\n" + "\n".join(" ".join(m) for m in MERGES[:3]) + "\n")
    assert ClipTokenizer.from_folder(tmp_path).encode("a walk") == words.encode("a walk")


@pytest.mark.parametrize(
    ("text", "message"),
    [("#v\na b c\n", "line 2 is not two words"), ("#v\nx qq\n", "joins what no merge before it makes")],
)
def test_bad_lines(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        ClipTokenizer.from_file(write(tmp_path, text))


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="is missing"):
        ClipTokenizer.from_folder(tmp_path)
    path = write(tmp_path, "#v\n" + "a b\n" * 1000)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(TokenizerError, match="cut short"):
        ClipTokenizer.from_file(path)
    path.write_bytes(b"no gzip at all")
    with pytest.raises(TokenizerError, match="damaged"):
        ClipTokenizer.from_file(path)
    path.write_bytes(gzip.compress(b"\0" * (65 << 20)))
    with pytest.raises(TokenizerError, match="unpacks to more"):
        ClipTokenizer.from_file(path)


@pytest.mark.parametrize(("text", "ctx"), [(7, 77), ("a" * 100_001, 77), ("a", 1), ("\ud800", 77)])
def test_refused(words: ClipTokenizer, text: object, ctx: int) -> None:
    with pytest.raises(InputError):
        words.encode(text, ctx)  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text(words: ClipTokenizer, text: str) -> None:
    ids = words.encode(text)
    assert ids[0] == words.start and ids[-1] == words.end
    assert all(0 <= i < words.start for i in ids[1:-1])


@pytest.mark.skipif(not PUBLISHED, reason="no package with the published vocabulary is installed (./run peers)")
def test_published_vocabulary() -> None:
    words = ClipTokenizer.from_file(PUBLISHED[0])
    assert words.vocab_size == 49408
    assert words.encode("a person walks forward") == [49406, 320, 2533, 8192, 2342, 49407]
    assert words.encode("A person sits down, then stands back up.") == [
        49406, 320, 2533, 12726, 1136, 267, 1594, 6446, 893, 705, 269, 49407,
    ]  # fmt: skip
