"""Where Infinity's tokens lie: scales, their weights in the loss, rotary positions in two axes.

Spec: arXiv 2412.04431, FoundationVision/Infinity (infinity/models/basic.py, "star" positions).
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from models.tokenizers.quantisers.schedules import RATIOS, Schedule


def scale_ids(schedule: Schedule) -> Int[np.ndarray, "l"]:
    """The scale of every token, 0, 1, ..."""
    return np.repeat(np.arange(len(schedule), dtype=np.int32), [h * w for h, w in schedule])


def scale_weights(schedule: Schedule) -> Float[np.ndarray, "l"]:
    """Weight of every token in the loss, one over the side of its scale; they sum to one."""
    weight = np.array([1.0 / math.sqrt(h * w) for h, w in schedule])[scale_ids(schedule)]
    return (weight / weight.sum()).astype(np.float32)


def rope_grid(schedule: Schedule) -> tuple[int, int]:
    """The grid that positions are scaled to: at every resolution the last scale of the ratio's
    1M schedule; of schedules that are not Infinity's their own last scale."""
    full = (s for s in RATIOS.values() if s[: len(schedule)] == tuple(schedule))
    return next(full, schedule)[-1]


def rope_positions(schedule: Schedule) -> Int[np.ndarray, "l 2"]:
    """(row, column) of every token on `rope_grid`, halves rounded to even, in single precision."""
    side = lambda n, to: np.rint(np.arange(n, dtype=np.float32) * np.float32(to / n))  # noqa: E731
    height, width = rope_grid(schedule)
    parts = [
        np.stack(np.meshgrid(side(h, height), side(w, width), indexing="ij"), -1).reshape(-1, 2)
        for h, w in schedule
    ]
    return np.concatenate(parts).astype(np.int32)


class Rope2d(NamedTuple):
    """cos and sin of every token's angles: the first half turns with rows, the rest with
    columns."""

    cos: Float[Array, "l 1 half"]
    sin: Float[Array, "l 1 half"]


def rope2d(schedule: Schedule, head_dim: int, theta: float = 10_000.0) -> Rope2d:
    """Angles position * theta^(-4 j / head_dim), j < head_dim / 4, of rows, then of columns."""
    half = head_dim // 2
    frequency = theta ** (-np.arange(0, half, 2) / half)
    angle = (rope_positions(schedule)[..., None] * frequency).reshape(-1, 1, half)
    return Rope2d(np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32))


def apply_rope2d(x: Float[Array, "b l h k"], rope: Rope2d) -> Float[Array, "b l h k"]:
    """Turns the pairs (2 j, 2 j + 1), in float32."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = (even * rope.cos - odd * rope.sin, even * rope.sin + odd * rope.cos)
    return jnp.stack(turned, axis=-1).reshape(x.shape)
