"""Gated linear attention in chunks of L tokens: matrix products inside, one state between (arXiv
2503.14376, and 2405.21060 for the form without a normaliser).

Per chunk, with b the cumulative log forget gates, D_ts = b_t - b_s + i_s for s <= t, and
m_t = max(b_t + m, max_s D_ts) (kernels/linear_attention/gates.py computes what has no q, k, v in
it), q̄ = scale q:

    S = (q̄ kᵀ) exp(D - m_t),  w_t = exp(b_t + m - m_t)
    num = w (q̄ C) + S v,  den = w (q̄ n) + S 1,  h = num / (max(|den|, exp(-m_t)) + eps)
    a_s = sum_{r>s} lf_r + i_s,  m' = max(b_L + m, max a),  u = exp(a - m')
    C' = exp(b_L + m - m') C + (u k)ᵀ v,  n' likewise with ones for v

Without a normaliser h = num, and what is said of den, n and m falls away.

The gradient is written out. It is exact: gauges m are constants in it (h and the state as a whole
do not depend on them), so it flows through the first and the last state too. Kept for it are the
inputs, h and the state before every chunk; scores are computed once more, chunk by chunk.

Pairs of tokens of different documents are masked before the exponential, and stay out of maxima.
Heads of a group (r of them) share q and k; neither is repeated for them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.linear_attention import gates as gates_lib
from kernels.linear_attention.form import Form, State, gained

CHUNK = 64


class Options(NamedTuple):
    """What is fixed when compiling."""

    form: Form
    chunk: int


def linear_attention(
    form: Form,
    q: Float[Array, "b g t k"],
    k: Float[Array, "b g t k"],
    v: Float[Array, "b h t v"],
    i: Float[Array, "b h t"] | None,
    log_f: Float[Array, "b h t"],
    state: State,
    documents: Int[Array, "b t"] | None,
    *,
    gain: Float[Array, "b h t"] | None = None,
    chunk: int | None = None,
) -> tuple[Float[Array, "b h t v"], State]:
    """(h, last state); i, log_f in the state's type. gain: what v is multiplied by before.

    official_backward of the form: the gradient of the mLSTM's authors' kernels: the denominator is
    a constant in it, and what flows into the last state is left out of the forget gates' (and none
    may flow in).
    """
    length = v.shape[2]
    options = Options(form, min(chunk or CHUNK, length))
    if documents is None:
        documents = jnp.zeros((v.shape[0], length), jnp.int32)
    return _chunkwise(options, q, k, gained(v, gain), i, log_f, state, documents)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunkwise(options, *inputs):
    return _run(options, *inputs, keep=False)[0]


def _run(options, q, k, v, i, log_f, state, documents, *, keep: bool):
    """((h, last state), memory and normaliser before every chunk if they are to be kept)."""
    chunks, last = _chunks(options.chunk, q, k, v, i, log_f, documents, state.m)

    def body(state, chunk):
        h = _output(options.form, chunk, state[0], _scores(options.form, chunk, state[1]))
        return _next(chunk, *state), (h, state if keep else None)

    start = group(state[:2], q.shape[1])
    (C, n), (h, before) = jax.lax.scan(body, start, chunks)
    h = _join(h, v.shape[2]).reshape(v.shape).astype(v.dtype)
    return (h, State(*_ungroup((C, n)), last)), before


class Chunk(NamedTuple):
    """The tokens of one chunk, or, stacked on a leading axis, of all of them."""

    q: Float[Array, "b g l k"]
    k: Float[Array, "b g l k"]
    v: Float[Array, "b g r l v"]
    gates: gates_lib.Rows  # each [b, g, r, l], gamma [b, g, r]
    documents: Int[Array, "b l"]


class Scores(NamedTuple):
    """What the gradient needs of the way to h."""

    E: Float[Array, "b g r l l"]  # weights between tokens, times the scale of q
    S: Float[Array, "b g r l l"]
    den: Float[Array, "b g r l"] | None
    bound: Float[Array, "b g r l"] | None  # max(|den|, exp(-m)) + eps


def group(tree, groups: int):
    """[b, h, ...] -> [b, g, r, ...], as every array of a tree."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0], groups, -1, *x.shape[2:]), tree)


def _ungroup(tree):
    return jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), tree)


