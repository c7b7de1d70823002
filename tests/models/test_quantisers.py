"""Quantisers: Infinity's golden values and acceptance checks 1, 2, 3, 11, 12; VQ and LFQ.

test_4_... are for section 4 (VQGAN) of the building blocks' specification.
"""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.tokenizers import discrete
from models.tokenizers.quantisers import bits, resize, schedules, vq
from models.tokenizers.quantisers.self_correction import draw_flips, self_correction

GRID = (5, 4)
SCHEDULE = ((1, 1), (2, 2), (3, 3), GRID)
RECIPE = SimpleNamespace(
    weight=1.0, commitment=0.25, entropy=0.1, inv_temperature=10.0, schedule="", drop_scales=0.0,
    residual_gradient=True, beta=0.25, legacy=False, revive=0.0,
)  # fmt: skip


def recipe(**changes):
    return SimpleNamespace(**(vars(RECIPE) | changes))


def golden_features(d=4, grid=GRID):
    """F[c, y, x] = 2 sin(1 + 1.7 c + 0.9 y + 0.4 x^2) as [1, h, w, d]."""
    y, x, c = np.meshgrid(*(np.arange(n) for n in (*grid, d)), indexing="ij")
    return jnp.asarray(2 * np.sin(1 + 1.7 * c + 0.9 * y + 0.4 * x**2), jnp.float32)[None]


