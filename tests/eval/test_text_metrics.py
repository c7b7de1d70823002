"""Text metrics against values of pycocoevalcap and big_vision (tests/golden/text_metrics.json)."""

import json
from pathlib import Path

import numpy as np
import pytest

from eval import text_metrics

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "text_metrics.json").read_text())


def test_cider_d_equals_pycocoevalcap():
    golden = GOLDEN["cider"]
    candidates, references = zip(*golden["captions"])
    scores = text_metrics.cider_d(candidates, references)
    np.testing.assert_allclose(scores, golden["scores"], rtol=1e-12, atol=1e-14)
    assert scores.mean() == pytest.approx(golden["mean"], rel=1e-12)


@pytest.mark.parametrize("text, expected", GOLDEN["vqa_clean"])
def test_vqa_normalisation_equals_the_official_one(text, expected):
    assert text_metrics.vqa_clean(text) == expected


def test_vqa_accuracy_equals_the_official_one():
    for answer, truths, expected in GOLDEN["vqa_accuracy"]:
        assert text_metrics.vqa_accuracy(answer, truths) == pytest.approx(expected, abs=1e-12)


def test_three_of_ten_equal_answers_score_nine_tenths():
    assert text_metrics.vqa_accuracy("red", ["red"] * 3 + ["blue"] * 7) == pytest.approx(0.9)


@pytest.mark.parametrize(
    "answer, truths, expected",
    [
        ("hello", ["hello"], 1.0),
        ("hallo", ["hello"], 0.8),
        ("abcd", ["wxyz", "abxx"], 0.0),  # a ratio of exactly one half counts as wrong
        ("abcde", ["abcxx", "abcdx"], 0.8),
        ("", [""], 1.0),
        ("x", [""], 0.0),
    ],
)
def test_anls(answer, truths, expected):
    assert text_metrics.anls(answer, truths) == pytest.approx(expected)


def test_edit_distance():
    assert text_metrics.edit_distance("kitten", "sitting") == 3
    assert text_metrics.edit_distance("", "abc") == 3


def test_ptb_like_tokens():
    text = "A man's red-hot pan, isn't it? (Yes!)"
    assert text_metrics.ptb_like_tokens(text) == "a man 's red-hot pan is n't it yes"
