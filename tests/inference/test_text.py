"""Text generation on a model whose next token is known, and on a small xLSTM."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference import text
from inference.beam import EOS
from inference.text import Sampling, generate

VOCABULARY = 64


def counting_model():
    """Scores favour the last token + 1; the state is the last token and how many there were."""

    def scores(last):
        return 1.0 + 5.0 * jax.nn.one_hot((last + 1) % VOCABULARY, VOCABULARY)

    def prefill(params, tokens, length, state):
        last = jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)[:, 0]
        return scores(last), dict(last=last, count=length)

    def extend(params, token, state):
        return scores(token), dict(last=token, count=state["count"] + 1)

    def init_state(params, rows, max_len):
        return dict(last=jnp.zeros(rows, jnp.int32), count=jnp.zeros(rows, jnp.int32))

    return types.SimpleNamespace(
        predict=dict(init_state=init_state, prefill=prefill, extend=extend)
    )


MODEL = counting_model()


def letters(ids):
    return "".join(chr(33 + i) for i in ids)


def test_greedy_rows_of_any_length():
    got = generate(MODEL, {}, [[10], [20, 30, 40]], jax.random.key(0), Sampling(max_new=5))
    assert got == [[11, 12, 13, 14, 15], [41, 42, 43, 44, 45]]


def test_a_row_ends_at_eos():
    start = [(EOS - 3) % VOCABULARY]
    got = generate(MODEL, {}, [start, [10]], jax.random.key(0), Sampling(max_new=6))
    assert got[0] == [(EOS - 2) % VOCABULARY, (EOS - 1) % VOCABULARY] and len(got[1]) == 6


def test_stop_strings_and_streaming():
    stop = letters([14, 15])
    heard = ["", ""]

    def emit(row, more):
        heard[row] += more

    sampling = Sampling(max_new=12, stop=(stop,))
    got = generate(
        MODEL, {}, [[10], [30]], jax.random.key(0), sampling, decode=letters, emit=emit, stride=3
    )
    # Up to the last token whose text lacks the stop string.
    assert got == [[11, 12, 13, 14], list(range(31, 43))]
    assert heard == [letters(row) for row in got]


def test_neither_stride_nor_batch_changes_a_row():
    sampling = Sampling(max_new=20, temperature=3.0, top_k=20, top_p=0.9)
    prompts = [[10], [20, 21], [7]]
    whole = generate(MODEL, {}, prompts, jax.random.key(3), sampling)
    pieces = generate(MODEL, {}, prompts, jax.random.key(3), sampling, stride=3)
    first = generate(MODEL, {}, prompts[:1], jax.random.key(3), sampling)
    other = generate(MODEL, {}, prompts, jax.random.key(4), sampling)
    assert whole == pieces and first[0] == whole[0] and other != whole


def test_top_k_and_top_p_keep_the_right_tokens():
    p = jnp.log(jnp.array([[0.5, 0.05, 0.25, 0.15, 0.05]]))
    kept = lambda *a: np.flatnonzero(np.isfinite(text.keep_likely(p, *a)[0])).tolist()  # noqa: E731
    assert kept(2, 1.0) == [0, 2]
    assert kept(0, 0.5) == [0] and kept(0, 0.51) == [0, 2] and kept(0, 0.76) == [0, 2, 3]
    assert kept(0, 0.0) == [0] and kept(1, 0.9) == [0]


def test_draws_follow_the_probabilities():
    p = jnp.array([0.5, 0.3, 0.2])
    keys = jax.random.split(jax.random.key(0), 20_000)
    scores = jnp.broadcast_to(2 * jnp.log(p), (20_000, 3))
    got = text.choose(scores, keys, Sampling(temperature=2.0), False)
    share = np.bincount(np.asarray(got), minlength=3) / 20_000
    np.testing.assert_allclose(share, p, atol=0.015)


def test_repetition_penalty():
    scores = jnp.array([[4.0, 2.0, -1.0]])
    seen = jnp.array([[True, False, True]])
    np.testing.assert_allclose(text.penalise(scores, seen, 2.0), [[2.0, 2.0, -2.0]])
    # 11 was in the prompt and is penalised below all others.
    sampling = Sampling(max_new=1, repetition_penalty=1e6)
    got = generate(MODEL, {}, [[11, 10]], jax.random.key(0), sampling)
    assert got[0] != [11]


def test_an_xlstm_writes_what_its_scores_say():
    """Greedy tokens are the argmax of one pass over prompt and answer; rows are ragged."""
    from models import language, xlstm

    cfg = xlstm.SIZES["debug"]
    net = xlstm.XLSTM(cfg)
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = nn.meta.unbox(net.init(jax.random.key(0), tokens, method="text")["params"])
    params["layers"]["mlstm"]["i"]["bias"] += 9.0
    start = lambda net, params, rows, _: xlstm.init_state(net.cfg, rows, apart=net.apart)  # noqa: E731
    model = types.SimpleNamespace(predict=language.predict(net, start))
    prompts = [[1, 5, 9], [1], [1, 4, 4, 8, 100, 30, 7]]
    got = generate(model, params, prompts, jax.random.key(0), Sampling(max_new=8))
    for prompt, answer in zip(prompts, got):
        row = jnp.asarray([prompt + answer])
        best = net.apply({"params": params}, row, method="text")[0].argmax(-1)
        assert best[len(prompt) - 1 : len(prompt) + len(answer) - 1].tolist() == answer


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="at least one token"):
        generate(MODEL, {}, [[]], jax.random.key(0), Sampling())
    with pytest.raises(ValueError, match="need decode"):
        generate(MODEL, {}, [[1]], jax.random.key(0), Sampling(stop=("x",)))
