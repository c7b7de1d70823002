"""Loss evaluator: fixed batches, the mean of what the model's loss reports."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval import data, losses


def test_batches_are_small_differ_and_are_the_same_every_time(config):
    config.batch_size = 64
    first = data.loss_batches(config, "train", rows=8, count=2)
    again = data.loss_batches(config, "train", rows=8, count=2)
    assert config.batch_size == 64 and len(first) == 2
    assert [b["example"].tolist() for b in first] == [list(range(8)), list(range(8, 16))]
    assert first[0]["gen_tokens"].shape[0] + first[0]["und_tokens"].shape[0] == 8
    assert any((first[0][k] != first[1][k]).any() for k in first[0] if k != "example")
    for a, b in zip(first, again):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_mean_over_batches_of_every_metric():
    def loss(params, extra, batch, rng, *, step, norms):
        total = jnp.sum(params["w"] * batch["x"]) / norms["term"]
        return total, ({"loss": total, "double": 2 * total}, extra)

    model = SimpleNamespace(loss=loss, norms=lambda b: {"term": jnp.float32(b["x"].size)})
    batches = [{"x": np.array([1.0, 3.0])}, {"x": np.array([5.0, 7.0])}]
    found = losses.mean_metrics(model, {"w": 2.0}, batches, jax.random.key(0), step=1)
    assert found == {"loss": pytest.approx(8.0), "double": pytest.approx(16.0)}


def test_evaluator_names_both_splits(config, monkeypatch):
    rows = {"train": 1.0, "held_out": 4.0}
    monkeypatch.setattr(
        data, "loss_batches", lambda c, name, rows_=rows, **k: [{"x": np.float32(rows_[name])}]
    )
    model = SimpleNamespace(
        norms=lambda b: {},
        loss=lambda params, extra, b, rng, *, step, norms: (b["x"], ({"mse": b["x"]}, extra)),
    )
    found = losses.build(config)(model, {}, step=3, rng=jax.random.key(9), workdir=".")
    assert found == {"train_mse": 1.0, "held_out_mse": 4.0}
