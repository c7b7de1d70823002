"""The mLSTM in chunks of L tokens: matrix products inside, one state between (arXiv 2503.14376).

Per chunk, with b the cumulative log forget gates, D_ts = b_t - b_s + i_s for s <= t, and
m_t = max(b_t + m, max_s D_ts) (kernels/mlstm/gates.py computes what has no q, k, v in it):

    S = (q̄ kᵀ) exp(D - m_t),  w_t = exp(b_t + m - m_t)
    num = w (q̄ C) + S v,  den = w (q̄ n) + S 1,  h = num / (max(|den|, exp(-m_t)) + eps)
    a_s = sum_{r>s} lf_r + i_s,  m' = max(b_L + m, max a),  u = exp(a - m')
    C' = exp(b_L + m - m') C + (u k)ᵀ v,  n' likewise with ones for v

The gradient is written out. It is exact: gauges m are constants in it (h and the state as a whole
do not depend on them), so it flows through the first and the last state too. Kept for it are the
inputs, h and the state before every chunk; scores are computed once more, chunk by chunk.

Pairs of tokens of different documents are masked before the exponential, and stay out of maxima.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.mlstm import gates as gates_lib
from kernels.mlstm.ref import EPS, State

CHUNK = 64


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
def _chunkwise(options, *inputs):
    return _run(options, *inputs, keep=False)[0]


def _run(options, q, k, v, i, log_f, C, n, m, documents, *, keep: bool):
    """((h, last state), memory and normaliser before every chunk if they are to be kept)."""
    chunks, last = _chunks(options.chunk, q, k, v, i, log_f, documents, m)

    def body(state, chunk):
        h = _output(chunk, state[0], _scores(options, chunk, state[1]))
        return _next(chunk, *state), (h, state if keep else None)

    (C, n), (h, before) = jax.lax.scan(body, (C, n), chunks)
    return (_join(h, q.shape[2]).astype(v.dtype), (C, n, last)), before


class Chunk(NamedTuple):
    """The tokens of one chunk, or, stacked on a leading axis, of all of them."""

    q: Float[Array, "b h l k"]
    k: Float[Array, "b h l k"]
    v: Float[Array, "b h l v"]
    gates: gates_lib.Rows  # each [b, h, l], gamma [b, h]
    documents: Int[Array, "b l"]


class Scores(NamedTuple):
    """What the gradient needs of the way to h."""

    E: Float[Array, "b h l l"]  # weights between tokens, times the scale of q
    S: Float[Array, "b h l l"]
    den: Float[Array, "b h l"]
    bound: Float[Array, "b h l"]  # max(|den|, exp(-m)) + eps


def _chunks(length, q, k, v, i, log_f, documents, m) -> tuple[Chunk, Float[Array, "b h"]]:
    """(chunks on a leading axis, gauge of the last state); padding keeps state and document."""
    more = -q.shape[2] % length

    def cut(x, axis, **pad):
        if more:
            widths = [(0, more if a == axis else 0) for a in range(x.ndim)]
            x = jnp.pad(x, widths, **pad)
        return x.reshape(*x.shape[:axis], -1, length, *x.shape[axis + 1 :])

    documents = cut(documents, 1, mode="edge")
    i = cut(i, 2, constant_values=gates_lib.NEVER)
    rows, last = gates_lib.rows(i, cut(log_f, 2), documents, m)
    stacked = Chunk(
        *(_cut(x, length) for x in (q, k, v)),
        jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), rows),
        jnp.moveaxis(documents, 1, 0),
    )
    return stacked, last


def _cut(x: Float[Array, "b h t v"], length: int) -> Float[Array, "c b h l v"]:
    """Chunks on a leading axis, the last one padded with zeros."""
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % length), (0, 0)))
    return jnp.moveaxis(x.reshape(*x.shape[:2], -1, length, x.shape[-1]), 2, 0)


def _join(x, length):
    """[chunks, b, h, l, ...] -> [b, h, t, ...] without the padding."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :length]


def dot(spec, x, y):
    """einsum with products in the narrower of the two types, sums in float32 or better."""
    narrow = min(x.dtype, y.dtype, key=lambda d: jnp.finfo(d).bits)
    wide = jnp.promote_types(narrow, jnp.float32)
    precision = "highest" if narrow == wide else None
    x, y = x.astype(narrow), y.astype(narrow)
    return jnp.einsum(spec, x, y, preferred_element_type=wide, precision=precision)


