"""Attention on TPUs through JAX's splash attention: Pallas kernels that skip blocks of the mask.

What can be seen by a query is told to the kernels as a range of keys, first..last, beside the
always visible ones. Ranges known while tracing decide which blocks run at all. Those that are not
(prefixes, packed segments) travel in the one integer per query that splash's mask functions get.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as infos
from jaxtyping import Array, Float

from kernels import cost
from kernels.attention.mask import MaskSpec
from kernels.errors import NotSupported

# Queries and keys of a block. By the compilers' schedules for v5e at Hymba 1.5B's shape, larger
# ones are no better under a window of 1,025 and smaller ones worse (docs/kernels.md).
BLOCK, BLOCK_IN_WINDOW = 1024, 512
# Under scales small blocks fit the staircase better and cost more for their size: bundles of one of
# each, forward and backward, for v5e at heads of 128.
BLOCKS_OF_SCALES = {512: 6068, 640: 9187, 768: 12213, 896: 16075, 1024: 19748}
LANES, RANGE_BITS = 128, 15
FEWEST = 512  # queries; a shorter row is one block of scores, which XLA does without padding


class Plan(NamedTuple):
    """What a kernel is made of, known while tracing; lengths are whole blocks."""

    queries: int
    keys: int
    rows: int
    columns: int
    spec: MaskSpec  # static fields only
    packed: bool


def attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g v"],
    mask: MaskSpec | None,
    *,
    scale: float,
    softcap: float | None,
    block: int | None = None,
    interpret: bool = False,
) -> Float[Array, "b t h v"]:
    """The reference's function, except for rows without a visible key: finite, else unspecified.

    block: queries and keys of a block, None chooses.
    """
    mask = MaskSpec(causal=False) if mask is None else mask
    _check(q, k, v, mask, 1 if interpret else FEWEST)
    b, t, h, _ = q.shape
    s, g = k.shape[1:3]
    block = block or block_of(mask, t, s)
    rows, columns = min(block, _up(t, LANES)), min(block, _up(s, LANES))
    queries, keys = _up(t, rows), _up(s, columns)
    ranges = _ranges(mask, t, s)
    known = mask.q_positions is None
    static = MaskSpec(
        causal=known and mask.causal and mask.prefix_length is None,
        window=mask.window if known else None,
        always_visible=mask.always_visible,
        query_offset=mask.query_offset,
        scales=mask.scales if known else (),
    )
    plan = Plan(queries, keys, rows, columns, static, ranges is not None)
    kernel = _kernel(plan, softcap or None, interpret)

    def lay(x, length):
        """[B, heads, length, width]: whole blocks and a width that the compiler takes."""
        width = x.shape[-1]
        more = _up(width, 8 if width < LANES else LANES) - width
        pads = ((0, 0), (0, 0), (0, length - x.shape[1]), (0, more))
        return jnp.pad(jnp.swapaxes(x, 1, 2), pads)

    arrays = (lay(q * jnp.asarray(scale, q.dtype), queries), lay(k, keys), lay(v, keys))
    if ranges is not None:
        ranges = jnp.pad(jnp.broadcast_to(ranges, (b, t)), ((0, 0), (0, queries - t)), mode="edge")
    rest = (ranges, _segments(mask, b, t, s, queries, keys))

    def rows_of(arrays, rest):
        axes = (0, 0, 0, *(None if x is None else 0 for x in rest))
        return jax.vmap(lambda q, k, v, r, ids: _with_ranges(kernel, r)(q, k, v, ids), axes)(
            *arrays, *rest
        )

    estimate = functools.partial(_estimate, plan, *(x.shape for x in arrays), q.dtype.itemsize)
    out = cost.with_estimates(rows_of, estimate)(arrays, rest)
    return jnp.swapaxes(out, 1, 2)[:, :t, :, : v.shape[-1]].astype(v.dtype)


def block_of(mask: MaskSpec, queries: int, keys: int) -> int:
    """Queries and keys of a block, where the row has as many."""
    if mask.window is not None:
        return BLOCK_IN_WINDOW
    if not mask.scales:
        return BLOCK
    costs = {n: x * len(mask.blocks(queries, keys, n, n)) for n, x in BLOCKS_OF_SCALES.items()}
    return min(costs, key=costs.get)


def _estimate(plan, q, k, v, size, name):
    """Of the blocks that run: a kernel's products, and its inputs and results once a pass."""
    _, forward, _ = _tables(plan)
    scores = q[0] * q[1] * int((forward.block_mask > 0).sum()) * plan.rows * plan.columns
    width, other = q[3], v[3]
    products = {"fwd": width + other, "dq": 2 * width + other, "dkv": 2 * (width + other)}
    read = math.prod(q) + math.prod(k) + math.prod(v)
    moved = {"fwd": read + q[0] * q[1] * q[2] * other}
    moved |= {"dq": moved["fwd"] + math.prod(q), "dkv": moved["fwd"] + math.prod(k) + math.prod(v)}
    kind = next(x for x in ("dkv", "dq", "fwd") if f"_{x}" in name)
    return pl.CostEstimate(
        flops=2 * scores * products[kind], transcendentals=scores, bytes_accessed=size * moved[kind]
    )


