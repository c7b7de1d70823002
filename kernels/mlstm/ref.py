"""The mLSTM cell step by step: the definition (xLSTM 7B, arXiv 2503.13427, section 2.1).

    lf_t = log sigmoid(f_t)                    m_t = max(lf_t + m_{t-1}, i_t)
    F = exp(lf_t + m_{t-1} - m_t)              I = exp(i_t - m_t)
    C_t = F C_{t-1} + I k_t v_tᵀ               n_t = F n_{t-1} + I k_t
    h_t = C_tᵀ q̄_t / (max(|n_t · q̄_t|, exp(-m_t)) + eps),    q̄ = q / sqrt(K)

m only keeps the exponentials in range: (C, n, m) and (C e^c, n e^c, m - c) are the same state.
A document starts afresh where its number changes: F = 0 there and m_t = i_t.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.linear_attention import State

EPS = 1e-6


def empty_state(rows: int, heads: int, k: int, v: int, dtype=jnp.float32) -> State:
    """What a document starts from: all zero."""
    return State(*(jnp.zeros((rows, heads, *rest), dtype) for rest in ((k, v), (k,), ())))


def step(
    q: Float[Array, "b h k"],
    k: Float[Array, "b h k"],
    v: Float[Array, "b h v"],
    i: Float[Array, "b h"],
    f: Float[Array, "b h"],
    state: State,
    *,
    fresh: jax.Array | None = None,
    eps: float = EPS,
) -> tuple[Float[Array, "b h v"], State]:
    """One token; `fresh` [b] marks rows whose state belongs to another document."""
    out = v.dtype
    q, k, v, i, f = (x.astype(state.C.dtype) for x in (q, k, v, i, f))
    decayed = jax.nn.log_sigmoid(f) + state.m
    m = jnp.maximum(decayed, i)
    keep = jnp.exp(decayed - m)
    if fresh is not None:
        m = jnp.where(fresh[:, None], i, m)
        keep = jnp.where(fresh[:, None], 0.0, keep)
    write = jnp.exp(i - m)
    C = keep[..., None, None] * state.C + write[..., None, None] * k[..., None] * v[..., None, :]
    n = keep[..., None] * state.n + write[..., None] * k
    q = q / jnp.sqrt(q.shape[-1]).astype(q.dtype)
    num, den = (C * q[..., None]).sum(-2), (n * q).sum(-1)
    h = num / (jnp.maximum(jnp.abs(den), jnp.exp(-m)) + eps)[..., None]
    return h.astype(out), State(C, n, m)


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
) -> tuple[Float[Array, "b h t v"], State]:
    """All tokens one after another; `documents` are counted from the state's, which is 0."""
    fresh = None
    if documents is not None:
        fresh = jnp.diff(documents, axis=1, prepend=jnp.zeros_like(documents[:, :1])) != 0

    def body(state, token):
        *inputs, new = token
        h, state = step(*inputs, state, fresh=new, eps=eps)
        return state, h

    tokens = [jnp.moveaxis(x, 2, 0) for x in (q, k, v, i, f)]
    state, h = jax.lax.scan(body, state, (*tokens, None if fresh is None else fresh.T))
    return jnp.moveaxis(h, 0, 2), state
