"""What the selective scan's TPU kernels do with one tile of tokens and channels.

States lie on sublanes, channels on lanes: the state of 640 channels with 16 numbers each is ten
registers, which stay registers while the tokens of a tile pass. A token's Δ and Δ u are rows,
repeated over sublanes as they are loaded; its B and C are columns, turned to lane 0 once for 16
tokens and then repeated over lanes.

Sums over states or channels are left to the matrix unit, which is idle otherwise: the states of 16
tokens lie below each other as H [16 N, W], and with S the 16 x 16 N matrix that has C_t in row t at
token t's states and 0 elsewhere, y = S H. The products' operands are in the type of u; the
recurrence is float32.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
BLOCK = 16  # tokens that a loop's body spells out: rows of a tile of bfloat16
LN2 = 0.6931471805599453


def softplus(x):
    """log(1 + e^x). What 1 + e^-|x| rounds away is added to its logarithm, which keeps the digits
    of small results with fewer operations than log1p."""
    e = jnp.exp(-jnp.abs(x))
    w = 1.0 + e
    return (jnp.maximum(x, 0.0) + (e - (w - 1.0))) + jnp.log(w)


def _dot(x, y, contract=(1, 0)):
    """Product over one axis of each; float32 operands in full float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dims, precision, preferred_element_type=jnp.float32)


def _own(rows: int, states: int):
    """[rows, BLOCK * N]: whether a column holds a state of the row's token."""
    shape = (rows, BLOCK * states)
    token = jax.lax.rem(jax.lax.broadcasted_iota(jnp.int32, shape, 0), BLOCK)
    return jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, shape, 1), states) == token


def _spread(ref, columns):
    """The matrices S of a tile, [tokens, BLOCK * N], from columns [tokens / 128, N, 128]."""
    states = columns.shape[1]
    shape = (states, BLOCK * states)
    state = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    copies = jax.lax.rem(jax.lax.broadcasted_iota(jnp.int32, shape, 1), states) == state
    for i in range(columns.shape[0]):
        tokens = min(LANES, ref.shape[0] - i * LANES)
        repeated = _dot(columns[i].astype(ref.dtype), copies.astype(ref.dtype), (0, 0))[:tokens]
        matrices = jnp.where(_own(tokens, states), repeated, 0.0)
        ref[i * LANES : i * LANES + tokens] = matrices.astype(ref.dtype)


class _Columns:
    """Columns of a [tokens / 128, N, 128] reference, from a first one on, repeated over lanes."""

    def __init__(self, ref, first, width):
        back = LANES - jax.lax.rem(first, LANES)
        self.turned = pltpu.roll(ref[jax.lax.div(first, LANES)], jax.lax.rem(back, LANES), 1)
        self.width = width

    def __getitem__(self, j):
        if isinstance(j, int):
            column = self.turned[:, j : j + 1]
        else:  # the interpreter's loop; the compiler knows no such slice
            column = jax.lax.dynamic_slice_in_dim(self.turned, j, 1, axis=1)
        return jnp.broadcast_to(column, (column.shape[0], self.width))


def _here(i):
    """The tokens of block i."""
    return pl.ds(pl.multiple_of(i * BLOCK, BLOCK), BLOCK)


def _wide(ref, where):
    return ref[where].astype(jnp.float32)


