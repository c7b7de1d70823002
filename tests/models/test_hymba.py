"""Hymba: golden model, published sizes and names, windows, sharing, meta tokens (hymba.md 9)."""

import dataclasses
import functools
import itertools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import decode_bytes
from export.weights import flatten, from_published, to_published
from models import hymba, hymba_build, language
from models.hymba import SIZES, Hymba, HymbaConfig
from tests.models import published

GOLDEN = HymbaConfig(
    17, 32, 4, 4, 2, 48, meta=2, window=3, state=4, dt_rank=3,
    global_layers=(0, 3), groups=((1, 2),),
)  # fmt: skip


def first_params(cfg, seed=0):
    init = jax.jit(functools.partial(language.init, Hymba(cfg)))
    return nn.meta.unbox(init(jax.random.key(seed)))


def random_params(cfg, seed=0):
    params = first_params(cfg, seed)
    rng = np.random.default_rng(seed)  # no branch hidden behind a zero
    return jax.tree.map(lambda x: x + 0.05 * jnp.asarray(rng.normal(size=x.shape), x.dtype), params)


def golden_tensors():
    """Section 2.10: every parameter filled by a formula, in the order of the published model."""
    mixer = [f"mamba.{n}" for n in ("in_proj.weight", "out_proj.weight", "conv1d.weight",
             "conv1d.bias", "x_proj.0.weight", "dt_proj.0.weight", "dt_proj.0.bias", "D.0",
             "A_log.0", "dt_layernorm.weight", "B_layernorm.weight", "C_layernorm.weight",
             "pre_avg_layernorm1.weight", "pre_avg_layernorm2.weight")]  # fmt: skip
    block = ["input_layernorm.weight", "pre_moe_layernorm.weight", *mixer]
    block += [f"moe.experts.0.{n}_proj.weight" for n in ("gate", "up", "down")]
    order = {"model.embed_tokens.weight": 0, "model.memory_tokens": 1}
    order |= {"model.final_layernorm.weight": 2}
    for layer in range(4):
        order |= {f"model.layers.{layer}.{n}": 3 + 19 * layer + k for k, n in enumerate(block)}
    tensors = {}
    for name, shape in published.shapes(Hymba(GOLDEN), hymba_build.weight_map(GOLDEN)).items():
        squeezed = tuple(n for n in shape if n != 1)
        index, s = np.indices(squeezed), order[name]
        if len(index) == 2:
            o, i = index
            g = np.sin(0.61 * o * i + 1.7 * o + 0.9 * i + s)
        else:
            g = np.sin(1.7 * index[0] + s)
        if "norm" in name or name.endswith("D.0"):
            value = 1 + 0.1 * g
        elif "A_log" in name:
            value = np.log(1 + np.arange(shape[1])) + 0.05 * g
        elif name.endswith("dt_proj.0.bias"):
            value = -2 + g
        else:
            factors = {"embed_tokens": 0.5, "memory_tokens": 1.0, "conv1d.weight": 0.5}
            factors |= {"conv1d.bias": 0.1}
            value = next((f for part, f in factors.items() if part in name), 0.15) * g
        tensors[name] = value.reshape(shape).astype(np.float32)
    assert tensors.keys() == order.keys()
    return tensors


@pytest.mark.parametrize(
    "window, total, loss", [(3, 79.207898, 4.5538764), (2, 84.517274, 4.4492756)]
)
def test_check_1_golden_model(window, total, loss):
    """Sums of logits and the loss on formula weights; a window one smaller is told apart."""
    cfg = dataclasses.replace(GOLDEN, window=window)
    names, tensors = hymba_build.weight_map(cfg), golden_tensors()
    params = from_published(tensors, names, published.abstract(Hymba(cfg)))
    assert sum(x.size for x in jax.tree.leaves(params)) == 59_564
    jax.tree.map(np.testing.assert_array_equal, to_published(params, names), tensors)
    ids = (5 * np.arange(12) + 3)[None] % 17
    logits = Hymba(cfg).apply({"params": params}, ids, method="text")[0]
    np.testing.assert_allclose(logits.sum(), total, atol=1e-4)
    nll = -jax.nn.log_softmax(logits)[jnp.arange(11), ids[0, 1:]]
    np.testing.assert_allclose(nll.mean(), loss, atol=1e-5)
    if window == 3:
        np.testing.assert_allclose(jnp.abs(logits).sum(), 316.960409, rtol=1e-5)
        last = [5.021884, -0.427670, -2.024390, -1.442526, 0.575737, 0.343163]
        np.testing.assert_allclose(logits[-1, :6], last, atol=2e-5)
        best = [5, 5, 13, 7, 5, 5, 12, 14, 12, 14, 2, 0]
        np.testing.assert_array_equal(logits.argmax(-1), best)


