"""Attention on GPUs through cuDNN's flash attention, as `jax.nn.dot_product_attention` calls it.

Scales need no mask: each is one call of its queries with the keys up to its end. The first ones,
too short for that, are left to XLA together.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kernels.attention import xla
from kernels.attention.mask import MaskSpec
from kernels.errors import NotSupported

FEWEST = 512  # queries; a shorter row is one block of scores
WIDEST = 256  # head size


def attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g v"],
    mask: MaskSpec | None,
    *,
    scale: float,
    softcap: float | None,
    library: str = "cudnn",
) -> Float[Array, "b t h v"]:
    """The reference's function.

    library: "xla" makes the same call without cuDNN, for tests.
    """
    mask = MaskSpec(causal=False) if mask is None else mask
    _check(q, k, v, mask, softcap)
    run = functools.partial(_call, mask, scale, library)
    if not mask.scales:
        return run(q, k, v)
    few = functools.partial(xla.attention, scale=scale, softcap=None)
    return _by_scale(run, few, q, k, v, mask)


def _call(mask, scale, library, q, k, v):
    """cuDNN wants one width and, for gradients, even lengths."""
    width, lengths = max(q.shape[-1], v.shape[-1]), {}

    def pad(x):
        return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, width - x.shape[-1])))

    if q.shape[1] % 2 or k.shape[1] % 2:
        each = lambda x: jnp.full(len(x), x.shape[1], jnp.int32)  # noqa: E731
        lengths = dict(query_seq_lengths=each(q), key_value_seq_lengths=each(k))
    try:
        out = jax.nn.dot_product_attention(
            *map(pad, (q, k, v)),
            scale=scale,
            is_causal=mask.causal,
            # The window counts the query itself, cuDNN's left side does not.
            local_window_size=None if mask.window is None else (mask.window - 1, 0),
            implementation=library,
            **lengths,
        )
    except RuntimeError as error:  # a shape that cuDNN refuses, or no cuDNN here
        raise NotSupported(f"cuDNN: {error}") from error
    return out[:, : q.shape[1], :, : v.shape[-1]].astype(v.dtype)


def _by_scale(run, few, q, k, v, mask):
    """run(q, k, v) for FEWEST queries or more that see the same keys, few(q, k, v, mask) for those
    between them."""
    seen = mask.reach(q.shape[1], k.shape[1])[1] + 1
    parts, done = [], 0

    def left_over(stop):
        if done < stop:
            rest = dataclasses.replace(mask, query_offset=mask.query_offset + done)
            keys = (x[:, : seen[stop - 1]] for x in (k, v))
            parts.append(few(q[:, done:stop], *keys, rest))

    stops = [*(np.flatnonzero(np.diff(seen)) + 1).tolist(), len(seen)]
    for start, stop in zip([0, *stops], stops):
        if stop - start >= FEWEST:
            left_over(start)
            parts.append(run(q[:, start:stop], *(x[:, : seen[start]] for x in (k, v))))
            done = stop
    if not done:
        raise NotSupported(f"cuDNN is for {FEWEST} queries or more of a scale")
    left_over(len(seen))
    return jnp.concatenate(parts, axis=1)


def _check(q, k, v, mask, softcap):
    types = {x.dtype for x in (q, k, v)}
    if len(types) > 1 or q.dtype not in (jnp.bfloat16, jnp.float16):
        names = ", ".join(str(x.dtype) for x in (q, k, v))
        raise NotSupported(f"cuDNN takes q, k, v all bfloat16 or float16, not {names}")
    width = max(q.shape[-1], v.shape[-1])
    if width % 8 or width > WIDEST:
        raise NotSupported(f"cuDNN takes heads of a multiple of 8 up to {WIDEST}, not {width}")
    if q.shape[1] < FEWEST:
        raise NotSupported(f"cuDNN is for {FEWEST} queries or more, not {q.shape[1]}")
    if softcap:
        raise NotSupported("cuDNN has no soft-cap")
    if mask.window is not None and (mask.always_visible or not mask.causal):
        raise NotSupported("cuDNN takes windows that are causal and without always visible keys")
    if jax.tree.leaves(mask):
        raise NotSupported("cuDNN takes no prefix, positions, segment ids, valid keys or scale ids")
    if mask.scales and (mask.causal or mask.window is not None):
        raise NotSupported("cuDNN takes scales alone, neither causal nor in a window")
    if mask.causal and (mask.query_offset or q.shape[1] != k.shape[1]):
        raise NotSupported("cuDNN's causal mask takes as many queries as keys")
