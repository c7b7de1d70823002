"""Spread of the loss over tokens and cost of a byte, on models whose answers are known."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from eval import bits_per_byte, token_cost
from input_pipeline import documents, text, tokenizers
from models import language


def measured(config, logits, params=None, step=7):
    def token_nll(params, batch):
        after, counts = language.next_tokens(batch)
        scores = jax.nn.log_softmax(logits(params, batch))
        return -jnp.take_along_axis(scores, after[..., None], axis=-1)[..., 0], counts

    model = SimpleNamespace(predict={"logits": logits, "token_nll": token_nll})
    build = token_cost.build(config)
    return build(model, params, step=step, rng=jax.random.key(0), workdir=".")


def test_a_model_that_knows_nothing_finds_all_tokens_equally_hard(text_config):
    """log V each, no spread; FLOPs are those of its one matrix."""
    config = text_config
    size = tokenizers.load(config.data).vocab_size
    params = jnp.zeros((size, size))

    def logits(params, batch):
        return jax.nn.one_hot(batch["tokens"], size) @ params

    found = measured(config, logits, params)
    assert found["nats_mean"] == pytest.approx(math.log(size), rel=1e-5)
    assert found["nats_std"] < 1e-5 and found["easy_tokens"] == 0
    assert found["flops_per_token"] == 2 * size * size
    length, rows = config.data.length, config.batch_size
    assert found["training_petaflops"] == pytest.approx(3e-15 * 2 * size * size * length * rows * 7)
    tokenizer = tokenizers.load(config.data)
    texts, _ = documents.load(config.data, "test")
    tokens = sum(len(tokenizer.encode(t)) for t in texts)
    assert found["tokens_per_document"] == pytest.approx(tokens / len(texts))
    lengths = bits_per_byte.byte_lengths(tokenizer)
    windows, _, _ = text.windows(config.data, "test")
    assert found["flops_per_byte"] * found["context_bytes"] == pytest.approx(
        found["flops_per_token"] * length
    )
    assert 0 < found["context_bytes"] <= length * lengths[windows.tokens].max()


def test_a_model_that_is_told_every_other_token(text_config):
    """Half of the tokens are easy, and the spread is as large as the mean."""
    config = text_config
    size = tokenizers.load(config.data).vocab_size

    def logits(params, batch):
        after = jnp.pad(batch["tokens"][:, 1:], ((0, 0), (0, 1)))
        told = (jnp.arange(after.shape[1]) % 2 == 0)[None, :, None]
        return jnp.where(told, 30.0 * jax.nn.one_hot(after, size), 0.0)

    found = measured(config, logits)
    assert 0.4 < found["easy_tokens"] < 0.6
    assert found["std_over_mean"] == pytest.approx(1.0, abs=0.2)
    assert found["nats_p10"] < 1e-4 and found["nats_p90"] == pytest.approx(math.log(size), rel=1e-4)
