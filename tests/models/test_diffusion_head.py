"""The per-token diffusion head against LTH14/mar, and properties of its schedule and loss."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from export.weights import from_published, to_published
from models.blocks import diffusion_head as dh
from models.blocks.diffusion_head_weights import weight_map
from tests.golden import recipes

CFG = dh.HeadConfig(channels=4, cond=6, width=32, depth=2)
T = np.array([0, 0, 1, 10, 50, 100, 300, 500, 700, 900, 998, 999])


def published_shapes(cfg):
    """Shapes of the published tensors of a head."""
    abstract = jax.eval_shape(lambda: nn.meta.unbox(dh.init(jax.random.key(0), cfg)))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), abstract)
    return {k: v.shape for k, v in to_published(zeros, weight_map()).items()}, abstract


@pytest.fixture(scope="module")
def params():
    shapes, abstract = published_shapes(CFG)
    return from_published(recipes.weights(shapes, 1), weight_map(), abstract)


@pytest.fixture(scope="module")
def golden():
    return recipes.load("mar")


def test_published_names(golden):
    assert sorted(published_shapes(CFG)[0]) == list(golden["names_head"])
    whole = weight_map("diffloss.net.")
    assert all(rule.name.startswith("diffloss.net.") for rule in whole.names.values())


def test_weights_round_trip(params):
    _, abstract = published_shapes(CFG)
    again = from_published(to_published(params, weight_map()), weight_map(), abstract)
    jax.tree.map(np.testing.assert_array_equal, params, again)


@pytest.mark.parametrize("unroll", [True, False])
def test_network_matches_published(params, golden, unroll):
    t = jnp.array([0, 1, 10, 500, 999])
    head = dh.bind(params, CFG, unroll=unroll)
    out = head(recipes.normal(2, 5, 4), t, recipes.normal(3, 5, 6))
    recipes.assert_close(out, golden["net"], 1e-5)


def test_linen_module_shares_parameters(params, golden):
    module = dh.DiffusionHead(CFG)
    x, z = recipes.normal(2, 5, 4), recipes.normal(3, 5, 6)
    t = jnp.array([0, 1, 10, 500, 999])
    recipes.assert_close(module.apply({"params": params}, x, t, z), golden["net"], 1e-5)
    made = nn.meta.unbox(module.init(jax.random.key(0), x, t, z)["params"])
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)


def test_training_loss_matches_published(params, golden):
    head = dh.bind(params, CFG)
    x0, z, eps = recipes.normal(4, 12, 4), recipes.normal(5, 12, 6), recipes.normal(6, 12, 4)
    mse, vb = dh.loss(head, x0, z, jnp.asarray(T), eps)
    np.testing.assert_allclose(mse, golden["mse"], rtol=1e-4)
    np.testing.assert_allclose(vb, golden["vb"], rtol=1e-4)


def test_repeats_equal_separate_calls(params):
    head = dh.bind(params, CFG)
    x0, z = recipes.normal(4, 12, 4), recipes.normal(5, 12, 6)
    t, eps = dh.draw(jax.random.split(jax.random.key(0), (3, 12)), 4)
    together = dh.loss(head, x0, z, t, eps)
    for r in range(3):
        for a, b in zip(together, dh.loss(head, x0, z, t[r], eps[r])):
            np.testing.assert_allclose(a[r], b, rtol=2e-5)


def test_schedule_check_values():
    tables = dh.schedule()
    bar = tables.alphas_cumprod
    np.testing.assert_allclose(bar[[0, 500]], [0.9999587158, 0.4922851724], rtol=1e-9)
    np.testing.assert_allclose(bar[999], 2.428767e-9, rtol=1e-6)
    assert tables.betas[999] == 0.999
    assert tables.posterior_log_variance[0] == tables.posterior_log_variance[1]


def test_respacing_matches_published(golden):
    spaced = dh.respace(dh.schedule(), 100)
    np.testing.assert_array_equal(spaced.steps, golden["timestep_map_100"])
    np.testing.assert_allclose(spaced.betas, golden["betas_100"], rtol=1e-9)
    whole = dh.respace(dh.schedule(), 1000)
    np.testing.assert_allclose(whole.betas, dh.schedule().betas, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 1001])
def test_impossible_respacing_is_named(steps):
    with pytest.raises(ValueError, match=f"sample.steps={steps}: allowed are 2..1000"):
        dh.respace(dh.schedule(), steps)


def test_fresh_head_returns_zero_and_unit_mse():
    cfg = dh.HeadConfig(channels=16, cond=8, width=32, depth=2)
    head = dh.bind(nn.meta.unbox(dh.init(jax.random.key(0), cfg)), cfg)
    n = 4096
    t, eps = dh.draw(jax.random.split(jax.random.key(1), n), 16)
    x0 = jax.random.normal(jax.random.key(2), (n, 16))
    z = jax.random.normal(jax.random.key(3), (n, 8))
    assert jnp.all(head(x0, t, z) == 0)
    mse, _ = dh.loss(head, x0, z, t, eps)
    assert abs(float(mse.mean()) - 1.0) < 0.02


@pytest.mark.parametrize("t", [1, 10, 100, 500])
def test_bound_equals_closed_form(t):
    """eps = v = 0: the KL of two Gaussians from the definitions, in float64."""
    rng = np.random.default_rng(t)
    x0, eps = rng.standard_normal((64, 16)), rng.standard_normal((64, 16))
    u = np.arange(1001) / 1000
    f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    beta = np.minimum(1 - f[1:] / f[:-1], 0.999)
    bar = np.cumprod(1 - beta)
    x_t = np.sqrt(bar[t]) * x0 + np.sqrt(1 - bar[t]) * eps
    small = beta[t] * (1 - bar[t - 1]) / (1 - bar[t])
    variance = np.sqrt(small * beta[t])  # v = 0: half way between the logarithms
    gap = beta[t] * np.sqrt(bar[t - 1]) / (1 - bar[t]) * (x0 - x_t / np.sqrt(bar[t]))
    ratio = small / variance
    kl = 0.5 * (ratio - 1 - np.log(ratio) + gap**2 / variance)
    want = kl.mean(-1) / np.log(2)
    steps = jnp.full(64, t)
    tables, zeros = dh.schedule(), jnp.zeros((64, 16))
    got = dh.variational_bound(tables, jnp.float32(x0), jnp.float32(x_t), steps, zeros, zeros)
    recipes.assert_close(got, want, 1e-4)


def test_first_step_term_can_be_switched():
    x0 = recipes.normal(1, 8, 4)
    t, zeros, tables = jnp.zeros(8, int), jnp.zeros((8, 4)), dh.schedule()
    x_t = dh.diffuse(tables, x0, t, recipes.normal(2, 8, 4))
    published, plain = (
        dh.variational_bound(tables, x0, x_t, t, zeros, zeros, discretised_t0=flag)
        for flag in (True, False)
    )
    assert not np.allclose(published, plain)
    later = t.at[:].set(5)
    for flag in (True, False):
        got = dh.variational_bound(tables, x0, x_t, later, zeros, zeros, discretised_t0=flag)
        assert jnp.isfinite(got).all() and (got >= 0).all()


def test_bound_does_not_train_the_mean(params):
    """The gradient of the bound with respect to the first C outputs is exactly zero."""
    x0, z, eps = recipes.normal(4, 12, 4), recipes.normal(5, 12, 6), recipes.normal(6, 12, 4)

    def bound(out):
        return dh.loss(lambda x, t, z: out, x0, z, jnp.asarray(T), eps)[1].sum()

    grad = jax.grad(bound)(dh.bind(params, CFG)(x0, jnp.asarray(T), z))
    assert jnp.all(grad[:, :4] == 0)
    assert jnp.all(jnp.abs(grad[:, 4:]).max(-1) > 0)


def test_bfloat16_network_keeps_float32_loss(params):
    head, exact = dh.bind(params, CFG, dtype=jnp.bfloat16), dh.bind(params, CFG)
    x0, z, eps = recipes.normal(4, 12, 4), recipes.normal(5, 12, 6), recipes.normal(6, 12, 4)
    mse, vb = dh.loss(head, x0, z, jnp.asarray(T), eps)
    assert mse.dtype == vb.dtype == jnp.float32
    recipes.assert_close(mse, dh.loss(exact, x0, z, jnp.asarray(T), eps)[0], 3e-2)


@pytest.mark.parametrize(
    ("size", "count"), [("mar_b", 37_322_784), ("mar_l", 73_868_832), ("mar_h", 152_779_808)]
)
def test_published_sizes(size, count):
    abstract = jax.eval_shape(lambda: nn.meta.unbox(dh.init(jax.random.key(0), dh.SIZES[size])))
    assert sum(x.size for x in jax.tree.leaves(abstract)) == count


def test_learns_a_constant_per_condition():
    """Two conditions, two tokens: the loss falls well below that of an uninformed head."""
    import optax

    cfg = dh.HeadConfig(channels=2, cond=2, width=32, depth=2)
    params = nn.meta.unbox(dh.init(jax.random.key(0), cfg))
    z, x0 = jnp.eye(2).repeat(32, 0), jnp.array([[1.0, -1.0], [-1.0, 1.0]]).repeat(32, 0)
    tx = optax.adam(3e-3)

    @jax.jit
    def train(params):
        def step(carry, key):
            params, opt = carry
            t, eps = dh.draw(jax.random.split(key, 64), 2)

            def total(p):
                mse, vb = dh.loss(dh.bind(p, cfg), x0, z, t, eps, discretised_t0=False)
                return mse.mean() + vb.mean(), mse.mean()

            (_, mse), grads = jax.value_and_grad(total, has_aux=True)(params)
            updates, opt = tx.update(jax.tree.map(lambda g: jnp.clip(g, -1, 1), grads), opt)
            return (optax.apply_updates(params, updates), opt), mse

        keys = jax.random.split(jax.random.key(1), 600)
        return jax.lax.scan(step, (params, tx.init(params)), keys)[1]

    curve = train(params)
    assert float(curve[:5].mean()) > 0.8
    assert float(curve[-100:].mean()) < 0.35
