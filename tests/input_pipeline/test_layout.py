"""Token layouts of prompts and questions, also when they do not fit."""

import numpy as np
import pytest

from input_pipeline import tokenizers
from input_pipeline.layout import encode_answered, encode_prompt, encode_question


@pytest.fixture
def tokenizer(make_config):
    return tokenizers.load(make_config().data)


def test_prompt(tokenizer):
    ids = tokenizer.encode("red apple")
    row = encode_prompt(tokenizer, "red apple", 16)
    assert row.tokens.dtype == np.int32 and row.tokens.shape == (16,)
    assert row.tokens.tolist() == [2, *ids] + [0] * (15 - len(ids))
    assert row.length == 1 + len(ids) and not row.truncated
    empty = encode_prompt(tokenizer, "", 4)
    assert empty.tokens.tolist() == [2, 0, 0, 0] and empty.length == 1
    cut = encode_prompt(tokenizer, "red apple", 2)
    assert cut.tokens.tolist() == [2, ids[0]] and cut.length == 2 and cut.truncated


def test_answered_is_question_answer_eos(tokenizer):
    q, a = tokenizer.encode("how many?"), tokenizer.encode("3")
    row = encode_answered(tokenizer, "how many?", "3", 32)
    want = [2, *q, *tokenizer.newline, *a, 1]
    assert row.tokens[: row.length].tolist() == want and row.length == len(want)
    assert row.prefix == len(q) + 2 and not row.truncated
    assert not row.tokens[row.length :].any()
    prefix = encode_question(tokenizer, "how many?", 32)  # what generation starts from
    assert prefix.length == row.prefix
    np.testing.assert_array_equal(prefix.tokens[: row.prefix], row.tokens[: row.prefix])


@pytest.mark.parametrize("question", ["why?", "why " * 40])
@pytest.mark.parametrize("answer", ["no", "because " * 40])
@pytest.mark.parametrize("length", [8, 12, 24])
def test_what_does_not_fit_is_cut_and_marked(tokenizer, question, answer, length):
    row = encode_answered(tokenizer, question, answer, length)
    fits = 3 + len(tokenizer.encode(question)) + len(tokenizer.encode(answer)) <= length
    assert row.truncated != fits
    assert row.tokens.shape == (length,) and row.prefix < row.length <= length
    assert row.tokens[0] == 2 and row.tokens[row.prefix - 1] == tokenizer.newline[0]
    target = [*tokenizer.encode(answer), tokenizer.eos]
    kept = row.tokens[row.prefix : row.length].tolist()
    assert kept == target[: len(kept)]  # an answer that was cut has no EOS