def _prepare(ref: Mapping, tokens: int):
    """Δ and Δ u of a tile in float32, and the matrices S of C."""

    @pl.loop(0, tokens // BLOCK // 2)
    def _(pair):
        for i in (2 * pair, 2 * pair + 1):
            delta = softplus(_wide(ref["delta"], _here(i)) + ref["bias"][...])
            _write(ref["step"], _here(i), delta)
            _write(ref["input"], _here(i), delta * _wide(ref["u"], _here(i)))

    _spread(ref["readers"], ref["C"])


def _write(ref, where, x):
    """Rows of [tokens, W] into [W / 128, tokens, 128]: of 128 lanes a row can be loaded repeated
    over sublanes; of more it is loaded as it is and repeated by the vector unit."""
    for group in range(ref.shape[0]):
        ref[group, where] = x[:, group * LANES : (group + 1) * LANES]


def _states_of(token, states: int, tokens: int = 1):
    return pl.ds(pl.multiple_of(token * states, states), tokens * states)


def _store(ref, j, x):
    """[N, W] of token j to its place in [W / 128, BLOCK * N, 128]."""
    for group in range(ref.shape[0]):
        part = x[:, group * LANES : (group + 1) * LANES]
        ref[group, _states_of(j, x.shape[0])] = part.astype(ref.dtype)


def _times(x, ref):
    """x [rows, BLOCK * N] times what `_store` put together: [rows, W]."""
    return jnp.concatenate([_dot(x, ref[group]) for group in range(ref.shape[0])], axis=1)


def _row(ref, token, states: int):
    """The row of a token, repeated over its states: [N, W]."""
    rows = [ref[group, pl.ds(token, 1)] for group in range(ref.shape[0])]
    return jnp.concatenate([jnp.broadcast_to(x, (states, LANES)) for x in rows], axis=1)


def _rows(ref, where):
    """[rows, W] of [W / 128, rows, 128]."""
    return jnp.concatenate([ref[group, where] for group in range(ref.shape[0])], axis=1)


def _fresh(ref: Mapping, token):
    return ref["fresh"][0, token] != 0


def _in_turn(body, carry, spelled: bool, reverse=False):
    """body(j, carry) for every token of a block. Spelled out, tokens overlap; as a loop it is a
    short program for the interpreter."""

    def at(j):
        return BLOCK - 1 - j if reverse else j

    if not spelled:
        return jax.lax.fori_loop(0, BLOCK, lambda j, carry: body(at(j), carry), carry)
    for j in range(BLOCK):
        carry = body(at(j), carry)
    return carry


def _advance(ref: Mapping, i, h, H, spelled: bool):
    """The state after block i; those after each token go to H."""
    first, states = i * BLOCK, h.shape[0]
    B = _Columns(ref["B"], first, h.shape[1])

    def body(j, h):
        if "fresh" in ref:
            h = jnp.where(_fresh(ref, first + j), ref["reset"][...], h)
        a = jnp.exp2(_row(ref["step"], first + j, states) * ref["A"][...])
        h = a * h + _row(ref["input"], first + j, states) * B[j]
        if H is not None:
            _store(H, j, h)
        if "states" in ref:
            _store(ref["states"], first + j + 1, h)
        return h

    return _in_turn(body, h, spelled)


def _ungated(ref: Mapping, i, H):
    """y of block i before the gate."""
    return _times(ref["readers"][_here(i)], H) + ref["D"][...] * _wide(ref["u"], _here(i))


def _in_pairs(count: int, start, carry, finish, reverse=False):
    """carry after start(block, carry, buffer) of each of `count` blocks, an even number.

    finish(block, buffer) runs beside the next block's start, so that its products and exponentials
    fill pauses; the first time it is of nothing, and what it writes is overwritten.
    """

    def at(k):
        return count - 1 - k if reverse else k

    def pair(k, carry):
        finish(at(jnp.maximum(2 * k - 1, 0)), 1)
        carry = start(at(2 * k), carry, 0)
        finish(at(2 * k), 0)
        return start(at(2 * k + 1), carry, 1)

    carry = jax.lax.fori_loop(0, count // 2, pair, carry)
    finish(at(count - 1), 1)
    return carry


def forward(tokens: int, spelled: bool, ref: Mapping):
    """y of the tile and the state after it; the state before it if it is to be kept."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        ref["h"][...] = ref["h0"][...]

    if "before" in ref:
        ref["before"][...] = ref["h"][...]
    _prepare(ref, tokens)
    H = ref["even"], ref["odd"]

    def start(i, h, buffer):
        return _advance(ref, i, h, H[buffer], spelled)

    def finish(i, buffer):
        y = _ungated(ref, i, H[buffer])
        if "z" in ref:
            z = _wide(ref["z"], _here(i))
            y = y * z * jax.nn.sigmoid(z)
        ref["y"][_here(i)] = y.astype(ref["y"].dtype)

    ref["h"][...] = _in_pairs(tokens // BLOCK, start, ref["h"][...], finish)


def backward(tokens: int, spelled: bool, ref: Mapping):
    """Gradients of a tile from those of its y and of the state after it; tiles come in reverse.

    G_t is the gradient of h_t, P_t = a_t G_t times the state that token t meets. Sums over tiles of
    channels (dB, dC) and over rows (dA, dD, dbias) are finished outside.
    """
    sums = [name for name in ("dA", "dD", "dbias", "dreset") if name in ref]

    @pl.when(pl.program_id(2) == 0)
    def _():
        ref["dh"][...] = ref["dh_last"][...]
        for name in sums:
            ref[name][...] = jnp.zeros(ref[name].shape, jnp.float32)

    _prepare(ref, tokens)
    _spread(ref["writers"], ref["B"])
    _again(ref, tokens, spelled)
    states, dtype = ref["A"].shape[0], ref["u"].dtype
    own = _own(BLOCK, states)
    ones = jnp.where(own, 1.0, 0.0).astype(dtype)
    G, P = (ref["G even"], ref["G odd"]), (ref["even"], ref["odd"])

    def start(i, carry, buffer):
        first = i * BLOCK
        C = _Columns(ref["C"], first, ref["A"].shape[1])

        def body(j, carry):
            dh, dA, dreset = carry
            delta = _row(ref["step"], first + j, states)
            h = _rows(ref["states"], _states_of(first + j, states))
            dh = C[j] * _row(ref["dy"], first + j, states) + dh
            _store(G[buffer], j, dh)
            dh = jnp.exp2(delta * ref["A"][...]) * dh
            if "fresh" in ref:
                new = _fresh(ref, first + j)
                h = jnp.where(new, ref["reset"][...], h)
                dreset = dreset + jnp.where(new, dh, 0.0)
            dP = dh * h
            if "fresh" in ref:
                dh = jnp.where(new, 0.0, dh)
            _store(P[buffer], j, dP * ref["A"][...])
            return dh, dA + dP * delta, dreset

        return _in_turn(body, carry, spelled, reverse=True)

    def finish(i, buffer):
        here, u = _here(i), _wide(ref["u"], _here(i))
        delta, dy = _rows(ref["step"], here), _rows(ref["dy"], here)
        through = _times(ref["writers"][here], G[buffer])
        du = delta * through + ref["D"][...] * dy
        ddelta = u * through + LN2 * _times(ones, P[buffer])
        ddelta = ddelta * jax.nn.sigmoid(_wide(ref["delta"], here) + ref["bias"][...])
        ref["bias parts"][pl.ds(i, 1)] = ddelta.sum(0, keepdims=True)
        ref["D parts"][pl.ds(i, 1)] = (u * dy).sum(0, keepdims=True)
        ref["du"][here] = du.astype(ref["du"].dtype)
        ref["ddelta"][here] = ddelta.astype(ref["ddelta"].dtype)
        after = _states_of(i * BLOCK + 1, states, BLOCK)
        dB, dC = 0.0, 0.0
        for group in range(ref["step"].shape[0]):
            x = (ref["input"][group, here].astype(dtype), ref["dy"][group, here].astype(dtype))
            dB = dB + _dot(x[0], G[buffer][group], (1, 1))
            dC = dC + _dot(x[1], ref["states"][group, after].astype(dtype), (1, 1))
        for name, x in (("dB", dB), ("dC", dC)):
            ref[name][pl.ds(i, 1)] = jnp.where(own, x, 0.0).sum(0, keepdims=True)

    zeros = jnp.zeros(ref["A"].shape, jnp.float32)
    dreset = zeros if "fresh" in ref else 0.0
    carry = (ref["dh"][...], zeros, dreset)
    dh, dA, dreset = _in_pairs(tokens // BLOCK, start, carry, finish, reverse=True)
    ref["dh"][...] = dh
    ref["dA"][...] += dA
    if "fresh" in ref:
        ref["dreset"][...] += dreset
    ref["dD"][...] += ref["D parts"][...].sum(0, keepdims=True)
    ref["dbias"][...] += ref["bias parts"][...].sum(0, keepdims=True)


def _again(ref: Mapping, tokens: int, spelled: bool):
    """The states of a tile once more, and with them dz and dy before the gate."""
    h = ref["before"][...]
    _store(ref["states"], 0, h)
    H = (ref["even"], ref["odd"]) if "z" in ref else (None, None)

    def start(i, h, buffer):
        return _advance(ref, i, h, H[buffer], spelled)

    def finish(i, buffer):
        dy = _wide(ref["dout"], _here(i))
        if "z" in ref:
            z = _wide(ref["z"], _here(i))
            gate = jax.nn.sigmoid(z)
            dz = dy * _ungated(ref, i, H[buffer]) * gate * (1.0 + z * (1.0 - gate))
            ref["dz"][_here(i)] = dz.astype(ref["dz"].dtype)
            dy = dy * z * gate
        _write(ref["dy"], _here(i), dy)

    _in_pairs(tokens // BLOCK, start, h, finish)
