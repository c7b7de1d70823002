"""Attention along a row that several devices share (context parallel), inside shard_map.

Under a causal window of no more than a device's own tokens, a device needs the last window - 1 keys
of its left neighbour and the always visible ones of the first device: two small messages. Its keys
are then [always visible | neighbour's | own], where every position but a constant is as before, so
the implementation skips the same blocks as on one device. Any other mask gathers all keys and
values. Where keys lie before the row's own (meta tokens: more keys than queries), every device has
all keys and takes those that its queries can reach. Gradients are autodiff of these lines: they go
back the way the keys came.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.attention import xla
from kernels.attention.mask import MaskSpec

OF_KEYS = ("kv_segment_ids", "kv_positions", "kv_scale_ids", "kv_valid")


def along(
    axis: str | tuple[str, ...],
    run: Callable,
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t g v"],
    mask: MaskSpec | None,
    **options,
) -> Float[Array, "b t h v"]:
    """This device's queries against the whole row's keys; run(q, k, v, mask, **options) is what one
    device does.

    q, k, v and the mask's arrays are this device's part of the row; as many queries as keys.
    """
    run = functools.partial(run, **options)
    mask = MaskSpec(causal=False) if mask is None else mask
    if mask.q_segment_ids is not None and mask.kv_segment_ids is None:
        mask = dataclasses.replace(mask, kv_segment_ids=mask.q_segment_ids)
    if mask.q_scale_ids is not None and mask.kv_scale_ids is None:
        mask = dataclasses.replace(mask, kv_scale_ids=mask.q_scale_ids)
    if _has_neighbours_only(mask, q.shape[1]):
        few = functools.partial(xla.attention, **options)
        return _with_neighbour(axis, run, few, q, k, v, mask)
    return _with_all(axis, run, q, k, v, mask)


def _has_neighbours_only(mask, tokens):
    known = mask.q_positions is None and mask.kv_positions is None and mask.query_offset == 0
    near = mask.causal and mask.prefix_length is None and mask.window is not None
    near = near and not mask.scales
    return known and near and mask.window - 1 <= tokens and mask.always_visible <= tokens


def _with_all(axis, run, q, k, v, mask):
    """Every key on every device; positions of the queries become arrays."""

    def gather(x, at=1):
        return jax.lax.all_gather(x, axis, axis=at, tiled=True)

    tokens = q.shape[1]
    positions = mask.q_positions
    if positions is None:
        start = jax.lax.axis_index(axis) * tokens + mask.query_offset
        positions = jnp.broadcast_to(start + jnp.arange(tokens, dtype=jnp.int32), q.shape[:2])
    mask = _replace(mask, OF_KEYS, gather)
    mask = dataclasses.replace(mask, q_positions=positions, query_offset=0)
    return run(q, gather(k), gather(v), mask)


def _with_neighbour(axis, run, few, q, k, v, mask):
    tokens, pinned, reach = q.shape[1], mask.always_visible, mask.window - 1
    index, size = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    forward = [(i, i + 1) for i in range(size - 1)]

    def extend(x):
        """[first device's first | left neighbour's last | own]; zeros left of the row."""
        near = jax.lax.ppermute(x[:, tokens - reach :], axis, forward)
        first = jnp.where(index == 0, x[:, :pinned], jnp.zeros_like(x[:, :pinned]))
        first = jax.lax.psum(first.astype(jnp.int32) if x.dtype == bool else first, axis)
        return jnp.concatenate([first.astype(x.dtype), near, x], axis=1)

    position = index * tokens + jnp.arange(-reach, tokens)
    real = jnp.concatenate([jnp.ones(pinned, bool), position >= pinned])  # each key once
    wider = _replace(mask, OF_KEYS, extend)
    valid = jnp.broadcast_to(real, (q.shape[0], real.size))
    valid = valid if wider.kv_valid is None else valid & wider.kv_valid
    wider = dataclasses.replace(wider, kv_valid=valid, query_offset=pinned + reach)
    out = run(q, extend(k), extend(v), wider)
    if not pinned:
        return out
    # The always visible tokens' own queries must not see those behind them: done apart.
    own = mask.block((0, pinned), (0, pinned))
    head = few(q[:, :pinned], k[:, :pinned], v[:, :pinned], own)
    return out.at[:, :pinned].set(jnp.where(index == 0, head, out[:, :pinned]))


def is_behind(mask: MaskSpec | None, ahead: int) -> bool:
    """Whether the row starts behind `ahead` keys that all of it sees."""
    if mask is None or not mask.causal or mask.scales or ahead <= 0:
        return False
    others = (mask.prefix_length, mask.q_positions, mask.kv_positions, mask.q_scale_ids)
    return mask.query_offset == mask.always_visible == ahead and all(x is None for x in others)


def behind(
    axis: str | tuple[str, ...],
    run: Callable,
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g v"],
    mask: MaskSpec,
    **options,
) -> Float[Array, "b t h v"]:
    """This device's queries of a row that `is_behind`, against all keys, which it has."""
    tokens, ahead = q.shape[1], mask.always_visible
    start = jax.lax.axis_index(axis) * tokens
    if mask.window is None:
        positions = ahead + start + jnp.arange(tokens, dtype=jnp.int32)
        positions = jnp.broadcast_to(positions, q.shape[:2])
        return run(
            q, k, v, dataclasses.replace(mask, q_positions=positions, query_offset=0), **options
        )
    reach = min(mask.window - 1, k.shape[1] - ahead)

    def near(x):
        """[always visible | `reach` keys before the device's own | own]; zeros left of the row."""
        row = jnp.pad(x[:, ahead:], ((0, 0), (reach, 0), *((0, 0),) * (x.ndim - 2)))
        row = jax.lax.dynamic_slice_in_dim(row, start, reach + tokens, axis=1)
        return jnp.concatenate([x[:, :ahead], row], axis=1)

    real = jnp.concatenate([jnp.ones(ahead, bool), start + jnp.arange(-reach, tokens) >= 0])
    nearer = _replace(mask, OF_KEYS, near)
    valid = jnp.broadcast_to(real, (q.shape[0], real.size))
    valid = valid if nearer.kv_valid is None else valid & nearer.kv_valid
    nearer = dataclasses.replace(nearer, kv_valid=valid, query_offset=ahead + reach)
    return run(q, near(k), near(v), nearer, **options)


def _replace(mask, names, change):
    arrays = {name: getattr(mask, name) for name in names}
    return dataclasses.replace(mask, **{n: change(x) for n, x in arrays.items() if x is not None})
