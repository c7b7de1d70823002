"""Associative recall and needles: every answer can be looked up, nothing else is scored."""

import numpy as np
import pytest

from configs.common import base
from configs.data import data_config
from input_pipeline import DATASETS, recall


def config(name="recall", **fields):
    fields = dict(length=40, pairs=6, vocab_size=64, prefetch=0) | fields
    return base(batch_size=8, data=data_config(name=name, **fields))


def build(config, split="train", index=0, count=1, seed=0):
    name = config.data.name
    where = dict(process_index=index, process_count=count)
    return DATASETS[name](config, split=split, seed=seed, **where)


@pytest.mark.parametrize("name", ["recall", "needle"])
def test_every_scored_position_asks_for_a_value_told_before(name, take):
    c = config(name)
    keys, values, hay = recall.ranges(64)
    for batch in take(build(c), 3):
        assert {k: v.shape for k, v in batch.items()} == dict.fromkeys(batch, (8, 40))
        for tokens, scored in zip(batch["tokens"], batch["scored"]):
            asked = np.flatnonzero(scored)
            assert len(asked) == (5 if name == "needle" else 14)
            for at in asked:
                first = np.flatnonzero(tokens == tokens[at])[0]
                assert first < asked.min() and tokens[first + 1] == tokens[at + 1]
                assert tokens[at] in keys and tokens[at + 1] in values
            others = np.delete(tokens, [*asked, *(asked + 1)])
            between = others[~np.isin(others, [*keys, *values])]
            assert np.isin(between, hay).all() if name == "needle" else not len(between)
            if name == "recall":
                assert np.isin(tokens[::2], keys).all() and len(set(tokens[:12:2])) == 6


def test_what_was_asked_says_nothing_of_what_will_be(take):
    """Any key again: the share of rows in which the first two questions are one is 1 / pairs."""
    batches = take(build(config()), 200)
    rows = [np.flatnonzero(s)[:2] for b in batches for s in b["scored"]]
    asked = np.array([t[at] for t, at in zip((t for b in batches for t in b["tokens"]), rows)])
    same = (asked[:, 0] == asked[:, 1]).mean()
    assert abs(same - 1 / 6) < 3 * (1 / 6 * 5 / 6 / len(rows)) ** 0.5


def test_batches_do_not_depend_on_processes_and_splits_differ(take):
    c = config()
    (whole,) = take(build(c), 1)
    halves = [take(build(c, index=i, count=2), 1)[0]["tokens"] for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(halves), whole["tokens"])
    first, second = take(build(c), 2)
    assert (first["tokens"] != second["tokens"]).any()
    assert (take(build(c, split="test"), 1)[0]["tokens"] != whole["tokens"]).any()


def test_what_does_not_fit_is_named(take):
    with pytest.raises(ValueError, match="config.data.pairs=11: length=40 holds 10 pairs"):
        take(build(config(pairs=11)), 1)


def test_training_rows_ask_about_some_of_their_pairs_only_where_the_config_says_so(take):
    """fewest=1: a row's questions are about 1 to all of its pairs; held out: about all."""

    def asked(split, **fields):
        c = config(length=160, **fields)  # 74 questions: all pairs come up
        found = []
        for batch in take(build(c, split), 10):
            for tokens, scored in zip(batch["tokens"], batch["scored"]):
                found.append(len(set(tokens[scored == 1])))
        return np.bincount(found, minlength=7)[1:]

    assert (asked("train", fewest=1) > 3).all()  # 80 rows, 13 each
    assert asked("train")[:5].sum() == asked("validation", fewest=1)[:5].sum() == 0
