"""Captioning: token sums, bits, unigram baseline, all names of a group, padded batches."""

import jax
import numpy as np
import pytest

from eval import EVALUATORS, captioning, data


def measure(config, oracle, params, tmp_path):
    evaluate = EVALUATORS["captioning"](config)
    return evaluate(oracle.model, params, step=1, rng=jax.random.key(0), workdir=tmp_path)


def test_a_model_that_knows_all_names(config, oracle, params, tmp_path):
    metrics = measure(config, oracle, params, tmp_path)
    assert metrics["train_captions"] == metrics["held_out_captions"] == 10
    assert metrics["train_loss"] == pytest.approx(1.0)  # one nat per token, padding not counted
    for split in ("train", "held_out"):
        assert metrics[f"{split}_accuracy"] == 1.0
        assert metrics[f"{split}_accuracy_en"] == metrics[f"{split}_accuracy_de"] == 1.0
        assert 1.0 < metrics[f"{split}_loss_unigram"] < np.log(300)
    assert "train_accuracy_ja" not in metrics  # the data has no Japanese
    assert set(oracle.calls) == {8}  # padded, so one compilation; never dropped
    assert len(oracle.calls) == 4


def test_a_model_that_says_one_thing(config, oracle, params, tmp_path):
    oracle.perfect = False
    metrics = measure(config, oracle, params | {"nats": 2.5}, tmp_path)
    assert metrics["train_accuracy"] == 0.0 and metrics["train_loss"] == pytest.approx(2.5)


def test_bits_per_character(config, oracle, params):
    images = np.stack([oracle.pictures["thing 3"]] * 3)
    answers = ["thing 3", "thing 30", "ding 3"]
    found = captioning.likelihoods(
        config, oracle.model, params, images, ["caption en"] * 3, answers
    )
    tokens = [len(oracle.tok.encode(a)) + 1 for a in answers]
    np.testing.assert_allclose(found["nll"], tokens)
    found |= {"unigram": found["nll"], "chars": np.array([7, 8, 6])}
    found |= {"hit": np.zeros(3), "chance": np.zeros(3)}
    scores = captioning._scores(np.ones(3, bool), found)
    assert scores["bits_per_char"] == pytest.approx(sum(tokens) / np.log(2) / 21)


def test_unigram_model_is_fitted_per_language(config, oracle):
    train = data.captioned(config, "train", 8)
    answers = ["thing 3", "ding 3"]
    nll = captioning.unigram_nll(config, train, np.array(["en", "de"]), answers)
    table = np.exp(data.unigram(config, [f"thing {i}" for i in range(30)]))
    assert table.sum() == pytest.approx(1.0)
    ids = [*oracle.tok.encode("thing 3"), oracle.tok.eos]
    assert nll[0] == pytest.approx(-np.log(table[ids]).sum())
    wrong = captioning.unigram_nll(config, train, np.array(["de"]), ["thing 3"])
    assert wrong[0] > nll[0]


def test_every_name_of_the_group_is_right(config, oracle, params, monkeypatch):
    examples = data.captioned(config, "train", 8)
    items = [type(e)(**{**vars(e), "group": 5}) for e in examples.items]
    grouped = type(examples)(items, examples.pictures, {})
    monkeypatch.setattr(data, "captioned", lambda *_: grouped)
    oracle.perfect = False  # says "red" to everything
    names = {5: {"en": {"thing 1", "red"}, "de": {"ding 1"}}, 6: {}}
    metrics = captioning.evaluate_split(config, oracle.model, params, "train", names)
    assert metrics["train_accuracy_en"] == 1.0 and metrics["train_accuracy_de"] == 0.0
    assert metrics["train_accuracy_chance"] == pytest.approx((2 / 2 + 1 / 2) / 2)
