"""The per-token sampler against LTH14/mar with injected noise, and what its rows may depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from export.weights import from_published
from inference import diffusion
from models.blocks import diffusion_head as dh
from models.blocks.diffusion_head_weights import weight_map
from tests.golden import recipes
from tests.models.test_diffusion_head import CFG, published_shapes


@pytest.fixture(scope="module")
def head():
    shapes, abstract = published_shapes(CFG)
    return dh.bind(from_published(recipes.weights(shapes, 1), weight_map(), abstract), CFG)


@pytest.fixture(scope="module")
def golden():
    return recipes.load("mar")


NOISE, Z = recipes.normal(7, 11, 3, 4), recipes.normal(8, 2, 3, 6)
KEYS = jax.random.split(jax.random.key(0), 3)


@pytest.mark.parametrize(
    ("key", "guidance", "temperature", "clip"),
    [
        ("sample", 1.0, 1.0, None),
        ("sample_guided", 2.5, 0.95, None),
        ("sample_clip", 1.0, 0.9, 5.0),
        ("sample_guided_clip", 2.5, 0.95, 5.0),
    ],
)
def test_matches_published(head, golden, key, guidance, temperature, clip):
    guided = guidance != 1.0
    got = jax.jit(
        lambda z, noise: diffusion.sample_head(
            head,
            z,
            diffusion.guidance_weights(guidance) if guided else None,
            steps=10,
            temperature=temperature,
            x0_clip=clip,
            noise=noise,
        )
    )(Z if guided else Z[:1], NOISE)
    assert got.shape == golden[key].shape
    recipes.assert_close(got, golden[key], 1e-4)


def test_guidance_may_differ_per_row(head):
    scales = jnp.array([1.0, 2.0, 4.0])
    weights = diffusion.guidance_weights(scales)

    def sample(z, weights, noise):
        return diffusion.sample_head(head, z, weights, noise=noise, steps=10, x0_clip=5.0)

    together = sample(Z, weights, NOISE)
    for row, scale in enumerate(scales):
        one = sample(Z, diffusion.guidance_weights(scale), NOISE)
        np.testing.assert_allclose(together[row], one[row], rtol=1e-5, atol=1e-5)
    plain = sample(Z[:1], None, NOISE)
    np.testing.assert_allclose(together[0], plain[0], rtol=1e-5, atol=1e-5)


def test_without_guidance_no_null_branch_runs(head):
    """K = 1 and a scale of 1 give the same numbers; K = 1 runs half of the FLOPs."""

    def flops(z, weights):
        run = jax.jit(lambda z: diffusion.sample_head(head, z, weights, KEYS, steps=2))
        return run.lower(z).compile().cost_analysis()["flops"], run(z)

    one, a = flops(Z[:1], None)
    two, b = flops(Z, diffusion.guidance_weights(1.0))
    recipes.assert_close(a, b, 1e-6)
    assert 0.4 < one / two < 0.65


def test_rows_depend_on_their_key_only(head):
    z = Z[:1]
    together = diffusion.sample_head(head, z, None, KEYS, steps=10, x0_clip=5.0)
    alone = diffusion.sample_head(head, z[:, 1:2], None, KEYS[1:2], steps=10, x0_clip=5.0)
    np.testing.assert_allclose(together[1], alone[0], rtol=1e-5, atol=1e-5)
    same = jnp.stack([KEYS[0]] * 3)
    repeated = diffusion.sample_head(
        head, jnp.broadcast_to(z[:, :1], z.shape), None, same, steps=10, x0_clip=5.0
    )
    np.testing.assert_allclose(repeated[0], repeated[2], rtol=1e-6)


def test_temperature_leaves_the_start_alone(head):
    """At temperature 0 the sampler is deterministic given the start, which still has unit noise."""
    other = np.array(NOISE)
    other[1:] = recipes.normal(9, 10, 3, 4)

    def sample(noise, temperature):
        return diffusion.sample_head(
            head, Z[:1], noise=noise, steps=10, temperature=temperature, x0_clip=5.0
        )

    np.testing.assert_array_equal(sample(NOISE, 0.0), sample(other, 0.0))
    assert not np.allclose(sample(NOISE, 1.0), sample(other, 1.0))
    other[0] += 1.0
    assert not np.allclose(sample(NOISE, 0.0), sample(other, 0.0))


def test_clip_bounds_the_result(head):
    got = diffusion.sample_head(head, Z[:1], None, KEYS, steps=10, x0_clip=0.5)
    assert jnp.abs(got).max() <= 0.5 + 1e-5


def test_exact_head_recovers_the_data():
    """With the true eps of N(m, s^2) data the samples have its mean and spread."""
    mean, spread, rows = 1.5, 0.3, 4000
    bar = jnp.asarray(dh.schedule().alphas_cumprod, jnp.float32)

    def denoise(x, t):  # the "embedding" is the step itself
        a = bar[t.astype(int)]
        eps = jnp.sqrt(1 - a) * (x - jnp.sqrt(a) * mean) / (a * spread**2 + 1 - a)
        return jnp.concatenate([eps, -jnp.ones_like(eps)], -1)

    oracle = dh.Head(lambda t: t[:, None], jnp.zeros_like, lambda y: y, denoise, 1)
    keys = jax.random.split(jax.random.key(3), rows)
    got = diffusion.sample_head(oracle, jnp.zeros((1, rows, 1)), None, keys, steps=100, x0_clip=9.0)
    assert abs(float(got.mean()) - mean) < 0.02
    assert abs(float(got.std()) - spread) < 0.02


def test_bfloat16_head_samples_finite_float32(head):
    shapes, abstract = published_shapes(CFG)
    params = from_published(recipes.weights(shapes, 1), weight_map(), abstract)
    low = dh.bind(params, CFG, dtype=jnp.bfloat16)
    got = diffusion.sample_head(low, Z[:1], None, KEYS, steps=10, x0_clip=5.0)
    assert got.dtype == jnp.float32 and jnp.isfinite(got).all()
