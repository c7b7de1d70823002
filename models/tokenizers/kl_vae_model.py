"""Training of the KL autoencoder behind the model seam: reconstruction + LPIPS + beta KL.

All terms are per pixel value, so that LDM's beta = 1e-6 means what it does there:
loss = mean |x - x'| + w LPIPS(x, x') + beta KL / (pixels x 3).
"""

import jax.numpy as jnp

from models import Model, sized
from models.tokenizers import autoencoder, kl_vae, kl_vae_weights
from models.tokenizers.quantisers import kl


def build(config) -> Model:
    """The autoencoder of config.model.vae; batches are {image uint8, label int32}."""
    m, dtype = config.model, jnp.dtype(config.precision)
    cfg = sized(kl_vae.SIZES, m.vae, "model.vae")

    def encode(params, images):
        return kl_vae.encode(params, cfg, images, dtype=dtype)

    def decode(params, z):
        return kl_vae.decode(params, cfg, z, dtype=dtype)

    def encode_latents(params, images):
        z = kl_vae.posterior_mean(encode(params, images))
        return kl_vae.tokens_from_latents(kl_vae.normalise(z, params["latents"]), cfg.patch)

    def decode_latents(params, tokens):
        z = kl_vae.latents_from_tokens(tokens, cfg.patch)
        return decode(params, kl_vae.denormalise(z, params["latents"]))

    def reconstruct(params, images):
        return decode(params, kl_vae.posterior_mean(encode(params, images)))

    return autoencoder.build(
        config,
        net=kl_vae.KLVAE(cfg, dtype, config.remat),
        stride=cfg.stride,
        quantiser=kl.build(cfg, m.kl),
        part="latents",
        init_params=lambda rng: kl_vae.init(rng, cfg),
        predict={
            "encode": encode,
            "decode": decode,
            "reconstruct": reconstruct,
            "encode_latents": encode_latents,
            "decode_latents": decode_latents,
        },
        weights=kl_vae_weights.weight_map(cfg),
    )
