"""Chunked cross-entropy against the plain one; SigLIP's pair loss against transformers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.blocks import losses

GOLDEN = Path(__file__).parents[1] / "golden"


def problem(n, d, v, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (n, d)).astype(dtype)
    table = jax.random.normal(keys[1], (v, d))
    targets = jax.random.randint(keys[2], (n,), 0, v)
    # Some rows score their own target highest, so that `correct` is not all zeros.
    hidden = hidden.at[::3].set(table[targets[::3]].astype(dtype))
    weights = jax.random.uniform(keys[3], (n,)).at[1].set(0.0)
    return hidden, table, targets, weights


def relative(got, want):
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return np.abs(got - want).max() / max(np.abs(want).max(), 1e-30)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("vocabulary,chunk", [(960, 128), (1009, 128), (64, 128), (130, 7)])
def test_1_6_chunked_equals_plain_in_value_and_gradients(vocabulary, chunk, softcap):
    hidden, table, targets, weights = problem(37, 24, vocabulary)

    def chunked(h, t, w):
        return losses.chunked_cross_entropy(h, t, targets, w, softcap=softcap, chunk=chunk)

    def plain(h, t, w):
        return losses.plain_cross_entropy(h, t, targets, w, softcap=softcap)

    got = jax.jit(jax.value_and_grad(chunked, (0, 1, 2), has_aux=True))(hidden, table, weights)
    want = jax.value_and_grad(plain, (0, 1, 2), has_aux=True)(hidden, table, weights)
    assert 0 < want[0][1] < weights.sum()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert relative(a, b) < 1e-5


def test_1_6_token_nll_takes_any_cotangent():
    hidden, table, targets, _ = problem(20, 16, 300)
    cotangent = jax.random.normal(jax.random.key(7), (2, 20))

    def value(h, t, chunk):
        nll, _, logsumexp = losses.token_nll(h, t, targets, chunk=chunk)
        return nll @ cotangent[0] + jnp.square(logsumexp) @ cotangent[1]

    got = jax.grad(value, (0, 1))(hidden, table, 50)
    want = jax.grad(value, (0, 1))(hidden, table, 300)
    for a, b in zip(got, want):
        assert relative(a, b) < 1e-5


def test_1_6_bf16_hidden_keeps_float32_sums():
    hidden, table, targets, weights = problem(37, 24, 960, jnp.bfloat16)

    def value(h, t, chunk):
        return losses.chunked_cross_entropy(h, t, targets, weights, chunk=chunk)[0]

    got, grads = jax.value_and_grad(value, (0, 1))(hidden, table, 128)
    want, plain_grads = jax.value_and_grad(value, (0, 1))(hidden, table, 960)
    assert got.dtype == jnp.float32 and relative(got, want) < 1e-5
    assert grads[0].dtype == jnp.bfloat16 and grads[1].dtype == jnp.float32
    for a, b in zip(grads, plain_grads):
        assert relative(a, b) < 1e-2


def test_1_6_peak_is_at_most_a_quarter_of_plain_at_256k():
    n, d, vocabulary = 256, 64, 256_000
    shapes = [
        jax.ShapeDtypeStruct((n, d), jnp.float32),
        jax.ShapeDtypeStruct((vocabulary, d), jnp.float32),
        jax.ShapeDtypeStruct((n,), jnp.int32),
        jax.ShapeDtypeStruct((n,), jnp.float32),
    ]

    def peak(loss):
        def value(h, t, y, w):
            return loss(h, t, y, w, softcap=30.0)[0]

        compiled = jax.jit(jax.grad(value, (0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert peak(losses.chunked_cross_entropy) <= peak(losses.plain_cross_entropy) / 4


def test_2_pair_loss_equals_transformers():
    golden = np.load(GOLDEN / "siglip.npz")
    x, y = (jnp.asarray(golden[key], jnp.float32) for key in ("pair_x", "pair_y"))
    rows = losses.sigmoid_pair_loss(x, y, jnp.float32(1.3), jnp.float32(-2.0))
    assert rows.shape == (5,)
    assert relative(rows.mean(), golden["pair_loss"]) < 1e-6


def test_2_pair_loss_at_its_initial_values():
    """t = ln 10, b = -10, orthogonal embeddings: closed form."""
    eye = jnp.eye(4)
    loss = losses.sigmoid_pair_loss(eye, eye, jnp.log(10.0), jnp.float32(-10.0)).mean()
    want = np.log1p(np.exp(0.0)) + 3 * np.log1p(np.exp(-10.0))
    assert relative(loss, want) < 1e-6
