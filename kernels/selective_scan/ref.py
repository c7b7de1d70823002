"""The selective scan step by step: the definition (Mamba, arXiv 2312.00752, algorithm 2).

    Δ_t = softplus(delta_t + delta_bias)
    h_t = exp(Δ_t A) h_{t-1} + Δ_t u_t B_t       N numbers per channel, decays of each and token
    y_t = <C_t, h_t> + D u_t                     times silu(z_t) where there is a gate

Where `fresh` is set, h_{t-1} is the state `reset` instead.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Inputs(NamedTuple):
    """What every implementation takes; the last six are float32 (float64 of float64 inputs)."""

    u: Float[Array, "b t e"]
    delta: Float[Array, "b t e"]
    B: Float[Array, "b t n"]
    C: Float[Array, "b t n"]
    z: Float[Array, "b t e"] | None
    fresh: Bool[Array, "b t"] | None  # None: one document, that of the first state
    A: Float[Array, "e n"]
    D: Float[Array, " e"]
    bias: Float[Array, " e"]
    h0: Float[Array, "b e n"]
    reset: Float[Array, "r e n"]  # r is b or 1

    @property
    def wide(self):
        """Type of the sums."""
        return self.h0.dtype


def step(
    u: Float[Array, "b e"],
    delta: Float[Array, "b e"],
    B: Float[Array, "b n"],
    C: Float[Array, "b n"],
    z: Float[Array, "b e"] | None,
    A: Float[Array, "e n"],
    D: Float[Array, " e"],
    bias: Float[Array, " e"],
    h: Float[Array, "b e n"],
) -> tuple[Float[Array, "b e"], Float[Array, "b e n"]]:
    """One token."""
    out = u.dtype
    u, delta, B, C = (x.astype(h.dtype) for x in (u, delta, B, C))
    delta = jax.nn.softplus(delta + bias)
    h = jnp.exp(delta[..., None] * A) * h + (delta * u)[..., None] * B[:, None]
    y = (h * C[:, None]).sum(-1) + D * u
    if z is not None:
        y = y * jax.nn.silu(z.astype(h.dtype))
    return y.astype(out), h


def selective_scan(inputs: Inputs) -> tuple[Float[Array, "b t e"], Float[Array, "b e n"]]:
    """All tokens one after another."""
    u, delta, B, C, z, fresh, A, D, bias, h0, reset = inputs

    def body(h, token):
        u, delta, B, C, z, fresh = token
        if fresh is not None:
            h = jnp.where(fresh[:, None, None], reset, h)
        y, h = step(u, delta, B, C, z, A, D, bias, h)
        return h, y

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (u, delta, B, C, z, fresh))
    h, y = jax.lax.scan(body, h0, tokens)
    return jnp.moveaxis(y, 0, 1), h
