"""All exponentials of the chunkwise mLSTM that do not involve q, k, v: O(T) numbers in float32.

Within a chunk, with b the cumulative log forget gates, c_s = i_s - b_s and a_s = what is left of
token s at the chunk's end (kernels/mlstm/xla.py has the equations):

    m_t = b_t + max(m, max_{s<=t} c_s)          a running maximum instead of an L x L one
    E_ts = exp((b_t - m_t) + c_s)               the kernel adds a column and a row
    w_t = exp(b_t + m - m_t)     u_s = exp(a_s - m')     gamma = exp(g + m - m')

and the gauges m between chunks are an associative scan of max-plus maps. Kernels read these rows;
nothing else about gates and documents reaches them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

NEVER = -1e30  # exponent of what must vanish: exp gives exactly 0


class Rows(NamedTuple):
    """Per token, cut into chunks on the axis before the last."""

    r: Float[Array, "b h c l"]  # b_t - m_t
    c: Float[Array, "b h c l"]  # i_s - b_s
    w: Float[Array, "b h c l"]  # from the state; 0 where it belongs to another document
    u: Float[Array, "b h c l"]  # to the next state; 0 where that belongs to another document
    bound: Float[Array, "b h c l"]  # exp(-m_t), the least denominator
    gamma: Float[Array, "b h c"]  # from state to state


def _running_max(x: Float[Array, "b h c l"], documents: Int[Array, "b c l"]):
    """Maximum over s <= t of the same document, in each chunk."""
    numbers = jnp.broadcast_to(documents[:, None], x.shape)

    def later(first, second):
        (n1, x1), (n2, x2) = first, second
        return n2, jnp.where(n1 == n2, jnp.maximum(x1, x2), x2)

    return jax.lax.associative_scan(later, (numbers, x), axis=-1)[1]


def _gauges(g, a, kept, m):
    """(m before each chunk [b, h, c], m after the last [b, h]): m' = max(g + m if kept, a)."""
    g = jnp.where(kept, g, -jnp.inf)

    def then(first, second):
        (g1, a1), (g2, a2) = first, second
        return g1 + g2, jnp.maximum(g2 + a1, a2)

    total, most = jax.lax.associative_scan(then, (g, a), axis=-1)
    after = jnp.maximum(total + m[..., None], most)
    return jnp.concatenate([m[..., None], after[..., :-1]], axis=-1), after[..., -1]


def den_gradient(dh, h, den, bound, least) -> Float[Array, "..."]:
    """Gradient of den in h = num / bound, bound = max(|den|, least) + eps."""
    along = (dh.astype(den.dtype) * h.astype(den.dtype)).sum(-1).reshape(den.shape)
    return jnp.where(jnp.abs(den) > least, -jnp.sign(den) * along / bound, 0.0)


def rows(
    i: Float[Array, "b h c l"],
    log_f: Float[Array, "b h c l"],
    documents: Int[Array, "b c l"],
    m: Float[Array, "b h"],
) -> tuple[Rows, Float[Array, "b h"]]:
    """(rows of every chunk, gauge of the last state).

    The state before the first chunk belongs to document 0 and has gauge m.
    """
    b = jnp.cumsum(log_f, axis=-1)
    # Summed from the end, not b_L - b_s: that would cancel.
    after = jnp.cumsum(log_f[..., ::-1], axis=-1)[..., ::-1] - log_f
    a, c, g = after + i, i - b, b[..., -1]
    last = documents[..., -1]  # document of the state after each chunk
    before = jnp.concatenate([jnp.zeros_like(last[:, :1]), last[:, :-1]], axis=1)
    own = (documents == before[..., None])[:, None]
    lasting = (documents == last[..., None])[:, None]
    kept = (before == last)[:, None]
    most = jnp.where(lasting, a, -jnp.inf).max(-1)
    m_in, m_last = _gauges(g, most, kept, m)
    m_out = jnp.concatenate([m_in[..., 1:], m_last[..., None]], axis=-1)
    from_state = b + m_in[..., None]
    m_t = jnp.maximum(jnp.where(own, from_state, -jnp.inf), b + _running_max(c, documents))

    def exp(x, visible):
        return jnp.where(visible, jnp.exp(jnp.where(visible, x, 0.0)), 0.0)

    found = Rows(
        r=b - m_t,
        c=c,
        w=exp(from_state - m_t, own),
        u=exp(a - m_out[..., None], lasting),
        bound=jnp.exp(-m_t),
        gamma=exp(g + m_in - m_out, kept),
    )
    return found, m_last
