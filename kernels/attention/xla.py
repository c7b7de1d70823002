"""Attention in plain XLA: grouped heads without repeating keys, long rows in blocks.

Short rows are one block. Long ones go through the blocks of queries and keys that the mask can
reach, one after another, with a running maximum and sum (the softmax of flash attention), so no
more than one block of scores exists at a time. The gradient is written: it keeps q, k, v, the
result and two numbers per query, and computes each block's scores again.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import dispatch
from kernels.attention.mask import MASKED, MaskSpec

# Up to this many scores per head and row ([T, S]) are one block.
PLAIN_LIMIT, PLAIN_LIMIT_CPU = 1024 * 1024, 640 * 640
# Queries and keys of a block; where the mask is a staircase smaller blocks of keys skip more.
ROWS, COLUMNS, COLUMNS_OF_SCALES, COLUMNS_IN_WINDOW = 256, 1024, 512, 256
# A CPU's blocks stay in its cache: all heads' scores of one are this many bytes if they can.
ROWS_CPU, COLUMNS_CPU, CACHE = 128, (256, 128), 2 * 2**20


class Tiles(NamedTuple):
    """How a call is cut, and its options."""

    rows: int
    columns: int
    queries: int
    keys: int
    scale: float
    softcap: float | None


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
    """The reference's function; chunk: queries and keys of a block, None chooses."""
    queries, keys = q.shape[1], k.shape[1]
    if chunk is None:
        rows, columns, limit = _sizes(q, mask)
        whole = queries == 1 or queries * keys <= limit
        rows, columns = min(rows, queries), min(columns, keys)
    else:
        whole = chunk >= max(queries, keys)
        rows, columns = min(chunk, queries), min(chunk, keys)
    if whole:
        return _block(q, k, v, mask, scale=scale, softcap=softcap)
    mask = MaskSpec(causal=False) if mask is None else mask
    return _tiled(q, k, v, mask, Tiles(rows, columns, queries, keys, scale, softcap))


def _sizes(q, mask) -> tuple[int, int, int]:
    """(queries of a block, its keys, scores that are still one block)."""
    if dispatch.platform() == "cpu":
        wide, narrow = COLUMNS_CPU
        scores = q.shape[0] * q.shape[2] * ROWS_CPU * wide * 4
        return ROWS_CPU, wide if scores <= CACHE else narrow, PLAIN_LIMIT_CPU
    columns = COLUMNS_OF_SCALES if mask is not None and mask.scales else COLUMNS
    if mask is not None and mask.window is not None:
        columns = COLUMNS_IN_WINDOW
    return ROWS, columns, PLAIN_LIMIT


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


