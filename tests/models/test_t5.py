"""Flan-T5's encoder against transformers, its published sizes, names and folders."""

import json

import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from export.weights import from_published, save_safetensors, to_published
from models import t5
from models.t5 import SIZES, T5Config
from tests.golden import recipes

TINY = T5Config(24, 3, 40, 3, head_dim=8, vocab_size=40, buckets=8, max_distance=16)


def abstract(cfg):
    return nn.meta.unbox(jax.eval_shape(lambda: t5.init(jax.random.key(0), cfg)))


def published(cfg, seed):
    """Random weights under their published names."""
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract(cfg))
    shapes = {k: v.shape for k, v in to_published(zeros, t5.weight_map(cfg)).items()}
    return recipes.weights(shapes, seed)


@pytest.fixture(scope="module")
def golden():
    return recipes.load("t5")


@pytest.fixture(scope="module")
def weights():
    return published(TINY, 60)


@pytest.fixture(scope="module")
def params(weights):
    found = from_published(weights, t5.weight_map(TINY), abstract(TINY))
    return jax.tree.map(jnp.asarray, found)


def run(params, golden, dtype=jnp.float32, remat="none"):
    encode = jax.jit(lambda p, *x: t5.encode(p, TINY, *x, dtype, remat))
    return encode(params, golden["tokens"], golden["lengths"])


def valid(golden):
    return np.arange(golden["tokens"].shape[1]) < golden["lengths"][:, None]


def test_embeddings_equal_transformers(params, golden):
    """Three layers, rows of 37, 1 and 22 tokens; behind a row's length stand zeros."""
    out = np.asarray(run(params, golden))
    recipes.assert_close(out[valid(golden)], golden["embeddings"], 1e-5)
    assert not out[~valid(golden)].any()


def test_padding_changes_nothing(params, golden):
    """A row alone and without padding, and with other numbers in it."""
    whole = run(params, golden)
    for row, length in enumerate(golden["lengths"]):
        tokens = golden["tokens"][row : row + 1, :length]
        alone = t5.encode(params, TINY, tokens, golden["lengths"][row : row + 1])
        recipes.assert_close(alone[0], whole[row, :length], 1e-5)
    other = np.where(valid(golden), golden["tokens"], 7)
    np.testing.assert_array_equal(run(params, golden | {"tokens": other}), whole)


def test_bfloat16_is_close(params, golden):
    """Not further from float64 than transformers in bfloat16 (1 % of the largest number, root mean
    square; attention that is not scaled magnifies what its random weights round away)."""
    out = run(params, golden, jnp.bfloat16)
    assert out.dtype == jnp.bfloat16
    got, want = np.asarray(out, np.float32)[valid(golden)], golden["embeddings"]
    assert np.sqrt(np.mean((got - want) ** 2)) < golden["bfloat16_error"]
    assert golden["bfloat16_error"] < 0.011 * np.abs(want).max()


def test_buckets_equal_transformers(golden):
    """Distances of -600..600 with the published 32 buckets, and those of the tiny model."""
    found = t5.distance_buckets(601, 601, SIZES["xl"])
    distance = np.arange(601)[None] - np.arange(601)[:, None]
    np.testing.assert_array_equal(found, golden["buckets"][distance + 600])
    assert found.min() == 0 and found.max() == 31


@pytest.mark.parametrize("size", ["small", "base", "large", "xl", "xxl"])
def test_exact_parameter_counts(size, golden):
    count = sum(x.size for x in jax.tree.leaves(abstract(SIZES[size])))
    assert count == golden[f"count_{size}"]
    assert {"xl": 1_223_527_424, "xxl": 4_762_310_656}.get(size, count) == count


def test_names_go_both_ways(params, weights):
    back = to_published(params, t5.weight_map(TINY))
    assert back.keys() == weights.keys()
    for name, tensor in weights.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)
    attention = "encoder.block.2.layer.0.SelfAttention.q.weight"
    assert attention in weights and "encoder.final_layer_norm.weight" in weights


def test_a_published_folder_is_read(params, weights, golden, tmp_path):
    """A whole model: the decoder and the second copy of the embedding are left out."""
    rest = {
        "encoder.embed_tokens.weight": weights["shared.weight"],
        "lm_head.weight": weights["shared.weight"],
        "decoder.block.0.layer.0.SelfAttention.q.weight": np.zeros((3, 2), np.float32),
    }
    save_safetensors(tmp_path / "model.safetensors", weights | rest)
    text = t5.to_json(TINY) | dict(decoder_start_token_id=0)
    (tmp_path / "config.json").write_text(json.dumps(text))
    found, cfg = t5.load(tmp_path)
    assert cfg == TINY
    np.testing.assert_array_equal(run(found, golden), run(params, golden))
    half, _ = t5.load(tmp_path, jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.bfloat16.dtype}


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        t5.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="feed_forward_proj='relu'; T5 v1.1"):
        t5.from_json(dict(t5.to_json(TINY), feed_forward_proj="relu"))
    with pytest.raises(ValueError, match="no T5 config: .*missing"):
        t5.from_json(dict(feed_forward_proj="gated-gelu"))
    with pytest.raises(ValueError, match="buckets=6"):
        T5Config(8, 1, 8, 1, buckets=6)


def test_remat_changes_no_gradient(params, golden):
    def gradient(remat):
        loss = lambda p: jnp.sum(run(p, golden, remat=remat) ** 2)  # noqa: E731
        return jax.flatten_util.ravel_pytree(jax.grad(loss)(params))[0]

    plain = gradient("none")
    assert plain.any()
    recipes.assert_close(gradient("full"), plain, 1e-5)


def test_every_weight_has_a_place_on_a_mesh():
    """Logical names that the rules know, one for each axis."""
    from training.sharding import RULES

    boxed = jax.eval_shape(lambda: t5.init(jax.random.key(0), TINY))
    leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))
    for leaf in leaves:
        assert len(leaf.names) == leaf.value.ndim
        assert set(leaf.names) <= RULES.keys() | {None}
