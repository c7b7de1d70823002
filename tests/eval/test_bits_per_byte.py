"""Bits per byte: the bytes of the predicted tokens, a model that knows nothing, xz beside it."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval import bits_per_byte
from eval.run import table
from input_pipeline import text, tokenizers
from models.language import next_tokens


@pytest.fixture
def config(text_config):
    return text_config


def test_bytes_of_every_token(config):
    tokenizer = tokenizers.load(config.data)
    lengths = bits_per_byte.byte_lengths(tokenizer)
    for said in ("the snail", "Häuschen かたつむり 🐌\n"):
        assert lengths[tokenizer.encode(said)].sum() == len(b" " + said.encode())
    assert lengths[[tokenizer.pad, tokenizer.bos, tokenizer.eos]].tolist() == [0, 0, 0]


def test_a_uniform_model_and_its_baselines(config):
    """Every target costs log2 of the vocabulary; xz knows the words once it has read some."""
    size = tokenizers.load(config.data).vocab_size

    def text_nll(params, batch):
        count = next_tokens(batch)[1].sum(1)
        return {"nll": count * jnp.log(size), "correct": count / 4, "count": count}

    model = SimpleNamespace(predict={"text_nll": text_nll})
    found = bits_per_byte.build(config)(model, {}, step=1, rng=jax.random.key(0), workdir=".")
    windows, tokenizer, _ = text.windows(config.data, "test")
    rows = int(found["windows"])
    targets, size_of = 0, bits_per_byte.byte_lengths(tokenizer)
    total = 0
    for ids, segments in zip(windows.tokens[:rows], windows.segment_ids[:rows]):
        for t in range(1, 32):
            if segments[t] == segments[t - 1] > 0:
                targets, total = targets + 1, total + size_of[ids[t]]
                total -= ids[t - 1] == tokenizer.bos  # the space that the tokenizer puts there
    assert found["bits_per_byte"] == pytest.approx(np.log2(size) * targets / total, rel=1e-5)
    assert found["loss"] == pytest.approx(np.log(size), rel=1e-5) and found["accuracy"] == 0.25
    assert found["bytes_per_token"] == pytest.approx(total / targets)
    assert 0 < found["bits_per_byte_xz_trained"] < found["bits_per_byte_xz"] < 8
    shown = table({f"bits_per_byte/{k}": v for k, v in found.items()}, "x")
    assert "xz trained" in shown and shown.count("\n") == 6
