"""Rotary position embedding, half-split pairing (dimension j with j + K/2, as Gemma has it)."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class RopeTable(NamedTuple):
    """cos and sin of every angle, float32; made once and used by every layer."""

    cos: Float[Array, "b t 1 half"]
    sin: Float[Array, "b t 1 half"]


class RopeBands(NamedTuple):
    """Llama 3.1's change of frequencies for contexts longer than those it was first trained on.

    Wavelengths above original / low are divided by `factor` in frequency, those below original /
    high stay, between them it is interpolated.
    """

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192


def _periods(head_dim: int, theta: float, bands: RopeBands | None):
    """Positions per radian of every angle: theta^(2j/K) for j < K/2, as `bands` changes them."""
    periods = theta ** (jnp.arange(head_dim // 2, dtype=jnp.float32) * (2.0 / head_dim))
    if bands is None:
        return periods
    turns = bands.original / (2 * jnp.pi * periods)  # within the original context
    kept = jnp.clip((turns - bands.low) / (bands.high - bands.low), 0.0, 1.0)
    return periods / (kept + (1.0 - kept) / bands.factor)


def rope_table(
    positions: Int[Array, "b t *axes"],
    head_dim: int,
    theta: float = 10_000.0,
    scale: float = 1.0,
    bands: RopeBands | None = None,
) -> RopeTable:
    """Angles position / scale · theta^(-2j/K) for j < K/2, or as `bands` changes their periods.

    Positions with several axes [b, t, n] (rows and columns): angle j turns with axis j mod n, so
    that a token whose axes are equal has the angles of that one position.
    """
    half = head_dim // 2
    if positions.ndim == 2:
        positions = positions[..., None]
    turned_by = positions[..., jnp.arange(half) % positions.shape[-1]]
    angles = turned_by.astype(jnp.float32) / scale / _periods(head_dim, theta, bands)
    return RopeTable(jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :])


def apply_rope(x: Float[Array, "b t h k"], table: RopeTable) -> Float[Array, "b t h k"]:
    """[x1 cos - x2 sin, x2 cos + x1 sin] in float32, cast back to x's type."""
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (x1 * table.cos - x2 * table.sin, x2 * table.cos + x1 * table.sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