def _check(q, k, v, mask, fewest):
    if len({x.dtype for x in (q, k, v)}) > 1 or q.dtype not in (jnp.float32, jnp.bfloat16):
        types = ", ".join(str(x.dtype) for x in (q, k, v))
        raise NotSupported(f"splash attention takes q, k, v all float32 or bfloat16, not {types}")
    if q.shape[1] < fewest:
        raise NotSupported(f"splash attention is for {fewest} queries or more, not {q.shape[1]}")
    if mask.kv_positions is not None:
        raise NotSupported("splash attention needs keys in the order of their positions")
    if mask.q_scale_ids is not None:
        raise NotSupported("splash attention has no scale ids")
    if mask.q_segment_ids is not None:
        if not mask.contiguous:
            raise NotSupported("splash attention takes segments of a contiguous mask only")
        # Queries are the last keys: either all of them, or those behind keys that all may see.
        ahead, apart = k.shape[1] - q.shape[1], mask.kv_segment_ids is not None
        shared = apart and mask.always_visible > 0
        if mask.q_positions is not None or mask.query_offset != ahead or (apart and not shared):
            raise NotSupported("splash attention takes segments of queries that are the last keys")
        if ahead and not apart:
            raise NotSupported("splash attention needs the segment ids of all keys")
    if _is_ranged(mask) and k.shape[1] > 1 << RANGE_BITS:
        raise NotSupported(f"ranges of more than {1 << RANGE_BITS} keys do not fit one integer")
    first, last = mask.reach(q.shape[1], k.shape[1])
    if (first > last).any() and not mask.always_visible:
        raise NotSupported("splash attention needs a visible key for every query")


def _is_ranged(mask):
    shared = mask.q_segment_ids is not None and mask.always_visible > 0
    both = mask.window is not None and bool(mask.scales)
    return mask.prefix_length is not None or mask.q_positions is not None or shared or both


def _ranges(mask, t, s):
    """last << 16 | first of every query [B or 1, T] where only the arrays know; else None."""
    if not _is_ranged(mask):
        return None
    index = jnp.arange(t, dtype=jnp.int32)[None]
    position = index + mask.query_offset if mask.q_positions is None else mask.q_positions
    last = position if mask.causal else jnp.full_like(position, s - 1)
    if mask.prefix_length is not None:
        prefix = mask.prefix_length
        last = jnp.maximum(last, (prefix[:, None] if prefix.ndim == 1 else prefix) - 1)
    if mask.scales:
        last = jnp.minimum(last, mask.scale_end(position) - 1)
    last = jnp.minimum(last, s - 1)
    first = jnp.zeros_like(position)
    if mask.window is not None:
        first = jnp.clip(position - mask.window + 1, 0, s)
    if mask.q_segment_ids is not None:
        ids = mask.q_segment_ids if mask.kv_segment_ids is None else mask.kv_segment_ids
        changes = jnp.diff(ids, axis=1, prepend=ids[:, :1]) != 0
        starts = jax.lax.cummax(jnp.where(changes, jnp.arange(s, dtype=jnp.int32), 0), axis=1)
        first = jnp.maximum(first, starts[:, s - t :])
    return last << 16 | first