def random_features(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def hexadecimal(b) -> str:
    """A hex digit per position, most significant bit first."""
    return "".join(f"{v:x}" for v in np.asarray(b).reshape(-1, 4).astype(int) @ [8, 4, 2, 1])


# ---------------------------------------------------------------- check 1: schedules

TOTALS = {
    1.0: (521, 2521, 6425, 10521), 1.25: (614, 2814, 6854, 10774),
    1.333: (665, 2657, 7085, 10973), 1.5: (533, 2759, 6941, 10997),
    1.75: (472, 2628, 7220, 11252), 2.0: (451, 2681, 7219, 11269),
    2.5: (555, 2555, 6805, 10805), 3.0: (509, 2588, 7016, 11123),
}  # fmt: skip


def test_check_1_schedules_and_token_totals():
    assert sorted(schedules.RATIOS) == sorted([*TOTALS, 0.8, 0.75, 0.666, 0.571, 0.5, 0.4, 0.333])
    for ratio, totals in TOTALS.items():
        for budget, total, scales in zip(schedules.BUDGETS, totals, (7, 10, 12, 13)):
            schedule = schedules.infinity(ratio, budget)
            assert len(schedule) == scales and schedules.tokens(schedule) == total
            flipped = schedules.infinity(int(1000 / ratio) / 1000, budget)
            assert tuple((w, h) for h, w in flipped) == schedule
            (h, w), pixels = schedule[-1], 16**2
            assert abs(h / w - ratio) < 0.01 and schedules.dynamic((h, w)) == schedule
            budget_pixels = {"0.06M": 256, "0.25M": 512, "0.60M": 768, "1M": 1024}[budget] ** 2
            assert 0.8 < h * w * pixels / budget_pixels < 1.3
    assert schedules.infinity(1.5)[-1] == (78, 52) and schedules.infinity(0.333)[-1] == (37, 111)
    with pytest.raises(ValueError, match="no schedule for h / w = 1.1"):
        schedules.infinity(1.1)
    assert schedules.nearest_ratio(480 / 640) == 0.75 and schedules.nearest_ratio(900 / 899) == 1.0


def test_other_schedules():
    assert schedules.tokens(schedules.schedule_for("var", (16, 16))) == 680
    dense = schedules.schedule_for("dense", (32, 32))
    assert [h for h, _ in dense] == [*range(1, 17), 20, 24, 28, 32]
    assert len(schedules.schedule_for("dense", (64, 64))) == 24
    assert schedules.schedule_for("geometric", (8, 8), 4) == ((1, 1), (2, 2), (4, 4), (8, 8))
    assert schedules.schedule_for("geometric", (6, 4), 1) == ((6, 4),)
    assert schedules.geometric((8, 8), 8) == tuple((i, i) for i in range(1, 9))
    assert schedules.geometric((12, 8), 3)[-1] == (12, 8)
    assert schedules.schedule_for("dynamic_2x2", (32, 32))[1] == (4, 4)
    for name, grid, scales, message in [
        ("dynamic", (17, 17), 1, "no grid 17 x 17"),
        ("dense", (18, 18), 1, "no grid 18 x 18"),
        ("var", (16, 8), 1, "no grid 16 x 8"),
        ("geometric", (4, 4), 5, "takes 1 to 4 scales"),
        ("dens", (4, 4), 1, "allowed are single, dynamic"),
    ]:
        with pytest.raises(ValueError, match=message):
            schedules.schedule_for(name, grid, scales)


def test_resizes_follow_their_definitions():
    for to, size in [(3, 5), (2, 4), (5, 5), (1, 7)]:
        rows = resize.area(to, size)
        for i in range(to):
            cells = range(math.floor(i * size / to), math.ceil((i + 1) * size / to))
            np.testing.assert_allclose(rows[i, list(cells)], 1 / len(cells), rtol=1e-6)
            np.testing.assert_allclose(rows[i].sum(), 1, rtol=1e-6)
    x = random_features(0, 2, 5, 4, 3)
    for grid in ((10, 7), (3, 2), (5, 4)):  # up, down, itself
        want = jax.image.resize(x, (2, *grid, 3), "linear", antialias=False)
        np.testing.assert_allclose(resize.resize(x, grid), want, atol=1e-6)
    np.testing.assert_allclose(resize.cubic(9, 4).sum(1), 1, rtol=1e-6)


# ---------------------------------------------------------------- check 2: golden values


def test_check_2_multi_scale_golden():
    features = golden_features()
    got = jax.jit(lambda f: bits.residual(f, SCHEDULE))(features)
    digits = [hexadecimal(b) for b in got.bits]
    assert digits == ["3", "963c", "c9b93466c", "cc96d936996c326d66c9"]
    np.testing.assert_allclose(got.sum.sum(), 0.725001, atol=1e-4)
    np.testing.assert_allclose(jnp.abs(got.sum).sum(), 67.724998, atol=1e-4)
    norm = jnp.linalg.norm
    np.testing.assert_allclose(norm(features - got.sum) / norm(features), 0.461061, atol=1e-5)


def test_check_2_entropies_golden():
    units = bits.unit(golden_features())
    for inv_temperature, token in ((1.0, 2.352920), (100.0, 0.030582)):
        own, code = bits.factorised_entropies(units, inv_temperature)
        np.testing.assert_allclose(own, [token], atol=1e-5)
        want = {1.0: 2.767163, 100.0: 2.767427}[inv_temperature]
        np.testing.assert_allclose(code, want, atol=1e-5)


# ---------------------------------------------------------------- check 3: bits are enough


@pytest.mark.parametrize("ratio", [1.0, 1.5])
def test_check_3_codes_hold_the_latents(ratio):
    schedule = schedules.infinity(ratio, "0.06M")
    cfg = discrete.TokenizerConfig(z=5, schedule="dynamic")
    quantiser, grid = discrete.quantiser(cfg), schedule[-1]
    features = random_features(1, 1, *grid, 5)

    @jax.jit
    def both(features):
        codes = quantiser.encode({}, features)
        return codes, quantiser.decode({}, codes, grid), bits.residual(features, schedule).sum

    codes, latents, want = both(features)
    assert codes.shape == (1, schedules.tokens(schedule), 1) and codes.dtype == jnp.uint32
    np.testing.assert_allclose(latents, want, atol=1e-6)
    # One scale, and features that are a code already.
    b = random_features(2, 2, 3, 4, 5) > 0
    one = bits.residual(3.7 * bits.code(b), ((3, 4),))
    np.testing.assert_array_equal(one.bits[0], b)
    np.testing.assert_array_equal(one.sum, bits.code(b))


def test_wrong_number_of_codes_is_named():
    quantiser = discrete.quantiser(discrete.TokenizerConfig(z=4))
    with pytest.raises(ValueError, match="codes hold 5 tokens"):
        quantiser.decode({}, jnp.zeros((1, 5, 1), jnp.uint32), (2, 2))


# ---------------------------------------------------------------- check 11: gradients


def test_check_11_straight_through_is_the_norm_jacobian():
    d, eps = 5, 1e-3
    x = np.asarray(random_features(6, d), np.float64) * 2
    cotangent = random_features(7, d)

    def quantised(v):
        return bits.residual(v.reshape(1, 1, 1, d), ((1, 1),)).sum.ravel() @ cotangent

    got = jax.jit(jax.grad(quantised))(jnp.asarray(x, jnp.float32))
    normal = lambda v: v / np.linalg.norm(v)  # noqa: E731
    step = eps * np.eye(d)
    jacobian = np.stack([(normal(x + s) - normal(x - s)) / (2 * eps) for s in step])
    np.testing.assert_allclose(got, jacobian @ np.asarray(cotangent), atol=1e-5)
    dead = jax.grad(lambda v: bits.unit(v).sum())(jnp.zeros(3))
    assert jnp.isfinite(dead).all()


def test_check_11_entropy_gradient():
    """d/du of H_token - H_code by the chain rule, written out."""
    units, t, d = np.asarray(bits.unit(random_features(8, 2, 3, 2, 6)), np.float64), 3.0, 6

    def difference(u):
        own, code = bits.factorised_entropies(u, t)
        return own.mean() - code

    got = jax.jit(jax.grad(difference))(jnp.asarray(units, jnp.float32))
    p = 1 / (1 + np.exp(4 * t / np.sqrt(d) * units))
    slope = lambda q: np.log((1 - q + 1e-8) / (q + 1e-8))  # noqa: E731
    dp = (slope(p) - slope(p.mean((0, 1, 2)))) / (2 * 3 * 2)
    want = dp * p * (1 - p) * -4 * t / np.sqrt(d)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-6)


