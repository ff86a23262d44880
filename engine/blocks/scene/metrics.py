"""What answers about scenes are judged by: five 3D tasks and VSI-Bench, as their published evaluations compute them.

All results are shares of 1; published tables print 100 times these numbers. CIDEr is that of coco-caption, which is
10 times a cosine, so its tables may go above 100.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.blocks.scene.boxes import check_boxes, iou, paired_iou
from engine.blocks.scene.captions import bleu, check_counts, check_texts, cider
from engine.errors import InputError
from engine.io.values import show

THRESHOLDS = (0.25, 0.5)
#: VSI-Bench: questions answered by an option's letter, and those answered by a number.
VSI_CHOICES = (
    "object_rel_direction_easy",
    "object_rel_direction_medium",
    "object_rel_direction_hard",
    "object_rel_distance",
    "route_planning",
    "obj_appearance_order",
)
VSI_NUMBERS = ("object_abs_distance", "object_counting", "object_size_estimation", "room_size_estimation")


@dataclass(frozen=True)
class CaptionScores:
    """Of Scan2Cap.

    Attributes:
        cider: mean CIDEr-D.
        bleu4: corpus BLEU-4.
    """

    cider: float
    bleu4: float


@dataclass(frozen=True)
class AnswerScores:
    """Of ScanQA.

    Attributes:
        cider: mean CIDEr-D.
        exact: share of answers that are one of the references.
    """

    cider: float
    exact: float


def scanrefer_accuracy(predicted: Any, target: Any, thresholds: Sequence[float] = THRESHOLDS) -> dict[float, float]:
    """Share of queries whose box overlaps the target's by at least each threshold of IoU.

    Args:
        predicted, target: [N, 6] (cx, cy, cz, sx, sy, sz), one box for each query.
        thresholds: of IoU.

    Raises:
        InputError: as `check_boxes`; other numbers of boxes; no query.
    """
    check_counts("predicted", predicted, "target", target)
    overlap = paired_iou(predicted, target)
    return {t: float((overlap >= t).mean()) for t in thresholds}


def multi3drefer_f1(
    predicted: Sequence[Any], target: Sequence[Any], thresholds: Sequence[float] = THRESHOLDS
) -> dict[float, float]:
    """Mean F1 of the queries.

    Boxes are matched so that their IoUs add up to the most; a pair counts if it reaches the threshold. Where there is
    no target, the F1 is 1 if nothing is predicted, else 0.

    Args:
        predicted, target: for each query its boxes [K, 6]; [] for none.
        thresholds: of IoU.

    Raises:
        InputError: as `check_boxes`; other numbers of queries; no query.
    """
    check_counts("predicted", predicted, "target", target)
    out = np.zeros((len(predicted), len(thresholds)))
    for i, (mine, theirs) in enumerate(zip(predicted, target)):
        a, b = check_boxes(mine, f"predicted[{i}]"), check_boxes(theirs, f"target[{i}]")
        if not len(a) or not len(b):
            out[i] = len(a) == len(b)
            continue
        overlap = iou(a, b)
        row, column = assignment(overlap)
        hits = (overlap[row, column][:, None] >= np.asarray(thresholds)).sum(0)
        out[i] = 2 * hits / (len(a) + len(b))
    return dict(zip(thresholds, out.mean(0).tolist()))


def scan2cap_scores(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    overlaps: Sequence[float] | np.ndarray | None = None,
    threshold: float = 0.5,
) -> CaptionScores:
    """CIDEr and BLEU-4 of captions of objects.

    All texts become lower case, with spaces around full stops and commas, between the words 'sos' and 'eos'.

    Args:
        captions: one for each object.
        references: one or more for each object.
        overlaps: [N] IoU of the boxes that were captioned with the objects'; None: the objects' own boxes. Below the
            threshold a caption is left empty: it adds nothing to CIDEr, and to BLEU the two words around it.
        threshold: of IoU.

    Raises:
        InputError: numbers that do not fit, a caption that is no text, an object without reference.
    """
    check_texts(captions, references)
    kept = np.ones(len(captions), bool) if overlaps is None else np.asarray(overlaps) >= threshold
    if kept.shape != (len(captions),):
        raise InputError(f"overlaps has shape {list(kept.shape)}; one IoU for each of {len(captions)} captions")
    spoken = [_wrapped(text if keep else "") for text, keep in zip(captions, kept)]
    corpus = [[_wrapped(text) for text in texts] for texts in references]
    return CaptionScores(float(cider(spoken, corpus).mean()), bleu(spoken, corpus)[3])


def scanqa_scores(answers: Sequence[str], references: Sequence[Sequence[str]]) -> AnswerScores:
    """CIDEr and exact match of answers.

    Full stops at the end of an answer are removed for CIDEr. The exact match compares the answer as it is, case and
    full stop included, as the published evaluation does.

    Args:
        answers: one for each question.
        references: the right ones for each question.

    Raises:
        InputError: as `scan2cap_scores`.
    """
    check_texts(answers, references)
    exact = np.mean([answer in texts for answer, texts in zip(answers, references)])
    return AnswerScores(float(cider([a.rstrip(".") for a in answers], references).mean()), float(exact))


def sqa3d_accuracy(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers that are equal to the reference after `normalize_answer`."""
    check_texts(answers, [[r] for r in references])
    return float(np.mean([normalize_answer(a) == normalize_answer(r) for a, r in zip(answers, references)]))


# fmt: off
_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)
# fmt: on
_SPELLED = {str(i): word for i, word in enumerate(_WORDS)} | {"none": "zero", "23": "twenty-three"}
_FIXED = {
    "letf": "left",
    "let": "left",
    "tehre": "there",
    "rigth": "right",
    "rght": "right",
    "behine": "behind",
    "chai": "chair",
    "wasing": "washing",
    "waslked": "walked",
    "oclock": "o'clock",
}


