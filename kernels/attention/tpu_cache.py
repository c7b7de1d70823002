"""One token per row into a cache on TPUs: the tile that holds a row's slot is read and written.

XLA makes a loop over rows of a scatter, one after the other. Here the copies of many rows are under
way at once. The cache stays in HBM, in the layout that XLA gives arrays of its shape: the last axis
in the lanes where it is whole lanes, else the slots, as that pads less (docs/kernels.md).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels.errors import NotSupported

LANES, SUBLANES = 128, 16
BYTES = 8 * 2**20  # of VMEM for the tiles of the rows under way


class Plan(NamedTuple):
    """What the kernel is made of."""

    across: bool  # slots in the lanes
    tile: tuple[int, int, int]  # of one row, all its heads
    block: int  # rows of a grid step; a power of two, so that `_by_lanes` has them in one block
    moved: int  # bytes of a tile


def write_slots(
    cache: Float[Array, "n b g s k"],
    layer: Int[Array, ""],
    new: Float[Array, "b 1 g k"],
    slots: Int[Array, "b 1"],
    *,
    interpret: bool = False,
) -> Float[Array, "n b g s k"]:
    """For float32 and bfloat16, one token per row, slots and widths of whole tiles."""
    made = plan(cache.shape, cache.dtype)
    _check(cache, slots, made)
    if made.across:
        # The same bytes to XLA, whose layout of such an array has the slots last already.
        turned = _call(made, jnp.swapaxes(cache, 3, 4), layer, _by_lanes(new), slots, interpret)
        return jnp.swapaxes(turned, 3, 4)
    return _call(made, cache, layer, _by_rows(new), slots, interpret)


def plan(shape: tuple[int, ...], dtype) -> Plan:
    """Of a cache [n, B, G, S, K]."""
    rows, heads, _, width = shape[1:]
    across = width % LANES != 0
    tile = (heads, width, LANES) if across else (heads, SUBLANES, width)
    moved = math.prod(tile) * jnp.dtype(dtype).itemsize
    half = (1 << (rows - 1).bit_length()) // 2  # two grid steps at least, for chips with two cores
    fit = max(min(BYTES // moved, LANES, half), 1)
    return Plan(across, tile, 1 << (fit.bit_length() - 1), moved)


def _check(cache, slots, made):
    size, width = cache.shape[3:]
    if cache.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotSupported(f"write_slots on TPU takes float32 or bfloat16, not {cache.dtype}")
    if slots.shape[1] != 1:
        raise NotSupported(f"write_slots on TPU takes one token per row, not {slots.shape[1]}")
    if made.across and (width > LANES or width % SUBLANES):
        raise NotSupported(f"write_slots on TPU: a width of {width} is not whole tiles")
    if size % (LANES if made.across else SUBLANES):
        raise NotSupported(f"write_slots on TPU: {size} slots of width {width} are not whole tiles")


def _by_lanes(new):
    """[blocks of 128 rows, G, K, row]: a token stands in a column, as in the cache; bfloat16 two in
    a word, [..., K/2, row]."""
    new = new[:, 0]
    if new.dtype.itemsize == 2:
        pairs = _bits(new).reshape(*new.shape[:2], -1, 2)
        new = jax.lax.bitcast_convert_type(pairs, jnp.int32)
    new = jnp.pad(new, ((0, -len(new) % LANES), (0, 0), (0, 0)))
    return jnp.moveaxis(new.reshape(-1, LANES, *new.shape[1:]), 1, 3)


def _by_rows(new):
    """[B, G, K]; bfloat16 as int32, the bits of a number lowest."""
    new = new[:, 0]
    return _bits(new).astype(jnp.int32) if new.dtype.itemsize == 2 else new


def _bits(new):
    # At once, as XLA may compute with bfloat16 that it moves: a CPU flushes small ones.
    return jax.lax.bitcast_convert_type(new, jnp.uint16)


def _call(made, cache, layer, new, slots, interpret):
    rows, block = cache.shape[1], made.block
    if made.across:
        tokens = pl.BlockSpec((None, *new.shape[1:]), lambda i, *_: (i * block // LANES, 0, 0, 0))
    else:
        tokens = pl.BlockSpec((block, *new.shape[1:]), lambda i, *_: (i, 0, 0))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(_kernel, made.across, block, rows),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(rows, block),),
            in_specs=[tokens, anywhere],
            out_specs=anywhere,
            scratch_shapes=[
                pltpu.VMEM((block, *made.tile), cache.dtype),
                pltpu.SemaphoreType.DMA((block,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(cache.shape, cache.dtype),
        input_output_aliases={3: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), disable_bounds_checks=True
        ),
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=2 * rows * made.moved + new.nbytes
        ),
        interpret=interpret,
        name="write_slots",
    )(layer[None], slots[:, 0].astype(jnp.int32), new, cache)


def _kernel(across, block, rows, layer, slots, new, _, cache, tiles, semaphores):
    """A block of rows: all tiles are asked for, then changed and sent back as they come in."""
    first = pl.program_id(0) * block
    count = jnp.minimum(block, rows - first)
    size = LANES if across else SUBLANES
    total = cache.shape[4 if across else 3]
    # Two bfloat16 below each other make a word.
    words = tiles.bitcast(jnp.int32) if tiles.dtype == jnp.bfloat16 else tiles

    def start(row):
        """First slot of a row's tile; where nothing is to be written, of one that it has."""
        slot = jnp.clip(slots[first + row], 0, total - 1)
        return pl.multiple_of(slot // size * size, size)

    def copy(row, back):
        part = pl.ds(start(row), size)
        part = (slice(None), slice(None), part) if across else (slice(None), part, slice(None))
        stored = cache.at[(layer[0], first + row, *part)]
        ends = (tiles.at[row], stored) if back else (stored, tiles.at[row])
        return pltpu.make_async_copy(*ends, semaphores.at[row])

    def change(row):
        copy(row, False).wait()
        inside = slots[first + row] - start(row)
        (_column if across else _line)(words.at[row], new, first, row, inside)
        copy(row, True).start()

    def each(function):
        jax.lax.fori_loop(0, count, lambda row, _: function(row), None)

    each(lambda row: copy(row, False).start())
    each(change)
    each(lambda row: copy(row, True).wait())


def _column(tile, new, first, row, inside):
    """[G, K, slots] with a token, which stands in the row's lane of `new`, in the slot's."""
    token = pltpu.roll(new[...], (inside - first - row) & (LANES - 1), axis=2)
    lane = jax.lax.broadcasted_iota(jnp.int32, token.shape, 2)
    tile[...] = jnp.where(lane == inside, token, tile[...])


def _line(tile, new, first, row, inside):
    """[G, slots, K] with a token; two bfloat16 of neighbouring slots share a word."""
    old = tile[...]
    token, each = new[row][:, None], SUBLANES // old.shape[1]
    if each == 2:
        shift = inside % 2 * 16
        token = old & ~(0xFFFF << shift) | token << shift
    line = jax.lax.broadcasted_iota(jnp.int32, old.shape, 1)
    tile[...] = jnp.where(line == inside // each, token, old)