def test_gradients_through_residuals_are_a_switch():
    features, weights = random_features(9, 1, 4, 4, 3), random_features(10, 1, 4, 4, 3)
    schedule = ((1, 1), (2, 2), (4, 4))

    def value(f, through):
        return (bits.residual(f, schedule, through=through).sum * weights).sum()

    both = jax.jit(jax.value_and_grad(value), static_argnums=1)
    (a, through), (b, detached) = both(features, True), both(features, False)
    assert a == b
    assert float(jnp.abs(through - detached).max()) > 1e-2


# ---------------------------------------------------------------- check 12, entropies, depth


def test_check_12_64_bits_need_no_wide_integers():
    cfg = discrete.TokenizerConfig(z=64, schedule="geometric", scales=3)
    quantiser = discrete.quantiser(cfg, RECIPE)
    features = random_features(11, 2, 4, 4, 64)

    def everything(features):
        got = quantiser.quantise(
            {}, {}, features, jax.random.key(0), example=jnp.arange(2), images=2.0
        )
        codes = quantiser.encode({}, features)
        flips = draw_flips(jax.random.key(1), jnp.arange(2), ((2, 2), (4, 4)), 64)
        corrected = self_correction(features, ((2, 2), (4, 4)), flips)
        return got.latents, codes, quantiser.decode({}, codes, (4, 4)), corrected

    latents, codes, decoded, _ = jax.jit(everything)(features)
    assert codes.shape == (2, 1 + 4 + 16, 2) and codes.dtype == jnp.uint32
    np.testing.assert_allclose(decoded, latents, atol=1e-6)
    assert (np.asarray(codes) > 2**31).any()  # bit 31 of a word is used
    assert not jax.config.jax_enable_x64  # there are none to be had


def test_factorised_entropy_bounds_the_joint_one():
    units = bits.unit(random_features(12, 3, 4, 4, 6))
    own, code = bits.factorised_entropies(units, 8.0)
    joint_own, joint_code = jax.jit(lambda u: bits.joint_entropies(u, 8.0, 1 / math.sqrt(6)))(units)
    np.testing.assert_allclose(own, joint_own, rtol=1e-4)
    assert float(code) >= float(joint_code) - 1e-5


def test_stochastic_depth_keeps_the_last_scale():
    keep = jax.vmap(lambda key: bits.kept_scales(key, 4, 0.5))(
        jax.random.split(jax.random.key(0), 1000)
    )
    np.testing.assert_allclose(keep.mean(0), [0.5, 0.5, 0.5, 1.0], atol=0.06)
    features, schedule = random_features(13, 1, 4, 4, 3), ((1, 1), (2, 2), (4, 4))
    dropped = bits.residual(features, schedule, keep=jnp.array([0.0, 0.0, 1.0]))
    np.testing.assert_allclose(dropped.sum, bits.residual(features, schedule[2:]).sum, atol=1e-6)


def test_terms_of_micro_batches_add_up():
    """All but the entropy of the mean code, which micro-batches average."""
    features, rows = random_features(14, 4, 4, 4, 3), jnp.arange(4)
    for cfg in (
        discrete.TokenizerConfig(z=3, schedule="geometric", scales=2),
        discrete.TokenizerConfig(z=3, quantiser="vq", codebook=8),
    ):
        quantiser = discrete.quantiser(cfg, recipe(entropy=0.0))
        params, extra = jax.tree.map(jnp.asarray, _unboxed(quantiser.init(jax.random.key(0))))

        @jax.jit
        def terms(part, rows, quantiser=quantiser, params=params, extra=extra):
            got = quantiser.quantise(
                params, extra, part, jax.random.key(0), example=rows, images=4.0
            )
            return got.loss, got.metrics["commitment"], got.metrics["bits_per_token"]

        parts = [terms(features[i : i + 2], rows[i : i + 2]) for i in (0, 2)]
        np.testing.assert_allclose(np.sum(parts, 0), terms(features, rows), rtol=1e-5)


def _unboxed(tree):
    from flax.linen import meta

    return meta.unbox(tree)


