"""Bitwise self-correction: Infinity's golden values (check 2) and acceptance check 4."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels.bitwise.bits import unpack
from models.tokenizers.conv import space_to_depth
from models.tokenizers.quantisers import schedules
from models.tokenizers.quantisers import self_correction as module
from models.tokenizers.quantisers.self_correction import draw_flips, flip_probabilities
from tests.models.test_quantisers import (
    GRID,
    SCHEDULE,
    golden_features,
    hexadecimal,
    random_features,
)

self_correction = jax.jit(
    module.self_correction, static_argnums=1, static_argnames=("relabel", "patchify")
)


def test_check_2_self_correction_golden():
    features = golden_features()
    inputs, labels = self_correction(features, SCHEDULE)
    assert inputs.shape == (1, 33, 4) and labels.dtype == jnp.uint32
    np.testing.assert_allclose(inputs.sum(), -0.275, atol=1e-4)
    np.testing.assert_allclose(jnp.abs(inputs).sum(), 75.824997, atol=1e-4)
    flips = [(np.arange(h * w * 4) % 3 == 0).reshape(1, h, w, 4) for h, w in SCHEDULE]
    inputs, labels = self_correction(features, SCHEDULE, flips)
    want = "3" + "9734" + "d93936264" + "dd9299369b6c336d6649"
    assert hexadecimal(unpack(labels, 4)) == want
    np.testing.assert_allclose(inputs.sum(), -11.875, atol=1e-4)
    np.testing.assert_allclose(jnp.abs(inputs).sum(), 49.974998, atol=1e-4)


def test_check_4_flip_probabilities():
    p = jax.vmap(lambda key: flip_probabilities(key, 2, 0.3))(
        jax.random.split(jax.random.key(0), 5000)
    )
    steps = np.round(np.asarray(p) * 100, 4)
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)
    assert set(np.unique(np.round(steps))) == set(range(31))
    assert abs(float(p.mean()) - 0.15) < 0.01
    late = flip_probabilities(jax.random.key(0), 15, 0.3, 13)
    assert (late[13:] == 0).all() and (late[:13] > 0).any()
    assert (flip_probabilities(jax.random.key(0), 5, 0.0) == 0).all()


def test_check_4_a_flip_changes_what_comes_after_only():
    features = random_features(3, 1, *GRID, 4)
    inputs, labels = self_correction(features, SCHEDULE)
    k, begin = 1, 1  # scale 2 of 4: labels from token 1 on, input of scale 3 from token 4 on
    flips = [jnp.zeros((1, h, w, 4), bool) for h, w in SCHEDULE]
    flips[k] = flips[k].at[0, 1, 0, 2].set(True)
    inputs2, labels2 = self_correction(features, SCHEDULE, flips)
    np.testing.assert_array_equal(labels2[:, : begin + 4], labels[:, : begin + 4])
    np.testing.assert_array_equal(inputs2[:, :4], inputs[:, :4])  # those of scale 2
    assert (inputs2[:, 4:13] != inputs[:, 4:13]).any()
    assert (labels2[:, begin + 4 :] != labels[:, begin + 4 :]).any()
    # Random flip: the same inputs of the next scale, labels as without flips.
    inputs3, labels3 = self_correction(features, SCHEDULE, flips, relabel=False)
    np.testing.assert_array_equal(labels3, labels)
    np.testing.assert_array_equal(inputs3[:, 4:13], inputs2[:, 4:13])


def test_check_4_strength_0_is_teacher_forcing_and_rows_draw_alone():
    features = random_features(4, 3, *GRID, 4)
    rows = jnp.arange(3)

    @functools.partial(jax.jit, static_argnums=1)
    def draw(rows, strength):
        return draw_flips(jax.random.key(1), rows, SCHEDULE, 4, strength=strength)

    plain, none = (self_correction(features, SCHEDULE, f) for f in ((), draw(rows, 0.0)))
    for a, b in zip(plain, none):
        np.testing.assert_array_equal(a, b)
    whole, alone = draw(rows, 0.9), draw(rows[2:], 0.9)
    for a, b in zip(whole, alone):
        np.testing.assert_array_equal(a[2:], b)
    assert any(f.any() for f in whole)


def test_self_correction_in_patches_of_two():
    schedule = schedules.doubled(((1, 1), (2, 1)))
    features = random_features(5, 2, 4, 2, 14)
    inputs, labels = self_correction(features, schedule, patchify=True)
    assert inputs.shape == (2, 2, 56) and labels.shape == (2, 3, 2)
    flat, labels_flat = self_correction(features, schedule)
    want = space_to_depth(flat.reshape(2, 4, 2, 14), 2).reshape(2, 2, 56)
    np.testing.assert_array_equal(inputs, want)
    first = unpack(labels_flat, 14)[:, :4].reshape(2, 2, 2, 14)
    np.testing.assert_array_equal(unpack(labels, 56)[:, 0], space_to_depth(first, 2)[:, 0, 0])