@pytest.mark.parametrize(
    "size, count, owning",
    [("1.5b", 1_522_797_824, 17), ("350m", 353_701_888, 17), ("125m", 129_944_064, 13)],
)
def test_check_2_published_sizes(size, count, owning):
    """The two smaller ones are the specification's 353.7M and 129.9M with the 1.5B's grouping."""
    cfg = SIZES[size]
    assert published.count(Hymba(cfg)) == count
    layers = [layer for run in cfg.runs() for layer in run.unit * run.count]
    assert len(layers) == cfg.layers and sum(layer.owns for layer in layers) == owning
    if size == "1.5b":
        assert [i for i, layer in enumerate(layers) if layer.everywhere] == [0, 15, 31]
        assert cfg.groups[0] == (1, 2) and (16, 17, 18) in cfg.groups and cfg.groups[-1] == (29, 30)
        shapes = published.shapes(Hymba(cfg), hymba_build.weight_map(cfg))
        assert shapes["model.layers.0.mamba.in_proj.weight"] == (8960, 1600)
        assert shapes["model.layers.2.mamba.in_proj.weight"] == (8000, 1600)
        assert shapes["model.layers.31.mamba.conv1d.weight"] == (3200, 1, 4)
        np.testing.assert_allclose(cfg.theta, 74_534.83, atol=0.01)


SMALL = dataclasses.replace(SIZES["debug"], vocab_size=96, meta=4, window=8)


def test_check_4_prompts_and_steps_equal_one_pass():
    """Prompts of 1, 3, W-1, W, W+1, 2W+5 tokens, then more than two turns of the ring; with the
    meta tokens' state computed there and then, and once before."""
    net, params, total = Hymba(SMALL), random_params(SMALL), 41
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, total)))
    logits = jax.jit(lambda t: net.apply({"params": params}, t, method="text"))(tokens)
    prefix = hymba.prefix(net, params)
    read = jax.jit(functools.partial(language.prefill, net, params))
    step = jax.jit(functools.partial(language.extend, net, params))
    for prompt, given in itertools.product((1, 3, 7, 8, 9, 21), (None, prefix)):
        state = hymba.init_state(net, params, 2, total, given)
        scores, state = read(tokens[:, :26], jnp.full(2, prompt), state)  # padded with the rest
        for t in range(prompt, prompt + 20):
            np.testing.assert_allclose(scores, logits[:, t - 1], atol=1e-4)
            scores, state = step(tokens[:, t], state)
        np.testing.assert_allclose(scores, logits[:, prompt + 19], atol=1e-4)


def test_check_4_the_published_decoding_sees_one_key_less():
    """decode_window_compat: steps equal a model with a window of W - 1 instead of their own."""
    whole = dataclasses.replace(SMALL, decode_window_compat=True)
    less = dataclasses.replace(SMALL, window=SMALL.window - 1)
    params = random_params(SMALL)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (1, 24)))
    state = hymba.init_state(Hymba(whole), params, 1, 24)
    step = jax.jit(functools.partial(language.extend, Hymba(whole), params))
    run = lambda cfg: Hymba(cfg).apply({"params": params}, tokens, method="text")  # noqa: E731
    same, own = run(less), run(SMALL)
    for t in range(24):
        scores, state = step(tokens[:, t], state)
        np.testing.assert_allclose(scores, same[:, t], atol=1e-4)
    assert np.abs(same - own)[:, : SMALL.window].max() < 1e-5
    assert np.abs(same - own)[:, SMALL.window :].max() > 1e-2


@pytest.mark.parametrize("layers", [1, 3])
def test_check_6_a_window_reaches_as_far_as_it_says(layers):
    """Attention alone, all windows: token j moves logits 0 to L W tokens later, no others; a meta
    token moves all."""
    cfg = dataclasses.replace(SMALL, layers=layers, global_layers=(), groups=(), window=3)
    params = random_params(cfg)
    for run in params:
        if run.startswith("run"):
            scale = params[run]["0"]["ssm_norm"]["scale"]
            params[run]["0"]["ssm_norm"]["scale"] = jnp.zeros_like(scale)
    net = Hymba(cfg)
    run = jax.jit(lambda p, t: net.apply({"params": p}, t, method="text")[0])
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (1, 24)))
    base = run(params, tokens)
    moved = np.asarray((run(params, tokens.at[0, 5].add(1)) != base).any(-1))
    reach = layers * cfg.window
    assert moved[5 : 5 + reach + 1].all() and not moved[:5].any() and not moved[6 + reach :].any()
    other = params | {"meta": params["meta"].at[1].add(0.5)}
    assert (run(other, tokens) != base).any(-1).all()


