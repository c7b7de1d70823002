"""What the GPU kernels do (kernels/linear_attention/gpu.py calls them): Pallas Mosaic GPU, Hopper.

Two kernels. `sweep` walks the chunks of a head in order and stores the memory before each;
`product` takes one chunk of one head and all chunks at once. Both move 128 x 128 blocks by TMA
through a ring of slots that one warpgroup fills and two warpgroups use, 64 rows each; every product
is a wgmma with float32 sums.

The forward pass and the three gradients are the same `product` of other operands (names on the
left): scores x yT, weighted by E, times z; and x times a memory M. With t the tokens of q:

    h    x q,  y k,  z v,  M C      ((q kT) E v + w (q C)) / bound
    dq   x dh, y v,  z k,  M CT     (((dh vT) / bound + dden) E) k + w ((dh CT) / bound + dden n)
    dk   x v,  y dh, z q,  M dCT    (((v dhT) / bound + dden) ET) q + u (v dCT + dn)
    dv   x k,  y q,  z dh, M dC     (((k qT) / bound) ET) dh + u (k dC)

bound and dden belong to t, so to rows of the first two and to columns of the others; without a
normaliser neither they nor n are there. Heads of a group read the same q and k.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.linear_attention import gates

BLOCK = 128  # tokens of a chunk, and the side of every block in shared memory
HALF = BLOCK // 2  # rows of one warpgroup: wgmma's M
SLOTS = 4
USERS = 2  # warpgroups that compute; one more copies
# Rows of `product`: exponents along x's and y's tokens, document, what multiplies and is added to
# a score, weights of x M and of the vector, the least denominator (h only).
ALONG_X, ALONG_Y, DOCUMENT, GAIN, BIAS, INTER, VECTOR, BOUND = range(8)
ROWS = 8
FINE_X, FINE_Y = GAIN, BIAS  # without a normaliser: the rest of the exponents

_TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
_TILE = plgpu.Layout.WGMMA
_ROW, _COLUMN = _TILE.reduce(1), _TILE.reduce(0)  # one number per row, per column of a tile


def blocks(*lead):
    """Shared memory for 128 x 128 blocks of bfloat16 as TMA and wgmma want them."""
    return plgpu.SMEM((*lead, BLOCK, BLOCK), jnp.bfloat16, transforms=_TILED)


class Product(NamedTuple):
    """What distinguishes the four uses of `product`."""

    scale: float  # of the scores
    eps: float
    later: bool  # x's token sees the tokens of y after it (dk, dv), else those before it
    across: bool  # gain and bias belong to x's tokens, else to y's
    gain: bool
    bias: bool
    transposed: bool  # M is stored the other way round
    vector: bool  # + VECTOR * vector
    normalise: bool  # divide by max(|den|, BOUND) + eps
    partner: bool  # also sum both parts of out times partner over each row
    fine: bool  # exponents have a second part
    packed: bool  # documents end inside chunks
    interpret: bool  # the interpreter multiplies at once and knows no wgmma_wait


def _spread(x, axis, columns=BLOCK):
    """Numbers per row (axis 0) or column (axis 1) over a tile."""
    return lax.broadcast_in_dim(x, (HALF, columns), (axis,))


def _matmul(a, b):
    """a [64, n] times b [n, 128], both in shared memory, as a float32 tile."""

    def run(accumulator):
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC((HALF, BLOCK), jnp.float32))


def _weights(options: Product, per_row, per_column, rows):
    """E: scale * exp(e_x + e_y) where x's token sees y's, else 0."""
    shape = (HALF, BLOCK)
    mine = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_TILE)
    ahead = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=_TILE) - mine
    seen = ahead >= rows if options.later else ahead <= rows
    if options.packed:
        seen &= _spread(per_row(DOCUMENT), 0) == _spread(per_column(DOCUMENT), 1)
    exponent = _spread(per_row(ALONG_X), 0) + _spread(per_column(ALONG_Y), 1)
    if options.fine:
        exponent += _spread(per_row(FINE_X), 0) + _spread(per_column(FINE_Y), 1)
    return options.scale * jnp.exp(jnp.where(seen, exponent, gates.NEVER))


def _of(array, head, heads):
    """Index of a head's part of an array that several heads may share."""
    shared = heads // array.shape[0]
    return lax.div(head, jnp.int32(shared)) if shared > 1 else head


class _Ring:
    """The users' side of the slots: blocks come in the order in which they were sent."""

    def __init__(self, slots, full, empty):
        self.slots, self.full, self.empty, self.taken = slots, full, empty, 0

    def take(self) -> int:
        """Waits for the next block; its slot."""
        slot = self.taken % SLOTS
        self.taken += 1
        plgpu.barrier_wait(self.full.at[slot])
        return slot

    def release(self, slots) -> None:
        """Lets the copying warpgroup overwrite these slots."""
        for slot in slots:
            plgpu.barrier_arrive(self.empty.at[slot])


