"""What the bitwise head's TPU kernels do with a block of tokens (tpu.py calls them).

Bits lie in sublanes and tokens in lanes, so that 16, 32 or 64 bits waste nothing of the vector
unit: log odds are [bits, tokens], labels are rows of words. x goes to the matrix unit as it is:
with W = (1 + scale) w, n w = rstd (x W - mean sum(W)) + shift w. A float32 factor is two parts of
bfloat16 for a bfloat16 x and three for a float32 one; the parts lie below each other, in sublanes
that 32 bits would leave idle, and cost the matrix unit no further pass.

Gradient of a row, with h = rstd g [bits, tokens], zh = rstd (x W - mean sum(W)) and C channels:

    dx = h^T W + A - x B     B = rstd^2 sum(g zh) / C     A = mean B - rstd sum(g sum(W)) / C
    P = h x                  of which dw and dscale follow without the tokens (tpu.py)

A is one more row of the product with W, of ones.
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


def prepare(options: Options, first, ref, into: str, *clear) -> None:
    """Before a row's first block: W's parts and what else is the row's; `clear` becomes 0."""
    wide = ref["w"].shape[1]
    W, sums = ref[into], ref[f"{into} sums"]

    # A loop of no trips costs nothing, where a condition would be counted by the static figures.
    @pl.loop(0, jnp.where(first, wide // LANES, 0))
    def _(j):
        lanes = pl.ds(pl.multiple_of(j * LANES, LANES), LANES)
        w = ref["w"][:, lanes]
        offset = jnp.zeros_like(w)
        if options.normalised:
            offset = w * ref[f"shift{into[1:]}"][:, lanes]
            w = w * (1.0 + ref[f"scale{into[1:]}"][:, lanes])
        parts = split(w, options.parts)
        row = 0
        for other in range(options.parts):  # of h, beside which fewer and fewer of W's count
            for part in parts[: options.parts - other] if W.shape[0] > row else ():
                W[row : row + options.rows, lanes] = part
                row += options.rows
        if W.shape[0] > row:
            W[row:, lanes] = jnp.ones((ONES, LANES), jnp.bfloat16)
        total = sum(part.astype(jnp.float32) for part in parts)
        begun = j > 0
        sums[0] = jnp.where(begun, sums[0], 0.0) + total
        sums[1] = jnp.where(begun, sums[1], 0.0) + offset
        for name in clear:
            x = ref[name]
            x[:, lanes] = jnp.zeros((x.shape[0], LANES), x.dtype)


def statistics(options: Options, x):
    """Rows (mean, rstd), each [1, tokens], of x [tokens, C]. One pass: sums of what is left after
    the mean of the first lanes, so that a large common part costs no digits."""
    tile, wide = x.shape
    columns = []
    inside = lax.broadcasted_iota(jnp.int32, (1, LANES), 1) < options.channels % LANES
    for t in range(0, tile, STATS):
        some = slice(t, min(t + STATS, tile))
        about = x[some, :LANES].astype(jnp.float32).sum(1, keepdims=True)
        about = about / min(options.channels, LANES)
        first = second = jnp.zeros((some.stop - some.start, LANES), jnp.float32)
        for j in range(0, wide, LANES):
            rest = x[some, j : j + LANES].astype(jnp.float32) - about
            if j + LANES > options.channels:
                rest = jnp.where(inside, rest, 0.0)
            first, second = first + rest, second + rest * rest
        off = first.sum(1, keepdims=True) / options.channels
        variance = second.sum(1, keepdims=True) / options.channels - off * off
        rstd = lax.rsqrt(jnp.maximum(variance, 0.0) + reference.EPS)
        lane = lax.broadcasted_iota(jnp.int32, first.shape, 1)
        columns.append(jnp.where(lane == 0, about + off, rstd))
    rows = jnp.concatenate(columns, 0).T
    return rows[0:1], rows[1:2]


def log_odds(options: Options, ref, x, mean, rstd, into="W"):
    """(zh, sum(W), z): [rows, tokens], [rows, 1], [rows, tokens]; x [tokens, C] in parts."""
    W = ref[into][: options.parts * options.rows]
    zh = added(sum(product(W, part, (1, 1)) for part in x), options, options.parts)
    sums, bias = ref[f"{into} sums"], ref["b"][...]
    if not options.normalised:
        return zh, None, zh + bias
    total = sums[0].sum(1, keepdims=True)
    zh = rstd * (zh - mean * total)
    return zh, total, zh + (sums[1].sum(1, keepdims=True) + bias)


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
    prepare(options, block()[0], ref, "W")
    x, mean, rstd = ref["x"][...], None, None
    if options.normalised:
        mean, rstd = statistics(options, x)
        ref["stats"][0:1], ref["stats"][1:2] = mean, rstd
    _, _, z = log_odds(options, ref, split_x(x, options), mean, rstd)
    loss = jnp.maximum(z, 0.0) - labels(options, ref["bits"][...]) * z
    loss = mine(options, loss + jnp.log1p(jnp.exp(-jnp.abs(z))))
    ref["loss"][...] = loss.sum(0, keepdims=True) / options.d


def backward(options: Options, ref) -> None:
    """dx of the block; its part of P and of the sums of g and mean h."""
    first, number = block()
    prepare(options, first, ref, "W", "P")
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

    x, mean, rstd = ref["x"][...], None, None
    shape = (1, options.tile)
    there = lax.broadcasted_iota(jnp.int32, shape, 1) < left
    if options.normalised:
        mean, rstd = (jnp.where(there, ref["stats"][i : i + 1], 0.0) for i in range(2))
    in_parts = split_x(x, options)
    zh, total, z = log_odds(options, ref, in_parts, mean, rstd)
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
    step = 2 * LANES
    for j in range(0, x.shape[1], step):
        lanes = slice(j, min(j + step, x.shape[1]))
        some = [part[:, lanes] for part in in_parts]
        dx = product(against, ref["W"][:, lanes], (0, 0))
        if options.normalised:
            dx = dx - ref["x"][:, lanes].astype(jnp.float32) * column
        ref["dx"][:, lanes] = dx.astype(ref["dx"].dtype)
        of_W = sum(product(h, part, (1, 0)) for part in some)
        ref["P"][:, lanes] += added(of_W, options, options.parts)


def sample(options: Options, guided: bool, ref) -> None:
    """Words of drawn bits."""
    found = []
    for name in ("", " uncond") if guided else ("",):
        prepare(options, block()[0], ref, f"W{name}")
        x = ref[f"x{name}"][...]
        stats = statistics(options, x) if options.normalised else (None, None)
        z = log_odds(options, ref, split_x(x, options), *stats, into=f"W{name}")[2]
        found.append(z)
    draw = reference.Draw(*(ref["draw"][i] for i in range(3)))
    bits = reference.drawn(found[0], found[1] if guided else None, ref["uniforms"][...], draw)
    bits = bits.astype(jnp.int32)
    for start in range(0, options.rows, WORD):
        some = bits[start : start + WORD]
        place = lax.broadcasted_iota(jnp.int32, some.shape, 0)
        some = jnp.where(place + start < options.d, some << place, 0)
        ref["words"][start // WORD : start // WORD + 1] = some.sum(0, keepdims=True)
