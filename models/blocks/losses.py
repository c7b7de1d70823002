"""Cross-entropy over large vocabularies in slices of the vocabulary, and the sigmoid pair loss.

Slicing the vocabulary rather than the tokens finishes a slice of the table's gradient in one
step of the loop: data-parallel devices reduce every row once, not once per chunk of tokens.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.attention.mask import MASKED
from models.blocks.common import constrain


def chunked_cross_entropy(
    hidden: Float[Array, "n d"],
    table: Float[Array, "v d"],
    targets: Int[Array, "n"],
    weights: Float[Array, "n"],
    *,
    softcap: float | None = None,
    chunk: int = 8192,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Σ weights · nll and Σ weights · [arg max = target], never holding [N, V] (see token_nll)."""
    nll, correct, _ = token_nll(hidden, table, targets, softcap=softcap, chunk=chunk)
    weights = weights.astype(jnp.float32)
    return jnp.sum(nll * weights), jnp.sum(correct * weights)


def token_nll(
    hidden: Float[Array, "n d"],
    table: Float[Array, "v d"],
    targets: Int[Array, "n"],
    *,
    softcap: float | None = None,
    chunk: int = 8192,
) -> tuple[Float[Array, "n"], Float[Array, "n"], Float[Array, "n"]]:
    """-log softmax(softcap(h tableᵀ))[target], whether the target scores highest (a tie counts),
    and log Σ exp of the scores, whose square times a small number is the z-loss of PaLM (arXiv
    2204.02311, section 5).

    `chunk` bounds the vocabulary rows scored at once; products run in hidden's type, sums in
    float32. Both passes recompute scores, so no more than [N, chunk] of them exist.
    """
    count = _slices(table.shape[0], chunk)
    if count == 1:
        return _plain(hidden, table, targets, softcap)
    return _sliced_nll(hidden, table, targets, softcap, count)


def row_nll(
    hidden: Float[Array, "b t d"],
    table: Float[Array, "v d"],
    targets: Int[Array, "b t"],
    weights: Float[Array, "b t"],
    *,
    softcap: float | None = None,
) -> dict[str, Float[Array, "b"]]:
    """Weighted sums per row, as evaluators want them: nll (nats), correct, count."""
    found = token_nll(
        hidden.reshape(-1, hidden.shape[-1]), table, targets.reshape(-1), softcap=softcap
    )
    nll, correct, _ = (x.reshape(weights.shape) for x in found)
    return row_sums(nll, correct, weights)


def row_sums(
    nll: Float[Array, "b t"], correct: Float[Array, "b t"], weights: Float[Array, "b t"]
) -> dict[str, Float[Array, "b"]]:
    """Weighted sums per row: nll, correct, count."""
    return {
        "nll": (nll * weights).sum(1),
        "correct": (correct * weights).sum(1),
        "count": weights.sum(1),
    }


def plain_cross_entropy(hidden, table, targets, weights, *, softcap: float | None = None):
    """chunked_cross_entropy with all scores in memory at once: the reference."""
    nll, correct, _ = _plain(hidden, table, targets, softcap)
    return jnp.sum(nll * weights), jnp.sum(correct * weights)


def sigmoid_pair_loss(
    x: Float[Array, "n d"],
    y: Float[Array, "n d"],
    log_temperature: Float[Array, ""],
    bias: Float[Array, ""],
) -> Float[Array, "n"]:
    """SigLIP: Σ_j -log σ(±(exp(t) ⟨x̂_i, ŷ_j⟩ + b)) per row i, + for i = j; its mean is the loss."""

    def unit(v):
        v = v.astype(jnp.float32)
        return v * jax.lax.rsqrt(jnp.sum(jnp.square(v), axis=-1, keepdims=True) + 1e-12)

    scores = jnp.exp(log_temperature) * (unit(x) @ unit(y).T) + bias
    sign = 2.0 * jnp.eye(x.shape[0], dtype=jnp.float32) - 1.0
    return -jnp.sum(jax.nn.log_sigmoid(sign * scores), axis=-1)


