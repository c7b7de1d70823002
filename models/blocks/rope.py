"""Rotary position embedding, half-split pairing (dimension j with j + K/2, as Gemma has it)."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class RopeTable(NamedTuple):
    """cos and sin of every angle, float32; made once and used by every layer."""

    cos: Float[Array, "b t 1 half"]
    sin: Float[Array, "b t 1 half"]


def rope_table(
    positions: Int[Array, "b t *axes"], head_dim: int, theta: float = 10_000.0, scale: float = 1.0
) -> RopeTable:
    """Angles position / scale · theta^(-2j/K) for j < K/2.

    Positions with several axes [b, t, n] (rows and columns): angle j turns with axis j mod n, so
    that a token whose axes are equal has the angles of that one position.
    """
    half = head_dim // 2
    exponent = jnp.arange(half, dtype=jnp.float32) * (2.0 / head_dim)
    if positions.ndim == 2:
        positions = positions[..., None]
    turned_by = positions[..., jnp.arange(half) % positions.shape[-1]]
    angles = turned_by.astype(jnp.float32) / scale / theta**exponent
    return RopeTable(jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :])


def apply_rope(x: Float[Array, "b t h k"], table: RopeTable) -> Float[Array, "b t h k"]:
    """[x1 cos - x2 sin, x2 cos + x1 sin] in float32, cast back to x's type."""
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (x1 * table.cos - x2 * table.sin, x2 * table.cos + x1 * table.sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
