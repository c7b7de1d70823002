"""A row that several devices share (context parallel).

The memory that a device's tokens leave behind is one weighted product over them,

    C = sum_s exp(A_s - m) k_s v_sᵀ,   A_s = i_s + log forget gates after s,   m = max A,

so every device computes its summary (G = sum of log forget gates, C, n, m), all are gathered, and
each device folds those before it into the state it starts from (second after first):

    m = max(G_2 + m_1, m_2),   C = exp(G_2 + m_1 - m) C_1 + exp(m_2 - m) C_2.

Then the usual call, on each device's own tokens. Gradients are autodiff of these lines and the
call's own: exact, since the call's reach its first state. K V numbers per head travel, once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.linear_attention.form import State
from kernels.linear_attention.xla import dot, group


class Summary(NamedTuple):
    """What tokens do to a state: its decay (-inf: another document began) and what they add."""

    G: Float[Array, "b h"]
    C: Float[Array, "b h k v"]
    n: Float[Array, "b h k"] | None
    m: Float[Array, "b h"]


def summarise(
    k, v, i, log_f, documents: Int[Array, "b t"], before: Int[Array, "b"], normalised: bool
) -> Summary:
    """Summary of a row's part; `before` is the document of the state that it would continue."""
    later = jnp.cumsum(log_f[..., :0:-1], axis=-1)[..., ::-1]
    after = jnp.pad(later, ((0, 0), (0, 0), (0, 1)))
    lasting = (documents == documents[:, -1:])[:, None]
    A = jnp.where(lasting, after if i is None else after + i, -jnp.inf)
    m = jax.lax.stop_gradient(A.max(-1))  # a gauge; 0 without an input gate
    weights = jnp.where(lasting, jnp.exp(jnp.where(lasting, A - m[..., None], 0.0)), 0.0)
    weights, v = group((weights, v), k.shape[1])
    C = dot("bgtk,bgrtv->bgrkv", k, weights[..., None] * v.astype(weights.dtype))
    n = jnp.einsum("bgrt,bgtk->bgrk", weights, k.astype(weights.dtype)) if normalised else None
    kept = (before == documents[:, -1])[:, None]
    C, n = jax.tree.map(lambda x: x.reshape(*m.shape, *x.shape[3:]), (C, n))
    return Summary(jnp.where(kept, log_f.sum(-1), -jnp.inf), C, n, m)


def then(state: State, part: Summary) -> State:
    """The state after the tokens of a part."""
    kept = jnp.isfinite(part.G)
    carried = jnp.where(kept, part.G, 0.0) + state.m
    m = jax.lax.stop_gradient(jnp.maximum(jnp.where(kept, carried, -jnp.inf), part.m))
    old = jnp.where(kept, jnp.exp(jnp.where(kept, carried - m, 0.0)), 0.0)
    new = jnp.exp(part.m - m)
    C = old[..., None, None] * state.C + new[..., None, None] * part.C
    n = None if state.n is None else old[..., None] * state.n + new[..., None] * part.n
    return State(C, n, m)


def states(
    axis: str | tuple[str, ...],
    k: Float[Array, "b g t k"],
    v: Float[Array, "b h t v"],
    i: Float[Array, "b h t"] | None,
    log_f: Float[Array, "b h t"],
    state: State,
    documents: Int[Array, "b t"] | None,
) -> tuple[State, State, Int[Array, "b t"] | None]:
    """(state before this device's tokens, state after all devices', documents counted from the
    former's), inside shard_map over `axis`.

    state: before the first device's tokens; documents: counted along the whole row.
    """
    index, size = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    gauged = state.m is not None
    m = jax.lax.stop_gradient(state.m) if gauged else jnp.zeros_like(state.C[..., 0, 0])
    state = State(state.C, state.n, m)
    numbers = jnp.zeros((v.shape[0], v.shape[2]), jnp.int32) if documents is None else documents
    ends = jax.lax.all_gather(numbers[:, -1], axis)
    before = jnp.where(index == 0, 0, ends[index - 1])
    own = summarise(k, v, i, log_f, numbers, before, state.n is not None)
    parts = jax.lax.all_gather(own, axis)

    def body(carry, inputs):
        state, mine = carry
        j, part = inputs
        mine = jax.tree.map(lambda a, b: jnp.where(j == index, a, b), state, mine)
        return (then(state, part), mine), None

    start = (state, jax.tree.map(jnp.zeros_like, state))
    (last, mine), _ = jax.lax.scan(body, start, (jnp.arange(size), parts))
    if documents is not None:
        documents = documents - before[:, None]
    if not gauged:
        mine, last = mine._replace(m=None), last._replace(m=None)
    return mine, last, documents
