"""Arrays as the accelerators' kernels take them: whole chunks, whole lanes, rows x heads joined."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.mlstm import gates
from kernels.mlstm.ref import State

LANES = 128


class Blocks(NamedTuple):
    """Inputs padded to whole blocks: zeros contribute nothing, tokens behind the last neither
    write nor decay and belong to its document."""

    q: Float[Array, "b h t k"]
    k: Float[Array, "b h t k"]
    v: Float[Array, "b h t v"]
    i: Float[Array, "b h t"]
    log_f: Float[Array, "b h t"]
    C: Float[Array, "b h k v"]
    n: Float[Array, "b h k"]
    m: Float[Array, "b h"]
    documents: Int[Array, "b t"]


def padded(q, k, v, i, f, state: State, documents, chunk: int) -> Blocks:
    """T to a multiple of `chunk`, head sizes to LANES; no documents are one document."""
    rows, _, length, _ = q.shape
    if documents is None:
        documents = jnp.zeros((rows, length), jnp.int32)
    q, k, v = (_pad(_pad(x, 2, chunk), 3, LANES) for x in (q, k, v))
    i = _pad(i.astype(jnp.float32), 2, chunk, constant_values=gates.NEVER)
    log_f = _pad(jax.nn.log_sigmoid(f.astype(jnp.float32)), 2, chunk)
    C, n = _pad(_pad(state.C, 2, LANES), 3, LANES), _pad(state.n, 2, LANES)
    return Blocks(q, k, v, i, log_f, C, n, state.m, _pad(documents, 1, chunk, mode="edge"))


def _pad(x, axis: int, multiple: int, **how):
    more = -x.shape[axis] % multiple
    if not more:
        return x
    return jnp.pad(x, [(0, more if a == axis else 0) for a in range(x.ndim)], **how)


def merge(x):
    """[b, h, ...] -> [b h, ...]."""
    return x.reshape(-1, *x.shape[2:])


def gate_rows(
    i, log_f, documents, m, chunk: int
) -> tuple[gates.Rows, Float[Array, "bh c l"], Array]:
    """(gate rows [bh, c, l], numbers of the documents likewise in float32, gauge of the last state
    [b, h]), computed outside the kernels."""
    rows, heads, length = i.shape
    cut = (length // chunk, chunk)
    numbers = documents.reshape(rows, *cut)
    found, last = gates.rows(
        i.reshape(rows, heads, *cut), log_f.reshape(rows, heads, *cut), numbers, m
    )
    numbers = jnp.broadcast_to(numbers[:, None].astype(jnp.float32), found.r.shape)
    return jax.tree.map(merge, found), merge(numbers), last
