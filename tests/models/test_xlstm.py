"""xLSTM: golden model, published sizes, initialisation, generation, documents (xlstm.md 9)."""

import dataclasses
import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import load_config
from export.weights import flatten, from_published, to_published
from models import language, xlstm
from models.xlstm import SIZES, XLSTM, XLSTMConfig
from tests.golden import recipes
from tests.models import published
from training.schedules import make_schedule

GOLDEN = XLSTMConfig(17, 64, 2, 2, ffn_factor=3.0)
TINY = dataclasses.replace(SIZES["debug"], input_bias=-1.0)


@functools.cache
def net_and_params(cfg=TINY, seed=0):
    net = XLSTM(cfg)
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = nn.meta.unbox(net.init(jax.random.key(seed), tokens, method="text")["params"])
    rng = np.random.default_rng(seed)  # no branch hidden behind a zero
    return net, jax.tree.map(
        lambda x: x + 0.05 * jnp.asarray(rng.normal(size=x.shape), jnp.float32), params
    )


def golden_tensors():
    """Section 2.10: every parameter filled by a formula, in the order of the published model."""
    block = ["norm_mlstm.weight"]
    block += [f"mlstm_layer.{n}.weight" for n in ("q", "k", "v", "ogate_preact")]
    block += [f"mlstm_layer.{g}gate_preact.{x}" for g in "if" for x in ("weight", "bias")]
    block += ["mlstm_layer.multihead_norm.weight", "mlstm_layer.out_proj.weight"]
    block += ["norm_ffn.weight"] + [f"ffn.proj_{n}.weight" for n in ("up_gate", "up", "down")]
    names = ["backbone.embeddings.weight"]
    names += [f"backbone.blocks.{layer}.{n}" for layer in (0, 1) for n in block]
    names += ["backbone.out_norm.weight", "lm_head.weight"]
    shapes, tensors = published.shapes(XLSTM(GOLDEN), xlstm.weight_map(GOLDEN)), {}
    for s, name in enumerate(names):
        index = np.indices(shapes[name])
        if len(index) == 2:
            o, i = index
            g = np.sin(0.61 * o * i + 1.7 * o + 0.9 * i + s)
        else:
            g = np.sin(1.7 * index[0] + s)
        if "norm" in name:
            value = 1 + 0.1 * g
        elif name.endswith("igate_preact.bias"):
            value = -2 + g
        elif name.endswith("fgate_preact.bias"):
            value = 3 + g
        else:
            value = (0.5 if "embeddings" in name else 0.15) * g
        tensors[name] = value.astype(np.float32)
    return tensors


def test_check_1_golden_model():
    """Logits, loss and states of the public implementation on formula weights."""
    tensors = golden_tensors()
    weights = xlstm.weight_map(GOLDEN)
    params = from_published(tensors, weights, published.abstract(XLSTM(GOLDEN)))
    back = to_published(params, weights)
    assert back.keys() == tensors.keys()
    jax.tree.map(np.testing.assert_array_equal, back, tensors)
    net = XLSTM(GOLDEN)
    ids = (5 * np.arange(16) + 3)[None] % 17
    hidden, state = net.apply({"params": params}, ids, keep_state=True)
    logits = net.apply({"params": params}, hidden, method="logits")[0]
    np.testing.assert_allclose(logits.sum(), 1.50015, atol=2e-4)
    np.testing.assert_allclose(jnp.abs(logits).sum(), 147.83646, rtol=1e-5)
    last = [-0.10880, -0.21956, -0.24927, -0.12354, 0.14168, -4.23641]
    np.testing.assert_allclose(logits[-1, :6], last, atol=2e-5)
    best = [3, 0, 2, 10, 6, 2, 12, 15, 6, 4, 2, 7, 3, 9, 10, 10]
    np.testing.assert_array_equal(logits.argmax(-1), best)
    for layer, sums in enumerate(((19.1238, -9.3138, 8.478), (51.83587, -9.97771, 2.60606))):
        for x, want in zip(state, sums):
            np.testing.assert_allclose(x[layer].sum(), want, rtol=1e-4)
    loss = -jax.nn.log_softmax(logits)[jnp.arange(15), ids[0, 1:]]
    np.testing.assert_allclose(loss.mean(), 3.440520, atol=2e-5)