def normalize_answer(text: str) -> str:
    """What the published evaluation of SQA3D compares.

    In this order: lower case; no spaces at the ends, single ones between; only letters, digits, white space and
    , ' - : are kept; ten misspellings of the data set are corrected; 0 to 20, 23 and 'none' are spelled out; a digit
    at the end of a word goes; a, an, the before a word go; 'backwards' is 'backward'. White space that is left at an
    end by a removed character stays.
    """
    text = re.sub(" {2,}", " ", re.sub("^ +| +$", "", text.lower()))
    text = re.sub(r"[^a-zA-Z0-9,'\s\-:]+", "", text)
    text = _replaced(text, _FIXED)
    text = re.sub(r"\bo' +clock\b", "o'clock", text)
    text = _replaced(text, _SPELLED)
    text = re.sub(r"\b([a-z]+)[0-9]\b", r"\1", text)
    for article in ("a", "an", "the"):
        text = re.sub(rf"\b{article} ([a-z]+)", r"\1", text)
    return re.sub(r"\bbackwards\b", "backward", text)


def vsi_bench_accuracy(answers: Sequence[str], references: Sequence[Any], kinds: Sequence[str]) -> dict[str, float]:
    """Accuracy of each category of VSI-Bench, and 'overall'.

    The first word of an answer, without full stops at its end, is compared: a letter with the reference, case
    ignored; a number by mean relative accuracy, the share of the thresholds .50, .55, ... .95 for which its relative
    error is at most 1 - threshold; no number is 0. The three difficulties of relative direction are averaged into one
    category first; 'overall' is the mean of the categories that occur, which are 8 in the whole benchmark.

    Args:
        answers: of the model.
        references: letters or numbers.
        kinds: the question types, out of `VSI_CHOICES` and `VSI_NUMBERS`.

    Raises:
        InputError: numbers that do not fit, an unknown type, a number that is not positive where one is asked for.
    """
    check_counts("answers", answers, "references", references)
    check_counts("answers", answers, "kinds", kinds)
    scores: dict[str, list[float]] = {}
    for i, (answer, reference, kind) in enumerate(zip(answers, references, kinds)):
        if not isinstance(answer, str):
            raise InputError(f"answers[{i}] is {show(answer)}; text is needed")
        if kind not in VSI_CHOICES + VSI_NUMBERS:
            raise InputError(f"kinds[{i}] = {show(kind)}; one of {', '.join(VSI_CHOICES + VSI_NUMBERS)} is needed")
        word = answer.split(" ")[0].rstrip(".").strip()
        if kind in VSI_CHOICES:
            score = float(word.lower() == str(reference).lower())
        else:
            truth = _number(reference)
            if truth is None or not 0 < truth < math.inf:
                raise InputError(f"references[{i}] = {show(reference)} of {kind}; a positive number is needed")
            score = mean_relative_accuracy(_number(word), truth)
        scores.setdefault(kind, []).append(score)
    means = {kind: float(np.mean(values)) for kind, values in scores.items()}
    turns = [means.pop(kind) for kind in VSI_CHOICES[:3] if kind in means]
    if turns:
        means["object_rel_direction"] = float(np.mean(turns))
    return means | {"overall": float(np.mean(list(means.values())))}


def mean_relative_accuracy(predicted: float | None, target: float) -> float:
    """Share of the thresholds .50, .55, ... .95 for which |predicted - target| / target <= 1 - threshold; None: 0."""
    if predicted is None:
        return 0.0
    return float((abs(predicted - target) / target <= 1 - np.linspace(0.5, 0.95, 10)).mean())


def assignment(scores: Any) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows and columns, each used once, whose scores add up to the most (Hungarian method, exact).

    Args:
        scores: [K, L], finite.

    Returns:
        rows, columns: [min(K, L)] int64 each, rows ascending.
    """
    cost = -np.asarray(scores, np.float64)
    if cost.ndim != 2 or not np.isfinite(cost).all():
        raise InputError(f"scores is {list(cost.shape)}, or not finite; finite numbers [K, L] are needed")
    if cost.shape[0] > cost.shape[1]:
        columns, rows = assignment(-cost.T)
        order = np.argsort(rows)
        return rows[order], columns[order]
    count, width = cost.shape
    # Potentials of rows and columns; column 0 stands for the row that is being placed.
    u, v = np.zeros(count + 1), np.zeros(width + 1)
    owner, before = np.zeros(width + 1, np.int64), np.zeros(width + 1, np.int64)
    for row in range(1, count + 1):
        owner[0], column = row, 0
        least, used = np.full(width + 1, np.inf), np.zeros(width + 1, bool)
        while owner[column]:
            used[column] = True
            reduced = cost[owner[column] - 1] - u[owner[column]] - v[1:]
            better = ~used[1:] & (reduced < least[1:])
            least[1:][better], before[1:][better] = reduced[better], column
            following = int(np.where(used, np.inf, least)[1:].argmin()) + 1
            step = least[following]
            u[owner[used]] += step
            v[used] -= step
            least[~used] -= step
            column = following
        while column:
            owner[column], column = owner[before[column]], int(before[column])
    columns = np.flatnonzero(owner[1:])
    order = np.argsort(owner[1:][columns])
    return np.arange(count), columns[order]


def _wrapped(text: str) -> str:
    return f"sos {text.replace('.', ' . ').replace(',', ' , ').lower()} eos"


def _replaced(text: str, words: dict[str, str]) -> str:
    return re.sub(rf"\b({'|'.join(words)})\b", lambda match: words[match[1]], text)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
