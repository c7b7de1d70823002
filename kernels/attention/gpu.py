"""Attention on GPUs through cuDNN's flash attention, as `jax.nn.dot_product_attention` calls it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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
    """The reference's function. cuDNN wants one width: narrower keys or values gain zeros.

    library: "xla" makes the same call without cuDNN, for tests.
    """
    mask = MaskSpec(causal=False) if mask is None else mask
    _check(q, k, v, mask, softcap)
    width = max(q.shape[-1], v.shape[-1])
    wide = [jnp.pad(x, ((0, 0),) * 3 + ((0, width - x.shape[-1]),)) for x in (q, k, v)]
    try:
        out = jax.nn.dot_product_attention(
            *wide,
            scale=scale,
            is_causal=mask.causal,
            # The window counts the query itself, cuDNN's left side does not.
            local_window_size=None if mask.window is None else (mask.window - 1, 0),
            implementation=library,
        )
    except RuntimeError as error:  # a shape that cuDNN refuses, or no cuDNN here
        raise NotSupported(f"cuDNN: {error}") from error
    return out[..., : v.shape[-1]].astype(v.dtype)


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
    if jax.tree.leaves(mask) or mask.scales:
        raise NotSupported("cuDNN takes no prefix, positions, segment ids, valid keys or scales")
    if mask.causal and (mask.query_offset or q.shape[1] != k.shape[1]):
        raise NotSupported("cuDNN's causal mask takes as many queries as keys")