def _chunks(length, q, k, v, i, log_f, documents, m) -> tuple[Chunk, Float[Array, "b h"] | None]:
    """(chunks on a leading axis, gauge of the last state); padding keeps state and document."""
    more = -q.shape[2] % length

    def cut(x, axis, **pad):
        if more:
            widths = [(0, more if a == axis else 0) for a in range(x.ndim)]
            x = jnp.pad(x, widths, **pad)
        return x.reshape(*x.shape[:axis], -1, length, *x.shape[axis + 1 :])

    documents = cut(documents, 1, mode="edge")
    i = None if i is None else cut(i, 2, constant_values=gates_lib.NEVER)
    rows, last = gates_lib.rows(i, cut(log_f, 2), documents, m)
    rows = group(rows, q.shape[1])
    stacked = Chunk(
        *(_cut(x, length) for x in (q, k, group(v, q.shape[1]))),
        jax.tree.map(lambda x: jnp.moveaxis(x, 3, 0), rows),
        jnp.moveaxis(documents, 1, 0),
    )
    return stacked, last


def _cut(x: Float[Array, "... t v"], length: int) -> Float[Array, "c ... l v"]:
    """Chunks on a leading axis, the last one padded with zeros."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % length), (0, 0)])
    x = x.reshape(*x.shape[:-2], -1, length, x.shape[-1])
    return jnp.moveaxis(x, -3, 0)


def _join(x: Float[Array, "c ... l v"], length: int) -> Float[Array, "... t v"]:
    """The inverse of `_cut`: without the padding."""
    x = jnp.moveaxis(x, 0, -3)
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])[..., :length, :]


def dot(spec, x, y):
    """einsum with products in the narrower of the two types, sums in float32 or better."""
    narrow = min(x.dtype, y.dtype, key=lambda d: jnp.finfo(d).bits)
    wide = jnp.promote_types(narrow, jnp.float32)
    precision = "highest" if narrow == wide else None
    x, y = x.astype(narrow), y.astype(narrow)
    return jnp.einsum(spec, x, y, preferred_element_type=wide, precision=precision)


def _scores(form: Form, chunk: Chunk, n) -> Scores:
    # The scale of q goes into the weights: q itself keeps its digits.
    gates, numbers = chunk.gates, chunk.documents
    t = jnp.arange(numbers.shape[-1])
    pairs = (t[:, None] >= t) & (numbers[:, :, None] == numbers[:, None, :])[:, None, None]
    exponent = gates.r[..., :, None] + gates.c[..., None, :]
    if gates.fine is not None:
        exponent += gates.fine[..., :, None] - gates.fine[..., None, :]
    E = form.scale * jnp.exp(jnp.where(pairs, exponent, gates_lib.NEVER))
    S = dot("bgtk,bgsk->bgts", chunk.q, chunk.k)[:, :, None] * E
    if n is None:
        return Scores(E, S, None, None)
    from_state = jnp.einsum("bgtk,bgrk->bgrt", chunk.q.astype(S.dtype), n)
    den = form.scale * gates.w * from_state + S.sum(-1)
    return Scores(E, S, den, jnp.maximum(jnp.abs(den), gates.bound) + form.eps)


def _output(form: Form, chunk: Chunk, C, scores: Scores) -> Float[Array, "b g r l v"]:
    w = form.scale * chunk.gates.w
    num = w[..., None] * dot("bgtk,bgrkv->bgrtv", chunk.q, C)
    num += dot("bgrts,bgrsv->bgrtv", scores.S, chunk.v)
    return num if scores.bound is None else num / scores.bound[..., None]


def _next(chunk: Chunk, C, n):
    """Memory and normaliser after a chunk."""
    gates = chunk.gates
    k = gates.u[..., None] * chunk.k[:, :, None].astype(gates.u.dtype)
    C = gates.gamma[..., None, None] * C + dot("bgrlk,bgrlv->bgrkv", k, chunk.v)
    return C, None if n is None else gates.gamma[..., None] * n + k.sum(-2)


def _forward(options, q, k, v, i, log_f, state, documents):
    (h, last), before = _run(options, q, k, v, i, log_f, state, documents, keep=True)
    kept = h if state.n is not None else None  # only the denominator's gradient reads it
    return (h, last), (q, k, v, i, log_f, state.m, documents, (kept, last), before)


def _backward(options, residuals, cotangents):
    q, k, v, i, log_f, m, documents, (h, last), before = residuals
    dh, (dC, dn, _) = cotangents
    official, groups = options.form.official_backward, q.shape[1]
    chunks, _ = _chunks(options.chunk, q, k, v, i, log_f, documents, m)
    wide = log_f.dtype
    dh, h = jax.tree.map(lambda x: _cut(x.astype(wide), options.chunk), group((dh, h), groups))

    def body(carry, inputs):
        chunk, state, h, dh = inputs
        grads, out, entering = _chunk_gradients(options.form, chunk, *state, h, dh, *carry)
        *tokens, dC, dn = grads
        if official:
            flow = out - entering
        else:
            kept = (state[0] * carry[0]).sum((-2, -1))
            kept += 0.0 if carry[1] is None else (state[1] * carry[1]).sum(-1)
            flow = gates_lib.of_decays(chunk.gates.gamma * kept, out, entering)
        return (dC, dn), (*tokens, flow[..., None])

    ends = group(jax.tree.map(lambda x: x.astype(wide), (dC, dn)), groups)
    (dC, dn), stacked = jax.lax.scan(body, ends, (chunks, before, h, dh), reverse=True)
    dq, dk, dv, di, dlog_f = (_join(x, q.shape[2]) for x in stacked)
    dq, dk, dv = (d.reshape(x.shape).astype(x.dtype) for d, x in ((dq, q), (dk, k), (dv, v)))
    di, dlog_f = (x.reshape(log_f.shape) for x in (di, dlog_f))
    if official:  # one sum over the whole row, nothing from the last state
        dlog_f = jnp.cumsum(dlog_f[..., ::-1], axis=-1)[..., ::-1]
    if i is None:
        dlog_f = gates_lib.of_visible_decays(dlog_f, log_f)
    gradient = State(*_ungroup((dC, dn)), None if m is None else jnp.zeros_like(m))
    return dq, dk, dv, None if i is None else di, dlog_f, gradient, None


def _chunk_gradients(form, chunk, C, n, h, dh, dC, dn):
    """((dq, dk, dv, di, dC, dn before), out, entering) of one chunk.

    out: <q, dq> per token, less the part of <k, dk> by later tokens of the chunk; entering: the
    part by the state after it.
    """
    gates, scores = chunk.gates, _scores(form, chunk, n)
    wide, (q, k, v) = dh.dtype, chunk[:3]
    w, u = form.scale * gates.w[..., None], gates.u[..., None]
    dnum = dh if n is None else dh / scores.bound[..., None]
    narrow = dnum.astype(v.dtype)
    P = dot("bgrtv,bgrsv->bgrts", narrow, v)
    from_C, from_dC = dot("bgrtv,bgrkv->bgrtk", narrow, C), dot("bgrsv,bgrkv->bgrsk", v, dC)
    if n is not None:
        dden = jnp.zeros_like(scores.den)
        if not form.official_backward:
            dden = gates_lib.den_gradient(dh, h, scores.den, scores.bound, gates.bound)
        P += dden[..., None]
        from_C += dden[..., None] * n[..., None, :]
        from_dC += dn[..., None, :]
    P *= scores.E
    if n is None:
        # A token's part in its own output cancels in the decays' gradient, where behind strong
        # decays there is little else.
        own = jnp.diagonal(P, axis1=-2, axis2=-1)[..., None]
        P = jnp.where(jnp.eye(P.shape[-1], dtype=bool), 0.0, P)
    from_C, from_dC = w * from_C, u * from_dC
    dq, dk = dot("bgrts,bgsk->bgrtk", P, k) + from_C, dot("bgrts,bgtk->bgrsk", P, q)
    dv = dot("bgrts,bgrtv->bgrsv", scores.S, narrow) + u * dot("bgsk,bgrkv->bgrsv", k, dC)
    q, k = (x[:, :, None].astype(wide) for x in (q, k))
    within, entering = (k * dk).sum(-1), (k * from_dC).sum(-1)
    out, di, dk = (q * dq).sum(-1) - within, within + entering, dk + from_dC
    if n is None:
        dq, dk = dq + own * k, dk + own * q
    wq = w * q
    dC = gates.gamma[..., None, None] * dC + dot("bgrtk,bgrtv->bgrkv", wq, narrow)
    if n is not None:
        dn = gates.gamma[..., None] * dn + jnp.einsum("bgrtk,bgrt->bgrk", wq, dden)
    return (dq.sum(2), dk.sum(2), dv, di[..., None], dC, dn), out, entering


_chunkwise.defvjp(_forward, _backward)