def _segments(mask, b, t, s, queries, keys):
    """splash's ids, which hide a key by being unequal; None where nothing is to be hidden."""
    segmented = mask.q_segment_ids is not None and not mask.always_visible
    hidden = _is_ranged(mask) or (mask.reach(t, keys)[1] < s).all()
    if mask.kv_valid is None and not segmented and hidden:
        return None
    q = kv = jnp.zeros((b, t), jnp.int32)
    if segmented:
        # Counted along the row, so that no id is negative.
        ids = mask.q_segment_ids
        q = kv = jnp.cumsum(jnp.diff(ids, axis=1, prepend=ids[:, :1]) != 0, axis=1, dtype=jnp.int32)
    else:
        kv = jnp.zeros((b, s), jnp.int32)
    if mask.kv_valid is not None:
        kv = jnp.where(mask.kv_valid, kv, -1)
    q = jnp.pad(q, ((0, 0), (0, queries - t)), mode="edge")
    kv = jnp.pad(kv, ((0, 0), (0, keys - s)), constant_values=-1)
    return splash.SegmentIds(q, kv)


class _Ranges(masks.Mask):
    """The part of a mask that is known while tracing, in splash's terms."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.q_sequence = np.arange(plan.queries, dtype=np.int32)
        self.mask_function = _rule(plan.spec)
        if plan.packed:
            self.mask_function = _packed_rule(plan.spec)
        elif plan.spec.scales:
            self.q_sequence = plan.spec.reach(*self.shape)[1].astype(np.int32)
            self.mask_function = _up_to

    @property
    def shape(self):
        return self.plan.queries, self.plan.keys

    def __getitem__(self, index):
        rows, columns = (np.arange(n, dtype=np.int32)[i] for n, i in zip(self.shape, index))
        visible = _rule(self.plan.spec)(rows[:, None], columns[None, :])
        return np.broadcast_to(visible, (rows.size, columns.size))


@functools.cache
def _rule(spec):
    """(query, key) -> visible, of row-wise positions."""

    def rule(q, k):
        q = q + spec.query_offset if spec.query_offset else q
        visible = (k <= q) if spec.causal else (k >= 0)
        if spec.window is not None:
            near = q - k < spec.window
            near = near | (k < spec.always_visible) if spec.always_visible else near
            visible = visible & near
        if spec.scales:
            visible = visible & (k < spec.scale_end(q))
        return visible

    return rule


def _up_to(last, k):
    """The same of a query's last key: cheaper than to look up where a query's scale ends."""
    return k <= last


@functools.cache
def _packed_rule(spec):
    """The same of last << 16 | first."""

    def rule(q, k):
        return (k <= (q >> 16)) & ((k >= (q & 0xFFFF)) | (k < spec.always_visible))

    return rule


@functools.lru_cache(maxsize=64)
def _tables(plan):
    """(mask function, splash's three tables of blocks), as NumPy arrays."""
    whole, sizes = masks.MultiHeadMask([_Ranges(plan)]), (plan.rows, plan.columns)
    options = dict(head_shards=1, q_seq_shards=1)
    forward, rule = infos.process_mask(whole, sizes, **options)
    backward, _ = infos.process_mask_dkv(whole, sizes, **options)
    return rule, forward, backward


def _kernel(plan, softcap, interpret):
    rule, forward, backward = _tables(plan)
    rows, columns = plan.rows, plan.columns
    sizes = splash.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_q_dq=rows,
        block_kv_dq=columns,
    )
    return splash.SplashAttentionKernel(
        forward,
        forward,
        backward,
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=None,
        mask_function=rule,
        interpret=interpret,
    )


def _with_ranges(kernel, ranges):
    if ranges is None:
        return kernel
    tables = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
    return splash.SplashAttentionKernel(
        *(x._replace(q_sequence=ranges) for x in tables), **kernel.kwargs
    )


def _up(size, multiple):
    return -(-size // multiple) * multiple