@pytest.mark.parametrize(
    "size, ffn, count",
    [
        ("165m", 2112, 164_073_312),
        ("1.3b", 5504, 1_420_839_104),
        ("2.7b", 6848, 2_780_449_600),
        ("7b", 10944, 6_865_424_896),
    ],
)
def test_check_7_published_sizes(size, ffn, count):
    cfg = SIZES[size]
    assert cfg.ffn == ffn
    assert published.count(XLSTM(cfg)) == count
    if size == "7b":
        state = jax.eval_shape(lambda: xlstm.init_state(cfg, 1))
        assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) == 134_480_896


def test_check_11_initialisation():
    cfg = dataclasses.replace(SIZES["debug"], width=256, layers=3, heads=4)
    net = XLSTM(cfg)
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = nn.meta.unbox(net.init(jax.random.key(1), tokens, method="text")["params"])
    flat = flatten(params)
    read, write = (2 / (5 * 256)) ** 0.5, 2 / (3 * 256**0.5)
    for name in ("embedding", "head", "layers/ffn/gate/kernel", "layers/ffn/up/kernel"):
        np.testing.assert_allclose(flat[name].std(), read, rtol=0.02)
    for name in "qkv":
        np.testing.assert_allclose(flat[f"layers/mlstm/{name}/kernel"].std(), read, rtol=0.02)
    for name in ("layers/mlstm/out/kernel", "layers/ffn/down/kernel"):
        np.testing.assert_allclose(flat[name].std(), write, rtol=0.02)
    for name in "oif":
        assert not flat[f"layers/mlstm/{name}/kernel"].any()
    assert (flat["layers/mlstm/i/bias"] == -10).all()
    for row in flat["layers/mlstm/f/bias"]:
        np.testing.assert_allclose(row, [3, 4, 5, 6])
    for name in ("norm_mlstm/scale", "norm_ffn/scale", "mlstm/norm"):
        assert (flat[f"layers/{name}"] == 1).all()


def test_check_6_prefill_and_steps_equal_one_pass():
    net, params = net_and_params()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 512, (2, 50)))
    logits = jax.jit(lambda t: net.apply({"params": params}, t, method="text"))(tokens)
    state = xlstm.init_state(net.cfg, 2)
    lengths = jnp.array([37, 37])
    scores, state = language.prefill(net, params, tokens[:, :37], lengths, state)
    np.testing.assert_allclose(scores, logits[:, 36], atol=1e-5)
    step = jax.jit(functools.partial(language.extend, net, params))
    for t in range(37, 50):
        scores, state = step(tokens[:, t], state)
        np.testing.assert_allclose(scores, logits[:, t], atol=1e-5)
    _, whole = language.prefill(
        net, params, tokens, jnp.array([50, 50]), xlstm.init_state(net.cfg, 2)
    )
    scale = jnp.exp(state.m - whole.m)
    np.testing.assert_allclose(state.n * scale[..., None], whole.n, rtol=1e-4, atol=1e-5)


def test_check_6_equals_the_transformers_package():
    """Random weights: logits of a text, the state after 37 tokens and single steps from there."""
    golden = recipes.load("xlstm")
    cfg = XLSTMConfig(48, 128, 2, 2)
    net, ids = XLSTM(cfg), jnp.asarray(golden["ids"])
    params = published.from_recipe(net, xlstm.weight_map(cfg))
    logits = jax.jit(lambda t: net.apply({"params": params}, t, method="text"))(ids)
    recipes.assert_close(logits, golden["logits"], 1e-5)
    lengths = jnp.full(2, 37)
    scores, state = language.prefill(net, params, ids[:, :37], lengths, xlstm.init_state(cfg, 2))
    for layer in range(2):
        C, n, m = (golden[f"{name}{layer}"].reshape(x[layer, :1].shape)
                   for name, x in zip("Cnm", state))  # fmt: skip
        shift = np.exp(m - state.m[layer, :1])  # the gauge is not the state's
        recipes.assert_close(state.C[layer, :1], C * shift[..., None, None], 1e-5)
        recipes.assert_close(state.n[layer, :1], n * shift[..., None], 1e-5)
    step = jax.jit(functools.partial(language.extend, net, params))
    for t, want in enumerate(golden["steps"].swapaxes(0, 1), 37):
        recipes.assert_close(scores, want, 1e-5)
        scores, state = step(ids[:, t], state)


