"""What the selective scan's GPU kernels do (gpu.py calls them): Pallas Mosaic GPU, Hopper.

A block of 128 threads owns 32 channels of a row and walks its tokens. A thread holds 4 of a
channel's 16 states in registers; a token's numbers come from shared memory, where TMA has put 64
tokens at a time. Sums over states are over four neighbouring threads.

Softplus and gate are taken for a tile of 64 tokens at once, so that no two threads do it for the
same number. The special-function unit sets the pace: 16 exponentials per token and channel, and 4
of softplus and gate.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CHANNELS = 32  # of a block of threads
STATES = 16
TILE = 64  # tokens
UNROLL = 8
SLOTS = 2
LN2 = 0.6931471805599453

# States [32, 16]: a warp has 8 channels, a channel 4 threads, a thread 4 states.
_STATE = plgpu.Layout.TILED(
    plgpu.Tiling(((CHANNELS, STATES), (8, STATES), (4,))), warp_dims=(-5,), lane_dims=(-3, -2),
    vector_dim=-1,
)  # fmt: skip
LAYOUTS = _STATE, _CHANNEL, _OF_STATES = _STATE, _STATE.reduce(1), _STATE.reduce(0)
# Tokens and channels [64, 32] for what has no state: a warp has 4 tokens, a token 8 threads.
_TOKENS = plgpu.Layout.TILED(
    plgpu.Tiling(((16, CHANNELS), (4, CHANNELS), (4,))), warp_dims=(-5,), lane_dims=(-3, -2),
    vector_dim=-1,
)  # fmt: skip
_WEIGHT = _TOKENS.reduce(0)
# Four tokens' states [4, 32, 16] for sums over channels: a warp has a token, a thread every other
# channel of one state.
GROUP = 4
_GROUP = plgpu.Layout.TILED(
    plgpu.Tiling(((GROUP, CHANNELS, STATES), (2, STATES), (1,))), warp_dims=(-6,),
    lane_dims=(-3, -2), vector_dim=-1,
)  # fmt: skip
_OF_GROUP = _GROUP.reduce(2)


class Options(NamedTuple):
    """What is fixed when compiling."""

    gated: bool
    packed: bool
    keep: bool  # states before tiles
    shared_reset: bool  # one reset state for all rows
    interpret: bool

    @property
    def unroll(self) -> int:
        """Tokens that a loop's body spells out; for the interpreter short programs matter."""
        return 1 if self.interpret else UNROLL


def softplus(x):
    """log(1 + e^x) by the series of the inverse hyperbolic tangent: the hardware's logarithm loses
    the digits of small results."""
    e = jnp.exp(-jnp.abs(x))
    s = e / (2.0 + e)
    square, series = s * s, 1.0 / 15.0
    for n in (13, 11, 9, 7, 5, 3, 1):
        series = series * square + 1.0 / n
    return jnp.maximum(x, 0.0) + 2.0 * s * series


def sigmoid(x):
    """1 / (1 + e^-x)."""
    return 1.0 / (1.0 + jnp.exp(-x))


def load(ref, layout):
    """From memory to registers, in float32."""
    return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)


def spread(x, shape, axis):
    """Along the other axis of a [.., ..] tile."""
    return lax.broadcast_in_dim(x, shape, (axis,))


def tile(ref):
    """[64, 32] numbers of a tile."""
    return load(ref, _TOKENS)


def prepare(step, written, delta, u, bias):
    """Δ and Δ u of a tile in float32."""
    wide = softplus(tile(delta) + spread(bias, (TILE, CHANNELS), 1))
    step[...] = wide
    written[...] = wide * tile(u)


def token(step, written, B, A, h, t):
    """(decays, state) of the next token."""
    shape = (CHANNELS, STATES)
    a = jnp.exp2(spread(load(step.at[t], _CHANNEL), shape, 0) * A)
    b = spread(load(written.at[t], _CHANNEL), shape, 0)
    return a, a * h + b * spread(load(B.at[t], _OF_STATES), shape, 1)


def fresh(ref, row, k, t):
    """Whether token t of tile k begins a document, for each of the states."""
    return lax.broadcast(ref["fresh"][row, k * TILE + t], (CHANNELS, STATES)) != 0


