"""What the bitwise head's TPU kernels do with a block of tokens (tpu.py calls them).

Bits lie in sublanes and tokens in lanes, so that 16, 32 or 64 bits waste nothing of the vector
unit: log odds are [bits, tokens], labels are rows of words. x goes to the matrix unit as it is:
with W = (1 + scale) w, n w = rstd (x W - mean sum(W)) + shift w. A float32 factor is two parts of
bfloat16 for a bfloat16 x and three for a float32 one; the parts lie below each other, in sublanes
that 32 bits would leave idle, and cost the matrix unit no further pass.

Gradient of a row, with h = rstd g [bits, tokens], zh = rstd (x W - mean sum(W)) and C channels:

    dx = h^T W + A - x B     B = rstd^2 sum(g zh) / C     A = mean B - rstd sum(g sum(W)) / C
    P = h x                  of which dw and dscale follow without the tokens (tpu.py)

A is one more row of the product with W, of ones; forward that row gives the sums of x.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels.bitwise import ref as reference
from kernels.bitwise.bits import WORD
from kernels.bitwise.modulation import split

LANES = 128
ONES = 16  # rows of ones below W: a tile of bfloat16
STATS = 64  # tokens whose sums stay in registers


class Options(NamedTuple):
    """What is fixed when compiling."""

    d: int
    rows: int  # bits, padded
    channels: int  # without padding
    length: int  # tokens of a row of x
    tile: int  # of them in a block
    parts: int  # of a float32 factor
    normalised: bool
    interpret: bool

    @property
    def products(self) -> int:
        """Rows of W that dx takes, without the ones: parts whose product counts."""
        return self.parts * (self.parts + 1) // 2 * self.rows


def split_x(x, options: Options) -> list:
    """Likewise x's block; one part when it is bfloat16."""
    return [x] if x.dtype == jnp.bfloat16 else split(x, options.parts)


