"""SigLIP's tower against transformers, its published sizes and its weight map."""

import dataclasses
from pathlib import Path

import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from export.weights import from_published, to_published
from models.blocks import siglip_weights
from models.blocks.vit import SIZES, ViT, ViTConfig, patches

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = ViTConfig(width=24, layers=3, mlp=40, heads=3, patch=6, image_size=20, map_head=True)


def abstract(cfg, method="__call__"):
    size = cfg.image_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    init = jax.eval_shape(lambda x: ViT(cfg).init(jax.random.key(0), x, method=method), images)
    return nn.unbox(init)["params"]


@pytest.fixture(scope="module")
def golden():
    file = np.load(GOLDEN / "siglip.npz")
    weights = {key[2:]: file[key] for key in file if key.startswith("w:")}
    params = from_published(weights, siglip_weights.weight_map(TINY), abstract(TINY, "pooled"))
    arrays = {key: jnp.asarray(file[key]) for key in ("images", "tokens", "pooled")}
    return arrays, weights, jax.tree.map(jnp.asarray, params)


def test_2_exact_parameter_counts():
    def count(cfg):
        return sum(leaf.size for leaf in jax.tree.leaves(abstract(cfg)))

    assert count(SIZES["So400m/14"]) == 412_442_352
    assert SIZES["So400m/14"].tokens == 256
    assert count(SIZES["B/16"]) == 85_797_120
    assert count(SIZES["L/16"]) == 303_299_584


def test_12_tokens_and_pooled_equal_transformers(golden):
    file, _, params = golden
    tokens, pooled = ViT(TINY).apply({"params": params}, file["images"], method="pooled")
    for got, want in ((tokens, file["tokens"]), (pooled, file["pooled"])):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    np.testing.assert_array_equal(tokens, ViT(TINY).apply({"params": params}, file["images"]))


def test_weights_leave_as_they_came(golden):
    _, weights, params = golden
    back = to_published(params, siglip_weights.weight_map(TINY))
    assert back.keys() == weights.keys()
    for name, tensor in weights.items():
        np.testing.assert_array_equal(back[name], tensor.astype(np.float32), err_msg=name)


def test_a_whole_siglip_file_loads_without_its_head(golden):
    _, weights, _ = golden
    cfg = dataclasses.replace(TINY, map_head=False)
    extra = {"text_model.embeddings.token_embedding.weight": np.zeros((3, 2)), "logit_bias": 0}
    params = from_published(weights | extra, siglip_weights.weight_map(cfg), abstract(cfg))
    assert "pool" not in params


def test_2_patches_are_a_valid_strided_convolution():
    images = jax.random.normal(jax.random.key(0), (2, 20, 20, 3))
    kernel = jax.random.normal(jax.random.key(1), (6, 6, 3, 5))
    want = jax.lax.conv_general_dilated(
        images, kernel, (6, 6), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    got = patches(images, 6) @ kernel.reshape(-1, 5)
    np.testing.assert_allclose(got, want.reshape(2, 9, 5), rtol=0, atol=1e-4)


def test_remat_changes_no_gradient(golden):
    file, _, params = golden

    def gradient(remat):
        tower = ViT(TINY, remat=remat)
        loss = jax.grad(lambda p: jnp.sum(tower.apply({"params": p}, file["images"]) ** 2))
        return jax.flatten_util.ravel_pytree(jax.jit(loss)(params))[0]

    plain = gradient("none")
    for policy in ("dots", "full"):
        np.testing.assert_allclose(gradient(policy), plain, rtol=0, atol=1e-5 * abs(plain).max())


def test_bf16_keeps_float32_parameters(golden):
    file, _, params = golden
    tokens = ViT(TINY, dtype=jnp.bfloat16).apply({"params": params}, file["images"])
    assert tokens.dtype == jnp.bfloat16
    np.testing.assert_allclose(tokens.astype(jnp.float32), file["tokens"], rtol=0, atol=0.15)


def test_wrong_inputs_say_what_is_wrong(golden):
    _, _, params = golden
    with pytest.raises(ValueError, match="image_size=20"):
        ViT(TINY).apply({"params": params}, jnp.zeros((1, 18, 20, 3)))
    with pytest.raises(ValueError, match="map_head"):
        cfg = dataclasses.replace(TINY, map_head=False)
        ViT(cfg).apply({"params": params}, jnp.zeros((1, 20, 20, 3)), method="pooled")
    with pytest.raises(ValueError, match="width=25"):
        dataclasses.replace(TINY, width=25)
