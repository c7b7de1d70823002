"""Arrays as the accelerators' kernels take them: whole chunks, whole lanes, rows x heads joined."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.linear_attention import gates
from kernels.linear_attention.form import State

LANES = 128


class Blocks(NamedTuple):
    """Inputs padded to whole blocks: zeros contribute nothing, tokens behind the last neither
    write nor decay and belong to its document."""

    q: Float[Array, "b g t k"]
    k: Float[Array, "b g t k"]
    v: Float[Array, "b h t v"]
    i: Float[Array, "b h t"] | None
    log_f: Float[Array, "b h t"]
    state: State
    documents: Int[Array, "b t"]


def padded(q, k, v, i, log_f, state: State, documents, chunk: int, lanes=LANES) -> Blocks:
    """T to a multiple of `chunk`, head sizes to LANES, v's to `lanes`; no documents are one
    document."""
    rows, length = v.shape[0], v.shape[2]
    if documents is None:
        documents = jnp.zeros((rows, length), jnp.int32)
    q, k = (pad(pad(x, 2, chunk), 3, LANES) for x in (q, k))
    v = pad(pad(v, 2, chunk), 3, lanes)
    if i is not None:
        i = pad(i.astype(jnp.float32), 2, chunk, constant_values=gates.NEVER)
    log_f = pad(log_f.astype(jnp.float32), 2, chunk)
    C = pad(pad(state.C, 2, LANES), 3, lanes)
    n = None if state.n is None else pad(state.n, 2, LANES)
    documents = pad(documents, 1, chunk, mode="edge")
    return Blocks(q, k, v, i, log_f, State(C, n, state.m), documents)


def cropped(h, state: State, length: int, width: int, out: int):
    """(h, state) without the padding."""
    n = None if state.n is None else state.n[..., :width]
    return h[:, :, :length, :out], State(state.C[:, :, :width, :out], n, state.m)


def pad(x, axis: int, multiple: int, **how):
    """An axis to a multiple, with zeros or as jnp.pad is told."""
    more = -x.shape[axis] % multiple
    if not more:
        return x
    return jnp.pad(x, [(0, more if a == axis else 0) for a in range(x.ndim)], **how)


def merge(tree):
    """[b, h, ...] -> [b h, ...]; as every array of a tree."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def split(tree, rows: int):
    """[b h, ...] -> [b, h, ...]."""
    return jax.tree.map(lambda x: x.reshape(rows, -1, *x.shape[1:]), tree)


def sum_groups(x: Float[Array, "bh t k"], like: Float[Array, "b g t k"]):
    """Gradients of every head's q or k, summed over the heads that share it."""
    rows, groups, *rest = like.shape
    x = x.reshape(rows, groups, -1, *rest)
    return x[:, :, 0] if x.shape[2] == 1 else x.astype(jnp.float32).sum(2).astype(like.dtype)


def gate_rows(
    i, log_f, documents, m, chunk: int
) -> tuple[gates.Rows, Float[Array, "bh c l"], Array | None]:
    """(gate rows [bh, c, l], numbers of the documents likewise in float32, gauge of the last state
    [b, h]), computed outside the kernels."""
    rows, heads, length = log_f.shape
    cut = (length // chunk, chunk)
    numbers = documents.reshape(rows, *cut)
    i = None if i is None else i.reshape(rows, heads, *cut)
    found, last = gates.rows(i, log_f.reshape(rows, heads, *cut), numbers, m)
    numbers = jnp.broadcast_to(numbers[:, None].astype(jnp.float32), found.r.shape)
    return merge(found), merge(numbers), last
