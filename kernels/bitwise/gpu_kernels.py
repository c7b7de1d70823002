"""What the bitwise head's GPU kernels do (gpu.py calls them): Pallas Mosaic GPU, Hopper.

A block of 128 threads takes 64 tokens. TMA brings pieces of 64 channels of x, and of what the row's
modulation makes of w, into a ring of slots; each piece is multiplied (wgmma) and added to the sums
that mean and variance need. Labels, loss and draws are computed on the log odds in registers.

As on TPUs (tpu_kernels.py, whose formulas these are) x is multiplied as it is and W = (1 + scale) w
is two parts of bfloat16, high and low. wgmma wants 64 of whatever it sums over, which for dx is
bits: up to 32 of them stand twice beside each other, as [high; low] W of x's product and as [h, h]
against [high; low] of dx's. A row's last block begins early enough to be whole: some tokens are
computed twice, to the same numbers.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.bitwise import ref as reference
from kernels.bitwise.bits import WORD
from kernels.selective_scan.gpu_kernels import softplus

TOKENS = 64  # of a block: wgmma's M
PIECE = 64  # channels
BITS = 64  # columns of a tile
SLOTS = 4

_TILED = (plgpu.TilingTransform((8, PIECE)), plgpu.SwizzleTransform(128))
_TILE = plgpu.Layout.WGMMA
_ROW, _COLUMN = _TILE.reduce(1), _TILE.reduce(0)  # one number per token, per bit of a tile


def pieces(*lead):
    """Shared memory for pieces of bfloat16 as TMA and wgmma want them."""
    return plgpu.SMEM((*lead, PIECE), jnp.bfloat16, transforms=_TILED)


class Options(NamedTuple):
    """What is fixed when compiling."""

    d: int
    channels: int  # without padding
    length: int  # tokens of a row
    normalised: bool
    interpret: bool

    @property
    def twice(self) -> bool:
        """Whether the bits stand twice beside each other."""
        return 2 * self.d <= BITS

    @property
    def rows(self) -> int:
        """Of W: high, low, high; or high, low."""
        return 3 * BITS // 2 if self.twice else 2 * BITS


def _over(x, axis, columns=BITS):
    """Numbers per token (axis 0) or bit (axis 1) over a tile."""
    return lax.broadcast_in_dim(x, (TOKENS, columns), (axis,))


def _column_number():
    return plgpu.broadcasted_iota(jnp.int32, (TOKENS, BITS), 1, layout=_TILE)


def _products(*pairs):
    """Sum of products of [64, 64] arrays, float32."""

    def run(accumulator):
        for a, b in pairs:
            plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC((TOKENS, BITS), jnp.float32))


def tokens_of_block(options: Options):
    """(row, its tokens of this block)."""
    first = jnp.minimum(lax.axis_index("block") * TOKENS, options.length - TOKENS)
    return lax.axis_index("row"), pl.ds(first, TOKENS)


class Stream:
    """Pieces of x and W, all of a block's tokens, as often as they are needed."""

    def __init__(self, options: Options, x, W, scratch, times=1):
        self.options, self.x, self.W = options, x, W
        self.x_slots, self.W_slots, self.full = scratch
        self.row, self.tokens = tokens_of_block(options)
        self.pieces = x.shape[2] // PIECE
        self.steps = times * self.pieces
        for step in range(min(SLOTS, self.steps)):
            self.send(step)

    def send(self, step):
        """Asks for a piece."""
        slot, piece = lax.rem(step, SLOTS), lax.rem(step, self.pieces)
        channels = pl.ds(piece * PIECE, PIECE)
        row = self.row if self.options.normalised else 0
        full = self.full.at[slot]
        source = self.x.at[self.row, self.tokens, channels]
        plgpu.copy_gmem_to_smem(source, self.x_slots.at[slot], full)
        plgpu.copy_gmem_to_smem(self.W.at[row, :, channels], self.W_slots.at[slot], full)

    def take(self, step):
        """(x, high W, low W) of a step, in shared memory; with bits that stand twice, high and low
        above each other and the other way round."""
        slot = lax.rem(step, SLOTS)
        plgpu.barrier_wait(self.full.at[slot])
        second = BITS // 2 if self.options.twice else BITS
        high, low = (self.W_slots.at[slot, pl.ds(i, BITS)] for i in (0, second))
        return self.x_slots.at[slot], high, low

    def used(self, step):
        """The step's slot may be filled again."""

        @pl.when(step + SLOTS < self.steps)
        def _():
            self.send(step + SLOTS)

    def log_odds(self, sums, offset, stats=None):
        """(zh, z, mean, rstd) from the first pass over all pieces; sums and offset [rows, bits]; a
        gradient has the two numbers per token already."""
        options = self.options
        count = options.normalised and stats is None

        def step(i, carry, about=None):
            zh, *moments = carry
            x, *parts = self.take(i)
            zh = zh + _products(*((x, part.transpose((1, 0))) for part in parts))
            if count:
                tile = plgpu.load(x, layout=_TILE).astype(jnp.float32)
                if about is None:
                    about = tile.sum(1) / min(PIECE, options.channels)
                rest = tile - _over(about, 0)
                if options.channels % PIECE:
                    there = _column_number() + i * PIECE < options.channels
                    rest = jnp.where(there, rest, 0.0)
                moments = moments[0] + rest, moments[1] + rest * rest
            self.used(i)
            return (zh, *moments), about

        zeros = [plgpu.layout_cast(jnp.zeros((TOKENS, BITS), jnp.float32), _TILE)]
        zeros = zeros * (3 if count else 1)
        carry, about = step(0, zeros)
        zh, *moments = lax.fori_loop(1, self.pieces, lambda i, c: step(i, c, about)[0], carry)

        def of_bits(array):
            return _over(plgpu.load(array, layout=_COLUMN, optimized=False), 1)

        row = self.row if options.normalised else 0
        if not options.normalised:
            return zh, zh + of_bits(offset.at[row]), None, None
        if stats is None:
            off, second = (m.sum(1) / options.channels for m in moments)
            mean = about + off
            rstd = lax.rsqrt(jnp.maximum(second - off * off, 0.0) + reference.EPS)
        else:
            mean, rstd = (per_token(array, self.row, self.tokens) for array in stats)
        zh = _over(rstd, 0) * (zh - _over(mean, 0) * of_bits(sums.at[row]))
        return zh, zh + of_bits(offset.at[row]), mean, rstd


