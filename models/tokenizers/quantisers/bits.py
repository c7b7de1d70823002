"""Binary quantisers: multi-scale residual BSQ (arXiv 2412.04431, 2406.07548) and LFQ.

A scale's residual is averaged to its grid, its signs are the bits, and the code goes back by linear
interpolation: BSQ takes signs on the unit sphere, codes +-1 / sqrt(d), LFQ signs of the features
as they are, codes +-1. One scale is a schedule of one entry.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from kernels.bitwise.bits import codes, pack, unpack
from models.tokenizers.quantisers import Quantised, Quantiser, perplexity
from models.tokenizers.quantisers.resize import area, resize
from models.tokenizers.quantisers.schedules import Schedule, schedule_for, split, tokens

COUNTED = 12  # bits up to which a training step counts whole codes, on all devices together
JOINT_LIMIT = 20  # bits above which LFQ's joint entropy, an array of tokens x 2^d, makes no sense


def unit(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """x over its norm (at least 1e-12) on the last axis."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-24))


def code(bits: Bool[Array, "*n d"], spherical: bool = True) -> Float[Array, "*n d"]:
    """+-1 / sqrt(d) of each bit (LFQ: +-1)."""
    return codes(bits) if spherical else jnp.where(bits, 1.0, -1.0)


class Scales(NamedTuple):
    """Everything about the scales of a batch.

    sum:   [b, h, w, d], the interpolated codes added up.
    bits:  [b, h_k, w_k, d] of each scale.
    units: what was quantised, with gradients, of each scale.
    """

    sum: Float[Array, "b h w d"]
    bits: list[Bool[Array, "b h w d"]]
    units: list[Float[Array, "b h w d"]]


def residual(
    features: Float[Array, "b h w d"],
    schedule: Schedule,
    *,
    spherical: bool = True,
    keep: Float[Array, "k"] | None = None,
    through: bool = False,
) -> Scales:
    """Quantises scale after scale what the scales before left over.

    keep: 0 drops a scale (its code counts as zeros), 1 keeps it. through: gradients flow through
    the subtraction of earlier scales' codes as well ("remove_residual_detach").
    """
    total = jnp.zeros_like(features)
    subtracted = total
    bits, units = [], []
    for k, grid in enumerate(schedule):
        u = resize(features - subtracted, grid, area)
        u = unit(u) if spherical else u
        b = u > 0
        q = code(b, spherical) + (u - jax.lax.stop_gradient(u))  # exactly the code; gradient of u
        if keep is not None:
            q = q * keep[k]
        q = resize(q, features.shape[1:3])
        total = total + q
        subtracted = subtracted + (q if through else jax.lax.stop_gradient(q))
        bits.append(b)
        units.append(u)
    return Scales(total, bits, units)


def latents(
    bits: Sequence[Bool[Array, "b h w d"]], spherical: bool = True
) -> Float[Array, "b h w d"]:
    """Sum over scales of the interpolated codes: what the decoder takes."""
    grid = bits[-1].shape[1:3]
    return sum(resize(code(b, spherical), grid) for b in bits)


def pack_scales(bits: Sequence[Bool[Array, "b h w d"]]) -> UInt32[Array, "b n words"]:
    """Words of all scales, row-major, one after the other."""
    return pack(jnp.concatenate([b.reshape(b.shape[0], -1, b.shape[-1]) for b in bits], axis=1))


def unpack_scales(
    words: UInt32[Array, "b n words"], schedule: Schedule, d: int
) -> list[Bool[Array, "b h w d"]]:
    """Exact inverse of `pack_scales`."""
    return split(unpack(words, d) != 0, schedule)


# ---------------------------------------------------------------- losses


