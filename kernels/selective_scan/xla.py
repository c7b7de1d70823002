"""The selective scan in plain JAX: chunks of tokens with the state between them, written gradient.

With the decays a_t = exp(Δ_t A) and what is written, b_t = Δ_t u_t B_t, a state is
h_t = a_t h_{t-1} + b_t. Where a loop costs little (CPUs) a chunk is a loop over its tokens, whose
few arrays stay in the caches; elsewhere a_t and b_t of all its tokens are there at once and the
states are an associative scan. Nothing is divided by products of decays: that would overflow.

Gradient, with G_t that of h_t, s = sum over states, dy that before the gate:

    G_t = C_t dy_t + a_{t+1} G_{t+1}         P_t = G_t (h_t - b_t)     (h_t - b_t = a_t h_{t-1})
    dC_t = sum_e h_t dy_t    dB_t = sum_e G_t Δ_t u_t    du_t = Δ_t s(G_t B_t) + D dy_t
    dΔ_t = u_t s(G_t B_t) + s(P_t A)             dA = sum_t P_t Δ_t           dh_0 = a_1 G_1

Kept for it are the inputs and the state before every chunk; the rest is computed once more. States
lie as [N, E], so that the longer axis is the one that vector units see.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import dispatch
from kernels.selective_scan.ref import Inputs

NEVER = -1e30  # added to a pre-activation of Δ: softplus gives 0, the state stays as it is


class Options(NamedTuple):
    """What is fixed when compiling."""

    chunk: int
    in_turn: bool  # one token after another inside a chunk, else an associative scan


def selective_scan(
    inputs: Inputs, *, chunk: int | None = None, in_turn: bool | None = None
) -> tuple[Float[Array, "b t e"], Float[Array, "b e n"]]:
    """The reference's function; chunk: tokens whose states are in memory at the same time;
    in_turn: whether they are computed one after another or as an associative scan. On CPUs 16
    tokens in turn are fastest; elsewhere 64 make an associative scan worthwhile.
    """
    if in_turn is None:
        in_turn = dispatch.platform() == "cpu"
    options = Options(min(chunk or (16 if in_turn else 64), inputs.u.shape[1]), in_turn)
    swap = lambda x: jnp.swapaxes(x, -1, -2)  # noqa: E731
    inputs = inputs._replace(A=inputs.A.T, h0=swap(inputs.h0), reset=swap(inputs.reset))
    y, h = _scan(options, inputs)
    return y, swap(h)


class Chunk(NamedTuple):
    """Tokens of one chunk, time first, or, stacked on a leading axis, of all of them."""

    u: Float[Array, "l b e"]
    delta: Float[Array, "l b e"]
    B: Float[Array, "l b n"]
    C: Float[Array, "l b n"]
    z: Float[Array, "l b e"] | None
    fresh: Array | None


class Terms(NamedTuple):
    """The recurrence of a chunk: h_t = a_t (h_{t-1} or the reset state) + b_t."""

    delta: Float[Array, "l b e"]
    a: Float[Array, "l b n e"]  # decays
    kept: Float[Array, "l b n e"]  # decays, 0 where a document begins
    b: Float[Array, "l b n e"]
    start: Float[Array, "l b n e"] | float  # what a reset state adds


def _chunks(options: Options, inputs: Inputs) -> Chunk:
    length = options.chunk

    def cut(x, fill=0):
        if x is None:
            return None
        pad = [(0, 0), (0, -x.shape[1] % length)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.moveaxis(jnp.pad(x, pad, constant_values=fill), 1, 0)
        return x.reshape(-1, length, *x.shape[1:])

    u, delta, B, C, z, fresh = inputs[:6]
    return Chunk(cut(u), cut(delta, NEVER), cut(B), cut(C), cut(z), cut(fresh))


def _join(x, length: int):
    """[chunks, l, b, ...] -> [b, t, ...] without the padding."""
    return jnp.moveaxis(x.reshape(-1, *x.shape[2:])[:length], 0, 1)


def _terms(inputs: Inputs, chunk: Chunk) -> Terms:
    wide = inputs.wide
    delta = jax.nn.softplus(chunk.delta.astype(wide) + inputs.bias)
    a = jnp.exp(delta[:, :, None] * inputs.A)
    b = (delta * chunk.u.astype(wide))[:, :, None] * chunk.B.astype(wide)[..., None]
    if chunk.fresh is None:
        return Terms(delta, a, a, b, 0.0)
    fresh = chunk.fresh[:, :, None, None]
    return Terms(delta, a, jnp.where(fresh, 0.0, a), b, jnp.where(fresh, a * inputs.reset, 0.0))


def _recurrence(a, b, h, reverse=False):
    """All x_t = a_t x_{t-1} + b_t (reverse: of x_{t+1}), x before the first being h."""

    def then(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    first = -1 if reverse else 0
    b = b.at[first].add(a[first] * h)
    return jax.lax.associative_scan(then, (a, b), reverse=reverse)[1]


def _ungated(inputs: Inputs, chunk: Chunk, h) -> Float[Array, "l b e"]:
    wide = inputs.wide
    return (h * chunk.C.astype(wide)[..., None]).sum(2) + inputs.D * chunk.u.astype(wide)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(options, inputs: Inputs):
    return _run(options, inputs)[0]


def _run(options, inputs: Inputs):
    """((y, last state), state before every chunk)."""

    def body(h, chunk):
        if options.in_turn:
            last, y = jax.lax.scan(functools.partial(_token, inputs), h, chunk)
            return last, (y, h)
        terms = _terms(inputs, chunk)
        states = _recurrence(terms.kept, terms.b + terms.start, h)
        y = _ungated(inputs, chunk, states)
        if chunk.z is not None:
            y = y * jax.nn.silu(chunk.z.astype(y.dtype))
        return states[-1], (y.astype(inputs.u.dtype), h)

    h, (y, before) = jax.lax.scan(body, inputs.h0, _chunks(options, inputs))
    return (_join(y, inputs.u.shape[1]), h), before


def _forward(options, inputs):
    out, before = _run(options, inputs)
    return out, (inputs, before)


def _backward(options, residuals, cotangents):
    inputs, before = residuals
    dy, dh = cotangents
    length = options.chunk
    pad = (0, -dy.shape[1] % length)
    dy = jnp.moveaxis(jnp.pad(dy, ((0, 0), pad, (0, 0))), 1, 0)
    dy = dy.reshape(-1, length, *dy.shape[1:])

    gradients = _gradients_in_turn if options.in_turn else _gradients

    def body(carry, given):
        dh, sums = carry
        tokens, dh, added = gradients(inputs, *given, dh)
        return (dh, jax.tree.map(jnp.add, sums, added)), tokens

    weights = (inputs.A, inputs.D, inputs.bias, inputs.reset)
    start = (dh, jax.tree.map(jnp.zeros_like, weights))
    xs = (_chunks(options, inputs), before, dy)
    (dh, sums), tokens = jax.lax.scan(body, start, xs, reverse=True)
    tokens = jax.tree.map(lambda x: _join(x, inputs.u.shape[1]), tokens)
    dA, dD, dbias, dreset = sums
    return (Inputs(*tokens, None, dA, dD, dbias, dh, dreset),)


def _gradients(inputs: Inputs, chunk: Chunk, before, dout, dh):
    """((du, ddelta, dB, dC, dz), gradient of the state before the chunk, those of the weights)."""
    wide, terms = inputs.wide, _terms(inputs, chunk)
    u, B, C, dy = (x.astype(wide) for x in (chunk.u, chunk.B, chunk.C, dout))
    h = _recurrence(terms.kept, terms.b + terms.start, before)
    dz = None
    if chunk.z is not None:
        z = chunk.z.astype(wide)
        gate = jax.nn.sigmoid(z)
        dz = dy * _ungated(inputs, chunk, h) * gate * (1 + z * (1 - gate))
        dz, dy = dz.astype(chunk.z.dtype), dy * z * gate
    after = jnp.concatenate([terms.kept[1:], jnp.ones_like(terms.kept[:1])])
    G = _recurrence(after, C[..., None] * dy[:, :, None], dh, reverse=True)
    P = G * (h - terms.b)
    from_input = (G * B[..., None]).sum(2)
    ddelta = u * from_input + (P * inputs.A).sum(2)
    ddelta = ddelta * jax.nn.sigmoid(chunk.delta.astype(wide) + inputs.bias)
    du = terms.delta * from_input + inputs.D * dy
    dB = (G * (terms.delta * u)[:, :, None]).sum(-1)
    dC = (h * dy[:, :, None]).sum(-1)
    dreset = jnp.zeros_like(inputs.reset)
    if chunk.fresh is not None:
        began = jnp.where(chunk.fresh[:, :, None, None], terms.a * G, 0.0).sum(0)
        dreset = began if inputs.reset.shape[0] == began.shape[0] else began.sum(0, keepdims=True)
    weights = ((P * terms.delta[:, :, None]).sum((0, 1)), (u * dy).sum((0, 1)))
    grads = ((du, chunk.u), (ddelta, chunk.delta), (dB, chunk.B), (dC, chunk.C))
    tokens = (*(d.astype(x.dtype) for d, x in grads), dz)
    return tokens, terms.kept[0] * G[0], (*weights, ddelta.sum((0, 1)), dreset)


def _next(inputs: Inputs, h, u, delta, B, fresh):
    """The state after a token: u, delta [b, e] (Δ itself), B [b, n], all wide."""
    if fresh is not None:
        h = jnp.where(fresh[:, None, None], inputs.reset, h)
    return jnp.exp(delta[:, None] * inputs.A) * h + (delta * u)[:, None] * B[..., None]


def _token(inputs: Inputs, h, token: Chunk):
    """(state after one token, y)."""
    wide = inputs.wide
    u, B, C = (x.astype(wide) for x in (token.u, token.B, token.C))
    delta = jax.nn.softplus(token.delta.astype(wide) + inputs.bias)
    h = _next(inputs, h, u, delta, B, token.fresh)
    y = (h * C[..., None]).sum(1) + inputs.D * u
    if token.z is not None:
        y = y * jax.nn.silu(token.z.astype(wide))
    return h, y.astype(inputs.u.dtype)


def _gradients_in_turn(inputs: Inputs, chunk: Chunk, before, dout, dh):
    """What _gradients gives: the chunk's states first, then its tokens from the last one."""
    wide = inputs.wide
    u, B, C, dy = (x.astype(wide) for x in (chunk.u, chunk.B, chunk.C, dout))
    delta = jax.nn.softplus(chunk.delta.astype(wide) + inputs.bias)

    def forward(h, token):
        h = _next(inputs, h, *token)
        return h, h

    states = jax.lax.scan(forward, before, (u, delta, B, chunk.fresh))[1]

    def backward(carry, token):
        G, dA, dreset = carry  # G: what later tokens want of this one's state
        u, delta, B, C, dy, z, fresh, h = token
        dz = None
        if z is not None:
            y, z = (h * C[..., None]).sum(1) + inputs.D * u, z.astype(wide)
            gate = jax.nn.sigmoid(z)
            dz, dy = dy * y * gate * (1 + z * (1 - gate)), dy * z * gate
        G = G + C[..., None] * dy[:, None]
        P = G * (h - (delta * u)[:, None] * B[..., None])
        from_input = (G * B[..., None]).sum(1)
        grads = (
            delta * from_input + inputs.D * dy,
            u * from_input + (P * inputs.A).sum(1),
            (G * (delta * u)[:, None]).sum(-1),
            (h * dy[:, None]).sum(-1),
        )
        dA = dA + (P * delta[:, None]).sum(0)
        G = jnp.exp(delta[:, None] * inputs.A) * G
        if fresh is not None:
            began = jnp.where(fresh[:, None, None], G, 0.0)
            G = jnp.where(fresh[:, None, None], 0.0, G)
            dreset += began if len(dreset) == len(began) else began.sum(0, keepdims=True)
        return (G, dA, dreset), (*grads, dz, (u * dy).sum(0))

    start = (dh, jnp.zeros_like(inputs.A), jnp.zeros_like(inputs.reset))
    tokens = (u, delta, B, C, dy, chunk.z, chunk.fresh, states)
    (dh, dA, dreset), found = jax.lax.scan(backward, start, tokens, reverse=True)
    du, ddelta, dB, dC, dz, dD = found
    ddelta = ddelta * jax.nn.sigmoid(chunk.delta.astype(wide) + inputs.bias)
    grads = (du, ddelta, dB, dC, dz)
    types = (chunk.u, chunk.delta, chunk.B, chunk.C, chunk.z)
    tokens = tuple(d if d is None else d.astype(x.dtype) for d, x in zip(grads, types))
    return tokens, dh, (dA, dD.sum(0), ddelta.sum((0, 1)), dreset)


_scan.defvjp(_forward, _backward)
