"""Published names and layouts: round trips, composition, and the one error that lists all names."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from export import weights as w

DIM, HEADS, HEAD, GROUPS, PATTERN = 6, 2, 3, 3, 2


def block(rng, *lead):
    def normal(*shape):
        return rng.normal(size=lead + shape).astype(np.float32)

    return {
        "q": {"kernel": normal(DIM, HEADS, HEAD), "bias": normal(HEADS, HEAD)},
        "o": {"kernel": normal(HEADS, HEAD, DIM)},
        "up": {"kernel": normal(DIM, 5)},
        "norm": {"scale": normal(DIM)},
    }


def block_rules(**stacking):
    layer = "model.layers." + ("{layer}" if stacking.get("stack") else str(stacking.pop("at")))
    return {
        "q/kernel": w.heads_in(layer + ".q.weight", HEADS, **stacking),
        "q/bias": w.heads_in(layer + ".q.bias", HEADS, **stacking),
        "o/kernel": w.heads_out(layer + ".o.weight", HEADS, **stacking),
        "up/kernel": w.linear(layer + ".up.weight", **stacking),
        "norm/scale": w.plain(layer + ".norm.weight", **stacking),
    }


@pytest.fixture
def decoder():
    """Three groups of a two-block pattern and a tail layer: layers 0..6."""
    rng = np.random.default_rng(0)
    params = {
        "embed": rng.normal(size=(7, DIM)).astype(np.float32),
        "layers": {f"block_{i}": block(rng, GROUPS) for i in range(PATTERN)},
        "tail_0": block(rng),
    }
    names = {"embed": w.plain("model.embed_tokens.weight")}
    for i in range(PATTERN):
        rules = block_rules(stack=(PATTERN,), first=i)
        names |= {f"layers/block_{i}/{k}": r for k, r in rules.items()}
    names |= {f"tail_0/{k}": r for k, r in block_rules(at=GROUPS * PATTERN).items()}
    return params, w.WeightMap(names, ignore=("lm_head.weight", "*.inv_freq"))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_scanned_pattern_becomes_one_tensor_per_layer(decoder):
    params, weight_map = decoder
    out = w.to_published(params, weight_map)
    assert len(out) == 1 + 7 * 5
    up = params["layers"]["block_1"]["up"]["kernel"]
    np.testing.assert_array_equal(out["model.layers.3.up.weight"], up[1].T)  # group 1, block 1
    q = params["layers"]["block_0"]["q"]["kernel"]
    np.testing.assert_array_equal(out["model.layers.4.q.weight"], q[2].reshape(DIM, HEADS * HEAD).T)
    np.testing.assert_array_equal(
        out["model.layers.6.norm.weight"], params["tail_0"]["norm"]["scale"]
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_round_trip_through_a_file(decoder, tmp_path, dtype):
    params, weight_map = decoder
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    published = w.to_published(params, weight_map)
    w.save_safetensors(tmp_path / "m.safetensors", published)
    loaded = w.load_safetensors(tmp_path / "m.safetensors")
    assert {v.dtype for v in loaded.values()} == {np.dtype(dtype)}
    same(w.from_published(loaded, weight_map, params), params)
    wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), params)
    back = w.from_published(loaded, weight_map, wide)  # parameters are kept in float32
    same(back, jax.tree.map(lambda x: x.astype(np.float32), params))


def test_export_can_cast_floats_only():
    params = {"a": jnp.ones(3), "n": jnp.arange(3)}
    out = w.to_published(params, w.flat_map(params), dtype=ml_dtypes.bfloat16)
    assert out["a"].dtype == ml_dtypes.bfloat16 and out["n"].dtype == np.int32


def test_ignored_published_names(decoder):
    params, weight_map = decoder
    tensors = w.to_published(params, weight_map)
    tensors |= {"lm_head.weight": tensors["model.embed_tokens.weight"], "x.inv_freq": np.ones(2)}
    read = w.from_published(tensors, weight_map, params)
    assert jax.tree.structure(read) == jax.tree.structure(params)
    same(read, params)


def test_one_error_lists_everything_with_suggestions(decoder):
    params, weight_map = decoder
    tensors = w.to_published(params, weight_map)
    tensors["model.layers.3.up_proj.weight"] = tensors.pop("model.layers.3.up.weight")
    tensors["model.layers.0.q.weight"] = np.ones((5, 6), np.float32)
    tensors["model.embed_tokens.weight"] = np.ones((8, DIM), np.float32)
    with pytest.raises(ValueError) as caught:
        w.from_published(tensors, weight_map, params)
    message = str(caught.value)
    assert "\n" not in message
    assert (
        "1 missing: model.layers.3.up.weight (did you mean model.layers.3.up_proj.weight?)"
        in message
    )
    assert "1 unexpected: model.layers.3.up_proj.weight" in message
    assert "2 mis-shaped" in message
    assert "model.layers.0.q.weight has shape [5, 6]" in message
    assert "model.embed_tokens.weight has shape [8, 6]" in message and "[7, 6]" in message


def test_long_lists_are_cut():
    params = {f"p{i}": np.zeros(1) for i in range(30)}
    with pytest.raises(ValueError, match="30 missing: .* and 22 more"):
        w.from_published({}, w.flat_map(params), params)


def test_a_leaf_without_a_rule_is_an_error(decoder):
    params, weight_map = decoder
    with pytest.raises(ValueError, match="no rule for embeds"):
        w.to_published(params | {"embeds": np.ones(2)}, weight_map)


def test_composed_map_prefixes_both_sides(decoder):
    params, weight_map = decoder
    head = {"kernel": np.ones((2, 3), np.float32)}
    whole = w.compose(
        {
            "gemma": (weight_map, "language_model."),
            "": w.WeightMap({"head/kernel": w.linear("head.weight")}),
        }
    )
    tree = {"gemma": params, "head": head}
    out = w.to_published(tree, whole)
    assert "language_model.model.layers.3.up.weight" in out and out["head.weight"].shape == (3, 2)
    same(w.from_published(out, whole, tree), tree)
    assert whole.parts["gemma"] is weight_map
    outer = w.compose({"a": whole})
    assert outer.parts.keys() == {"a", "a/gemma"}
    with pytest.raises(ValueError, match="head/kernel"):
        w.compose({"": w.WeightMap({"head/kernel": w.plain("x")}), "head": w.WeightMap(
            {"kernel": w.plain("y")})})  # fmt: skip


def test_parts_of_one_published_tensor():
    rng = np.random.default_rng(1)
    params = {k: rng.normal(size=(4, n)).astype(np.float32) for k, n in zip("qkv", (6, 2, 2))}
    spans = {"q": (0, 6, 10), "k": (6, 8, 10), "v": (8, 10, 10)}
    fused = w.WeightMap({k: w.linear("qkv.weight", part=s) for k, s in spans.items()})
    out = w.to_published(params, fused)
    assert out["qkv.weight"].shape == (10, 4)
    same(w.from_published(out, fused, params), params)
    with pytest.raises(ValueError, match="needs 10 rows"):
        w.from_published({"qkv.weight": np.ones((9, 4))}, fused, params)
    gap = w.WeightMap(dict(fused.names) | {"k": w.linear("qkv.weight", part=(7, 9, 10))})
    with pytest.raises(ValueError, match="do not tile"):
        w.to_published(params, gap)


def test_two_nested_stacked_axes():
    x = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    weight_map = w.WeightMap({"x": w.plain("l.{layer}", stack=(3, 1), first=1)})
    out = w.to_published({"x": x}, weight_map)
    np.testing.assert_array_equal(out["l.6"], x[1, 2])
    same(w.from_published(out, weight_map, {"x": x}), {"x": x})


@pytest.mark.parametrize("spatial", [(), (3,), (3, 5), (2, 3, 5)])
def test_convolutions_of_any_rank(spatial):
    x = np.random.default_rng(2).normal(size=(*spatial, 4, 6)).astype(np.float32)
    out = w.to_published({"k": x}, w.WeightMap({"k": w.conv("k")}))
    assert out["k"].shape == (6, 4, *spatial)
    same(w.from_published(out, w.WeightMap({"k": w.conv("k")}), {"k": x}), {"k": x})


def test_boxed_leaves_are_looked_through():
    from flax import linen as nn

    module = nn.Dense(3, kernel_init=nn.with_logical_partitioning(nn.initializers.ones, ("a", "b")))
    abstract = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 2)))["params"]
    assert w.flatten(abstract).keys() == {"kernel", "bias"}
    out = w.from_published(
        {"kernel": np.ones((2, 3)), "bias": np.ones(3)}, w.flat_map(abstract), abstract
    )
    assert out["kernel"].dtype == np.float32
