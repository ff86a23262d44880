"""CLIP's text tokenizer from its own vocabulary file, a list of merges (Radford et al. 2021, section 2.4)."""

from __future__ import annotations

import html
import os
import unicodedata
import zlib
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers

from engine.errors import InputError, TokenizerError
from engine.io.files import member, read_bytes

FILE = "bpe_simple_vocab_16e6.txt.gz"
MAX_BYTES = 16 << 20
MAX_UNPACKED = 64 << 20
MAX_MERGES = 49152 - 256 - 2  # the published file has more lines, which CLIP leaves out
MAX_TEXT = 100_000
START, END = "<|startoftext|>", "<|endoftext|>"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class ClipTokenizer:
    """Text to token ids: lower case, byte-level BPE with word ends.

    CLIP repairs broken Unicode with ftfy first; here text is only brought to NFC, so mis-decoded text gives other ids.

    Args:
        merges: pairs in the order of their rank. The vocabulary is 256 letters, the same at the end of a word, one
            entry per merge, and the two marks.

    Raises:
        TokenizerError: a merge of letters that no earlier one makes.
    """

    def __init__(self, merges: Sequence[tuple[str, str]]) -> None:
        letters = _letters()
        words = [*letters, *(x + "</w>" for x in letters)]
        known = set(words)
        for a, b in merges:
            if a not in known or b not in known:
                raise TokenizerError(
                    f"merge {a[:40]!r} {b[:40]!r} joins what no merge before it makes; fetch the file again"
                )
            words.append(a + b)
            known.add(a + b)
        words += [START, END]
        # Of words that are spelled twice the later id counts, as in the dictionary that CLIP builds.
        vocabulary = {word: i for i, word in enumerate(words)}
        self.vocab_size, self.start, self.end = len(words), len(words) - 2, len(words) - 1
        inner = tokenizers.Tokenizer(
            models.BPE(vocab=vocabulary, merges=list(merges), continuing_subword_prefix="", end_of_word_suffix="</w>")
        )
        inner.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        split = pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True)
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        self._inner = inner

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> ClipTokenizer:
        """Read `bpe_simple_vocab_16e6.txt.gz` of a checkpoint folder.

        Raises:
            TokenizerError: the file is missing or damaged.
        """
        path = member(Path(folder), FILE, TokenizerError)
        if not path.exists():
            raise TokenizerError(f"{path} is missing; it comes with the weights of the text tower")
        return cls.from_file(path)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> ClipTokenizer:
        """Read a gzip file: a line of header, then two words a line.

        Raises:
            TokenizerError: the file is missing, damaged or too long.
        """
        data = read_bytes(Path(path), limit=MAX_BYTES, error=TokenizerError)
        try:
            unpack = zlib.decompressobj(16 + zlib.MAX_WBITS)
            text = unpack.decompress(data, MAX_UNPACKED)
            if not unpack.eof:
                raise TokenizerError(
                    f"{path} is cut short or unpacks to more than {MAX_UNPACKED} bytes; fetch it again"
                )
            lines = text.decode("utf-8").split("\n")[1 : MAX_MERGES + 1]
        except (zlib.error, UnicodeDecodeError) as fault:
            raise TokenizerError(f"{path} is damaged ({fault}); fetch it again") from fault
        while lines and not lines[-1].strip():
            lines.pop()
        merges = [tuple(line.split()) for line in lines]
        bad = next((i for i, pair in enumerate(merges) if len(pair) != 2), None)
        if bad is not None:
            raise TokenizerError(f"{path}: line {bad + 2} is not two words; fetch it again")
        return cls(merges)  # type: ignore[arg-type]

    def encode(self, text: str, ctx: int = 77) -> list[int]:
        """[start, ..., end], at most ctx ids, the last one always the end; nothing is padded.

        Raises:
            InputError: no string, a lone surrogate, more than 100,000 characters, ctx below 2.
        """
        if not isinstance(text, str):
            raise InputError(f"encode takes a str, not {type(text).__name__}")
        if len(text) > MAX_TEXT:
            raise InputError(
                f"a text of {len(text)} characters is longer than {MAX_TEXT}; CLIP reads a few dozen words"
            )
        if ctx < 2:
            raise InputError(f"ctx={ctx} holds no text; 2 at least are needed")
        plain = unicodedata.normalize("NFC", html.unescape(html.unescape(text))).strip()
        try:
            ids = self._inner.encode(plain, add_special_tokens=False).ids
        except TypeError as fault:
            raise InputError("the text holds a lone surrogate; decode it as UTF-8 first") from fault
        return [self.start, *ids[: ctx - 2], self.end]


def _letters() -> list[str]:
    """A printable letter for each byte, in CLIP's order: those that print as themselves first."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(len(others))]