def test_check_8_ragged_rows_equal_single_ones():
    net, params = net_and_params()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 512, (3, 20)))
    lengths = jnp.array([20, 7, 1])
    run = jax.jit(functools.partial(language.prefill, net, params))
    scores, state = run(tokens, lengths, xlstm.init_state(net.cfg, 3))
    for row, length in enumerate(lengths.tolist()):
        alone, own = run(
            tokens[row, None, :length], lengths[row, None], xlstm.init_state(net.cfg, 1)
        )
        np.testing.assert_allclose(scores[row], alone[0], atol=1e-5)
        np.testing.assert_allclose(state.n[:, row], own.n[:, 0], rtol=1e-4, atol=1e-5)


def test_check_8_packed_documents_equal_separate_rows():
    """Losses and gradients of three documents in one row, with an input gate wide open.

    head_norm_eps=1e-3: at 1e-6 the head norm enlarges the rounding of tiny h, and one document by
    itself differs by 1.2e-5 between chunks of 7 and of 64 tokens.
    """
    net, params = net_and_params(dataclasses.replace(TINY, head_norm_eps=1e-3))
    rng = np.random.default_rng(0)
    ends = (0, 9, 10, 30)
    tokens = rng.integers(0, 512, (1, 30)).astype(np.int32)
    segments = np.repeat([1, 2, 3], np.diff(ends))[None].astype(np.int32)
    packed = dict(tokens=jnp.asarray(tokens), segment_ids=jnp.asarray(segments))

    def total(params, batches):
        return sum(language.text_nll(net, params, b)["nll"].sum() for b in batches)

    alone = [
        dict(tokens=jnp.asarray(tokens[:, a:b]), segment_ids=jnp.ones((1, b - a), jnp.int32))
        for a, b in zip(ends, ends[1:])
    ]
    bias = params["layers"]["mlstm"]["i"]["bias"].at[0, 0].set(15.0)
    cell = params["layers"]["mlstm"]
    params = params | {
        "layers": params["layers"] | {"mlstm": cell | {"i": cell["i"] | {"bias": bias}}}
    }
    graded = jax.jit(jax.value_and_grad(total))
    (one, got), (two, want) = graded(params, [packed]), graded(params, alone)
    np.testing.assert_allclose(one, two, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()) + 1e-6)


