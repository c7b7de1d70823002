"""Vector quantisation: nearest rows of a codebook (VQGAN), one scale or residual scales (VAR).

A scale's residual is averaged to its grid, each vector becomes its nearest row by squared L2, the
rows go back by cubic interpolation and through a convolution phi (VAR, arXiv 2404.02905; one scale:
neither). Codes that nothing is near to are revived: they move to features of the batch.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from models.tokenizers.conv import boxed, conv
from models.tokenizers.quantisers import Quantised, Quantiser, perplexity
from models.tokenizers.quantisers.resize import area, cubic, resize
from models.tokenizers.quantisers.schedules import Schedule, schedule_for, split, tokens

MOMENTUM = 0.99  # of the running use of each code
USED = 0.03  # running use, as a share of equal use, from which a code counts as used
PHI = 0.5  # share of the convolution in phi, the rest is the identity


def nearest(z: Float[Array, "*n c"], codebook: Float[Array, "v c"]) -> Int[Array, "*n"]:
    """Row with the least |z|^2 + |e|^2 - 2 z.e, the first of equals; in float32."""
    product = jnp.matmul(z, codebook.T, precision=jax.lax.Precision.HIGHEST)
    z2, e2 = jnp.square(z).sum(-1, keepdims=True), jnp.square(codebook).sum(-1)
    return jnp.argmin(z2 + e2 - 2.0 * product, axis=-1).astype(jnp.int32)


def phi_of_scale(scale: int, scales: int, phis: int) -> int:
    """Which of the shared convolutions a scale uses: the nearest of evenly spaced ticks."""
    edge = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
    ticks = np.linspace(edge, 1 - edge, phis)
    return int(np.argmin(np.abs(ticks - scale / max(scales - 1, 1))))


def phi(params: dict, rows: Float[Array, "b h w c"], scale: int, scales: int) -> Array:
    """The blend of the rows with their convolution; the identity without convolutions."""
    phis = len(params) - 1
    if not phis:
        return rows
    own = params[f"phi_{phi_of_scale(scale, scales, phis)}"]
    with jax.default_matmul_precision("highest"):  # the next scale's nearest rows depend on it
        return (1 - PHI) * rows + PHI * conv(rows, own["kernel"], own["bias"])


class Scales(NamedTuple):
    """Sums after each scale [b, h, w, c] with the codebook's gradient; indices and vectors."""

    sums: list[Float[Array, "b h w c"]]
    indices: list[Int[Array, "b h w"]]
    vectors: list[Float[Array, "b h w c"]]


def residual(params: dict, features: Float[Array, "b h w c"], schedule: Schedule) -> Scales:
    """Quantises scale after scale what the scales before left over."""
    features = jax.lax.stop_gradient(features)
    codebook = params["embedding"]
    total, got = jnp.zeros_like(features), Scales([], [], [])
    for k, grid in enumerate(schedule):
        z = resize(features - jax.lax.stop_gradient(total), grid, area)
        index = nearest(z, jax.lax.stop_gradient(codebook))
        rows = resize(codebook[index], features.shape[1:3], cubic)
        total = total + phi(params, rows, k, len(schedule))
        got.sums.append(total)
        got.indices.append(index)
        got.vectors.append(z)
    return got


def latents(params: dict, indices: Sequence[Int[Array, "b h w"]]) -> Float[Array, "b h w c"]:
    """Sum over scales of what their rows become: what the decoder takes."""
    grid, scales = indices[-1].shape[1:3], len(indices)
    rows = [resize(params["embedding"][i], grid, cubic) for i in indices]
    return sum(phi(params, r, k, scales) for k, r in enumerate(rows))


def revive(rng: Array, vectors, codebook, state: dict, threshold: float) -> dict:
    """State in which every code used less than `threshold` of equal use stands on a random vector.

    vectors: [n, c] of this batch; codebook: without the offsets. Same rng, same choice.
    """
    chosen = vectors[jax.random.randint(rng, (len(codebook),), 0, len(vectors))]
    dead = state["use"] < threshold
    offset = jax.lax.stop_gradient(jnp.where(dead[:, None], chosen - codebook, state["offset"]))
    return {"use": jnp.where(dead, 1.0, state["use"]), "offset": offset}


