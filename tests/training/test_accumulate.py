"""One step = four micro-batches, with unequal masks, parts of unequal size and threaded state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from training.accumulate import split, value_and_grad
from training.step import count_examples


def test_rows_of_a_micro_batch_are_strided():
    """Micro-batch a holds rows a, a + A, ...: consecutive rows (one device's) are split."""
    batch = dict(x=np.arange(12), y=np.arange(24).reshape(12, 2))
    parts = split(batch, 3)
    np.testing.assert_array_equal(parts["x"], [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]])
    assert parts["y"].shape == (3, 4, 2)
    with pytest.raises(ValueError, match="config.accumulate=5 does not divide the 12 rows.*'x'"):
        split(batch, 5)


def test_examples_are_numbered_part_after_part():
    """A batch of 4 drawn and 2 understood examples has 6; micro-batching keeps them aligned."""
    shapes = dict(gen_tokens=(4, 7), gen_length=(4,), und_image=(2, 8, 8, 3))
    assert count_examples(shapes) == 6
    ids = np.arange(6)
    micro = split(dict(gen=np.arange(4), und=np.arange(4, 6), example=ids), 2)
    for a in range(2):
        both = np.concatenate([micro["gen"][a], micro["und"][a]])
        np.testing.assert_array_equal(micro["example"][a], both)
    assert count_examples(dict(x=(5, 2), y_a=(5,), z_a=(5,))) == 5
    assert count_examples(dict(gen_a=(3,), und_b=(3,))) == 6


def test_values_gradients_and_state_add_up():
    """Sum over global denominators: 1 = 4 micro-batches though every one has another mask."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(5,)), jnp.float32)
    mask = np.zeros(16, np.float32)
    mask[[0, 1, 2, 5, 8, 9, 13]] = 1  # the four micro-batches hold 3, 3, 1 and 0 of them
    batch = dict(x=jnp.asarray(rng.normal(size=(16, 5)), jnp.float32), mask=jnp.asarray(mask))
    total = batch["mask"].sum()

    def loss(params, extra, micro):
        value = (jnp.square(micro["x"] @ params) * micro["mask"]).sum() / total
        return value, (dict(share=micro["mask"].sum() / total), extra + micro["mask"].sum())

    one = value_and_grad(loss, w, jnp.float32(3), batch, 1)
    four = value_and_grad(loss, w, jnp.float32(3), batch, 4)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert float(four[2]) == 10 and abs(four[1]["share"] - 1.0) < 1e-6


def test_gradients_accumulate_in_float32():
    """bfloat16 parameters: a thousand small gradients are not lost beside a large one."""
    n = 512
    x = jnp.full((n,), 1.0).at[0].set(1000.0)

    def loss(params, extra, micro):
        return (params.astype(jnp.float32) * micro["x"]).sum(), ({}, extra)

    grads = value_and_grad(loss, jnp.bfloat16(1), {}, dict(x=x), n)[3]
    assert grads.dtype == jnp.float32 and float(grads) == 1000.0 + n - 1


def test_training_with_micro_batches(toy, reference, tmp_path):
    """Twelve steps of four micro-batches equal twelve plain ones, dropout included."""
    four = toy.train(tmp_path, accumulate=4)
    for step, loss in reference[1].items():
        assert abs(loss - four[step]) <= 1e-5 * max(1, abs(loss))
