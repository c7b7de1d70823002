"""Attention in plain XLA: grouped heads without repeating keys, long queries in chunks."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.attention.mask import MASKED, MaskSpec

# Above this many scores per head and row ([T, S]) the queries are cut into chunks of CHUNK.
PLAIN_LIMIT = 1024 * 1024
CHUNK = 256


def attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g v"],
    mask: MaskSpec | None,
    *,
    scale: float,
    softcap: float | None,
    chunk: int | None = None,
) -> Float[Array, "b t h v"]:
    """The reference's function; chunk=None chooses between one block and chunks of queries."""
    length = q.shape[1]
    if chunk is None:
        chunk = length if length * k.shape[1] <= PLAIN_LIMIT else CHUNK
    if chunk >= length:
        return _block(q, k, v, mask, scale=scale, softcap=softcap)
    return _chunked(q, k, v, mask, scale=scale, softcap=softcap, chunk=chunk)


def _block(q, k, v, mask, *, scale, softcap):
    """All queries at once; scores are [B, G, H/G, T, S] in float32; the cap precedes the mask.

    Heads go first by hand: left to einsum, the scores themselves would be transposed.
    """
    b, t, h, d = q.shape
    s, g = k.shape[1:3]
    r = h // g
    q = q.reshape(b, t, g, r, d).transpose(0, 2, 3, 1, 4).reshape(b, g, r * t, d)
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    scores = jnp.einsum("bgqd,bgsd->bgqs", q, k, preferred_element_type=jnp.float32) * scale
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    if mask is not None:
        visible = mask.dense(t, s)[:, None, None]
        scores = jnp.where(visible, scores.reshape(b, g, r, t, s), MASKED).reshape(b, g, r * t, s)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bgqs,bgsv->bgqv", weights, v, preferred_element_type=jnp.float32)
    out = out.astype(v.dtype).reshape(b, g, r, t, v.shape[-1])
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, h, v.shape[-1])


def _chunked(q, k, v, mask, *, scale, softcap, chunk):
    """One chunk of queries at a time; the backward pass recomputes each chunk's scores."""
    length = q.shape[1]
    mask = MaskSpec(causal=False) if mask is None else mask

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(start):
        rows = jax.lax.dynamic_slice_in_dim(q, start, chunk, axis=1)
        return _block(rows, k, v, mask.rows(start, chunk, length), scale=scale, softcap=softcap)

    whole = length // chunk
    starts = jnp.arange(whole, dtype=jnp.int32) * chunk
    out = jax.lax.map(one, starts)  # [n, B, chunk, H, V]
    out = jnp.moveaxis(out, 0, 1).reshape(q.shape[0], whole * chunk, q.shape[2], v.shape[-1])
    rest = length - whole * chunk
    if rest:
        rows = mask.rows(whole * chunk, rest, length)
        tail = _block(q[:, whole * chunk :], k, v, rows, scale=scale, softcap=softcap)
        out = jnp.concatenate([out, tail], axis=1)
    return out