def build(cfg, options) -> Quantiser:
    """VQ with cfg.codebook rows of cfg.z.

    cfg: z, codebook, schedule, scales, phis. options: beta, legacy (beta on the codebook's term
    instead of the commitment, as in the released VQGAN), weight, revive, schedule (in training; ""
    = cfg's).

    extra: use [v], running hits of each code over equal use; offset [v, c], added to the trained
    rows: a revived code moves by its offset, so that the optimiser's state stays as it is.
    """
    if options is not None and options.drop_scales:
        raise ValueError(
            f"config.model.recipe.drop_scales={options.drop_scales}: quantiser 'vq' drops no "
            "scales, bsq and lfq do"
        )

    def schedule(grid):
        return schedule_for(cfg.schedule, grid, cfg.scales)

    def init(rng):
        axes = ("spatial", None, "channels_in", "channels_out")
        kernel = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        uniform = lambda key, shape: jax.random.uniform(key, shape, minval=-1, maxval=1) / shape[0]  # noqa: E731
        keys, size = jax.random.split(rng, cfg.phis + 1), (cfg.codebook, cfg.z)
        params = {"embedding": boxed(uniform, None, "channels_out")(keys[0], size)}
        for i, key in enumerate(keys[1:]):
            params[f"phi_{i}"] = {
                "kernel": boxed(kernel, *axes)(key, (3, 3, cfg.z, cfg.z), jnp.float32),
                "bias": boxed(jax.nn.initializers.zeros, "channels_out")(key, (cfg.z,)),
            }
        return params, {"use": jnp.ones(cfg.codebook), "offset": jnp.zeros(size)}

    def finalise(params, extra):
        return {**params, "embedding": params["embedding"] + extra["offset"]}

    def quantise(params, extra, features, rng, *, example, images):
        del example
        scales = schedule_for(options.schedule or cfg.schedule, features.shape[1:3], cfg.scales)
        share = features.shape[0] / images
        got = residual(finalise(params, extra), features, scales)
        stop = jax.lax.stop_gradient
        mse = lambda a, b: jnp.square(a - b).mean((1, 2, 3)).sum() / images  # noqa: E731
        commitment = sum(mse(features, stop(s)) for s in got.sums) / len(scales)
        codebook = sum(mse(s, stop(features)) for s in got.sums) / len(scales)
        on_commitment, on_codebook = (1.0, options.beta) if options.legacy else (options.beta, 1.0)
        loss = options.weight * (on_commitment * commitment + on_codebook * codebook)
        latent = stop(got.sums[-1]) + (features - stop(features))  # the value, exactly
        hits = sum(jnp.zeros(cfg.codebook).at[i.ravel()].add(1.0) for i in got.indices)
        p = hits / hits.sum()
        state = {**extra, "use": MOMENTUM * extra["use"] + (1 - MOMENTUM) * cfg.codebook * p}
        alike = perplexity(hits)
        bits = math.log2(cfg.codebook)
        metrics = {
            "commitment": commitment,
            "bits_per_token": share * bits,
            "bits_used": share * jnp.log2(alike),
            "codebook_usage": share * (state["use"] >= USED).mean(),
            "code_perplexity": share * alike,
            "bits_per_image": share * bits * tokens(scales),
        }
        if options.revive:
            vectors = jnp.concatenate([v.reshape(-1, cfg.z) for v in got.vectors])
            metrics["revived"] = share * (state["use"] < options.revive).sum()
            state = revive(rng, vectors, params["embedding"], state, options.revive)
        return Quantised(latent, loss, metrics, state)

    def encode(params, features):
        got = residual(params, features, schedule(features.shape[1:3]))
        return jnp.concatenate([i.reshape(i.shape[0], -1) for i in got.indices], axis=1)

    def decode(params, indices, grid):
        return latents(params, split(indices, schedule(grid)))

    return Quantiser(init, quantise, encode, decode, schedule, finalise)
