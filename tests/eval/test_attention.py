"""Shares and entropy of attention against sums that can be done by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs.common import load_config
from eval import EVALUATORS
from eval.attention import draw, shares, weights
from input_pipeline import text
from kernels.attention import MaskSpec, attention
from models import MODELS
from training.tree import path_name


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


def test_a_hymba_that_looks_everywhere_alike(text_config, tmp_path):
    """Without queries every key that a token may see has the same weight, whatever the layer."""
    config = load_config("configs/hymba.py:debug", **{"model.hymba.window": 32})
    config.data, config.evaluation = text_config.data, text_config.evaluation
    config.model.vocab_size = 400
    model, meta = MODELS["hymba"](config), 8
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0))[0])
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: 0 * x if path_name(path).endswith("/q/kernel") else x, params
    )
    run = EVALUATORS["attention"](config)
    found = run(model, params, step=1, rng=jax.random.key(0), workdir=tmp_path)
    windows, _, _ = text.windows(config.data, "test")
    segments, positions = (np.asarray(x[:16]) for x in (windows.segment_ids, windows.positions))
    seen = meta + 1.0 + positions[(segments > 0) & (positions > 0)]
    want = dict(meta=meta / seen, first=1 / seen, self=1 / seen, entropy=np.log(seen))
    want["rest"] = 1 - meta / seen - 2 / seen
    assert set(found) == set(want)
    for name, values in want.items():
        np.testing.assert_allclose(found[name], values.mean(), rtol=1e-5, err_msg=name)
    assert (tmp_path / "samples" / "attention.png").is_file()


def test_a_model_that_does_not_say(capsys, tmp_path):
    config = load_config("configs/llama.py:debug", **{"model.vocab_size": 64})
    run, model = EVALUATORS["attention"](config), MODELS["llama"](config)
    assert run(model, {}, step=1, rng=None, workdir=tmp_path) is None
    assert "llama does not say" in capsys.readouterr().out
