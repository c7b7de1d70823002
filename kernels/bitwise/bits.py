"""Bits packed into words, and their codes.

Bit i of a token is bit i mod 32, least significant first, of its word i // 32: d bits take
ceil(d / 32) words of 32 bits, so that no width needs an integer of 64 bits.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

WORD = 32  # bits of a word


def words(d: int) -> int:
    """Words that d bits take."""
    return -(-d // WORD)


def pack(bits: Bool[Array, "*n d"] | Int[Array, "*n d"]) -> UInt32[Array, "*n words"]:
    """Words of the bits on the last axis; what is not zero is 1, bits past d are 0."""
    d = bits.shape[-1]
    ones = jnp.asarray(bits).astype(bool).astype(jnp.uint32)
    ones = jnp.pad(ones, [(0, 0)] * (ones.ndim - 1) + [(0, words(d) * WORD - d)])
    ones = ones.reshape(*ones.shape[:-1], words(d), WORD)
    # Each word's bits are disjoint, so that their sum is their "or" and never overflows.
    return jnp.sum(ones << jnp.arange(WORD, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


def unpack(packed: UInt32[Array, "*n words"], d: int) -> Int[Array, "*n d"]:
    """The d bits of each token's words, 0 or 1."""
    if packed.shape[-1] != words(d):
        raise ValueError(f"{d} bits take {words(d)} words a token, not {packed.shape[-1]}")
    word = jnp.repeat(packed, WORD, axis=-1)[..., :d]
    return ((word >> (jnp.arange(d, dtype=jnp.uint32) % WORD)) & 1).astype(jnp.int32)


def codes(bits: Bool[Array, "*n d"] | Int[Array, "*n d"]) -> Float[Array, "*n d"]:
    """Points of the unit sphere that the bits name: ±1 / sqrt(d) in float32, bit 0 the minus."""
    unit = jnp.float32(1.0 / math.sqrt(bits.shape[-1]))
    return jnp.where(jnp.asarray(bits).astype(bool), unit, -unit)