def test_the_loss_is_the_mean_over_targets():
    net, params = net_and_params()
    rng = np.random.default_rng(0)
    batch = dict(
        tokens=jnp.asarray(rng.integers(0, 512, (2, 12))),
        segment_ids=jnp.asarray([[1] * 5 + [2] * 7, [1] * 8 + [0] * 4]),
    )
    value, (metrics, _) = language.loss(
        net, params, {}, batch, None, step=0, norms=language.norms(batch)
    )
    sums = language.text_nll(net, params, batch)
    assert sums["count"].sum() == 4 + 6 + 7
    np.testing.assert_allclose(value, sums["nll"].sum() / 17, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], sums["correct"].sum() / 17, rtol=1e-5)
    more, (metrics, _) = language.loss(
        net, params, {}, batch, None, step=0, norms=language.norms(batch), z_loss=0.1
    )
    logits = language.apply(net, params, language.read(net, params, batch), method="logits")
    weights = language.next_tokens(batch)[1]
    z = (jnp.square(jax.nn.logsumexp(logits, -1)) * weights).sum() / 17
    np.testing.assert_allclose(more, value + 0.1 * z, rtol=1e-5)
    assert metrics["loss"] == value
    nll, counts = language.token_nll(net, params, batch)
    for got, want in (((nll * counts).sum(1), sums["nll"]), (counts.sum(1), sums["count"])):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_check_12_the_7b_schedule():
    """Peak after the warm-up, 0.1 of it at 500K, lower until the last 7,000 begin, then 0."""
    config = load_config("configs/xlstm.py:7b")
    lr = lambda step: float(make_schedule(config)(step))  # noqa: E731
    peak = config.optimizer.lr
    assert config.steps == 550_000 and peak == 5e-4
    assert lr(0) == pytest.approx(peak / 3000) and lr(2999) == lr(3000) == pytest.approx(peak)
    assert lr(500_000) == pytest.approx(0.1 * peak, rel=1e-5)
    assert lr(543_000) == pytest.approx(peak * 0.1 ** (540 / 497), rel=1e-5)
    assert lr(546_500) == pytest.approx(lr(543_000) / 2, rel=1e-5)
    assert lr(549_999) < 1e-4 * peak


def test_rounded_parameters_give_the_same_scores():
    """bfloat16: rounding every matrix once or at every use is the same, bit for bit."""
    net, params = net_and_params()
    net = XLSTM(net.cfg, jnp.bfloat16)
    token, state = jnp.array([3, 4]), xlstm.init_state(net.cfg, 2)
    once = language.rounded(net, params)
    kept = [x for x in jax.tree.leaves(once) if x.dtype == jnp.float32]
    assert sum(x.size for x in kept) < 0.05 * sum(x.size for x in jax.tree.leaves(once))
    step = jax.jit(functools.partial(language.extend, net))
    jax.tree.map(
        np.testing.assert_array_equal, step(once, token, state), step(params, token, state)
    )
    again = language.rounded(net, once)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (again, once))))  # nothing is copied


@pytest.mark.parametrize("steps", [76_000, 150_000])
@pytest.mark.parametrize("name", ["exponential", "cosine"])
def test_check_12_the_public_curves(name, steps):
    """The learning rates that the authors logged every 500 steps are those of our schedules, and
    their perplexities end where check 12 says: the longer run and the cosine lower."""
    found = np.load(Path(recipes.__file__).with_name("xlstm_schedules.npz"))
    shape = dict(cosine=dict(name="cosine", final=0.1), exponential=dict(name="exp_linear"))[name]
    config = load_config("configs/xlstm.py:7b", steps=steps)
    config.optimizer.lr = 8e-4
    config.schedule.update(warmup=750, decay=1000, rate=0.1, rate_steps=steps - 1000, **shape)
    logged = np.arange(500, steps + 1, 500)
    ours = np.asarray(jax.vmap(make_schedule(config))(logged))
    # Step s of the warm-up uses s / 750 there, (s + 1) / 750 here: no step is lost at lr 0.
    assert ours[0] == pytest.approx(8e-4 * 501 / 750)
    np.testing.assert_allclose(ours[1:], found[f"{name}_{steps}_lr"][1:], rtol=2e-6, atol=1e-11)
    last = {"exponential": (12.010, 11.557), "cosine": (11.852, 11.420)}[name][steps > 76_000]
    assert found[f"{name}_{steps}_ppl"][-1] == pytest.approx(last, abs=5e-4)


def test_check_13_a_step_has_no_length():
    """The state and the compiled step are the same whatever length is meant to come."""
    net, params = net_and_params()
    short, long = (xlstm.init_state(net.cfg, 2, max_len) for max_len in (16, 9973))
    assert jax.tree.map(jnp.shape, short) == jax.tree.map(jnp.shape, long)
    step = jax.jit(functools.partial(language.extend, net, params))
    text = step.lower(jnp.zeros(2, jnp.int32), long).compile().as_text()
    assert "9973" not in text and text.count("while(") == 1  # over the layers only
