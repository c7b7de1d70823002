"""Attention as the textbook writes it: dense, one head at a time in spirit, all in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.attention.mask import MASKED, MaskSpec


def attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g v"],
    mask: MaskSpec | None,
    *,
    scale: float,
    softcap: float | None,
) -> Float[Array, "b t h v"]:
    """softmax(mask(softcap(q kᵀ scale))) v; query head n reads key/value head n // (H / G)."""
    group = q.shape[2] // k.shape[2]
    k = jnp.repeat(k.astype(jnp.float32), group, axis=2)
    v32 = jnp.repeat(v.astype(jnp.float32), group, axis=2)
    scores = jnp.einsum("bthk,bshk->bhts", q.astype(jnp.float32), k) * scale
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    if mask is not None:
        visible = mask.dense(q.shape[1], k.shape[1])[:, None]
        scores = jnp.where(visible, scores, MASKED)
    return jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(scores, axis=-1), v32).astype(v.dtype)
