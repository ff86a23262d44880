"""What answers about scenes are judged by, against values derived by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.blocks.scene import (
    VSI_CHOICES,
    VSI_NUMBERS,
    assignment,
    bleu,
    cider,
    mean_relative_accuracy,
    multi3drefer_f1,
    normalize_answer,
    scan2cap_scores,
    scanqa_scores,
    scanrefer_accuracy,
    sqa3d_accuracy,
    vsi_bench_accuracy,
)
from engine.errors import InputError

UNIT = [0, 0, 0, 2, 2, 2]


def moved(x):
    """The unit box moved along x: IoU (2 - x) / (2 + x)."""
    return [x, 0, 0, 2, 2, 2]


# ---- grounding


def test_scanrefer():
    # IoU 1, 0.6, 1/3, 0.2, 0.
    predicted = [moved(x) for x in (0, 0.5, 1, 4 / 3, 3)]
    assert scanrefer_accuracy(predicted, [UNIT] * 5) == {0.25: 3 / 5, 0.5: 2 / 5}
    assert scanrefer_accuracy(predicted, [UNIT] * 5, (0.9,)) == {0.9: 1 / 5}
    # At the threshold: 4 of 8 by volume is 0.5 exactly, and counts.
    assert scanrefer_accuracy([[0, 0, 0, 2, 2, 1]], [UNIT]) == {0.25: 1, 0.5: 1}


def test_multi3drefer_without_boxes():
    for predicted, target, f1 in (([], [], 1), ([UNIT], [], 0), ([], [UNIT], 0), ([], [UNIT, moved(9)], 0)):
        assert multi3drefer_f1([predicted], [target]) == {0.25: f1, 0.5: f1}
    # The mean of the queries, not of the boxes.
    assert multi3drefer_f1([[], [UNIT], []], [[], [UNIT], [UNIT]]) == {0.25: 2 / 3, 0.5: 2 / 3}


def test_multi3drefer():
    # One of two found, and one too many: 2 * 1 / (2 + 2); IoU 1/3 counts at 0.25 only.
    assert multi3drefer_f1([[moved(1), moved(20)]], [[UNIT, moved(40)]]) == {0.25: 0.5, 0.5: 0.0}
    # Three for one: 2 * 1 / (3 + 1).
    assert multi3drefer_f1([[moved(0.1), UNIT, moved(0.2)]], [[UNIT]]) == {0.25: 0.5, 0.5: 0.5}
    # One for three: 2 / 4; two for three: 4 / 5.
    assert multi3drefer_f1([[UNIT]], [[moved(9), UNIT, moved(18)]]) == {0.25: 0.5, 0.5: 0.5}
    assert multi3drefer_f1([[UNIT, moved(9)]], [[moved(9), UNIT, moved(18)]]) == {0.25: 0.8, 0.5: 0.8}
    # The nearest pair first would be 0.905 + 0.429, of which one reaches 0.5; the most is 0.667 + 0.739, both.
    assert multi3drefer_f1([[moved(0.1), moved(-0.3)]], [[UNIT, moved(0.5)]]) == {0.25: 1.0, 0.5: 1.0}
    # Here 0.818 + 0.481 is the most, of which one reaches 0.5.
    assert multi3drefer_f1([[moved(0.3), moved(-0.7)]], [[UNIT, moved(0.5)]]) == {0.25: 1.0, 0.5: 0.5}


def test_assignment_by_hand():
    rows, columns = assignment([[7, 5, 1], [6, 1, 0]])  # 5 + 6, not 7 + 1
    assert rows.tolist() == [0, 1] and columns.tolist() == [1, 0]
    rows, columns = assignment(np.array([[7, 5, 1], [6, 1, 0]]).T)
    assert rows.tolist() == [0, 1] and columns.tolist() == [1, 0]
    assert [len(x) for x in assignment(np.zeros((0, 3)))] == [0, 0]
    for bad in ([1, 2], [[np.nan]], [[np.inf]]):
        with pytest.raises(InputError, match="finite numbers"):
            assignment(bad)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31), st.booleans())
@settings(max_examples=150, deadline=None)
def test_assignment_is_the_best(k, n, seed, ties):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 3, (k, n)).astype(float) if ties else rng.random((k, n))
    rows, columns = assignment(scores)
    assert len(rows) == min(k, n) == len(set(columns.tolist())) and (np.diff(rows) > 0).all()
    wide = scores if k <= n else scores.T
    best = max(
        sum(wide[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(max(k, n)), min(k, n))
    )
    assert abs(scores[rows, columns].sum() - best) < 1e-12


def test_faults_of_grounding():
    for call, message in (
        (lambda: scanrefer_accuracy([UNIT], [UNIT] * 2), "predicted has 1 entries and target 2"),
        (lambda: scanrefer_accuracy([], []), "at least 1"),
        (lambda: scanrefer_accuracy([[0] * 6], [UNIT]), "size is positive"),
        (lambda: multi3drefer_f1([], []), "at least 1"),
        (lambda: multi3drefer_f1([[UNIT]], [[UNIT], []]), "predicted has 1 entries and target 2"),
        (lambda: multi3drefer_f1([[UNIT], [[1, 2]]], [[UNIT], []]), r"predicted\[1\] is int64 \[1, 2\]"),
        (lambda: multi3drefer_f1([[UNIT]], [[[np.nan] * 6]]), r"target\[0\]\[0\]\[0\] is nan"),
    ):
        with pytest.raises(InputError, match=message):
            call()


# ---- captions


def test_cider_by_hand():
    # Two captions, so a gram of one reference weighs log 2, which cancels in the cosines. Same text: 1 for words, 1
    # for pairs, nothing for 3 and 4: 10 * 2 / 4. One word of two: 1 / 2 for words: 10 * 0.5 / 4.
    assert np.abs(cider(["a b", "c e"], [["a b"], ["c d"]]) - [5, 1.25]).max() < 1e-12
    # Clipped: min(2, 1) * 1 / (2 * sqrt 2) for words.
    assert abs(cider(["a a", "x"], [["a b"], ["c d"]])[0] - 10 / (2 * math.sqrt(2)) / 4) < 1e-12
    # Words 2 / (2 * sqrt 2), pairs 1 / sqrt 3; 3 pairs against 1: exp(-2^2 / 72).
    expected = 10 / 4 * (1 / math.sqrt(2) + 1 / math.sqrt(3)) * math.exp(-4 / 72)
    assert abs(cider(["a b c d", "x"], [["a b"], ["c d"]])[0] - expected) < 1e-12
    assert abs(expected - 3.0376) < 1e-4
    # The mean of the references: 1 + 1 and 1 / 2.
    assert abs(cider(["a b", "x"], [["a b", "a c"], ["d e"]])[0] - 10 / 4 * (2 + 0.5) / 2) < 1e-12
    # A word of all references weighs nothing; alone it scores 0.
    got = cider(["the a", "the", "c c"], [["the a"], ["the b"], ["the c"]])
    # words: a only, 1; pairs 1. | nothing | c twice, min(2, 1) * 1 / (2 * 1) for words.
    assert np.abs(got - [5, 0, 10 / 4 / 2]).max() < 1e-12
    # Weights differ: of 3, 'x' is in 2 references and weighs log 1.5, 'a' weighs log 3.
    light, heavy = math.log(1.5), math.log(3)
    got = cider(["a", "x", "c"], [["a x"], ["x b"], ["c d"]])[0]
    # One word has no pair, two have one: exp(-1 / 72).
    expected = 10 / 4 * heavy**2 / (heavy * math.hypot(heavy, light)) * math.exp(-1 / 72)
    assert abs(got - expected) < 1e-12
    assert cider(["a b"], [["a b"]]).tolist() == [0.0] and cider(["", ""], [["a"], [""]]).tolist() == [0.0, 0.0]


def test_bleu_by_hand():
    # Right of 6 words 5, of 5 pairs 3, of 4 triples 1, of 3 quadruples 0.
    got = bleu(["the cat sat on the mat"], [["the cat is on the mat"]])
    expected = [5 / 6, math.sqrt(1 / 2), (1 / 8) ** (1 / 3), 0]
    assert np.abs(np.array(got) - expected).max() < 1e-4 and got[3] > 0
    # Clipped to the most of one reference: 2 of 3.
    assert abs(bleu(["a a a"], [["a a b", "a c d"]])[0] - 2 / 3) < 1e-6
    # Two words for four: exp(1 - 4 / 2).
    assert abs(bleu(["a b"], [["a b c d"]])[0] - math.exp(-1)) < 1e-6
    # Of the closest references the shorter: 2 and 4 are as near to 3, so it is not too short.
    assert abs(bleu(["a b c"], [["a b c d", "a b"]])[0] - 1) < 1e-6
    # Counts are added over captions: 2 of 3, and 3 words for 5.
    assert abs(bleu(["a b", "c"], [["a b"], ["d e f"]])[0] - 2 / 3 * math.exp(1 - 5 / 3)) < 1e-6


def test_captions_against_coco_caption():
    # Made once with pycocoevalcap 1.2 (Cider().compute_score, Bleu(4).compute_score).
    captions = [
        "a red chair next to the desk .",
        "the white door is in the corner of the room .",
        "chair chair",
        "it is brown",
    ]
    references = [
        ["this is a red chair . it is next to the desk .", "a chair by the desk"],
        ["the door is white", "there is a white door in the corner of the room .", "a door"],
        ["the brown chair", "a chair at the table"],
        ["it is brown .", "brown"],
    ]
    scores = [2.761524827923787, 2.557584104151322, 0.598640837452954, 3.77942673417405]
    assert np.abs(cider(captions, references) - scores).max() < 1e-9
    scores = [0.9166666665902777, 0.8563488385027448, 0.7710108347920436, 0.678183681175262]
    assert np.abs(np.array(bleu(captions, references)) - scores).max() < 1e-9


def test_scan2cap():
    # 'sos' and 'eos' are in all references and weigh nothing alone: 1 for each length of gram.
    captions, references = ["A b", "c D"], [["a B"], ["c d"]]
    got = scan2cap_scores(captions, references)
    assert abs(got.cider - 10) < 1e-12 and abs(got.bleu4 - 1) < 1e-6
    # The second box is too far off: 'sos eos' for 4 words. Words 6 / 6, pairs 3 / 4, triples 2 / 2, quadruples 1 / 1,
    # 6 words for 8.
    got = scan2cap_scores(captions, references, [0.5, 0.49])
    assert abs(got.cider - 5) < 1e-12 and abs(got.bleu4 - 0.75**0.25 * math.exp(1 - 8 / 6)) < 1e-6
    assert abs(scan2cap_scores(captions, references, [0.3, 0.49], 0.25).cider - 10) < 1e-12
    # Full stops and commas are words.
    one = scan2cap_scores(["Red, round.", "x y"], [["red , round ."], ["c d"]])
    assert abs(one.cider - 10 / 2) < 1e-12
    with pytest.raises(InputError, match=r"overlaps has shape \[1\]; one IoU for each of 2"):
        scan2cap_scores(captions, references, [0.5])


def test_scanqa():
    got = scanqa_scores(["brown.", "on the left", "2"], [["brown", "dark brown"], ["right"], ["two", "2"]])
    # The full stop is off for CIDEr (one word against one: 1 of 4 lengths; against two: 1 / sqrt 2 and a pair more),
    # and on for the exact match.
    first = 10 / 4 * (1 + math.exp(-1 / 72) / math.sqrt(2)) / 2
    third = 10 / 4 / 2
    assert abs(got.cider - (first + third) / 3) < 1e-12 and got.exact == 1 / 3


@pytest.mark.parametrize(
    "text, expected",
    [
        ("  The  Left ", "left"),
        ("left.", "left"),
        ("left .", "left "),  # as the published one leaves it
        ("10 O' clock", "ten o'clock"),
        ("oclock", "o'clock"),
        ("None", "zero"),
        ("23", "twenty-three"),
        ("21", "21"),
        ("0 1 20", "zero one twenty"),
        ("chai2", "chai"),
        ("a chai", "chair"),
        ("an apple and the TV", "apple and tv"),
        ("a 3", "three"),
        ("no, it's a table!", "no, it's table"),
        ("turn rigth, go backwards", "turn right, go backward"),
        ("à la carte", " la carte"),
        ("a a chair", "a chair"),
        ("the", "the"),
        ("chair12", "chair12"),
        ("letf", "left"),
        ("", ""),
    ],
)
def test_normalize_answer(text, expected):
    assert normalize_answer(text) == expected


def test_sqa3d():
    assert sqa3d_accuracy(["Two.", "the Left", "chair", "yes"], ["2", "left", "table", "no"]) == 0.5


def test_faults_of_texts():
    for call in (cider, bleu, scan2cap_scores, scanqa_scores):
        for captions, references, message in (
            (["a"], [["a"], ["b"]], "captions has 1 entries and references 2"),
            ([], [], "at least 1"),
            ([1], [["a"]], r"captions\[0\] is 1; text"),
            (["a"], [[]], r"references\[0\] is \[\]; a list of at least one text"),
            (["a"], ["a"], r"references\[0\] is 'a'; a list"),
            (["a"], [3], r"references\[0\] is 3; a list"),
            (["a"], [["a", 2]], r"references\[0\]"),
            ("a", [["a"]], "one text was given"),
        ):
            with pytest.raises(InputError, match=message):
                call(captions, references)
    with pytest.raises(InputError, match="captions has 1 entries"):
        sqa3d_accuracy(["a"], ["a", "b"])


# ---- VSI-Bench


def test_mean_relative_accuracy():
    assert mean_relative_accuracy(10, 10) == 1.0
    assert mean_relative_accuracy(9.2, 10) == 0.9  # 8 % off: .95 asks for 5 %
    assert mean_relative_accuracy(12.6, 10) == 0.5  # 26 % off: .75 asks for 25 %, .70 for 30 %
    assert mean_relative_accuracy(5, 10) == 0.1 and mean_relative_accuracy(4.9, 10) == 0.0
    assert mean_relative_accuracy(9, 10) == 0.9 and mean_relative_accuracy(9.5, 10) == 1.0  # as much as is asked for
    for nothing in (None, math.nan, math.inf, -10):
        assert mean_relative_accuracy(nothing, 10) == 0.0


def test_vsi_bench():
    cases = [
        ("object_rel_direction_easy", "A. left", "A", 1),
        ("object_rel_direction_easy", "B", "A", 0),
        ("object_rel_direction_medium", "c", "C", 1),
        ("object_rel_direction_hard", "The answer is A", "A", 0),
        ("object_rel_distance", "D.", "D", 1),
        ("route_planning", "", "A", 0),
        ("obj_appearance_order", "B.\n", "b", 0),  # what follows the full stop is part of the word
        ("object_abs_distance", "9.2 m", "10", 0.9),
        ("object_abs_distance", "about 10", "10", 0),
        ("object_counting", "4.", 4, 1),
        ("object_size_estimation", "130", "100", 0.5),
        ("room_size_estimation", "nan", "20", 0),
    ]
    kinds, answers, references, _ = zip(*cases)
    got = vsi_bench_accuracy(answers, references, kinds)
    expected = {
        "object_rel_direction": (0.5 + 1 + 0) / 3,
        "object_rel_distance": 1,
        "route_planning": 0,
        "obj_appearance_order": 0,
        "object_abs_distance": 0.45,
        "object_counting": 1,
        "object_size_estimation": 0.5,
        "room_size_estimation": 0,
    }
    assert set(got) == {*expected, "overall"}
    for kind, value in expected.items():
        assert abs(got[kind] - value) < 1e-12
    assert abs(got["overall"] - (0.5 + 1 + 0.45 + 1 + 0.5) / 8) < 1e-12
    # Part of the benchmark: of what there is.
    got = vsi_bench_accuracy(["A", "4"], ["A", "4"], ["object_rel_direction_hard", "object_counting"])
    assert got == {"object_counting": 1.0, "object_rel_direction": 1.0, "overall": 1.0}
    assert len(VSI_CHOICES) == 6 and len(VSI_NUMBERS) == 4


def test_faults_of_vsi_bench():
    for answers, references, kinds, message in (
        (["A"], ["A", "B"], ["route_planning"], "answers has 1 entries and references 2"),
        (["A"], ["A"], ["route_planning"] * 2, "answers has 1 entries and kinds 2"),
        ([], [], [], "at least 1"),
        ([4], ["A"], ["route_planning"], r"answers\[0\] is 4; text"),
        (["A"], ["A"], ["route"], r"kinds\[0\] = 'route'; one of object_rel_direction_easy"),
        (["4"], ["four"], ["object_counting"], r"references\[0\] = 'four' of object_counting; a positive number"),
        (["4"], [0], ["object_counting"], "a positive number"),
        (["4"], ["nan"], ["object_counting"], "a positive number"),
    ):
        with pytest.raises(InputError, match=message):
            vsi_bench_accuracy(answers, references, kinds)
