"""Gradient comparison: exact on a loss whose gradients are known."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from eval import gradients

PARAMS = {
    "decoder": {"layers": {"w": jnp.array([1.0, 2.0])}, "embedding": jnp.array([3.0])},
    "head": {"w": jnp.array([5.0])},
}


def loss(params, extra, batch, rng, *, step, norms):
    """Visual gradient (6, 0) / norm, text gradient (3, 4) / norm on the layers."""
    w, embedding = params["decoder"]["layers"]["w"], params["decoder"]["embedding"]
    visual = 6.0 * w[0] * params["head"]["w"][0] / 5.0
    text = 3.0 * w[0] + 4.0 * w[1] + 100.0 * embedding[0]
    return visual / norms["visual"] + text / norms["text"], ({}, extra)


def model_of(**norms):
    terms = {k: jnp.float32(v) for k, v in norms.items()}
    return SimpleNamespace(loss=loss, norms=lambda batch: terms)


def compare(model, trunk="decoder"):
    return gradients.compare(model, PARAMS, {}, jax.random.key(0), step=1, trunk=trunk)


def test_norms_and_cosine():
    metrics = compare(model_of(visual=2.0, text=1.0))
    assert metrics["visual_norm"] == pytest.approx(3.0)
    assert metrics["text_norm"] == pytest.approx(5.0)  # the tied embedding is not the trunk
    assert metrics["cosine"] == pytest.approx(0.6)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="config.evaluation.trunk='body': the model has decoder"):
        compare(model_of(visual=1.0, text=1.0), trunk="body")
    with pytest.raises(ValueError, match="needs the loss term 'text'"):
        compare(model_of(visual=1.0))
