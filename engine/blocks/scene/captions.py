"""How near captions are to references: CIDEr-D and BLEU, as coco-caption computes them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.errors import InputError
from engine.io.values import show

Ngrams = Counter[tuple[str, ...]]


def cider(captions: Sequence[str], references: Sequence[Sequence[str]], sigma: float = 6.0) -> np.ndarray:
    """CIDEr-D of each caption.

    Words are what white space separates. n-grams of 1 to 4 words are weighted by the logarithm of the number of
    captions over that of captions whose references have them; cosines with each reference, counts clipped to it,
    times a Gaussian of the difference in length, are averaged over n and references and multiplied by 10. A single
    caption has weights of log 1 and scores 0.

    Args:
        captions: [N].
        references: one or more for each.
        sigma: of the Gaussian, in words.

    Returns:
        [N] fp64.

    Raises:
        InputError: as `check_texts`.
    """
    check_texts(captions, references)
    corpus = [[_ngrams(text) for text in texts] for texts in references]
    seen = Counter(gram for texts in corpus for gram in set().union(*texts))
    most = math.log(len(corpus))

    def weighted(counts: Ngrams) -> tuple[dict[tuple[str, ...], float], list[float], int]:
        weights = {gram: n * (most - math.log(max(1, seen[gram]))) for gram, n in counts.items()}
        norms = [math.sqrt(sum(w * w for gram, w in weights.items() if len(gram) == n)) for n in range(1, 5)]
        # coco-caption takes the number of pairs of words for the length.
        return weights, norms, sum(n for gram, n in counts.items() if len(gram) == 2)

    out = np.zeros(len(captions))
    for i, (caption, texts) in enumerate(zip(captions, corpus)):
        mine, mine_norm, mine_length = weighted(_ngrams(caption))
        for theirs, their_norm, their_length in map(weighted, texts):
            dot = [0.0] * 4
            for gram, weight in mine.items():
                other = theirs.get(gram, 0.0)
                dot[len(gram) - 1] += min(weight, other) * other
            cosine = sum(d / (a * b) for d, a, b in zip(dot, mine_norm, their_norm) if a and b) / 4
            out[i] += cosine * math.exp(-((mine_length - their_length) ** 2) / (2 * sigma**2))
        out[i] *= 10 / len(texts)
    return out


def bleu(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, float, float, float]:
    """Corpus BLEU-1 to BLEU-4.

    Counts are clipped to the most that one reference has; the length is compared with the reference that is closest,
    the shorter of two.

    Args:
        captions: [N], words are what white space separates.
        references: one or more for each.

    Raises:
        InputError: as `check_texts`.
    """
    check_texts(captions, references)
    right, guessed = np.zeros(4), np.zeros(4)
    length = wanted = 0
    for caption, texts in zip(captions, references):
        words = len(caption.split())
        most: Ngrams = Counter()
        for text in texts:
            most |= _ngrams(text)
        for gram, n in (_ngrams(caption) & most).items():
            right[len(gram) - 1] += n
        guessed += [max(0, words - n) for n in range(4)]
        length += words
        wanted += min((abs(len(t.split()) - words), len(t.split())) for t in texts)[1]
    # The two small numbers are coco-caption's, so that nothing right is a very small score.
    precision = (right + 1e-15) / (guessed + 1e-9)
    ratio = (length + 1e-15) / (wanted + 1e-9)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return tuple(float(precision[:n].prod() ** (1 / n) * brevity) for n in range(1, 5))  # type: ignore[return-value]


def check_counts(first: str, a: Any, second: str, b: Any) -> None:
    """As many of one as of the other and at least one, else InputError."""
    if len(a) != len(b) or not len(a):
        raise InputError(f"{first} has {len(a)} entries and {second} {len(b)}; the same number, at least 1, is needed")


def check_texts(captions: Any, references: Any) -> None:
    """[N] texts and, for each, at least one reference, else InputError."""
    if isinstance(captions, str) or isinstance(references, str):
        raise InputError("one text was given where a list of texts is needed")
    check_counts("captions", captions, "references", references)
    for i, (caption, texts) in enumerate(zip(captions, references)):
        if not isinstance(caption, str):
            raise InputError(f"captions[{i}] is {show(caption)}; text is needed")
        if (
            isinstance(texts, str)
            or not hasattr(texts, "__len__")
            or not len(texts)
            or not all(isinstance(t, str) for t in texts)
        ):
            raise InputError(f"references[{i}] is {show(texts)}; a list of at least one text is needed")


def _ngrams(text: str) -> Ngrams:
    words = text.split()
    return Counter(tuple(words[i : i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))
