"""The mLSTM in chunks of L tokens: matrix products inside, one state between (arXiv 2503.14376).

Per chunk, with b the cumulative log forget gates, D_ts = b_t - b_s + i_s for s <= t, and
m_t = max(b_t + m, max_s D_ts):

    S = (q̄ kᵀ) exp(D - m_t),  w_t = exp(b_t + m - m_t)
    num = w (q̄ C) + S v,  den = w (q̄ n) + S 1,  h = num / (max(|den|, exp(-m_t)) + eps)
    a_s = sum_{r>s} lf_r + i_s,  m' = max(b_L + m, max a),  u = exp(a - m')
    C' = exp(b_L + m - m') C + (u k)ᵀ v,  n' likewise with ones for v

The gradient is written out. It is exact: gauges m are constants in it (h and the state as a whole
do not depend on them), so it flows through the first and the last state too. Kept for it are the
inputs; states are computed once more, one per chunk, scores chunk by chunk.

Pairs of tokens of different documents are masked before the exponential, and stay out of maxima.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.mlstm.ref import EPS, State

CHUNK = 64
NEVER = -1e30  # input gate of padding: exp gives exactly 0


class Options(NamedTuple):
    """What is fixed when compiling."""

    chunk: int
    eps: float
    official_backward: bool


def mlstm(
    q: Float[Array, "b h t k"],
    k: Float[Array, "b h t k"],
    v: Float[Array, "b h t v"],
    i: Float[Array, "b h t"],
    f: Float[Array, "b h t"],
    state: State,
    documents: Int[Array, "b t"] | None,
    *,
    eps: float = EPS,
    chunk: int | None = None,
    official_backward: bool = False,
) -> tuple[Float[Array, "b h t v"], State]:
    """The reference's function.

    official_backward: the gradient of the authors' kernels: the denominator is a constant in it,
    and what flows into the last state is left out of the forget gates' (and none may flow in).
    """
    length = q.shape[2]
    options = Options(min(chunk or CHUNK, length), eps, official_backward)
    if documents is None:
        documents = jnp.zeros((q.shape[0], length), jnp.int32)
    log_f = jax.nn.log_sigmoid(f.astype(state.C.dtype))
    i = i.astype(state.C.dtype)
    h, state = _chunkwise(options, q, k, v, i, log_f, *state, documents)
    return h, State(*state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunkwise(options, q, k, v, i, log_f, C, n, m, documents):
    inputs = _split(options.chunk, q, k, v, i, log_f, documents)
    first = jnp.zeros_like(documents[:, 0])

    def body(carry, chunk):
        *state, document = carry
        gates = _gates(chunk, State(*state), document)
        out = _output(options, chunk, State(*state), gates)
        return (*_next(chunk, State(*state), gates), chunk.documents[:, -1]), out.h

    (*state, _), h = jax.lax.scan(body, (C, n, m, first), inputs)
    return _join(h, q.shape[2]).astype(v.dtype), tuple(state)


class Chunk(NamedTuple):
    """The tokens of one chunk, or, stacked on a leading axis, of all of them."""

    q: Float[Array, "b h l k"]
    k: Float[Array, "b h l k"]
    v: Float[Array, "b h l v"]
    i: Float[Array, "b h l"]
    log_f: Float[Array, "b h l"]
    documents: Int[Array, "b l"]


class Gates(NamedTuple):
    """Weights of one chunk: E between its tokens, w from the state, u and gamma to the next one."""

    E: Float[Array, "b h l l"]
    w: Float[Array, "b h l"]
    m: Float[Array, "b h l"]
    u: Float[Array, "b h l"]
    gamma: Float[Array, "b h"]
    m_next: Float[Array, "b h"]


class Output(NamedTuple):
    """h and what its gradient needs of the way there."""

    h: Float[Array, "b h l v"]
    S: Float[Array, "b h l l"]
    den: Float[Array, "b h l"]
    bound: Float[Array, "b h l"]  # max(|den|, exp(-m)) + eps


def _split(length, q, k, v, i, log_f, documents) -> Chunk:
    """Chunks on a leading axis; padding keeps state and document."""
    more = -q.shape[2] % length

    def cut(x, axis, **pad):
        if more:
            widths = [(0, more if a == axis else 0) for a in range(x.ndim)]
            x = jnp.pad(x, widths, **pad)
        x = x.reshape(*x.shape[:axis], -1, length, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    return Chunk(
        *(cut(x, 2) for x in (q, k, v)),
        cut(i, 2, constant_values=NEVER),
        cut(log_f, 2),
        cut(documents, 1, mode="edge"),
    )


def _join(x, length):
    """[chunks, b, h, l, ...] -> [b, h, t, ...] without the padding."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :length]


