"""Tokenizer files, and streaming that equals decoding at once."""

import json
import time

import numpy as np
import pytest
import texts
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InputError, TokenizerError
from engine.io.text import StreamDecoder, Tokenizer


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return Tokenizer.from_folder(texts.write(tmp_path_factory.mktemp("tok")))


@pytest.fixture(scope="module")
def fallback(tmp_path_factory):
    folder = texts.write(tmp_path_factory.mktemp("tok"), texts.byte_fallback(), eos_token="</s>")
    return Tokenizer.from_folder(folder)


def test_round_trip_without_framing(tok):
    for text in [*texts.CORPUS[:2], "", " ", "\n\n", "🙂‍↔️ é"]:
        assert tok.decode(tok.encode(text)) == text


def test_added_tokens_are_found_in_text_and_special_ones_left_out(tok):
    ids = tok.encode("<|im_start|>user\nhi<|im_end|><think>x</think>")
    assert ids[0] == tok.token_to_id("<|im_start|>") and tok.token_to_id("<think>") in ids
    assert tok.decode(ids) == "user\nhi<think>x</think>"
    assert tok.decode(ids, skip_special=False).startswith("<|im_start|>user")
    assert tok.eos_ids == (tok.token_to_id("<|im_end|>"),) and tok.bos_id == tok.token_to_id("<s>")
    assert tok.special_ids == {tok.token_to_id(t) for t in texts.SPECIAL}
    assert tok.named == {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    assert tok.token_to_id("nothing") is None and tok.id_to_token(10**6) is None
    assert tok.vocab_size == max(tok.token_to_id(t) for t in [*texts.PLAIN, "a b ü"]) + 1


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path):
    inner = texts.byte_level()
    inner.enable_truncation(3)
    inner.enable_padding(length=50)
    tok = Tokenizer.from_folder(texts.write(tmp_path, inner))
    assert tok.decode(tok.encode(texts.CORPUS[0])) == texts.CORPUS[0]


def joined(decoder, ids):
    return "".join([*(decoder.push(i) for i in ids), decoder.flush()])


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 420), max_size=40), skip=st.booleans())
def test_stream_equals_decode_byte_level(tok, ids, skip):
    decoder = tok.stream(skip)
    for _ in range(2):  # and is reusable after a flush
        assert joined(decoder, ids) == tok.decode(ids, skip)


@settings(max_examples=200, deadline=None)
@given(
    ids=st.lists(st.one_of(st.integers(0, 270), st.integers(3 + 0x80, 3 + 0xFF), st.integers(259, 265)), max_size=20)
)
def test_stream_equals_decode_byte_fallback(fallback, ids):
    decoder = fallback.stream()
    assert joined(decoder, ids) == fallback.decode(ids)


def test_incomplete_characters_are_held_back(tok):
    decoder = StreamDecoder(tok)
    ids = tok.encode("a🙃b")
    pieces = [decoder.push(i) for i in ids]
    assert "".join(pieces) == "a🙃b" and decoder.flush() == ""
    assert not any("\ufffd" in piece for piece in pieces) and len(ids) > 3
    for i in ids[:2]:
        decoder.push(i)
    assert decoder.flush() == "\ufffd"


def test_work_per_token_does_not_grow(tok, fallback):
    for one in (tok, fallback):
        ids = one.encode("the a he") * 3000
        decoder = one.stream()
        start = time.perf_counter()
        assert joined(decoder, ids) == one.decode(ids)
        assert time.perf_counter() - start < 10  # quadratic work takes minutes


def test_numpy_ids_are_taken_and_other_things_are_not(tok):
    ids = np.array(tok.encode("the fox"), np.int32)
    assert tok.decode(ids) == "the fox" and tok.decode([10**6]) == "" == tok.stream().push(10**6)
    for bad in (-1, 2**40, "3", 1.5, None):
        with pytest.raises(InputError, match="no token id"):
            tok.decode([bad])
        with pytest.raises(InputError, match="no token id"):
            tok.stream().push(bad)
    for bad in (None, b"x", 3):
        with pytest.raises(InputError, match="takes a str"):
            tok.encode(bad)
    with pytest.raises(InputError, match="surrogate"):
        tok.encode("\ud800")


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"tokenizer.json is missing"):
        Tokenizer.from_folder(tmp_path)
    texts.write(tmp_path)
    good = (tmp_path / "tokenizer.json").read_text()
    for text in ["", "{}", "[]", good[: len(good) // 2], good.replace('"BPE"', '"XYZ"'), '{"model":' + "[" * 5000]:
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(TokenizerError, match=r"tokenizer.json is damaged"):
            Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match="damaged"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text(good)
    for text in ["{", "[]", '{"eos_token": 5}']:
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(TokenizerError, match=r"tokenizer_config.json"):
            Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.from_folder(tmp_path).eos_ids == ()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_fuzz_tokenizer_file(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "fuzz-tok"
    folder.mkdir(exist_ok=True)
    if not (folder / "good.json").exists():
        texts.byte_fallback().save(str(folder / "good.json"))
    made = bytearray((folder / "good.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(made) - 1))
        made[at : at + data.draw(st.integers(0, 5))] = data.draw(st.binary(max_size=5))
    (folder / "tokenizer.json").write_bytes(made)
    try:
        tok = Tokenizer.from_folder(folder)
        ids = tok.encode("the a")
    except TokenizerError:
        return
    assert joined(tok.stream(), ids) is not None


def test_config_spellings_of_named_tokens(tmp_path):
    texts.write(tmp_path, eos_token="</s>", pad_token=None)
    assert Tokenizer.from_folder(tmp_path).named["eos_token"] == "</s>"
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["pad_token"] is None
