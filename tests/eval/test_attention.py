"""Shares and entropy of attention against sums that can be done by hand."""

import jax.numpy as jnp
import numpy as np

from eval.attention import draw, shares, weights
from kernels.attention import MaskSpec, attention


def test_weights_are_those_of_the_attention():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, n, h, 4)).astype("f") for n, h in ((5, 4), (7, 2), (7, 2)))
    mask = MaskSpec(window=3, always_visible=2, query_offset=2)
    p = weights(q, k, mask)
    np.testing.assert_allclose(p.sum(-1), 1.0, rtol=1e-6)
    y = jnp.einsum("bgrts,bsgv->btgrv", p, v).reshape(2, 5, 4, 4)
    np.testing.assert_allclose(y, attention(q, k, v, mask, impl="ref"), atol=1e-6)


def test_shares_of_uniform_weights():
    """Two meta tokens, documents of 2 and 3 tokens, equal weights: counted by hand."""
    segments = jnp.array([[1, 1, 2, 2, 2]])
    keys = jnp.array([[-1, -1, 1, 1, 2, 2, 2]])
    mask = MaskSpec(q_segment_ids=segments, kv_segment_ids=keys, query_offset=2)
    zeros = jnp.zeros((1, 5, 2, 4)), jnp.zeros((1, 7, 2, 4))
    counts = jnp.array([[0.0, 1, 0, 1, 1]])
    first = jnp.array([[0, 0, 2, 2, 2]])
    *sums, entropy, count = np.asarray(shares(weights(*zeros, mask), first, counts))[0]
    seen = np.array([4.0, 4.0, 5.0])  # by the counted queries
    np.testing.assert_allclose(sums[0], (2 / seen).sum(), rtol=1e-6)  # meta
    np.testing.assert_allclose(sums[1:3], 2 * [(1 / seen).sum()], rtol=1e-6)  # first, self
    np.testing.assert_allclose(sums[3], 1 / 5, rtol=1e-5)  # the last query's neighbour
    np.testing.assert_allclose(entropy, np.log(seen).sum(), rtol=1e-6)
    assert count == 3


def test_figure_is_drawn(tmp_path):
    draw(tmp_path / "attention.png", np.full((3, 5), 0.25))
    assert (tmp_path / "attention.png").read_bytes()[:4] == b"\x89PNG"