def test_check_7_consumers_attend_to_their_producers_values():
    """Only owners have keys and values; without a producer's values its group attends to 0."""
    cfg = SMALL
    params = random_params(cfg)
    assert cfg.groups == ((1, 2),)
    names = {path for path in flatten(params) if "/k/" in path or "/v/" in path}
    assert names == {f"run{r}/0/{x}/kernel" for r in range(3) for x in "kv"}
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (1, 12)))
    run = jax.jit(lambda p: Hymba(cfg).apply({"params": p}, tokens, method="text"))

    def without(*paths):
        """Scores with these leaves at 0."""
        zero = lambda path, x: 0 * x if "/".join(k.key for k in path) in paths else x  # noqa: E731
        return run(jax.tree_util.tree_map_with_path(zero, params))

    got = without("run1/0/v/kernel")
    both = [f"run1/{i}/attn_norm/scale" for i in range(2)]
    np.testing.assert_array_equal(got, without(*both))
    for fewer in (both[:1], both[1:], [*both, "run0/0/attn_norm/scale"]):
        assert np.abs(got - without(*fewer)).max() > 1e-3


def test_check_11_the_published_cache_size(capsys):
    """78,602,240 bytes by either convention, and what is really held, as the command prints it."""
    printed = []
    for tokens in (8192, 8000):
        decode_bytes.main(["--cache", f"--length={tokens}"])
        printed.append(json.loads(capsys.readouterr().out))
    assert printed[0]["published_all"] == printed[1]["published_conv"] == 78_602_240
    keys = 1920 * (3 * 64 * 128 + 14 * 10 * 128)  # 8,000 + 128 and 1,025 + 128, in whole lanes
    assert printed[1]["ours"] == keys + 32 * 3200 * (3 * 2 + 16 * 4)


def test_initial_values():
    """Matrices std 0.02, meta tokens 1, A_log log(1..N), D 1, Δ between 1e-3 and 1e-1."""
    cfg = dataclasses.replace(SIZES["tiny"], meta=64)
    flat = flatten(first_params(cfg))
    np.testing.assert_allclose(flat["meta"].std(), 1, rtol=0.03)
    for name in ("embedding", "run0/0/u/kernel", "run1/0/mlp/up/kernel", "run1/1/out/kernel"):
        np.testing.assert_allclose(flat[name].std(), 0.02, rtol=0.03)
    np.testing.assert_allclose(flat["run0/0/ssm/A_log"][0, 7], np.log(np.arange(1, 17)), rtol=1e-6)
    assert (flat["run0/0/ssm/D"] == 1).all() and not flat["run0/0/ssm/conv/bias"].any()
    delta = jax.nn.softplus(flat["run0/0/ssm/dt_bias"])
    assert 0.99e-3 < delta.min() < 2e-3 and 0.05 < delta.max() < 1.01e-1
    bound = cfg.rank**-0.5
    assert 0.95 * bound < jnp.abs(flat["run0/0/ssm/dt_proj/kernel"]).max() <= bound


@pytest.mark.parametrize(
    "fusion, meta",
    [("mean", 0), ("concat", 4), ("alternate", 4)]
    + [pytest.param(*x, marks=pytest.mark.long) for x in (("attention", 4), ("mamba", 0))],
)
def test_every_fusion_runs_forward_and_step_by_step(fusion, meta):
    """The design roadmap's models, with and without meta tokens: steps equal one pass."""
    changes = dict(layers=3, global_layers=(0,))
    if fusion in ("alternate", "mamba"):
        changes = dict(groups=())
    cfg = dataclasses.replace(SMALL, fusion=fusion, meta=meta, **changes)
    net, params = Hymba(cfg), random_params(cfg)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, 12)))
    logits = jax.jit(lambda t: net.apply({"params": params}, t, method="text"))(tokens)
    state = hymba.init_state(net, params, 2, 12)
    step = jax.jit(functools.partial(language.extend, net, params))
    read = jax.jit(functools.partial(language.prefill, net, params))
    scores, state = read(tokens[:, :7], jnp.full(2, 7), state)
    for t in range(7, 12):
        np.testing.assert_allclose(scores, logits[:, t - 1], atol=1e-4)
        scores, state = step(tokens[:, t], state)


def test_wrong_settings_are_named():
    for key, value, message in [
        ("fusion", "sum", "fusion='sum', allowed: mean"),
        ("heads", 3, "heads=3 must divide width=64"),
        ("groups", ((1, 3),), r"\(1, 3\) are not neighbours"),
        ("groups", ((0, 1),), "has a global layer"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(SMALL, **{key: value})
