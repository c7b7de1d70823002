"""Schedules against closed forms; AdamW, weight decay, groups and averages against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.linen import LogicallyPartitioned as Box

from configs.common import base
from training import ema
from training.optimizer import by_prefix, decay_mask, hidden_matrices, make_optimizer
from training.schedules import make_schedule


def lrs(steps=100, lr=2.0, **schedule):
    """The learning rate of every step."""
    config = base(steps=steps, optimizer=dict(lr=lr), schedule=schedule)
    return np.asarray(jax.vmap(make_schedule(config))(jnp.arange(steps)))


def assert_close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=1e-6)


def test_warmup_and_constant():
    found = lrs(name="constant", warmup=10)
    assert_close(found[:10], 2.0 * np.arange(1, 11) / 10)
    assert_close(found[10:], 2.0)
    assert_close(lrs(steps=5, warmup=10), 2.0 * np.arange(1, 6) / 10)  # shorter than its warm-up


def test_cosine():
    found = lrs(name="cosine", warmup=20, final=0.1)
    x = (np.arange(20, 100) - 20) / 79
    assert_close(found[20:], 2.0 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * x))))
    assert_close(found[[20, 99]], [2.0, 0.2])
    closed = lrs(name="cosine", warmup=20, final=0.1, decay=10)
    x = (np.arange(20, 91) - 20) / 70
    assert_close(closed[20:91], 2.0 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * x))))
    assert_close(closed[90:], 0.2 * np.arange(10, 0, -1) / 10)


@pytest.mark.parametrize(
    "shape, fall",
    [
        ("linear", lambda x: 1 - 0.9 * x),
        ("exponential", lambda x: 0.1**x),
        ("sqrt", lambda x: 1 - 0.9 * np.sqrt(x)),
        ("sqrt_cube", lambda x: 0.1 + 0.9 * (1 - x) ** 1.5),
    ],
)
def test_wsd(shape, fall):
    found = lrs(name="wsd", warmup=10, decay=30, final=0.1, shape=shape)
    assert_close(found[10:69], 2.0)
    assert_close(found[69:], 2.0 * fall((np.arange(69, 100) - 69) / 30))
    assert_close(found[99], 0.2)
    clamped = lrs(steps=20, name="wsd", warmup=10, decay=30, final=0.1, shape=shape)
    assert clamped[9] == 2.0 and np.all(np.diff(clamped[10:]) < 0)


def test_wsd_cycles():
    """WSD-S: a run of 40 steps that goes on to 100 at the peak, decaying before both ends."""
    short = lrs(steps=40, name="wsd", warmup=10, decay=20, final=0.1)
    found = lrs(name="wsd", warmup=10, decay=20, final=0.1, cycles=(40,))
    assert_close(found[:40], short)
    assert_close(found[40:79], 2.0)
    assert_close(found[79:], 2.0 * (1 - 0.9 * np.arange(21) / 20))


def test_exp_linear():
    """xLSTM-7B: from the peak at 3 to 0.1 of it at 500 and on to step 540, then linear to zero."""
    found = lrs(steps=550, name="exp_linear", warmup=3, decay=10, rate=0.1, rate_steps=500)
    s = np.arange(3, 541)
    assert_close(found[3:541], 2.0 * 0.1 ** ((s - 3) / 497))
    assert_close(found[541:], 2.0 * 0.1 ** (537 / 497) * (550 - np.arange(541, 550)) / 10)
    for name in ("exp_linear", "cosine"):  # a decay longer than what the warm-up leaves
        short = lrs(steps=20, name=name, warmup=10, decay=30, rate_steps=500, final=0.1)
        assert short[9] == short[10] == 2.0 and np.all(np.diff(short[10:]) < 0)


def test_piecewise():
    found = lrs(name="piecewise", boundaries=(30, 60), factors=(0.5, 0.1))
    assert_close(found, np.repeat([2.0, 1.0, 0.2], [30, 30, 40]))


def test_from_file(tmp_path):
    """Rates of all steps or of those after the warm-up; the file gives the shape, not the peak."""
    whole = np.concatenate([np.arange(1, 11) / 10, np.linspace(1, 0.01, 90)]) * 3e-4
    np.save(tmp_path / "after.npy", whole[10:])
    text = "".join(f"{i},{lr}\n" for i, lr in enumerate(whole))
    (tmp_path / "whole.csv").write_text("step,lr\n" + text)
    for name, warmup in (("after.npy", 10), ("whole.csv", 10), ("whole.csv", 0)):
        found = lrs(name="from_file", path=str(tmp_path / name), warmup=warmup)
        assert_close(found, whole / 3e-4 * 2.0)
    with pytest.raises(ValueError, match="has 90 rates.* config.steps=100 needs 100, or 95 after"):
        lrs(name="from_file", path=str(tmp_path / "after.npy"), warmup=5)
    np.save(tmp_path / "bad.npy", np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="config.schedule.path=.*bad.npy.*finite learning rate"):
        lrs(steps=2, name="from_file", path=str(tmp_path / "bad.npy"))


@pytest.mark.parametrize(
    "schedule, message",
    [
        (dict(name="from_file"), "config.schedule.path='': "),
        (dict(name="from_file", path="x.npy"), "config.schedule.path='x.npy': .*no such schedule"),
        (dict(name="cosin"), "config.schedule.name='cosin' must be one of constant, cosine"),
        (dict(name="wsd", shape="square"), "config.schedule.shape='square' must be one of linear"),
        (dict(name="wsd", shape="exponential"), "config.schedule.final=0.0 must be > 0"),
        (dict(name="piecewise", boundaries=(3,)), r"boundaries=\(3,\) and factors=\(\)"),
        (dict(name="wsd", cycles=(60, 50)), r"schedule.cycles=\(60, 50\) must rise from warmup=0"),
        (dict(name="wsd", cycles=(100,)), r"cycles=\(100,\) .* below config.steps=100"),
        (dict(warmup=-1), "config.schedule.warmup=-1"),
        (dict(name="exp_linear", warmup=9, rate_steps=9), "rate_steps=9 must be larger than"),
    ],
)
def test_schedule_mistakes_name_the_key(schedule, message):
    with pytest.raises(ValueError, match=message):
        lrs(**schedule)


PARAMS = dict(
    trunk=dict(kernel=np.linspace(-1, 1, 6).reshape(2, 3), bias=np.array([0.3, -0.2, 0.1])),
    head=dict(kernel=np.linspace(1, 2, 3).reshape(3, 1)),
)
DECAYED = dict(trunk=dict(kernel=True, bias=False), head=dict(kernel=True))


def reference_adamw(grads, o, lr, decay, groups):
    """AdamW written out: clip, moments with bias correction, per-leaf rate and decay."""
    p = jax.tree.map(lambda x: np.float64(x), PARAMS)
    m = v = jax.tree.map(np.zeros_like, p)
    for t, g in enumerate(grads, 1):
        norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(g)))
        g = jax.tree.map(lambda x, norm=norm: x * min(1, o["clip"] / norm), g)
        m = jax.tree.map(lambda m, g: o["b1"] * m + (1 - o["b1"]) * g, m, g)
        v = jax.tree.map(lambda v, g: o["b2"] * v + (1 - o["b2"]) * g * g, v, g)

        def one(p, m, v, decayed, group, t=t):
            scale, wd_scale = groups.get(group, (1.0, 1.0))
            u = (m / (1 - o["b1"] ** t)) / (np.sqrt(v / (1 - o["b2"] ** t)) + o["eps"])
            return p - lr(t) * scale * u - decayed * wd_scale * decay(t, scale) * p

        labels = by_prefix({"head": "head"})(p)
        p = jax.tree.map(one, p, m, v, DECAYED, labels)
    return p


@pytest.mark.parametrize("mode", ["decoupled", "fully_decoupled"])
def test_adamw(mode):
    """Five steps against NumPy, with two groups, both meanings of weight decay."""
    o = dict(lr=0.1, b1=0.9, b2=0.99, eps=1e-8, clip=0.7)
    groups = dict(head=dict(lr_scale=0.5, weight_decay_scale=3.0))
    config = base(
        steps=5,
        optimizer=dict(**o, weight_decay=0.04, wd_mode=mode, groups=groups),
        schedule=dict(name="piecewise", boundaries=(2,), factors=(0.25,)),
    )
    schedule = make_schedule(config)
    labels = by_prefix({"head": "head"})(PARAMS)
    tx = make_optimizer(config, schedule, labels, DECAYED)
    rng = np.random.default_rng(0)
    grads = [jax.tree.map(lambda x: rng.normal(size=x.shape), PARAMS) for _ in range(5)]
    params = jax.tree.map(jnp.float32, PARAMS)
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update(jax.tree.map(jnp.float32, g), state, params)
        params = jax.tree.map(jnp.add, params, updates)

    factor = lambda t: 1.0 if t <= 2 else 0.25  # noqa: E731
    if mode == "decoupled":
        decay = lambda t, scale: 0.1 * factor(t) * scale * 0.04  # noqa: E731
    else:  # the decay knows the shape of the schedule, not the peak
        decay = lambda t, scale: factor(t) * 0.04  # noqa: E731
    wanted = reference_adamw(grads, o, lambda t: 0.1 * factor(t), decay, dict(head=(0.5, 3.0)))
    same = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * abs(b).max())  # noqa: E731
    jax.tree.map(same, params, wanted)


def orthogonalised(x):
    """Five quintic Newton-Schulz steps of Muon, written out (Jordan et al. 2024)."""
    flip = x.shape[0] > x.shape[1]
    x = x.T if flip else x
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if flip else x


def test_muon():
    """Three steps against NumPy: stacked matrices with fused axes, Adam for the embedding."""
    names = dict(
        embedding=("vocab", "embed"), q=("layers", "embed", "heads", "head_dim"), b=("embed",)
    )
    shapes = dict(embedding=(5, 4), q=(2, 4, 2, 3), b=(4,))
    rng = np.random.default_rng(0)
    params = {k: rng.normal(size=s) for k, s in shapes.items()}
    boxed = {k: Box(jnp.float32(x), names[k]) for k, x in params.items()}
    config = base(optimizer=dict(name="muon", lr=0.1, weight_decay=0.04, clip=0.0))
    labels = by_prefix({})(params)
    matrices = hidden_matrices(boxed)
    tx = make_optimizer(config, make_schedule(config), labels, decay_mask(boxed), matrices)
    found = {k: jnp.float32(x) for k, x in params.items()}
    state = tx.init(found)
    q, momentum = params["q"], np.zeros((2, 4, 6))
    for t in range(1, 4):
        grads = {k: rng.normal(size=s) for k, s in shapes.items()}
        updates, state = tx.update({k: jnp.float32(g) for k, g in grads.items()}, state, found)
        found = jax.tree.map(jnp.add, found, updates)
        g = grads["q"].reshape(2, 4, 6)
        momentum = 0.95 * momentum + 0.05 * g  # Nesterov, both parts without their bias
        ahead = 0.95 * momentum / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
        u = np.stack([orthogonalised(x) for x in ahead]).reshape(q.shape)
        q = q - 0.1 * (0.2 * np.sqrt(6) * u + 0.04 * q)
    np.testing.assert_allclose(found["q"], q, atol=2e-6)
    assert set(state[1].inner_states) == {"others", "muon"}
    moments = state[1].inner_states["others"].inner_state.nu
    assert moments["embedding"].shape == (5, 4) and isinstance(moments["q"], optax.MaskedNode)


def test_muon_needs_a_hidden_matrix():
    matrices = jax.tree.map(lambda x: None, PARAMS)
    config = base(optimizer=dict(name="muon"))
    with pytest.raises(ValueError, match="muon.*no parameter has"):
        make_optimizer(config, make_schedule(config), by_prefix({})(PARAMS), DECAYED, matrices)


def test_a_group_of_rate_zero_stands_still():
    config = base(optimizer=dict(weight_decay=0.1, groups=dict(head=dict(lr_scale=0.0))))
    labels = by_prefix({"head": "head"})(PARAMS)
    tx = make_optimizer(config, make_schedule(config), labels, DECAYED)
    params = jax.tree.map(jnp.float32, PARAMS)
    updates, _ = tx.update(params, tx.init(params), params)
    assert not np.any(updates["head"]["kernel"]) and np.any(updates["trunk"]["kernel"])


@pytest.mark.parametrize(
    "optimizer, message",
    [
        (dict(name="adam"), "config.optimizer.name='adam' must be adamw or muon"),
        (dict(wd_mode="coupled"), "config.optimizer.wd_mode='coupled' must be decoupled or fully"),
        (dict(groups=dict(haed={})), "config.optimizer.groups has 'haed'.*default, head"),
        (dict(groups=dict(head=dict(lr=1.0))), "config.optimizer.groups has the key 'lr'"),
    ],
)
def test_optimizer_mistakes_name_the_key(optimizer, message):
    config = base(optimizer=dict(weight_decay=0.1, **optimizer))
    with pytest.raises(ValueError, match=message):
        labels = by_prefix({"head": "head"})(PARAMS)
        make_optimizer(config, make_schedule(config), labels, DECAYED)


def test_decay_mask_by_logical_names():
    """Matrices decay; biases and norms do not, stacked over layers or not."""
    x = jnp.zeros
    tree = dict(
        kernel=Box(x((4, 8)), ("embed", "mlp")),
        stacked=Box(x((2, 4, 8)), ("layers", "embed", "mlp")),
        bias=Box(x(8), ("mlp",)),
        stacked_bias=Box(x((2, 8)), ("layers", "mlp")),
        norm=Box(x((2, 3, 4)), ("layers", "heads", "norm")),
        table=Box(x((9, 4)), ("vocab", "embed")),
        plain=x((3, 3)),
        scalar=x(()),
    )
    decayed = {k for k, v in decay_mask(tree).items() if v}
    assert decayed == {"kernel", "stacked", "table", "plain"}
    assert {k for k, v in decay_mask(tree, ("table",)).items() if v} == decayed - {"table"}
    with pytest.raises(ValueError, match="undecayed has 'tables', and no parameter is there"):
        decay_mask(tree, ("tables",))


def test_ema_closed_form_warmup_and_groups():
    labels = by_prefix({"head": "head"})(PARAMS)
    history = [jax.tree.map(lambda x, t=t: jnp.float32(x * t), PARAMS) for t in range(1, 6)]
    for warmup in (False, True):
        config = base(ema=dict(decay=0.9, warmup=warmup))
        average = ema.init(history[0], ema.selector(config, labels))
        wanted = {k: np.array(v) for k, v in average.items()}
        for t, params in enumerate(history):
            average = ema.update(average, params, jnp.int32(t), 0.9, warmup)
            d = min(0.9, (1 + t) / (10 + t)) if warmup else 0.9
            now = {f"{a}/{b}": x for a, part in params.items() for b, x in part.items()}
            wanted = {k: d * v + (1 - d) * now[k] for k, v in wanted.items()}
        assert set(average) == {"trunk/kernel", "trunk/bias", "head/kernel"}
        for key, value in average.items():
            np.testing.assert_allclose(value, wanted[key], rtol=1e-6)
    only = base(ema=dict(decay=0.9, groups=("head",)))
    average = ema.init(history[0], ema.selector(only, labels))
    assert set(average) == {"head/kernel"}
    merged = ema.merge(dict(params=history[4], ema=average))
    np.testing.assert_array_equal(merged["head"]["kernel"], average["head/kernel"])
    np.testing.assert_array_equal(merged["trunk"]["kernel"], history[4]["trunk"]["kernel"])
    with pytest.raises(ValueError, match="config.ema.groups has 'haed'"):
        ema.selector(base(ema=dict(decay=0.9, groups=("haed",))), labels)
