"""Beam search over the text of a unified model, as one compiled loop.

Hypotheses are ranked by log p(y) / ((5 + |y|) / 6)^alpha (Wu et al. 2016, arXiv 1609.08144, eq. 14
without coverage), |y| counting EOS. A finished one stays in the beam until better ones push it out.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

EOS, PAD = 1, 0


def _rank(score, length, alpha):
    return score / ((5.0 + length) / 6.0) ** alpha


def extend_beams(
    score: Float[Array, "b n"],
    length: Int[Array, "b n"],
    done,
    logp: Float[Array, "b n v"],
    alpha: float,
):
    """The n best continuations of each row: (parent, token, score, length, done), each [b, n].

    Finished hypotheses go on with PAD only, at no cost and without growing.
    """
    rows, beams, vocab = logp.shape
    ended = jnp.full((vocab,), -jnp.inf).at[PAD].set(0.0)
    total = score[..., None] + jnp.where(done[..., None], ended, logp)
    longer = length + ~done
    ranked = _rank(total, longer[..., None], alpha).reshape(rows, -1)
    _, index = jax.lax.top_k(ranked, beams)
    parent, token = index // vocab, (index % vocab).astype(jnp.int32)
    done = jnp.take_along_axis(done, parent, 1) | (token == EOS)
    score = jnp.take_along_axis(total.reshape(rows, -1), index, 1)
    return parent, token, score, jnp.take_along_axis(longer, parent, 1), done


@functools.lru_cache(maxsize=8)
def compiled(functions, max_new: int, beams: int, alpha: float):
    """run(params, images, tokens, lengths) -> (ids [b, max_new], log p [b]); predict as a tuple."""
    predict = dict(functions)

    def run(params, images, tokens, lengths):
        x, valid = predict["understanding_prefix"](params, images, tokens, lengths)
        rows = x.shape[0]
        cache = predict["init_cache"](rows, x.shape[1] + max_new)
        picture = x.shape[1] - tokens.shape[1]
        hidden, begin, cache = predict["prefill"](params, x, valid, cache, picture)
        hidden, begin = (jnp.repeat(a, beams, axis=0) for a in (hidden, begin))
        cache = jax.tree.map(lambda a: jnp.repeat(a, beams, axis=1), cache)  # rows on axis 1
        # One hypothesis per row at first, or all beams would hold the same one.
        score = jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf) * jnp.ones((rows, 1))
        length, done = jnp.zeros((rows, beams), jnp.int32), jnp.zeros((rows, beams), bool)
        out = jnp.full((rows, beams, max_new), PAD, jnp.int32)
        first = jnp.arange(rows)[:, None] * beams

        def body(carry):
            k, hidden, out, score, length, done, cache = carry
            logp = jax.nn.log_softmax(predict["to_logits"](params, hidden).astype(jnp.float32))
            parent, token, score, length, done = extend_beams(
                score, length, done, logp.reshape(rows, beams, -1), alpha
            )
            out = jnp.take_along_axis(out, parent[..., None], 1).at[:, :, k].set(token)
            kept = (first + parent).reshape(-1)
            cache = jax.tree.map(lambda a: jnp.take(a, kept, axis=1), cache)
            x = predict["text"](params, token.reshape(-1, 1))
            hidden, cache = predict["extend"](params, x, begin + k, cache)
            return k + 1, hidden, out, score, length, done, cache

        def more(carry):
            return (carry[0] < max_new) & ~carry[5].all()

        carry = (jnp.int32(0), hidden, out, score, length, done, cache)
        _, _, out, score, length, _, _ = jax.lax.while_loop(more, body, carry)
        best = jnp.argmax(_rank(score, length, alpha), axis=1)
        pick = jnp.arange(rows), best
        return out[pick], score[pick]

    return jax.jit(run)
