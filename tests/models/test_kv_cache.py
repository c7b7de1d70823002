"""Rings with pinned slots: what a cache holds is what a simulation of every write holds."""

import jax.numpy as jnp
import numpy as np
import pytest

from models.blocks import kv_cache

PINNED, RING = 3, 5
SLOTS = PINNED + RING


def numbered(rows, tokens, width):
    """Every token's entries are its own position."""
    at = jnp.arange(tokens, dtype=jnp.float32)[None, :, None, None]
    return jnp.broadcast_to(at, (rows, tokens, 2, width))


def held(cache, row):
    """The position in each slot, the same for keys and values."""
    k, v = (np.asarray(x[0, row]) for x in cache)
    assert (k == k[:1, :, :1]).all() and (v == k[:1, :, :1]).all()
    return k[0, :, 0]


def simulated(count):
    """Slots after tokens 0..count-1, one after another."""
    slots = np.full(SLOTS, -1)
    for p in range(count):
        slots[p if p < PINNED else PINNED + (p - PINNED) % RING] = p
    return slots


@pytest.mark.parametrize("prompt", [1, 3, 4, 8, 9, 17])
def test_pinned_rings_hold_the_first_and_the_last_tokens(prompt):
    """Ragged prompts, then tokens one by one; the mask knows which slots hold what."""
    lengths = np.array([prompt, max(prompt - 2, 1)])
    cache = kv_cache.empty(1, 2, SLOTS, 2, 4, jnp.float32, 6)
    assert cache.k.shape[-1] == 4 and cache.v.shape[-1] == 6
    k, v = numbered(2, prompt, 4), numbered(2, prompt, 6)
    cache = kv_cache.write_prompt(cache, 0, k, v, jnp.asarray(lengths), PINNED)
    for step in range(12):
        at = jnp.asarray(lengths + step)[:, None]
        entry = jnp.broadcast_to(at[..., None, None].astype(jnp.float32), (2, 1, 2, 6))
        cache = kv_cache.write_tokens(cache, 0, entry[..., :4], entry, at, True, PINNED)
        mask = kv_cache.mask_after_write(SLOTS, at, True, PINNED)
        for row in range(2):
            want = simulated(lengths[row] + step + 1)
            valid = np.asarray(mask.kv_valid[row] & (mask.kv_positions[row] <= at[row]))  # causal
            np.testing.assert_array_equal(valid, want >= 0)
            np.testing.assert_array_equal(np.asarray(mask.kv_positions[row])[valid], want[valid])
            np.testing.assert_array_equal(held(cache, row)[valid], want[valid])