def _dot(spec, x, y):
    """Products in the narrower of the two types, sums in float32 or better."""
    narrow = min(x.dtype, y.dtype, key=lambda d: jnp.finfo(d).bits)
    wide = jnp.promote_types(narrow, jnp.float32)
    precision = "highest" if narrow == wide else None
    x, y = x.astype(narrow), y.astype(narrow)
    return jnp.einsum(spec, x, y, preferred_element_type=wide, precision=precision)


def _exp(x, visible):
    """exp where visible, else 0; no gradient and no overflow from the rest."""
    return jnp.where(visible, jnp.exp(jnp.where(visible, x, 0.0)), 0.0)


def _most(x, visible, axis=None):
    x = jnp.where(visible, x, -jnp.inf)
    return x if axis is None else x.max(axis)


def _gates(chunk: Chunk, state: State, document: Int[Array, "b"]) -> Gates:
    """All exponentials of one chunk; `document` is the state's."""
    i, log_f, numbers = chunk.i, chunk.log_f, chunk.documents
    length = i.shape[-1]
    t = jnp.arange(length)
    b = jnp.cumsum(log_f, axis=-1)
    # Summed from the end, not b_L - b_s: that would cancel.
    after = jnp.cumsum(log_f[..., ::-1], axis=-1)[..., ::-1] - log_f
    a = after + i
    D = b[..., :, None] - b[..., None, :] + i[..., None, :]
    pairs = (t[:, None] >= t) & (numbers[:, :, None] == numbers[:, None, :])[:, None]
    own = (numbers == document[:, None])[:, None]
    from_state = b + state.m[..., None]
    m = jnp.maximum(_most(from_state, own), _most(D, pairs, -1))
    last = numbers[:, -1:]
    lasting, kept = (numbers == last)[:, None], document[:, None] == last
    to_next = b[..., -1] + state.m
    m_next = jnp.maximum(_most(to_next, kept), _most(a, lasting, -1))
    return Gates(
        E=_exp(D - m[..., None], pairs),
        w=_exp(from_state - m, own),
        m=m,
        u=_exp(a - m_next[..., None], lasting),
        gamma=_exp(to_next - m_next, kept),
        m_next=m_next,
    )


def _output(options: Options, chunk: Chunk, state: State, gates: Gates) -> Output:
    # The scale of q goes into the weights: q itself keeps its digits.
    scale = chunk.q.shape[-1] ** -0.5
    S = _dot("bhtk,bhsk->bhts", chunk.q, chunk.k) * (scale * gates.E)
    w = scale * gates.w
    num = w[..., None] * _dot("bhtk,bhkv->bhtv", chunk.q, state.C)
    num += _dot("bhts,bhsv->bhtv", S, chunk.v)
    den = w * jnp.einsum("bhtk,bhk->bht", chunk.q.astype(S.dtype), state.n) + S.sum(-1)
    bound = jnp.maximum(jnp.abs(den), jnp.exp(-gates.m)) + options.eps
    return Output(num / bound[..., None], S, den, bound)


def _next(chunk: Chunk, state: State, gates: Gates) -> State:
    k = gates.u[..., None] * chunk.k.astype(gates.u.dtype)
    C = gates.gamma[..., None, None] * state.C + _dot("bhlk,bhlv->bhkv", k, chunk.v)
    return State(C, gates.gamma[..., None] * state.n + k.sum(-2), gates.m_next)


def _forward(options, q, k, v, i, log_f, C, n, m, documents):
    out = _chunkwise(options, q, k, v, i, log_f, C, n, m, documents)
    return out, (q, k, v, i, log_f, C, n, m, documents)


