"""Mamba-1 and Mamba-2: the transformers package's logits and steps, sizes, names, start values."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from export.weights import flatten
from models import language, mamba
from models.blocks.mamba import causal_conv, conv_tail, text_of
from models.mamba import SIZES, Mamba, MambaConfig
from tests.golden import recipes
from tests.models import published

GOLDEN = dict(
    mamba=MambaConfig(48, 32, 3, state=8),
    mamba2=MambaConfig(48, 32, 3, version=2, state=8, head_dim=16, groups=2),
)


@pytest.mark.parametrize("name", GOLDEN)
def test_equals_the_transformers_package(name):
    """Random weights by name there and back; logits of a text; 8 steps after 32 tokens."""
    golden, cfg = recipes.load("mamba"), GOLDEN[name]
    net, ids = Mamba(cfg), jnp.asarray(golden["ids"])
    params = published.from_recipe(net, mamba.weight_map(cfg))
    logits = jax.jit(lambda t: net.apply({"params": params}, t, method="text"))(ids)
    recipes.assert_close(logits, golden[name], 1e-5)
    start = mamba.init_state(cfg, 2)
    _, state = language.prefill(net, params, ids[:, :32], jnp.full(2, 32), start)
    step = jax.jit(functools.partial(language.extend, net, params))
    for t in range(32, 40):
        scores, state = step(ids[:, t], state)
        recipes.assert_close(scores, golden[f"{name}_steps"][:, t - 32], 1e-5)


@pytest.mark.parametrize(
    "size, count",
    [
        ("mamba_130m", 129_135_360),
        ("mamba_370m", 371_516_416),
        ("mamba_790m", 793_204_224),
        ("mamba_1.4b", 1_372_178_432),
        ("mamba_2.8b", 2_768_345_600),
        ("mamba2_130m", 128_989_632),
        ("mamba2_370m", 368_346_624),
        ("mamba2_780m", 780_161_280),
        ("mamba2_1.3b", 1_343_757_312),
        ("mamba2_2.7b", 2_702_599_680),
    ],
)
def test_published_sizes(size, count):
    """As the transformers package counts them."""
    assert published.count(Mamba(SIZES[size])) == count


def test_the_convolution_is_the_sum_it_says():
    """Against a loop over tokens, documents and taps; the tail is each row's last valid inputs."""
    rng = np.random.default_rng(0)
    u, before = rng.normal(size=(2, 9, 3)), rng.normal(size=(1, 3, 3))
    kernel, bias = rng.normal(size=(4, 3)), rng.normal(size=3)
    ids = np.array([[1] * 5 + [2] * 1 + [3] * 3, [7] * 9])
    place = text_of(jnp.asarray(ids), None).place
    got = causal_conv(*map(jnp.asarray, (u, kernel, bias, before)), place)
    for b in range(2):
        for t in range(9):
            first = np.flatnonzero(ids[b] == ids[b, t])[0]
            row = np.concatenate([before[0], u[b, first : t + 1]])
            want = (row[-4:] * kernel).sum(0) + bias
            np.testing.assert_allclose(got[b, t], want, rtol=1e-5, atol=1e-6)
    valid = jnp.arange(9) < jnp.array([[9], [2]])
    tail = conv_tail(jnp.asarray(u), jnp.asarray(before), valid)
    np.testing.assert_allclose(tail[0], u[0, 6:], rtol=1e-6)
    np.testing.assert_allclose(tail[1], np.concatenate([before[0, 2:], u[1, :2]]), rtol=1e-6)


@pytest.mark.parametrize("size", ["debug", "debug2"])
def test_the_memory_does_not_grow(size):
    """A step's program is the same whatever the length, and has one loop, over the layers."""
    net = Mamba(SIZES[size])
    params = nn.meta.unbox(language.init(net, jax.random.key(0)))
    state = mamba.init_state(net.cfg, 2)
    step = jax.jit(functools.partial(language.extend, net, params))
    text = step.lower(jnp.zeros(2, jnp.int32), state).compile().as_text()
    assert text.count(" while(") == 1
    after = step(jnp.zeros(2, jnp.int32), state)[1]
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)


def test_initial_values():
    """A: -1..-16 per channel, or one in that range per head; Δ between 1e-3 and 1e-1."""
    for size in ("debug", "debug2"):
        flat = flatten(nn.meta.unbox(language.init(Mamba(SIZES[size]), jax.random.key(0))))
        path = "layers/mixer/" + ("ssm/" if size == "debug" else "")
        A = jnp.exp(flat[path + "A_log"])
        if size == "debug":
            np.testing.assert_allclose(A[1, 5], np.arange(1, 17), rtol=1e-5)
        assert A.min() >= 1 and A.max() <= 16.001 and A.std() > 1
        delta = jax.nn.softplus(flat[path + "dt_bias"])
        assert delta.min() > 0.99e-3 and delta.max() < 1.01e-1
        assert (flat[path + "D"] == 1).all()


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="version=3, allowed: 1, 2"):
        dataclasses.replace(SIZES["debug"], version=3)
    with pytest.raises(ValueError, match="head_dim=48 must divide expand . width = 128"):
        dataclasses.replace(SIZES["debug2"], head_dim=48)