def _tiled(q, k, v, mask, tiles):
    """Heads first, lengths padded to whole blocks."""
    b, t, h, d = q.shape
    s, g = k.shape[1:3]

    def first(x, block):
        heads = jnp.moveaxis(x, 1, -2)
        rest = -x.shape[1] % block
        return jnp.pad(heads, [(0, 0)] * (heads.ndim - 2) + [(0, rest), (0, 0)])

    q = first(q.reshape(b, t, g, h // g, d), tiles.rows)
    k, v = first(k, tiles.columns), first(v, tiles.columns)
    mask = mask.padded(q.shape[-2], k.shape[-2])
    out = _flash(q, k, v, mask, tiles)[..., :t, :]
    return jnp.moveaxis(out, -2, 1).reshape(b, t, h, v.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q, k, v, mask, tiles):
    """q [B, G, R, T, K], k [B, G, S, K], v [B, G, S, V] -> [B, G, R, T, V]."""
    return _forward(q, k, v, mask, tiles)[0]


def _forward(q, k, v, mask, tiles):
    """The result, and each query's maximum and sum of exponentials."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    start = (
        jnp.full(q.shape[:-1], -jnp.inf, wide),
        jnp.zeros(q.shape[:-1], wide),
        jnp.zeros((*q.shape[:-1], v.shape[-1]), wide),
    )

    def body(carry, pair):
        at = i, j = pair[0] * tiles.rows, pair[1] * tiles.columns
        own = lambda x, axis=-2: _merge(_cut(x, i, tiles.rows, axis))  # noqa: E731
        keys = functools.partial(_cut, start=j, size=tiles.columns)
        scores = _dot("bgxd,bgkd->bgxk", own(q), keys(k)) * tiles.scale
        scores, _ = _masked(scores, mask, tiles, at, 2)
        top, total, sums = own(carry[0], -1), own(carry[1], -1), own(carry[2])
        higher = jnp.maximum(top, scores.max(-1))
        weights, kept = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
        total = kept * total + weights.sum(-1)
        added = _dot("bgxk,bgkv->bgxv", weights.astype(v.dtype), keys(v))
        new = zip(carry, (higher, total, kept[..., None] * sums + added), (-1, -1, -2))
        return tuple(_put(x, y, i, tiles.rows, axis) for x, y, axis in new), None

    (top, total, sums), _ = jax.lax.scan(body, start, _pairs(mask, tiles))
    return (sums / total[..., None]).astype(v.dtype), top, total


def _flash_forward(q, k, v, mask, tiles):
    out, top, total = _forward(q, k, v, mask, tiles)
    return out, (q, k, v, mask, out, top, total)


def _flash_backward(tiles, kept, d_out):
    """One pass over the same blocks; sums in float32.

    Keys come first in a block: of its three products only dq's needs the transposed scores.
    """
    q, k, v, mask, out, top, total = kept
    wide = top.dtype
    mean = (out.astype(wide) * d_out.astype(wide)).sum(-1)  # of the weights' gradient
    share = 1 / total
    # Where a query sees nothing it averages over all keys, and no score has a gradient.
    scale = jnp.where(top > MASKED / 2, tiles.scale, 0.0)
    start = tuple(jnp.zeros(x.shape, wide) for x in (q, k, v))

    def body(carry, pair):
        at = i, j = pair[0] * tiles.rows, pair[1] * tiles.columns
        own = lambda x: _merge(_cut(x, i, tiles.rows))  # noqa: E731
        row = lambda x: _merge(_cut(x, i, tiles.rows, -1))[:, :, None]  # noqa: E731
        keys = functools.partial(_cut, start=j, size=tiles.columns)
        qi, kj, vj, d = own(q), keys(k), keys(v), own(d_out)
        scores = _dot("bgkd,bgxd->bgkx", kj, qi) * tiles.scale
        scores, slope = _masked(scores, mask, tiles, at, 3)
        weights = jnp.exp(scores - row(top)) * row(share)
        d_v = _dot("bgkx,bgxv->bgkv", weights.astype(v.dtype), d)
        d_weights = _dot("bgkv,bgxv->bgkx", vj, d)
        d_scores = weights * (d_weights - row(mean)) * row(scale)
        d_scores = (d_scores if slope is None else d_scores * slope).astype(q.dtype)
        d_q = own(carry[0]) + _dot("bgkx,bgkd->bgxd", d_scores, kj)
        d_k = keys(carry[1]) + _dot("bgkx,bgxd->bgkd", d_scores, qi)
        d_v += keys(carry[2])
        d_k, d_v = (_put(x, y, j, tiles.columns) for x, y in zip(carry[1:], (d_k, d_v)))
        return (_put(carry[0], d_q, i, tiles.rows), d_k, d_v), None

    grads, _ = jax.lax.scan(body, start, _pairs(mask, tiles))
    return *(g.astype(x.dtype) for g, x in zip(grads, (q, k, v))), None


_flash.defvjp(_flash_forward, _flash_backward)


def _masked(scores, mask, tiles, at, rows_axis: int):
    """(capped and masked scores of a block, their slope in scale q kᵀ or None without a cap).

    scores: 4 axes, of them `rows_axis` (2 or 3) the heads of a group times the block's queries, the
    other one its keys.
    """
    slope = None
    if tiles.softcap:
        bent = jnp.tanh(scores / tiles.softcap)
        scores, slope = tiles.softcap * bent, 1 - bent * bent
    (i, j), shape = at, scores.shape
    visible = mask.block((i, tiles.rows), (j, tiles.columns)).dense(tiles.rows, tiles.columns)
    visible = visible if rows_axis == 2 else jnp.swapaxes(visible, -1, -2)
    visible = jnp.expand_dims(visible[:, None], rows_axis)  # all heads see the same
    cut = scores.reshape(*shape[:rows_axis], -1, tiles.rows, *shape[rows_axis + 1 :])
    scores = jnp.where(visible, cut, MASKED).reshape(shape)
    if tiles.keys % tiles.columns:  # keys of the padding do not even count in an average
        real = j + jnp.arange(tiles.columns) < tiles.keys
        scores = jnp.where(real if rows_axis == 2 else real[:, None], scores, -jnp.inf)
    return scores, slope


def _dot(equation, a, b):
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.einsum(equation, a, b, preferred_element_type=wide)


def _pairs(mask, tiles):
    return jnp.asarray(mask.blocks(tiles.queries, tiles.keys, tiles.rows, tiles.columns), jnp.int32)


def _cut(x, start, size, axis=-2):
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis % x.ndim)


def _merge(x):
    """The heads of a group and the queries of a block as one axis, so that products over both need
    no transposed copy."""
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _put(x, part, start, size, axis=-2):
    part = part.reshape(*x.shape[: axis % x.ndim], size, *x.shape[axis % x.ndim + 1 :])
    return jax.lax.dynamic_update_slice_in_dim(x, part, start, axis % x.ndim)
