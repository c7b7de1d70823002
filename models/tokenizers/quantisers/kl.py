"""The Gaussian posterior of a KL autoencoder behind the quantisers' interface."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.blocks.common import row_keys
from models.tokenizers import kl_vae
from models.tokenizers.quantisers import Quantised, Quantiser

MOMENTUM = 0.99  # of the running statistics of the latents


def update_statistics(stats: dict, z: Float[Array, "b h w z"]) -> dict:
    """Running first and second moments of the latents per channel, with the weight they carry."""
    z = jax.lax.stop_gradient(z)
    new = {"weight": 1.0, "mean": z.mean((0, 1, 2)), "square": jnp.square(z).mean((0, 1, 2))}
    return jax.tree.map(lambda old, x: MOMENTUM * old + (1 - MOMENTUM) * x, stats, new)


def finalise(params: dict, extra: dict) -> dict:
    """{mean, std} of the latents from the running statistics: what is exported."""
    del params
    weight = jnp.maximum(extra["weight"], 1e-6)
    mean = extra["mean"] / weight
    std = jnp.sqrt(jnp.maximum(extra["square"] / weight - jnp.square(mean), 1e-12))
    return {"mean": mean, "std": std}


def _posterior_std(moments: Float[Array, "b h w z2"]) -> Float[Array, "b"]:
    return jnp.exp(0.5 * kl_vae.split_moments(moments)[1]).mean((1, 2, 3))


def build(cfg: kl_vae.KLVAEConfig, beta: float) -> Quantiser:
    """Samples with per-image noise; the loss is beta KL / values of the image.

    Codes are the posterior's means. The parameters {mean, std} belong to the network
    (`kl_vae.LatentStatistics`), so `init` gives the statistics only.
    """

    def init(rng):
        del rng
        return {}, {"weight": jnp.zeros(()), "mean": jnp.zeros(cfg.z), "square": jnp.zeros(cfg.z)}

    def quantise(params, extra, features, rng, *, example, images):
        del params
        z = kl_vae.sample_posterior(features, row_keys(rng, example))
        kl = kl_vae.kl_divergence(features).sum() / images
        values = z.shape[1] * z.shape[2] * cfg.stride**2 * 3
        metrics = {"kl": kl, "posterior_std": _posterior_std(features).sum() / images}
        return Quantised(z, beta * kl / values, metrics, update_statistics(extra, z))

    def decode(params, codes, grid):
        del params, grid
        return codes

    return Quantiser(
        init=init,
        quantise=quantise,
        encode=lambda params, features: kl_vae.posterior_mean(features),
        decode=decode,
        schedule=lambda grid: (grid,),
        finalise=finalise,
    )
