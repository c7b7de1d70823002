"""The adversarial objective: each player's gradients, the adaptive weight, the delayed start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta

from models import MODELS
from tests.models.test_kl_vae import tiny_config
from training.objectives import OBJECTIVES, adversarial


def gan_config(**objective):
    config = tiny_config()
    config.objective = dict(name="adversarial", start=5, weight=0.5, width=8, layers=2) | objective
    return config


@pytest.fixture(scope="module")
def game():
    config = gan_config()
    model = MODELS["kl_vae"](config)
    objective = OBJECTIVES["adversarial"](model, config)

    def init(rng):
        params, extra = model.init(rng)
        params, frozen = objective.init(rng, params)
        return meta.unbox((params, frozen, extra))

    params, frozen, extra = jax.jit(init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (4, 16, 16, 3), np.uint8),
        "label": np.zeros(4, np.int32),
        "example": np.arange(4, dtype=np.int32),
    }

    @jax.jit
    def grads(params, step):
        def loss(p):
            norms = model.norms(batch)
            return objective.loss(
                p, frozen, extra, batch, jax.random.key(1), step=step, norms=norms
            )

        return jax.value_and_grad(loss, has_aux=True)(params)

    return model, objective, params, extra, batch, grads


def largest(tree):
    return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


def test_before_the_start_only_the_autoencoder_trains(game):
    model, objective, params, extra, batch, grads = game
    (value, (metrics, _)), grad = grads(params, 4)
    assert largest(grad["discriminator"]) == 0
    assert metrics["gan/discriminator"] == metrics["gan/weight"] == 0
    own = objective.model_params(params, {})
    rng, norms = jax.random.key(1), model.norms(batch)
    (plain, _), plain_grad = jax.jit(
        jax.value_and_grad(
            lambda p: model.loss(p, extra, batch, rng, step=4, norms=norms), has_aux=True
        )
    )(own)
    np.testing.assert_allclose(value, plain, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grad["decoder"]), jax.tree.leaves(plain_grad["decoder"])):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_each_player_has_its_own_gradients(game):
    """Discriminator: those of the hinge loss alone. Generator: those with D held still."""
    model, objective, params, extra, batch, grads = game
    (_, (metrics, _)), grad = grads(params, 5)
    norms = model.norms(batch)
    own = objective.model_params(params, {})
    judge = adversarial.PatchGAN(8, 2)

    def generate(p):
        return model.predict["generate"](p, extra, batch, jax.random.key(1), norms=norms)

    g = generate(own)

    def hinge(d):
        scores = [judge.apply({"params": d}, x) for x in (g.real, g.fake)]
        return adversarial.hinge(*scores).sum() / 4

    want = jax.jit(jax.grad(hinge))(params["discriminator"])
    for a, b in zip(jax.tree.leaves(grad["discriminator"]), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)

    def generator(p):
        g = generate(p)
        fool = -judge.apply({"params": params["discriminator"]}, g.fake).mean()
        return g.reconstruction(g.fake) + g.rest + metrics["gan/weight"] * fool

    want = jax.jit(jax.grad(generator))(own)
    got = objective.model_params(grad, {})
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * float(jnp.abs(b).max()) + 1e-7)


def test_adaptive_weight_balances_the_last_layer(game):
    """weight / 0.5 is the ratio of the two terms' gradients at the decoder's last kernel."""
    model, objective, params, extra, batch, grads = game
    (_, (metrics, _)), _ = grads(params, 5)
    norms = model.norms(batch)
    judge = adversarial.PatchGAN(8, 2)

    def terms(kernel, which):
        decoder = params["decoder"]
        replaced = decoder | {"conv_out": decoder["conv_out"] | {"kernel": kernel}}
        g = model.predict["generate"](
            params | {"decoder": replaced}, extra, batch, jax.random.key(1), norms=norms
        )
        if which == "rec":
            return g.reconstruction(g.fake)
        return -judge.apply({"params": params["discriminator"]}, g.fake).mean()

    kernel = params["decoder"]["conv_out"]["kernel"]
    rec, gan = (jax.jit(jax.grad(terms), static_argnums=1)(kernel, w) for w in ("rec", "gan"))
    want = 0.5 * jnp.linalg.norm(rec) / (jnp.linalg.norm(gan) + 1e-4)
    np.testing.assert_allclose(metrics["gan/weight"], want, rtol=1e-3)


def test_weight_is_clipped():
    assert adversarial.adaptive_weight(jnp.full(4, 1e6), jnp.zeros(4)) == 1e4
    assert adversarial.adaptive_weight(jnp.zeros(4), jnp.ones(4)) == 0


def test_lecam_penalty_leaves_small_scores_alone():
    scores = lambda *x: jnp.array(x).reshape(-1, 1, 1, 1)  # noqa: E731
    assert adversarial.lecam_zero(scores(0.3, -0.2), scores(-0.1)) == 0  # means within 0.1
    got = adversarial.lecam_zero(scores(0.3, 0.5), scores(-0.6))
    np.testing.assert_allclose(got, 0.3**2 + 0.5**2, rtol=1e-5)


def test_hinge_values():
    real = jnp.array([2.0, 0.5]).reshape(2, 1, 1, 1)
    fake = jnp.array([-2.0, 0.5]).reshape(2, 1, 1, 1)
    np.testing.assert_allclose(adversarial.hinge(real, fake), [0.0, 0.5 * (0.5 + 1.5)])


def test_two_optimiser_groups(game):
    _, objective, params, *_ = game
    labels = objective.labels(params)
    assert set(jax.tree.leaves(labels["discriminator"])) == {"discriminator"}
    assert set(jax.tree.leaves(objective.model_params(labels, {}))) == {"generator"}
    assert "discriminator" not in objective.model_params(params, {})


def test_discriminator_learns_to_tell_apart(game):
    """With the generator frozen in the optimiser, the hinge loss falls."""
    import optax

    _, _, params, _, _, grads = game
    judge, tx = params["discriminator"], optax.adam(2e-3)
    opt, losses = tx.init(judge), []
    for _ in range(12):
        (_, (metrics, _)), grad = grads(params | {"discriminator": judge}, 9)
        updates, opt = tx.update(grad["discriminator"], opt)
        judge = optax.apply_updates(judge, updates)
        losses.append(float(metrics["gan/discriminator"]))
    assert losses[-1] < 0.7 * losses[0]


def test_needs_a_generator():
    config = gan_config()
    model = MODELS["kl_vae"](config)
    with pytest.raises(ValueError, match="config.objective.name='adversarial'"):
        OBJECTIVES["adversarial"](model._replace(predict={}), config)
