"""Beam search against all sequences: wide beams find the best one, one beam is greedy."""

import itertools
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from inference import beam, unified

VOCAB, LONGEST = 4, 3  # PAD, EOS and two letters


def table(seed, rows):
    """log p(token | row, the tokens before) for every prefix: [rows, prefixes, VOCAB]."""
    logits = np.random.default_rng(seed).normal(0, 2, (rows, (VOCAB + 1) ** LONGEST, VOCAB))
    logits[..., beam.PAD] = -np.inf  # a model that never writes PAD
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def model_of(logp):
    """A "model" whose cache holds the prefix as a number in base VOCAB + 1 and the row."""
    rows = len(logp)

    def extend(params, x, position, cache):
        cache = {"code": cache["code"] * (VOCAB + 1) + x[None, :, 0] + 1, "row": cache["row"]}
        return jnp.stack([cache["row"][0], cache["code"][0]], axis=-1), cache

    def prefill(params, x, valid, cache, picture=0):
        cache = {"code": jnp.zeros((1, rows), jnp.int32), "row": jnp.arange(rows)[None]}
        return jnp.stack([cache["row"][0], cache["code"][0]], axis=-1), jnp.zeros(rows, int), cache

    predict = dict(
        understanding_prefix=lambda params, images, tokens, lengths: (tokens, tokens >= 0),
        init_cache=lambda batch, slots: {},
        prefill=prefill,
        extend=extend,
        text=lambda params, token: token,
        to_logits=lambda params, h: jnp.asarray(logp)[
            h[:, 0], jnp.minimum(h[:, 1], logp.shape[1] - 1)
        ],
    )
    return SimpleNamespace(predict=predict)


def sequences():
    """All texts of at most LONGEST tokens that end in EOS or fill the length."""
    for n in range(1, LONGEST + 1):
        for body in itertools.product((2, 3), repeat=n - 1):
            yield (*body, beam.EOS)
    yield from itertools.product((2, 3), repeat=LONGEST)


def log_p(logp, row, sequence):
    code, total = 0, 0.0
    for token in sequence:
        total += logp[row, code, token]
        code = code * (VOCAB + 1) + token + 1
    return total


def best(logp, row, alpha):
    return max(sequences(), key=lambda s: log_p(logp, row, s) / ((5 + len(s)) / 6) ** alpha)


def search(logp, beams, alpha=0.0):
    tokens = jnp.zeros((len(logp), 1), jnp.int32)
    run = beam.compiled(tuple(model_of(logp).predict.items()), LONGEST, beams, alpha)
    ids, score = run(None, None, tokens, tokens[:, 0])
    return [tuple(int(t) for t in row if t) for row in ids], np.asarray(score)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_wide_beam_finds_the_best_of_all_sequences(alpha):
    logp = table(0, rows=16)
    found, score = search(logp, beams=12, alpha=alpha)
    for row, sequence in enumerate(found):
        assert sequence == best(logp, row, alpha)
        assert score[row] == pytest.approx(log_p(logp, row, sequence), abs=1e-5)


def test_more_beams_find_what_greedy_misses():
    logp = table(0, rows=64)
    greedy, narrow = search(logp, beams=1)
    wide, better = search(logp, beams=3)
    assert greedy != wide and better.mean() > narrow.mean()
    tokens = jnp.zeros((64, 1), jnp.int32)
    ids = unified.generate_text(model_of(logp), None, None, tokens, tokens[:, 0], max_new=LONGEST)
    assert greedy == [tuple(int(t) for t in row if t) for row in ids]


def test_no_temperature():
    with pytest.raises(ValueError, match="beams=2"):
        unified.generate_text(None, None, None, None, None, max_new=3, beams=2, temperature=0.5)
