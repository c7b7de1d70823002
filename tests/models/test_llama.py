"""Llama, Qwen 2 and OLMo 2: the transformers package's logits, published sizes and names."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from models import llama
from models.blocks.rope import RopeBands
from models.llama import SIZES, Llama
from tests.golden import recipes
from tests.models import published

SMALL = dataclasses.replace(
    SIZES["debug"], vocab_size=48, width=32, layers=3, mlp=56, heads=4, kv_heads=2, head_dim=8
)
GOLDEN = dict(
    llama=dataclasses.replace(SMALL, tie=False, rope_bands=RopeBands(original=16)),
    qwen=dataclasses.replace(SMALL, qkv_bias=True, rope_theta=1e6, norm_eps=1e-6),
    olmo=dataclasses.replace(
        SMALL, tie=False, pre_norms=False, post_norms=True, qk_norm="all", rope_theta=5e5,
        norm_eps=1e-6,
    ),
)  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_equals_the_transformers_package(name):
    """Random weights by published name there and back, and the logits that they give."""
    golden, cfg = recipes.load("llama"), GOLDEN[name]
    net, ids = Llama(cfg), jnp.asarray(golden["ids"])
    params = published.from_recipe(net, llama.weight_map(cfg))
    logits = jax.jit(lambda t: net.apply({"params": params}, t, method="text"))(ids)
    recipes.assert_close(logits, golden[name], 1e-5)


@pytest.mark.parametrize(
    "size, count",
    [
        ("llama2_7b", 6_738_415_616),
        ("llama3_8b", 8_030_261_248),
        ("llama3.1_8b", 8_030_261_248),
        ("llama3.2_1b", 1_235_814_400),
        ("llama3.2_3b", 3_212_749_824),
        ("qwen2.5_0.5b", 494_032_768),
        ("qwen2.5_1.5b", 1_543_714_304),
        ("qwen2.5_7b", 7_615_616_512),
        ("qwen2.5_32b", 32_763_876_352),
        ("olmo2_1b", 1_484_916_736),
        ("olmo2_7b", 7_298_617_344),
        ("olmo2_13b", 13_716_198_400),
    ],
)
def test_published_sizes(size, count):
    """As the transformers package counts them."""
    assert published.count(Llama(SIZES[size])) == count


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="qk_norm='both', allowed"):
        dataclasses.replace(SMALL, qk_norm="both")
    with pytest.raises(ValueError, match="activation='relu', allowed: gelu_tanh, silu"):
        dataclasses.replace(SMALL, activation="relu")
