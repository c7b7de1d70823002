"""All exponentials of the chunkwise form that do not involve q, k, v: O(T) numbers in float32.

Within a chunk, with b the cumulative log forget gates, c_s = i_s - b_s and a_s = what is left of
token s at the chunk's end (kernels/linear_attention/xla.py has the equations):

    m_t = b_t + max(m, max_{s<=t} c_s)          a running maximum instead of an L x L one
    E_ts = exp((b_t - m_t) + c_s)               the kernel adds a column and a row
    w_t = exp(b_t + m - m_t)     u_s = exp(a_s - m')     gamma = exp(g + m - m')

and the gauges m between chunks are an associative scan of max-plus maps. Without an input gate
(i = 0) and with decays that never grow every gauge is 0, and

    E_ts = exp(b_t - b_s)     w_t = exp(b_t)     u_s = exp(a_s)     gamma = exp(g)

where b is cut in two, because nothing bounds it: behind a sum of -700 two neighbours' difference
would have lost four of its seven digits. Kernels read these rows; nothing else about gates and
documents reaches them.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

NEVER = -1e30  # exponent of what must vanish: exp gives exactly 0
LEAST = -128.0  # exp gives exactly 0 in float32, 3e-56 in float64


class Rows(NamedTuple):
    """Per token, cut into chunks on the axis before the last."""

    r: Float[Array, "b h c l"]  # b_t - m_t; without gauges the coarse part of b_t
    c: Float[Array, "b h c l"]  # i_s - b_s
    w: Float[Array, "b h c l"]  # from the state; 0 where it belongs to another document
    u: Float[Array, "b h c l"]  # to the next state; 0 where that belongs to another document
    gamma: Float[Array, "b h c"]  # from state to state
    bound: Float[Array, "b h c l"] | None = None  # exp(-m_t), the least denominator
    fine: Float[Array, "b h c l"] | None = None  # the rest of b_t where r is its coarse part


def rows(
    i: Float[Array, "b h c l"] | None,
    log_f: Float[Array, "b h c l"],
    documents: Int[Array, "b c l"],
    m: Float[Array, "b h"] | None,
) -> tuple[Rows, Float[Array, "b h"] | None]:
    """(rows of every chunk, gauge of the last state); without i and m there are no gauges.

    The state before the first chunk belongs to document 0 and has gauge m.
    """
    if i is None:
        return _decays(log_f, documents), None
    return _stabilised(i, log_f, documents, m)


def _exp(x, visible):
    return jnp.where(visible, jnp.exp(jnp.where(visible, x, 0.0)), 0.0)


def _visible(documents) -> tuple[Bool[Array, "b 1 c l"], Bool[Array, "b 1 c l"], Array]:
    """(tokens of the document of the state before the chunk, of the state after it; whether these
    two are one document [b, 1, c])."""
    last = documents[..., -1]  # document of the state after each chunk
    before = jnp.concatenate([jnp.zeros_like(last[:, :1]), last[:, :-1]], axis=1)
    own = (documents == before[..., None])[:, None]
    lasting = (documents == last[..., None])[:, None]
    return own, lasting, (before == last)[:, None]


def _decays(log_f, documents) -> Rows:
    own, lasting, kept = _visible(documents)
    log_f = jnp.maximum(log_f, LEAST)
    # A grid on which sums over a chunk are exact in float32: 24 bits hold 128 * length / grid.
    grid = 2.0 ** (math.ceil(math.log2(log_f.shape[-1])) - 17)
    coarse = grid * jnp.round(log_f / grid)
    fine = jnp.cumsum(log_f - coarse, axis=-1)
    coarse = jnp.cumsum(coarse, axis=-1)
    b = coarse + fine
    after = (coarse[..., -1:] - coarse) + (fine[..., -1:] - fine)
    return Rows(
        r=coarse,
        c=-coarse,
        w=_exp(b, own),
        u=_exp(after, lasting),
        gamma=_exp(b[..., -1], kept),
        fine=fine,
    )


def _stabilised(i, log_f, documents, m) -> tuple[Rows, Float[Array, "b h"]]:
    b = jnp.cumsum(log_f, axis=-1)
    # Summed from the end, not b_L - b_s: that would cancel.
    after = jnp.cumsum(log_f[..., ::-1], axis=-1)[..., ::-1] - log_f
    a, c, g = after + i, i - b, b[..., -1]
    own, lasting, kept = _visible(documents)
    most = jnp.where(lasting, a, -jnp.inf).max(-1)
    m_in, m_last = _gauges(g, most, kept, m)
    m_out = jnp.concatenate([m_in[..., 1:], m_last[..., None]], axis=-1)
    from_state = b + m_in[..., None]
    m_t = jnp.maximum(jnp.where(own, from_state, -jnp.inf), b + _running_max(c, documents))
    found = Rows(
        r=b - m_t,
        c=c,
        w=_exp(from_state - m_t, own),
        u=_exp(a - m_out[..., None], lasting),
        gamma=_exp(g + m_in - m_out, kept),
        bound=jnp.exp(-m_t),
    )
    return found, m_last


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


def of_decays(
    kept: Float[Array, "... c"], out: Float[Array, "... c l"], entering: Float[Array, "... c l"]
) -> Float[Array, "... c l"]:
    """Gradient of each log forget gate: all that passes through it.

    kept: from the state before a chunk to that after it. out: what each token takes from the state
    and from earlier tokens of its chunk, less what it gives later ones there. entering: what each
    leaves in the state after. They are summed apart: the sum over all behind a gate, less what does
    not pass it, is a difference of large numbers whose roundings differ (bfloat16, Mamba-2's A: 5
    times the error and more).
    """
    later = jnp.cumsum(out[..., ::-1], axis=-1)[..., ::-1]
    earlier = jnp.cumsum(entering, axis=-1) - entering
    return later + earlier + kept[..., None]


def of_visible_decays(
    dlog_f: Float[Array, "b h t"], log_f: Float[Array, "b h t"]
) -> Float[Array, "b h t"]:
    """The decays' gradient, 0 where it is below its own rounding.

    It is a sum of products across the token, each of which has the factor exp(log_f), but is
    computed as a difference of sums of all of them: what is smaller than their last digit is noise,
    which a large step size would magnify.
    """
    smallest = jnp.finfo(log_f.dtype).eps ** 1.5
    return jnp.where(log_f < math.log(smallest), 0.0, dlog_f)


def den_gradient(dh, h, den, bound, least) -> Float[Array, "..."]:
    """Gradient of den in h = num / bound, bound = max(|den|, least) + eps."""
    along = (dh.astype(den.dtype) * h.astype(den.dtype)).sum(-1).reshape(den.shape)
    return jnp.where(jnp.abs(den) > least, -jnp.sign(den) * along / bound, 0.0)