def per_token(array, *where):
    """Numbers of the block's tokens."""
    return plgpu.load(array.at[where], layout=_ROW, optimized=False)


def labels(options: Options, words, row, tokens):
    """float32 0 or 1 [64, 64] of words [., words, T]."""
    number = _column_number()
    word = _over(per_token(words, row, 0, tokens), 0)
    if options.d > WORD:
        second = _over(per_token(words, row, 1, tokens), 0)
        word = jnp.where(number < WORD, word, second)
    return ((word >> (number & (WORD - 1))) & 1).astype(jnp.float32)


def mean_over_bits(options: Options, a):
    """Of [64, 64] numbers, without those that are padding."""
    return mine(options, a).sum(1) / (2 * options.d if options.twice else options.d)


def mine(options: Options, a):
    """Without the bits that are padding."""
    number = _column_number()
    number = number & (BITS // 2 - 1) if options.twice else number
    return jnp.where(number < options.d, a, 0.0)


def forward(options: Options, x, W, sums, offset, words, loss, mean, rstd, scratch):
    """Loss of 64 tokens, and their mean and rstd. x [., T, C], W [., rows, C], sums and offset
    [., 64], words [., words, T]; out [., T]."""
    stream = Stream(options, x, W, scratch)
    at = stream.row, stream.tokens
    _, z, *stats = stream.log_odds(sums, offset)
    each = softplus(z) - labels(options, words, *at) * z
    loss.at[at][...] = mean_over_bits(options, each)
    if options.normalised:
        mean.at[at][...], rstd.at[at][...] = stats


def backward(options: Options, x, W, sums, offset, words, dloss, mean, rstd, dx, g_out, scratch):
    """dx and g of 64 tokens."""
    *ring, high, low, staged = scratch
    stream = Stream(options, x, W, ring, times=2)
    at = stream.row, stream.tokens
    zh, z, mean, rstd = stream.log_odds(sums, offset, (mean, rstd))
    g = 1.0 / (1.0 + jnp.exp(-z)) - labels(options, words, *at)
    g = mine(options, g * _over(per_token(dloss, *at) / options.d, 0))
    g_out.at[at][...] = g
    h = g
    if options.normalised:
        h = g * _over(rstd, 0)
        total = plgpu.load(sums.at[stream.row], layout=_COLUMN, optimized=False)
        # Means over channels, by way of those over bits.
        bits = options.d / options.channels
        B = rstd * rstd * mean_over_bits(options, g * zh) * bits
        A = mean * B - rstd * mean_over_bits(options, g * _over(total, 1)) * bits
    rounded = h.astype(jnp.bfloat16)
    high[...] = rounded
    low[...] = (h - rounded.astype(jnp.float32)).astype(jnp.bfloat16)
    plgpu.commit_smem()

    @pl.loop(0, stream.pieces)
    def _(piece):
        step = piece + stream.pieces
        x_piece, W_high, W_low = stream.take(step)
        pairs = [(high, W_high), (low, W_high)]
        if not options.twice:
            pairs.append((high, W_low))
        tile = _products(*pairs)
        if options.normalised:
            some = plgpu.load(x_piece, layout=_TILE).astype(jnp.float32)
            tile = tile + _over(A, 0) - some * _over(B, 0)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staged[...] = tile.astype(staged.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, dx.at[*at, pl.ds(piece * PIECE, PIECE)])
        stream.used(step)

    plgpu.wait_smem_to_gmem(0)


def sample(options: Options, guided: bool, draw, uniforms, *refs):
    """Bits of 64 tokens, float32 0 or 1 [., T, bits]; refs: x, W, sums, offset, of guided draws the
    same of unconditional tokens, what is written, scratch."""
    *inputs, out, scratch = refs
    found = []
    for i in range(2 if guided else 1):
        x, W, *head = inputs[4 * i : 4 * i + 4]
        stream = Stream(options, x, W, scratch[3 * i : 3 * i + 3])
        found.append(stream.log_odds(*head)[1])
    at = stream.row, stream.tokens

    def number(i):
        return lax.broadcast(draw[i], (TOKENS, BITS))

    numbers = reference.Draw(*map(number, range(3)))
    u = plgpu.load(uniforms.at[at], layout=_TILE, optimized=False)
    bits = reference.drawn(found[0], found[1] if guided else None, u, numbers)
    out.at[at][...] = bits.astype(jnp.float32)