def _scores(options: Options, chunk: Chunk, n) -> Scores:
    # The scale of q goes into the weights: q itself keeps its digits.
    scale, gates, numbers = chunk.q.shape[-1] ** -0.5, chunk.gates, chunk.documents
    t = jnp.arange(numbers.shape[-1])
    pairs = (t[:, None] >= t) & (numbers[:, :, None] == numbers[:, None, :])[:, None]
    exponent = gates.r[..., :, None] + gates.c[..., None, :]
    E = scale * jnp.exp(jnp.where(pairs, exponent, gates_lib.NEVER))
    S = dot("bhtk,bhsk->bhts", chunk.q, chunk.k) * E
    den = scale * gates.w * jnp.einsum("bhtk,bhk->bht", chunk.q.astype(S.dtype), n) + S.sum(-1)
    return Scores(E, S, den, jnp.maximum(jnp.abs(den), gates.bound) + options.eps)


def _output(chunk: Chunk, C, scores: Scores) -> Float[Array, "b h l v"]:
    w = chunk.q.shape[-1] ** -0.5 * chunk.gates.w
    num = w[..., None] * dot("bhtk,bhkv->bhtv", chunk.q, C)
    num += dot("bhts,bhsv->bhtv", scores.S, chunk.v)
    return num / scores.bound[..., None]


def _next(chunk: Chunk, C, n):
    """Memory and normaliser after a chunk."""
    gates = chunk.gates
    k = gates.u[..., None] * chunk.k.astype(gates.u.dtype)
    C = gates.gamma[..., None, None] * C + dot("bhlk,bhlv->bhkv", k, chunk.v)
    return C, gates.gamma[..., None] * n + k.sum(-2)


def _forward(options, q, k, v, i, log_f, C, n, m, documents):
    out, before = _run(options, q, k, v, i, log_f, C, n, m, documents, keep=True)
    return out, (q, k, v, i, log_f, m, documents, out, before)


def _backward(options, residuals, cotangents):
    q, k, v, i, log_f, m, documents, (h, (*last, _)), before = residuals
    dh, (dC, dn, _) = cotangents
    chunks, _ = _chunks(options.chunk, q, k, v, i, log_f, documents, m)
    wide = m.dtype
    dh, h = (_cut(x.astype(wide), options.chunk) for x in (dh, h))

    def body(carry, inputs):
        dC, dn, after = carry  # of and at the chunk's outgoing state
        chunk, state, h, dh = inputs
        grads, flow = _chunk_gradients(options, chunk, *state, h, dh, dC, dn)
        *tokens, dC_before, dn_before = grads
        if not options.official_backward:
            into_next = (after[0] * dC).sum((-2, -1)) + (after[1] * dn).sum(-1)
            flow = jnp.cumsum(flow[..., ::-1], axis=-1)[..., ::-1] + into_next[..., None]
        return (dC_before, dn_before, state), (*tokens, flow)

    start = (dC.astype(wide), dn.astype(wide), tuple(last))
    (dC, dn, _), stacked = jax.lax.scan(body, start, (chunks, before, h, dh), reverse=True)
    dq, dk, dv, di, dlog_f = (_join(x, q.shape[2]) for x in stacked)
    if options.official_backward:  # one sum over the whole row, nothing from the last state
        dlog_f = jnp.cumsum(dlog_f[..., ::-1], axis=-1)[..., ::-1]
    dq, dk, dv = (d.astype(x.dtype) for d, x in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv, di, dlog_f, dC, dn, jnp.zeros_like(m), None


def _chunk_gradients(options, chunk, C, n, h, dh, dC, dn):
    """((dq, dk, dv, di, dC, dn before), <q, dq> - <k, dk> per token) of one chunk."""
    gates, scores = chunk.gates, _scores(options, chunk, n)
    wide, (q, k, v) = dh.dtype, chunk[:3]
    dnum = dh / scores.bound[..., None]
    dden = jnp.zeros_like(scores.den)
    if not options.official_backward:
        dden = gates_lib.den_gradient(dh, h, scores.den, scores.bound, gates.bound)
    w, u = q.shape[-1] ** -0.5 * gates.w[..., None], gates.u[..., None]
    narrow = dnum.astype(v.dtype)
    P = (dot("bhtv,bhsv->bhts", narrow, v) + dden[..., None]) * scores.E
    dq = dot("bhts,bhsk->bhtk", P, k) + w * (
        dot("bhtv,bhkv->bhtk", narrow, C) + dden[..., None] * n[..., None, :]
    )
    dk = dot("bhts,bhtk->bhsk", P, q) + u * (dot("bhsv,bhkv->bhsk", v, dC) + dn[..., None, :])
    dv = dot("bhts,bhtv->bhsv", scores.S, narrow) + u * dot("bhsk,bhkv->bhsv", k, dC)
    di = (k.astype(wide) * dk).sum(-1)
    flow = (q.astype(wide) * dq).sum(-1) - di
    wq = w * q.astype(wide)
    dC = gates.gamma[..., None, None] * dC + dot("bhtk,bhtv->bhkv", wq, narrow)
    dn = gates.gamma[..., None] * dn + jnp.einsum("bhtk,bht->bhk", wq, dden)
    return (dq, dk, dv, di, dC, dn), flow


_chunkwise.defvjp(_forward, _backward)
