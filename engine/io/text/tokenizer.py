"""Tokenizer of a checkpoint folder (`tokenizer.json`, `tokenizer_config.json`) and exact streaming detokenisation."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

from engine.errors import InputError, TokenizerError
from engine.io.files import member, read_bytes, read_json

MAX_TOKENIZER_BYTES = 256_000_000
MAX_CONFIG_BYTES = 32_000_000
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token")


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        vocab_size: highest id + 1; a model's `vocab_size` may be larger (padding) but not smaller.
        special_ids: ids that `decode` leaves out by default.
        eos_ids: ids of the `eos_token` of tokenizer_config.json; empty if it names none.
        bos_id: id of its `bos_token`, or None.
        named: its named special tokens as text, as chat templates use them (`bos_token`, `eos_token`, ...).
    """

    def __init__(self, inner: tokenizers.Tokenizer, config: dict[str, Any] | None = None):
        # A file may ask to cut or pad what it encodes; a prompt must come through whole.
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self.vocab_size: int = max(inner.get_vocab(True).values(), default=-1) + 1
        self.named = _named_tokens(config or {})
        ids = {name: inner.token_to_id(text) for name, text in self.named.items()}
        added = inner.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(
            [i for i, token in added.items() if token.special] + [i for i in ids.values() if i is not None]
        )
        eos = ids.get("eos_token")
        self.eos_ids: tuple[int, ...] = () if eos is None else (eos,)
        self.bos_id: int | None = ids.get("bos_token")
        self._decoder: dict[str, Any] = json.loads(inner.to_str())["decoder"] or {}

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Read `tokenizer.json` and, if there is one, `tokenizer_config.json`.

        Raises:
            TokenizerError: a file is missing or damaged.
        """
        home = Path(folder)
        path = member(home, "tokenizer.json", TokenizerError)
        if not path.exists():
            raise TokenizerError(
                f"{path} is missing; fetch it with the checkpoint (other tokenizer formats are not read)"
            )
        config: Any = {}
        config_path = member(home, "tokenizer_config.json", TokenizerError)
        if config_path.exists():
            config = read_json(config_path, limit=MAX_CONFIG_BYTES, error=TokenizerError)
            if not isinstance(config, dict):
                raise TokenizerError(f"{config_path} is not a JSON object; fetch it again")
        data = read_bytes(path, limit=MAX_TOKENIZER_BYTES, error=TokenizerError)
        try:
            return cls(tokenizers.Tokenizer.from_str(data.decode("utf-8")), config)
        except TokenizerError:
            raise
        # The library raises plain Exception for bad files, and pyo3's PanicException (a BaseException) for worse ones.
        except BaseException as fault:
            if isinstance(fault, (KeyboardInterrupt, SystemExit)):
                raise
            raise TokenizerError(f"{path} is damaged ({str(fault)[:200]}); fetch it again") from fault

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`: no BOS or other framing; special tokens written in the text become their ids."""
        if not isinstance(text, str):
            raise InputError(f"encode takes a str, not {type(text).__name__}")
        try:
            return list(self._inner.encode(text, add_special_tokens=False).ids)
        except TypeError as fault:
            raise InputError("the text holds a lone surrogate; decode it as UTF-8 first") from fault

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Of each token that `encode` gives: its first character in `text`, and the one behind its last."""
        self.encode(text)  # checks
        return list(self._inner.encode(text, add_special_tokens=False).offsets)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of token ids; ids that the tokenizer does not know give nothing, broken UTF-8 gives U+FFFD."""
        plain = [_plain_id(i) for i in ids]
        if skip_special:
            plain = [i for i in plain if i not in self.special_ids]
        return str(self._inner.decode(plain, skip_special_tokens=False))

    def token_to_id(self, token: str) -> int | None:
        """Id of a token by its exact text, or None."""
        found = self._inner.token_to_id(token)
        return None if found is None else int(found)

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it (byte-level letters and all), or None."""
        found = self._inner.id_to_token(_plain_id(token_id))
        return None if found is None else str(found)

    def stream(self, skip_special: bool = True) -> StreamDecoder:
        """A decoder for one stream of ids."""
        return StreamDecoder(self, skip_special)


class StreamDecoder:
    """Incremental `decode`: the pushed pieces and the flush, joined, are `decode` of all the ids.

    Text is held back while its last character is incomplete. Work per token does not grow with the stream. Exact for
    byte-level and byte-fallback decoders (and those that only join pieces); a decoder that rewrites text across tokens,
    such as WordPiece clean-up, is followed up to that rewriting.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special else frozenset()
        self._kinds = _decoder_kinds(tokenizer._decoder)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._context: list[int] = []  # emitted, kept because the first token of a text may decode differently
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this id completes; may be empty."""
        token_id = _plain_id(token_id)
        if token_id in self._skip:
            return ""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return ""
        if self._kinds == {"ByteLevel"}:
            return self._utf8.decode(_level_bytes(token))
        self._held.append(token_id)
        # A run of byte tokens is one unit to its decoder: valid as a whole, or replaced as a whole.
        if "ByteFallback" in self._kinds and _BYTE_TOKEN.fullmatch(token):
            return ""
        return self._emit(final=False)

    def flush(self) -> str:
        """What is still held back, incomplete characters as U+FFFD; the decoder is then ready for a new stream."""
        text = self._utf8.decode(b"", final=True) + (self._emit(final=True) if self._held else "")
        self._utf8.reset()
        self._context = []
        return text

    def _emit(self, final: bool) -> str:
        decode = self._tokenizer._inner.decode
        before = decode(self._context, skip_special_tokens=False) if self._context else ""
        after = decode(self._context + self._held, skip_special_tokens=False)
        cut = after.endswith("\ufffd") and "ByteLevel" in self._kinds
        if not final and (cut or not after.startswith(before)):
            return ""
        self._context, self._held = self._held, []
        return str(after[len(before) :])


_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the rest follows from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_LETTER_BYTE = _byte_alphabet()


def _level_bytes(token: str) -> bytes:
    """Bytes of a byte-level token; an added token with letters outside the alphabet stands for itself."""
    try:
        return bytes([_LETTER_BYTE[letter] for letter in token])
    except KeyError:
        return token.encode("utf-8")


def _decoder_kinds(decoder: dict[str, Any]) -> set[str]:
    if decoder.get("type") == "Sequence":
        return {"Sequence"}.union(*(_decoder_kinds(part) for part in decoder.get("decoders", [])))
    return {str(decoder.get("type"))}


def _named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """The special tokens that tokenizer_config.json names, each as a string or as an object with its text."""
    named = {}
    for key in _NAMED:
        value = config.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            named[key] = text
        elif value is not None:
            raise TokenizerError(
                f"tokenizer_config.json: {key} is neither text nor an object with content; fetch it again"
            )
    return named


def _plain_id(value: Any) -> int:
    try:
        found = value.__index__()
    except (AttributeError, TypeError):
        raise InputError(f"{type(value).__name__} is no token id; ids are integers") from None
    if not 0 <= found < 2**31:
        raise InputError(f"{found} is no token id; ids start at 0")
    return int(found)