def _binary_entropy(p: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Nats; the logarithms have +1e-8 as the official code has."""
    return -(p * jnp.log(p + 1e-8) + (1 - p) * jnp.log(1 - p + 1e-8))


def zero_probability(units: Float[Array, "*n d"], inv_temperature: float) -> Float[Array, "*n d"]:
    """Probability that a bit is 0: softmax over the two codes at this inverse temperature."""
    return jax.nn.sigmoid(-4.0 * inv_temperature / math.sqrt(units.shape[-1]) * units)


def factorised_entropies(
    units: Float[Array, "b h w d"], inv_temperature: float
) -> tuple[Float[Array, "b"], Float[Array, ""]]:
    """(entropy of a token's code, mean over the image; entropy of the mean code), in nats.

    The first is exact, since bits are independent given the token; the second, the sum over bits
    of the entropy of their mean over all tokens, is an upper bound that costs O(d), not O(2^d).
    """
    p = zero_probability(units, inv_temperature)
    return _binary_entropy(p).sum(-1).mean((1, 2)), _binary_entropy(p.mean((0, 1, 2))).sum()


def joint_entropies(
    values: Float[Array, "b h w d"], inv_temperature: float, size: float = 1.0
) -> tuple[Float[Array, "b"], Float[Array, ""]]:
    """The same two over all 2^d codes +-size, by a softmax of 2 values . code: [tokens, 2^d]."""
    d = values.shape[-1]
    if d > JOINT_LIMIT:
        raise ValueError(
            f"quantiser 'lfq' compares with all 2^{d} codes; at most {JOINT_LIMIT} bits"
        )
    every = (jnp.arange(2**d)[:, None] >> jnp.arange(d)) & 1
    every = jnp.where(every == 1, size, -size)
    highest = jax.lax.Precision.HIGHEST  # rounding would be multiplied by inv_temperature
    logits = jnp.matmul(2.0 * inv_temperature * values, every.T, precision=highest)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    p = jnp.exp(log_p)
    mean = p.mean((0, 1, 2))
    return -(p * log_p).sum(-1).mean((1, 2)), -(mean * jnp.log(mean + 1e-8)).sum()


def bits_used(bits: Sequence[Bool[Array, "b h w d"]]) -> Float[Array, ""]:
    """Entropy in bits per token of the bits of a batch, taken as independent; at most d."""
    means = [b.mean((0, 1, 2)) for b in bits]
    counts = [b.shape[1] * b.shape[2] for b in bits]
    entropies = [_binary_entropy(m).sum() / math.log(2) * n for m, n in zip(means, counts)]
    return sum(entropies) / sum(counts)


# ---------------------------------------------------------------- behind the interface


def kept_scales(rng: Array, scales: int, rate: float) -> Float[Array, "k"]:
    """0 for scales to drop: one draw per scale for the whole batch, the last is always kept."""
    keep = jax.random.bernoulli(rng, 1.0 - rate, (scales,)).at[-1].set(True)
    return keep.astype(jnp.float32)


def build(cfg, options) -> Quantiser:
    """BSQ or LFQ of cfg.z bits.

    cfg: quantiser (bsq | lfq), z, schedule, scales. options: inv_temperature, commitment, entropy,
    weight (of all terms), drop_scales, residual_gradient, schedule (in training; "" = cfg's).

    Per scale the loss is commitment |u - sg(q)|^2 / d + entropy (H_token - H_code) / temperature
    (LFQ: without the temperature), averaged over the scales that are kept. H_code is no sum over
    images: it is taken over the micro-batch, on all its devices, weighted by its share of images.
    """
    spherical = cfg.quantiser == "bsq"
    if not spherical and cfg.z > JOINT_LIMIT:
        raise ValueError(
            f"config.model.tokenizer.z={cfg.z}: quantiser 'lfq' takes at most {JOINT_LIMIT} bits"
        )

    def schedule(grid):
        return schedule_for(cfg.schedule, grid, cfg.scales)

    def scale_terms(u, b):
        """(per-image sums, batch entropy) of one scale."""
        square = jnp.square(u - jax.lax.stop_gradient(code(b, spherical))).mean((1, 2, 3))
        entropies = factorised_entropies if spherical else joint_entropies
        return square, *entropies(u, options.inv_temperature)

    def quantise(params, extra, features, rng, *, example, images):
        del params, example
        scales = schedule_for(options.schedule or cfg.schedule, features.shape[1:3], cfg.scales)
        share = features.shape[0] / images
        keep = None
        if options.drop_scales:
            keep = kept_scales(rng, len(scales), options.drop_scales)
        got = residual(
            features, scales, spherical=spherical, keep=keep, through=options.residual_gradient
        )
        kept = jnp.ones(len(scales)) if keep is None else keep
        terms = [scale_terms(u, b) for u, b in zip(got.units, got.bits)]
        square, own = (
            sum(kept[k] * t[i].sum() for k, t in enumerate(terms)) / kept.sum() / images
            for i in (0, 1)
        )
        shared = share * sum(kept[k] * t[2] for k, t in enumerate(terms)) / kept.sum()
        spread = (own - shared) / (options.inv_temperature if spherical else 1.0)
        loss = options.weight * (options.commitment * square + options.entropy * spread)
        used = bits_used(got.bits)
        metrics = {
            "commitment": square,
            "entropy_token": own,  # nats, as the next
            "entropy_code": shared,
            "bits_per_token": share * cfg.z,
            "bits_used": share * used,
            "codebook_usage": share * used / cfg.z,
            "bits_per_image": share * cfg.z * tokens(scales),
        }
        if cfg.z <= COUNTED:
            words = pack_scales(got.bits).astype(jnp.int32)
            hits = jnp.zeros(2**cfg.z).at[words.ravel()].add(1.0)
            metrics["code_perplexity"] = share * perplexity(hits)
        return Quantised(got.sum, loss, metrics, extra)

    def encode(params, features):
        del params
        return pack_scales(
            residual(features, schedule(features.shape[1:3]), spherical=spherical).bits
        )

    def decode(params, words, grid):
        del params
        return latents(unpack_scales(words, schedule(grid), cfg.z), spherical)

    def init(rng) -> tuple[Any, Any]:
        del rng
        return {}, {}

    return Quantiser(init, quantise, encode, decode, schedule)