def _backward(options, residuals, cotangents):
    q, k, v, i, log_f, C, n, m, documents = residuals
    dh, (dC, dn, _) = cotangents
    chunks = _split(options.chunk, q, k, v, i, log_f, documents)
    first = jnp.zeros_like(documents[:, 0])

    def sweep(carry, chunk):
        *state, document = carry
        state = State(*state)
        after = _next(chunk, state, _gates(chunk, state, document))
        return (*after, chunk.documents[:, -1]), carry

    (*last, _), before = jax.lax.scan(sweep, (C, n, m, first), chunks)
    more = -q.shape[2] % options.chunk
    dh = jnp.pad(dh.astype(C.dtype), ((0, 0), (0, 0), (0, more), (0, 0)))
    dh = jnp.moveaxis(dh.reshape(*dh.shape[:2], -1, options.chunk, dh.shape[-1]), 2, 0)

    def body(carry, inputs):
        dC, dn, after = carry  # of and at the chunk's outgoing state
        chunk, (*state, document), dh = inputs
        state = State(*state)
        grads, flow = _chunk_gradients(options, chunk, state, document, dh, dC, dn)
        *tokens, dC_before, dn_before = grads
        if not options.official_backward:
            into_next = (after.C * dC).sum((-2, -1)) + (after.n * dn).sum(-1)
            flow = jnp.cumsum(flow[..., ::-1], axis=-1)[..., ::-1] + into_next[..., None]
        return (dC_before, dn_before, state), (*tokens, flow)

    start = (dC.astype(C.dtype), dn.astype(C.dtype), State(*last))
    (dC, dn, _), stacked = jax.lax.scan(body, start, (chunks, before, dh), reverse=True)
    dq, dk, dv, di, dlog_f = (_join(x, q.shape[2]) for x in stacked)
    if options.official_backward:  # one sum over the whole row, nothing from the last state
        dlog_f = jnp.cumsum(dlog_f[..., ::-1], axis=-1)[..., ::-1]
    dq, dk, dv = (d.astype(x.dtype) for d, x in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv, di, dlog_f, dC, dn, jnp.zeros_like(m), None


def _chunk_gradients(options, chunk, state, document, dh, dC, dn):
    """((dq, dk, dv, di, dC, dn before), <q, dq> - <k, dk> per token) of one chunk."""
    gates = _gates(chunk, state, document)
    out = _output(options, chunk, state, gates)
    wide, (q, k, v) = dh.dtype, chunk[:3]
    scale = q.shape[-1] ** -0.5
    dnum = dh / out.bound[..., None]
    dden = jnp.zeros_like(out.den)
    if not options.official_backward:
        slope = -jnp.sign(out.den) * (dh * out.h).sum(-1) / out.bound
        dden = jnp.where(jnp.abs(out.den) > jnp.exp(-gates.m), slope, 0.0)
    w, u = scale * gates.w[..., None], gates.u[..., None]
    narrow = dnum.astype(v.dtype)
    P = (_dot("bhtv,bhsv->bhts", narrow, v) + dden[..., None]) * (scale * gates.E)
    dq = _dot("bhts,bhsk->bhtk", P, k) + w * (
        _dot("bhtv,bhkv->bhtk", narrow, state.C) + dden[..., None] * state.n[..., None, :]
    )
    dk = _dot("bhts,bhtk->bhsk", P, q) + u * (_dot("bhsv,bhkv->bhsk", v, dC) + dn[..., None, :])
    dv = _dot("bhts,bhtv->bhsv", out.S, narrow) + u * _dot("bhsk,bhkv->bhsv", k, dC)
    di = (k.astype(wide) * dk).sum(-1)
    flow = (q.astype(wide) * dq).sum(-1) - di
    wq = w * q.astype(wide)
    dC = gates.gamma[..., None, None] * dC + _dot("bhtk,bhtv->bhkv", wq, narrow)
    dn = gates.gamma[..., None] * dn + jnp.einsum("bhtk,bht->bhk", wq, dden)
    return (dq, dk, dv, di, dC, dn), flow


_chunkwise.defvjp(_forward, _backward)
