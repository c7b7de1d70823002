"""The cache of local layers whose first tokens stay visible: rings with pinned slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import MaskSpec, attention
from models.blocks import kv_cache

B, H, G, K, V = 3, 4, 2, 8, 12
PINNED, WINDOW = 5, 6
SLOTS = PINNED + WINDOW


def row(tokens, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((H, K), (G, K), (G, V))
    return [jax.random.normal(x, (B, tokens, *shape)) for x, shape in zip(keys, shapes)]


def decode(q, k, v, lengths, cache, steps, pinned, window):
    """Outputs of `steps` tokens behind each row's own length."""
    rows, out = jnp.arange(B)[:, None], []
    for step in range(steps):
        at = (lengths + step)[:, None]
        new = (k[rows, at], v[rows, at])
        cache = kv_cache.write_tokens(cache, 1, *new, at, True, pinned)
        mask = kv_cache.mask_after_write(cache.slots, at, True, pinned).with_window(window)
        out.append(attention(q[rows, at], *kv_cache.read(cache, 1), mask))
    return jnp.concatenate(out, 1)


@pytest.mark.parametrize("prompt", [1, 3, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 5])
@pytest.mark.parametrize("apart", [False, True])
def test_hymba_check_4_prompt_and_steps_equal_the_full_pass(prompt, apart):
    """Ragged rows, values wider than keys, more than two windows of steps; the pinned tokens
    within the prompt, or stored before it as for every request."""
    steps = 2 * WINDOW + 3
    lengths = PINNED + jnp.asarray([prompt, max(prompt - 2, 1), 1])
    q, k, v = row(PINNED + prompt + steps)
    mask = MaskSpec(window=WINDOW, always_visible=PINNED)
    want = attention(q, k, v, mask, impl="ref")
    want = jnp.stack([x[n : n + steps] for x, n in zip(want, lengths)])

    cache = kv_cache.empty(2, B, SLOTS, G, K, jnp.float32, V)
    assert cache.k.shape[-2:] == (SLOTS, K) and cache.v.shape[-2:] == (SLOTS, V)
    cut = PINNED if apart else 0
    if apart:
        cache = kv_cache.write_prompt(cache, 1, k[:, :cut], v[:, :cut], None, PINNED)
    part = (x[:, cut : PINNED + prompt] for x in (k, v))
    cache = kv_cache.write_prompt(cache, 1, *part, lengths - cut, PINNED, cut)
    got = decode(q, k, v, lengths, cache, steps, PINNED, WINDOW)
    np.testing.assert_allclose(got, want, atol=2e-6)
    np.testing.assert_array_equal(cache.k[0], 0)  # of the other layer


def test_slots_are_as_the_specification_says():
    """Slots 0..M-1 hold the first M tokens for ever, slot M + (p - M) mod W token p."""
    tokens = 40
    k = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.float32)[None, :, None, None], (B, 40, G, K))
    cache = kv_cache.empty(1, B, SLOTS, G, K, jnp.float32)
    for p in range(tokens):
        at = jnp.full((B, 1), p)
        cache = kv_cache.write_tokens(cache, 0, k[:, p : p + 1], k[:, p : p + 1], at, True, PINNED)
        held = np.full(SLOTS, -1)
        for old in range(p + 1):
            held[old if old < PINNED else PINNED + (old - PINNED) % WINDOW] = old
        stored = np.asarray(cache.k[0, 0, 0, :, 0])
        np.testing.assert_array_equal(stored[held >= 0], held[held >= 0])
        mask = kv_cache.mask_after_write(SLOTS, at, True, PINNED)
        visible = np.asarray(mask.dense(1, SLOTS))[0, 0]
        np.testing.assert_array_equal(visible, held >= 0)
        np.testing.assert_array_equal(np.asarray(mask.kv_positions)[0][visible], held[visible])


def test_without_pinned_slots_it_is_the_ring_as_before():
    """Slot p mod S, every position."""
    newest = jnp.asarray([[3], [17], [30]])
    mask = kv_cache.mask_after_write(7, newest, True)
    held = np.asarray(newest) - (np.asarray(newest) - np.arange(7)) % 7
    np.testing.assert_array_equal(mask.kv_positions, held)
    np.testing.assert_array_equal(mask.kv_valid, held >= 0)
    assert mask.always_visible == 0


def test_mistakes_are_named():
    cache = kv_cache.empty(1, B, SLOTS, G, K, jnp.float32)
    x = jnp.zeros((B, SLOTS + 1, G, K))
    with pytest.raises(ValueError, match="needs lengths"):
        kv_cache.write_prompt(cache, 0, x, x, None, PINNED)
    with pytest.raises(ValueError, match="would overwrite the ring"):
        kv_cache.write_prompt(cache, 0, x, x, jnp.full(B, 3), PINNED, PINNED + 1)
