"""The glyph classifier: what its features and its augmentation promise, and that it learns."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from models import MODELS, glyph_classifier


def tiny_config(**net):
    net = dict(size="small_32", widths=(8, 16), features=16, stem=2, groups=4) | net
    model = dict(name="glyph_classifier", net=net, classes=8, scale=10.0)
    data = dict(image_size=16)
    return ml_collections.ConfigDict(
        dict(model=model, data=data, batch_size=8, precision="float32")
    )


@pytest.fixture(scope="module")
def batch():
    coarse = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), np.uint8)
    return {
        "image": coarse.repeat(4, 1).repeat(4, 2),
        "label": np.arange(8, dtype=np.int32),
        "example": np.arange(8, dtype=np.int32),
    }


@pytest.fixture(scope="module")
def trained(batch):
    import optax

    model, tx = MODELS["glyph_classifier"](tiny_config()), optax.adam(5e-3)
    params, extra = jax.jit(lambda r: nn.meta.unbox(model.init(r)))(jax.random.key(0))
    opt, curve = tx.init(params), []

    @jax.jit
    def step(params, opt, i):
        def loss(p):
            rng = jax.random.fold_in(jax.random.key(1), i)
            return model.loss(p, extra, batch, rng, step=i, norms=model.norms(batch))

        (_, (metrics, _)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(params, updates), opt, metrics

    for i in range(60):
        params, opt, metrics = step(params, opt, i)
        curve.append(float(metrics["accuracy"]))
    return model, params, curve


def test_learns_under_augmentation(trained, batch):
    model, params, curve = trained
    assert np.mean(curve[-10:]) > 0.8 > np.mean(curve[:5])
    images = jnp.asarray(batch["image"], jnp.float32) / 127.5 - 1
    assert (jax.jit(model.predict["logits"])(params, images).argmax(-1) == batch["label"]).all()


def test_features_are_unit_and_keep_a_disturbed_picture_near(trained, batch):
    model, params, _ = trained
    images = jnp.asarray(batch["image"], jnp.float32) / 127.5 - 1
    features = jax.jit(model.predict["features"])
    clean = features(params, images)
    np.testing.assert_allclose(jnp.linalg.norm(clean, axis=-1), 1.0, rtol=1e-5)
    keys = jax.random.split(jax.random.key(7), 8)
    moved = features(params, jax.jit(glyph_classifier.augment)(images, keys))
    distance = jnp.linalg.norm(moved[:, None] - clean[None], axis=-1)
    assert float((distance.argmin(-1) == jnp.arange(8)).mean()) >= 0.75


def test_augmentation_depends_on_the_row_key_only(batch):
    images = jnp.asarray(batch["image"], jnp.float32) / 127.5 - 1
    keys = jax.random.split(jax.random.key(0), 8)
    augment = jax.jit(glyph_classifier.augment)
    together = augment(images, keys)
    np.testing.assert_allclose(together[3], augment(images[3:4], keys[3:4])[0], atol=1e-5)
    assert together.shape == images.shape and jnp.isfinite(together).all()
    assert float(jnp.abs(together - images).mean()) > 0.02


def test_micro_batches_add_up(trained, batch):
    model, params, _ = trained
    norms = model.norms(batch)
    loss = jax.jit(
        lambda part: model.loss(params, {}, part, jax.random.key(2), step=0, norms=norms)[0]
    )
    parts = [jax.tree.map(lambda x, s=s: x[s], batch) for s in (slice(0, 3), slice(3, 8))]
    np.testing.assert_allclose(sum(map(loss, parts)), loss(batch), rtol=1e-4)


def test_shipped_sizes_are_small():
    for cfg in glyph_classifier.SIZES.values():
        side = cfg.resolution
        body = jax.eval_shape(
            lambda cfg=cfg, side=side: glyph_classifier.Body(cfg).init(
                jax.random.key(0), jnp.zeros((1, side, side, 3))
            )
        )
        assert 2 * sum(x.size for x in jax.tree.leaves(body)) < 2_000_000


def test_wrong_picture_size_is_named():
    config = tiny_config()
    config.data.image_size = 18
    with pytest.raises(ValueError, match="config.data.image_size=18"):
        MODELS["glyph_classifier"](config)