def over_channels(out, states, rows):
    """out[t, n]: sum over channels of states[t, c, n] rows[t, c]."""

    @pl.loop(0, TILE // GROUP)
    def _(i):
        tokens = pl.ds(i * GROUP, GROUP)
        x = load(states.at[tokens], _GROUP)
        weight = load(rows.at[tokens], _OF_GROUP)
        out.at[tokens][...] = (x * lax.broadcast_in_dim(weight, x.shape, (0, 1))).sum(1)


def send_out(staged, value, where):
    """[64, 32] numbers to the device's memory, by way of `staged`."""
    staged[...] = value.astype(staged.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staged, where)


def out_is_read():
    """Nothing that is on its way to the device's memory is still read from shared memory."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.commit_smem()


class _Streams:
    """What TMA brings, tile by tile."""

    def __init__(self, ref, names, buffers, full, row, mine):
        self.ref, self.names, self.buffers, self.full = ref, names, buffers, full
        self.row, self.mine, self.slots = row, mine, buffers[0].shape[0]

    def send(self, k, slot):
        """Asks for tile k."""
        for name, buffer in zip(self.names, self.buffers, strict=True):
            source = self.ref[name].at[self.row, pl.ds(k * TILE, TILE)]
            source = source if name in "BC" else source.at[:, self.mine]
            plgpu.copy_gmem_to_smem(source, buffer.at[slot], self.full.at[slot])

    def at(self, slot):
        """{name: the tile in a slot}."""
        return {name: x.at[slot] for name, x in zip(self.names, self.buffers, strict=True)}


def forward(options: Options, length, *refs):
    """One row's channels; arrays [rows, T, E], B and C [rows, T, 16], states [rows, E, 16]."""
    names = ["u", "delta", "B", "C", "A", "D", "bias", "h0"]
    names += ["z"] * options.gated + ["fresh", "reset"] * options.packed
    names += ["y", "h_last"] + ["before"] * options.keep
    ref = dict(zip(names, refs[:-1], strict=True))
    streams, step, written, rows, staged, full = refs[-1]
    row, first = lax.axis_index("row"), lax.axis_index("block") * CHANNELS
    mine, tiles = pl.ds(first, CHANNELS), length // TILE
    inputs = ["u", "delta", "B", "C"] + ["z"] * options.gated
    streams = _Streams(ref, inputs, streams, full, row, mine)
    A = load(ref["A"].at[mine], _STATE)
    D, bias = (load(ref[name].at[mine], _WEIGHT) for name in ("D", "bias"))
    if options.packed:
        reset_row = 0 if options.shared_reset else row
        reset = load(ref["reset"].at[reset_row, mine], _STATE)
    streams.send(0, 0)

    def walk(k, h):
        slot = lax.rem(k, SLOTS)
        at = streams.at(slot)

        @pl.when(k + 1 < tiles)
        def _():
            streams.send(k + 1, 1 - slot)

        if options.keep:
            ref["before"].at[row, k, mine][...] = h
        plgpu.barrier_wait(full.at[slot])
        prepare(step, written, at["delta"], at["u"], bias)
        plgpu.commit_smem()

        def some(i, h):
            for j in range(options.unroll):
                t = i * options.unroll + j
                if options.packed:
                    h = jnp.where(fresh(ref, row, k, t), reset, h)
                _, h = token(step, written, at["B"], A, h, t)
                C = spread(load(at["C"].at[t], _OF_STATES), h.shape, 1)
                rows.at[t][...] = (C * h).sum(1)
            return h

        h = lax.fori_loop(0, TILE // options.unroll, some, h)
        plgpu.commit_smem()
        y = tile(rows) + spread(D, (TILE, CHANNELS), 1) * tile(at["u"])
        if options.gated:
            z = tile(at["z"])
            y = y * z * sigmoid(z)
        out_is_read()
        send_out(staged, y, ref["y"].at[row, pl.ds(k * TILE, TILE), mine])
        return h

    h = lax.fori_loop(0, tiles, walk, load(ref["h0"].at[row, mine], _STATE))
    ref["h_last"].at[row, mine][...] = h
    plgpu.wait_smem_to_gmem(0)


def backward(options: Options, length, *refs):
    """Gradients of one row's channels, tiles of tokens in reverse.

    G_t is the gradient of h_t, P_t = a_t G_t times the state that token t meets. dB and dC are sums
    over the block's channels only [rows, blocks, T, 16]; dA, dD and dbias are those of one row.
    """
    names = ["u", "delta", "B", "C", "A", "D", "bias", "dout", "before", "dh_last"]
    names += ["z"] * options.gated + ["fresh", "reset"] * options.packed
    names += ["du", "ddelta", "dB", "dC", "dA", "dD", "dbias", "dh"]
    names += ["dz"] * options.gated + ["dreset"] * options.packed
    ref = dict(zip(names, refs[:-1], strict=True))
    streams, step, written, dy, rows, products, hs, sums, weights, full = refs[-1]
    row, block = lax.axis_index("row"), lax.axis_index("block")
    mine, tiles = pl.ds(block * CHANNELS, CHANNELS), length // TILE
    inputs = ["u", "delta", "B", "C"] + ["z"] * options.gated + ["dout"]
    streams = _Streams(ref, inputs, streams, full, row, mine)
    shape, wide = (CHANNELS, STATES), (TILE, CHANNELS)
    A = load(ref["A"].at[mine], _STATE)
    D, bias = (load(ref[name].at[mine], _WEIGHT) for name in ("D", "bias"))
    if options.packed:
        reset_row = 0 if options.shared_reset else row
        reset = load(ref["reset"].at[reset_row, mine], _STATE)

    ahead = streams.slots == 2  # float32 leaves shared memory for one tile only
    if ahead:
        streams.send(tiles - 1, 0)

    def walk(done, carry):
        k = tiles - 1 - done
        slot = lax.rem(done, streams.slots)
        at, tokens = streams.at(slot), pl.ds(k * TILE, TILE)
        if not ahead:
            out_is_read()
            streams.send(k, slot)
        h = load(ref["before"].at[row, k, mine], _STATE)
        plgpu.barrier_wait(full.at[slot])
        prepare(step, written, at["delta"], at["u"], bias)
        if options.gated:
            z = tile(at["z"])
            dy[...] = tile(at["dout"]) * z * sigmoid(z)
        else:
            dy[...] = tile(at["dout"])
        plgpu.commit_smem()
        hs.at[0][...] = h

        new = functools.partial(fresh, ref, row, k)

        def again(i, h):
            for j in range(options.unroll):
                t = i * options.unroll + j
                if options.packed:
                    h = jnp.where(new(t), reset, h)
                _, h = token(step, written, at["B"], A, h, t)
                hs.at[t + 1][...] = h
                if options.gated:
                    C = spread(load(at["C"].at[t], _OF_STATES), shape, 1)
                    rows.at[t][...] = (C * h).sum(1)
            return h

        lax.fori_loop(0, TILE // options.unroll, again, h)
        out_is_read()
        if ahead:

            @pl.when(k > 0)
            def _():
                streams.send(k - 1, 1 - slot)

        # Gradients leave by way of their inputs' places, whose numbers are no longer needed.
        if options.gated:
            z = tile(at["z"])
            gate = sigmoid(z)
            y = tile(rows) + spread(D, wide, 1) * tile(at["u"])
            dz = tile(at["dout"]) * y * gate * (1.0 + z * (1.0 - gate))
            send_out(at["z"], dz, ref["dz"].at[row, tokens, mine])
        over_channels(sums.at[1], hs.at[pl.ds(1, TILE)], dy)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(sums.at[1], ref["dC"].at[row, block, tokens])

        def back(i, carry):
            dh, dA, dreset = carry
            for j in range(options.unroll):
                t = TILE - 1 - (i * options.unroll + j)
                delta = spread(load(step.at[t], _CHANNEL), shape, 0)
                C = spread(load(at["C"].at[t], _OF_STATES), shape, 1)
                G = C * spread(load(dy.at[t], _CHANNEL), shape, 0) + dh
                dh = jnp.exp2(delta * A) * G
                h = load(hs.at[t], _STATE)
                if options.packed:
                    h = jnp.where(new(t), reset, h)
                    dreset = dreset + jnp.where(new(t), dh, jnp.zeros_like(dh))
                P = dh * h
                if options.packed:
                    dh = jnp.where(new(t), jnp.zeros_like(dh), dh)
                dA = dA + P * delta
                rows.at[t][...] = (P * A).sum(1)
                B = spread(load(at["B"].at[t], _OF_STATES), shape, 1)
                products.at[t][...] = (G * B).sum(1)
                hs.at[t + 1][...] = G
            return dh, dA, dreset

        dh, dA, dreset, dD, dbias = carry
        dh, dA, dreset = lax.fori_loop(0, TILE // options.unroll, back, (dh, dA, dreset))
        plgpu.commit_smem()
        over_channels(sums.at[0], hs.at[pl.ds(1, TILE)], written)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(sums.at[0], ref["dB"].at[row, block, tokens])
        u, through, delta = tile(at["u"]), tile(products), tile(step)
        dy_tile = tile(dy)
        du = delta * through + spread(D, wide, 1) * dy_tile
        ddelta = u * through + LN2 * tile(rows)
        ddelta = ddelta * sigmoid(tile(at["delta"]) + spread(bias, wide, 1))
        send_out(at["u"], du, ref["du"].at[row, tokens, mine])
        send_out(at["delta"], ddelta, ref["ddelta"].at[row, tokens, mine])
        return dh, dA, dreset, dD + u * dy_tile, dbias + ddelta

    def zeros(shape, layout):
        return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)

    dh = load(ref["dh_last"].at[row, mine], _STATE)
    none, tile_of_none = zeros(shape, _STATE), zeros(wide, _TOKENS)
    start = (dh, none, none, tile_of_none, tile_of_none)
    dh, dA, dreset, dD, dbias = lax.fori_loop(0, tiles, walk, start)
    ref["dh"].at[row, mine][...] = dh
    ref["dA"].at[row, mine][...] = dA
    if options.packed:
        ref["dreset"].at[row, mine][...] = dreset
    for i, (name, x) in enumerate((("dD", dD), ("dbias", dbias))):
        weights.at[i][...] = x.sum(0)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(weights.at[i], ref[name].at[row, mine])
    plgpu.wait_smem_to_gmem(0)