def product(a, b, contract):
    """float32 product of bfloat16 arrays over an axis of each."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def added(a, options: Options, parts: int):
    """The sum of the parts that lie below each other."""
    return sum(a[i * options.rows : (i + 1) * options.rows] for i in range(parts))


def prepare(options: Options, first, ref, name="", gradient=False) -> None:
    """Before a row's first block: W's parts, ones below them, and sums over W's lanes. For a
    gradient the parts come as often as dx takes them, and P becomes 0."""
    W, sums = ref[f"W{name}"], ref[f"W{name} sums"]

    # A loop of no trips costs nothing, where a condition would be counted by the static figures.
    @pl.loop(0, jnp.where(first, W.shape[1] // LANES, 0))
    def _(j):
        lanes = pl.ds(pl.multiple_of(j * LANES, LANES), LANES)
        w = ref["w"][:, lanes]
        offset = jnp.zeros_like(w)
        if options.normalised:
            offset = w * ref[f"shift{name}"][:, lanes]
            w = w * (1.0 + ref[f"scale{name}"][:, lanes])
        parts = split(w, options.parts)
        taken = parts
        if gradient:  # beside each part of h fewer of W's count
            taken = [part for n in range(options.parts, 0, -1) for part in parts[:n]]
        for i, part in enumerate(taken):
            W[i * options.rows : (i + 1) * options.rows, lanes] = part
        if options.normalised:
            W[len(taken) * options.rows :, lanes] = jnp.ones((ONES, LANES), jnp.bfloat16)
        total = sum(part.astype(jnp.float32) for part in parts)
        begun = j > 0
        sums[0] = jnp.where(begun, sums[0], 0.0) + total
        sums[1] = jnp.where(begun, sums[1], 0.0) + offset
        if gradient:
            ref["P"][:, lanes] = jnp.zeros((options.rows, LANES), jnp.float32)


def statistics(options: Options, x, sums):
    """(mean, rstd), each [1, tokens], of x [tokens, C] and its sums [1, tokens]. Squares are of
    what is left after the mean of the first lanes: a large common part costs no digits."""
    tile, wide = x.shape
    columns = []
    inside = lax.broadcasted_iota(jnp.int32, (1, LANES), 1) < options.channels % LANES
    for t in range(0, tile, STATS):
        some = slice(t, min(t + STATS, tile))
        about = x[some, :LANES].astype(jnp.float32).sum(1, keepdims=True)
        about = about / min(options.channels, LANES)
        squares = jnp.zeros((some.stop - some.start, LANES), jnp.float32)
        for j in range(0, wide, LANES):
            rest = x[some, j : j + LANES].astype(jnp.float32) - about
            if j + LANES > options.channels:
                rest = jnp.where(inside, rest, 0.0)
            squares = squares + rest * rest
        lane = lax.broadcasted_iota(jnp.int32, squares.shape, 1)
        columns.append(jnp.where(lane == 0, about, squares.sum(1, keepdims=True)))
    rows = jnp.concatenate(columns, 0).T
    mean = sums / options.channels
    off = mean - rows[0:1]
    variance = rows[1:2] / options.channels - off * off
    return mean, lax.rsqrt(jnp.maximum(variance, 0.0) + reference.EPS)


def log_odds(options: Options, ref, name="", stats=None):
    """(zh, z, sum(W), mean, rstd, x in parts): zh and z [rows, tokens], sum(W) [rows, 1], the next
    two [1, tokens], from `stats` if they are known."""
    x, W, sums = ref[f"x{name}"][...], ref[f"W{name}"], ref[f"W{name} sums"]
    in_parts, rows = split_x(x, options), options.parts * options.rows
    count = options.normalised and stats is None
    W = W[: rows + ONES] if count else W[:rows]
    found = sum(product(W, part, (1, 1)) for part in in_parts)
    zh, bias = added(found, options, options.parts), ref["b"][...]
    if not options.normalised:
        return zh, zh + bias, None, None, None, in_parts
    mean, rstd = statistics(options, x, found[rows : rows + 1]) if count else stats
    total = sums[0].sum(1, keepdims=True)
    zh = rstd * (zh - mean * total)
    z = zh + (sums[1].sum(1, keepdims=True) + bias)
    return zh, z, total, mean, rstd, in_parts


def labels(options: Options, words):
    """float32 0 or 1 [rows, tokens] of words [words, tokens]."""
    found = []
    for start in range(0, options.rows, WORD):
        shape = (min(WORD, options.rows - start), words.shape[1])
        word = jnp.broadcast_to(words[start // WORD : start // WORD + 1], shape)
        bit = lax.shift_right_logical(word, lax.broadcasted_iota(jnp.int32, shape, 0)) & 1
        found.append(bit.astype(jnp.float32))
    return jnp.concatenate(found, 0)


def mine(options: Options, a):
    """Without the bits that are padding."""
    if options.d == options.rows:
        return a
    return jnp.where(lax.broadcasted_iota(jnp.int32, a.shape, 0) < options.d, a, 0.0)


def block():
    """(whether a row's first block, number of the block)."""
    part, step = pl.program_id(1), pl.program_id(2)
    return step == 0, part * pl.num_programs(2) + step


def forward(options: Options, ref) -> None:
    """Mean loss over bits of each token, and its mean and rstd for the gradient."""
    prepare(options, block()[0], ref)
    _, z, _, mean, rstd, _ = log_odds(options, ref)
    if options.normalised:
        ref["stats"][0:1], ref["stats"][1:2] = mean, rstd
    loss = jnp.maximum(z, 0.0) - labels(options, ref["bits"][...]) * z
    loss = mine(options, loss + jnp.log1p(jnp.exp(-jnp.abs(z))))
    ref["loss"][...] = loss.sum(0, keepdims=True) / options.d


def backward(options: Options, ref) -> None:
    """dx of the block; its part of P and of the sums of g and mean h."""
    first, number = block()
    prepare(options, first, ref, gradient=True)
    left = options.length - number * options.tile

    @pl.when(first)
    def _():
        ref["sums"][...] = jnp.zeros_like(ref["sums"])

    if options.length % options.tile:
        # Behind the last token there may be anything, also what is no number.
        @pl.when(left < options.tile)
        def _():
            there = lax.broadcasted_iota(jnp.int32, (options.tile, 1), 0) < left
            for j in range(0, ref["x"].shape[1], LANES):
                lanes = slice(j, j + LANES)
                some = ref["x"][:, lanes].astype(jnp.float32)
                ref["x"][:, lanes] = jnp.where(there, some, 0.0).astype(ref["x"].dtype)

    there = lax.broadcasted_iota(jnp.int32, (1, options.tile), 1) < left
    stats = None
    if options.normalised:
        stats = [jnp.where(there, ref["stats"][i : i + 1], 0.0) for i in range(2)]
    zh, z, total, mean, rstd, x = log_odds(options, ref, stats=stats)
    cotangent = jnp.where(there, ref["dloss"][...], 0.0) / options.d
    g = mine(options, (jax.nn.sigmoid(z) - labels(options, ref["bits"][...])) * cotangent)
    h, ones = g, []
    sums = [g]
    if options.normalised:
        h = rstd * g
        B = rstd * rstd * (g * zh).sum(0, keepdims=True) / options.channels
        A = mean * B - rstd * (g * total).sum(0, keepdims=True) / options.channels
        ones = [*split(A, options.parts)]
        ones.append(jnp.zeros((ONES - options.parts, options.tile), jnp.bfloat16))
        sums.append(mean * h)
        # B as a column; a tile of 8 rows is what can be turned.
        column = jnp.broadcast_to(B, (8, options.tile)).T[:, 0:1]
    for i, a in enumerate(sums):
        ref["sums"][i] += sum(a[:, j : j + LANES] for j in range(0, options.tile, LANES))
    h = split(h, options.parts)
    against = [h[other] for other in range(options.parts) for _ in range(options.parts - other)]
    against = jnp.concatenate([*against, *ones], 0)
    h = jnp.concatenate(h, 0)
    step, wide = 2 * LANES, ref["x"].shape[1]
    for j in range(0, wide, step):
        lanes = slice(j, min(j + step, wide))
        dx = product(against, ref["W"][:, lanes], (0, 0))
        if options.normalised:
            dx = dx - ref["x"][:, lanes].astype(jnp.float32) * column
        ref["dx"][:, lanes] = dx.astype(ref["dx"].dtype)
        P = sum(product(h, part[:, lanes], (1, 0)) for part in x)
        ref["P"][:, lanes] += added(P, options, options.parts)


def sample(options: Options, guided: bool, ref) -> None:
    """Words of drawn bits."""
    found = []
    for name in ("", " uncond") if guided else ("",):
        prepare(options, block()[0], ref, name)
        found.append(log_odds(options, ref, name)[1])
    draw = reference.Draw(*(ref["draw"][i] for i in range(3)))
    bits = reference.drawn(found[0], found[1] if guided else None, ref["uniforms"][...], draw)
    bits = bits.astype(jnp.int32)
    for start in range(0, options.rows, WORD):
        some = bits[start : start + WORD]
        place = lax.broadcasted_iota(jnp.int32, some.shape, 0)
        some = jnp.where(place + start < options.d, some << place, 0)
        word = some.sum(0, keepdims=True, dtype=jnp.int32)
        ref["words"][start // WORD : start // WORD + 1] = word
