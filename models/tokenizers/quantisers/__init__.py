"""Quantisers of image tokenizers behind one interface: from an encoder's features to codes.

Codes are one array per image, row-major within a scale and scale after scale: uint32 words
[b, n, words] for bits (bit i in bit i mod 32 of word i // 32, so that 64 bits need no integer of
64 bits), int32 [b, n] for rows of a codebook. The KL posterior's codes are its means.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.scipy.special import xlogy
from jaxtyping import Array, Float


class Quantised(NamedTuple):
    """What a quantiser makes of the features of one micro-batch.

    latents: what the decoder takes; the gradient is the quantiser's.
    loss:    its weighted terms, a sum over images / images of the global batch.
    metrics: the same kind of sums.
    extra:   its state for the next step.
    """

    latents: Float[Array, "b h w c"]
    loss: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]
    extra: Any


class Quantiser(NamedTuple):
    """Pure functions; params and extra are the quantiser's own parts of the model's.

    init:     (rng) -> (params, extra), {} where there are none; params carry logical axes.
    quantise: (params, extra, features, rng, *, example, images) -> Quantised, for training:
              example [b] are the rows' numbers in the global batch, images their count there.
    encode:   (params, features) -> codes.
    decode:   (params, codes, grid) -> latents on the grid (h, w).
    schedule: (grid) -> ((h, w), ...) of the scales.
    finalise: (params, extra) -> params with what extra knows written in, or None.
    """

    init: Callable[..., Any]
    quantise: Callable[..., Quantised]
    encode: Callable[..., Any]
    decode: Callable[..., Any]
    schedule: Callable[..., Any]
    finalise: Callable[..., Any] | None = None


def perplexity(hits: Float[Array, "v"]) -> Float[Array, ""]:
    """exp of the entropy of these counts: how many codes used alike would be as uncertain."""
    p = hits / hits.sum()
    return jnp.exp(-xlogy(p, p).sum())
