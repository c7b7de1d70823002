"""SSD step by step: the definition (Mamba-2, arXiv 2405.21060, section 2).

    h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_tᵀ      [P, N] per head; Δ_t and A are one number each
    y_t = h_t C_t + D x_t                        times silu(z_t) where there is a gate

H / G neighbouring heads share B and C. Δ is the step behind softplus, 0 for masked tokens. A
document starts from h = 0 where its number changes.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def step(
    x: Float[Array, "b h p"],
    delta: Float[Array, "b h"],
    A: Float[Array, " h"],
    B: Float[Array, "b g n"],
    C: Float[Array, "b g n"],
    D: Float[Array, " h"],
    z: Float[Array, "b h p"] | None,
    h: Float[Array, "b h p n"],
) -> tuple[Float[Array, "b h p"], Float[Array, "b h p n"]]:
    """One token."""
    out, wide, heads = x.dtype, h.dtype, x.shape[1]
    x, delta, A, B, C, D = (a.astype(wide) for a in (x, delta, A, B, C, D))
    B, C = (jnp.repeat(a, heads // a.shape[1], axis=1) for a in (B, C))
    keep = jnp.exp(delta * A)
    h = keep[..., None, None] * h + (delta[..., None] * x)[..., None] * B[:, :, None]
    y = (h * C[:, :, None]).sum(-1) + D[:, None] * x
    if z is not None:
        y = y * jax.nn.silu(z.astype(wide))
    return y.astype(out), h


def ssd(
    x: Float[Array, "b t h p"],
    delta: Float[Array, "b t h"],
    A: Float[Array, " h"],
    B: Float[Array, "b t g n"],
    C: Float[Array, "b t g n"],
    D: Float[Array, " h"],
    z: Float[Array, "b t h p"] | None,
    h: Float[Array, "b h p n"],
    documents: Int[Array, "b t"] | None,
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h p n"]]:
    """All tokens one after another; `documents` are counted from the state's, which is 0."""
    fresh = None
    if documents is not None:
        fresh = jnp.diff(documents, axis=1, prepend=jnp.zeros_like(documents[:, :1])) != 0

    def body(h, token):
        x, delta, B, C, z, fresh = token
        if fresh is not None:
            h = jnp.where(fresh[:, None, None, None], 0.0, h)
        y, h = step(x, delta, A, B, C, D, z, h)
        return h, y

    tokens = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (x, delta, B, C, z, fresh))
    h, y = jax.lax.scan(body, h, tokens)
    return jnp.moveaxis(y, 0, 1), h
