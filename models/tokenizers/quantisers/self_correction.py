"""Bitwise self-correction (Infinity, arXiv 2412.04431, 3.4; spec section 2.4).

The transformer's inputs are made from codes with flipped bits, its labels from what the flipped
codes leave over: it learns to correct its own mistakes. Labels come from area-averaged residuals;
the next scale's input is a linear resize of the sum so far, without antialiasing.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from kernels.bitwise.bits import pack
from models.blocks.common import row_keys
from models.tokenizers.conv import space_to_depth
from models.tokenizers.quantisers.bits import code, unit
from models.tokenizers.quantisers.resize import area, resize
from models.tokenizers.quantisers.schedules import Schedule

Flips = Sequence[Bool[Array, "b h w d"] | None]


def flip_probabilities(
    rng: Array, scales: int, strength: float, noise_scales: int = 13
) -> Float[Array, "k"]:
    """0.01 x an integer drawn from 0 .. 100 strength, ends included, for each scale of a batch;
    0 behind the first `noise_scales`."""
    most = int(100 * strength + 1e-6)
    p = 0.01 * jax.random.randint(rng, (scales,), 0, most + 1)
    return jnp.where(jnp.arange(scales) < noise_scales, p, 0.0)


def draw_flips(
    rng: Array,
    example: Array,
    schedule: Schedule,
    d: int,
    *,
    strength: float = 0.3,
    noise_scales: int = 13,
) -> list[Bool[Array, "b h w d"]]:
    """Which bits to flip: the probability is drawn per scale and batch, each bit on its own.

    example [b]: the rows' numbers in the global batch, so that shards do not change a row's bits.
    """
    probability_rng, uniform_rng = jax.random.split(rng)
    p = flip_probabilities(probability_rng, len(schedule), strength, noise_scales)
    keys = row_keys(uniform_rng, example)
    return [
        jax.vmap(
            lambda key, k=k, grid=grid: jax.random.uniform(jax.random.fold_in(key, k), (*grid, d))
        )(keys)
        < p[k]
        for k, grid in enumerate(schedule)
    ]


def self_correction(
    features: Float[Array, "b h w d"],
    schedule: Schedule,
    flips: Flips = (),
    *,
    relabel: bool = True,
    patchify: bool = False,
) -> tuple[Float[Array, "b m e"], UInt32[Array, "b n words"]]:
    """(inputs of scales 2 .. K, packed labels of scales 1 .. K) of a frozen encoder's features.

    flips: bits of each scale to flip, None or nothing for none (teacher forcing). relabel=False is
    the ablation "random flip": flipped inputs, labels of the residuals without flips. patchify: the
    schedule is the tokenizer's, whose 2 x 2 latents become one token of 4 d bits, in the order
    (bit, row, column).
    """
    grid, d = features.shape[1:3], features.shape[-1]
    shown = clean = jnp.zeros_like(features)  # sums of flipped and of true codes
    inputs, labels = [], []
    for k, here in enumerate(schedule):
        b = unit(resize(features - (shown if relabel else clean), here, area)) > 0
        labels.append(b)
        flip = flips[k] if k < len(flips) else None
        shown = shown + resize(code(b if flip is None else b ^ flip), grid)
        if not relabel:
            clean = clean + resize(code(b), grid)
        if k + 1 < len(schedule):
            inputs.append(resize(shown, schedule[k + 1]))
    if patchify:
        inputs, labels = ([space_to_depth(x, 2) for x in xs] for xs in (inputs, labels))
        d = 4 * d
    flat = lambda xs: jnp.concatenate([x.reshape(x.shape[0], -1, d) for x in xs], 1)  # noqa: E731
    return flat(inputs) if inputs else jnp.zeros((len(features), 0, d)), pack(flat(labels))
