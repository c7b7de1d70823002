"""Questions: accuracy by kind beside the majority answer."""

import jax
import pytest

from eval import EVALUATORS, questions
from input_pipeline.records import Question


def measure(config, oracle, params, tmp_path):
    evaluate = EVALUATORS["questions"](config)
    return evaluate(oracle.model, params, step=1, rng=jax.random.key(0), workdir=tmp_path)


def test_kinds_are_balanced_and_scored(config, oracle, params, tmp_path):
    metrics = measure(config, oracle, params, tmp_path)
    assert metrics["questions"] == 12 and metrics["count"] == metrics["colour"] == 1.0
    assert metrics["colour_majority"] == 1.0 and 0.5 <= metrics["count_majority"] < 1.0
    oracle.perfect = False
    metrics = measure(config, oracle, params, tmp_path)
    assert metrics["colour"] == 1.0 and metrics["count"] == 0.0 and metrics["accuracy"] == 0.5


def test_by_kind():
    asked = [Question("count", "?", a) for a in "112"] + [Question("presence", "?", "yes")]
    metrics = questions.by_kind(asked, ["1", "2", "2", "no"])
    assert metrics["count"] == pytest.approx(2 / 3) == metrics["count_majority"]
    assert metrics["presence"] == 0.0 and metrics["presence_majority"] == 1.0
    assert metrics["accuracy"] == pytest.approx(1 / 3)


def test_no_questions_no_metrics():
    assert questions.by_kind([], []) == {}