def test_lfq_takes_plain_signs_and_few_bits():
    quantiser = discrete.quantiser(discrete.TokenizerConfig(z=3, quantiser="lfq"), RECIPE)
    features = random_features(15, 2, 2, 2, 3)
    latents = quantiser.decode({}, quantiser.encode({}, features), (2, 2))
    np.testing.assert_array_equal(latents, np.sign(features))
    with pytest.raises(ValueError, match="z=32: quantiser 'lfq' takes at most 20 bits"):
        discrete.quantiser(discrete.TokenizerConfig(z=32, quantiser="lfq"), RECIPE)
    with pytest.raises(ValueError, match="quantiser='fsq': allowed are bsq, lfq, vq"):
        discrete.quantiser(discrete.TokenizerConfig(quantiser="fsq"), RECIPE)


# ---------------------------------------------------------------- vector quantisation


def test_4_nearest_row_is_the_first_of_equals():
    codebook = jnp.array([[9.0, 9.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    z = jnp.array([[0.9, 0.1], [0.0, 2.0], [4.0, 4.0]])
    np.testing.assert_array_equal(vq.nearest(z, codebook), [1, 3, 1])


def test_4_beta_sits_on_the_commitment_or_as_released_on_the_codebook():
    features = random_features(16, 2, 3, 3, 4)
    cfg = discrete.TokenizerConfig(z=4, quantiser="vq", codebook=8)

    def grads(legacy):
        quantiser = discrete.quantiser(cfg, recipe(legacy=legacy))
        params, extra = _unboxed(quantiser.init(jax.random.key(0)))

        def loss(p, f):
            rows = jnp.arange(2)
            return quantiser.quantise(p, extra, f, jax.random.key(0), example=rows, images=2.0).loss

        return jax.jit(jax.grad(loss, (0, 1)))(params, features)

    (book, z), (legacy_book, legacy_z) = grads(False), grads(True)
    np.testing.assert_allclose(legacy_book["embedding"], 0.25 * book["embedding"], rtol=1e-4)
    np.testing.assert_allclose(z, 0.25 * legacy_z, rtol=1e-4)


def test_dead_codes_are_revived_where_features_are():
    cfg = discrete.TokenizerConfig(z=3, quantiser="vq", codebook=16)
    quantiser = discrete.quantiser(cfg, recipe(revive=0.5))
    params, extra = _unboxed(quantiser.init(jax.random.key(0)))
    features = random_features(17, 2, 4, 4, 3) + 4.0  # all nearest to one corner of the codebook

    @jax.jit
    def step(extra, rng):
        got = quantiser.quantise(params, extra, features, rng, example=jnp.arange(2), images=2.0)
        return got.extra, got.metrics, got.latents

    _, before, _ = step(extra, jax.random.key(0))
    used = extra
    for i in range(80):
        used, metrics, latents = step(used, jax.random.key(i))
    again, _, _ = step(used, jax.random.key(5))
    np.testing.assert_array_equal(again["offset"], step(used, jax.random.key(5))[0]["offset"])
    assert float(metrics["bits_used"]) > float(before["bits_used"]) + 1
    # Exported codes are where training saw them, and decode to what it decoded.
    final = quantiser.finalise(params, used)
    codes = quantiser.encode(final, features)
    _, _, latents = step(used, jax.random.key(0))
    np.testing.assert_allclose(quantiser.decode(final, codes, (4, 4)), latents, atol=1e-5)
    rows = np.asarray(final["embedding"])[np.asarray(used["offset"]).any(1)]
    distance = np.abs(rows[:, None] - np.asarray(features).reshape(1, -1, 3)).max(-1).min(1)
    assert len(rows) > 4 and distance.max() < 1e-5


def test_phi_of_scale_matches_var():
    assert [vq.phi_of_scale(k, 10, 4) for k in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert vq.phi_of_scale(0, 1, 1) == 0


@pytest.mark.parametrize("quantiser", ["bsq", "vq"])
def test_perplexity_counts_the_codes_of_a_batch(quantiser):
    cfg = discrete.TokenizerConfig(z=3, quantiser=quantiser, codebook=8)
    own = discrete.quantiser(cfg, recipe())
    params, extra = _unboxed(own.init(jax.random.key(0)))
    features = random_features(18, 2, 4, 4, 3)
    got = own.quantise(params, extra, features, jax.random.key(0), example=jnp.arange(2), images=2)
    counts = np.unique(np.asarray(own.encode(params, features)), return_counts=True)[1]
    p = counts / counts.sum()
    want = np.exp(-(p * np.log(p)).sum())
    np.testing.assert_allclose(got.metrics["code_perplexity"], want, rtol=1e-5)