def product(options: Product, widths, x, y, z, M, rows, vector, partner, out, side, scratch):
    """One chunk of one head; grid (heads, chunks). Arrays [heads, T, D], or of as many heads as
    there are groups, M [heads, chunks, ., .], rows [heads, chunks, 8, 128], vector [heads, chunks,
    1, D] if it is used, side [heads, chunks, 2, 128]."""
    slots, scores, staged, row_block, row_vector, row_side, full, empty, ready = scratch
    head, chunk, user = lax.axis_index("head"), lax.axis_index("chunk"), lax.axis_index("user")
    inner, outer = (w // BLOCK for w in widths)
    tokens = pl.ds(chunk * BLOCK, BLOCK)

    def columns(i):
        return pl.ds(i * BLOCK, BLOCK)

    def chunk_of(array, i):
        return array.at[_of(array, head, M.shape[0]), tokens, columns(i)]

    def sent():
        """Every block in the order of use."""
        for i in range(inner):
            yield chunk_of(x, i)
            yield chunk_of(y, i)
        for j in range(outer):
            for i in range(inner):
                yield chunk_of(x, i)
                at = (columns(j), columns(i)) if options.transposed else (columns(i), columns(j))
                yield M.at[head, chunk, *at]
            if options.partner:
                yield chunk_of(partner, j)
            yield chunk_of(z, j)

    @pl.when(user == USERS)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        plgpu.copy_gmem_to_smem(rows.at[head, chunk], row_block, ready)
        if options.vector or options.normalise:
            plgpu.copy_gmem_to_smem(vector.at[head, chunk], row_vector, ready)
        for step, block in enumerate(sent()):
            slot = step % SLOTS
            if step >= SLOTS:
                plgpu.barrier_wait(empty.at[slot])
            plgpu.copy_gmem_to_smem(block, slots.at[slot], full.at[slot])
        for slot in range(min(SLOTS, step + 1)):  # until all is used
            plgpu.barrier_wait(empty.at[slot])

    @pl.when(user < USERS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        ring, first = _Ring(slots, full, empty), user * HALF
        mine = pl.ds(first, HALF)
        plgpu.barrier_wait(ready)

        def per_row(index):
            return plgpu.load(row_block.at[index, mine], layout=_ROW)

        def per_column(index):
            return plgpu.load(row_block.at[index], layout=_COLUMN)

        zeros = plgpu.layout_cast(jnp.zeros((HALF,), jnp.float32), _ROW)
        from_state = zeros  # x . vector per token: the state's part of den

        def with_vector(i, slot):
            nonlocal from_state
            for part in range(2):  # half a tile at a time: registers are short here
                part_of = pl.ds(part * HALF, HALF)
                tile = plgpu.load(slots.at[slot, mine, part_of], layout=_TILE)
                n = plgpu.load(
                    row_vector.at[0, pl.ds(i * BLOCK + part * HALF, HALF)], layout=_COLUMN
                )
                from_state += (tile.astype(jnp.float32) * _spread(n, 1, HALF)).sum(1)

        def times(transposed, each=None):
            """x times the next blocks, summed over x's columns."""

            def run(accumulator):
                held = ()
                for i in range(inner):
                    a, b = ring.take(), ring.take()
                    if each is not None:
                        each(i, a)
                    other = slots.at[b]
                    if transposed:
                        other = other.transpose((1, 0))
                    plgpu.wgmma(accumulator, slots.at[a, mine], other)
                    if not options.interpret:
                        plgpu.wgmma_wait(1)  # the product before this one is done
                    ring.release(held)
                    held = (a, b)
                total = accumulator[...]  # waits
                ring.release(held)
                return total, from_state

            return pl.run_scoped(run, plgpu.ACC((HALF, BLOCK), jnp.float32))

        s, from_state = times(True, with_vector if options.normalise else None)
        side_of, axis = (per_row, 0) if options.across else (per_column, 1)
        if options.gain:
            s = s * _spread(side_of(GAIN), axis)
        if options.bias:
            s = s + _spread(side_of(BIAS), axis)
        s = s * _weights(options, per_row, per_column, first)
        scores.at[mine][...] = s.astype(scores.dtype)
        plgpu.commit_smem()
        if options.normalise:
            den = per_row(INTER) * from_state + s.sum(1)
            inverse = 1.0 / (jnp.maximum(jnp.abs(den), per_row(BOUND)) + options.eps)
            row_side.at[0, mine][...] = den
        dots = [zeros, zeros]  # of the memory's part, of the scores' part
        for j in range(outer):
            tile, _ = times(options.transposed)
            tile = tile * _spread(per_row(INTER), 0)
            if options.vector:
                n = plgpu.load(row_vector.at[0, columns(j)], layout=_COLUMN)
                tile = tile + _spread(per_row(VECTOR), 0) * _spread(n, 1)

            def add_dots(part, tile, slot):
                other = plgpu.load(slots.at[slot, mine], layout=_TILE).astype(jnp.float32)
                dots[part] += (tile * other).sum(1)

            if options.partner:
                partner_slot = ring.take()
                add_dots(0, tile, partner_slot)
            slot = ring.take()
            more = _matmul(scores.at[mine], slots.at[slot])
            ring.release((slot,))
            if options.partner:
                add_dots(1, more, partner_slot)
                ring.release((partner_slot,))
            tile = tile + more
            if options.normalise:
                tile = tile * _spread(inverse, 0)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            staged.at[mine][...] = tile.astype(staged.dtype)
            plgpu.commit_smem()
            where = (head, pl.ds(chunk * BLOCK + first, HALF), columns(j))
            plgpu.copy_smem_to_gmem(staged.at[mine], out.at[where])
        if options.partner:
            for part, sums in enumerate(dots):
                row_side.at[part, mine][...] = sums
        if options.partner or options.normalise:
            plgpu.commit_smem()
            for part in range(2 if options.partner else 1):
                plgpu.copy_smem_to_gmem(row_side.at[part, mine], side.at[head, chunk, part, mine])
        plgpu.wait_smem_to_gmem(0)


def sweep(reverse, tokens, x, y, rows, C0, stored, C_last, scratch):
    """Memory before each chunk: C' = gamma C + (u x)T y; grid (heads, K / 128, V / 128).

    Arrays x [heads or groups, T, K], y [heads, T, V], rows [heads, chunks, 2, 128] (u; gamma), C0
    and C_last float32 [heads, K, V], stored [heads, chunks, K, V]. In reverse the last chunk comes
    first.
    """
    slots, scaled, staged, row_block, full, empty, both = scratch
    head, user = lax.axis_index("head"), lax.axis_index("user")
    K, V = (pl.ds(lax.axis_index(name) * BLOCK, BLOCK) for name in ("k", "v"))
    chunks = tokens // BLOCK
    stages = SLOTS // 2

    def at(step):
        return chunks - 1 - step if reverse else step

    def send(step, stage):
        where = pl.ds(at(step) * BLOCK, BLOCK)
        part = x.at[_of(x, head, C0.shape[0]), where, K]
        plgpu.copy_gmem_to_smem(part, slots.at[2 * stage], full.at[stage])
        plgpu.copy_gmem_to_smem(y.at[head, where, V], slots.at[2 * stage + 1], full.at[stage])
        plgpu.copy_gmem_to_smem(rows.at[head, at(step)], row_block.at[stage], full.at[stage])

    @pl.when(user == USERS)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        for step in range(min(stages, chunks)):
            send(step, step)

        @pl.loop(stages, chunks)
        def _(step):
            stage = lax.rem(step, jnp.int32(stages))
            plgpu.barrier_wait(empty.at[stage])
            send(step, stage)

        for stage in range(min(stages, chunks)):
            plgpu.barrier_wait(empty.at[stage])

    @pl.when(user < USERS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        first = user * HALF
        mine = pl.ds(first, HALF)
        here = pl.ds(lax.axis_index("k") * BLOCK + first, HALF)
        C = plgpu.load(C0.at[head, here, V], layout=_TILE, optimized=False)

        def chunk(step, C):
            stage = lax.rem(step, jnp.int32(stages))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            staged.at[mine][...] = C.astype(staged.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staged.at[mine], stored.at[head, at(step), here, V])
            plgpu.barrier_wait(full.at[stage])
            u = plgpu.load(row_block.at[stage, 0, mine], layout=_ROW)
            gamma = plgpu.load(row_block.at[stage, 1, mine], layout=_ROW)
            tile = plgpu.load(slots.at[2 * stage, mine], layout=_TILE).astype(jnp.float32)
            scaled.at[stage, mine][...] = (tile * _spread(u, 0)).astype(scaled.dtype)
            plgpu.commit_smem()
            plgpu.barrier_arrive(both)  # each warpgroup scaled half of the tokens
            plgpu.barrier_wait(both)

            mine_of_x = scaled.at[stage, :, mine].transpose((1, 0))
            C = C * _spread(gamma, 0) + _matmul(mine_of_x, slots.at[2 * stage + 1])
            plgpu.barrier_arrive(empty.at[stage])
            return C

        C = lax.fori_loop(0, chunks, chunk, C)
        C_last.at[head, here, V][...] = C
        plgpu.wait_smem_to_gmem(0)
