"""Prompts of robot policies: text, discretised state, token ids."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engine.errors import InputError, TokenizerError, TruncationWarning
from engine.io.files import member, read_bytes
from engine.io.text import Tokenizer

MAX_PROMPT = 10_000  # characters
MAX_MODEL_BYTES = 64 << 20
BOS = 2  # of PaliGemma, which frames a prompt with it and with no EOS
_EDGES = np.linspace(-1, 1, 257)[:-1]


class TextEncoder(Protocol):
    """What turns text into ids without framing; `engine.io.text.Tokenizer` is one."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, no BOS or EOS."""
        ...


def text_encoder(folder: str | os.PathLike[str]) -> TextEncoder:
    """The tokenizer of a checkpoint folder: `tokenizer.json`, else SentencePiece's `tokenizer.model`.

    Raises:
        TokenizerError: neither is there, one is damaged, or the second needs a package that is missing.
    """
    home = Path(folder)
    if member(home, "tokenizer.json", TokenizerError).exists():
        return Tokenizer.from_folder(home)
    path = member(home, "tokenizer.model", TokenizerError)
    if path.exists():
        return SentencePiece(path)
    raise TokenizerError(
        f"{home} has no tokenizer.json and no tokenizer.model; copy one of the checkpoint there, or send tokens= with "
        "every observation"
    )


class SentencePiece:
    """A `tokenizer.model` file, read by the optional package sentencepiece.

    Raises:
        TokenizerError: the package is missing, or the file is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]):
        try:
            import sentencepiece
        except ImportError as fault:
            raise TokenizerError(
                f"{path} needs the package sentencepiece: pip install sentencepiece, or put "
                "the tokenizer.json of the same tokenizer beside it"
            ) from fault
        data = read_bytes(Path(path), limit=MAX_MODEL_BYTES, error=TokenizerError)
        try:
            self._inner = sentencepiece.SentencePieceProcessor(model_proto=data)
        except (RuntimeError, ValueError, OSError) as fault:
            raise TokenizerError(f"{path} is damaged ({str(fault)[:200]}); fetch it again") from fault
        self.vocab_size: int = self._inner.get_piece_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, no BOS or EOS."""
        return [int(i) for i in self._inner.encode(text)]


def clean(prompt: Any) -> str:
    """A prompt as the policies were trained on it: stripped, `_` and line ends as spaces.

    Raises:
        InputError: not a str (or a scalar array of one), or longer than 10,000 characters.
    """
    if isinstance(prompt, np.ndarray) and prompt.ndim == 0:
        prompt = prompt.item()
    if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT:
        raise InputError(f"prompt is not a str of at most {MAX_PROMPT} characters")
    return prompt.strip().replace("_", " ").replace("\n", " ")


def digitize(state: Any) -> np.ndarray:
    """Normalised state [n] to bins [n] int64: 0..255 over [-1, 1), -1 below, 255 above. Source: pi0.5, openpi."""
    return np.digitize(np.asarray(state), _EDGES) - 1


def state_prompt(prompt: Any, bins: Sequence[int] | np.ndarray) -> str:
    """pi0.5's prompt with the state in it; it ends in a space."""
    return f"Task: {clean(prompt)}, State: {' '.join(str(int(b)) for b in bins)};\nAction: "


def prompt_tokens(
    prompt: Any, encoder: TextEncoder, bins: Sequence[int] | np.ndarray | None = None, limit: int = 200
) -> np.ndarray:
    """PaliGemma ids of a pi0.5 prompt, unpadded: [L] int32, L <= limit.

    Without `bins` the line end is a token of its own after the text, as pi0 had it. A longer prompt loses its end,
    with a `TruncationWarning`.
    """
    text = clean(prompt) if bins is None else state_prompt(prompt, bins)
    ids = [BOS, *encoder.encode(text), *(encoder.encode("\n") if bins is None else [])]
    return _cut(ids, limit, [])


def padded_tokens(
    prompt: Any, encoder: TextEncoder, length: int, *, bos: int = 0, eos: int = 2, pad: int = 1
) -> np.ndarray:
    """BART ids framed by `bos` and `eos` and padded on the right: [length] int32.

    The padding is part of the input: X-VLA's encoder attends to it, so `length` must be that of the training.
    """
    if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT:
        raise InputError(f"prompt is not a str of at most {MAX_PROMPT} characters")
    ids = _cut([bos, *encoder.encode(prompt), eos], length, [eos])
    return np.concatenate([ids, np.full(length - len(ids), pad, np.int32)])


def given_tokens(tokens: Any, mask: Any, *, vocab: int | None, limit: int) -> np.ndarray:
    """Ids that the caller tokenised: [L] int32, those that `mask` keeps.

    Args:
        tokens: [L] or [1, L] integers.
        mask: the same shape, or None to keep all.
        vocab: ids must be below it; None where unknown.
        limit: most ids.

    Raises:
        InputError: another shape or type, an id out of range, nothing or too much left.
    """
    ids, keep = np.atleast_1d(np.asarray(tokens)), None if mask is None else np.atleast_1d(np.asarray(mask))
    if ids.dtype.kind not in "iu" or ids.ndim > 2 or (ids.ndim == 2 and len(ids) != 1):
        raise InputError(f"tokens are {ids.dtype} {list(ids.shape)}; integers [L] are needed")
    if keep is not None and keep.shape != ids.shape:
        raise InputError(f"token_mask has shape {list(keep.shape)}, tokens have {list(ids.shape)}")
    ids = ids.reshape(-1) if keep is None else ids[keep.astype(bool)]
    if not 1 <= len(ids) <= limit:
        raise InputError(f"{len(ids)} tokens; 1 to {limit} are allowed")
    high = 2**31 if vocab is None else vocab
    if int(ids.min()) < 0 or int(ids.max()) >= high:
        raise InputError(f"a token id is outside [0, {high}); use the tokenizer of this checkpoint")
    return ids.astype(np.int32)


def _cut(ids: list[int], limit: int, end: list[int]) -> np.ndarray:
    if len(ids) > limit:
        warnings.warn(
            f"the prompt has {len(ids)} tokens, this policy takes {limit}; its end is cut off. Shorten the prompt",
            TruncationWarning,
            stacklevel=3,
        )
        ids = ids[: limit - len(end)] + end
    return np.array(ids, np.int32)