def _scores(hidden, rows, softcap):
    raw = jnp.einsum(
        "nd,vd->nv", hidden, rows.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    return softcap * jnp.tanh(raw / softcap) if softcap else raw


def _plain(hidden, table, targets, softcap):
    scores = _scores(hidden, table, softcap)
    picked = jnp.take_along_axis(scores, targets[:, None], axis=1)[:, 0]
    logsumexp = jax.nn.logsumexp(scores, axis=1)
    correct = (picked >= jnp.max(scores, axis=1)).astype(jnp.float32)
    return logsumexp - picked, correct, logsumexp


def _slices(vocabulary, chunk):
    """Number of slices of at most `chunk` rows, one that divides the vocabulary where near."""
    least = -(-vocabulary // chunk)
    return next((n for n in range(least, 2 * least) if vocabulary % n == 0), least)


def _view(table, count):
    """Table as [rows, count, D] without a copy where count divides it; slice i is [:, i].

    Slice i holds every count-th row, so that a vocabulary split over devices stays split in it.
    """
    vocabulary, width = table.shape
    rows = -(-vocabulary // count)
    table = constrain(table, "act_vocab", None)  # gather the other axis once, before the loop
    table = jnp.pad(table, ((0, rows * count - vocabulary), (0, 0)))
    return table.reshape(rows, count, width)


def _slice(view, i):
    """Slice i, [rows, D], and the vocabulary id of each of its rows."""
    rows, count, _ = view.shape
    return jax.lax.dynamic_index_in_dim(view, i, 1, keepdims=False), jnp.arange(rows) * count + i


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _sliced_nll(hidden, table, targets, softcap, count):
    return _sliced_forward(hidden, table, targets, softcap, count)[0]


def _sliced_forward(hidden, table, targets, softcap, count):
    """Running maximum, sum of exponentials and target score over the slices."""
    vocabulary, view = table.shape[0], _view(table, count)

    def step(carry, i):
        top, total, picked = carry
        rows, ids = _slice(view, i)
        scores = jnp.where(ids < vocabulary, _scores(hidden, rows, softcap), MASKED)
        higher = jnp.maximum(top, jnp.max(scores, axis=1))
        total = total * jnp.exp(top - higher) + jnp.sum(jnp.exp(scores - higher[:, None]), axis=1)
        picked += jnp.sum(jnp.where(ids == targets[:, None], scores, 0.0), axis=1)
        return (higher, total, picked), None

    zeros = jnp.zeros(hidden.shape[:1], jnp.float32)
    (top, total, picked), _ = jax.lax.scan(step, (zeros + MASKED, zeros, zeros), jnp.arange(count))
    logsumexp = top + jnp.log(total)
    out = logsumexp - picked, (picked >= top).astype(jnp.float32), logsumexp
    return out, (hidden, table, targets, logsumexp)


def _sliced_backward(softcap, count, saved, cotangents):
    """d scores = ((softmax - one hot) · dnll + softmax · dlogsumexp) · (1 - (scores / cap)²)"""
    hidden, table, targets, logsumexp = saved
    vocabulary, width = table.shape
    d_nll, _, d_logsumexp = (c.astype(jnp.float32)[:, None] for c in cotangents)
    view = _view(table, count)

    def step(carry, i):
        d_hidden, d_view = carry
        rows, ids = _slice(view, i)
        scores = _scores(hidden, rows, softcap)
        grad = jnp.exp(scores - logsumexp[:, None]) * (d_nll + d_logsumexp)
        grad -= jnp.where(ids == targets[:, None], d_nll, 0.0)
        if softcap:
            grad = grad * (1.0 - jnp.square(scores / softcap))
        grad = jnp.where(ids < vocabulary, grad, 0.0).astype(hidden.dtype)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        d_hidden += product("nv,vd->nd", grad, rows.astype(hidden.dtype))
        d_rows = product("nv,nd->vd", grad, hidden)
        return (d_hidden, jax.lax.dynamic_update_index_in_dim(d_view, d_rows, i, 1)), None

    start = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(view.shape, jnp.float32)
    (d_hidden, d_view), _ = jax.lax.scan(step, start, jnp.arange(count))
    d_table = d_view.reshape(-1, width)[:vocabulary]
    return d_hidden.astype(hidden.dtype), d_table.astype(table.dtype), None


_sliced_nll.defvjp(_sliced_forward, _sliced_backward)
